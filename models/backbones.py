"""Classifiers that detectors start from: torchvision's where it has them, MobileNet v1 and DLA-34 of our own.

Every network maps normalised images [B,3,H,W] to logits [B,K] and keeps the names of its published state dict.
"""

import functools

import torchvision
from torch import nn

from models import dla, layers, resnet
from models.errors import WeightsError
from models.mobilenet import mobilenet_v1


class MobileNetV1(nn.Module):
    """`model` and `fc`: the names of qfgaohao's ImageNet file."""

    def __init__(self, num_classes):
        super().__init__()
        self.model = mobilenet_v1()
        self.fc = nn.Linear(1024, num_classes)
        layers.initialise(self)

    def forward(self, images):
        return self.fc(self.model(images).mean((2, 3)))


def named(net, name, num_classes, **arguments):
    """Tell the network what it is: `build(name, num_classes, **arguments)` makes it again."""
    net.name, net.num_classes, net.arguments = name, num_classes, arguments
    net.image_mean, net.image_std = layers.IMAGENET_MEAN, layers.IMAGENET_STD
    return net


def resnets(depth, num_classes):
    return named(resnet.ResNet(depth, num_classes), f"resnet{depth}", num_classes)


def from_torchvision(name, num_classes):
    return named(getattr(torchvision.models, name)(weights=None, num_classes=num_classes), name, num_classes)


def mobilenet_v2(num_classes, width_mult=1.0):
    if not 0.1 <= width_mult <= 4:
        raise WeightsError(f"width_mult {width_mult}: must lie between 0.1 and 4")
    net = torchvision.models.mobilenet_v2(weights=None, num_classes=num_classes, width_mult=width_mult)
    return named(net, "mobilenet_v2", num_classes, width_mult=width_mult)


def own(network, name, num_classes):
    return named(network(num_classes), name, num_classes)


NETWORKS = {
    **{f"resnet{depth}": functools.partial(resnets, depth) for depth in resnet.DEPTHS},
    "mobilenet_v1": functools.partial(own, MobileNetV1, "mobilenet_v1"),
    "mobilenet_v2": mobilenet_v2,
    **{name: functools.partial(from_torchvision, name) for name in ("vgg16", "vgg16_bn", "squeezenet1_1")},
    "dla34": functools.partial(own, dla.DLA34, "dla34"),
}
