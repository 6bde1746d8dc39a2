"""Class names, from files and checkpoints, and the weights of classes."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from data.files import read_lines, shortened
from utils.errors import DataError
from utils.labels import check_names, read_labels

MAX_DIGITS = 9  # of an id


def read_numbered(path: str | Path) -> list[str]:
    """The class names in a csv file with lines `name,id`, in the order of the ids, which are 0, 1, 2 ...; blank lines
    are skipped. Raises DataError."""
    ids, rows = {}, csv.reader(read_lines(path))
    try:
        for row in filter(None, rows):
            name, number = (field.strip() for field in row) if len(row) == 2 else ("", "")
            if not name or not number.isdecimal() or len(number) > MAX_DIGITS:
                reason = f"{','.join(row)!r} is not name,id with an integer id; the file has no header"
                raise DataError(path, f"line {rows.line_num}", reason)
            if name in ids:
                raise DataError(path, f"line {rows.line_num}", f"class {name!r} is repeated; keep one line for it")
            ids[name] = int(number)
    except csv.Error as error:
        raise DataError(path, f"line {rows.line_num}", f"not valid csv: {error}; fix the file") from None
    if not ids:
        raise DataError(path, "", "contains no class; write name,id for each")
    check_names(ids, path)
    if sorted(ids.values()) != list(range(len(ids))):
        used = ", ".join(map(str, sorted(ids.values())[:20]))
        raise DataError(path, "", f"ids are {used}; number the {len(ids)} classes from 0 to {len(ids) - 1}, each once")
    return sorted(ids, key=ids.get)


def choose_classes(roots: Sequence[str | Path], annotated: Iterable[str]) -> tuple[list[str], list[DataError]]:
    """(classes, errors): the names in the roots' labels.txt, joined in order, and an error for each name in the
    annotations that is in none of these files. Without any such file the classes are the annotated names, sorted."""
    files = [Path(root) / "labels.txt" for root in roots if (Path(root) / "labels.txt").is_file()]
    if not files:
        return sorted(annotated), []
    names = list(dict.fromkeys(name for file in files for name in read_labels(file)))
    missing = sorted(set(annotated) - set(names))
    return names, [DataError(files[0], "", f"class {name!r} of the annotations is missing; add it") for name in missing]


def agree_on_classes(checkpoint: Sequence[str], data: Sequence[str], remap_by_name: bool) -> Sequence[str]:
    """Compare the class names of a checkpoint with those of the data; returns the checkpoint's, which apply.

    Objects are mapped by name, so another order does no harm in training, but the data's labels.txt would not fit the
    weights: another order is refused unless `remap_by_name`. Raises DataError.
    """
    if list(checkpoint) != list(data) and set(checkpoint) == set(data) and not remap_by_name:
        names = f"checkpoint ({', '.join(checkpoint)}), data ({', '.join(data)})"
        reason = f"the same names in another order: {names}; use --remap-by-name to keep the checkpoint's order"
        raise DataError("classes", "", reason)
    if not set(checkpoint) & set(data):
        names = f"checkpoint ({shortened(checkpoint)}), data ({shortened(data)})"
        raise DataError("classes", "", f"no class in common: {names}; give the data that the checkpoint is for")
    return checkpoint


def class_weights(
    text: str, names: Sequence[str], device: torch.device | str = "cpu", background: bool = False
) -> torch.Tensor | None:
    """float32 [K], the weights in "NAME=W,NAME=W" and 1 for classes that are not named; None for "".

    background: [K+1], with a weight of 1 for background first

    Raises DataError for an unknown class and for a weight that is not a number of at least 0.
    """
    if not text:
        return None
    weights = [1.0] * len(names)
    for item in text.split(","):
        name, _, weight = (part.strip() for part in item.partition("="))
        try:
            weights[names.index(name)] = value = float(weight)
            if not 0 <= value < math.inf:
                raise ValueError
        except ValueError:
            raise DataError("--class-weights", item, f"write NAME=NUMBER; names: {', '.join(names)}") from None
    return torch.tensor([1.0] * background + weights, device=device)


def balanced_weights(image: np.ndarray, labels: np.ndarray, num_images: int, num_classes: int) -> np.ndarray:
    """float64 [num_images], sum 1: sampling probabilities of images with which classes come up about equally often.

    image, labels: int [M] of all objects. An image is weighted by its rarest class, with one over the number of images
    with that class; an image without objects has the median weight.
    """
    pairs = np.unique(np.stack([image, labels], axis=1), axis=0)
    images_with = np.bincount(pairs[:, 1], minlength=num_classes)
    weights = np.zeros(num_images)
    np.maximum.at(weights, pairs[:, 0], 1 / images_with[pairs[:, 1]])
    weights[weights == 0] = np.median(weights[weights > 0]) if len(pairs) else 1
    return weights / weights.sum()
