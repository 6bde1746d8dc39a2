"""DLA-34 (Yu et al. 2018), deep layer aggregation, under the names of ucbdrive's dla.

CenterNet and CenterFusion stand on it.

A tree of blocks: every tree ends in a root, a 1x1 convolution over the maps of its children side by side.
"""

import torch
from torch import nn

from models.layers import conv_norm

CHANNELS = (16, 32, 64, 128, 256, 512)  # of the six levels, stride 1 to 32
DEPTHS = (1, 1, 1, 2, 2, 1)  # convolutions of the first two levels, height of the others' trees


class Block(nn.Module):
    """Two 3x3 convolutions; `shortcut` [B,outputs,H,W] is added, the input itself where there is none."""

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
    """height 1: two blocks and their root; else two trees, the second of which hands its root all that came before.

    from_below  the root sees the input of the tree too
    carried     channels of the maps that a tree above hands to the root
    """

    def __init__(self, height, inputs, outputs, stride=1, from_below=False, carried=0):
        super().__init__()
        self.height, self.from_below = height, from_below
        carried += inputs * from_below
        if height == 1:
            self.tree1, self.tree2 = Block(inputs, outputs, stride), Block(outputs, outputs)
            self.root = Root(2 * outputs + carried, outputs)
        else:
            self.tree1 = Tree(height - 1, inputs, outputs, stride)
            self.tree2 = Tree(height - 1, outputs, outputs, carried=carried + outputs)
        self.downsample = nn.MaxPool2d(stride, stride, ceil_mode=True) if stride > 1 else None
        self.project = None
        if inputs != outputs:
            self.project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
            # The published files hold it in the higher trees too, where nothing uses it: it gets no gradient there.
            self.project.requires_grad_(height == 1)

    def forward(self, x, carried=()):
        below = x if self.downsample is None else self.downsample(x)
        carried = [*carried, below] if self.from_below else [*carried]
        if self.height > 1:
            first = self.tree1(x)
            return self.tree2(first, [*carried, first])
        first = self.tree1(x, below if self.project is None else conv_norm(below, *self.project))
        return self.root(self.tree2(first), first, *carried)


def level(inputs, outputs, stride=1, kernel=3):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class DLA34(nn.Module):
    """num_classes: None for a detector's body, which has no classifier."""

    channels = CHANNELS

    def __init__(self, num_classes=None):
        super().__init__()
        self.base_layer = level(3, CHANNELS[0], kernel=7)
        self.level0 = level(CHANNELS[0], CHANNELS[0])
        self.level1 = level(CHANNELS[0], CHANNELS[1], stride=2)
        for i in range(2, 6):
            tree = Tree(DEPTHS[i], CHANNELS[i - 1], CHANNELS[i], stride=2, from_below=i > 2)
            self.add_module(f"level{i}", tree)
        if num_classes is not None:
            self.fc = nn.Conv2d(CHANNELS[-1], num_classes, 1)  # a 1x1 convolution: so it was published
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def maps(self, x):
        """Normalised images [B,3,H,W] -> the six levels, stride 1 to 32, each [B,C,ceil(H/s),ceil(W/s)]."""
        x = self.base_layer(x)
        found = []
        for i in range(6):
            x = getattr(self, f"level{i}")(x)
            found.append(x)
        return found

    def forward(self, x):
        """Normalised images [B,3,H,W] -> logits [B,K]."""
        return self.fc(self.maps(x)[-1].mean((2, 3), keepdim=True)).flatten(1)
