"""Run a trained network on pictures: drawn pictures and JSON come out.

    python predict.py runs/drone/best.pt photos/ holiday.jpg "more/*.png"
    python predict.py runs/drone/best.pt clip.mp4 --every 5 --threshold 0.5 --classes car,person --out found
    python predict.py runs/fusion/best.pt data/nuscenes --samples 20

The checkpoint of any training script brings the network, its classes and its input size. OUT gets every picture, drawn,
sheet.jpg with the first of them, and

  detections.json  of a detector: COCO's form of results, a list of {"image_id", "category_id" (from 1), "bbox" (x, y,
                   w, h in pixels of the file), "score", "segmentation" (run lengths, of masks), "category_name",
                   "file_name", "frame" (of a video)}. images.json holds the pictures and classes in COCO's form; an
                   image_id is the number that the file is called, as in COCO, or else counted from 1
  answers.json     of a classifier: a list of {"image_id", "file_name", "answers": [{"label", "name", "score"}]}
  submission.json  of CenterFusion: nuScenes' own form, in the global frame
"""

import argparse
import itertools
from pathlib import Path

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

import models
from data import DataError, frames, key_frames, loader, nuscenes_transforms, transforms
from evaluation import nuscenes, results
from evaluation.rows import write_json
from models import WeightsError, backbones, centerfusion, published
from ops import masks, suppress
from ops.boxes import in_file_pixels
from ops.geometry import apply_affine, corners, project, seen
from ops.images import normalize
from ops.radar import inputs
from training import devices, flags, pictures, pictures3d
from training.album import Album

