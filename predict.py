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

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds
    from utils import interrupts

    interrupts.install()

import functools
import itertools
from pathlib import Path

import torch
from tqdm import tqdm

import models
from data import cameras, nuscenes, video_input
from data.nuscenes import splits
from evaluation import prediction_files
from evaluation.nuscenes import to_submission, true_detections
from inference import classify, detect, detect_3d, detect_in_camera, task_of
from ops.masks import paste_masks
from training import cli, distributed
from training.signals import StopSignals
from utils import files, torch_files
from utils.errors import DataError, UsageError
from utils.labels import first_names
from visualize import draw2d, draw3d
from visualize.gallery import Gallery

USAGE = "python predict.py CHECKPOINT INPUT [INPUT ...] [flags]"
THRESHOLDS = {"boxes": 0.4, "masks": 0.5, "fusion": 0.3, "classes": 0.0}  # default of --threshold, by task_of(net)
JSON_FILES = {"classes": "classifications.json", "fusion": "detections_3d.json"}  # by task; of others detections.json
RADAR_FLAGS = {"radar_sweeps": 3, "pc_z_offset": 0.0, "pillar_dims": (1.5, 0.2, 0.2)}  # if not in the checkpoint
MAX_NAMED = 20  # classes that an error message lists
SUBMITTED = ("image_id", "sample_token", "rotation", "translation")  # of targets; their radar points are many
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


def select_labels(text, names):
    """The labels of --classes, int64; all if the text is empty. Raises UsageError."""
    selected = [name.strip() for name in text.split(",") if name.strip()] or names
    unknown = [name for name in selected if name not in names]
    if unknown:
        raise UsageError(f"--classes: no class {', '.join(unknown)}; there are {first_names(names, MAX_NAMED)}")
    return torch.tensor([label for label, name in enumerate(names) if name in selected])


def batches(items, size):
    """Lists of `size` items; the last may be shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


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
    return functools.partial(detect_in_camera, calib=calib, without=net.untrained_heads())


def describe(task, image, prediction, categories, info):
    """An image (uint8 [3,H,W]) with its prediction drawn on it, and the rows of the JSON file."""
    names = [category["name"] for category in categories]
    if task == "classes":
        drawn = draw2d.draw_classes(image, prediction["labels"], prediction["scores"], names)
        return drawn, [prediction_files.classification(prediction, names, info)]
    if task == "fusion":
        info["calib"] = prediction["calib"].tolist()
        drawn = draw3d.draw_image(image, prediction, prediction["calib"], names)
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
    with StopSignals(run) as stop, gallery, prediction_files.JsonList(path) as rows, images_json as infos:
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


def is_nuscenes(text):
    """Whether an input is a nuScenes folder: it contains v1.0-mini or another version."""
    return any(Path(text).glob("v1.0-*/"))


def radar_flags(checkpoint):
    """RADAR_FLAGS as the run of the checkpoint had them."""
    saved = torch_files.peek(checkpoint).get("flags") or {}
    return {name: saved.get(name, value) for name, value in RADAR_FLAGS.items()}


def load_samples(dataset, indices, report):
    """The samples that can be read; `report` is called with the error of each other one."""
    samples = []
    for index in indices:
        try:
            samples.append(dataset.load(index))
        except DataError as error:
            report(error)
    return samples


def predict_nuscenes(net, names, args, run, threshold, labels):
    """Predict key frames of nuScenes with a CenterFusion; returns the path of the submission."""
    flags, use_radar = radar_flags(args.checkpoint), net.arguments["radar"]
    sweeps = flags["radar_sweeps"] if use_radar else 0
    radar = nuscenes.RadarOptions(sweeps, net.arguments["max_distance"], flags["pc_z_offset"])
    dataset = nuscenes.load_available(args.inputs[0], args.version or "", args.split or "", radar, args.cache_dir)
    key_frames = splits.select_key_frames(dataset, 8 if args.samples is None else args.samples)
    print(f"{len(key_frames)} key frames (--samples) of {dataset.version}, {dataset.split}: {dataset.summary()}")
    options = {"dims": flags["pillar_dims"], "without": net.untrained_heads()}
    gallery, targets, detections = Gallery(args.out, args.overwrite), [], []
    path = gallery.claim("submission.json")
    progress = tqdm(total=sum(len(indices) for _, indices in key_frames), unit="image", disable=None)
    with StopSignals(run) as stop, gallery, progress:
        for name, indices in key_frames:
            if stop.requested():
                break
            samples, predicted = load_samples(dataset, indices, gallery.report), []
            for batch in batches(samples, args.batch_size):
                with gallery.timed(len(batch)):
                    predicted += detect_3d(net, batch, run, threshold, labels, **options)
                progress.update(len(batch))
            if samples:
                truth = [true_detections(target) for _, target in samples]
                gallery.add(draw3d.draw_key_frame(samples, truth, predicted, names), name)
                targets += [{field: target[field] for field in SUBMITTED} for _, target in samples]
                detections += predicted
        files.write_json(path, to_submission(targets, detections, use_radar))
    gallery.close(summary(sum(len(detection["labels"]) for detection in detections), threshold))
    if stop.signal:
        raise SystemExit(stop.exit_code)
    return path


def refuse_flags(args, net, task):
    """UsageError for a flag that would have no effect on these inputs or with this network."""
    if task == "fusion" and any(map(is_nuscenes, args.inputs)):
        if len(args.inputs) > 1:
            raise UsageError(f"{', '.join(args.inputs)}: give nuScenes' folder alone")
        cli.refuse(args, SOURCE_FLAGS, "is for images and videos, and this is nuScenes' folder")
        return
    what = "no input is one (a folder with v1.0-mini or another in it)" if task == "fusion" else f"this is a {net.name}"
    cli.refuse(args, NUSCENES_FLAGS, f"is for CenterFusion on nuScenes' folder, and {what}")
    if task != "fusion":
        cli.refuse(args, ("calib",), f"is for CenterFusion, and {what}")
    if task == "classes" and args.size and args.size[0] != args.size[1]:
        raise UsageError(f"--size {args.size[0]} {args.size[1]}: a classifier's input is a square; give one number")


def main(argv=None):
    args = parse_args(argv)
    run = distributed.init_device(args.device, "", args.precision)
    args.checkpoint = torch_files.find_checkpoint(args.checkpoint)
    net = models.load(args.checkpoint, args.labels, args.size, args.priors)
    if args.size and not net.image_size:
        net.min_side, net.max_side = sorted(args.size)
    net.to(run.device, memory_format=torch.channels_last)
    names = net.classes or [f"class {label}" for label in range(net.num_classes)]
    task, labels = task_of(net), select_labels(args.classes, names)
    refuse_flags(args, net, task)
    threshold = THRESHOLDS[task] if args.threshold is None else args.threshold
    print(f"{models.summary(net)}, {len(names)} class{'es' * (len(names) > 1)}, {distributed.describe(run)}")
    if task == "fusion" and is_nuscenes(args.inputs[0]):
        return predict_nuscenes(net, names, args, run, threshold, labels)
    return predict_images(net, task, names, args, run, threshold, labels)


if __name__ == "__main__":
    cli.run(main)
