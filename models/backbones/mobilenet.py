"""MobileNet v1 and v2 under the names of qfgaohao's pytorch-ssd.

The two `*_features` functions return the layers before pooling: [B,3,H,W] -> [B,C,ceil(H/32),ceil(W/32)].
"""

from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.backbones.layers import Conv3x3, initialize
from utils.errors import WeightsError


class MobileNetV1(nn.Module):
    """The classifier; `model` and `fc` are the names of qfgaohao's ImageNet file."""

    def __init__(self, num_classes):
        super().__init__()
        self.model = mobilenet_v1_features()
        self.fc = nn.Linear(1024, num_classes)
        initialize(self)

    def forward(self, images):
        """Normalized images [B,3,H,W] -> logits [B,K]."""
        return self.fc(self.model(images).mean((2, 3)))


def mobilenet_v1_features():
    """14 layers, the last with 1024 channels; layer 11 is the last of stride 16."""
    blocks = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)] + [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
    layers, channels = [Conv2dNormActivation(3, 32, 3, 2)], 32
    for outputs, stride in blocks:
        layers.append(depthwise_separable(channels, outputs, stride))
        channels = outputs
    return nn.Sequential(*layers)


def depthwise_separable(inputs, outputs, stride):
    """The block of MobileNet v1."""
    return nn.Sequential(
        Conv3x3(inputs, inputs, stride, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class InvertedResidual(nn.Module):
    """The block of MobileNet v2: 1x1 expansion, depthwise 3x3, linear 1x1 projection; a shortcut where shapes allow it.

    torchvision's has other names and takes whole numbers only as its expansion factor.

    expansion: hidden channels as a multiple of `inputs`; 1: no expansion layer. SSD's extra layers use less than 1.
    """

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        self.shortcut = stride == 1 and inputs == outputs
        hidden = round(inputs * expansion)
        expand = [] if expansion == 1 else Conv2dNormActivation(inputs, hidden, 1, activation_layer=nn.ReLU6)
        self.conv = nn.Sequential(
            *expand,
            Conv3x3(hidden, hidden, stride, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)

    def forward_expanded(self, x):
        """(expanded map, output) of a block with an expansion and without a shortcut."""
        expanded = self.conv[:3](x)
        return expanded, self.conv[3:](expanded)


def mobilenet_v2_features(width_mult=1.0):
    """19 layers, the last with 1280 * max(1, width_mult) channels. Channels are truncated, not rounded to 8."""
    check_width_mult(width_mult)
    blocks = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    channels = int(32 * width_mult)
    layers = [Conv2dNormActivation(3, channels, 3, 2, activation_layer=nn.ReLU6)]
    for expansion, width, repeats, first_stride in blocks:
        outputs = int(width * width_mult)
        for i in range(repeats):
            layers.append(InvertedResidual(channels, outputs, first_stride if i == 0 else 1, expansion))
            channels = outputs
    last = int(1280 * max(1.0, width_mult))
    layers.append(Conv2dNormActivation(channels, last, 1, activation_layer=nn.ReLU6))
    return nn.Sequential(*layers)


def check_width_mult(width_mult):
    if not 0.1 <= width_mult <= 4:
        raise WeightsError(f"width_mult {width_mult}: must be from 0.1 to 4")
