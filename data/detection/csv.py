"""csv files with one box per line and no header.

    path,x1,y1,x2,y2,class      corners in pixels from 0, fractions allowed; x2 > x1 and y2 > y1
    path,,,,,                   an image without boxes

A path is relative to the csv file's folder, else to the working folder. Classes have a file of their own, `name,id`
with the ids from 0; without it they are the names in the rows, sorted. As folders: ROOT/train.csv, ROOT/val.csv (or
test.csv) and ROOT/classes.csv.
"""

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from data.classes import read_numbered
from data.detection.dataset import Annotations, clip_box
from data.files import read_lines
from data.images import image_size
from utils.errors import DataError

FILES = {"train": ("train.csv",), "val": ("val.csv", "test.csv")}
COLUMNS = ("path", "x1", "y1", "x2", "y2", "class")
ROW = ",".join(COLUMNS)


def read(roots: Sequence[str | Path], split: str, files: Sequence[str] = ("", "", "")) -> Annotations:
    """The images of `split` ("train" or "val"). Reads the header of every image file for its size.

    roots   folders, joined
    files   (train, val, classes): csv files to read instead of those in the folders, "" for none

    The classes are those of the classes files in their order, then other names in the rows, sorted. Raises DataError
    where a file is missing, begins with a header or is not valid csv.
    """
    annotations, classes = Annotations(), []
    for file, class_file in _split_files(roots, split, files):
        names = read_numbered(class_file) if class_file else []
        classes += names
        _read_rows(file, class_file, names, annotations)
    annotations.classes = list(dict.fromkeys([*classes, *sorted(annotations.names)]))
    return annotations


def find(name: str, roots: Sequence[str | Path]) -> tuple[str, str]:
    """(csv file, classes.csv beside it or "") of the csv file `name`, a path or relative to one of `roots`. Raises
    DataError."""
    choices = [Path(folder) / name for folder in ("", *roots)]
    for path in choices:
        if path.is_file():
            classes = path.with_name("classes.csv")
            return str(path), str(classes) if classes.is_file() else ""
    folders = {path.parent for path in choices if path.parent.is_dir()}
    available = ", ".join(str(path) for folder in sorted(folders) for path in sorted(folder.glob("*.csv"))) or "none"
    raise DataError(name, "", f"no such csv file; available: {available}")


def _split_files(roots, split, files):
    """[(csv file, classes file or "")] of `split`."""
    train, val, classes = files
    file = train if split == "train" else val
    if file:
        return [(Path(file), classes)]
    if train:
        raise DataError(train, "", "a training file without a validation file; give one by --csv-val")
    sources = []
    for root in map(Path, roots):
        available = sorted(other.name for other in root.glob("*.csv"))
        names = [name for name in FILES[split] if name in available]
        if not names:
            reason = f"no {' or '.join(FILES[split])}; available: {', '.join(available) or 'none'}"
            raise DataError(root, "", f"{reason}; give the file by --csv-{split}")
        sources.append((root / names[0], classes or (root / "classes.csv" if "classes.csv" in available else "")))
    return sources


def _read_rows(file, class_file, classes, annotations):
    """Read every row of `file`. Other names than `classes` are errors, unless there is no `class_file`."""
    positions, allowed = {}, set(classes) if class_file else None  # path as written -> position, None if left out
    rows, errors, is_empty = csv.reader(read_lines(file)), annotations.errors, True
    try:
        for row in tqdm(rows, desc=f"reading {file.name}", unit=" rows", disable=None):
            fields, place = [field.strip() for field in row], f"line {rows.line_num}"
            if not fields:
                continue
            is_empty = False
            if not positions and _is_header(fields):
                raise DataError(file, place, f"{','.join(fields)} is a header; remove it: rows are {ROW}")
            if len(fields) != len(COLUMNS) or not fields[0]:
                problem = f"{len(fields)} columns" if fields[0] else "no path"
                errors.append(DataError(file, place, f"{problem}; write {ROW}", kind="box"))
                continue
            if fields[0] not in positions:
                positions[fields[0]] = _add_image(file, place, fields[0], annotations)
            reason = _read_row(fields, positions[fields[0]], class_file, allowed, annotations)
            if reason:
                errors.append(DataError(file, place, reason, kind="box"))
    except csv.Error as error:
        raise DataError(file, f"line {rows.line_num}", f"not valid csv: {error}; fix the file") from None
    if is_empty:
        errors.append(DataError(file, "", f"has no rows; write {ROW} for each box"))


def _is_header(fields):
    return any(fields[1:-1] or fields[1:]) and all(_number(field) is None for field in fields)


def _number(text):
    """The finite number in `text`, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _add_image(file, place, path, annotations):
    """The position of the image in `annotations`; None, and an error, if it is missing or not an image."""
    choices = dict.fromkeys((os.path.join(file.parent, path), path))
    image = next(filter(os.path.isfile, choices), None)
    if image is None:
        reason = f"no image {path} in {file.parent} or the working folder"
        annotations.errors.append(DataError(file, place, reason, kind="image"))
        return None
    try:
        return annotations.add_image(image, image_size(image))
    except DataError as error:
        annotations.errors.append(error)
        return None


def _read_row(fields, image, class_file, allowed, annotations):
    """Add the row's box, if any, to the image at position `image` (None: left out); returns all that is wrong with the
    row, or ""."""
    _, *corners, name = fields
    if not any(fields[1:]):
        return ""
    x1, y1, x2, y2 = values = [_number(corner) for corner in corners]
    reasons = [f"{axis} {text!r} is not a number" for axis, text, v in zip(COLUMNS[1:], corners, values) if v is None]
    for axis, low, high in (("x", x1, x2), ("y", y1, y2)):
        if low is not None and high is not None and high <= low:
            reasons.append(f"{axis}2 {high:g} <= {axis}1 {low:g}")
    if not name:
        reasons.append("no class")
    elif allowed is not None and name not in allowed:
        reasons.append(f"class {name!r} is not in {class_file}")
    if not reasons and image is not None:
        size = annotations.size(image)
        clipped = clip_box(values, size)
        if clipped is None:
            return f"{name} {x1:g},{y1:g} to {x2:g},{y2:g} is outside of the image ({size[1]} x {size[0]})"
        annotations.add_object(image, clipped, name)
    return "; ".join(reasons)
