"""Weights of CenterFusion from published files, CenterNet's and CenterFusion's."""

import functools
from pathlib import Path

from models.centerfusion import NETWORKS, CenterFusion
from models.pretrained import backbones
from models.pretrained.state_dicts import (
    State,
    build_strictly,
    family_of,
    load_strictly,
    names_in,
    open_weights,
    size_of,
)
from utils.errors import WeightsError
from utils.nuscenes import CLASSES

# A family is recognized by tensors that no other has all of; the first that fits.
FAMILIES = {
    "centerfusion_dla34": ("dla_up.ida_0.proj_1.conv.weight", "base.level5.root.conv.weight"),
    "centerfusion_resnet34": ("dla_up.ida_0.proj_1.0.weight", "base.layer3.5.conv2.weight"),
    "centerfusion_resnet18": ("dla_up.ida_0.proj_1.0.weight", "base.layer4.1.conv2.weight"),
}
IMAGE_SIZE = (448, 800)
BODY = ("base", "dla_up", "ida_up")
FIRST_LAYERS = {"dla34": "base_layer.0", "resnet18": "conv1", "resnet34": "conv1"}


def from_state(family: str, state: State, label: str) -> CenterFusion:
    """The network of `family` with the weights in `state`; class count and radar are those of its tensors.

    `classes` are nuScenes' ten where there are ten, else None; `image_size` as published.
    """
    if "hm.2.bias" not in state:
        raise WeightsError(f"{label}: not a complete {family}, hm is missing; use another copy")
    count = size_of(state, "hm.2.bias", label)
    net = build_strictly(functools.partial(NETWORKS[family], count, radar="dep_sec.0.weight" in state), state, label)
    net.classes, net.image_size = list(CLASSES) if count == len(CLASSES) else None, IMAGE_SIZE
    return net


def fine_tune(net: CenterFusion, path_or_state_dict: str | Path | dict, strict: bool = False) -> str:
    """Load a CenterFusion or CenterNet, published or ours; returns a line for the console.

    Body and upsampling must fit. A head is loaded if the file has it in the same shape, else it keeps its random
    weights, as does `hm` where the class names differ. `strict`: WeightsError in that case, and if only one of file and
    network has the heads of the radar.
    """
    saved, state, label = open_weights(path_or_state_dict)
    family = family_of(state, FAMILIES, label)
    if family != net.name:
        raise WeightsError(f"{label}: contains a {family}, not a {net.name}; give a {net.name} file")
    own, classes, wanted = net.state_dict(), names_in(saved), getattr(net, "classes", None)
    parts = [*BODY]  # what is loaded
    for head in (*net.first_heads, *net.second_heads):
        shapes, given = (
            {key: value.shape for key, value in tensors.items() if key.startswith(f"{head}.")}
            for tensors in (own, state)
        )
        other_classes = head == "hm" and classes and wanted and list(classes) != list(wanted)
        if shapes == given and not other_classes:
            parts.append(head)
    random = [head for head in (*net.first_heads, *net.second_heads) if head not in parts]
    if strict and "hm" in random:
        count = size_of(state, "hm.2.bias", label)
        counts = f"has other classes than the data, {count} in hm, {net.num_classes} in the data"
        raise WeightsError(f"{label}: {counts}; give the data that it was trained on")
    file_has_radar = "dep_sec.0.weight" in state
    if strict and file_has_radar != net.arguments["radar"]:
        remedy = "with radar; add --pointcloud" if file_has_radar else "without radar; leave out --pointcloud"
        raise WeightsError(f"{label}: was trained {remedy}")
    # CenterNet's files of 2019 also have the ImageNet classifier of the body, base.fc.
    loaded = {key: value for key, value in state.items() if key.split(".")[0] in parts and "base.fc." not in key}
    unused = sorted({"base.fc" if "base.fc." in key else key.split(".")[0] for key in state} - {*parts, *random})
    initial = {key: value for key, value in own.items() if key.split(".")[0] in random}
    load_strictly(net, {**loaded, **initial}, label)
    line = f"{len(own) - len(initial)} of {len(own)} tensors loaded"
    line += f"; these heads keep random weights: {', '.join(random)}" * bool(random)
    return line + f"; not used: {', '.join(unused)}" * bool(unused)


def backbone_name(net: CenterFusion) -> str:
    return net.name.removeprefix("centerfusion_")


def load_backbone(net: CenterFusion, path_or_state_dict: str | Path | dict) -> str:
    """Load a DLA-34 or ResNet. It was trained on RGB images, so the first layer is flipped for BGR ones."""
    backbone = backbone_name(net)
    line = backbones.load_body(net.base, backbone, path_or_state_dict, net.name)
    first = net.base.get_submodule(FIRST_LAYERS[backbone])
    first.weight.data.copy_(first.weight.data.flip(1))
    return f"{line}, its first layer flipped from RGB to BGR"


def published(net: CenterFusion) -> Path:
    raise WeightsError(f"the published weights of {net.name} cannot be downloaded automatically")
