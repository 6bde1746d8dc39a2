"""csv files with a box a line, and no header.

    path,x1,y1,x2,y2,class      corners in pixels from 0, fractions allowed; x2 > x1 and y2 > y1
    path,,,,,                   a picture without boxes

A path is relative to the csv's folder, else to the working folder. Classes have a file of their own, `name,id` with the
ids from 0; without it they are the names found, sorted. As folders: ROOT/train.csv, ROOT/val.csv (or test.csv) and
ROOT/classes.csv.
"""

import csv
import math
import os
from pathlib import Path

from tqdm import tqdm

from data.boxes import Records, clip, finish
from data.classes import read_numbered
from data.errors import DataError
from data.files import lines_of
from data.images import image_size

NAMES = {"train": ("train.csv",), "val": ("val.csv", "test.csv")}
COLUMNS = ("path", "x1", "y1", "x2", "y2", "class")
ROW = ",".join(COLUMNS)


def load(roots, split, classes=None, files=("", "", ""), faults=None, transform=None, seed=0):
    """The pictures of `split` ("train" or "val") as a BoxDataset. Reads the header of every picture for its size.

    roots     folders as above, joined
    classes   names in label order; None takes those of the classes files in their order, then the names found, sorted
    files     (train, val, classes): csv files that stand for those of the folders; "" where there is none
    faults    a list that receives a DataError for everything wrong in the files; None raises the first

    Raises DataError where a file is missing, begins with a header or is no csv.
    """
    records, found, listed = Records(), [], []
    for file, class_file in _sources(roots, split, files):
        names = read_numbered(class_file) if class_file else None
        listed += names or []
        _read_rows(file, class_file, names, records, found)
    if classes is None:
        classes = list(dict.fromkeys([*listed, *sorted(records.names)]))
    return finish(records, classes, found, faults, transform=transform, seed=seed)


def _sources(roots, split, files):
    """[(csv file, classes file or "")] of `split`."""
    train, val, classes = files
    file = train if split == "train" else val
    if file:
        return [(Path(file), classes)]
    if train:
        raise DataError(train, "", "a csv to train on and none to validate on; name it by --csv-val")
    sources = []
    for root in map(Path, roots):
        have = sorted(other.name for other in root.glob("*.csv"))
        named = [name for name in NAMES[split] if name in have]
        if not named:
            expected, found = " or ".join(NAMES[split]), ", ".join(have) or "no csv"
            raise DataError(root, "", f"no {expected}; found: {found}; name the file by --csv-{split}")
        sources.append((root / named[0], classes or (root / "classes.csv" if "classes.csv" in have else "")))
    return sources


def _read_rows(file, class_file, names, records, faults):
    """Every row of `file` into `records`; `names` are the classes of `class_file`, None takes any."""
    positions, known = {}, None if names is None else set(names)  # path as written -> position, None if left out
    rows = csv.reader(lines_of(file))
    try:
        for row in tqdm(rows, desc=f"reading {file.name}", unit=" rows", disable=None):
            fields, place = [field.strip() for field in row], f"line {rows.line_num}"
            if not fields:
                continue
            if not positions and _is_header(fields):
                raise DataError(file, place, f"{','.join(fields)} is a header: rows are {ROW}, take this line out")
            if len(fields) != len(COLUMNS) or not fields[0]:
                what = f"{len(fields)} columns" if fields[0] else "no path"
                faults.append(DataError(file, place, f"{what}: write {ROW}", kind="box"))
                continue
            if fields[0] not in positions:
                positions[fields[0]] = _add_picture(file, place, fields[0], records, faults)
            reason = _read_row(fields, positions[fields[0]], class_file, known, records)
            if reason:
                faults.append(DataError(file, place, reason, kind="box"))
    except csv.Error as error:
        raise DataError(file, f"line {rows.line_num}", f"not valid csv: {error}; mend the file") from None
    if not positions:
        faults.append(DataError(file, "", f"holds no row; write {ROW} for each box"))


def _is_header(fields):
    return any(fields[1:-1] or fields[1:]) and all(_number(field) is None for field in fields)


def _number(text):
    """The finite number in `text`, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _add_picture(file, place, path, records, faults):
    """The position of the picture in `records`; None, and a fault, for one that is not there or no picture."""
    choices = dict.fromkeys((os.path.join(file.parent, path), path))
    picture = next(filter(os.path.isfile, choices), None)
    if picture is None:
        reason = f"no picture {path} in {file.parent} or the working folder"
        faults.append(DataError(file, place, reason, kind="image"))
        return None
    try:
        return records.add_image(picture, image_size(picture))
    except DataError as error:
        faults.append(error)
        return None


def _read_row(fields, image, class_file, known, records):
    """Add the row's box, if it has one, to picture `image` (None: left out); returns all that is wrong, or ""."""
    _, *corners, name = fields
    if not any(fields[1:]):
        return ""
    x1, y1, x2, y2 = values = [_number(corner) for corner in corners]
    reasons = [f"{axis} {text!r} is no number" for axis, text, v in zip(COLUMNS[1:], corners, values) if v is None]
    for axis, low, high in (("x", x1, x2), ("y", y1, y2)):
        if low is not None and high is not None and high <= low:
            reasons.append(f"{axis}2 {high:g} <= {axis}1 {low:g}")
    if not name:
        reasons.append("no class")
    elif known is not None and name not in known:
        reasons.append(f"class {name!r} is not in {class_file}")
    if not reasons and image is not None:
        size = records.size(image)
        inside = clip(values, size)
        if inside is None:
            return f"{name} {x1:g},{y1:g} to {x2:g},{y2:g} outside {size[1]} x {size[0]}"
        records.add_object(image, inside, name)
    return "; ".join(reasons)
