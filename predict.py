"""Run a trained detector on pictures: drawn pictures and a JSON of detections come out.

    python predict.py runs/drone/best.pt photos/ holiday.jpg
    python predict.py runs/drone/best.pt photos/ --out found --threshold 0.5

The checkpoint brings the network, its classes and its input size. Every picture is written to OUT with its boxes, and
OUT/detections.json holds a list of {"file", "boxes" (xyxy, pixels of the file), "labels" (names), "scores"}.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

import models
from data import DataError, loader, transforms
from data.images import SUFFIXES, read_image
from models import WeightsError
from ops import suppress
from ops.boxes import in_file_pixels
from ops.images import normalize
from training import devices, flags, pictures


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="predict.py", description=__doc__, formatter_class=flags.HelpFormatter)
    arg = parser.add_argument
    arg("checkpoint", help="best.pt or last.pt of a run, or a published detector's file")
    arg("pictures", nargs="+", help="files or folders")
    arg("--out", default="predictions", help="folder for what comes out")
    arg("--threshold", type=float, default=0.4, help="least score, 0 to 1")
    arg("--batch-size", type=flags.number(int, 1), default=8, help="pictures at a time")
    arg("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    arg("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the network")
    return flags.parse(parser, argv)


def find_pictures(names):
    """Files as they are, folders as the pictures directly in them, in order of name. Raises DataError."""
    found = []
    for path in map(Path, names):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise DataError(path, "", f"no picture in it ({' '.join(SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(path, "", "no such file or folder")
    return found


@torch.no_grad()
def detect(net, images, run, threshold):
    """Detections for images (each uint8 [3,H,W], any size), one dict each, boxes in pixels of that image."""
    if net.image_size:
        resize, collate = transforms.ssd_evaluate(net.image_size), loader.PadCollate(1)
    else:
        resize, collate = transforms.pyramid_evaluate(net.min_side, net.max_side), loader.PadCollate(32)
    samples = [resize(tv_tensors.Image(image), unknown(image)) for image in images]
    batch, targets = collate(samples)
    size, shapes = tuple(batch.shape[-2:]), [target["shape"] for target in targets]
    with run.autocast():
        outputs = net(normalize(batch.to(run.device), net.image_mean, net.image_std, shapes))
    if net.image_size:
        found = suppress.from_multibox(outputs, net.anchors(size), net.box_weights, size, threshold)
    else:
        levels = net.level_sizes(size)
        found = suppress.from_pyramid(outputs, net.anchors(size), net.box_weights, shapes, levels, threshold)
    found = in_file_pixels(found, targets)
    return [{name: value.cpu() for name, value in one.items()} for one in found]


def unknown(image):
    """The target of a picture of which nothing is known."""
    size = tuple(image.shape[-2:])
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
    nothing = torch.zeros(0)
    return {"boxes": boxes, "labels": nothing.long(), "ignore": nothing.bool(), "image_id": 0, "size": size}


def free_name(folder, stem, written):
    """FOLDER/STEM.jpg, or STEM_2.jpg ... where this run has written that: two folders may hold the same name."""
    path, number = folder / f"{stem}.jpg", 1
    while path in written:
        number += 1
        path = folder / f"{stem}_{number}.jpg"
    written.add(path)
    return path


def main(argv=None):
    args = parse_args(argv)
    run = devices.setup(args.device, "", args.precision)
    net = models.load(args.checkpoint).to(run.device, memory_format=torch.channels_last)
    if not hasattr(net, "box_weights"):
        raise WeightsError(f"{args.checkpoint}: a {net.name}; give the checkpoint of an SSD or a RetinaNet")
    names = net.classes or [f"class {label}" for label in range(net.num_classes)]
    files, out = find_pictures(args.pictures), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results, seconds, written = [], 0.0, set()
    for first in tqdm(range(0, len(files), args.batch_size), unit="batch", disable=None):
        part = files[first : first + args.batch_size]
        images = [read_image(file) for file in part]
        begun = time.perf_counter()
        found = detect(net, images, run, args.threshold)
        seconds += time.perf_counter() - begun
        for file, image, one in zip(part, images, found):
            labels = [names[label] for label in one["labels"].tolist()]
            boxes = [[round(side, 2) for side in box] for box in one["boxes"].tolist()]
            scores = [round(score, 4) for score in one["scores"].tolist()]
            results.append({"file": str(file), "boxes": boxes, "labels": labels, "scores": scores})
            drawn = pictures.draw(image, one["boxes"], one["labels"], names, one["scores"])
            F.to_pil_image(drawn).save(free_name(out, file.stem, written), quality=92)
    (out / "detections.json").write_text(json.dumps(results, indent=1) + "\n")
    boxes = sum(len(result["labels"]) for result in results)
    print(f"{len(files)} pictures at {len(files) / seconds:.1f} a second, {boxes} boxes scored above {args.threshold}")
    print(f"drawn pictures and detections.json are in {out}")
    return results


if __name__ == "__main__":
    flags.run(main, DataError, WeightsError)
