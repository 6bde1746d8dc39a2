"""Mask R-CNN from torchvision's files, and what a new run starts from."""

import re
from pathlib import Path

import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights, MaskRCNN_ResNet50_FPN_Weights

from models.errors import WeightsError
from models.maskrcnn import NETWORKS
from models.published_backbones import FAMILIES as BACKBONES
from models.published_backbones import bare_names, imagenet, load_backbone
from models.published_retinanet import COCO, COCO_IDS, NORM_EPS
from models.weights import family_of, fetch_file, load_strictly, open_weights

CLASSIFIER, MASK = "roi_heads.box_predictor.cls_score", "roi_heads.mask_predictor.mask_fcn_logits"
# The layers that know classes: a row for each, background first, or four in the second.
HEADS = (CLASSIFIER, "roi_heads.box_predictor.bbox_pred", MASK)
# A family is known by names that no other has.
FAMILIES = {"maskrcnn": ("rpn.head.cls_logits.weight", f"{CLASSIFIER}.weight", f"{MASK}.weight")}
COCO_WEIGHTS = {
    "maskrcnn_resnet50": MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    "maskrcnn_resnet50_v2": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
}
# Patterns of names in torchvision's first published file -> a function of the match that gives those of today.
RENAMED = {
    r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(\w+)": lambda m: f"{m[1]}.0.{m[2]}",
    r"rpn\.head\.conv\.(\w+)": lambda m: f"rpn.head.conv.0.0.{m[1]}",
    r"roi_heads\.mask_head\.mask_fcn(\d)\.(\w+)": lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.0.{m[2]}",
}


def our_name(name):
    """The name of today of a tensor in a published file."""
    for pattern, rename in RENAMED.items():
        match = re.fullmatch(pattern, name)
        if match:
            return rename(match)
    return name


def describe(state, label):
    """(name of the network, state dict under our names, class count, class names or None, arguments).

    torchvision's first detector lacks the step counters of batch norm: its norms were fixed ones with epsilon 0. Ours
    have 1e-5, so that they can learn too, and get variances smaller by that much: the sum is the same.
    """
    state = {our_name(name): value for name, value in state.items()}
    backbone = family_of(bare_names(state), BACKBONES, label)
    name = f"maskrcnn_{backbone}" + "_v2" * ("backbone.fpn.inner_blocks.0.1.weight" in state)
    if name not in NETWORKS:
        raise WeightsError(f"{label}: holds a {name}; known are {', '.join(NETWORKS)}")
    if not any(key.endswith("num_batches_tracked") for key in state):
        state = {key: value - NORM_EPS if key.endswith("running_var") else value for key, value in state.items()}
    count = len(state[f"{CLASSIFIER}.weight"]) - 1
    classes = next((list(names) for names in (COCO_IDS[1:], COCO) if len(names) == count), None)
    arguments = {}
    if name == "maskrcnn_resnet18":
        width, hidden = (state[f"{head}.weight"].shape[1] for head in ("rpn.head.cls_logits", CLASSIFIER))
        arguments = {"proposals": 1000, "width": width, "hidden": hidden}
    return name, state, count, classes, arguments


def from_state(state, label):
    """torchvision's Mask R-CNN with the weights in `state`, strictly; kind and class count from names and shapes.

    `classes` are COCO's names where there are 80 or 90, else None; `min_side` and `max_side` as published.
    """
    name, state, count, classes, arguments = describe(state, label)
    net = NETWORKS[name](count, **arguments)
    load_strictly(net, state, label)
    net.classes, net.image_size = classes, None
    return net


def open_detector(path_or_state_dict):
    """(`describe` of a file, published or a checkpoint of ours, name for messages)."""
    saved, state, label = open_weights(path_or_state_dict)
    if "architecture" in saved:
        return (saved["architecture"], state, saved["num_classes"], saved["classes"], saved["arguments"]), label
    family_of(state, FAMILIES, label)
    return describe(state, label), label


def pick_classes(state, given, wanted):
    """`state` with the rows of background and of the names `wanted`, in their order, out of those of `given`."""
    rows = [0, *(given.index(name) + 1 for name in wanted)]

    def picked(value):
        return value.unflatten(0, (len(given) + 1, -1))[rows].flatten(0, 1)

    return {name: picked(value) if name.startswith(HEADS) else value for name, value in state.items()}


