"""Small data sets drawn at run time, written to disk in the layouts of the real ones: for the demo and the tests.

    python -m data.drawn voc OUT --images 200 --seed 0
    python -m data.drawn openimages OUT --images 200 --seed 0 --size 300x300
    python -m data.drawn coco OUT --images 200 --seed 0
    python -m data.drawn csv OUT --images 200 --seed 0
    python -m data.drawn imagefolder OUT --images 2000 --seed 0
    python -m data.drawn nuscenes OUT --images 240 --seed 0

The pictures are those of `data.scenes`, one object each for imagefolder, several or none for the others, and of
`data.world`, with radars, for nuscenes. The same arguments give the same bytes with the same versions of Pillow and
numpy. OUT must be new, empty, or drawn before with the same arguments: a whole set is kept as it is and costs no time,
one that was cut off is drawn again.
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data.errors import DataError
from data.scenes import CLASSES, VERSION, draw_portrait, draw_scene
from data.world import CAMERAS
from data.world import CLASSES as WORLD_CLASSES
from data.world import VERSION as WORLD_VERSION
from data.world_files import FEWEST_KEYFRAMES, write_nuscenes

MARK = "drawn.json"  # in OUT: the arguments, and whether the set is whole
FEWEST = 3  # pictures: one each for train, val and test
FEWEST_PORTRAITS = 2 * len(CLASSES)  # one of each class for train and val
SMALLEST_SIDE = 64  # pixels: below that the smallest objects are a few pixels wide
OPEN_IMAGES_COLUMNS = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside,id,ClassName"
)
CATEGORY_IDS = (1, 3, 7, 10, 18)  # of CLASSES in coco: with gaps, as COCO's own have


# ---- layouts: each is (out folder, scenes as (index, Scene) pairs, indices of each part) -> files ----


def splits(images):
    """{"train": indices, "val": ..., "test": ...}: 70, 15 and 15 % of the pictures, at least one each."""
    part = max(1, round(0.15 * images))
    return {
        "train": range(images - 2 * part),
        "val": range(images - 2 * part, images - part),
        "test": range(images - part, images),
    }


def halves(images, least=1):
    """{"train": indices, "val": ...}: the last 15 % of the pictures are val, at least so many."""
    part = max(least, round(0.15 * images))
    return {"train": range(images - part), "val": range(images - part, images)}


def save_jpeg(path, image):
    Image.fromarray(image).save(path, quality=90)


def voc_xml(name, scene):
    """VOC annotation: corners count from 1 and the last pixel belongs to the box. A crowd is written as difficult:
    VOC has no other word for a box to ignore."""
    height, width = scene.image.shape[:2]
    lines = ["<annotation>", "\t<folder>JPEGImages</folder>", f"\t<filename>{name}</filename>"]
    lines += ["\t<size>", f"\t\t<width>{width}</width>", f"\t\t<height>{height}</height>", "\t\t<depth>3</depth>"]
    lines += ["\t</size>", "\t<segmented>0</segmented>"]
    ignored = scene.difficult | scene.crowd
    for label, (x1, y1, x2, y2), cut, difficult in zip(
        scene.labels, scene.boxes, scene.truncated, ignored, strict=True
    ):
        lines += ["\t<object>", f"\t\t<name>{CLASSES[label]}</name>", "\t\t<pose>Unspecified</pose>"]
        lines += [f"\t\t<truncated>{int(cut)}</truncated>", f"\t\t<difficult>{int(difficult)}</difficult>"]
        corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
        lines += ["\t\t<bndbox>", *(f"\t\t\t<{key}>{value}</{key}>" for key, value in corners.items()), "\t\t</bndbox>"]
        lines += ["\t</object>"]
    return "\n".join([*lines, "</annotation>", ""])


def write_voc(out, scenes, parts):
    """JPEGImages, Annotations, ImageSets/Main/{train,val,trainval,test}.txt and labels.txt under out."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for index, scene in scenes:
        save_jpeg(out / "JPEGImages" / f"{index:06d}.jpg", scene.image)
        (out / "Annotations" / f"{index:06d}.xml").write_text(voc_xml(f"{index:06d}.jpg", scene))
    lists = {**parts, "trainval": [*parts["train"], *parts["val"]]}
    for name, indices in lists.items():
        (out / "ImageSets/Main" / f"{name}.txt").write_text("".join(f"{index:06d}\n" for index in indices))
    (out / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def write_open_images(out, scenes, parts):
    """{train,validation,test}/ID.jpg and sub-{train,validation,test}-annotations-bbox.csv under out. A picture without
    objects has no row, as in Open Images. A mostly hidden object is IsOccluded, a crowd IsGroupOf."""
    names = {"train": "train", "val": "validation", "test": "test"}
    split_of = {index: names[part] for part, indices in parts.items() for index in indices}
    rows = {split: [] for split in names.values()}
    for split in rows:
        (out / split).mkdir(parents=True, exist_ok=True)
    for index, scene in scenes:
        split, name = split_of[index], f"{index:016x}"
        save_jpeg(out / split / f"{name}.jpg", scene.image)
        rows[split] += open_images_rows(name, scene)
    for split, lines in rows.items():
        with open(out / f"sub-{split}-annotations-bbox.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([OPEN_IMAGES_COLUMNS.split(","), *lines])


def open_images_rows(name, scene):
    """One row an object, in the columns of OPEN_IMAGES_COLUMNS; corners relative to the picture, 0 to 1."""
    height, width = scene.image.shape[:2]
    rows = []
    for i, label in enumerate(scene.labels.tolist()):
        x1, y1, x2, y2 = scene.boxes[i].tolist()
        corners = [f"{value:.6f}" for value in (x1 / width, x2 / width, y1 / height, y2 / height)]
        facts = [int(scene.difficult[i]), int(scene.truncated[i]), int(scene.crowd[i]), 0, 0]
        code = f"/m/0drawn{label}"
        rows.append([name, "drawn", code, 1, *corners, *facts, code, CLASSES[label]])
    return rows


def write_coco(out, scenes, parts):
    """annotations/instances_{train,val}2017.json and {train,val}2017/ID.jpg under out. A crowd is iscrowd; the others,
    mostly hidden ones too, are not. Image ids begin at 101 and leave gaps."""
    category_of = [
        {"id": number, "name": name, "supercategory": "shape"} for number, name in zip(CATEGORY_IDS, CLASSES)
    ]
    sets = {part: {"images": [], "annotations": [], "categories": category_of} for part in parts}
    part_of = {index: part for part, indices in parts.items() for index in indices}
    for folder in ("annotations", *(f"{part}2017" for part in parts)):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for index, scene in scenes:
        part, image_id = part_of[index], 101 + 3 * index
        height, width = scene.image.shape[:2]
        image = {"id": image_id, "file_name": f"{image_id:012d}.jpg", "width": width, "height": height}
        save_jpeg(out / f"{part}2017" / image["file_name"], scene.image)
        sets[part]["images"].append(image)
        sets[part]["annotations"] += coco_objects(image_id, scene)
    for part, content in sets.items():
        (out / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content) + "\n")


def coco_objects(image_id, scene):
    """One annotation an object; segmentation and area are of its mask."""
    objects = []
    for i, label in enumerate(scene.labels.tolist()):
        x1, y1, x2, y2 = scene.boxes[i].tolist()
        facts = {"id": 100 * image_id + i, "image_id": image_id, "category_id": CATEGORY_IDS[label]}
        facts |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(scene.masks[i].sum())}
        objects.append(facts | {"iscrowd": int(scene.crowd[i]), "segmentation": run_lengths(scene.masks[i])})
    return objects


