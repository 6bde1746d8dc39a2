"""Class names, input size and priors: bare weights do not store them, flags and a labels.txt beside the file do."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from models.centerfusion import CenterFusion
from utils.errors import WeightsError
from utils.labels import read_labels

PUBLISHED_SIZE = (300, 300)  # of SSD


def apply(
    net: nn.Module,
    path: str | Path,
    bare: bool,
    labels: str | Path = "",
    size: Sequence[int] | None = None,
    priors: str = "",
) -> None:
    """Set what the flags --labels, --size and --priors say about `net`, and print what is assumed without them.

    path   of its weights
    size   sets `image_size`. A network with `min_side` and `max_side` keeps them: to predict.py a size is these two, to
           export.py the input's height and width, which only have to be large enough
    bare   whether the file is a bare state dict: names and size are then those of published weights, if any

    Raises WeightsError where a flag does not fit the network or the file, or is needed; DataError for a labels file.
    """
    _set_priors(net, path, bare, size, priors)
    if bare and not size:
        sides = net.image_size or (net.min_side, net.max_side)
        print(f"{path}: bare weights do not store the input size: {_text(sides)}, as published (else give --size)")
    if size:
        _set_size(net, size)
    _set_names(net, path, bare, labels)


def _text(size):
    return f"{size[0]} x {size[1]}"


def _set_size(net, size):
    if isinstance(net, CenterFusion) and any(side % 32 for side in size):
        raise WeightsError(f"--size {size[0]} {size[1]}: {net.name} needs multiples of 32")
    if net.image_size:
        net.image_size = tuple(size)


def _set_priors(net, path, bare, size, priors):
    """Of an mb1-ssd those of its file, else `priors`; at 300 x 300 pixels they are all the same."""
    if "priors" not in net.arguments:
        if priors:
            raise WeightsError(f"--priors {priors}: {net.name} has no other priors, only mb1-ssd has; leave it out")
        return
    own, wanted = net.arguments["priors"], tuple(size or net.image_size)
    if bare and wanted != PUBLISHED_SIZE and not priors:
        raise WeightsError(
            f"{path}: bare weights do not store their priors, so --size {wanted[0]} {wanted[1]} needs --priors: jetson "
            "for weights that jetson-inference trained at that size, scaled for weights trained at 300"
        )
    if bare:
        net.prior_layout = net.arguments["priors"] = priors or own
    elif priors and priors != own:
        raise WeightsError(f"{path}: was trained with --priors {own}; leave out --priors {priors}")
    elif own == "jetson" and (wanted == PUBLISHED_SIZE) != (net.image_size == PUBLISHED_SIZE):
        raise WeightsError(
            f"{path}: was trained at {_text(net.image_size)} with jetson-inference's priors, which are other ones at "
            f"{_text(wanted)}; give another --size"
        )


def _set_names(net, path, bare, labels):
    """Names in the file `labels`, else in a checkpoint, else in labels.txt beside the file, else of published weights.

    Where published weights have that number of classes, labels.txt with another number belongs to something else.
    """
    beside = Path(path).with_name("labels.txt")
    file = labels or (beside if bare and beside.is_file() else None)
    if not file:
        if not net.classes:
            print(f"{path}: contains no class names, and no labels.txt is beside it; give them with --labels FILE")
        elif bare:
            print(f"{path}: class names {', '.join(net.classes[:3])}, ... as published (else give --labels FILE)")
        return
    names = read_labels(file)
    counts = f"{file} has {len(names)} class names, {path} has {net.num_classes} classes"
    if len(names) == net.num_classes:
        net.classes = names
        print(f"{path}: class names from {file}")
    elif labels or not net.classes:
        raise WeightsError(f"{counts}; give a file that fits with --labels")
    else:
        print(f"{counts}: not used")
