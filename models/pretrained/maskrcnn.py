"""Weights of Mask R-CNN from torchvision's files."""

import functools
import re
from pathlib import Path

from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights, MaskRCNN_ResNet50_FPN_Weights

from models.maskrcnn import NETWORKS, MaskRCNN
from models.pretrained import backbones
from models.pretrained.retinanet import COCO, COCO_IDS, new_torchvision_name, with_norm_eps
from models.pretrained.state_dicts import (
    NetworkWeights,
    State,
    build_strictly,
    family_of,
    fetch,
    load_with_classes,
    open_network,
    size_of,
)
from utils.errors import WeightsError

CLASSIFIER, MASK = "roi_heads.box_predictor.cls_score", "roi_heads.mask_predictor.mask_fcn_logits"
HEADS = (CLASSIFIER, "roi_heads.box_predictor.bbox_pred", MASK)  # class-specific layers, background first
# A family is recognized by tensors that no other has all of.
FAMILIES = {"maskrcnn": ("rpn.head.cls_logits.weight", f"{CLASSIFIER}.weight", f"{MASK}.weight")}
COCO_WEIGHTS = {
    "maskrcnn_resnet50": MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    "maskrcnn_resnet50_v2": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
}


def our_name(name: str) -> str:
    """The name in our networks of a tensor in a published file, whatever version of torchvision wrote it."""
    name = re.sub(r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1", name)
    old_layer = r"mask_head\.mask_fcn(\d)\.(\w+)"
    return new_torchvision_name(re.sub(old_layer, lambda match: f"mask_head.{int(match[1]) - 1}.0.{match[2]}", name))


def describe(family: str, state: State, label: str) -> NetworkWeights:
    """The NetworkWeights in a published state dict; variant, widths and class count are those of its tensors."""
    state = {our_name(name): value for name, value in state.items()}
    body = family_of(backbones.bare_names(state), backbones.FAMILIES, label)
    name = f"maskrcnn_{body}" + "_v2" * ("backbone.fpn.inner_blocks.0.1.weight" in state)
    if name not in NETWORKS:
        raise WeightsError(f"{label}: contains a {name}; known are {', '.join(NETWORKS)}")
    count = size_of(state, f"{CLASSIFIER}.weight", label) - 1
    classes = next((list(names) for names in (COCO_IDS[1:], COCO) if len(names) == count), None)
    arguments = {}
    if name == "maskrcnn_resnet18":
        width, hidden = (size_of(state, f"{head}.weight", label, 1) for head in ("rpn.head.cls_logits", CLASSIFIER))
        arguments = {"proposals": 1000, "width": width, "hidden": hidden}
    return NetworkWeights(name, with_norm_eps(state), count, classes, arguments, label)


def from_state(family: str, state: State, label: str) -> MaskRCNN:
    """The Mask R-CNN with the weights in `state`.

    `classes` are COCO's names where there are 80 or 90, else None; `min_side` and `max_side` as published.
    """
    weights = describe(family, state, label)
    new = functools.partial(NETWORKS[weights.name], weights.num_classes, **weights.arguments)
    net = build_strictly(new, weights.state, label)
    net.classes, net.image_size = weights.classes, None
    return net


def fine_tune(net: MaskRCNN, path_or_state_dict: str | Path | dict, strict: bool = False) -> str:
    """Load a complete Mask R-CNN, published or ours, of the same widths; see `load_with_classes`."""
    weights = open_network(path_or_state_dict, FAMILIES, describe)
    if weights.name != net.name:
        raise WeightsError(f"{weights.label}: contains a {weights.name}, not a {net.name}; give a {net.name} file")
    for name in ("width", "hidden"):
        given, own = weights.arguments.get(name), net.arguments.get(name)
        if given != own:
            raise WeightsError(f"{weights.label}: was made with {name} {given}, this run has {own}; make them the same")
    return load_with_classes(net, weights, HEADS, background=True, strict=strict)


def backbone_name(net: MaskRCNN) -> str:
    return net.name.split("_")[1]


def load_backbone(net: MaskRCNN, path_or_state_dict: str | Path | dict) -> str:
    """Load the ResNet of a file; see `backbones.load_body`."""
    return backbones.load_body(net.backbone["body"], backbone_name(net), path_or_state_dict, net.name)


def published(net: MaskRCNN) -> Path:
    """torchvision's COCO weights, downloaded unless they are in torch.hub's folder. Raises WeightsError."""
    if net.name not in COCO_WEIGHTS:
        raise WeightsError(f"there are no COCO weights of {net.name}, only of {', '.join(COCO_WEIGHTS)}")
    return fetch(COCO_WEIGHTS[net.name].url)
