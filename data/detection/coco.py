"""COCO folders.

    ROOT/annotations/instances_{set}.json
    ROOT/{set}/, ROOT/images/{set}/ or ROOT/images/    images; a file_name may include a sub-folder

The sets are train2017 and val2017 by default. bbox is x, y, width, height in pixels; a crowd (iscrowd 1) is ignored; an
image without annotations is background. Category ids may have gaps: labels are in the order of the ids. segmentation,
polygons or run lengths, is read only if masks are needed.
"""

import json
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data.detection.dataset import Annotations, clip_box
from data.files import missing_images, read_lines
from data.images import MAX_PIXELS
from ops import rle
from utils.errors import DataError

SETS = ("train2017", "val2017")
LISTS = ("images", "annotations", "categories")
USED_KEYS = {*LISTS, "id", "file_name", "height", "width", "image_id", "category_id", "bbox", "area", "iscrowd", "name"}
MASK_KEYS = {"segmentation", "counts", "size"}


def read(roots: Sequence[str | Path], split: str, sets: Sequence[str] = SETS, masks: bool = False) -> Annotations:
    """The images of `split` ("train" or "val") in all `roots`; classes are all categories, in the order of their ids.

    sets    names of the training and of the validation set
    masks   read masks too; an object without a valid segmentation is then an error

    The ids of the file are kept if there is one root: those of several files may clash. Raises DataError where a folder
    is not a COCO data set.
    """
    name = sets[("train", "val").index(split)]
    annotations = Annotations(masks, coco=len(roots) == 1)
    for root in map(Path, roots):
        file, folder = _annotation_file(root, name), _image_folder(root, name)
        content = _read_json(file, USED_KEYS | MASK_KEYS if masks else USED_KEYS)
        names = _read_categories(file, content["categories"])
        positions = _read_images(file, folder, content["images"], annotations)
        _read_objects(file, content["annotations"], names, positions, annotations)
        annotations.category_ids = {name: number for number, name in names.items()} | annotations.category_ids
    annotations.classes = list(annotations.category_ids)
    return annotations


def _annotation_file(root, name):
    file = root / "annotations" / f"instances_{name}.json"
    if not file.is_file():
        available = ", ".join(sorted(other.name for other in file.parent.glob("*.json"))) or "none"
        reason = f"no {file.name}; available: {available}; set the names by --coco-train, --coco-val or --split"
        raise DataError(file.parent, "", reason)
    return file


def _image_folder(root, name):
    choices = (root / name, root / "images" / name, root / "images")
    for folder in choices:
        if folder.is_dir():
            return folder
    raise DataError(root, "", f"no folder of images; expected one of {', '.join(map(str, choices))}")


def _read_json(file, keys):
    try:
        content = json.loads("".join(read_lines(file)), object_pairs_hook=partial(_used_values, keys))
    except (ValueError, RecursionError) as error:
        raise DataError(file, "", f"not valid JSON: {error}; download or write the file again") from None
    missing = [key for key in LISTS if not (isinstance(content, dict) and isinstance(content.get(key), list))]
    if missing:
        remedy = "give an instances file (those of COCO's test sets have no annotations)"
        raise DataError(file, "", f"has no list of {', no list of '.join(missing)}; {remedy}")
    for key in LISTS:
        if not all(isinstance(item, dict) for item in content[key]):
            raise DataError(file, key, "not a list of JSON objects; write the file again")
    return content


def _used_values(keys, pairs):
    """A JSON object with only the `keys` that are used. Segmentations are nine tenths of COCO, and gigabytes as Python
    numbers: they are left out, or packed as soon as they are read."""
    values = {key: value for key, value in pairs if key in keys}
    if "segmentation" in values:
        values["segmentation"] = rle.compact(values["segmentation"])
    return values


def _read_categories(file, categories):
    """Category id -> name, in the order of the ids. Raises DataError for an invalid or repeated one."""
    names = {}
    for item in categories:
        number, name = item.get("id"), item.get("name")
        if not _is_integer(number) or not isinstance(name, str) or not name.strip():
            raise DataError(file, "categories", f"{item} has no integer id or no name; give it both")
        if number in names or name.strip() in names.values():
            reason = f"id {number} or name {name.strip()!r} is repeated; keep one of each"
            raise DataError(file, "categories", reason)
        names[number] = name.strip()
    if not names:
        raise DataError(file, "categories", "is empty; list every class with its id and name")
    return dict(sorted(names.items()))


def _is_integer(value):
    return isinstance(value, int) and -(1 << 63) <= value < 1 << 63


