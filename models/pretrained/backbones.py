"""Weights of backbones from files: torchvision's, qfgaohao's, ucbdrive's, and those of train_backbone.py."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from torch import nn

from models import backbones as classifiers
from models.pretrained.state_dicts import (
    NetworkWeights,
    State,
    build_strictly,
    family_of,
    fetch,
    fits,
    load_with_classes,
    names_in,
    open_weights,
    other_classes,
    size_of,
    with_counters,
)
from utils import torch_files
from utils.errors import WeightsError

# A family is recognized by tensors that no other has all of, under the names of `bare_names`; the first that fits.
FAMILIES = {
    "resnet152": ("layer2.7.conv3.weight", "layer3.35.conv3.weight"),
    "resnet101": ("layer3.22.conv3.weight",),
    "resnet50": ("layer3.5.conv3.weight",),
    "resnet34": ("layer3.5.conv2.weight",),
    "resnet18": ("layer1.1.conv2.weight", "layer4.1.conv2.weight"),
    "mobilenet_v1": ("0.0.weight", "13.3.weight"),
    "mobilenet_v2": ("0.0.weight", "2.conv.3.weight"),
    "squeezenet1_1": ("0.weight", "6.squeeze.weight"),
    "vgg16": ("0.weight", "26.weight"),
    "vgg16_bn": ("0.weight", "1.running_mean", "40.weight"),
    "dla34": ("base_layer.0.weight", "level2.tree1.conv1.weight"),
}
IMAGENET = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]  # names of the 1000 classes
VGG_CLASSIFIER = {"classifier.0.weight": (4096, 25088), "classifier.0.bias": (4096,)}  # its first two layers
VGG_CLASSIFIER |= {"classifier.3.weight": (4096, 4096), "classifier.3.bias": (4096,)}
PREFIXES = ("base_net.", "features.", "model.", "backbone.body.", "base.")  # of a backbone in a larger network


def load_body(body: nn.Module, family: str, path_or_state_dict: str | Path | dict, detector: str) -> str:
    """Load a file into the `body` of a detector; returns a line for the console.

    The file is torchvision's state dict, a detector with the same body, or a checkpoint of ours.

    family    of the body, a key of FAMILIES
    detector  its name, for messages
    """
    _, state, label = open_weights(path_or_state_dict)
    state, own = bare_names(state), body.state_dict()
    check_family(state, family, label, detector)
    state = with_counters(state, own)
    check_shapes(state, own, label, detector)
    body.load_state_dict({name: state[name] for name in own})
    return f"{len(own)} of {len(own)} tensors of the backbone loaded"


def check_family(state: Mapping, family: str, label: str, user: str) -> None:
    """WeightsError if `state`, under bare names, is not of `family`, which `user` needs."""
    given = family_of(state, FAMILIES, label)
    if given != family:
        raise WeightsError(f"{label}: contains a {given}, but {user} needs a {family}; give a {family} file")


def check_shapes(state: Mapping, needed: Mapping, label: str, user: str, hint: str = "") -> None:
    """WeightsError, ending in `hint`, if a tensor of `needed` is not in `state` or has another shape there."""
    for name, value in needed.items():
        if name not in state or state[name].shape != value.shape:
            shape = list(state[name].shape) if name in state else "missing"
            raise WeightsError(f"{label}: {name} is {shape}, {user} needs {list(value.shape)}{hint}")
        if state[name].is_floating_point() != value.is_floating_point():
            raise WeightsError(f"{label}: {name} is {state[name].dtype}, {user} needs {value.dtype}")


def fine_tune(net: nn.Module, path_or_state_dict: str | Path | dict, strict: bool = False) -> str:
    """Load a complete classifier, its last layer by class name (see `state_dicts.load_with_classes`).

    strict: WeightsError where the file has other classes, or the same ones in another order.
    """
    saved, state, label = open_weights(path_or_state_dict)
    check_family(bare_names(state), net.name, label, "this run")
    own = net.state_dict()
    head = list(own)[-2:]  # weight and bias of the last layer
    count = size_of({**own, **state}, head[1], label)
    classes, wanted = names_in(saved), getattr(net, "classes", None)
    classes = classes if classes and len(classes) == count else None
    if strict and (count != net.num_classes or (classes and wanted and classes != wanted)):
        raise WeightsError(f"{label}: {other_classes(classes, wanted, count, net.num_classes)}")
    return load_with_classes(net, NetworkWeights(net.name, state, count, classes, {}, label), head)


def is_classifier(state: Mapping) -> bool:
    """Whether the last layer of a classifier is in `state`, not only its backbone."""
    return any(last_bias(name) in state for name in fits(bare_names(state), FAMILIES)[:1])


def last_bias(name: str) -> str:
    """The bias of a classifier's last layer."""
    with torch.device("meta"):
        return list(classifiers.NETWORKS[name](1).state_dict())[-1]


