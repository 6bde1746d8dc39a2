"""Run a trained network on images, videos, cameras or nuScenes, draw its predictions and write them as JSON.

    python predict.py runs/drone/best.pt photos/ holiday.jpg "more/*.png"
    python predict.py runs/drone/best.pt clip.mp4 --every 5 --threshold 0.5 --classes car,person --out clip
    python predict.py runs/drone/best.pt 0
    python predict.py runs/coco/best.pt data/coco/val2017 --annotations data/coco/annotations/instances_val2017.json
    python predict.py runs/fusion/best.pt data/nuscenes --samples 20
    python predict.py runs/fusion/best.pt road.mp4 --calib camera.txt

The checkpoint of any training script contains the network, its classes and its input size. 0 is the first camera of the
machine; URLs such as rtsp://... work too, and Ctrl-C ends them. The output folder gets each image, and one video per
video, with the predictions drawn on it, sheet.jpg with up to 36 of the images, and

  images.json           the images and classes in COCO's format. An image has the same id in all JSON files: COCO's own
                        with --annotations; otherwise the number in the file's name if each name is a different number,
                        as in COCO; otherwise it counts from 1
  detections.json       of a detector, in COCO's results format: a list of {"image_id", "category_id" (from 1, or COCO's
                        own), "bbox" (x, y, w, h in pixels of the file), "score", "segmentation" (run lengths, if there
                        are masks), "category_name", "file_name", "frame" (of a video)}
  classifications.json  of a classifier: a list of {"image_id", "file_name", "predictions": [{"label", "name",
                        "score"}]}
  detections_3d.json    of a CenterFusion on images: as detections.json, and in the camera's frame (x right, y down,
                        z forward) "center" x, y, z and "size" h, w, l in meters, "yaw" about y in radians, 0 along x,
                        "velocity" x, y, z in m/s, "attribute"
  submission.json       of a CenterFusion on nuScenes: its submission format, boxes in the global frame
"""

import functools
import itertools
from pathlib import Path

import torch
from torchvision import tv_tensors
from tqdm import tqdm

import models
from data import cameras, loader, nuscenes, transforms, video_input
from data.nuscenes import splits
from data.nuscenes import transforms as nuscenes_transforms
from evaluation import prediction_files
from evaluation.nuscenes import to_submission, true_detections
from models import backbones, centerfusion
from ops import decode3d, nms
from ops.boxes import to_file_pixels
from ops.geometry import apply_affine, invert_affine
from ops.images import normalize
from ops.masks import paste_masks
from ops.radar import network_inputs
from training import cli, distributed
from training.signals import StopSignals
from utils import files, torch_files
from utils.errors import DataError, UsageError
from visualize import draw2d, draw3d
from visualize.gallery import Gallery

USAGE = "python predict.py CHECKPOINT INPUT [INPUT ...] [flags]"
STRIDE = 4  # input pixels per cell of CenterFusion's maps
THRESHOLDS = {"boxes": 0.4, "masks": 0.5, "fusion": 0.3, "classes": 0.0}  # default of --threshold by task
JSON_FILES = {"classes": "classifications.json", "fusion": "detections_3d.json"}  # by task; of others detections.json
RADAR_FLAGS = {"radar_sweeps": 3, "pc_z_offset": 0.0, "pillar_dims": (1.5, 0.2, 0.2)}  # if not in the checkpoint
MAX_NAMED = 20  # classes that an error message lists
SOURCE_FLAGS = ("every", "save_frames", "annotations", "calib")
NUSCENES_FLAGS = ("version", "split", "samples", "cache_dir")


def parse_args(argv):
    parser = cli.ArgumentParser("predict.py", __doc__, USAGE)
    arg = parser.add_argument
    checkpoint = "a run folder (its best.pt, else last.pt), a checkpoint, or a published file"
    arg("checkpoint", metavar="CHECKPOINT", help=checkpoint)
    inputs = "images, videos, folders, quoted patterns, the number of a camera, a URL, the nuScenes folder"
    arg("inputs", nargs="+", metavar="INPUT", help=inputs)
    arg("--out", default="predictions", metavar="DIR", help="output folder")
    arg("--overwrite", action="store_true", help="delete the files of an earlier prediction in --out, and no others")
    minimum = "minimum score, 0 to 1 (default: 0.4; with masks 0.5, CenterFusion 0.3, classifiers 0)"
    arg("--threshold", type=cli.score, metavar="SCORE", help=minimum)
    arg("--classes", default="", metavar="NAME,NAME", help="predict only these classes")
    arg("--every", type=cli.positive, metavar="N", help="use every Nth frame of a video or camera")
    arg("--save-frames", action="store_true", help="also write each frame of a video as an image")
    arg("--annotations", metavar="FILE", help="COCO annotations of the images: the JSON files take their ids from it")
    arg("--batch-size", type=cli.positive, default=8, metavar="N", help="images per batch")
    cli.add_device_arguments(arg)
    size = "input size in pixels: height and width, or one number for both; of a RetinaNet or Mask R-CNN the shortest "
    size += "side and the maximum of the longest; default: that of the checkpoint or of the published weights"
    cli.add_weights_arguments(parser, size)
    arg = parser.add_argument_group("CenterFusion on nuScenes").add_argument
    version = "folder of the tables (default: the first that exists of v1.0-mini, v1.0-trainval, v1.0-test)"
    arg("--version", help=version)
    arg("--split", help="mini_val, val, ... (default: the first with images, validation before training)")
    arg("--samples", type=cli.count, metavar="N", help="number of key frames, evenly spaced; 0: all (default: 8)")
    arg("--cache-dir", metavar="DIR", help="folder of the parsed tables; default: beside the tables")
    arg = parser.add_argument_group("CenterFusion on images and videos, without radar").add_argument
    calib = f"matrix of the camera, {cameras.FORMATS}; default: focal length {cameras.USUAL_FOCAL_LENGTH} image widths"
    arg("--calib", metavar="FILE", help=calib)
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