def run_lengths(mask):
    """A bool [H,W] as COCO's uncompressed RLE: lengths of runs down the columns, the first of them outside."""
    ends = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0, append=mask.size).tolist()}


def write_csv(out, scenes, parts):
    """train.csv, val.csv (`path,x1,y1,x2,y2,class`; `path,,,,,` where nothing is annotated), classes.csv (`name,id`)
    and images/ under out. Crowds and mostly hidden objects are left out: csv has no word for a box to ignore."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = {}  # index -> lines
    for index, scene in scenes:
        path = f"images/{index:06d}.jpg"
        save_jpeg(out / path, scene.image)
        plain = np.flatnonzero(~(scene.crowd | scene.difficult))
        rows[index] = [[path, *scene.boxes[i].tolist(), CLASSES[scene.labels[i]]] for i in plain] or [[path, *[""] * 5]]
    tables = {part: [row for index in indices for row in rows[index]] for part, indices in parts.items()}
    tables["classes"] = [[name, label] for label, name in enumerate(CLASSES)]
    for name, lines in tables.items():
        with open(out / f"{name}.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)


def write_imagefolder(out, scenes, parts):
    """{train,val}/CLASS/ID.jpg under out; every scene has one object."""
    part_of = {index: part for part, indices in parts.items() for index in indices}
    for part in parts:
        for name in CLASSES:
            (out / part / name).mkdir(parents=True, exist_ok=True)
    for index, scene in scenes:
        save_jpeg(out / part_of[index] / CLASSES[scene.labels[0]] / f"{index:06d}.jpg", scene.image)


# ---- drawing a set ----


def draw(write, out, images, seed, size, portraits=False):
    """Draw `images` scenes into the folder `out` through the layout function `write`; returns `out` as a Path.

    size: (width, height) of every picture, or None for about 320 x 240. portraits: one object a picture, and about
    100 x 100. Raises DataError as `draw_once`.
    """
    three_parts = write in (write_voc, write_open_images)
    picture = draw_portrait if portraits else draw_scene

    def fill(folder):
        parts = splits(images) if three_parts else halves(images, least=len(CLASSES) if portraits else 1)
        write(folder, ((index, picture(seed, index, size)) for index in range(images)), parts)

    wanted = {"layout": write.__name__.removeprefix("write_"), "images": images, "seed": seed}
    wanted |= {"size": list(size) if size else None, "version": VERSION}
    return draw_once(fill, Path(out), wanted, fewest=FEWEST_PORTRAITS if portraits else FEWEST)


def draw_once(fill, out, wanted, fewest):
    """Calls fill(out) unless the folder `out` holds the wanted set already; returns `out`.

    wanted: layout, images, seed, size and version, kept in `out`. Raises DataError where images (below `fewest`), size
    or seed is too small, and where `out` cannot be written or holds anything but the same set.
    """
    images, size, seed = wanted["images"], wanted["size"], wanted["seed"]
    if images < fewest:
        raise DataError(out, f"{images} images", f"too few for every part of the set: draw {fewest} or more")
    if size is not None and min(size) < SMALLEST_SIDE:
        raise DataError(out, f"size {size[0]}x{size[1]}", f"each side must be {SMALLEST_SIDE} pixels or more")
    if seed < 0:
        raise DataError(out, f"seed {seed}", "must be 0 or more")
    if is_whole(out, wanted):
        return out
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_mark(out, {**wanted, "whole": False})
    except OSError as error:
        raise DataError(out, "output folder", f"cannot be written: {error.strerror}") from error
    fill(out)
    write_mark(out, {**wanted, "whole": True})
    return out


def is_whole(out, wanted):
    """True where `out` holds the whole wanted set, False where there is nothing yet or a part of it, else DataError."""
    if out.exists() and not out.is_dir():
        raise DataError(out, "output folder", "is a file: choose another folder")
    if not out.exists() or not any(out.iterdir()):
        return False
    mark = out / MARK
    if not mark.is_file():
        raise DataError(out, "output folder", f"holds files but no {MARK}: choose a new or empty folder")
    try:
        found = json.loads(mark.read_text())
        whole = found.pop("whole")
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise DataError(mark, "whole file", "was not written by data.drawn: choose a new or empty folder") from error
    different = [f"{key} {found.get(key)}, not {value}" for key, value in wanted.items() if found.get(key) != value]
    if different:
        raise DataError(mark, "arguments", f"the set here was drawn with {'; '.join(different)}: choose another folder")
    return whole and pictures_in(out) == wanted["images"]


def pictures_in(out):
    return sum(1 for _ in out.rglob("*.jpg"))


def write_mark(out, values):
    """drawn.json, replaced in one step: a cut-off leaves the old one or the new one."""
    temporary = out / f"{MARK}.tmp"
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(temporary, out / MARK)


def draw_voc(out, images=200, seed=0, size=None):
    """A Pascal VOC folder; see `draw` for arguments and errors."""
    return draw(write_voc, out, images, seed, size)


def draw_open_images(out, images=200, seed=0, size=None):
    """An Open Images folder in jetson-inference's layout; see `draw` for arguments and errors."""
    return draw(write_open_images, out, images, seed, size)


