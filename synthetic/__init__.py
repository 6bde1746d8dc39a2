"""Generate small synthetic data sets in the layouts of real ones, for the demo, the tests and the benchmarks.

    python -m synthetic voc OUT --images 200 --seed 0
    python -m synthetic open_images OUT --images 200 --seed 0 --size 300x300
    python -m synthetic coco OUT --images 200 --seed 0
    python -m synthetic csv OUT --images 200 --seed 0
    python -m synthetic pennfudan OUT --images 200 --seed 0
    python -m synthetic imagefolder OUT --images 2000 --seed 0
    python -m synthetic nuscenes OUT --images 240 --seed 0

nuscenes has streets seen by cameras and radars (synthetic.street); the others have 2D shapes (synthetic.shapes), one
per image in imagefolder. 15 % of the images are for validation, and 15 % for test in voc and open_images; of nuscenes a
fifth of the scenes; pennfudan has no split. The same arguments give the same files with the same versions of Pillow and
numpy.
"""

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from synthetic.shapes import drawing, layouts
from synthetic.street import nuscenes_files, simulation
from utils import files
from utils.errors import DataError

MARK = "drawn.json"  # in OUT: the arguments, and whether the set is complete
MAX_IMAGES, MAX_SEED, MAX_SIDE = 10**7, 2**63 - 1, 1 << 13
MIN_SIDE = 64  # pixels: below that the smallest objects are a few pixels wide


@dataclass(frozen=True)
class Layout:
    write: Callable  # (folder, images, seed, size)
    classes: tuple = drawing.CLASSES
    min_images: int = 3  # one each for train, val and test
    version: int = drawing.VERSION
    multiple: int = 1  # the number of images is rounded down to a multiple of this


LAYOUTS = {
    "voc": Layout(layouts.write_voc),
    "open_images": Layout(layouts.write_open_images),
    "coco": Layout(layouts.write_coco),
    "csv": Layout(layouts.write_csv),
    "pennfudan": Layout(layouts.write_pennfudan, classes=("person",)),
    "imagefolder": Layout(layouts.write_imagefolder, min_images=2 * len(drawing.CLASSES)),  # all classes in both splits
    "nuscenes": Layout(
        nuscenes_files.write_nuscenes,
        classes=simulation.CLASSES,
        min_images=nuscenes_files.MIN_KEY_FRAMES * len(simulation.CAMERAS),
        version=simulation.VERSION,
        multiple=len(simulation.CAMERAS),
    ),
}


def draw(layout, out, images=200, seed=0, size=None):
    """Draw a data set into the folder `out`, unless it is there already, complete and with the same arguments.

    layout   a key of LAYOUTS
    images   in all; rounded down to whole key frames of six images for nuscenes
    size     (width, height) of every image; None: about 320 x 240, imagefolder 100 x 100, nuscenes 800 x 450

    Returns `out`. Raises DataError where images, seed or size is too small, where `out` contains anything but this data
    set or a part of it; WriteError where it cannot be written.
    """
    out, writer = Path(out), LAYOUTS[layout]
    images -= images % writer.multiple
    if images < writer.min_images:
        raise DataError(out, f"{images} images", f"too few for all splits: draw {writer.min_images} or more")
    if size is not None and min(size) < MIN_SIDE:
        raise DataError(out, f"size {size[0]}x{size[1]}", f"each side must be {MIN_SIDE} pixels or more")
    if seed < 0:
        raise DataError(out, f"seed {seed}", "must be 0 or more")
    arguments = {"layout": layout, "images": images, "seed": seed}
    arguments |= {"size": list(size) if size else None, "version": writer.version}
    with files.writing(out):
        if not is_complete(out, arguments):
            write_mark(out, arguments | {"whole": False})
            writer.write(out, images, seed, size)
            write_mark(out, arguments | {"whole": True})
    return out


# Each takes (out, images=200, seed=0, size=None), see `draw`.
draw_voc = functools.partial(draw, "voc")
draw_open_images = functools.partial(draw, "open_images")
draw_coco = functools.partial(draw, "coco")
draw_csv = functools.partial(draw, "csv")
draw_pennfudan = functools.partial(draw, "pennfudan")
draw_imagefolder = functools.partial(draw, "imagefolder")
draw_nuscenes = functools.partial(draw, "nuscenes")


def is_complete(out, arguments):
    """True where `out` contains all of the data set, False where it contains nothing or a part; else DataError."""
    if out.exists() and not out.is_dir():
        raise DataError(out, "output folder", "is a file: choose another folder")
    if not out.exists() or not any(out.iterdir()):
        return False
    mark = out / MARK
    if not mark.is_file():
        raise DataError(out, "output folder", f"contains files but no {MARK}: choose a new or empty folder")
    try:
        written = json.loads(mark.read_text())
        whole = written.pop("whole")
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise DataError(mark, "whole file", "was not written by synthetic: choose a new or empty folder") from error
    different = [
        f"{name} {written.get(name)}, not {value}" for name, value in arguments.items() if written.get(name) != value
    ]
    if different:
        raise DataError(mark, "arguments", f"the set here was drawn with {'; '.join(different)}: choose another folder")
    return whole and count_images(out) == arguments["images"]


def count_images(out):
    """The number of images in a data set, masks not counted."""
    return sum(1 for path in out.rglob("*") if path.suffix == ".jpg" or path.parent.name == "PNGImages")


def write_mark(out, values):
    files.write_text(out / MARK, json.dumps(values, indent=1) + "\n")


def layout_name(text):
    return "open_images" if text == "openimages" else text  # the name in earlier versions


def parse_size(text):
    """'320x240' -> (320, 240)."""
    width, separator, height = text.lower().partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, for example 320x240")
    return limited(0, MAX_SIDE)(width), limited(0, MAX_SIDE)(height)


def limited(low, high):
    """A `type=` for argparse: a whole number from `low` to `high`."""

    def convert(text):
        if not text.lstrip("-").isdecimal() or len(text) > 30 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {low} to {high}")
        return int(text)

    return convert


def parse_args(argv=None):
    description, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m synthetic",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arg = parser.add_argument
    arg("layout", choices=sorted(LAYOUTS), type=layout_name, help="layout of the data set")
    out = "output folder: new, empty, or drawn with the same arguments before"
    arg("out", type=Path, metavar="OUT", help=out)
    images = "number of images (default: 200); see below for the splits"
    arg("--images", type=limited(0, MAX_IMAGES), default=200, metavar="N", help=images)
    size = "size of all images (default: about 320x240, imagefolder 100x100, nuscenes 800x450)"
    arg("--size", type=parse_size, metavar="WIDTHxHEIGHT", help=size)
    arg("--seed", type=limited(0, MAX_SEED), default=0, metavar="N", help="random seed (default: 0)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = draw(args.layout, args.out, args.images, args.seed, args.size)
    print(f"{out}: {count_images(out)} images, classes {' '.join(LAYOUTS[args.layout].classes)}")
