"""Pascal VOC folders.

    ROOT/ImageSets/Main/{trainval,train,val,test}.txt   or CVAT's default.txt
    ROOT/Annotations/ID.xml
    ROOT/JPEGImages/ID.jpg                              .jpeg .png .bmp .tif ... in either case
    ROOT/labels.txt                                     optional: one class per line

Corners in the xml count from 1 and the last pixel belongs to the box: 1 to 300 is the whole side of an image of 300.
They may be fractions. `difficult` is optional, and so is `size`, which is then read from the image.
"""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from data.classes import choose_classes
from data.detection.dataset import Annotations, clip_box
from data.files import is_inside, is_true, open_regular, read_lines
from data.images import SUFFIXES, image_size
from utils.errors import DataError

SPLITS = {"train": ("trainval", "train", "default"), "val": ("test", "val", "default")}
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read(roots: Sequence[str | Path], split: str, offset: int = 1, name: str = "") -> Annotations:
    """The images of `split` ("train" or "val") in all `roots`, joined.

    name     read ImageSets/Main/{name}.txt instead
    offset   coordinate of the first pixel, subtracted from xmin and ymin: 1 in VOC's own files, 0 in those of tools
             that write the edges of boxes

    Raises DataError where a folder is not a VOC data set.
    """
    annotations = Annotations()
    for root in map(Path, roots):
        _read_root(root, _split_file(root, split, name), annotations, offset)
    annotations.classes, annotations.class_errors = choose_classes(roots, annotations.names)
    return annotations


def _split_file(root, split, name):
    folder, names = root / "ImageSets" / "Main", (name,) if name else SPLITS[split]
    for file in [folder / f"{name}.txt" for name in names]:
        if file.is_file():
            return file
    available = ", ".join(sorted(file.name for file in folder.glob("*.txt"))) or "none"
    expected = ", ".join(f"{name}.txt" for name in names)
    raise DataError(
        folder, "", f"no split file for {name or split}; expected one of {expected}; available: {available}"
    )


def _read_root(root, split_file, annotations, offset):
    images = _list_images(root / "JPEGImages")
    names = [(number, line.strip()) for number, line in enumerate(read_lines(split_file), start=1) if line.strip()]
    if not names:
        raise DataError(split_file, "", "lists no image; write one name per line")
    for number, name in names:
        if not is_inside(name):
            reason = f"{name}: is not in the folder of the data; name files of Annotations"
            annotations.errors.append(DataError(split_file, f"line {number}", reason, kind="image"))
            continue
        name = name[: -len(Path(name).suffix)] if name.lower().endswith((*SUFFIXES, ".xml")) else name
        xml_file, image = root / "Annotations" / f"{name}.xml", images.get(name) or images.get(Path(name).name)
        is_annotated = os.path.isfile(xml_file)  # False for a name that is too long, too
        if is_annotated and image is not None:
            _read_annotation(xml_file, image, annotations, offset)
        else:
            reason = f"no image in {root / 'JPEGImages'}" if is_annotated else f"no {xml_file}"
            annotations.errors.append(DataError(split_file, f"line {number}", f"{name}: {reason}", kind="image"))


def _list_images(folder):
    """Name without suffix -> path of every image in `folder`."""
    if not folder.is_dir():
        raise DataError(folder, "", "no such folder; a VOC data set has its images there")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    return {str(file.relative_to(folder).with_suffix("")): file for file in reversed(files)} | {
        file.name[: -len(file.suffix)]: file for file in reversed(files)
    }


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE: no annotation needs one, and its entities can stand for gigabytes of text."""

    def doctype(self, name, public, system):
        raise ValueError("has a DOCTYPE, which may define entities; remove it")


def _read_annotation(path, image, annotations, offset):
    try:
        with open_regular(path) as file:
            root = ElementTree.parse(file, ElementTree.XMLParser(target=_WithoutDoctype())).getroot()
        size = _size_of(root, image)
    except (ElementTree.ParseError, OSError, LookupError, ValueError, OverflowError) as error:
        annotations.errors.append(DataError(path, "", f"not a valid annotation: {error}; fix the file", kind="image"))
        return
    except DataError as error:
        annotations.errors.append(error)
        return
    position = annotations.add_image(image, size)
    for number, item in enumerate(root.findall("object"), start=1):
        try:
            name, box = _read_object(item, size, offset)
        except ValueError as error:
            annotations.errors.append(DataError(path, f"object {number}", str(error), kind="box"))
        else:
            annotations.add_object(position, box, name, is_true(item.findtext("difficult")))


def _size_of(root, image):
    """(h, w) in the xml, or of the image file if the xml has none. Raises ValueError for an impossible size."""
    height, width = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    if max(height, width) >= 2**31:
        raise ValueError(f"the image cannot be {width} x {height}")
    return (height, width) if height > 0 and width > 0 else image_size(image)


def _read_object(item, size, offset):
    """(class name, clipped [x1, y1, x2, y2] in pixels). Raises ValueError with the reason where it is invalid."""
    name = (item.findtext("name") or "").strip()
    corners = [item.findtext(f"bndbox/{corner}") for corner in CORNERS]
    if not name or None in corners:
        raise ValueError("has no name or no bndbox with four corners")
    try:
        xmin, ymin, xmax, ymax = (float(corner) for corner in corners)
    except ValueError:
        raise ValueError(f"{name}: a corner is not a number: {' '.join(corners)}") from None
    for axis, low, high in (("x", xmin, xmax), ("y", ymin, ymax)):
        if not high > low:  # also true of NaN
            raise ValueError(f"{name} has no area: {axis}max {high:g} <= {axis}min {low:g}")
    clipped = clip_box((xmin - offset, ymin - offset, xmax, ymax), size)
    if clipped is None:
        corners = f"{xmin:g},{ymin:g} to {xmax:g},{ymax:g}"
        raise ValueError(f"{name} {corners} is outside of the image ({size[1]} x {size[0]})")
    return name, clipped
