"""RetinaNet (Lin et al. 2017) on ResNet 18 to 152 with a feature pyramid of P3 to P7, under torchvision's names.

B batch, C channels, K classes, A anchors, S anchors per cell (9). Anchors and outputs are in one order: level, row,
column, ratio, scale.
"""

import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from models.backbones import resnet
from models.backbones.layers import IMAGENET_MEAN, IMAGENET_STD, Conv3x3, flatten_cells, initialize
from utils.errors import WeightsError

WIDTH = 256  # channels of every level and of the heads
LEVELS = (3, 4, 5, 6, 7)  # the stride of level l is 2**l
RATIOS = (0.5, 1.0, 2.0)  # height / width
SCALES = (0, 1 / 3, 2 / 3)  # sides of a level's anchors, as powers of two of the smallest
SHAPES = len(RATIOS) * len(SCALES)
PRIOR = 0.01  # initial score of every class, so that the many negatives do not dominate the first losses
# The two published variants, named after their anchors, with the weights of their box coders.
BOX_WEIGHTS = {"yhenon": (10, 10, 5, 5), "torchvision": (1, 1, 1, 1)}
CACHED_SIZES = 32


class FeaturePyramid(nn.Module):
    """C3, C4, C5 -> P3 to P7, each of WIDTH channels. p6_from_c5: P6 is made from C5; else from P5, as in torchvision.

    torchvision's FeaturePyramidNetwork with LastLevelP6P7 gives the same outputs. It draws its random weights in
    another order, and in bf16 on a CPU 16 of 20 passes over 64 x 64 images had NaN gradients (see `Conv3x3`).
    """

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
        levels, inner = [], None
        for x, inner_block, layer_block in zip(maps[::-1], self.inner_blocks[::-1], self.layer_blocks[::-1]):
            x = inner_block(x)
            if inner is not None:
                x = x + F.interpolate(inner, size=x.shape[-2:], mode="nearest")
            levels.insert(0, layer_block(x))
            inner = x
        p6 = self.extra_blocks["p6"](maps[-1] if self.p6_from_c5 else levels[-1])
        return [*levels, p6, self.extra_blocks["p7"](p6.relu())]


class Head(nn.Module):
    """Four convolutions and an output layer called `output` of `values` numbers per anchor, shared by all levels."""

    def __init__(self, output, values, bias):
        super().__init__()
        self.output, self.values = output, values
        self.conv = nn.Sequential(*(nn.Sequential(Conv3x3(WIDTH, WIDTH), nn.ReLU(inplace=True)) for _ in range(4)))
        self.add_module(output, Conv3x3(WIDTH, SHAPES * values))
        initialize(self.conv)
        last = getattr(self, output)
        nn.init.zeros_(last.weight)  # the first outputs are the bias, whatever the image
        nn.init.constant_(last.bias, bias)

    def forward(self, levels):
        """Maps [B,C,h,w] of the levels -> [B,A,values]."""
        last = getattr(self, self.output)
        outputs = [last(self.conv(x)) for x in levels]  # [B,S*values,h,w]
        return torch.cat([flatten_cells(x, self.values) for x in outputs], 1)


class RetinaNet(nn.Module):
    """Images of any size; sides that are multiples of 32 make every level exactly half the one before.

    depth         18, 34, 50, 101 or 152
    anchors       "yhenon": at the centers of the cells; "torchvision": at their corners, with rounded sizes. It also
                  sets the `box_weights` of the coder and what P6 is made from (yhenon: C5, torchvision: P5)
    anchor_scale  side of a level's smallest anchors in strides; 4 as published, less for small objects
    """

    name = "retinanet"
    image_mean, image_std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, num_classes, depth=50, anchors="yhenon", anchor_scale=4.0):
        super().__init__()
        if anchors not in BOX_WEIGHTS:
            raise WeightsError(f"unknown anchors {anchors!r}; known are {', '.join(BOX_WEIGHTS)}")
        if not 0 < anchor_scale <= 32:
            raise WeightsError(f"anchor_scale {anchor_scale}: must be above 0 and at most 32 strides")
        self.num_classes, self.box_weights = num_classes, BOX_WEIGHTS[anchors]
        self.arguments = {"depth": depth, "anchors": anchors, "anchor_scale": anchor_scale}
        body = resnet.body(depth)
        self.backbone = nn.ModuleDict({"body": body, "fpn": FeaturePyramid(body.channels[1:], anchors == "yhenon")})
        classification = Head("cls_logits", num_classes, bias=-math.log((1 - PRIOR) / PRIOR))
        regression = Head("bbox_reg", 4, bias=0)
        self.head = nn.ModuleDict({"classification_head": classification, "regression_head": regression})
        self._anchors = {}  # (image size, device) -> anchors, most recently used last; not part of the state dict

    def forward(self, images):
        """Normalized images [B,3,H,W] -> {"logits": [B,A,K], "offsets": [B,A,4]}, both raw."""
        levels = self.backbone["fpn"](self.backbone["body"].feature_maps(images)[1:])
        return {
            "logits": self.head["classification_head"](levels),
            "offsets": self.head["regression_head"](levels),
        }

    def map_sizes(self, image_size):
        """(h, w) of each level for an image of (height, width)."""
        return [tuple(math.ceil(side / 2**level) for side in image_size) for level in LEVELS]

    def level_sizes(self, image_size):
        """Number of anchors of each level for an image of (height, width)."""
        return [height * width * SHAPES for height, width in self.map_sizes(image_size)]

    def anchors(self, image_size):
        """Anchors for an image of (height, width): float32 [A,4] xyxy pixels; they may extend beyond the image.

        On the network's device. Those of the CACHED_SIZES most recently used sizes are cached.
        """
        size = tuple(int(side) for side in image_size)
        key = size, self.head["regression_head"].bbox_reg.weight.device
        anchors = self._anchors.pop(key, None)
        if anchors is None:
            with torch.inference_mode(False):  # a later training step may need a gradient through them
                anchors = self._make_anchors(size).to(key[1])
        self._anchors[key] = anchors
        if len(self._anchors) > CACHED_SIZES:
            self._anchors.pop(next(iter(self._anchors)))
        return anchors

    def _make_anchors(self, image_size):
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
        """The stages of the body, see `resnet.ResNet.stages`."""
        return self.backbone["body"].stages()

    def parameter_groups(self):
        """Parameters by part, each exactly once: {"backbone": [...], "heads": [...]}, with the pyramid in heads."""
        heads = [*self.backbone["fpn"].parameters(), *self.head.parameters()]
        return {"backbone": list(self.backbone["body"].parameters()), "heads": heads}


def cell_anchors(side, rounded):
    """The anchors of a level around (0, 0), the smallest square one of `side` pixels: float32 [S,4] xyxy pixels.

    Computed in float32, as torchvision and yhenon do: the rounding depends on it.
    """
    sides = [side * 2**scale for scale in SCALES]
    sides = torch.tensor([int(side) for side in sides] if rounded else sides, dtype=torch.float32)
    height = torch.tensor(RATIOS).sqrt()
    width = 1 / height
    width, height = (width[:, None] * sides).flatten(), (height[:, None] * sides).flatten()
    shapes = torch.stack([-width, -height, width, height], 1) / 2
    return shapes.round() if rounded else shapes


NETWORKS = {"retinanet": RetinaNet}
NETWORKS |= {f"retinanet_resnet{depth}": functools.partial(RetinaNet, depth=depth) for depth in resnet.DEPTHS}
