"""Weights of SSD from published files, qfgaohao's and dusty-nv's."""

import functools
from collections.abc import Sequence
from pathlib import Path

from models import ssd
from models.backbones.layers import IMAGENET_MEAN, IMAGENET_STD
from models.pretrained import backbones
from models.pretrained.state_dicts import (
    State,
    build_strictly,
    family_of,
    fetch,
    load_matching,
    open_weights,
    size_of,
    with_counters,
)
from utils.errors import WeightsError

URLS = {
    "mb1-ssd": "https://storage.googleapis.com/models-hao/mobilenet-v1-ssd-mp-0_675.pth",
    "mb2-ssd-lite": "https://storage.googleapis.com/models-hao/mb2-ssd-lite-mp-0_686.pth",
    "vgg16-ssd": "https://storage.googleapis.com/models-hao/vgg16-ssd-mp-0_7726.pth",
}
WIDTH_HINT = (
    "; train_backbone.py rounds the channels of a width to 8, as torchvision does, this network truncates them, as "
    "qfgaohao's does: give both the same whole number as --width-mult, such as 1.0"
)
# A family is recognized by tensors that no other has all of.
FAMILIES = {
    "vgg16-ssd": ("source_layer_add_ons.0.weight", "classification_headers.0.weight"),
    "sq-ssd-lite": ("base_net.3.squeeze.weight", "classification_headers.0.0.weight"),
    "mb2-ssd-lite": ("base_net.2.conv.0.weight", "classification_headers.0.3.weight"),
    "mb1-ssd-lite": ("base_net.1.3.weight", "classification_headers.0.2.weight"),
    "mb1-ssd": ("base_net.1.3.weight", "classification_headers.0.weight"),
}
# fmt: off
VOC = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
# fmt: on


def class_count(state: State) -> int | None:
    """Number of classes of an SSD's state dict, background counted; None if its last heads are missing."""
    logits, offsets = (state.get(f"{kind}_headers.5.bias") for kind in ("classification", "regression"))
    if logits is None or offsets is None or 0 in (logits.ndim, offsets.ndim, len(offsets)):
        return None
    return 4 * len(logits) // len(offsets)


def from_state(name: str, state: State, label: str) -> ssd.SSD:
    """The SSD of family `name` with the weights in `state`; class count and width are those of its tensors.

    `classes` is VOC's list where there are 20, else None; `image_size` (300, 300). Raises WeightsError.
    """
    count = class_count(state)
    if count is None:
        raise WeightsError(f"{label}: {name} without its last heads: not a complete file; use another copy")
    arguments = {}
    if name == "mb2-ssd-lite" and "base_net.17.conv.7.weight" in state:
        widest = size_of(state, "base_net.17.conv.7.weight", label)  # the widest layer is the most exact
        arguments["width_mult"] = widest / 320
    net = build_strictly(functools.partial(ssd.NETWORKS[name], count - 1, **arguments), state, label)
    net.classes = list(VOC) if net.num_classes == len(VOC) else None
    net.image_size = (300, 300)
    return net


def fine_tune(net: ssd.SSD, path_or_state_dict: str | Path | dict, strict: bool = False) -> str:
    """Load the tensors of a complete SSD, published or ours, that fit (see `load_matching`); a line for the console.

    strict: WeightsError unless all of them fit.
    """
    _, state, label = open_weights(path_or_state_dict)
    try:
        loaded, total, skipped = load_matching(net, state)
    except WeightsError as error:
        raise WeightsError(f"{label}: {error}") from error
    line = f"{loaded} of {total} tensors loaded"
    if not skipped:
        return line
    other_count = class_count(state) not in (None, net.num_classes + 1)
    counts = f"checkpoint {class_count(state)} classes, data {net.num_classes + 1} (with background)"
    if strict:
        remedy = f"{counts}; give the data that it was trained on" if other_count else f"the first is {skipped[0]}"
        raise WeightsError(f"{label}: only {line}, an evaluation needs all: {remedy}")
    if other_count:
        return f"{counts}: head re-initialized, {line}"
    return f"{line}, the rest keeps random weights: {', '.join(skipped[:3])}{' ...' if len(skipped) > 3 else ''}"


def backbone_name(net: ssd.SSD) -> str:
    return family_of(net.base_net.state_dict(), backbones.FAMILIES, net.name)


def load_backbone(net: ssd.SSD, path_or_state_dict: str | Path | dict) -> str:
    """Load a file into `net.base_net`; returns a line for the console.

    The file is qfgaohao's base net, torchvision's ImageNet state dict, a complete SSD, or a checkpoint of ours. The
    first layer is adapted to the normalization that `net` expects. VGG's fc6 and fc7 are subsampled from the classifier
    if the file has one, else they keep random weights. Raises WeightsError on another family.
    """
    saved, state, label = open_weights(path_or_state_dict)
    is_imagenet = any(name.startswith("features.") for name in state)
    state, own, family = backbones.bare_names(state), net.base_net.state_dict(), backbone_name(net)
    backbones.check_family(state, family, label, net.name)
    state = with_counters(state, own)
    random = {name for name in own if family == "vgg16" and name.startswith(("31.", "33.")) and name not in state}
    needed = {name: value for name, value in own.items() if name not in random}
    backbones.check_shapes(state, needed, label, net.name, WIDTH_HINT if family == "mobilenet_v2" else "")
    state = {name: state[name] for name in needed}
    if is_imagenet or "image_mean" in saved:
        mean, std = saved.get("image_mean", IMAGENET_MEAN), saved.get("image_std", IMAGENET_STD)
        adapt_input(state, mean, std, net.image_mean, net.image_std)
    net.base_net.load_state_dict(state, strict=False)
    line = f"{len(state)} of {len(own)} tensors of the backbone loaded"
    return f"{line}; fc6 and fc7 keep random weights" if random else line


def published(net: ssd.SSD) -> Path:
    """The VOC weights: in models/, where dusty-nv's programs keep them, or else downloaded. Raises WeightsError."""
    if net.name not in URLS:
        raise WeightsError(f"there are no published weights of {net.name}")
    local = Path("models") / URLS[net.name].rsplit("/", 1)[1]
    return local if local.is_file() else fetch(URLS[net.name])


def adapt_input(state: State, old_mean: Sequence, old_std: Sequence, new_mean: Sequence, new_std: Sequence) -> None:
    """Change the first layer in `state`, in place, so that images normalized in the new way give the same features.

    x_old = x_new * new_std / old_std + (new_mean - old_mean) / old_std; the constant goes into the bias or the mean of
    the batch norm. Exact except at the padded border. It matters most for VGG: its pixels of +-128 in a network trained
    on +-2 would make all activations 60 times too large.
    """
    first, norm = ("0.0", "0.1") if "0.0.weight" in state else ("0", None)
    weight = state[f"{first}.weight"]
    old_mean, old_std, new_mean, new_std = (weight.new_tensor(v) for v in (old_mean, old_std, new_mean, new_std))
    constant = (weight.sum((2, 3)) * (new_mean - old_mean) / old_std).sum(1)  # [C]
    state[f"{first}.weight"] = weight * (new_std / old_std)[:, None, None]
    if norm:
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] - constant
    else:
        state[f"{first}.bias"] = state[f"{first}.bias"] + constant
