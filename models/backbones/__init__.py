"""Classifiers whose weights detectors start from: torchvision's where there is one, else MobileNet v1 and DLA-34.

Each maps normalized images [B,3,H,W] to logits [B,K], under the names of its published state dict.
"""

import functools

import torchvision

from models.backbones import dla, layers, mobilenet, resnet

CONSTRUCTORS = {
    **{f"resnet{depth}": functools.partial(resnet.ResNet, depth) for depth in resnet.DEPTHS},
    "mobilenet_v1": mobilenet.MobileNetV1,
    "vgg16": torchvision.models.vgg16,
    "vgg16_bn": torchvision.models.vgg16_bn,
    "squeezenet1_1": torchvision.models.squeezenet1_1,
    "dla34": dla.DLA34,
}


def with_attributes(net, name, num_classes, **arguments):
    """`net` with the attributes that every network has, see `models`."""
    net.name, net.num_classes, net.arguments = name, num_classes, arguments
    net.image_mean, net.image_std = layers.IMAGENET_MEAN, layers.IMAGENET_STD
    return net


def classifier(name, num_classes):
    return with_attributes(CONSTRUCTORS[name](num_classes=num_classes), name, num_classes)


def mobilenet_v2(num_classes, width_mult=1.0):
    mobilenet.check_width_mult(width_mult)
    net = torchvision.models.mobilenet_v2(num_classes=num_classes, width_mult=width_mult)
    return with_attributes(net, "mobilenet_v2", num_classes, width_mult=width_mult)


NETWORKS = {name: functools.partial(classifier, name) for name in CONSTRUCTORS}
NETWORKS["mobilenet_v2"] = mobilenet_v2
