"""Open Images folders, in two layouts.

    jetson-inference's                              the official one
    ROOT/sub-{split}-annotations-bbox.csv           ROOT/{split}-annotations-bbox.csv, or with oidv6- before it
      with a ClassName column                       ROOT/class-descriptions-boxable.csv   LabelName,name
    ROOT/{split}/ID.jpg                             ROOT/{split}/ID.jpg

split is train, validation or test. Corners are fractions of the picture; IsGroupOf marks a group, which is ignored.
A picture in the folder without a row is background. ROOT/labels.txt, one class a line, is optional.
"""

import csv
from pathlib import Path

from data.boxes import BoxDataset, Records
from data.classes import choose_classes
from data.errors import DataError
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
    records, faults_here = Records(), []
    for root in map(Path, roots):
        file, folder = _split_file(root, split)
        _read_csv(file, folder, _descriptions(root), records, faults_here)
    if classes is None:
        classes = choose_classes(roots, records.names)
        for name in set(records.names) - set(classes):
            faults_here.append(
                DataError(Path(roots[0]) / "labels.txt", "", f"class {name!r} of the annotations is not in it; add it")
            )
    if faults is None and faults_here:
        raise faults_here[0]
    if faults is not None:
        faults.extend(faults_here)
    return BoxDataset(records, classes, relative=True, transform=transform, seed=seed)


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
        with file.open(newline="", encoding="utf-8-sig") as lines:
            return {row[0]: row[1] for row in csv.reader(lines) if len(row) >= 2}
    return {}


def _read_csv(file, folder, descriptions, records, faults):
    if not folder.is_dir():
        raise DataError(folder, "", f"no such folder; the pictures of {file.name} belong there")
    pictures = {path.stem: path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
    positions, missing, pixels = {}, {}, []
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        _check_header(file, rows.fieldnames or [])
        for number, row in enumerate(rows, start=2):
            try:
                box = [float(row[corner]) for corner in CORNERS]
            except (TypeError, ValueError):
                corners = ", ".join(str(row[corner]) for corner in CORNERS)
                faults.append(DataError(file, f"line {number}", f"a corner is no number: {corners}", kind="box"))
                continue
            if max(box) > 2:
                pixels.append((number, box))
                continue
            image_id = row["ImageID"]
            path = pictures.get(image_id) or pictures.get(image_id.removesuffix(Path(image_id).suffix))
            if path is None:
                missing.setdefault(image_id, number)
                continue
            if path not in positions:
                positions[path] = records.add_image(path)
            _add_box(file, number, row, box, descriptions, positions[path], records, faults)
    if pixels:
        number, box = pixels[0]
        faults.append(
            DataError(
                file,
                f"line {number}",
                f"corner {max(box):g} is in pixels ({len(pixels)} such lines); Open Images corners are fractions from 0 to 1: "
                "divide by the picture's width and height",
            )
        )
    if missing:
        image_id, number = next(iter(missing.items()))
        faults.append(
            DataError(
                file,
                f"line {number}",
                f"no picture {folder / image_id}.jpg ({len(missing)} of {len(missing) + len(positions)} pictures missing)",
                kind="image",
            )
        )
    if not positions and not pixels and not missing:
        faults.append(DataError(file, "", "a header and no row: there is nothing to train or score on"))
    for path in sorted(set(pictures.values()) - set(positions)):
        records.add_image(path)


def _check_header(file, names):
    wanted = ("ImageID", *CORNERS)
    lack = [name for name in wanted if name not in names]
    if not {"ClassName", "LabelName"} & set(names):
        lack.append("ClassName or LabelName")
    if lack:
        raise DataError(file, "line 1", f"no column {', '.join(lack)}; found: {', '.join(names) or 'an empty file'}")


def _add_box(file, number, row, box, descriptions, image, records, faults):
    name = row.get("ClassName") or descriptions.get(row["LabelName"], row["LabelName"])
    if not name:
        faults.append(DataError(file, f"line {number}", "has no class name", kind="box"))
        return
    left, top, right, bottom = (min(1.0, max(0.0, corner)) for corner in box)
    if not (right > left and bottom > top):
        xmin, ymin, xmax, ymax = box
        faults.append(
            DataError(
                file,
                f"line {number}",
                f"{name} has no area: x {xmin:g} to {xmax:g}, y {ymin:g} to {ymax:g}",
                kind="box",
            )
        )
        return
    records.add_object(image, (left, top, right, bottom), name, row.get("IsGroupOf") in ("1", "1.0", "True", "true"))
