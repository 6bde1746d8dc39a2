"""VGG16 as SSD changed it: 35 layers, [B,3,H,W] -> [B,1024,H/16,W/16]; layer 22 is conv4_3 after its ReLU.

pool5 is 3x3 with stride 1, fc6 a 3x3 convolution dilated by 6 and fc7 a 1x1 one, so that stride 16 is kept. pool3
rounds up (75 -> 38 at 300 pixels), the others down.
"""

from torch import nn


def vgg16():
    layers, channels = [], 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "C", 512, 512, 512, "M", 512, 512, 512):
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=width == "C"))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        channels = width
    layers.append(nn.MaxPool2d(3, stride=1, padding=1))
    layers += [nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(1024, 1024, 1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
