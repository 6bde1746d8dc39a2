"""Open Images folders, in two layouts.

    jetson-inference's                              the official one
    ROOT/sub-{split}-annotations-bbox.csv           ROOT/{split}-annotations-bbox.csv, or with oidv6- before it
      with a ClassName column                       ROOT/class-descriptions-boxable.csv   LabelName,name
    ROOT/{split}/ID.jpg                             ROOT/{split}/ID.jpg

split is train, validation or test. Corners are fractions of the picture; IsGroupOf marks a group, which is ignored.
A picture in the folder without a row is background. ROOT/labels.txt, one class a line, is optional.
"""

import csv
import math
from pathlib import Path

from data.boxes import Records, finish
from data.classes import choose_classes
from data.errors import DataError
from data.files import is_true, lines_of, missing_pictures
from data.images import SUFFIXES

SPLITS = {"train": ("train",), "val": ("test", "validation", "val")}
FILES = ("sub-{}-annotations-bbox.csv", "{}-annotations-bbox.csv", "oidv6-{}-annotations-bbox.csv")
CORNERS = ("XMin", "YMin", "XMax", "YMax")


def load(roots, split, classes=None, faults=None, transform=None, seed=0):
    """The pictures of `split` ("train" or "val") in all `roots`, joined, as a BoxDataset with relative boxes.

    classes   names in label order; None takes labels.txt, else the names found, sorted
    faults    a list that receives a DataError for everything wrong in the files; None raises the first

    Raises DataError where a folder is no Open Images set.
    """
    records, found = Records(), []
    for root in map(Path, roots):
        file, folder = _split_file(root, split)
        _read_csv(file, folder, _descriptions(root), records, found)
    if classes is None:
        classes = choose_classes(roots, records.names, found)
    return finish(records, classes, found, faults, relative=True, transform=transform, seed=seed)


def _split_file(root, split):
    for name in SPLITS[split]:
        for pattern in FILES:
            if (root / pattern.format(name)).is_file():
                return root / pattern.format(name), root / name
    expected = ", ".join(pattern.format(name) for name in SPLITS[split] for pattern in FILES[:2])
    have = ", ".join(sorted(file.name for file in root.glob("*.csv"))) or "no csv"
    raise DataError(root, "", f"no annotation file for {split}: expected one of {expected}; found: {have}")


def _descriptions(root):
    """LabelName -> name, from the official class-descriptions-boxable.csv; empty without it."""
    for file in sorted(root.glob("*class-descriptions-boxable.csv")):
        return {row[0]: row[1] for row in csv.reader(lines_of(file)) if len(row) >= 2}
    return {}


def _read_csv(file, folder, descriptions, records, faults):
    if not folder.is_dir():
        raise DataError(folder, "", f"no such folder; the pictures of {file.name} belong there")
    pictures = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
    positions, missing, in_pixels = {}, {}, []  # picture -> position; id -> line; (line, corner)
    rows = csv.DictReader(lines_of(file))
    try:
        _check_header(file, rows.fieldnames or [])
        row = None
        for row in rows:
            image_id = row["ImageID"]
            path = pictures.get(image_id) or pictures.get(image_id.removesuffix(Path(image_id).suffix))
            try:
                name, box = _read_row(row, descriptions)
            except ValueError as error:
                faults.append(DataError(file, f"line {rows.line_num}", str(error), kind="box"))
                name = None
            if name and max(box) > 2:
                in_pixels.append((rows.line_num, max(box)))
            elif path is None:
                missing.setdefault(image_id, rows.line_num)
            elif name:
                if path not in positions:
                    positions[path] = records.add_image(path)
                records.add_object(positions[path], box, name, is_true(row.get("IsGroupOf")))
    except csv.Error as error:
        raise DataError(file, f"line {rows.line_num}", f"not valid csv: {error}; mend the file") from None
    if row is None:
        faults.append(DataError(file, "", "a header and no row, nothing to train or score on; add a row for each box"))
    _report_pixels(file, in_pixels, faults)
    if missing:
        faults.append(missing_pictures(file, f"line {next(iter(missing.values()))}", folder, list(missing)))
    for path in sorted(set(pictures.values()) - set(positions)):
        records.add_image(path)


def _check_header(file, names):
    wanted = ("ImageID", *CORNERS)
    lack = [name for name in wanted if name not in names]
    if not {"ClassName", "LabelName"} & set(names):
        lack.append("ClassName or LabelName")
    if lack:
        raise DataError(
            file,
            "line 1",
            f"no column {', '.join(lack)}: name the columns so; found: {', '.join(names) or 'an empty file'}",
        )


def _read_row(row, descriptions):
    """(name, corners as fractions, inside the picture unless they are in pixels). Raises ValueError for a bad row."""
    name = (row.get("ClassName") or descriptions.get(row.get("LabelName")) or row.get("LabelName") or "").strip()
    if not name:
        raise ValueError("has no class name")
    try:
        box = [float(row[corner]) for corner in CORNERS]
    except (TypeError, ValueError):
        box = [math.nan]
    if not all(map(math.isfinite, box)):
        raise ValueError(f"{name}: a corner is no number: {', '.join(str(row[corner]) for corner in CORNERS)}")
    if max(box) > 2:
        return name, box
    left, top, right, bottom = (min(1.0, max(0.0, corner)) for corner in box)
    if right <= left or bottom <= top:
        xmin, ymin, xmax, ymax = box
        raise ValueError(f"{name} has no area: x {xmin:g} to {xmax:g}, y {ymin:g} to {ymax:g}")
    return name, [left, top, right, bottom]


def _report_pixels(file, in_pixels, faults):
    """One fault for all lines whose corners are no fractions: they come from a tool, not from a slip."""
    if in_pixels:
        number, corner = in_pixels[0]
        count = f"{len(in_pixels)} such lines" if len(in_pixels) > 1 else "one such line"
        reason = f"corner {corner:g} is in pixels ({count}); divide by the picture's width and height"
        faults.append(DataError(file, f"line {number}", reason))