def from_state(state: State, label: str) -> nn.Module:
    """The classifier with the weights in `state`, as torchvision's or our files have them.

    `classes` are ImageNet's names where there are 1000, else None; `image_size` is (224, 224). Raises WeightsError.
    """
    name = family_of(bare_names(state), FAMILIES, label)
    width = {"width_mult": size_of(state, "features.17.conv.2.weight", label) / 320} if name == "mobilenet_v2" else {}
    count = size_of(state, last_bias(name), label)
    net = build_strictly(functools.partial(classifiers.NETWORKS[name], count, **width), state, label)
    net.classes, net.image_size = list(IMAGENET) if net.num_classes == len(IMAGENET) else None, (224, 224)
    return net


def published(net: nn.Module) -> State:
    """torchvision's ImageNet weights; see `imagenet`."""
    return imagenet(net.name)


def imagenet(name: str) -> State:
    """torchvision's ImageNet state dict of `name`, downloaded unless it is in torch.hub's folder. Raises WeightsError.

    Of each network the first version, which torchvision's detectors start from.
    """
    if name not in torchvision.models.list_models():
        raise WeightsError(f"torchvision has no weights of {name}")
    return torch_files.read(fetch(torchvision.models.get_model_weights(name).IMAGENET1K_V1.url))


def bare_names(state: Mapping) -> State:
    """The part of a state dict that belongs to the backbone, without prefix, MobileNet v2 under qfgaohao's names."""
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in state):
            inner = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
            classifier = {n: v for n, v in state.items() if n.startswith("classifier.")}
            state = {**inner, **subsampled_vgg(classifier)}
            break
    if any(re.fullmatch(r"\d+\.conv\.\d\.\d\.\w+", name) for name in state):
        state = {flat_v2_name(name): value for name, value in state.items()}
    return dict(state)


def flat_v2_name(name: str) -> str:
    """qfgaohao's name of a MobileNet v2 tensor of torchvision, which nests conv, BN, ReLU in threes within a block."""
    parts = name.split(".")
    if "conv" not in parts:
        return name
    block, _, index, *rest = parts
    nested = 1 if block == "1" else 2  # the first block has no expansion
    if int(index) < nested:
        return ".".join([block, "conv", str(3 * int(index) + int(rest[0])), *rest[1:]])
    return ".".join([block, "conv", str(2 * nested + int(index)), *rest])


def subsampled_vgg(classifier: Mapping) -> State:
    """SSD's fc6 and fc7 from VGG16's classifier (Liu et al. 2016): every 4th unit, every 3rd row and column."""
    shapes = {name: tuple(value.shape) for name, value in classifier.items()}
    if not VGG_CLASSIFIER.items() <= shapes.items():
        return {}
    fc6 = classifier["classifier.0.weight"].reshape(4096, 512, 7, 7)
    return {
        "31.weight": fc6[::4, :, ::3, ::3],
        "31.bias": classifier["classifier.0.bias"][::4],
        "33.weight": classifier["classifier.3.weight"][::4, ::4, None, None],
        "33.bias": classifier["classifier.3.bias"][::4],
    }
