"""SSD on MobileNet, SqueezeNet and VGG: the five networks of qfgaohao's and dusty-nv's pytorch-ssd, name for name.

B batch, C channels, K classes, P priors, S shapes a cell. Two heads look at each of six maps; priors and outputs share
one order: map, row, column, shape.
"""

import math

import torch
from torch import nn

from models import layers
from models.errors import WeightsError
from models.mobilenet import InvertedResidual, mobilenet_v1, mobilenet_v2
from models.squeezenet import squeezenet1_1
from models.vgg import vgg16
from ops import boxes

# Pixels at 300 x 300 and the (min, max) size of each map's squares.
MOBILE_SIZES = ((60, 105), (105, 150), (150, 195), (195, 240), (240, 285), (285, 330))
VGG_SIZES = ((30, 60), (60, 111), (111, 162), (162, 213), (213, 264), (264, 315))
# The published step of each map's cells in pixels; None: the cells share out the image (100, 150, 300 at 300 pixels).
MOBILE_STRIDES = (16, 32, 64, None, None, None)
VGG_STRIDES = (8, 16, 32, 64, None, None)
MOBILE_RATIOS = ((2, 3),) * 6
VGG_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))


class SSD(nn.Module):
    """base_net with `taps` (map after that many layers), extras (one map each), and two heads a map.

    channels: of each map. head(inputs, outputs) makes the first five heads, last_head the sixth.
    add_on: a layer between the first tap and its head alone. split_tap: this block of base_net gives the first map from
    its inside (`InvertedResidual.split`). sizes, strides, ratios: as the tables above.
    """

    box_weights = (10, 10, 5, 5)  # centre variance 0.1, size variance 0.2

    def __init__(
        self,
        num_classes,
        base_net,
        extras,
        *,
        taps,
        channels,
        head,
        last_head,
        sizes,
        strides=MOBILE_STRIDES,
        ratios=MOBILE_RATIOS,
        add_on=None,
        split_tap=None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.sizes, self.strides, self.ratios = check_sizes(sizes, len(channels)), strides, ratios
        self.taps, self.split_tap = taps, split_tap
        self.base_net = base_net
        self.extras = nn.ModuleList(extras)
        shapes = [2 + 2 * len(r) for r in ratios]
        makers = [head] * (len(channels) - 1) + [last_head]

        def heads(values):
            return nn.ModuleList(make(c, n * values) for make, c, n in zip(makers, channels, shapes))

        self.classification_headers = heads(num_classes + 1)
        self.regression_headers = heads(4)
        self.source_layer_add_ons = nn.ModuleList([add_on] if add_on else [])
        self.initialise()
        self._cache = {}  # (kind, image size, device) -> priors or anchors; no part of the state dict

    def initialise(self):
        """Kaiming everywhere (`layers.initialise`) but in the layers that give the outputs.

        Logits: Xavier as published, so that the hard negatives mined at the first steps differ from each other and the
        features get a gradient of full size. Offsets: small (0.25 of what the map brings, so a few percent of a prior's
        size), so that the first predictions are the priors and the box loss starts at the size of the true offsets.
        Their deviation is 0.01 for 1x1 heads of 512 channels and follows the fan of the others.
        """
        layers.initialise(self)
        for logits, offsets in zip(self.classification_headers, self.regression_headers):
            nn.init.xavier_uniform_(last_convolution(logits).weight)
            weight = last_convolution(offsets).weight
            nn.init.normal_(weight, std=0.25 * weight[0].numel() ** -0.5)

    def feature_maps(self, x):
        """Normalised images [B,3,H,W] -> six maps [B,C,h,w], large to small."""
        maps = []
        for index, layer in enumerate(self.base_net):
            if index == self.split_tap:
                widened, x = layer.split(x)
                maps.append(widened)
            else:
                x = layer(x)
            if index + 1 in self.taps:
                maps.append(x)
        for layer in self.extras:
            x = layer(x)
            maps.append(x)
        for add_on in self.source_layer_add_ons:
            maps[0] = add_on(maps[0])
        return maps

    def forward(self, images):
        """Normalised images [B,3,H,W] -> {"logits": [B,P,K+1] background first, "offsets": [B,P,4]}, both raw."""
        logits, offsets = [], []
        for x, classify, locate in zip(self.feature_maps(images), self.classification_headers, self.regression_headers):
            # A view where memory is channels_last.
            logits.append(layers.flat(classify(x), self.num_classes + 1))  # [B,hwS,K+1]
            offsets.append(layers.flat(locate(x), 4))  # [B,hwS,4]
        return {"logits": torch.cat(logits, 1), "offsets": torch.cat(offsets, 1)}

    @torch.no_grad()
    def map_sizes(self, image_size):
        """(h, w) of each map for an image of (height, width): a forward pass of shapes alone, on the meta device.

        Raises WeightsError where the image is too small for a layer.
        """
        state = {name: torch.empty_like(value, device="meta") for name, value in self.state_dict().items()}
        images = torch.empty((2, 3, *image_size), device="meta")  # two: batch norm refuses to train on one value
        try:
            outputs = torch.func.functional_call(Maps(self), {f"net.{k}": v for k, v in state.items()}, (images,))
        except RuntimeError as error:
            height, width = image_size
            raise WeightsError(
                f"{self.name}: an image of {width}x{height} is too small ({error}); use a larger resolution"
            ) from error
        return [tuple(x.shape[-2:]) for x in outputs]

    def priors(self, image_size):
        """Priors for images of `image_size` (height, width): float32 [P,4], relative cx, cy, w, h in [0,1].

        On the network's device, computed once a size. At 300 they are the published ones. Sizes grow with the square
        root of the image's area, so that squares stay squares in pixels also where the image is none.
        """
        return self._cached("priors", image_size, self._priors)

    def anchors(self, image_size):
        """`priors` as xyxy in pixels of the image: float32 [P,4]; corners may lie outside."""
        return self._cached("anchors", image_size, self._anchors)

    def _cached(self, kind, image_size, compute):
        size = tuple(int(side) for side in image_size)
        device = self.regression_headers[-1].weight.device
        key = kind, size, device
        if key not in self._cache:
            with torch.inference_mode(False):  # a later training step may want a gradient through them
                self._cache[key] = compute(size).to(device)
        return self._cache[key]

    def _priors(self, image_size):
        side = torch.tensor(image_size[::-1], dtype=torch.float64)  # width, height
        scale = side.prod().sqrt() / 300
        maps = []
        for size, stride, (low, high), ratios in zip(self.map_sizes(image_size), self.strides, self.sizes, self.ratios):
            centers = grid_centers(size, image_size, stride)  # [hw,2] relative
            shapes = box_shapes(low, high, ratios) * scale / side  # [S,2] relative
            cells, kinds = len(centers), len(shapes)
            both = centers[:, None].expand(-1, kinds, -1), shapes.expand(cells, -1, -1)
            maps.append(torch.cat(both, -1).reshape(-1, 4))  # [hwS,4]
        return torch.cat(maps).clamp(0, 1).float()

    def _anchors(self, image_size):
        height, width = image_size
        return boxes.to_corners(self._priors(image_size) * torch.tensor([width, height, width, height]))

    def parameter_groups(self):
        """Parameters by part, each exactly once: {"base_net": [...], "extras": [...], "heads": [...]}."""
        heads = [*self.regression_headers.parameters(), *self.classification_headers.parameters()]
        extras = [*self.source_layer_add_ons.parameters(), *self.extras.parameters()]
        return {"base_net": list(self.base_net.parameters()), "extras": extras, "heads": heads}


class Maps(nn.Module):
    """`net.feature_maps` as a forward, for functional_call."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net.feature_maps(images)


def last_convolution(head):
    return head if isinstance(head, nn.Conv2d) else head[-1]


def check_sizes(sizes, maps):
    """(min, max) pairs of numbers, one a map; raises WeightsError."""
    pairs = [tuple(pair) for pair in sizes]
    if len(pairs) != maps or not all(len(pair) == 2 and 0 < pair[0] <= pair[1] for pair in pairs):
        raise WeightsError(f"box_sizes {pairs}: need {maps} pairs (min, max) in pixels at 300, 0 < min <= max")
    return pairs


def grid_centers(map_size, image_size, stride):
    """Relative centres [hw,2] (x, y) of the cells of a map, row by row; cells of `stride` pixels, or as many as fit."""
    axes = []
    for cells, pixels in zip(map_size, image_size):
        step = stride / pixels if stride else 1 / cells
        axes.append((torch.arange(cells, dtype=torch.float64) + 0.5) * step)
    y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


def box_shapes(low, high, ratios):
    """Widths and heights [2 + 2 * ratios, 2]: small square, mean square, then each ratio lying and standing."""
    shapes = [(low, low), (math.sqrt(low * high),) * 2]
    for ratio in ratios:
        shapes += [(low * ratio**0.5, low / ratio**0.5), (low / ratio**0.5, low * ratio**0.5)]
    return torch.tensor(shapes, dtype=torch.float64)


def conv1x1(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 1)


def dense_extra(inputs, hidden, outputs, stride=2, padding=1):
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 1),
        nn.ReLU(inplace=True),
        layers.Conv3x3(hidden, outputs, stride, padding),
        nn.ReLU(inplace=True),
    )


def lite_extra(inputs, hidden, outputs, padding=1):
    """No activation after the last convolution: so it was published."""
    separable = layers.separable(hidden, outputs, stride=2, padding=padding)
    return nn.Sequential(nn.Conv2d(inputs, hidden, 1), nn.ReLU(inplace=True), separable)


def named(net, name, mean, std, **arguments):
    """Tell the network what it is: `build(name, num_classes, **arguments)` makes it again."""
    net.name, net.arguments = name, {**arguments, "box_sizes": [list(pair) for pair in net.sizes]}
    net.image_mean, net.image_std = mean, std
    return net


def mb1_ssd(num_classes, box_sizes=None):
    net = SSD(
        num_classes,
        mobilenet_v1(),
        [
            dense_extra(1024, 256, 512),
            dense_extra(512, 128, 256),
            dense_extra(256, 128, 256),
            dense_extra(256, 128, 256),
        ],
        taps=(12, 14),
        channels=(512, 1024, 512, 256, 256, 256),
        head=layers.Conv3x3,
        last_head=layers.Conv3x3,
        sizes=box_sizes or MOBILE_SIZES,
    )
    return named(net, "mb1-ssd", (127, 127, 127), (128, 128, 128))


def mb1_ssd_lite(num_classes, box_sizes=None):
    net = SSD(
        num_classes,
        mobilenet_v1(),
        [lite_extra(1024, 256, 512), lite_extra(512, 128, 256), lite_extra(256, 128, 256), lite_extra(256, 128, 256)],
        taps=(12, 14),
        channels=(512, 1024, 512, 256, 256, 256),
        head=layers.separable,
        last_head=conv1x1,
        sizes=box_sizes or MOBILE_SIZES,
    )
    return named(net, "mb1-ssd-lite", (127, 127, 127), (128, 128, 128))


def mb2_ssd_lite(num_classes, width_mult=1.0, box_sizes=None):
    """The first head looks inside block 14, at its widened map of stride 16."""
    if not 0.1 <= width_mult <= 4:
        raise WeightsError(f"width_mult {width_mult}: must lie between 0.1 and 4")
    base_net = mobilenet_v2(width_mult)
    widened, last = base_net[14].conv[0].out_channels, base_net[18][0].out_channels
    net = SSD(
        num_classes,
        base_net,
        [
            InvertedResidual(last, 512, 2, 256 / last),
            InvertedResidual(512, 256, 2, 0.25),
            InvertedResidual(256, 256, 2, 0.5),
            InvertedResidual(256, 64, 2, 0.25),
        ],
        taps=(19,),
        split_tap=14,
        channels=(widened, last, 512, 256, 256, 64),
        head=layers.separable_bn,
        last_head=conv1x1,
        sizes=box_sizes or MOBILE_SIZES,
    )
    return named(net, "mb2-ssd-lite", (127, 127, 127), (128, 128, 128), width_mult=width_mult)


def sq_ssd_lite(num_classes, box_sizes=None):
    """One tap only, before the last fire module; the first extra pads by 2 (17 -> 10 cells)."""
    net = SSD(
        num_classes,
        squeezenet1_1(),
        [
            lite_extra(512, 256, 512, padding=2),
            lite_extra(512, 256, 512),
            lite_extra(512, 128, 256),
            lite_extra(256, 128, 256),
            lite_extra(256, 128, 256),
        ],
        taps=(12,),
        channels=(512, 512, 512, 256, 256, 256),
        head=layers.separable,
        last_head=conv1x1,
        sizes=box_sizes or MOBILE_SIZES,
    )
    return named(net, "sq-ssd-lite", (127, 127, 127), (128, 128, 128))


def vgg16_ssd(num_classes, box_sizes=None):
    """Batch norm stands where the paper normalises conv4_3 by its L2 norm: so it was published."""
    net = SSD(
        num_classes,
        vgg16(),
        [
            dense_extra(1024, 256, 512),
            dense_extra(512, 128, 256),
            dense_extra(256, 128, 256, stride=1, padding=0),
            dense_extra(256, 128, 256, stride=1, padding=0),
        ],
        taps=(23, 35),
        channels=(512, 1024, 512, 256, 256, 256),
        head=layers.Conv3x3,
        last_head=layers.Conv3x3,
        sizes=box_sizes or VGG_SIZES,
        strides=VGG_STRIDES,
        ratios=VGG_RATIOS,
        add_on=nn.BatchNorm2d(512),
    )
    with torch.no_grad():
        net.base_net[0].weight /= 64  # pixels come with a deviation of about 64, and no batch norm evens it out
    return named(net, "vgg16-ssd", (123, 117, 104), (1, 1, 1))


NETWORKS = {
    "mb1-ssd": mb1_ssd,
    "mb1-ssd-lite": mb1_ssd_lite,
    "mb2-ssd-lite": mb2_ssd_lite,
    "sq-ssd-lite": sq_ssd_lite,
    "vgg16-ssd": vgg16_ssd,
}