def draw_coco(out, images=200, seed=0, size=None):
    """A COCO folder; see `draw` for arguments and errors."""
    return draw(write_coco, out, images, seed, size)


def draw_csv(out, images=200, seed=0, size=None):
    """A folder in RetinaNet's csv layout; see `draw` for arguments and errors."""
    return draw(write_csv, out, images, seed, size)


def draw_imagefolder(out, images=200, seed=0, size=None):
    """ImageNet-style class folders; see `draw` for arguments and errors."""
    return draw(write_imagefolder, out, images, seed, size, portraits=True)


def draw_nuscenes(out, images=200, seed=0, size=None):
    """A nuScenes folder v1.0-mini, six pictures a keyframe: `images` is rounded down to a multiple of six, and 24 at
    least. size None is 800 x 450; see `draw` for the other arguments and errors."""
    images -= images % len(CAMERAS)
    wanted = {"layout": "nuscenes", "images": images, "seed": seed, "size": list(size) if size else None}
    wanted |= {"version": WORLD_VERSION}
    return draw_once(
        lambda folder: write_nuscenes(folder, images, seed, size), Path(out), wanted, FEWEST_KEYFRAMES * len(CAMERAS)
    )


LAYOUTS = {
    "voc": draw_voc,
    "openimages": draw_open_images,
    "coco": draw_coco,
    "csv": draw_csv,
    "imagefolder": draw_imagefolder,
    "nuscenes": draw_nuscenes,
}


def parse_size(text):
    """'320x240' -> (320, 240)."""
    width, by, height = text.lower().partition("x")
    if not (by and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, for example 320x240")
    return int(width), int(height)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.drawn", description="Draw a small data set.")
    parser.add_argument("layout", choices=sorted(LAYOUTS))
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="new or empty folder, or one drawn with the same arguments"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=200,
        help="pictures in all: 15 %% are val, and 15 %% test in voc and openimages; nuscenes: six a keyframe",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        help="WIDTHxHEIGHT of every picture (default: about 320x240, imagefolder 100x100, nuscenes 800x450)",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = LAYOUTS[args.layout](args.out, images=args.images, seed=args.seed, size=args.size)
    classes = WORLD_CLASSES if args.layout == "nuscenes" else CLASSES
    print(f"{out}: {pictures_in(out)} pictures, classes {' '.join(classes)}")


if __name__ == "__main__":
    try:
        main()
    except DataError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
