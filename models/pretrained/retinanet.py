"""Weights of RetinaNet from published files, yhenon's and torchvision's."""

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from models.pretrained import backbones
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
from models.retinanet import SHAPES, RetinaNet
from utils.errors import WeightsError

# A family is recognized by tensors that no other has all of.
FAMILIES = {
    "retinanet (torchvision)": ("head.classification_head.cls_logits.weight", "backbone.body.layer1.0.conv1.weight"),
    "retinanet (yhenon)": ("classificationModel.output.weight", "fpn.P5_1.weight", "layer1.0.conv1.weight"),
}
ANCHORS = {"retinanet (torchvision)": "torchvision", "retinanet (yhenon)": "yhenon"}
SIDES = {"torchvision": (800, 1333), "yhenon": (608, 1024)}  # shortest side of the images, maximum of the longest
COCO_WEIGHTS = RetinaNet_ResNet50_FPN_Weights.COCO_V1
COCO_IDS = COCO_WEIGHTS.meta["categories"]  # by COCO id, 11 of which are unused
COCO = [name for name in COCO_IDS if name not in ("__background__", "N/A")]
NORM_EPS = 1e-5
LOGITS = "head.classification_head.cls_logits"
# (yhenon's name, our name, what is added to the number # in it); * is the rest. The first row that fits counts.
YHENON = (
    ("fpn.P6.*", "backbone.fpn.extra_blocks.p6.*", 0),
    ("fpn.P7_2.*", "backbone.fpn.extra_blocks.p7.*", 0),
    ("fpn.P#_1.*", "backbone.fpn.inner_blocks.#.0.*", -3),
    ("fpn.P#_2.*", "backbone.fpn.layer_blocks.#.0.*", -3),
    ("regressionModel.conv#.*", "head.regression_head.conv.#.0.*", -1),
    ("regressionModel.output.*", "head.regression_head.bbox_reg.*", 0),
    ("classificationModel.conv#.*", "head.classification_head.conv.#.0.*", -1),
    ("classificationModel.output.*", f"{LOGITS}.*", 0),
    ("*", "backbone.body.*", 0),
)


def rename(name: str, rows: Iterable[tuple[str, str, int]]) -> str:
    """A tensor's name by the first row (from, to, shift of the number) that fits it."""
    for source, target, shift in rows:
        pattern = re.escape(source).replace(r"\#", r"(?P<number>\d)").replace(r"\*", r"(?P<rest>.+)")
        if match := re.fullmatch(pattern, name):
            number = int(match.groupdict().get("number") or 0)
            return target.replace("#", str(number + shift)).replace("*", match["rest"])
    return name


def our_name(name: str, anchors: str) -> str:
    """The name in our networks of a tensor in a published file; anchors: "torchvision" or "yhenon"."""
    return rename(name, YHENON) if anchors == "yhenon" else new_torchvision_name(name)


def new_torchvision_name(name: str) -> str:
    """torchvision's name since version 0.14, which is ours, of a RetinaNet or pyramid tensor of any version."""
    name = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)", r"\1.0.\2", name)
    old_layer = r"(head\.\w+\.conv)\.(\d)\.(weight|bias)"
    return re.sub(old_layer, lambda match: f"{match[1]}.{int(match[2]) // 2}.0.{match[3]}", name)


def published_state(net: RetinaNet) -> State:
    """The state dict of a RetinaNet under the names of the program that its anchors come from."""
    backwards = [(ours, theirs, -shift) for theirs, ours, shift in YHENON]
    rows = backwards if net.arguments["anchors"] == "yhenon" else ()
    return {rename(name, rows): value for name, value in net.state_dict().items()}


def with_norm_eps(state: Mapping) -> State:
    """The state dict of a published torchvision detector for our networks, whose batch norms have an epsilon of 1e-5.

    torchvision's first detectors have frozen batch norms, without step counters, with epsilon 0; their variances are
    reduced by 1e-5, so that the sum of both is the same.
    """
    if any(name.endswith("num_batches_tracked") for name in state):
        return dict(state)
    return {name: value - NORM_EPS if name.endswith("running_var") else value for name, value in state.items()}


def describe(family: str, state: State, label: str) -> NetworkWeights:
    """The NetworkWeights in a published state dict; depth and class count are those of its tensors."""
    anchors = ANCHORS[family]
    state = {our_name(name, anchors): value for name, value in state.items()}
    body = family_of(backbones.bare_names(state), backbones.FAMILIES, label)
    if not body.startswith("resnet") or f"{LOGITS}.bias" not in state:
        raise WeightsError(f"{label}: not a complete RetinaNet on a ResNet; use another copy")
    if anchors == "torchvision":
        state = with_norm_eps(state)
    count = size_of(state, f"{LOGITS}.bias", label) // SHAPES
    classes = next((list(names) for names in (COCO_IDS, COCO) if len(names) == count), None)
    arguments = {"depth": int(body.removeprefix("resnet")), "anchors": anchors}
    return NetworkWeights("retinanet", state, count, classes, arguments, label)


def from_state(family: str, state: State, label: str) -> RetinaNet:
    """The RetinaNet of `family` with the weights in `state`.

    `classes` are COCO's names where there are 80 or 91, else None; `min_side` and `max_side` as published.
    """
    weights = describe(family, state, label)
    new = functools.partial(RetinaNet, weights.num_classes, **weights.arguments)
    net = build_strictly(new, weights.state, label)
    net.classes, net.image_size = weights.classes, None
    net.min_side, net.max_side = SIDES[weights.arguments["anchors"]]
    return net


def fine_tune(net: RetinaNet, path_or_state_dict: str | Path | dict, strict: bool = False) -> str:
    """Load a complete RetinaNet, published or ours, of the same depth and anchors; see `load_with_classes`."""
    weights = open_network(path_or_state_dict, FAMILIES, describe)
    if weights.name != net.name:
        raise WeightsError(f"{weights.label}: contains a {weights.name}, not a {net.name}")
    for name, flag in (("depth", "--depth"), ("anchors", "--anchors"), ("anchor_scale", "--anchor-scale")):
        given, own = weights.arguments.get(name, net.arguments[name]), net.arguments[name]
        if given != own:
            raise WeightsError(
                f"{weights.label}: was made with {flag} {given}, this run has {own}; give {flag} {given}"
            )
    return load_with_classes(net, weights, [LOGITS], anchors_per_cell=SHAPES, strict=strict)


def backbone_name(net: RetinaNet) -> str:
    return f"resnet{net.arguments['depth']}"


def load_backbone(net: RetinaNet, path_or_state_dict: str | Path | dict) -> str:
    """Load the ResNet of a file; see `backbones.load_body`."""
    name = f"retinanet of depth {net.arguments['depth']}"
    return backbones.load_body(net.backbone["body"], backbone_name(net), path_or_state_dict, name)


def published(net: RetinaNet) -> Path:
    """torchvision's COCO weights, downloaded unless they are in torch.hub's folder. Raises WeightsError."""
    if net.arguments["depth"] != 50 or net.arguments["anchors"] != "torchvision":
        raise WeightsError(
            "torchvision's RetinaNet is the only one to download: --arch retinanet_resnet50 --anchors torchvision"
        )
    return fetch(COCO_WEIGHTS.url)
