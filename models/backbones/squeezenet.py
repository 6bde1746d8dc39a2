"""The layers of SqueezeNet 1.1 before its classifier: [B,3,H,W] -> [B,512,H/16,W/16]."""

from torch import nn
from torchvision.models.squeezenet import Fire


def squeezenet1_1_features():
    """13 layers. torchvision's pools round up; SSD's published 17 x 17 map at 300 pixels needs rounding down."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        Fire(64, 16, 64, 64),
        Fire(128, 16, 64, 64),
        nn.MaxPool2d(3, stride=2),
        Fire(128, 32, 128, 128),
        Fire(256, 32, 128, 128),
        nn.MaxPool2d(3, stride=2),
        Fire(256, 48, 192, 192),
        Fire(384, 48, 192, 192),
        Fire(384, 64, 256, 256),
        Fire(512, 64, 256, 256),
    )
