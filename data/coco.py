"""COCO folders.

    ROOT/annotations/instances_{set}.json
    ROOT/{set}/, ROOT/images/{set}/ or ROOT/images/    pictures; a file_name may hold a sub-folder

Sets are train2017 and val2017 unless others are named. bbox is x, y, width, height in pixels; a crowd (iscrowd 1) is
ignored; a picture without annotations is background. Category ids may have gaps: labels follow the ids as they rise.
segmentation, polygons or run lengths, is read where masks are asked for.
"""

import json
import math
import os
from array import array
from pathlib import Path

import numpy as np

from data.boxes import Records, clip, finish
from data.errors import DataError
from data.files import lines_of, missing_pictures
from ops import run_lengths

SETS = ("train2017", "val2017")
LISTS = ("images", "annotations", "categories")
KEPT = {*LISTS, "id", "file_name", "height", "width", "image_id", "category_id", "bbox", "iscrowd", "name"}
KEPT_WITH_MASKS = {*KEPT, "segmentation", "counts", "size"}


def load(roots, split, classes=None, sets=SETS, faults=None, transform=None, seed=0, masks=False):
    """The pictures of `split` ("train" or "val") in all `roots`, joined, as a BoxDataset.

    classes   names in label order; None takes all categories, in the order of their ids
    sets      the names of the training and of the validation set
    faults    a list that receives a DataError for everything wrong in the files; None raises the first
    masks     targets have masks; an object without a valid segmentation is then a fault

    From one root the data set has `annotation_file`, `source_ids` int64 [N], COCO's id of every picture, and
    `category_ids`, COCO's id of every label (-1 for a class that the file lacks). From several they are None.
    Raises DataError where a folder is no COCO set.
    """
    name = sets[("train", "val").index(split)]
    records, found, source_ids, ids = Records(masks), [], array("q"), {}
    for root in map(Path, roots):
        file, folder = _annotation_file(root, name), _picture_folder(root, name)
        content = _read_json(file, _slim_with_masks if masks else _slim)
        names = _read_categories(file, content["categories"])
        positions = _read_images(file, folder, content["images"], records, source_ids, found)
        _read_annotations(file, content["annotations"], names, positions, records, found)
        ids = {category: number for number, category in names.items()} | ids
    dataset = finish(records, list(ids) if classes is None else classes, found, faults, transform=transform, seed=seed)
    if len(roots) == 1:
        dataset.annotation_file, dataset.source_ids = str(file), np.array(source_ids, dtype=np.int64)
        dataset.category_ids = [ids.get(category, -1) for category in dataset.classes]
    return dataset


def _annotation_file(root, name):
    file = root / "annotations" / f"instances_{name}.json"
    if not file.is_file():
        have = ", ".join(sorted(other.name for other in file.parent.glob("*.json"))) or "no json"
        remedy = "name the sets by --coco-train and --coco-val"
        raise DataError(file.parent, "", f"no {file.name}; found: {have}; {remedy}")
    return file


def _picture_folder(root, name):
    choices = (root / name, root / "images" / name, root / "images")
    for folder in choices:
        if folder.is_dir():
            return folder
    raise DataError(root, "", f"no folder of pictures: expected one of {', '.join(map(str, choices))}")


def _slim(pairs):
    """A JSON object less what is not used: outlines are nine tenths of COCO, and as Python numbers gigabytes."""
    return {key: value for key, value in pairs if key in KEPT}


def _slim_with_masks(pairs):
    """`_slim` that keeps outlines too, each packed as soon as it is read."""
    kept = {key: value for key, value in pairs if key in KEPT_WITH_MASKS}
    if "segmentation" in kept:
        kept["segmentation"] = run_lengths.compact(kept["segmentation"])
    return kept


def _read_json(file, slim=_slim):
    try:
        content = json.loads("".join(lines_of(file)), object_pairs_hook=slim)
    except ValueError as error:
        raise DataError(file, "", f"not valid JSON: {error}; fetch or write the file anew") from None
    lack = [key for key in LISTS if not (isinstance(content, dict) and isinstance(content.get(key), list))]
    if lack:
        remedy = "give an instances file (those of COCO's test sets have no annotations)"
        raise DataError(file, "", f"has no list of {', no list of '.join(lack)}; {remedy}")
    for key in LISTS:
        if not all(isinstance(item, dict) for item in content[key]):
            raise DataError(file, key, "holds something else than objects; write the file anew")
    return content


