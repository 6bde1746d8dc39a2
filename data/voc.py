"""Pascal VOC folders.

    ROOT/ImageSets/Main/{trainval,train,val,test}.txt   or CVAT's default.txt
    ROOT/Annotations/ID.xml
    ROOT/JPEGImages/ID.jpg                              .jpeg .png .bmp .tif ... in either case
    ROOT/labels.txt                                     optional: one class a line

Corners in the xml count from 1 and the last pixel belongs to the box: 1 to 300 is a whole side of 300. They may be
fractions. `difficult` may lack, and so may `size`, which is then read from the picture.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from data.boxes import Records, clip, finish
from data.classes import choose_classes
from data.errors import DataError
from data.files import is_true, lines_of
from data.images import SUFFIXES, image_size

SPLITS = {"train": ("trainval", "train", "default"), "val": ("test", "val", "default")}
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def load(roots, split, classes=None, offset=1, faults=None, transform=None, seed=0):
    """The pictures of `split` ("train" or "val") in all `roots`, joined, as a BoxDataset.

    roots     folders as above
    classes   names in label order; None takes labels.txt, else the names found, sorted
    offset    number of the first pixel, taken from xmin and ymin: 1 in VOC's own files; 0 where a tool writes edges
    faults    a list that receives a DataError for everything wrong in the files; None raises the first

    Raises DataError where a folder is no VOC set.
    """
    records, found = Records(), []
    for root in map(Path, roots):
        _read_root(root, _split_file(root, split), records, offset, found)
    if classes is None:
        classes = choose_classes(roots, records.names, found)
    return finish(records, classes, found, faults, transform=transform, seed=seed)


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
    names = [(number, line.strip()) for number, line in enumerate(lines_of(split_file), start=1) if line.strip()]
    if not names:
        raise DataError(split_file, "", "lists no picture; write one name a line")
    for number, name in names:
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
        size = _size_of(root, picture)
    except (ElementTree.ParseError, OSError, LookupError, ValueError, OverflowError) as error:
        faults.append(DataError(path, "", f"not a valid annotation: {error}; mend the file", kind="image"))
        return
    except DataError as error:
        faults.append(error)
        return
    image = records.add_image(picture, size)
    for number, item in enumerate(root.findall("object"), start=1):
        try:
            name, box = _read_object(item, size, offset)
        except ValueError as error:
            faults.append(DataError(path, f"object {number}", str(error), kind="box"))
        else:
            records.add_object(image, box, name, is_true(item.findtext("difficult")))


def _size_of(root, picture):
    """(h, w) as annotated, or of the picture where the xml does not say."""
    height, width = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    return (height, width) if height > 0 and width > 0 else image_size(picture)


def _read_object(item, size, offset):
    """(name, [x1, y1, x2, y2] in pixels, inside the picture). Raises ValueError saying what is wrong."""
    name = (item.findtext("name") or "").strip()
    corners = [item.findtext(f"bndbox/{corner}") for corner in CORNERS]
    if not name or None in corners:
        raise ValueError("has no name or no bndbox with four corners")
    try:
        xmin, ymin, xmax, ymax = (float(corner) for corner in corners)
    except ValueError:
        raise ValueError(f"{name}: a corner is no number: {' '.join(corners)}") from None
    for axis, low, high in (("x", xmin, xmax), ("y", ymin, ymax)):
        if high == low:
            raise ValueError(f"{name} has no area: {axis}min={axis}max={low:g}")
        if not high > low:  # also true of NaN
            raise ValueError(f"{name}: {axis}max {high:g} < {axis}min {low:g}")
    inside = clip((xmin - offset, ymin - offset, xmax, ymax), size)
    if inside is None:
        raise ValueError(f"{name} {xmin:g},{ymin:g} to {xmax:g},{ymax:g} outside {size[1]} x {size[0]}")
    return name, inside
