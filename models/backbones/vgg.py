"""VGG16 as SSD changed it (Liu et al. 2016): 35 layers, [B,3,H,W] -> [B,1024,H/16,W/16]."""

from torch import nn
from torchvision.models.vgg import cfgs, make_layers


def vgg16_features():
    """pool3 rounds up (75 -> 38 at 300 pixels), pool5 has stride 1, fc6 and fc7 are convolutions.

    Layer 22 is conv4_3 after its ReLU.
    """
    layers = list(make_layers(cfgs["D"]))
    layers[16].ceil_mode = True
    layers[30] = nn.MaxPool2d(3, stride=1, padding=1)
    fc6, fc7 = nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)
    return nn.Sequential(*layers, fc6, nn.ReLU(inplace=True), fc7, nn.ReLU(inplace=True))