STRIDE = 4  # input pixels a cell of CenterFusion's maps
THRESHOLDS = {"boxes": 0.4, "masks": 0.5, "fusion": 0.3, "classes": 0.0}
CAMERA = (450, 800)  # (h, w) of a camera's picture in an overview
REACH, PILLAR = 60.0, 1.5  # metres from the vehicle that it shows, and height of a radar return in it
SUBMITTED = ("image_id", "sample_token", "camera", "rotation", "translation")  # of a target, for the submission
RADAR = {"radar_sweeps": 3, "pc_z_offset": 0.0, "pillar_dims": (1.5, 0.2, 0.2)}  # where the checkpoint does not say


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="predict.py", description=__doc__, formatter_class=flags.HelpFormatter)
    arg = parser.add_argument
    arg("checkpoint", help="best.pt or last.pt of a run, or a published detector's file")
    arg("inputs", nargs="+", help="pictures, videos, folders, patterns in quotes; for CenterFusion nuScenes' folder")
    arg("--out", default="predictions", help="folder for what comes out")
    least = ", ".join(f"{task} {value}" for task, value in THRESHOLDS.items())
    arg("--threshold", type=flags.number(float, 0), help=f"least score, 0 to 1 (default: {least})")
    arg("--classes", default="", metavar="NAME,NAME", help="look for these alone")
    arg("--every", type=flags.number(int, 1), default=1, help="take each so many frames of a video")
    arg("--batch-size", type=flags.number(int, 1), default=8, help="pictures at a time")
    arg("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    arg("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the network")
    arg = parser.add_argument_group("nuScenes, for CenterFusion").add_argument
    arg("--version", default="", help="folder of the tables (default: the first there of v1.0-mini, -trainval, -test)")
    arg("--split", default="", help="mini_val, val, ... (default: what the tables have, validation first)")
    arg("--samples", type=flags.number(int, 0), default=8, help="key frames, from all over the split; 0: all")
    arg("--cache-dir", default="", metavar="DIR", help="where the tables are kept as arrays; else beside them")
    return flags.parse(parser, argv)


def task_of(net):
    """What comes out of a network: a key of THRESHOLDS."""
    if net.name in backbones.NETWORKS:
        return "classes"
    return "fusion" if net.name in centerfusion.NETWORKS else getattr(net, "task", "boxes")


def labels_of(text, names):
    """The labels of --classes, int64, or of all classes where there is no text. Raises UsageError."""
    asked = [name.strip() for name in text.split(",") if name.strip()] or names
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise flags.UsageError(f"--classes: no class {', '.join(unknown)}; there are {', '.join(names)}")
    return torch.tensor([label for label, name in enumerate(names) if name in asked])


def readable(files, every, tell):
    """Yields (file, number of the frame or None, uint8 [3,H,W]); tell: takes the DataError of what cannot be read."""
    for file in files:
        try:
            for number, image in frames.read_frames(file, every):
                yield file, number, image
        except DataError as fault:
            tell(fault)


def batches(items, size):
    """Lists of `size` items, the last of fewer."""
    items = iter(items)
    while part := list(itertools.islice(items, size)):
        yield part


def chosen(found, threshold, wanted):
    """What has a score of `threshold` or more and one of the wanted labels, on the CPU."""
    found = {name: value.cpu() for name, value in found.items()}
    keep = (found["scores"] >= threshold) & torch.isin(found["labels"], wanted)
    return {name: value[keep] for name, value in found.items()}


@torch.no_grad()
def classify(net, images, run, threshold, wanted):
    """The five best of the wanted labels for images (each uint8 [3,H,W]), one dict each: labels, scores 0 to 1."""
    middle = transforms.classify_evaluate(net.image_size[0], net.image_size[0])
    batch = torch.stack([middle(image) for image in images]).to(run.device)
    with run.autocast():
        logits = net(normalize(batch, net.image_mean, net.image_std))
    scores, place = logits.float().softmax(1).cpu()[:, wanted].topk(min(5, len(wanted)))
    answers = [{"labels": wanted[row], "scores": score} for row, score in zip(place, scores)]
    return [chosen(one, threshold, wanted) for one in answers]


@torch.no_grad()
def detect(net, images, run, threshold, wanted):
    """Detections for images (each uint8 [3,H,W], any size), one dict each: boxes in pixels of that image, labels,
    scores and, if the network has them, masks as probabilities within the box [N,28,28]."""
    if net.image_size:
        resize, collate = transforms.ssd_evaluate(net.image_size), loader.PadCollate(1)
    else:
        resize, collate = transforms.pyramid_evaluate(net.min_side, net.max_side), loader.PadCollate(32)
    samples = [resize(tv_tensors.Image(image), unknown(image)) for image in images]
    batch, targets = collate(samples)
    size, shapes = tuple(batch.shape[-2:]), [target["shape"] for target in targets]
    pixels = normalize(batch.to(run.device), net.image_mean, net.image_std, shapes)
    with run.autocast():
        outputs = net(pixels, shapes) if task_of(net) == "masks" else net(pixels)
    if task_of(net) == "masks":
        found = outputs
    elif net.image_size:
        found = suppress.from_multibox(outputs, net.anchors(size), net.box_weights, size, threshold)
    else:
        levels = net.level_sizes(size)
        found = suppress.from_pyramid(outputs, net.anchors(size), net.box_weights, shapes, levels, threshold)
    return [chosen(one, threshold, wanted) for one in in_file_pixels(found, targets)]


def unknown(image):
    """The target of a picture of which nothing is known."""
    size = tuple(image.shape[-2:])
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
    nothing = torch.zeros(0)
    return {"boxes": boxes, "labels": nothing.long(), "ignore": nothing.bool(), "image_id": 0, "size": size}


def drawn_answers(image, found, names):
    texts = [names[label] for label in found["labels"].tolist()]
    colours = [pictures.class_colour(label) for label in found["labels"].tolist()]
    return pictures.with_answers(image, texts, colours, found["scores"].tolist())


def counted(boxes, threshold):
    """One line of what was found."""
    return f"{boxes} boxes with a score from {threshold} on{'' if boxes else ': try a lower --threshold'}"


def drawn_key_frame(samples, detections, names):
    """The cameras of a key frame with boxes and radar, and all of it from above: uint8 [3,H,W].

    samples: [(image, target)] in pixels of the files. From above the first camera looks up.
    """
    views, sides, radar, base = {}, ([], []), [], samples[0][1]
    for (image, target), found in zip(samples, detections):
        small = F.resize_image(image, list(CAMERA), antialias=True)
        affine = torch.tensor([[CAMERA[1] / image.shape[-1], 0, 0], [0, CAMERA[0] / image.shape[-2], 0]])
        _, pixels, depth = seen(found, target["calib"], affine)
        points, above = target["radar"][:, :3], target["radar"].new_tensor([0, PILLAR, 0])
        (feet, distances), (tops, _) = (project(ends, target["calib"]) for ends in (points, points - above))
        said = zip(found["labels"].tolist(), found["scores"].tolist(), found["center"][:, 2].tolist())
        texts = [f"{names[label]} {score:.2f}, {ahead:.0f} m" for label, score, ahead in said]
        pillars = {"tops": apply_affine(tops, affine), "texts": texts}
        shown = (pixels, depth, found["labels"], apply_affine(feet, affine), distances, REACH)
        views[target["camera"]] = pictures3d.on_camera(small, *shown, **pillars)
        turn = (base["rotation"].mT @ target["rotation"]).float()  # from this camera's frame to the first one's
        move = (base["rotation"].mT @ (target["translation"] - base["translation"])).float()
        for side, boxes in zip(sides, (nuscenes.truth(target), found)):
            solid = corners(boxes["center"], boxes["dims"], boxes["yaw"])
            side.append({"corners": solid @ turn.T + move, "center": boxes["center"] @ turn.T + move})
            side[-1]["velocity"] = boxes["velocity"] @ turn.T
        motion = target["radar"][:, 3:] @ turn.T[::2, ::2]
        radar.append(torch.cat([points @ turn.T + move, motion], dim=1))
    truth, found = ({name: torch.cat([one[name] for one in side]) for name in side[0]} for side in sides)
    above = pictures3d.from_above(truth, found, torch.cat(radar), REACH, 2 * CAMERA[0], around=base["camera"])
    return pictures3d.overview(views, above, CAMERA)


def predict_key_frames(net, names, args, run, threshold, wanted):
    """What `main` does for a CenterFusion, on nuScenes -> the submission."""
    saved = published.read(args.checkpoint).get("flags") or {}
    told = {name: saved.get(name, value) for name, value in RADAR.items()}
    if len(args.inputs) > 1 or not any(Path(args.inputs[0]).glob("v1.0-*/")):
        need = "nuScenes' calibration and radar: give its one folder, with v1.0-mini (or -trainval, -test) in it"
        raise flags.UsageError(f"{', '.join(args.inputs)}: a network of CenterFusion needs {need}")
    radar = {"sweeps": told["radar_sweeps"] * net.arguments["radar"], "z_offset": told["pc_z_offset"]}
    radar |= {"max_distance": net.arguments["max_distance"], "skip_missing": True, "cache": args.cache_dir or None}
    dataset = key_frames.load(args.inputs[0], args.version, args.split, **radar)
    how = {"mean": net.image_mean, "std": net.image_std, "device": run.device, "dims": told["pillar_dims"]}
    how |= {"radar": net.arguments["radar"], "stride": STRIDE}
    moments, resize = key_frames.choose(dataset, args.samples), nuscenes_transforms.evaluate(net.image_size)
    print(f"{len(moments)} key frames (--samples) of {dataset.version}, {dataset.split}: {dataset.summary()}")
    album, targets, detections = Album(args.out), [], []
    for name, indices in tqdm(moments, unit="key frame", disable=None):
        samples, found = [], []
        for index in indices:
            try:
                samples.append(dataset.load(index))
            except DataError as fault:
                album.tell(fault)
        for part in batches(samples, args.batch_size):
            with album.clock(len(part)):
                images, resized = loader.collate([resize(*sample) for sample in part])
                with torch.no_grad(), run.autocast():
                    outputs = net(*inputs(images, resized, **how))
                boxes = nuscenes.decode(outputs, resized, STRIDE, without=nuscenes.untrained(net))
                found += [chosen(one, threshold, wanted) for one in boxes]
        if samples:
            album.add(drawn_key_frame(samples, found, names), name, name)
            targets += [{name: target[name] for name in SUBMITTED} for _, target in samples]
            detections += found
    submission = results.as_submission(targets, detections, ("camera", *["radar"] * net.arguments["radar"]))
    write_json(album.out / "submission.json", submission)
    album.close(counted(sum(len(one["labels"]) for one in detections), threshold))
    return submission


def main(argv=None):
    args = parse_args(argv)
    run = devices.setup(args.device, "", args.precision)
    net = models.load(args.checkpoint).to(run.device, memory_format=torch.channels_last)
    names = net.classes or [f"class {label}" for label in range(net.num_classes)]
    task, wanted = task_of(net), labels_of(args.classes, names)
    threshold = THRESHOLDS[task] if args.threshold is None else args.threshold
    print(f"{net.name}, {len(names)} classes, {devices.describe(run)}")
    if task == "fusion":
        return predict_key_frames(net, names, args, run, threshold, wanted)
    if args.version or args.split:
        raise flags.UsageError(f"--version and --split are for networks of CenterFusion, and this is {net.name}")
    network, files = classify if task == "classes" else detect, frames.find(args.inputs, args.out)
    numbers, others = frames.numbers_of(files), itertools.count(1)
    album, rows, images = Album(args.out), [], []
    shown = tqdm(readable(files, args.every, album.tell), unit="picture", disable=None)
    for part in batches(shown, args.batch_size):
        with album.clock(len(part)):
            answers = network(net, [image for *_, image in part], run, threshold, wanted)
        for (file, frame, image), found in zip(part, answers):
            about = {"id": numbers[file] if numbers else next(others), "file_name": str(file)}
            about |= {"height": image.shape[1], "width": image.shape[2]} | ({} if frame is None else {"frame": frame})
            images.append(about)
            if task == "classes":
                drawn = drawn_answers(image, found, names)
                rows.append(results.as_answers(found, names, about))
            else:
                if task == "masks":
                    (found,) = masks.pasted([found], [image.shape[-2:]])
                shown_boxes = (found["boxes"], found["labels"], names, found["scores"], found.get("masks"))
                drawn = pictures.draw(image, *shown_boxes)
                rows += results.as_coco(found, names, about)
            stem = file.stem if frame is None else f"{file.stem}_{frame:06d}"
            album.add(drawn, stem, stem)
    if task == "classes":
        write_json(album.out / "answers.json", rows)
    else:
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(names)]
        write_json(album.out / "detections.json", rows)
        write_json(album.out / "images.json", {"images": images, "annotations": [], "categories": categories})
    album.close("the five best answers a picture" if task == "classes" else counted(len(rows), threshold))
    return rows


if __name__ == "__main__":
    flags.run(main, DataError, WeightsError)
