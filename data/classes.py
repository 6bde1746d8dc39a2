"""Class names: where they come from and whether two lists agree."""

import csv
import math
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.files import lines_of


def read_labels(path):
    """Names in a labels.txt, one a line. Blank lines and a BACKGROUND are skipped; a name twice is a DataError."""
    names = [line.strip() for line in lines_of(path)]
    names = [name for name in names if name and name.upper() != "BACKGROUND"]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(path, "", f"named twice: {', '.join(twice)}; keep one line for each class")
    if not names:
        raise DataError(path, "", "holds no class name; write one name a line")
    return names


def read_numbered(path):
    """Names in a classes csv, `name,id` a line with the ids 0, 1, 2 ..., in the order of the ids. Blank lines are
    skipped. Raises DataError."""
    ids, rows = {}, csv.reader(lines_of(path))
    try:
        for row in filter(None, rows):
            name, number = (field.strip() for field in row) if len(row) == 2 else ("", "")
            if not name or not number.isdecimal():
                reason = f"{','.join(row)!r} is not name,id with a whole number as id; a header does not belong here"
                raise DataError(path, f"line {rows.line_num}", reason)
            if name in ids:
                raise DataError(path, f"line {rows.line_num}", f"class {name!r} comes twice; keep one line for it")
            ids[name] = int(number)
    except csv.Error as error:
        raise DataError(path, f"line {rows.line_num}", f"not valid csv: {error}; mend the file") from None
    if not ids:
        raise DataError(path, "", "holds no class; write name,id for each")
    if sorted(ids.values()) != list(range(len(ids))):
        told = ", ".join(map(str, sorted(ids.values())[:20]))
        raise DataError(path, "", f"ids are {told}: number the {len(ids)} classes from 0 to {len(ids) - 1}, each once")
    return sorted(ids, key=ids.get)


def choose_classes(roots, found, faults):
    """The class list of a training set: the names in the roots' labels.txt, joined in order; without any such file the
    names `found` in the annotations, sorted. A name found that no labels.txt has is a DataError appended to `faults`.
    """
    files = [Path(root) / "labels.txt" for root in roots if (Path(root) / "labels.txt").is_file()]
    if not files:
        return sorted(found)
    names = list(dict.fromkeys(name for file in files for name in read_labels(file)))
    for name in sorted(set(found) - set(names)):
        faults.append(DataError(files[0], "", f"lacks class {name!r}, which objects have; add it"))
    return names


def agree_on_classes(trained, found, remap_by_name):
    """Compare the class names in a checkpoint with those of the data; returns the checkpoint's list, which rules.

    Objects are mapped by name, so another order would do no harm here, but the labels.txt a person will ship beside the
    weights would be wrong: it is refused unless `remap_by_name`. Raises DataError.
    """
    if trained != found and set(trained) == set(found) and not remap_by_name:
        raise DataError(
            "classes",
            "",
            f"the checkpoint's classes are ({', '.join(trained)}), the data's ({', '.join(found)}): the same names in "
            "another order; use --remap-by-name to keep the checkpoint's",
        )
    if not set(trained) & set(found):
        raise DataError(
            "classes", "", f"no class in common: checkpoint ({', '.join(trained)}), data ({', '.join(found)})"
        )
    return trained


def class_weights(text, names):
    """[K+1] floats from "NAME=W,NAME=W", background first; background and classes not named weigh 1. None for "".

    Raises DataError for a name that is no class or a weight that is no number from 0.
    """
    if not text:
        return None
    weights = [1.0] * (len(names) + 1)
    for item in text.split(","):
        name, _, weight = (part.strip() for part in item.partition("="))
        try:
            weights[names.index(name) + 1] = value = float(weight)
            if not 0 <= value < math.inf:
                raise ValueError
        except ValueError:
            raise DataError("--class-weights", item, f"write NAME=NUMBER; names: {', '.join(names)}") from None
    return weights


def balanced(picture, labels, pictures, num_classes):
    """float64 [pictures] to draw pictures with, so that classes come up about equally often, sum 1.

    picture, labels: int [M] of all objects. The weight of a picture is that of its rarest class, one over the number of
    pictures with the class; a picture without objects weighs what the median picture does.
    """
    pairs = np.unique(np.stack([picture, labels], axis=1), axis=0)
    pictures_with = np.bincount(pairs[:, 1], minlength=num_classes)
    weights = np.zeros(pictures)
    np.maximum.at(weights, pairs[:, 0], 1 / pictures_with[pairs[:, 1]])
    weights[weights == 0] = np.median(weights[weights > 0]) if len(pairs) else 1
    return weights / weights.sum()
