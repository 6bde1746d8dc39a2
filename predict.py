"""Run a trained network on images, folders, videos or nuScenes: writes annotated images and JSON files.

    python predict.py runs/drone/best.pt photos/ holiday.jpg "more/*.png"
    python predict.py runs/drone/best.pt clip.mp4 --every 5 --threshold 0.5 --classes car,person --out clip
    python predict.py runs/fusion/best.pt data/nuscenes --samples 20

The checkpoint of any training script contains the network, its classes and its input size. The output folder gets each
image with the predictions drawn on it, sheet.jpg with the first 36 of them, and

  detections.json  of a detector, in COCO's results format: a list of {"image_id", "category_id" (from 1), "bbox" (x, y,
                   w, h in pixels of the file), "score", "segmentation" (run lengths, if there are masks),
                   "category_name", "file_name", "frame" (of a video)}. images.json lists the images and classes in
                   COCO's format. An image_id is the number in the file's name if each name is a different number, as
                   in COCO; otherwise it counts from 1
  answers.json     of a classifier: a list of {"image_id", "file_name", "answers": [{"label", "name", "score"}]}
  submission.json  of a CenterFusion: nuScenes' submission format, boxes in the global frame
"""

import functools
import itertools
from pathlib import Path

import torch
from torchvision import tv_tensors
from tqdm import tqdm

import models
from data import loader, nuscenes, transforms, video_input
from data.nuscenes import splits
from data.nuscenes import transforms as nuscenes_transforms
from evaluation import prediction_files
from evaluation.nuscenes import to_submission, true_detections
from models import backbones, centerfusion
from ops import decode3d, nms
from ops.boxes import to_file_pixels
from ops.images import normalize
from ops.masks import paste_masks
from ops.radar import network_inputs
from training import cli, distributed
from utils import files, torch_files
from utils.errors import DataError, UsageError
from visualize import draw2d, draw3d
from visualize.gallery import Gallery

USAGE = "python predict.py CHECKPOINT INPUT [INPUT ...] [flags]"
STRIDE = 4  # input pixels per cell of CenterFusion's maps
THRESHOLDS = {"boxes": 0.4, "masks": 0.5, "fusion": 0.3, "classes": 0.0}  # default of --threshold by task
RADAR_FLAGS = {"radar_sweeps": 3, "pc_z_offset": 0.0, "pillar_dims": (1.5, 0.2, 0.2)}  # if not in the checkpoint
MAX_NAMED = 20  # classes that an error message lists


def parse_args(argv):
    parser = cli.ArgumentParser("predict.py", __doc__, USAGE)
    arg = parser.add_argument
    checkpoint = "a run folder (its best.pt, else last.pt), a checkpoint, or a published file"
    arg("checkpoint", metavar="CHECKPOINT", help=checkpoint)
    inputs = "images, videos, folders, quoted patterns; for CenterFusion the nuScenes folder"
    arg("inputs", nargs="+", metavar="INPUT", help=inputs)
    arg("--out", default="predictions", metavar="DIR", help="output folder")
    minimum = "minimum score, 0 to 1 (default: 0.4; with masks 0.5, CenterFusion 0.3, classifiers 0)"
    arg("--threshold", type=cli.probability, metavar="SCORE", help=minimum)
    arg("--classes", default="", metavar="NAME,NAME", help="predict only these classes")
    arg("--every", type=cli.positive, default=1, metavar="N", help="use every Nth frame of a video")
    arg("--batch-size", type=cli.positive, default=8, metavar="N", help="images per batch")
    cli.add_device_arguments(arg)
    size = "input size in pixels: height and width, or one number for both; of a RetinaNet or Mask R-CNN the shortest "
    size += "side and the maximum of the longest; default: that of the checkpoint or of the published weights"
    cli.add_weights_arguments(parser, size)
    arg = parser.add_argument_group("nuScenes, for CenterFusion").add_argument
    version = "folder of the tables (default: the first that exists of v1.0-mini, v1.0-trainval, v1.0-test)"
    arg("--version", default="", help=version)
    arg("--split", default="", help="mini_val, val, ... (default: the first with images, validation before training)")
    arg("--samples", type=cli.count, default=8, metavar="N", help="number of key frames, evenly spaced; 0: all")
    arg("--cache-dir", default="", metavar="DIR", help="where the parsed tables are kept; default: beside them")
    return parser.parse(argv)


def task_of(net):
    """What a network predicts: a key of THRESHOLDS."""
    if net.name in backbones.NETWORKS:
        return "classes"
    return "fusion" if net.name in centerfusion.NETWORKS else getattr(net, "task", "boxes")