@torch.no_grad()
def detect_3d(net, samples, run, threshold, labels, dims=RADAR_FLAGS["pillar_dims"], without=()):
    """Detections of ops.decode3d in camera images, but boxes in pixels of the file.

    samples   (image uint8 [3,H,W], target with calib, affine and radar) each
    dims      of radar pillars; without: untrained heads
    """
    resize = nuscenes_transforms.centerfusion_eval(net.image_size)
    maps = {"size": tuple(side // STRIDE for side in net.image_size), "stride": STRIDE}
    inputs_of = functools.partial(network_inputs, radar=net.arguments["radar"], dims=dims, **maps)
    images, resized = loader.collate([resize(*sample) for sample in samples], inputs_of)
    inputs, images = resized.to(run.device), images.to(run.device, non_blocking=True).flip(1)  # BGR
    with run.autocast():
        outputs = net(normalize(images, net.image_mean, net.image_std), **inputs)
    detections = decode3d.decode(outputs, resized, STRIDE, without=without)
    for detection, target in zip(detections, resized):
        corners = apply_affine(detection["boxes"].view(-1, 2), invert_affine(target["affine"])).view(-1, 2, 2)
        height, width = target["size"]
        detection["boxes"] = corners.clamp(min=0).minimum(corners.new_tensor([width, height])).flatten(1)
    return [select(detection, threshold, labels) for detection in detections]


def predict_camera(net, images, run, threshold, labels, calib, without):
    """`detect_3d` in images (uint8 [3,H,W]) of a camera alone, each detection with the calib [3,4] of its image."""
    samples = [(tv_tensors.Image(image), cameras.target(image, calib)) for image in images]
    detections = detect_3d(net, samples, run, threshold, labels, without=without)
    return [(detection, target["calib"]) for detection, (_, target) in zip(detections, samples)]


def predictor(net, task, calib):
    """A function of (net, images, run, threshold, labels) that returns a prediction for each image."""
    if task != "fusion":
        return classify if task == "classes" else detect
    line = "a camera alone, without radar"
    if net.arguments["radar"]:
        line += ": this network was trained with radar, and now depth and velocity come from the image"
    if calib is None:
        line += f"; no --calib: a focal length of {cameras.USUAL_FOCAL_LENGTH} image widths is assumed"
    print(line)
    return functools.partial(predict_camera, calib=calib, without=net.untrained_heads())


def describe(task, image, prediction, categories, info):
    """An image (uint8 [3,H,W]) with its prediction drawn on it, and the rows of the JSON file."""
    names = [category["name"] for category in categories]
    if task == "classes":
        drawn = draw2d.draw_classes(image, prediction["labels"], prediction["scores"], names)
        return drawn, [prediction_files.classification(prediction, names, info)]
    if task == "fusion":
        prediction, calib = prediction
        info["calib"] = calib.tolist()
        drawn = draw3d.draw_image(image, prediction, calib, names)
        return drawn, prediction_files.boxes_3d(prediction, categories, info)
    if task == "masks":
        (prediction,) = paste_masks([prediction], [image.shape[-2:]])
    objects = (prediction.get(name) for name in ("scores", "masks"))
    drawn = draw2d.draw_boxes(image, prediction["boxes"], prediction["labels"], names, *objects, draw2d.MIN_SIDE)
    return drawn, prediction_files.coco(prediction, categories, info)


def summary(count, threshold):
    return f"{count} boxes with a score of at least {threshold}{'' if count else ': try a lower --threshold'}"


def predict_images(net, task, names, args, run, threshold, labels):
    """Predict all images, videos and streams of the inputs; returns the path of the JSON file."""
    sources = video_input.find_sources(args.inputs, args.out)
    if not any(map(video_input.has_frames, sources)):
        cli.refuse(args, ("every", "save_frames"), "is for videos and cameras, and there is none among the inputs")
    categories, ids = prediction_files.categories(names), video_input.numbers_in_names(sources)
    if args.annotations:
        ids, categories = prediction_files.coco_ids(args.annotations, sources, names)
        labels = prediction_files.known(labels, categories, args.annotations)
    predict = predictor(net, task, cameras.read_calib(args.calib) if args.calib else None)
    gallery, every, counter = Gallery(args.out, args.overwrite, args.save_frames), args.every or 1, itertools.count(1)
    path, images_path = (gallery.claim(name) for name in (JSON_FILES.get(task, "detections.json"), "images.json"))
    images_json = prediction_files.images_json(images_path, categories, {"radar": False} if task == "fusion" else {})
    with StopSignals(run) as stop, gallery.writing(), prediction_files.JsonList(path) as rows, images_json as infos:
        frames = video_input.read_images(sources, every, gallery.report)
        frames = itertools.takewhile(lambda _: not stop.requested(), frames)
        total = video_input.count_images(sources, every)
        for batch in batches(tqdm(frames, total=total, unit="image", disable=None), args.batch_size):
            with gallery.timed(len(batch)):
                predictions = predict(net, [frame.image for _, frame in batch], run, threshold, labels)
            for (source, frame), prediction in zip(batch, predictions):
                info = {"id": ids[source] if ids else next(counter), "file_name": video_input.name(source)}
                info |= {"height": frame.image.shape[1], "width": frame.image.shape[2]}
                info |= {} if frame.number is None else {"frame": frame.number}
                drawn, new_rows = describe(task, frame.image, prediction, categories, info)
                infos.add(info)
                rows.add(*new_rows)
                gallery.add(drawn, video_input.stem(source), frame, source)
    gallery.close("the five top-scoring classes of each image" if task == "classes" else summary(rows.count, threshold))
    if stop.signal and not video_input.is_stream(sources[0]):  # a stream is ended in no other way
        raise SystemExit(stop.exit_code)
    return path


def predict_nuscenes(net, names, args, run, threshold, labels):
    """Predict key frames of nuScenes with a CenterFusion; returns the path of the submission."""
    saved = torch_files.read(args.checkpoint).get("flags") or {}
    flags, use_radar = {name: saved.get(name, value) for name, value in RADAR_FLAGS.items()}, net.arguments["radar"]
    radar = nuscenes.RadarOptions(
        flags["radar_sweeps"] * use_radar, net.arguments["max_distance"], flags["pc_z_offset"]
    )
    version, split, cache = args.version or "", args.split or "", args.cache_dir or None
    dataset = nuscenes.load_available(args.inputs[0], version, split, radar, cache)
    key_frames = splits.select_key_frames(dataset, 8 if args.samples is None else args.samples)
    print(f"{len(key_frames)} key frames (--samples) of {dataset.version}, {dataset.split}: {dataset.summary()}")
    untrained = net.untrained_heads()
    gallery, targets, detections = Gallery(args.out, args.overwrite), [], []
    path = gallery.claim("submission.json")
    progress = tqdm(total=sum(len(indices) for _, indices in key_frames), unit="image", disable=None)
    with gallery.writing(), progress:
        for name, indices in key_frames:
            samples, predicted = [], []
            for index in indices:
                try:
                    samples.append(dataset.load(index))
                except DataError as error:
                    gallery.report(error)
            for batch in batches(samples, args.batch_size):
                with gallery.timed(len(batch)):
                    predicted += detect_3d(net, batch, run, threshold, labels, flags["pillar_dims"], untrained)
                progress.update(len(batch))
            if samples:
                truth = [true_detections(target) for _, target in samples]
                gallery.add(draw3d.draw_key_frame(samples, truth, predicted, names), name)
                fields = ("image_id", "sample_token", "rotation", "translation")  # not the radar points, which are many
                targets += [{field: target[field] for field in fields} for _, target in samples]
                detections += predicted
        files.write_json(path, to_submission(targets, detections, use_radar))
    gallery.close(summary(sum(len(detection["labels"]) for detection in detections), threshold))
    return path


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
    if task == "fusion" and any(any(Path(text).glob("v1.0-*/")) for text in args.inputs):
        if len(args.inputs) > 1:
            raise UsageError(f"{', '.join(args.inputs)}: give nuScenes' folder alone")
        cli.refuse(args, SOURCE_FLAGS, "is for images and videos, and this is nuScenes' folder")
        return predict_nuscenes(net, names, args, run, threshold, labels)
    what = f"this is a {net.name}" if task != "fusion" else "no input is one (a folder with v1.0-mini or another in it)"
    cli.refuse(args, NUSCENES_FLAGS, f"is for CenterFusion on nuScenes' folder, and {what}")
    if task != "fusion":
        cli.refuse(args, ("calib",), f"is for CenterFusion, and this is a {net.name}")
    return predict_images(net, task, names, args, run, threshold, labels)


if __name__ == "__main__":
    cli.run(main)
