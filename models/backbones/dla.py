"""DLA-34, deep layer aggregation (Yu et al. 2018), under the names of ucbdrive's dla; the body of CenterNet and
CenterFusion.

Each tree of blocks ends in a root: a 1x1 convolution over the concatenated maps of its children.
"""

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.backbones.layers import conv_norm

CHANNELS = (16, 32, 64, 128, 256, 512)  # of the six levels, stride 1 to 32
HEIGHTS = {2: 1, 3: 2, 4: 2, 5: 1}  # level -> height of its tree


class Block(nn.Module):
    """Two 3x3 convolutions; `shortcut` [B,outputs,H,W], by default the input, is added."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x, shortcut=None):
        y = conv_norm(x, self.conv1, self.bn1).relu_()
        y = conv_norm(y, self.conv2, self.bn2)
        return y.add_(x if shortcut is None else shortcut).relu_()


class Root(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, *maps):
        return conv_norm(torch.cat(maps, 1), self.conv, self.bn).relu_()


class Tree(nn.Module):
    """Height 1: two blocks and a root. Height 2: two trees, where the root of the second also gets the first's output.

    level_root      the root also gets the (downsampled) input of the tree
    extra_channels  channels of further maps that the root gets, the `children` of `forward`
    """

    def __init__(self, height, inputs, outputs, stride=1, level_root=False, extra_channels=0):
        super().__init__()
        self.height, self.level_root = height, level_root
        extra_channels += inputs * level_root
        if height == 1:
            self.tree1, self.tree2 = Block(inputs, outputs, stride), Block(outputs, outputs)
            self.root = Root(2 * outputs + extra_channels, outputs)
        else:
            self.tree1 = Tree(height - 1, inputs, outputs, stride)
            self.tree2 = Tree(height - 1, outputs, outputs, extra_channels=extra_channels + outputs)
        self.downsample = nn.MaxPool2d(stride, stride, ceil_mode=True) if stride > 1 else None
        self.project = None
        if inputs != outputs:
            self.project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
            # The published files have it in higher trees too, where it is not used and would get no gradient.
            self.project.requires_grad_(height == 1)

    def forward(self, x, children=()):
        bottom = x if self.downsample is None else self.downsample(x)
        children = [*children, bottom] if self.level_root else [*children]
        if self.height > 1:
            x = self.tree1(x)
            return self.tree2(x, [*children, x])
        x = self.tree1(x, bottom if self.project is None else conv_norm(bottom, *self.project))
        return self.root(self.tree2(x), x, *children)


class DLA34(nn.Module):
    """num_classes: None for the body of a detector, which has no classifier."""

    channels = CHANNELS

    def __init__(self, num_classes=None):
        super().__init__()
        self.base_layer = Conv2dNormActivation(3, CHANNELS[0], 7)
        self.level0 = Conv2dNormActivation(CHANNELS[0], CHANNELS[0])
        self.level1 = Conv2dNormActivation(CHANNELS[0], CHANNELS[1], stride=2)
        for i, height in HEIGHTS.items():
            tree = Tree(height, CHANNELS[i - 1], CHANNELS[i], stride=2, level_root=i > 2)
            self.add_module(f"level{i}", tree)
        if num_classes is not None:
            self.fc = nn.Conv2d(CHANNELS[-1], num_classes, 1)  # a 1x1 convolution, as published
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def feature_maps(self, x):
        """Normalized images [B,3,H,W] -> the six levels, stride 1 to 32, each [B,C,ceil(H/s),ceil(W/s)]."""
        x = self.base_layer(x)
        maps = []
        for i in range(6):
            x = getattr(self, f"level{i}")(x)
            maps.append(x)
        return maps

    def forward(self, x):
        """Normalized images [B,3,H,W] -> logits [B,K]."""
        return self.fc(self.feature_maps(x)[-1].mean((2, 3), keepdim=True)).flatten(1)
