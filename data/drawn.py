"""Small data sets drawn at run time, written to disk in the layouts of the real ones: for the demo and the tests.

    python -m data.drawn voc OUT --images 200 --seed 0
    python -m data.drawn openimages OUT --images 200 --seed 0 --size 300x300
    python -m data.drawn coco OUT --images 200 --seed 0
    python -m data.drawn csv OUT --images 200 --seed 0
    python -m data.drawn pennfudan OUT --images 200 --seed 0
    python -m data.drawn imagefolder OUT --images 2000 --seed 0
    python -m data.drawn nuscenes OUT --images 240 --seed 0

The pictures are those of `data.scenes`, one object each for imagefolder, several or none for the others, and of
`data.world`, with radars, for nuscenes. The same arguments give the same bytes with the same versions of Pillow and
numpy. OUT must be new, empty, or drawn before with the same arguments: a whole set is kept as it is and costs no time,
one that was cut off is drawn again.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

from data.errors import DataError
from data.pennfudan import CLASSES as PEOPLE
from data.scene_files import (
    write_coco,
    write_csv,
    write_imagefolder,
    write_open_images,
    write_pennfudan,
    write_voc,
)
from data.scenes import CLASSES, VERSION, draw_portrait, draw_scene
from data.world import CAMERAS
from data.world import CLASSES as WORLD_CLASSES
from data.world import VERSION as WORLD_VERSION
from data.world_files import FEWEST_KEYFRAMES, write_nuscenes

MARK = "drawn.json"  # in OUT: the arguments, and whether the set is whole
FEWEST = 3  # pictures: one each for train, val and test
FEWEST_PORTRAITS = 2 * len(CLASSES)  # one of each class for train and val
SMALLEST_SIDE = 64  # pixels: below that the smallest objects are a few pixels wide


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


# ---- drawing a set ----


def draw(write, out, images, seed, size, portraits=False):
    """Draw `images` scenes into the folder `out` through the layout function `write`; returns `out` as a Path.

    size: (width, height) of every picture, or None for about 320 x 240. portraits: one object a picture, and about
    100 x 100. Raises DataError as `draw_once`.
    """
    three_parts = write in (write_voc, write_open_images)
    picture = draw_portrait if portraits else draw_scene
    scenes = (picture(seed, index, size) for index in itertools.count())
    if write is write_pennfudan:
        scenes = (scene for scene in scenes if not scene.crowd.any())

    def fill(folder):
        parts = splits(images) if three_parts else halves(images, least=len(CLASSES) if portraits else 1)
        write(folder, zip(range(images), scenes), parts)

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
    """How many the folder holds, masks not counted."""
    return sum(1 for path in out.rglob("*") if path.suffix == ".jpg" or path.parent.name == "PNGImages")


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


def draw_pennfudan(out, images=200, seed=0, size=None):
    """A PennFudanPed folder, of scenes without crowds; see `draw` for arguments and errors."""
    return draw(write_pennfudan, out, images, seed, size)


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
    "pennfudan": draw_pennfudan,
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
    classes = {"nuscenes": WORLD_CLASSES, "pennfudan": PEOPLE}.get(args.layout, CLASSES)
    print(f"{out}: {pictures_in(out)} pictures, classes {' '.join(classes)}")


if __name__ == "__main__":
    try:
        main()
    except DataError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
