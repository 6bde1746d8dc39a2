"""MobileNet v1 and v2 as plain sequences of layers, under the names of qfgaohao's pytorch-ssd.

Each function returns the `nn.Sequential` before pooling and classifier: [B,3,H,W] -> [B,C,ceil(H/32),ceil(W/32)].
"""

from torch import nn

from models.layers import Conv3x3, conv_bn


def depthwise_separable(inputs, outputs, stride):
    """MobileNet v1's block: depthwise 3x3, BN, ReLU, pointwise, BN, ReLU: names 0 to 5."""
    return nn.Sequential(
        Conv3x3(inputs, inputs, stride, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def mobilenet_v1():
    """14 layers, 1024 channels at the end; layer 11 is the last of stride 16 with 512 channels."""
    blocks = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)] + [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
    layers, channels = [conv_bn(3, 32, 3, 2, nn.ReLU)], 32
    for outputs, stride in blocks:
        layers.append(depthwise_separable(channels, outputs, stride))
        channels = outputs
    return nn.Sequential(*layers)


class InvertedResidual(nn.Module):
    """MobileNet v2's block: widen by 1x1, depthwise 3x3, narrow by 1x1 without activation; a shortcut where it fits.

    expansion: hidden channels as a multiple of `inputs`; exactly 1 leaves the widening out; SSD's extras use less.
    """

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        self.shortcut = stride == 1 and inputs == outputs
        hidden = round(inputs * expansion)
        widen = [] if expansion == 1 else [*conv_bn(inputs, hidden, 1, 1, nn.ReLU6)]
        self.conv = nn.Sequential(
            *widen,
            Conv3x3(hidden, hidden, stride, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)

    def split(self, x):
        """(widened, output) of a block without shortcut: SSD's first head looks at the widened map of block 14."""
        layers = list(self.conv)
        for layer in layers[:3]:
            x = layer(x)
        widened = x
        for layer in layers[3:]:
            x = layer(x)
        return widened, x


def mobilenet_v2(width_mult=1.0):
    """19 layers; 1280 channels at the end, more only where width_mult > 1. Channels are cut off, not rounded to 8."""
    blocks = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    channels = int(32 * width_mult)
    layers = [conv_bn(3, channels, 3, 2, nn.ReLU6)]
    for expansion, width, repeats, first_stride in blocks:
        outputs = int(width * width_mult)
        for i in range(repeats):
            layers.append(InvertedResidual(channels, outputs, first_stride if i == 0 else 1, expansion))
            channels = outputs
    layers.append(conv_bn(channels, int(1280 * max(1.0, width_mult)), 1, 1, nn.ReLU6))
    return nn.Sequential(*layers)
