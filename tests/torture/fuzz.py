"""Readers of files against damaged ones: what a reader gets is read or refused by one line, in bounded time and memory.

Each case is one kind of file (TARGETS) with MUTATIONS seeded changes, see tests.torture.mutated_files. An exception
other than a UserError is an escape, and so are an error of several lines or with control characters, a reader that
takes longer than MAX_SECONDS, and memory that grows. The changed files of escapes are kept as escape_NUMBER_NAME.
"""

import gc
import io
import json
import os
import random
import re
import resource
import signal
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import models
import synthetic
from data import cameras, classification, detection, nuscenes, video_input
from data.classes import choose_classes, read_numbered
from data.classification.file_list import list_files
from data.images import image_size
from data.nuscenes import radar_points, splits
from evaluation import prediction_files
from ops import rle
from tests.model_helpers import checkpoint
from tests.small_nuscenes import SmallNuScenes
from tests.torture.mutated_files import mutated
from training import cli
from training.logger import drop_later
from utils import torch_files
from utils.errors import UserError
from utils.labels import read_labels

MUTATIONS = 3000
WARM_UP = 300  # mutations after which memory should not grow
MAX_GROWTH = 96 << 20  # bytes of resident memory from then on
MAX_PEAK = 3 << 30  # bytes, at any moment: an image of Pillow's maximum of 179 million pixels has 0.7 GB, and a copy
MAX_SECONDS = 20  # of a CPU core, for one file
MAX_SHOWN = 8  # escapes in a message
NOT_PRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
MAX_LINE = 20_000  # characters of an error


class TooLong(BaseException):
    """A reader that did not end."""


def voc(folder):
    root = synthetic.draw_voc(folder / "voc", images=6, seed=1, size=(64, 64))
    files = [*root.glob("Annotations/*.xml"), *root.glob("ImageSets/Main/t*.txt"), root / "labels.txt"]
    return files, lambda: all_samples(detection.load("voc", [root]))


def coco(folder):
    root = synthetic.draw_coco(folder / "coco", images=6, seed=1, size=(64, 64))
    files, masks = sorted(root.glob("annotations/*.json")), [True, False]

    def read():
        masks.reverse()
        all_samples(detection.load("coco", [root], masks=masks[0]))
        prediction_files.coco_ids(files[0], sorted(root.rglob("*.jpg")), ["circle", "square"])

    return files, read


def csv(folder):
    root = synthetic.draw_csv(folder / "csv", images=6, seed=1, size=(64, 64))
    return sorted(root.glob("*.csv")), lambda: all_samples(detection.load("csv", [root]))


def open_images(folder):
    root = synthetic.draw_open_images(folder / "open_images", images=6, seed=1, size=(64, 64))
    (root / "class-descriptions-boxable.csv").write_text("/m/01,circle\n/m/02,square\n")
    return sorted(root.glob("*.csv")), lambda: all_samples(detection.load("open_images", [root]))


def pennfudan(folder):
    root = synthetic.draw_pennfudan(folder / "pennfudan", images=5, seed=1, size=(64, 64))
    names = folder / "held_out.txt"
    names.write_text("".join(f"{path.name}\n" for path in sorted((root / "PNGImages").iterdir())[:2]))
    files = [*sorted((root / "PedMasks").iterdir()), *sorted((root / "PNGImages").iterdir())[:1], names]

    def read():
        held_out = detection.penn_fudan.read_names(str(names))
        all_samples(detection.load_penn_fudan([root], held_out=held_out))

    return files, read


def tables(folder):
    small = SmallNuScenes(folder / "nuscenes", scenes=("scene-0061",), frames=2)
    files = sorted((small.root / "v1.0-mini").glob("*.json"))
    split = small.root / "v1.0-mini/mine.txt"
    split.write_text("scene-0061\n")

    def read():
        for name in ("mine", "mini_train"):
            dataset = nuscenes.load_split(small.root, "v1.0-mini", name, skip_missing=True, cache=folder / "cache")
        assert all(is_inside(dataset.path(frame), small.root) for frame in dataset.frames), "a path leaves the folder"
        check_all(dataset.errors())
        dataset.balance_weights(), dataset.summary(), splits.select_key_frames(dataset, 2)
        dataset.load(0)

    return [*files, split], read


def radar(folder):
    small = SmallNuScenes(folder / "nuscenes", scenes=("scene-0061",), frames=1)
    dataset = nuscenes.load_split(small.root, "v1.0-mini", "mini_train", cache=folder / "cache")
    file = Path(dataset.path(dataset.sweeps_of(0)[0]))
    file.write_bytes(file.read_bytes()[:2500])

    def read():
        radar_points.read(file)
        dataset.load(0)

    return [file], read


