"""RetinaNet (Lin et al. 2017) on ResNet 18 to 152 with a pyramid of P3 to P7, under torchvision's names.

B batch, C channels, K classes, A anchors, S shapes a cell (9). Anchors and outputs share one order: level, row,
column, shape, where ratio is the slower half of shape and scale the faster.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from models import resnet
from models.errors import WeightsError
from models.layers import IMAGENET_MEAN, IMAGENET_STD, Conv3x3, flat, initialise

WIDTH = 256  # channels of every level and of the heads
LEVELS = (3, 4, 5, 6, 7)  # a level's stride is 2 to its power
RATIOS = (0.5, 1.0, 2.0)  # height / width
SCALES = (0, 1 / 3, 2 / 3)  # powers of two on the side of a level's smallest anchors
SHAPES = len(RATIOS) * len(SCALES)
PRIOR = 0.01  # score of every class at the start, so that the many negatives do not drown the rest
# The two published kinds of RetinaNet, called after their anchors, each with the weights of its box coder.
BOX_WEIGHTS = {"yhenon": (10, 10, 5, 5), "torchvision": (1, 1, 1, 1)}
CACHED_SIZES = 32


class Pyramid(nn.Module):
    """C3, C4, C5 -> P3 to P7, all of WIDTH channels. p6_from_c5: else P6 is taken from P5, as torchvision does."""

    def __init__(self, channels, p6_from_c5):
        super().__init__()
        self.p6_from_c5 = p6_from_c5
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, WIDTH, 1)) for c in channels)
        self.layer_blocks = nn.ModuleList(nn.Sequential(Conv3x3(WIDTH, WIDTH)) for _ in channels)
        p6 = Conv3x3(channels[-1] if p6_from_c5 else WIDTH, WIDTH, stride=2)
        p7 = Conv3x3(WIDTH, WIDTH, stride=2)
        self.extra_blocks = nn.ModuleDict({"p6": p6, "p7": p7})
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, maps):
        levels, above = [], None
        for x, inner, layer in zip(maps[::-1], self.inner_blocks[::-1], self.layer_blocks[::-1]):
            x = inner(x)
            if above is not None:
                x = x + F.interpolate(above, size=x.shape[-2:], mode="nearest")
            levels.insert(0, layer(x))
            above = x
        p6 = self.extra_blocks["p6"](maps[-1] if self.p6_from_c5 else levels[-1])
        return [*levels, p6, self.extra_blocks["p7"](p6.relu())]


class Head(nn.Module):
    """Four convolutions shared by all levels, then one to `values` numbers a shape; `output` is that one's name."""

    def __init__(self, output, values, bias):
        super().__init__()
        self.output, self.values = output, values
        self.conv = nn.Sequential(*(nn.Sequential(Conv3x3(WIDTH, WIDTH), nn.ReLU(inplace=True)) for _ in range(4)))
        self.add_module(output, Conv3x3(WIDTH, SHAPES * values))
        initialise(self.conv)
        last = getattr(self, output)
        nn.init.zeros_(last.weight)  # the first answers are the prior and the anchors, whatever comes in
        nn.init.constant_(last.bias, bias)

    def forward(self, levels):
        """Maps [B,C,h,w] of the levels -> [B,A,values]."""
        last = getattr(self, self.output)
        found = [last(self.conv(x)) for x in levels]  # [B,S*values,h,w]
        # A view where memory is channels_last; only the cat copies.
        return torch.cat([flat(x, self.values) for x in found], 1)


