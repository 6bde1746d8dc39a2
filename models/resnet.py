"""ResNet 18 to 152 as torchvision has them, name for name; fixed batch norms are folded (`layers.conv_norm`)."""

import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.errors import WeightsError
from models.layers import conv_norm


class Basic(BasicBlock):
    def forward(self, x):
        shortcut = x if self.downsample is None else conv_norm(x, *self.downsample)
        y = conv_norm(x, self.conv1, self.bn1).relu_()
        y = conv_norm(y, self.conv2, self.bn2)
        return y.add_(shortcut).relu_()


class Narrow(Bottleneck):
    def forward(self, x):
        shortcut = x if self.downsample is None else conv_norm(x, *self.downsample)
        y = conv_norm(x, self.conv1, self.bn1).relu_()
        y = conv_norm(y, self.conv2, self.bn2).relu_()
        y = conv_norm(y, self.conv3, self.bn3)
        return y.add_(shortcut).relu_()


DEPTHS = {
    18: (Basic, (2, 2, 2, 2)),
    34: (Basic, (3, 4, 6, 3)),
    50: (Narrow, (3, 4, 6, 3)),
    101: (Narrow, (3, 4, 23, 3)),
    152: (Narrow, (3, 8, 36, 3)),
}


class ResNet(torchvision.models.ResNet):
    """depth: 18, 34, 50, 101 or 152; raises WeightsError on another."""

    def __init__(self, depth, num_classes=1000):
        if depth not in DEPTHS:
            raise WeightsError(f"no ResNet of depth {depth}; there are {', '.join(map(str, DEPTHS))}")
        block, counts = DEPTHS[depth]
        super().__init__(block, counts, num_classes)
        self.channels = tuple(width * block.expansion for width in (64, 128, 256, 512))  # of `maps`

    def maps(self, x):
        """Normalised images [B,3,H,W] -> the maps of stride 4, 8, 16, 32: C2 to C5, each [B,C,ceil(H/s),ceil(W/s)]."""
        x = self.maxpool(conv_norm(x, self.conv1, self.bn1).relu_())
        found = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            found.append(x)
        return found

    def forward(self, x):
        """Normalised images [B,3,H,W] -> logits [B,K]."""
        return self.fc(self.avgpool(self.maps(x)[-1]).flatten(1))


def body(depth):
    """A ResNet without pooling and classifier, of which a detector uses `maps` and `channels`."""
    net = ResNet(depth, 1)
    del net.avgpool, net.fc
    return net