def images(folder):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    image, exif, paths = Image.fromarray(pixels), Image.Exif(), []
    exif[0x0112] = 6
    for suffix, options in (
        *((".jpg", {"exif": exif}), (".png", {"exif": exif}), (".bmp", {}), (".webp", {}), (".tif", {})),
        *((".gif", {"save_all": True, "append_images": [image.rotate(9)]}), ("_z.tif", {"compression": "tiff_lzw"})),
    ):
        paths.append(folder / f"a{suffix}")
        image.save(paths[-1], **options)
    for name, mode in (("p.png", "P"), ("i.png", "I;16"), ("c.jpg", "CMYK"), ("l.tif", "1")):
        converted = Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)
        paths.append(folder / name)
        converted.save(paths[-1])

    def read(changed):
        image_size(changed)
        for frame in video_input.read_frames(changed):
            assert frame.image.dtype == torch.uint8 and frame.image.shape[0] == 3, frame.image.shape

    return paths, read


def recipe(folder):
    file = folder / "recipe.toml"
    lines = ['# a recipe\ndata = ["a", "b"]\nlr = 0.01\nepochs = 12\nmilestones = [8, 11]\nuse-cuda = false\nseed = 3']
    file.write_text("\n".join([*lines, 'scheduler = "cosine"\ndeterministic = true\nsize = [300, 300]\nresume = ""\n']))
    parser = cli.ArgumentParser("train.py", "fuzz")
    parser.add_argument("--data", nargs="+", help="folders")
    parser.add_argument("--use-cuda", type=cli.boolean, help="GPU")
    cli.add_run_arguments(parser)
    cli.add_weights_arguments(parser, "of the input")

    def read():
        stream, stderr = io.StringIO(), sys.stderr
        sys.stderr = stream
        try:
            parser.parse(["--config", str(file)])
        except SystemExit as error:
            if error.code != 2:
                raise
            check(stream.getvalue().strip().rpartition("error: ")[2])
        finally:
            sys.stderr = stderr

    return [file], read


def lists(folder):
    root = synthetic.draw_imagefolder(folder / "folders", images=10, seed=1)
    contents = {
        "labels.txt": "circle\nsquare\nstar\n",
        "classes.csv": "circle,0\nsquare,1\nstar,2\n",
        "calib.txt": "P2: 700 0 300 4 0 700 200 1 0 0 1 0\n",
        "calib.json": '{"camera_matrix": [[700, 0, 300], [0, 700, 200], [0, 0, 1]]}',
        "names.txt": "a.jpg\nb.jpg\n",
        "val.txt": "scene-0061\n",
    }
    for name, text in contents.items():
        (folder / name).write_text(text)
    options = {"prefix": str(root)}

    def read(changed):
        check_all(choose_classes([folder], ["circle", "square"])[1])
        if changed.name == "labels.txt":
            read_labels(changed)
        elif changed.name == "classes.csv":
            read_numbered(changed)
        elif changed.name.startswith("calib"):
            cameras.target(torch.zeros(3, 400, 600), cameras.read_calib(changed))
        elif changed.name == "names.txt":
            detection.penn_fudan.read_names(str(changed))
        else:
            splits.scenes_of("val", folder)
        check_all(detection.checks.unique(classification.load(options["prefix"], cache=folder)[2]))

    return [folder / name for name in contents], read


def logs_caches_masks(folder):
    """metrics.jsonl, the caches of file lists and of nuScenes' tables, and run lengths."""
    log, masks = folder / "metrics.jsonl", folder / "masks.json"
    log.write_text("".join(json.dumps({"step": step, "train/loss": 1.5, "lr": 0.1}) + "\n" for step in range(1, 30)))
    runs = rle.encode(np.tri(40, 50, dtype=bool)[None])[0].decode()
    polygons = [[1.5, 1, 30, 2, 20, 39.5], [0, 0, 9, 0, 9, 9, 0, 9]]
    masks.write_text(
        json.dumps([{"size": [40, 50], "counts": runs}, {"size": [40, 50], "counts": [5, 1995]}, polygons, polygons])
    )
    root = synthetic.draw_imagefolder(folder / "folders", images=10, seed=1)
    list_files(root / "train", "train")
    small = SmallNuScenes(folder / "nuscenes", scenes=("scene-0061",), frames=1)
    nuscenes.load_split(small.root, "v1.0-mini", "mini_train")
    caches = sorted((*root.glob(".sightline*/*.npy"), *small.root.glob(".sightline*/*.npy")))

    def read(changed):
        if changed == log:
            drop_later(log, 20)
        elif changed == masks:
            read_masks(masks)
        elif root in changed.parents:
            content, first = (list_files(root / "train", "train", print=check)[name] for name in ("content", "first"))
            assert first[-1] <= len(content)
        else:
            dataset = nuscenes.load_split(small.root, "v1.0-mini", "mini_train", skip_missing=True, print=check)
            assert all(is_inside(dataset.path(frame), small.root) for frame in dataset.frames), "a path leaves"

    return [log, masks, *caches], read


def read_masks(path):
    try:
        segmentations = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return
    for segmentation in segmentations if isinstance(segmentations, list) else []:
        for value in (segmentation, rle.compact(segmentation)):
            try:
                mask = rle.from_coco(value, (40, 50))
            except ValueError:
                continue
            rle.decode([mask], (40, 50))