def _is_area(value):
    return isinstance(value, int | float) and 0 <= value < 1 << 63


def _place(kind, number, position):
    """Where an error is: COCO's id, or the position in the list if there is none."""
    return f"{kind} {number}" if _is_integer(number) else f"{kind} number {position}"


def _read_images(file, folder, images, annotations):
    """COCO's id -> position in `annotations` of every image; None for one that is left out."""
    available, positions, missing = _list_files(folder), {}, {}
    for count, item in enumerate(images, start=1):
        number = item.get("id")
        try:
            name, size = _read_image(item, positions)
        except ValueError as error:
            annotations.errors.append(DataError(file, _place("image", number, count), str(error), kind="image"))
            if _is_integer(number):
                positions.setdefault(number)
            continue
        if name not in available:
            missing[name] = number
            positions[number] = None
            continue
        positions[number] = annotations.add_image(os.path.join(folder, name), size)
        if annotations.image_ids is not None:
            annotations.image_ids.append(number)
    if missing:
        place = f"image {next(iter(missing.values()))}"
        annotations.errors.append(missing_images(file, place, folder, list(missing)))
    return positions


def _list_files(folder):
    """Names of all files in and below `folder`, in one listing: checking 118,000 files one by one takes minutes on a
    network disk."""
    start = len(str(folder)) + 1
    listing = ((parent[start:], files) for parent, _, files in os.walk(folder, followlinks=True))
    return {f"{below}/{name}" if below else name for below, files in listing for name in files}


def _read_image(item, positions):
    """(file name, (h, w)). Raises ValueError with the reason where the item is invalid."""
    missing = [key for key in ("id", "file_name", "height", "width") if item.get(key) is None]
    if missing:
        raise ValueError(f"without {', '.join(missing)}")
    if not _is_integer(item["id"]):
        raise ValueError(f"id {item['id']!r} is not an integer")
    if item["id"] in positions:
        raise ValueError(f"id is repeated: {item['file_name']}")
    size = item["height"], item["width"]
    if not all(isinstance(side, int | float) and side >= 1 for side in size) or math.prod(size) > MAX_PIXELS:
        raise ValueError(f"width {size[1]!r} and height {size[0]!r} are not the size of an image")
    return os.path.normpath(str(item["file_name"])), tuple(map(int, size))


def _read_objects(file, items, names, positions, annotations):
    for count, item in enumerate(items, start=1):
        try:
            image, name, box, bbox = _read_object(item, names, positions, annotations)
            if image is None:
                continue
            mask = None if annotations.masks is None else _read_mask(item, name, annotations.size(image))
        except (ValueError, OverflowError) as error:
            place = _place("annotation", item.get("id"), count)
            annotations.errors.append(DataError(file, place, str(error), kind="box"))
        else:
            area = item["area"] if _is_area(item.get("area")) else bbox[2] * bbox[3]
            annotations.add_object(image, box, name, item.get("iscrowd") == 1, mask, bbox, area)


def _read_mask(item, name, size):
    try:
        return rle.from_coco(item.get("segmentation"), size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _read_object(item, names, positions, annotations):
    """(position of the image, class name, clipped [x1, y1, x2, y2], bbox as annotated). Raises ValueError with the
    reason where the item is invalid. The position is None, and the box not clipped, if the image is left out.
    """
    missing = [key for key in ("image_id", "category_id", "bbox") if key not in item]
    if missing:
        raise ValueError(f"without {', '.join(missing)}")
    number, category, box = item["image_id"], item["category_id"], item["bbox"]
    if not _is_integer(number) or number not in positions:
        raise ValueError(f"unknown image_id {number!r}")
    if not _is_integer(category) or category not in names:
        raise ValueError(f"unknown category_id {category!r}")
    name, image = names[category], positions[number]
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)):
        raise ValueError(f"{name}: bbox {box!r} is not four numbers")
    x, y, width, height = box = [float(side) for side in box]
    if not all(map(math.isfinite, box)) or width <= 0 or height <= 0:
        raise ValueError(f"{name} has no area: x {x:g}, y {y:g}, width {width:g}, height {height:g}")
    if image is None:
        return None, name, box, box
    size = annotations.size(image)
    clipped = clip_box((x, y, x + width, y + height), size)
    if clipped is None:
        corners = f"{x:g},{y:g} to {x + width:g},{y + height:g}"
        raise ValueError(f"{name} {corners} is outside of the image ({size[1]} x {size[0]})")
    return image, name, clipped, box