def fine_tune(net, path_or_state_dict):
    """Weights of a whole Mask R-CNN, published or ours, into `net`; returns one line that says what was taken.

    Where the names of the classes are known (`net.classes`) and the file has them all, the three layers that know
    classes are taken by name; else those of other classes start fresh. All else must fit to the last tensor.
    """
    (name, state, count, classes, arguments), label = open_detector(path_or_state_dict)
    if name != net.name:
        raise WeightsError(f"{label}: holds a {name}, not a {net.name}; give a file of that")
    for argument in ("width", "hidden"):
        given, own = arguments.get(argument), net.arguments.get(argument)
        if given != own:
            raise WeightsError(f"{label}: was made with {argument} {given}, this run has {own}; make them the same")
    own, wanted, note, fresh = net.state_dict(), getattr(net, "classes", None), "", False
    if wanted and classes and wanted != classes and set(wanted) <= set(classes):
        state, note = pick_classes(state, classes, wanted), f", {len(wanted)} of its {count} classes by name"
    elif count != net.num_classes or (wanted and classes and wanted != classes):
        fresh = True
        other = f"checkpoint {count} classes, data {net.num_classes}" if count != net.num_classes else "other classes"
        note = f"; these heads start fresh ({other}): {', '.join(HEADS)}"
        state = {**state, **{key: value for key, value in own.items() if key.startswith(HEADS)}}
    load_strictly(net, state, label)
    taken = sum(not (fresh and key.startswith(HEADS)) for key in own)
    return f"{taken} of {len(own)} tensors loaded{note}"


def coco(name):
    """The path of torchvision's COCO weights of network `name`, downloaded to torch.hub's folder if not there yet."""
    if name not in COCO_WEIGHTS:
        raise WeightsError(f"there are no COCO weights of {name}, only of {', '.join(COCO_WEIGHTS)}")
    url = COCO_WEIGHTS[name].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        return fetch_file(url, path)
    except WeightsError as error:
        raise WeightsError(f"{error}; put it at {path}") from error


def begin_maskrcnn(net, weights, say=print, fetch=True):
    """The weights a new run starts from; says what was taken. Raises WeightsError.

    weights   "none"; file of a whole Mask R-CNN (see `fine_tune`) or of a ResNet (see `load_backbone`); "coco" or
              "imagenet": torchvision's of the detector or of its ResNet, downloaded if they are not there; or "auto":
              the first of these two that can be had, and without either the network stays fresh, which is said loudly
    fetch     false in all processes but the main one, whose weights the others get later; nothing is downloaded then
    """
    if weights == "none":
        say("no weights to start from; batch norm must learn then: --no-freeze-bn")
    elif weights in ("coco", "imagenet", "auto"):
        if fetch:
            begin_published(net, weights, say)
    elif any(all(mark in open_weights(weights)[1] for mark in marks) for marks in FAMILIES.values()):
        say(f"{weights}: {fine_tune(net, weights)}")
    else:
        taken = load_backbone(net.backbone["body"], net.name.split("_")[1], weights, net.name)
        say(f"{weights}: {taken} of the backbone taken")


def begin_published(net, weights, say):
    """`begin_maskrcnn` for torchvision's own weights, "coco", "imagenet" or "auto"."""
    backbone, refused = net.name.split("_")[1], []
    if weights == "coco" or (weights == "auto" and net.name in COCO_WEIGHTS):
        try:
            say(f"COCO weights of {net.name}: {fine_tune(net, coco(net.name))}")
            return
        except WeightsError as error:
            refused.append(error)
    if weights in ("imagenet", "auto"):
        try:
            taken = load_backbone(net.backbone["body"], backbone, imagenet(backbone), net.name)
            say(f"ImageNet weights of {backbone}: {taken} of the backbone taken")
            return
        except WeightsError as error:
            refused.append(error)
    if weights != "auto":
        raise WeightsError(f"{refused[0]} or name a file with --weights") from refused[0]
    for error in refused:
        say(f"{error} or name a file with --weights")
    say("WARNING: no weights to start from: TRAINING FROM SCRATCH; batch norm must learn then: --no-freeze-bn")
