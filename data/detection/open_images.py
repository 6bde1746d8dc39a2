"""Open Images folders, in two layouts.

    jetson-inference's                              the official one
    ROOT/sub-{split}-annotations-bbox.csv           ROOT/{split}-annotations-bbox.csv, or with oidv6- before it
      with a ClassName column                       ROOT/class-descriptions-boxable.csv   LabelName,name
    ROOT/{split}/ID.jpg                             ROOT/{split}/ID.jpg

split is train, validation or test. Corners are fractions of the image; IsGroupOf marks a group, which is ignored. An
image in the folder without a row is background. ROOT/labels.txt, one class per line, is optional.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from data.classes import choose_classes
from data.detection.dataset import Annotations
from data.files import is_true, missing_images, read_lines
from data.images import SUFFIXES
from utils.errors import DataError

SPLITS = {"train": ("train",), "val": ("test", "validation", "val")}
FILES = ("sub-{}-annotations-bbox.csv", "{}-annotations-bbox.csv", "oidv6-{}-annotations-bbox.csv")
CORNERS = ("XMin", "YMin", "XMax", "YMax")
MAX_FRACTION = 2  # a larger corner is in pixels; a smaller one may be a fraction somewhat outside of the image


def read(roots: Sequence[str | Path], split: str, name: str = "") -> Annotations:
    """The images of `split` ("train" or "val"), or of the split `name`, in all `roots`, joined, with relative boxes.

    Raises DataError where a folder is not an Open Images data set.
    """
    annotations = Annotations(relative=True)
    for root in map(Path, roots):
        file, folder = _split_file(root, split, name)
        _read_csv(file, folder, _descriptions(root), annotations)
    annotations.classes, annotations.class_errors = choose_classes(roots, annotations.names)
    return annotations


def _split_file(root, split, name):
    names = (name,) if name else SPLITS[split]
    for folder in names:
        for pattern in FILES:
            if (root / pattern.format(folder)).is_file():
                return root / pattern.format(folder), root / folder
    expected = ", ".join(pattern.format(folder) for folder in names for pattern in FILES[:2])
    available = ", ".join(sorted(file.name for file in root.glob("*.csv"))) or "none"
    raise DataError(
        root, "", f"no annotation file for {name or split}; expected one of {expected}; available: {available}"
    )


def _descriptions(root):
    """LabelName -> name, from the official class-descriptions-boxable.csv; empty without it."""
    for file in sorted(root.glob("*class-descriptions-boxable.csv")):
        rows = csv.reader(read_lines(file))
        try:
            return {row[0]: row[1] for row in rows if len(row) >= 2}
        except csv.Error as error:
            raise DataError(file, f"line {rows.line_num}", f"not valid csv: {error}; fix the file") from None
    return {}


def _read_csv(file, folder, descriptions, annotations):
    if not folder.is_dir():
        raise DataError(folder, "", f"no such folder; the images of {file.name} belong there")
    images = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
    positions, missing, in_pixels = {}, {}, []  # path -> position; ImageID -> line; errors
    rows, errors = csv.DictReader(read_lines(file)), annotations.errors
    try:
        _check_header(file, rows.fieldnames or [])
        row = None
        for row in rows:
            image_id, place = row["ImageID"] or "", f"line {rows.line_num}"
            path = images.get(image_id) or images.get(image_id.removesuffix(Path(image_id).suffix))
            try:
                name, box = _read_row(row, descriptions)
            except ValueError as error:
                errors.append(DataError(file, place, str(error), kind="box"))
                name = None
            if name and max(box) > MAX_FRACTION:
                in_pixels.append((place, max(box)))
            elif path is None and image_id:
                missing.setdefault(image_id, place)
            elif name:
                if path not in positions:
                    positions[path] = annotations.add_image(path)
                annotations.add_object(positions[path], box, name, is_true(row.get("IsGroupOf")))
    except csv.Error as error:
        raise DataError(file, f"line {rows.line_num}", f"not valid csv: {error}; fix the file") from None
    if row is None:
        errors.append(DataError(file, "", "has a header but no rows; add a row for each box"))
    if in_pixels:  # one error for all lines: a tool wrote them so
        place, corner = in_pixels[0]
        lines = f"{len(in_pixels)} such lines" if len(in_pixels) > 1 else "one such line"
        reason = f"corner {corner:g} is in pixels ({lines}); divide by the width and height of the image"
        errors.append(DataError(file, place, reason))
    if missing:
        errors.append(missing_images(file, next(iter(missing.values())), folder, list(missing)))
    for path in sorted(set(images.values()) - set(positions)):
        annotations.add_image(path)


def _check_header(file, names):
    missing = [name for name in ("ImageID", *CORNERS) if name not in names]
    if not {"ClassName", "LabelName"} & set(names):
        missing.append("ClassName or LabelName")
    if missing:
        reason = f"no column {', '.join(missing)}; add or rename it; columns: {', '.join(names) or 'the file is empty'}"
        raise DataError(file, "line 1", reason)


def _read_row(row, descriptions):
    """(class name, corners), the corners clipped to 0..1 unless they are in pixels. Raises ValueError with the reason
    where the row is invalid."""
    name = (row.get("ClassName") or descriptions.get(row.get("LabelName")) or row.get("LabelName") or "").strip()
    if not name or not row["ImageID"]:
        raise ValueError("has no class name" if row["ImageID"] else "has no ImageID")
    try:
        box = [float(row[corner]) for corner in CORNERS]
    except (TypeError, ValueError):
        box = [math.nan]
    if not all(map(math.isfinite, box)):
        raise ValueError(f"{name}: a corner is not a number: {', '.join(str(row[corner]) for corner in CORNERS)}")
    if max(box) > MAX_FRACTION:
        return name, box
    left, top, right, bottom = (min(1.0, max(0.0, corner)) for corner in box)
    if right <= left or bottom <= top:
        xmin, ymin, xmax, ymax = box
        raise ValueError(f"{name} has no area: x {xmin:g} to {xmax:g}, y {ymin:g} to {ymax:g}")
    return name, [left, top, right, bottom]