def _read_categories(file, categories):
    """Category id -> name, in the order of the ids. Raises DataError for a bad or a double one."""
    names = {}
    for item in categories:
        number, name = item.get("id"), item.get("name")
        if not _is_whole(number) or not isinstance(name, str) or not name.strip():
            raise DataError(file, "categories", f"{item} has no whole number as id or no name; give it both")
        if number in names or name.strip() in names.values():
            raise DataError(file, "categories", f"id {number} or name {name.strip()!r} comes twice; keep one of each")
        names[number] = name.strip()
    if not names:
        raise DataError(file, "categories", "is empty; list every class with its id and name")
    return dict(sorted(names.items()))


def _is_whole(value):
    return isinstance(value, int) and -(1 << 63) <= value < 1 << 63


def _place(what, number, count):
    """Where a fault is: by COCO's id, or by the place in the list where there is none."""
    return f"{what} {number}" if _is_whole(number) else f"{what} number {count}"


def _read_images(file, folder, images, records, source_ids, faults):
    """COCO's id -> position in `records` of every picture; None for one that is left out."""
    have, positions, missing = _listing(folder), {}, {}
    for count, item in enumerate(images, start=1):
        number = item.get("id")
        try:
            name, size = _read_image(item, positions)
        except ValueError as error:
            faults.append(DataError(file, _place("image", number, count), str(error), kind="image"))
            if _is_whole(number):
                positions.setdefault(number)
            continue
        if name not in have:
            missing[name] = number
            positions[number] = None
            continue
        positions[number] = records.add_image(os.path.join(folder, name), size)
        source_ids.append(number)
    if missing:
        faults.append(missing_pictures(file, f"image {next(iter(missing.values()))}", folder, list(missing)))
    return positions


def _listing(folder):
    """Names of all files in and below `folder`. One listing: to look for 118,000 files one by one takes minutes on a
    network disk."""
    start = len(str(folder)) + 1
    found = ((parent[start:], files) for parent, _, files in os.walk(folder, followlinks=True))
    return {f"{below}/{name}" if below else name for below, files in found for name in files}


def _read_image(item, positions):
    """(file name, (h, w)). Raises ValueError saying what is wrong."""
    lack = [key for key in ("id", "file_name", "height", "width") if item.get(key) is None]
    if lack:
        raise ValueError(f"lacks {', '.join(lack)}")
    if not _is_whole(item["id"]):
        raise ValueError(f"id {item['id']!r} is no whole number")
    if item["id"] in positions:
        raise ValueError(f"id comes twice: {item['file_name']}")
    size = item["height"], item["width"]
    if not all(isinstance(side, int | float) and 1 <= side < 1 << 31 for side in size):
        raise ValueError(f"width {size[1]!r} and height {size[0]!r} are no size of a picture")
    return os.path.normpath(str(item["file_name"])), tuple(map(int, size))


def _read_annotations(file, annotations, names, positions, records, faults):
    for count, item in enumerate(annotations, start=1):
        try:
            image, name, box = _read_annotation(item, names, positions, records)
            masked = records.masks is not None and image is not None
            mask = _read_mask(item, name, records.size(image)) if masked else None
        except (ValueError, OverflowError) as error:
            place = _place("annotation", item.get("id"), count)
            faults.append(DataError(file, place, str(error), kind="box"))
        else:
            if image is not None:
                records.add_object(image, box, name, item.get("iscrowd") == 1, mask)


def _read_mask(item, name, size):
    try:
        return run_lengths.from_coco(item.get("segmentation"), size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _read_annotation(item, names, positions, records):
    """(position of the picture, class name, [x1, y1, x2, y2] inside it). Raises ValueError saying what is wrong.

    The position is None, and the box not looked at, where the picture is left out.
    """
    lack = [key for key in ("image_id", "category_id", "bbox") if key not in item]
    if lack:
        raise ValueError(f"lacks {', '.join(lack)}")
    number, category, box = item["image_id"], item["category_id"], item["bbox"]
    if not _is_whole(number) or number not in positions:
        raise ValueError(f"unknown image_id {number!r}")
    if not _is_whole(category) or category not in names:
        raise ValueError(f"unknown category_id {category!r}")
    name, image = names[category], positions[number]
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)):
        raise ValueError(f"{name}: bbox {box!r} is not four numbers")
    x, y, width, height = box
    if not all(map(math.isfinite, box)) or width <= 0 or height <= 0:
        raise ValueError(f"{name} has no area: x {x:g}, y {y:g}, width {width:g}, height {height:g}")
    if image is None:
        return None, name, box
    size = records.size(image)
    inside = clip((x, y, x + width, y + height), size)
    if inside is None:
        raise ValueError(f"{name} {x:g},{y:g} to {x + width:g},{y + height:g} outside {size[1]} x {size[0]}")
    return image, name, inside
