"""SSD on MobileNet, SqueezeNet and VGG: the five networks of qfgaohao's and dusty-nv's pytorch-ssd, under their names.

B batch, C channels, K classes, P priors, S box shapes per cell. Each of six maps has two heads. Priors and outputs
are in one order: map, row, column, shape.
"""

import math

import torch
from torch import nn
from torchvision.ops import box_convert

from models.backbones import layers
from models.backbones.mobilenet import InvertedResidual, mobilenet_v1_features, mobilenet_v2_features
from models.backbones.squeezenet import squeezenet1_1_features
from models.backbones.vgg import vgg16_features
from utils.errors import WeightsError

# (min, max) side of the squares of each map, in pixels of a 300 x 300 image.
MOBILE_SIZES = ((60, 105), (105, 150), (150, 195), (195, 240), (240, 285), (285, 330))
VGG_SIZES = ((30, 60), (60, 111), (111, 162), (162, 213), (213, 264), (264, 315))
# At another size, "scaled" priors keep the sizes of 300 x 300 in proportion. "jetson" ones have the sizes that
# jetson-inference's trainer takes then (mb1-ssd): the paper's shares of the image, 0.1 to 1.05, which are VGG's at 300.
PRIORS = ("scaled", "jetson")
JETSON_SIZES = VGG_SIZES
# Published distance between the cells of each map in pixels; None: the image divided by the number of cells.
MOBILE_STRIDES = (16, 32, 64, None, None, None)
VGG_STRIDES = (8, 16, 32, 64, None, None)
MOBILE_RATIOS = ((2, 3),) * 6
VGG_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))