def select_labels(text, names):
    """The labels of --classes, int64; all if the text is empty. Raises UsageError."""
    selected = [name.strip() for name in text.split(",") if name.strip()] or names
    unknown = [name for name in selected if name not in names]
    if unknown:
        known = ", ".join(names[:MAX_NAMED]) + ", ..." * (len(names) > MAX_NAMED)
        raise UsageError(f"--classes: no class {', '.join(unknown)}; there are {known}")
    return torch.tensor([label for label, name in enumerate(names) if name in selected])


def read_images(paths, every, report):
    """Yields (path, number of the frame or None, uint8 [3,H,W]); report(error) is called for unreadable files."""
    for path in paths:
        try:
            for number, image in video_input.read_frames(path, every):
                yield path, number, image
        except DataError as error:
            report(error)


def batches(items, size):
    """Lists of `size` items; the last may be shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def select(detections, threshold, labels):
    """The detections with a score of at least `threshold` and one of `labels`, on the CPU."""
    detections = {name: value.cpu() for name, value in detections.items()}
    keep = (detections["scores"] >= threshold) & torch.isin(detections["labels"], labels)
    return {name: value[keep] for name, value in detections.items()}


@torch.no_grad()
def classify(net, images, run, threshold, labels):
    """The five top-scoring of `labels` for each image (uint8 [3,H,W]): a dict of labels and scores, 0 to 1, each."""
    crop = transforms.classification_eval(net.image_size[0], net.image_size[0])
    batch = torch.stack([crop(image) for image in images]).to(run.device, non_blocking=True)
    with run.autocast():
        logits = net(normalize(batch, net.image_mean, net.image_std))
    scores, indices = logits.float().softmax(1).cpu()[:, labels].topk(min(5, len(labels)))
    return [select({"labels": labels[row], "scores": score}, threshold, labels) for row, score in zip(indices, scores)]


@torch.no_grad()
def detect(net, images, run, threshold, labels):
    """Detections in each image (uint8 [3,H,W], any size): a dict of boxes in pixels of that image, labels, scores and,
    if the network has them, masks as probabilities within the box [N,28,28]."""
    if net.image_size:
        resize, collate = transforms.ssd_eval(net.image_size), loader.PadCollate(1)
    else:
        resize, collate = transforms.multiscale_eval(net.min_side, net.max_side), loader.PadCollate(32)
    samples = [resize(tv_tensors.Image(image), empty_target(image)) for image in images]
    detections = [None] * len(samples)
    for rows in collate.groups(image.shape[-2:] for image, _ in samples):  # as in evaluation: of one padded shape
        found = detect_in_batch(net, *collate([samples[row] for row in rows]), run, threshold)
        for row, detection in zip(rows, found, strict=True):
            detections[row] = select(detection, threshold, labels)
    return detections


def detect_in_batch(net, batch, targets, run, threshold):
    """`detect` in a padded batch (uint8 [B,3,H,W]), of all classes."""
    size, shapes = tuple(batch.shape[-2:]), [target["shape"] for target in targets]
    pixels = normalize(batch.to(run.device, non_blocking=True), net.image_mean, net.image_std, shapes)
    with run.autocast():
        outputs = net(pixels, shapes) if task_of(net) == "masks" else net(pixels)
    if task_of(net) == "masks":
        detections = outputs
    elif net.image_size:
        detections = nms.ssd_detections(outputs, net.anchors(size), net.box_weights, size, threshold)
    else:
        anchors, levels = net.anchors(size), net.level_sizes(size)
        detections = nms.retinanet_detections(outputs, anchors, net.box_weights, shapes, levels, threshold)
    return to_file_pixels(detections, targets)


def empty_target(image):
    """The target of an image without annotations."""
    size, empty = tuple(image.shape[-2:]), torch.zeros(0)
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
    return {"boxes": boxes, "labels": empty.long(), "ignore": empty.bool(), "image_id": 0, "size": size}


def summary(count, threshold):
    return f"{count} boxes with a score of at least {threshold}{'' if count else ': try a lower --threshold'}"


def predict_images(net, task, names, args, run, threshold, labels):
    """Predict all images of the inputs with any network but CenterFusion; returns the rows of the JSON file."""
    predict, paths = classify if task == "classes" else detect, video_input.find_files(args.inputs, args.out)
    ids, counter = video_input.image_ids(paths), itertools.count(1)
    gallery, rows, infos = Gallery(args.out), [], []
    progress = tqdm(read_images(paths, args.every, gallery.report), unit="image", disable=None)
    for batch in batches(progress, args.batch_size):
        with gallery.timed(len(batch)):
            predictions = predict(net, [image for *_, image in batch], run, threshold, labels)
        for (path, frame, image), prediction in zip(batch, predictions):
            info = {"id": ids[path] if ids else next(counter), "file_name": str(path)}
            info |= {"height": image.shape[1], "width": image.shape[2]} | ({} if frame is None else {"frame": frame})
            infos.append(info)
            if task == "classes":
                drawn = draw2d.draw_classes(image, prediction["labels"], prediction["scores"], names)
                rows.append(prediction_files.classification(prediction, names, info))
            else:
                if task == "masks":
                    (prediction,) = paste_masks([prediction], [image.shape[-2:]])
                boxes, masks = prediction["boxes"], prediction.get("masks")
                drawn = draw2d.draw_boxes(image, boxes, prediction["labels"], names, prediction["scores"], masks)
                rows += prediction_files.coco(prediction, names, info)
            gallery.add(drawn, path.stem if frame is None else f"{path.stem}_{frame:06d}")
    if task == "classes":
        files.write_json(gallery.out / "answers.json", rows)
        gallery.close("the five top-scoring classes of each image")
    else:
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(names)]
        files.write_json(gallery.out / "detections.json", rows)
        files.write_json(gallery.out / "images.json", {"images": infos, "annotations": [], "categories": categories})
        gallery.close(summary(len(rows), threshold))
    return rows


def predict_nuscenes(net, names, args, run, threshold, labels):
    """Predict key frames of nuScenes with a CenterFusion; returns the submission."""
    if len(args.inputs) > 1 or not any(Path(args.inputs[0]).glob("v1.0-*/")):
        need = "nuScenes' calibration and radar: give its one folder, with v1.0-mini (or -trainval, -test) in it"
        raise UsageError(f"{', '.join(args.inputs)}: a CenterFusion needs {need}")
    saved = torch_files.read(args.checkpoint).get("flags") or {}
    flags, use_radar = {name: saved.get(name, value) for name, value in RADAR_FLAGS.items()}, net.arguments["radar"]
    radar = nuscenes.RadarOptions(
        flags["radar_sweeps"] * use_radar, net.arguments["max_distance"], flags["pc_z_offset"]
    )
    dataset = nuscenes.load_available(args.inputs[0], args.version, args.split, radar, args.cache_dir or None)
    key_frames, resize = (
        splits.select_key_frames(dataset, args.samples),
        nuscenes_transforms.centerfusion_eval(net.image_size),
    )
    print(f"{len(key_frames)} key frames (--samples) of {dataset.version}, {dataset.split}: {dataset.summary()}")
    maps = {"size": tuple(side // STRIDE for side in net.image_size), "stride": STRIDE}
    inputs_of = functools.partial(network_inputs, radar=use_radar, dims=flags["pillar_dims"], **maps)
    untrained = net.untrained_heads()
    gallery, targets, detections = Gallery(args.out), [], []
    for name, indices in tqdm(key_frames, unit="key frame", disable=None):
        samples, predicted = [], []
        for index in indices:
            try:
                samples.append(dataset.load(index))
            except DataError as error:
                gallery.report(error)
        for batch in batches(samples, args.batch_size):
            with gallery.timed(len(batch)), torch.no_grad():
                images, resized = loader.collate([resize(*sample) for sample in batch], inputs_of)
                inputs, images = resized.to(run.device), images.to(run.device, non_blocking=True).flip(1)  # BGR
                with run.autocast():
                    outputs = net(normalize(images, net.image_mean, net.image_std), **inputs)
                decoded = decode3d.decode(outputs, resized, STRIDE, without=untrained)
                predicted += [select(detection, threshold, labels) for detection in decoded]
        if samples:
            truth = [true_detections(target) for _, target in samples]
            gallery.add(draw3d.draw_key_frame(samples, truth, predicted, names), name)
            fields = ("image_id", "sample_token", "rotation", "translation")  # not the radar points, which are many
            targets += [{field: target[field] for field in fields} for _, target in samples]
            detections += predicted
    submission = to_submission(targets, detections, use_radar)
    files.write_json(gallery.out / "submission.json", submission)
    gallery.close(summary(sum(len(detection["labels"]) for detection in detections), threshold))
    return submission


def main(argv=None):
    args = parse_args(argv)
    run = distributed.init_device(args.device, "", args.precision)
    args.checkpoint = torch_files.find_checkpoint(args.checkpoint)
    net = models.load(args.checkpoint, args.labels, args.size, args.priors)
    net.to(run.device, memory_format=torch.channels_last)
    names = net.classes or [f"class {label}" for label in range(net.num_classes)]
    task, labels = task_of(net), select_labels(args.classes, names)
    if task == "classes" and args.size and args.size[0] != args.size[1]:
        raise UsageError(f"--size {args.size[0]} {args.size[1]}: a classifier's input is a square; give one number")
    threshold = THRESHOLDS[task] if args.threshold is None else args.threshold
    print(f"{models.summary(net)}, {len(names)} classes, {distributed.describe(run)}")
    if task == "fusion":
        return predict_nuscenes(net, names, args, run, threshold, labels)
    if args.version or args.split:
        raise UsageError(f"--version and --split are for CenterFusion, and this is a {net.name}")
    return predict_images(net, task, names, args, run, threshold, labels)


if __name__ == "__main__":
    cli.run(main)
