"""What the fields of our checkpoints are: kinds and ranges, in one table. A file can contain anything.

Fields that are not in the table, and those that a checkpoint does not have, are not checked here.
"""

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.errors import WeightsError

MAX_SIDE = 8192  # pixels of an input
MAX_CLASSES = 100_000
PLAIN = (str, int, float, bool, type(None))


class Kind(NamedTuple):
    text: str
    fits: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def real(low: float, high: float) -> Kind:
    kind = "a number" if low == -high == -math.inf else f"a number from {low:g} to {high:g}"
    return Kind(kind, lambda value: type(value) in (int, float) and low <= value <= high)  # nan is not


def listed(kind: Kind, text: str, count: int | None = None) -> Kind:
    def fits(value):
        return isinstance(value, (list, tuple)) and count in (None, len(value)) and all(map(kind.fits, value))

    return Kind(text, fits)


def either(*kinds: Kind) -> Kind:
    return Kind(" or ".join(kind.text for kind in kinds), lambda value: any(kind.fits(value) for kind in kinds))


def dictionary(text: str, of: Callable[[Any], bool] = lambda _: True, keys: tuple = (str,)) -> Kind:
    def fits(value):
        return isinstance(value, dict) and all(type(key) in keys and of(item) for key, item in value.items())

    return Kind(text, fits)


def _is_plain(value):
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, PLAIN)


def _is_line(value):
    short = isinstance(value, str) and len(value) <= 1000 and len(value.splitlines()) <= 1
    return short and not re.search("[\ud800-\udfff]", value)  # halves of characters, which cannot be printed


def _is_argument(value):
    return _is_plain(value) and (not isinstance(value, str) or _is_line(value))


NONE = Kind("None", lambda value: value is None)
TEXT = Kind("one line of text", _is_line)
SWITCH = Kind("True or False", lambda value: isinstance(value, bool))
COUNT, NUMBER, SIDE = whole(0, 10**15), real(-math.inf, math.inf), whole(1, MAX_SIDE)
TENSORS = dictionary("a dict of tensors by name", torch.is_tensor)
COLOR = real(-1000, 1000)
# field -> what it is; a dot leads into a dict
FIELDS = {
    "format_version": whole(1, 1000),
    "checksum": TEXT,
    "step": COUNT,
    "epoch": COUNT,
    "best": either(NUMBER, NONE),
    "best_step": COUNT,
    "stale": COUNT,
    "validation_due": SWITCH,
    "log": dictionary("a dict"),
    "monitor": TEXT,
    "architecture": TEXT,
    "num_classes": whole(1, MAX_CLASSES),
    "classes": listed(TEXT, "a list of names"),
    "image_mean": listed(COLOR, "three numbers", 3),
    "image_std": listed(real(1e-6, 1000), "three numbers above 0", 3),
    "image_size": either(SIDE, listed(SIDE, "two of them", 2)),
    "min_side": SIDE,
    "max_side": whole(1, 100_000),
    "arguments": dictionary("a dict of arguments by name", _is_argument),
    "arguments.proposals": whole(1, 1_000_000),
    "arguments.radar": SWITCH,
    "arguments.max_distance": real(0, 10_000),
    "model": TENSORS,
    "ema": dictionary("a dict"),
    "ema.updates": COUNT,
    "ema.model": TENSORS,
    "scaler": dictionary("a dict of numbers", NUMBER.fits),
    "scaler.scale": real(1e-300, 1e300),
    "plateau": dictionary("a dict of numbers", NUMBER.fits),
    "plateau.factor": real(0, 1),
    "plateau.stale": COUNT,
    "plateau.steps": COUNT,
    "optimizer": dictionary("a dict"),
    "optimizer.class": TEXT,
    "optimizer.state": dictionary("a dict by parameter", keys=(int,)),
    "optimizer.param_groups": listed(dictionary("a dict"), "a list of dicts"),
    "flags": dictionary("a dict of plain values by name", _is_plain),
    "flags.score_threshold": real(0, 1),
    "flags.nms_iou": real(0, 1),
    "flags.detections_per_image": whole(1, 10**9),
    "flags.radar_sweeps": whole(0, 1000),
    "flags.pc_z_offset": real(-1000, 1000),
    "flags.pillar_dims": listed(real(0, 1e6), "three numbers of at least 0", 3),
}
WITH_ARCHITECTURE = ("format_version", "arguments", "num_classes", "classes", "model")  # what a network is built from


def is_ours(contents: Mapping[Any, Any]) -> bool:
    """Whether a dict read from a file is a checkpoint of this program."""
    return "format_version" in contents or "architecture" in contents


def check(path: str | Path, contents: Mapping[Any, Any]) -> None:
    """WeightsError if a field of the checkpoint is not what FIELDS has, or classes and their number differ.

    contents: the dict in the file at `path`. One that is not ours is not checked.
    """
    if not is_ours(contents):
        return
    for field, kind in FIELDS.items():
        value = contents
        for name in field.split("."):
            value = value.get(name, contents) if isinstance(value, dict) else contents  # contents: not in the file
        if value is not contents and not kind.fits(value):
            raise WeightsError(f"{path}: {field} is {_shown(value)}, must be {kind.text}; use another copy")
    if "architecture" in contents:
        missing = [field for field in WITH_ARCHITECTURE if field not in contents]
        if missing:
            raise WeightsError(f"{path}: not a complete checkpoint: {', '.join(missing)} missing; use another copy")
        names, count = len(contents["classes"]), contents["num_classes"]
        if names != count:
            raise WeightsError(f"{path}: classes has {names} names, num_classes is {count}; use another copy")
    if contents.get("ema") and "model" not in contents["ema"]:
        raise WeightsError(f"{path}: not a complete checkpoint: ema.model missing; use another copy")


def _shown(value):
    """A value in a message, short and in one line; a dict, list or tensor by its type."""
    return reprlib.repr(value) if isinstance(value, PLAIN) else f"a {type(value).__name__}"
