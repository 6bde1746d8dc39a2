"""Weights to start from: published detectors and backbones, and checkpoints of other runs.

Each family of networks has its own file with

    FAMILIES                       tensors by which its complete networks are recognized
    fine_tune(net, file, strict)   load a complete network, class-specific layers by class name
    load_backbone(net, file)       load the backbone only
    backbone_name(net)             name of the backbone, see models.backbones
    published(net)                 the published weights of the network, downloaded if necessary
    from_state(family, state, label)   a network of the published state dict
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from torch import nn

from models.centerfusion import CenterFusion
from models.maskrcnn import MaskRCNN
from models.pretrained import backbones, centerfusion, maskrcnn, retinanet, ssd
from models.pretrained.state_dicts import (
    build_strictly,
    family_of,
    fits,
    load_matching,
    load_strictly,
    open_weights,
    trained_weights,
)
from models.retinanet import RetinaNet
from models.ssd import SSD
from utils.errors import WeightsError

__all__ = [
    "build_strictly",
    "init_weights",
    "load",
    "load_matching",
    "load_strictly",
    "open_weights",
    "trained_weights",
]

FAMILY_OF = {SSD: ssd, RetinaNet: retinanet, CenterFusion: centerfusion, MaskRCNN: maskrcnn}  # else backbones
DOWNLOADS = ("auto", "coco", "imagenet")
NORM_HINT = "; frozen batch norm would keep its initial values: give --no-freeze-bn"
SCRATCH = "TRAINING FROM SCRATCH (--weights none --backbone-weights none is without warning)"


def init_weights(
    net: nn.Module,
    weights: str,
    backbone_weights: str = "none",
    download: bool = True,
    strict: bool = False,
    freeze_bn: bool | str = False,
    print: Callable[[str], object] = print,
) -> bool:
    """Load the weights that training starts from, and print what was loaded. Returns whether they are published ones
    that were requested by name; False in processes that do not download.

    weights            "none"; "auto" or "coco": the published weights of the network; "imagenet": those of its
                       backbone; or a file of the network or its backbone, ours or published
    backbone_weights   "none"; "auto" or "imagenet": torchvision's ImageNet weights; or a file of the backbone
    download           False in all processes except the main one, which sends its weights to the others later
    strict             for an evaluation: a backbone only, or weights of other classes, are an error
    freeze_bn          of optim.set_train_mode: a network without weights cannot learn with a frozen batch norm

    Where both are "auto", the backbone is loaded only if the network has no published weights. Raises WeightsError if a
    file does not fit or weights requested by name cannot be loaded; if "auto" finds none, a warning is printed.
    """
    family = FAMILY_OF.get(type(net), backbones)
    if weights not in ("none", "auto") and backbone_weights not in ("none", "auto"):
        raise WeightsError(f"--weights {weights} and --backbone-weights {backbone_weights}: give one of them")
    hint = NORM_HINT if freeze_bn else ""
    if weights == backbone_weights == "none":
        print(f"no weights to start from: training from scratch{hint}")
    elif weights not in ("none", *DOWNLOADS):
        _load_file(net, family, weights, strict, print)
    elif backbone_weights not in ("none", *DOWNLOADS):
        print(f"{backbone_weights}: {family.load_backbone(net, backbone_weights)}")
    elif download:
        if _load_published(net, family, weights, backbone_weights, strict, print):
            return True
        print(f"WARNING: no weights to start from: {SCRATCH}{hint}")
    return False


def load(path_or_state_dict: str | Path | dict, source: str | None = None) -> nn.Module:
    """The detector or classifier in a published file or state dict, in evaluation mode.

    Family, class count, depth and width are recognized by names and shapes; names may begin with `module.`. All tensors
    must fit. The network gets `classes`, names in label order or None if unknown, and `image_size` (h, w) or, where
    that is None, `min_side` and `max_side`. source: name for messages. Raises WeightsError.
    """
    _, state, label = open_weights(path_or_state_dict, source)
    modules = {name: module for module in FAMILY_OF.values() for name in module.FAMILIES}
    families = {name: module.FAMILIES[name] for name, module in modules.items()}
    if not fits(state, families) and backbones.is_classifier(state):
        return backbones.from_state(state, label).eval()
    family = family_of(state, families, label)
    return modules[family].from_state(family, state, label).eval()


def _load_file(net: nn.Module, family: ModuleType, file: str, strict: bool, print: Callable) -> None:
    _, state, label = open_weights(file)
    complete = any(all(tensor in state for tensor in tensors) for tensors in family.FAMILIES.values())
    if complete or family is backbones:
        print(f"{label}: {family.fine_tune(net, file, strict)}")
    elif strict:
        raise WeightsError(f"{label}: not a complete {net.name}, which an evaluation needs")
    else:
        print(f"{label}: {family.load_backbone(net, file)}")


def _load_published(
    net: nn.Module, family: ModuleType, weights: str, backbone_weights: str, strict: bool, print: Callable
) -> bool:
    """Load published weights of the network, else of its backbone; False if neither is available."""
    if weights == "coco" and family not in (retinanet, maskrcnn):
        raise WeightsError(f"there are no COCO weights of {net.name}")
    is_imagenet = "imagenet" in (weights, backbone_weights)
    sources = []
    if family is backbones or (weights in ("auto", "coco") and not is_imagenet):
        sources.append("network")
    if is_imagenet or backbone_weights == "auto" or (weights == "auto" and family is maskrcnn):
        sources.append("backbone")
    for source in sources:
        try:
            if source == "network":
                print(f"published weights of {net.name}: {family.fine_tune(net, family.published(net), strict)}")
            elif strict:
                raise WeightsError(f"ImageNet weights are not a complete {net.name}, which an evaluation needs")
            else:
                state = backbones.imagenet(family.backbone_name(net))
                print(f"ImageNet weights: {family.load_backbone(net, state)}")
            return True
        except WeightsError as error:
            message = f"{error}; or name a file with --weights"
            if strict or is_imagenet or weights == "coco":
                raise WeightsError(message) from error
            print(message)
    return False
