"""Pascal VOC folders.

    ROOT/ImageSets/Main/{trainval,train,val,test}.txt   or CVAT's default.txt
    ROOT/Annotations/ID.xml
    ROOT/JPEGImages/ID.jpg                              .jpeg .png .bmp .tif ... in either case
    ROOT/labels.txt                                     optional: one class a line

Corners in the xml count from 1 (`offset`), may be fractions, and `difficult` may lack.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from data.boxes import BoxDataset, Records
from data.classes import choose_classes
from data.errors import DataError
from data.images import SUFFIXES

SPLITS = {"train": ("trainval", "train", "default"), "val": ("test", "val", "default")}
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def load(roots, split, classes=None, offset=1, faults=None, transform=None, seed=0):
    """The pictures of `split` ("train" or "val") in all `roots`, joined, as a BoxDataset.

    roots     folders as above
    classes   names in label order; None takes labels.txt, else the names found, sorted
    offset    what the first pixel is called, 1 in VOC's own files; some tools write 0
    faults    a list that receives a DataError for everything wrong in the files; None raises the first

    Raises DataError where a folder is no VOC set.
    """
    records, faults_here = Records(), []
    for root in map(Path, roots):
        _read_root(root, _split_file(root, split), records, offset, faults_here)
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
    return BoxDataset(records, classes, transform=transform, seed=seed)


def _split_file(root, split):
    folder = root / "ImageSets" / "Main"
    for name in SPLITS[split]:
        if (folder / f"{name}.txt").is_file():
            return folder / f"{name}.txt"
    have = ", ".join(sorted(file.name for file in folder.glob("*.txt"))) or "none"
    raise DataError(
        folder, "", f"no split file for {split}: expected one of {', '.join(SPLITS[split])} (.txt); found: {have}"
    )


def _read_root(root, split_file, records, offset, faults):
    pictures = _pictures(root / "JPEGImages")
    lines = split_file.read_text(encoding="utf-8-sig").splitlines()
    if not any(line.strip() for line in lines):
        raise DataError(split_file, "", "lists no picture")
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name:
            continue
        name = name[: -len(Path(name).suffix)] if name.lower().endswith((*SUFFIXES, ".xml")) else name
        annotation = root / "Annotations" / f"{name}.xml"
        picture = pictures.get(name) or pictures.get(Path(name).name)
        place = f"line {number}"
        if not annotation.is_file():
            faults.append(DataError(split_file, place, f"{name}: no {annotation}", kind="image"))
        elif picture is None:
            faults.append(DataError(split_file, place, f"{name}: no picture in {root / 'JPEGImages'}", kind="image"))
        else:
            _read_annotation(annotation, picture, records, offset, faults)


def _pictures(folder):
    """Name without suffix -> path, for every picture in `folder`."""
    if not folder.is_dir():
        raise DataError(folder, "", "no such folder; a VOC set keeps its pictures there")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    return {str(file.relative_to(folder).with_suffix("")): file for file in reversed(files)} | {
        file.name[: -len(file.suffix)]: file for file in reversed(files)
    }


def _read_annotation(path, picture, records, offset, faults):
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        faults.append(DataError(path, "", f"not valid xml: {error}", kind="image"))
        return
    height, width = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    image = records.add_image(picture, (height, width))
    for number, item in enumerate(root.findall("object"), start=1):
        place = f"object {number}"
        name = (item.findtext("name") or "").strip()
        corners = [item.findtext(f"bndbox/{corner}") for corner in CORNERS]
        if not name or None in corners:
            faults.append(DataError(path, place, "has no name or no bndbox with four corners", kind="box"))
            continue
        try:
            xmin, ymin, xmax, ymax = (float(corner) for corner in corners)
        except ValueError:
            faults.append(DataError(path, place, f"a corner is no number: {' '.join(corners)}", kind="box"))
            continue
        reason = _fault_of_box(name, xmin, ymin, xmax, ymax)
        if reason:
            faults.append(DataError(path, place, reason, kind="box"))
            continue
        box = [max(0.0, corner - offset) for corner in (xmin, ymin, xmax, ymax)]
        if width and height:
            box = [min(box[0], width), min(box[1], height), min(box[2], width), min(box[3], height)]
        if box[2] <= box[0] or box[3] <= box[1]:
            corners = f"{xmin:g},{ymin:g} to {xmax:g},{ymax:g}"
            faults.append(DataError(path, place, f"{name} {corners} outside {width} x {height}", kind="box"))
            continue
        records.add_object(image, box, name, (item.findtext("difficult") or "0").strip() not in ("0", "False", "false"))


def _fault_of_box(name, xmin, ymin, xmax, ymax):
    for low, high, axis in ((xmin, xmax, "x"), (ymin, ymax, "y")):
        if high == low:
            return f"{name} has no area: {axis}min={axis}max={low:g}"
        if not high > low:  # also true of NaN
            return f"{name}: {axis}max {high:g} < {axis}min {low:g}"
    return ""