def checkpoints(folder):
    path = folder / "last.pt"
    net = models.build("mobilenet_v2", 3, width_mult=0.1)
    flags = {"lr": 0.1, "score_threshold": 0.05, "milestones": [8.0], "data": ["x"], "nms_iou": 0.5}
    torch.save(checkpoint(net, flags=flags, step=7, epoch=1, image_size=(64, 64), ema=None, monitor="loss"), path)
    number = iter(range(MUTATIONS))

    def read():
        if next(number) % 3 == 0:  # changed values in a whole file
            contents, values = torch.load(io.BytesIO(whole), weights_only=True), random.Random(number.__length_hint__())
            replace_field(contents, values)
            torch.save(contents, path)
        contents = torch_files.read(path)
        net = models.load(path)
        assert isinstance(contents, dict) and net.num_classes >= 1

    whole = path.read_bytes()
    return [path], read


def replace_field(tree, random):
    values = (None, -1, 0, 10**6, 10**30, 1.5, float("nan"), "x", "", [], {}, [[]], (64, 64), (10**6, 10**6), {1: 2})
    values += (torch.zeros(2), torch.full((3,), float("nan")), "a" * 300, "\x1b[31m", True, ["a", "a"], [1, 2, 3])
    while True:
        key = random.choice(list(tree))
        if not isinstance(tree[key], dict) or not tree[key] or random.random() < 0.4:
            break
        tree = tree[key]
    if random.random() < 0.15:
        del tree[key]
    else:
        tree[random.choice((key, key, key, key, 7, None))] = random.choice(values)


TARGETS = (voc, coco, csv, open_images, pennfudan, tables, radar, images, recipe, lists, logs_caches_masks, checkpoints)
CASES = len(TARGETS)


def case(number, seed, folder):
    """Raises AssertionError with the first escapes."""
    warnings.simplefilter("ignore")  # of Pillow and numpy, about values that are then refused
    torch.set_num_threads(1)
    target = TARGETS[number]
    files, read = target(folder)
    originals = {file: file.read_bytes() for file in files}
    takes_path, escapes, settled, peak = bool(read.__code__.co_argcount), [], 0, 0
    for count in range(MUTATIONS):
        choice = random.Random(f"{seed} {number} {count}")
        file = choice.choice(files)
        changed = mutated(originals[file], file.suffix, choice)
        file.write_bytes(changed)
        reason = attempt(read, [file] if takes_path else [])
        if reason:
            (folder / f"escape_{count}_{file.name}").write_bytes(changed)
            escapes.append(f"mutation {count} of {file.name}: {reason}")
        file.write_bytes(originals[file])
        if count == WARM_UP:
            settled = resident()
    gc.collect()
    growth, peak = resident() - settled, peak_resident()
    if growth > MAX_GROWTH:
        escapes.append(f"{growth >> 20} MiB more memory after {MUTATIONS} mutations than after {WARM_UP}")
    if peak > MAX_PEAK:
        escapes.append(f"a peak of {peak >> 20} MiB")
    print(f"{target.__name__}: growth {growth / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB")
    more = f"\n... and {len(escapes) - MAX_SHOWN} more" if len(escapes) > MAX_SHOWN else ""
    assert not escapes, f"{target.__name__}: {len(escapes)} escapes\n" + "\n".join(escapes[:MAX_SHOWN]) + more


def attempt(read, arguments):
    """Why `read(*arguments)` is an escape, or ""."""
    previous = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        read(*arguments)
    except UserError as error:
        return check_reason(str(error))
    except (Exception, TooLong) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        frames = traceback.extract_tb(error.__traceback__)
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-6:-1])
        return f"{type(error).__name__}: {str(error)[:200]!r} at {places}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    return ""


def _stop(*_):
    raise TooLong(f"longer than {MAX_SECONDS} s")


def check(error):
    reason = check_reason(str(error))
    assert not reason, reason


def check_all(errors):
    for error in errors:
        check(error)


def check_reason(text):
    """Why `text` is not one printable line, or ""."""
    if not text.strip() or len(text) > MAX_LINE:
        return f"an error of {len(text)} characters: {text[:200]!r}"
    if NOT_PRINTABLE.search(text):
        return f"not one printable line: {text[:300]!r}"
    return ""


def all_samples(sets):
    """Check the errors of (train, val, errors), and load every sample."""
    train, val, errors = sets
    check_all(errors)
    for dataset in (train, val):
        assert not NOT_PRINTABLE.search(dataset.summary().replace("\n", " ")), "a summary that is not printable"
        for index in range(min(3, len(dataset))):
            dataset.annotation(index)
        if len(dataset):
            dataset.load(0)


def is_inside(path, root):
    return os.path.normpath(path).startswith(f"{os.path.normpath(root)}{os.sep}")


def resident():
    """Bytes of memory of this process, without pages of files, which the system takes back when it needs room."""
    gc.collect()
    try:
        return int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except OSError:
        return peak_resident()  # no /proc


def peak_resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