class SSD(nn.Module):
    """A backbone and extra layers that give six maps, and two heads per map.

    base_net        layers of the backbone; the maps after `source_layers` many of them are used
    extras          further layers, one map each
    channels        of each map
    head            head(inputs, outputs) makes a head of the first five maps, last_head one of the sixth
    sizes, strides, ratios   of the priors of each map, see the tables above
    priors          one of PRIORS: the sizes and strides of images other than 300 x 300
    add_on          a layer between the first map and its heads
    expanded_layer  index of the layer whose expanded map is the first map (see `InvertedResidual`)
    """

    box_weights = (10, 10, 5, 5)  # center variance 0.1, size variance 0.2

    def __init__(
        self,
        num_classes,
        base_net,
        extras,
        *,
        source_layers,
        channels,
        head,
        last_head,
        sizes,
        strides=MOBILE_STRIDES,
        ratios=MOBILE_RATIOS,
        priors="scaled",
        add_on=None,
        expanded_layer=None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.sizes, self.strides, self.ratios = check_sizes(sizes, len(channels)), strides, ratios
        self.prior_layout = priors
        self.source_layers, self.expanded_layer = source_layers, expanded_layer
        self.base_net = base_net
        self.extras = nn.ModuleList(extras)
        shapes = [2 + 2 * len(r) for r in ratios]
        makers = [head] * (len(channels) - 1) + [last_head]

        def heads(values):
            return nn.ModuleList(make(c, n * values) for make, c, n in zip(makers, channels, shapes))

        self.classification_headers = heads(num_classes + 1)
        self.regression_headers = heads(4)
        self.source_layer_add_ons = nn.ModuleList([add_on] if add_on else [])
        self.initialize()
        self._anchors = {}  # (image size, device) -> anchors; not part of the state dict

    def initialize(self):
        """`layers.initialize` for all but the last convolution of each head.

        Logits: Xavier, as published, so that the hard negatives of the first steps differ and the gradient of the
        features has its full size. Offsets: small (0.25 of the scale of the map, a few percent of a prior's size), so
        that training starts with the priors as predictions. For 1x1 heads of 512 channels their deviation is 0.01.
        """
        layers.initialize(self)
        for logits, offsets in zip(self.classification_headers, self.regression_headers):
            nn.init.xavier_uniform_(last_convolution(logits).weight)
            weight = last_convolution(offsets).weight
            nn.init.normal_(weight, std=0.25 * weight[0].numel() ** -0.5)

    def feature_maps(self, x):
        """Normalized images [B,3,H,W] -> six maps [B,C,h,w], large to small."""
        maps = []
        for index, layer in enumerate(self.base_net):
            if index == self.expanded_layer:
                expanded, x = layer.forward_expanded(x)
                maps.append(expanded)
            else:
                x = layer(x)
            if index + 1 in self.source_layers:
                maps.append(x)
        for layer in self.extras:
            x = layer(x)
            maps.append(x)
        for add_on in self.source_layer_add_ons:
            maps[0] = add_on(maps[0])
        return maps

    def forward(self, images):
        """Normalized images [B,3,H,W] -> {"logits": [B,P,K+1] background first, "offsets": [B,P,4]}, both raw."""
        logits, offsets = [], []
        maps = self.feature_maps(images)
        for x, classification, regression in zip(maps, self.classification_headers, self.regression_headers):
            logits.append(layers.flatten_cells(classification(x), self.num_classes + 1))  # [B,hwS,K+1]
            offsets.append(layers.flatten_cells(regression(x), 4))  # [B,hwS,4]
        return {"logits": torch.cat(logits, 1), "offsets": torch.cat(offsets, 1)}

    @torch.no_grad()
    def map_sizes(self, image_size):
        """(h, w) of each map for an image of (height, width), by a forward pass on the meta device.

        Raises WeightsError where the image is too small for a layer.
        """
        state = {f"net.{name}": torch.empty_like(value, device="meta") for name, value in self.state_dict().items()}
        images = torch.empty((2, 3, *image_size), device="meta")  # batch norm refuses to train on one value per channel
        try:
            maps = torch.func.functional_call(FeatureMaps(self), state, (images,))
        except RuntimeError as error:
            height, width = image_size
            raise WeightsError(
                f"{self.name}: an image of {width}x{height} is too small ({error}); use a larger resolution"
            ) from error
        return [tuple(x.shape[-2:]) for x in maps]

    def priors(self, image_size):
        """Priors for images of (height, width): float32 [P,4], relative cx, cy, w, h in [0,1], on the CPU.

        At 300 x 300 they are the published ones. Sizes grow with the square root of the image's area, and squares are
        squares in pixels also where the image is not square. Two layouts differ at other sizes, see PRIORS.
        """
        jetson = self.prior_layout == "jetson" and tuple(image_size) != (300, 300)
        box_sizes, maps = JETSON_SIZES if jetson else self.sizes, []
        side = torch.tensor(image_size[::-1], dtype=torch.float64)  # width, height
        scale = side.prod().sqrt() / 300
        for size, stride, (low, high), ratios in zip(self.map_sizes(image_size), self.strides, box_sizes, self.ratios):
            strides = [stride or pixels / cells for cells, pixels in zip(size, image_size)]
            if jetson:
                strides = [math.ceil(pixels / cells) for cells, pixels in zip(size, image_size)]
            centers = grid_centers(size, image_size, strides)  # [hw,2] relative
            shapes = box_shapes(low, high, ratios) * scale / side  # [S,2] relative
            cells, kinds = len(centers), len(shapes)
            maps.append(torch.cat([centers.repeat_interleave(kinds, 0), shapes.repeat(cells, 1)], 1))  # [hwS,4]
        return torch.cat(maps).clamp(0, 1).float()

    def anchors(self, image_size):
        """`priors` as xyxy in pixels of the image: float32 [P,4]; they may extend beyond the image.

        On the network's device; computed once per size.
        """
        height, width = (int(side) for side in image_size)
        device = self.regression_headers[-1].weight.device
        key = height, width, device
        if key not in self._anchors:
            with torch.inference_mode(False):  # a later training step may need a gradient through them
                priors = self.priors((height, width)) * torch.tensor([width, height, width, height])
                self._anchors[key] = box_convert(priors, "cxcywh", "xyxy").to(device)
        return self._anchors[key]

    def parameter_groups(self):
        """Parameters by part, each exactly once: {"base_net": [...], "extras": [...], "heads": [...]}."""
        heads = [*self.regression_headers.parameters(), *self.classification_headers.parameters()]
        extras = [*self.source_layer_add_ons.parameters(), *self.extras.parameters()]
        return {"base_net": list(self.base_net.parameters()), "extras": extras, "heads": heads}


class FeatureMaps(nn.Module):
    """`net.feature_maps` as the forward of a module, which functional_call needs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net.feature_maps(images)


def last_convolution(head):
    return head if isinstance(head, nn.Conv2d) else head[-1]


def check_sizes(sizes, maps):
    """The (min, max) pairs of `maps` maps as tuples. Raises WeightsError."""
    pairs = [tuple(pair) for pair in sizes]
    if len(pairs) != maps or not all(len(pair) == 2 and 0 < pair[0] <= pair[1] for pair in pairs):
        raise WeightsError(f"box_sizes {pairs}: need {maps} pairs (min, max) in pixels at 300, 0 < min <= max")
    return pairs


def grid_centers(map_size, image_size, strides):
    """Relative centers [hw,2] (x, y) of the cells of a map, row by row; strides: pixels between them, (y, x)."""
    axes = []
    for cells, pixels, stride in zip(map_size, image_size, strides):
        axes.append((torch.arange(cells, dtype=torch.float64) + 0.5) * (stride / pixels))
    y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


def box_shapes(low, high, ratios):
    """Widths and heights [S,2]: squares of side `low` and sqrt(low * high), then a wide and a tall box per ratio."""
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
    """Without an activation after the last convolution, as published."""
    separable = layers.separable(hidden, outputs, stride=2, padding=padding)
    return nn.Sequential(nn.Conv2d(inputs, hidden, 1), nn.ReLU(inplace=True), separable)


def with_attributes(net, name, mean=(127, 127, 127), std=(128, 128, 128), **arguments):
    """`net` with the attributes that every network has, see `models`."""
    net.name, net.arguments = name, {**arguments, "box_sizes": [list(pair) for pair in net.sizes]}
    net.image_mean, net.image_std = mean, std
    return net


def choose_priors(name, wanted, resolution, box_sizes, saved):
    """The argument `priors` of a training run's network, as a dict that is empty for all networks but mb1-ssd.

    It is `wanted`, else "scaled" with --box-sizes, else that of the checkpoint `saved`, else jetson-inference's. At 300
    both are the same, and "scaled" keeps the sizes if the network is used at another size. Raises WeightsError.
    """
    if name != "mb1-ssd" and wanted:
        raise WeightsError(f"--priors {wanted}: {name} has no other priors; leave it out, or give --arch mb1-ssd")
    if name != "mb1-ssd":
        return {}
    if saved and not (wanted or box_sizes):
        wanted = saved.get("arguments", {}).get("priors", "scaled")  # the first checkpoints do not have it
    return {"priors": wanted or ("scaled" if box_sizes or resolution == 300 else "jetson")}


def mb1_ssd(num_classes, box_sizes=None, priors="scaled"):
    if priors not in PRIORS:
        raise WeightsError(f"unknown priors {priors!r}; known are {', '.join(PRIORS)}")
    if priors == "jetson" and check_sizes(box_sizes or MOBILE_SIZES, 6) != list(MOBILE_SIZES):
        raise WeightsError("jetson-inference's priors have their own box sizes: give --priors scaled with --box-sizes")
    net = SSD(
        num_classes,
        mobilenet_v1_features(),
        [
            dense_extra(1024, 256, 512),
            dense_extra(512, 128, 256),
            dense_extra(256, 128, 256),
            dense_extra(256, 128, 256),
        ],
        source_layers=(12, 14),
        channels=(512, 1024, 512, 256, 256, 256),
        head=layers.Conv3x3,
        last_head=layers.Conv3x3,
        sizes=box_sizes or MOBILE_SIZES,
        priors=priors,
    )
    return with_attributes(net, "mb1-ssd", priors=priors)


def mb1_ssd_lite(num_classes, box_sizes=None):
    net = SSD(
        num_classes,
        mobilenet_v1_features(),
        [lite_extra(1024, 256, 512), lite_extra(512, 128, 256), lite_extra(256, 128, 256), lite_extra(256, 128, 256)],
        source_layers=(12, 14),
        channels=(512, 1024, 512, 256, 256, 256),
        head=layers.separable,
        last_head=conv1x1,
        sizes=box_sizes or MOBILE_SIZES,
    )
    return with_attributes(net, "mb1-ssd-lite")


def mb2_ssd_lite(num_classes, width_mult=1.0, box_sizes=None):
    """The first map is the expanded one inside layer 14, of stride 16."""
    base_net = mobilenet_v2_features(width_mult)
    expanded, last = base_net[14].conv[0].out_channels, base_net[18][0].out_channels
    net = SSD(
        num_classes,
        base_net,
        [
            InvertedResidual(last, 512, 2, 256 / last),
            InvertedResidual(512, 256, 2, 0.25),
            InvertedResidual(256, 256, 2, 0.5),
            InvertedResidual(256, 64, 2, 0.25),
        ],
        source_layers=(19,),
        expanded_layer=14,
        channels=(expanded, last, 512, 256, 256, 64),
        head=layers.separable_bn,
        last_head=conv1x1,
        sizes=box_sizes or MOBILE_SIZES,
    )
    return with_attributes(net, "mb2-ssd-lite", width_mult=width_mult)


def sq_ssd_lite(num_classes, box_sizes=None):
    """The backbone gives one map, before its last fire module; the first extra layer pads by 2 (17 -> 10 cells)."""
    net = SSD(
        num_classes,
        squeezenet1_1_features(),
        [
            lite_extra(512, 256, 512, padding=2),
            lite_extra(512, 256, 512),
            lite_extra(512, 128, 256),
            lite_extra(256, 128, 256),
            lite_extra(256, 128, 256),
        ],
        source_layers=(12,),
        channels=(512, 512, 512, 256, 256, 256),
        head=layers.separable,
        last_head=conv1x1,
        sizes=box_sizes or MOBILE_SIZES,
    )
    return with_attributes(net, "sq-ssd-lite")


def vgg16_ssd(num_classes, box_sizes=None):
    """Batch norm, as published, where the paper divides conv4_3 by its L2 norm."""
    net = SSD(
        num_classes,
        vgg16_features(),
        [
            dense_extra(1024, 256, 512),
            dense_extra(512, 128, 256),
            dense_extra(256, 128, 256, stride=1, padding=0),
            dense_extra(256, 128, 256, stride=1, padding=0),
        ],
        source_layers=(23, 35),
        channels=(512, 1024, 512, 256, 256, 256),
        head=layers.Conv3x3,
        last_head=layers.Conv3x3,
        sizes=box_sizes or VGG_SIZES,
        strides=VGG_STRIDES,
        ratios=VGG_RATIOS,
        add_on=nn.BatchNorm2d(512),
    )
    with torch.no_grad():
        net.base_net[0].weight /= 64  # pixels have a deviation of about 64, and there is no batch norm
    return with_attributes(net, "vgg16-ssd", (123, 117, 104), (1, 1, 1))


NETWORKS = {
    "mb1-ssd": mb1_ssd,
    "mb1-ssd-lite": mb1_ssd_lite,
    "mb2-ssd-lite": mb2_ssd_lite,
    "sq-ssd-lite": sq_ssd_lite,
    "vgg16-ssd": vgg16_ssd,
}