class RetinaNet(nn.Module):
    """Images of any size; sides that are multiples of 32 make every level exactly half the one before.

    depth         18, 34, 50, 101 or 152
    anchors       "yhenon": centred in the cell, sizes as they are; "torchvision": at the cell's corner, sizes rounded.
                  The `box_weights` of the coder and the origin of P6 (C5; torchvision: P5) go with it
    anchor_scale  side of a level's smallest anchors in its strides; 4 as published, less for small objects
    """

    name = "retinanet"
    image_mean, image_std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, num_classes, depth=50, anchors="yhenon", anchor_scale=4.0):
        super().__init__()
        if anchors not in BOX_WEIGHTS:
            raise WeightsError(f"no anchors called {anchors!r}; there are {', '.join(BOX_WEIGHTS)}")
        if not 0 < anchor_scale <= 32:
            raise WeightsError(f"anchor_scale {anchor_scale}: must lie above 0 and not above 32 strides")
        self.num_classes, self.box_weights = num_classes, BOX_WEIGHTS[anchors]
        self.arguments = {"depth": depth, "anchors": anchors, "anchor_scale": anchor_scale}
        body = resnet.body(depth)
        self.backbone = nn.ModuleDict({"body": body, "fpn": Pyramid(body.channels[1:], anchors == "yhenon")})
        classes = Head("cls_logits", num_classes, bias=-math.log((1 - PRIOR) / PRIOR))
        self.head = nn.ModuleDict({"classification_head": classes, "regression_head": Head("bbox_reg", 4, bias=0)})
        self._cache = {}  # (image size, device) -> anchors, the latest last; no part of the state dict

    def forward(self, images):
        """Normalised images [B,3,H,W] -> {"logits": [B,A,K], "offsets": [B,A,4]}, both raw."""
        levels = self.backbone["fpn"](self.backbone["body"].maps(images)[1:])
        heads = self.head["classification_head"], self.head["regression_head"]
        return {name: head(levels) for name, head in zip(("logits", "offsets"), heads)}

    def map_sizes(self, image_size):
        """(h, w) of each level for an image of (height, width)."""
        return [tuple(math.ceil(side / 2**level) for side in image_size) for level in LEVELS]

    def level_sizes(self, image_size):
        """How many of the anchors for an image of (height, width) lie on each level, in their order."""
        return [height * width * SHAPES for height, width in self.map_sizes(image_size)]

    def anchors(self, image_size):
        """Anchors for an image of (height, width): float32 [A,4] xyxy pixels; corners may lie outside.

        On the network's device; the latest CACHED_SIZES sizes are kept.
        """
        size = tuple(int(side) for side in image_size)
        device = self.head["regression_head"].bbox_reg.weight.device
        key = size, device
        found = self._cache.pop(key, None)
        if found is None:
            with torch.inference_mode(False):  # a later training step may want a gradient through them
                found = self._anchors(size).to(device)
        self._cache[key] = found
        while len(self._cache) > CACHED_SIZES:
            self._cache.pop(next(iter(self._cache)))
        return found

    def _anchors(self, image_size):
        rounded, levels = self.arguments["anchors"] == "torchvision", []
        for level, map_size in zip(LEVELS, self.map_sizes(image_size)):
            strides, offset = [2**level] * 2, 0.5
            if rounded:
                strides, offset = [side // cells for side, cells in zip(image_size, map_size)], 0.0
            y, x = ((torch.arange(cells) + offset) * stride for cells, stride in zip(map_size, strides))
            y, x = torch.meshgrid(y, x, indexing="ij")
            centers = torch.stack([x, y, x, y], -1)  # [h,w,4]
            shapes = cell_anchors(2**level * self.arguments["anchor_scale"], rounded)
            levels.append((centers[:, :, None] + shapes).reshape(-1, 4))  # [hwS,4]
        return torch.cat(levels)

    def stages(self):
        """The body from its first layer on, as five modules that can be frozen: the stem, then four stages."""
        body = self.backbone["body"]
        return [nn.ModuleList([body.conv1, body.bn1]), body.layer1, body.layer2, body.layer3, body.layer4]

    def parameter_groups(self):
        """Parameters by part, each exactly once: {"backbone": [...], "heads": [...]}; the pyramid is of the heads."""
        heads = [*self.backbone["fpn"].parameters(), *self.head.parameters()]
        return {"backbone": list(self.backbone["body"].parameters()), "heads": heads}


def cell_anchors(side, rounded):
    """The shapes of a level around (0, 0), the smallest square of `side` pixels: float32 [S,4] xyxy pixels.

    Computed in float32 throughout, as both programs do: torchvision's rounding depends on it.
    """
    sides = [side * 2**scale for scale in SCALES]
    sides = torch.tensor([int(side) for side in sides] if rounded else sides, dtype=torch.float32)
    height = torch.tensor(RATIOS).sqrt()
    width = 1 / height
    width, height = (width[:, None] * sides).flatten(), (height[:, None] * sides).flatten()
    shapes = torch.stack([-width, -height, width, height], 1) / 2
    return shapes.round() if rounded else shapes
