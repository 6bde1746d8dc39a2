"""SqueezeNet 1.1: 13 layers, [B,3,H,W] -> [B,512,H/16,W/16].

The pools round down, as SSD's 17 x 17 map at 300 pixels demands; torchvision's round up (18 x 18). The weights are the
same.
"""

import torch
from torch import nn


class Fire(nn.Module):
    """Squeeze by 1x1, then 1x1 and 3x3 side by side, each `expand` channels; ReLU after all three."""

    def __init__(self, inputs, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = self.squeeze(x).relu_()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu_()  # [B,2*expand,H,W]


def squeezenet1_1():
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        nn.MaxPool2d(3, stride=2),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        nn.MaxPool2d(3, stride=2),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
    )
