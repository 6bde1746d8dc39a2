"""ResNet 18 to 152: torchvision's, but batch norms with fixed statistics are folded (`layers.conv_norm`)."""

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.backbones.layers import conv_norm
from utils.errors import WeightsError


class FoldedBasicBlock(BasicBlock):
    def forward(self, x):
        shortcut = x if self.downsample is None else conv_norm(x, *self.downsample)
        y = conv_norm(x, self.conv1, self.bn1).relu_()
        y = conv_norm(y, self.conv2, self.bn2)
        return y.add_(shortcut).relu_()


class FoldedBottleneck(Bottleneck):
    def forward(self, x):
        shortcut = x if self.downsample is None else conv_norm(x, *self.downsample)
        y = conv_norm(x, self.conv1, self.bn1).relu_()
        y = conv_norm(y, self.conv2, self.bn2).relu_()
        y = conv_norm(y, self.conv3, self.bn3)
        return y.add_(shortcut).relu_()


DEPTHS = {
    18: (FoldedBasicBlock, (2, 2, 2, 2)),
    34: (FoldedBasicBlock, (3, 4, 6, 3)),
    50: (FoldedBottleneck, (3, 4, 6, 3)),
    101: (FoldedBottleneck, (3, 4, 23, 3)),
    152: (FoldedBottleneck, (3, 8, 36, 3)),
}


class ResNet(torchvision.models.ResNet):
    """depth: 18, 34, 50, 101 or 152. Raises WeightsError on another."""

    def __init__(self, depth, num_classes=1000):
        if depth not in DEPTHS:
            raise WeightsError(f"no ResNet of depth {depth}; there are {', '.join(map(str, DEPTHS))}")
        block, counts = DEPTHS[depth]
        super().__init__(block, counts, num_classes)
        self.channels = tuple(width * block.expansion for width in (64, 128, 256, 512))  # of `feature_maps`

    def feature_maps(self, x):
        """Normalized images [B,3,H,W] -> C2 to C5, of stride 4, 8, 16, 32, each [B,C,ceil(H/s),ceil(W/s)]."""
        x = self.maxpool(conv_norm(x, self.conv1, self.bn1).relu_())
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def stages(self):
        """The layers from the images on, as five modules that can be frozen: the stem, then four stages."""
        return [nn.ModuleList([self.conv1, self.bn1]), self.layer1, self.layer2, self.layer3, self.layer4]

    def forward(self, x):
        """Normalized images [B,3,H,W] -> logits [B,K]."""
        return self.fc(self.avgpool(self.feature_maps(x)[-1]).flatten(1))


def body(depth):
    """A ResNet without pooling and classifier, for a detector."""
    net = ResNet(depth, 1)
    del net.avgpool, net.fc
    return net
