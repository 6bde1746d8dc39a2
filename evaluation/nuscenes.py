"""nuScenes: from a network's maps to 3D boxes, the official submission file, and the official score in process.

    found = nuscenes.decode(outputs, targets)
    evaluator.update(targets, found)
    metrics = evaluator.compute(run.gather, run.is_main)

A detection is a dict of one camera picture, boxes in the camera frame of the contract, N of them, highest score first:
labels int64 [N], scores [N], center [N,3] (geometric), dims [N,3] h, w, l, yaw [N], velocity [N,3], attribute int64
[N], -1 for classes without, boxes [N,4] xyxy in pixels of the network's input.
"""

import contextlib
import functools
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import torch

from evaluation.rows import write_csv, write_json
from ops.geometry import alpha_to_yaw, apply_affine, depth_of, unproject
from ops.heatmap import gather, peaks
from ops.rotation import decode as decode_rotation

CLASSES = ("car", "truck", "bus", "trailer", "construction_vehicle", "pedestrian", "motorcycle", "bicycle")
CLASSES += ("traffic_cone", "barrier")
ATTRIBUTES = ("cycle.with_rider", "cycle.without_rider", "pedestrian.moving", "pedestrian.standing")
ATTRIBUTES += ("pedestrian.sitting_lying_down", "vehicle.moving", "vehicle.parked", "vehicle.stopped")
CYCLE, PEDESTRIAN, VEHICLE, NO_GROUP = (0, 2), (2, 5), (5, 8), (0, 0)  # first and one past the last attribute
GROUPS = (*(VEHICLE,) * 5, PEDESTRIAN, CYCLE, CYCLE, NO_GROUP, NO_GROUP)  # of each class
MEASURES = ("NDS", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE")
ERRORS = {"mATE": "trans_err", "mASE": "scale_err", "mAOE": "orient_err", "mAVE": "vel_err", "mAAE": "attr_err"}
SAMPLES = {"train": 28130, "val": 6019, "test": 6008, "mini_train": 323, "mini_val": 81}  # of the official splits
BINS = (1, 1, -1, 1) * 2  # of a rotation head: pi - alpha lies in the same bin, as far on the other side of its middle
MIRROR = {"rot": BINS, "rot_sec": BINS, "velocity": (-1, 1, 1)}  # factors of a head's channels in the mirror image
GOOD = 0.95  # of the truth: what lacks to 1 are objects that no camera shows whole, and they are few
MOST_BOXES = 500  # a sample, set by nuScenes
SMALLEST = 0.01  # metres: the score asks for sizes above 0
# what is kept: name -> (type, numbers a row); of pictures, and of boxes in the global frame
PICTURES = {"image_id": (np.int64, ()), "sample": ("U64", ()), "camera": ("U32", ()), "count": (np.int64, ())}
BOXES = {"translation": (np.float64, (3,)), "size": (np.float32, (3,)), "yaw": (np.float32, ())}
BOXES |= {"velocity": (np.float32, (2,)), "score": (np.float32, ())}
BOXES |= {"label": (np.int8, ()), "attribute": (np.int8, ())}


@torch.no_grad()
def decode(outputs, targets, stride=4, count=100, suppress=True, without=()):
    """Raw heads by name, each [B,C,h,w] -> B detections of `count` boxes, on the CPU.

    targets   of the same pictures: calib and affine lead from cells to metres
    suppress  see ops.heatmap.peaks; the source does so
    without   heads that nobody trained, "velocity" or "nuscenes_att": their part of the answer is 0 or -1

    Depth and angle are those of the second stage where the network has one. The centre is the peak's cell plus
    amodel_offset, taken back to the file's pixels and out to that depth.
    """
    scores, labels, index = peaks(outputs["hm"].float().sigmoid(), count, suppress)  # [B,N]
    said = {name: gather(outputs[name], index).float() for name in outputs.keys() - {"hm", "pc_hm", *without}}
    calib, affine = (torch.stack([t[name] for t in targets]).to(scores.device) for name in ("calib", "affine"))
    width = outputs["hm"].shape[-1]
    cell = torch.stack([index % width, index // width], dim=-1).float()  # [B,N,2]
    middle, half = cell + said["reg"], said["wh"].clamp(min=0) / 2
    pixels = apply_affine((cell + said["amodel_offset"]) * stride, inverse(affine))
    depth = depth_of(said.get("dep_sec", said["dep"])[..., 0])
    yaw = alpha_to_yaw(decode_rotation(said.get("rot_sec", said["rot"])), pixels[..., 0], calib)
    found = {
        "labels": labels,
        "scores": scores,
        "center": unproject(pixels, depth, calib),
        "dims": said["dim"].clamp(min=SMALLEST),
        "yaw": yaw,
        "velocity": along(said["velocity"], yaw) if "velocity" in said else yaw.new_zeros(*yaw.shape, 3),
        "attribute": best_attribute(said.get("nuscenes_att"), labels),
        "boxes": torch.cat([middle - half, middle + half], dim=-1) * stride,
    }
    found = {name: value.cpu() for name, value in found.items()}  # the whole batch at once
    return [{name: value[i] for name, value in found.items()} for i in range(len(scores))]


def untrained(net):
    """Heads of a CenterFusion whose last bias is the zero that each begins with: what they say is noise."""
    return [name for name in ("velocity", "nuscenes_att") if not getattr(net, name)[-1].bias.any()]


def flip_averaged(outputs, turned):
    """Raw heads of pictures and of their mirror images, by name, each [B,C,h,w] -> the means of both, for `decode`.

    Everything is mirrored back first: offsets within a cell, angles, velocities. hm is averaged as a probability.
    """
    means = {}
    for name, maps in outputs.items():
        maps, back = maps.float(), turned[name].flip(-1).float()
        if name in ("reg", "amodel_offset"):  # x within the cell
            back = torch.cat([1 - back[:, :1], back[:, 1:]], dim=1)
        elif name in MIRROR:
            back = back * back.new_tensor(MIRROR[name])[:, None, None]
        means[name] = ((maps.sigmoid() + back.sigmoid()) / 2).logit(1e-6) if name == "hm" else (maps + back) / 2
    return means


def inverse(affine):
    """The inverse of affine maps [...,2,3]."""
    turn = torch.linalg.inv(affine[..., :2])
    return torch.cat([turn, -turn @ affine[..., 2:]], dim=-1)


def along(velocity, yaw):
    """Velocities [...,3] turned, in the plane of the road, to the nearer end of the axis along which the box looks.

    The speed stays. A box driving backwards keeps doing so, and one whose heading came out the wrong way round still
    moves where it moves.
    """
    heading = torch.stack([yaw.cos(), torch.zeros_like(yaw), -yaw.sin()], dim=-1)
    speed = velocity[..., ::2].norm(dim=-1, keepdim=True)
    return heading * torch.where((heading * velocity).sum(-1, keepdim=True) < 0, -speed, speed)


def best_attribute(logits, labels):
    """The attribute [B,N] of highest logit [B,N,8] in the group of each label [B,N], -1 for classes without a group."""
    if logits is None:
        return torch.full_like(labels, -1)
    number = torch.arange(len(ATTRIBUTES), device=labels.device)
    first, end = labels.new_tensor(GROUPS)[labels].unbind(-1)  # [B,N]
    inside = (number >= first[..., None]) & (number < end[..., None])
    best = torch.where(inside, logits, -torch.inf).argmax(-1)
    return torch.where(first < end, best, -1)


def truth(target):
    """A target's objects as a detection with score 1, for what the metric says of them; unknown velocities are 0."""
    counts = ~target["ignore"]
    names = ("labels", "center", "dims", "yaw", "velocity", "attribute", "boxes")
    found = {name: target[name][counts] for name in names}
    return found | {"velocity": found["velocity"].nan_to_num(), "scores": torch.ones(int(counts.sum()))}


def score_truth(evaluator, targets):
    """One line on the metrics of `targets` scored as if they were detections: what is below perfect is in the data or
    in how they are read. "" without the devkit."""
    for target in targets:
        evaluator.update([target], [truth(target)])
    metrics = evaluator.compute()
    if not metrics:
        return ""
    line = f"ground truth scored as predictions: NDS {metrics['NDS']:.3f}, mAP {metrics['mAP']:.3f}"
    if min(metrics["NDS"], metrics["mAP"]) >= GOOD:
        return line
    return f"WARNING: {line}; both should be near 1: the data are at fault, or the way they are read"


def has_devkit():
    """Is nuscenes-devkit installed? A folder that happens to be called nuscenes is not it."""
    found = importlib.util.find_spec("nuscenes")
    return found is not None and found.origin is not None


def to_global(detection, target):
    """The columns BOXES of a detection by the camera pose of its target: numpy arrays, one row a box."""
    values = {name: value.detach().cpu().numpy() for name, value in detection.items()}
    turn, move = (np.asarray(target[name], dtype=np.float64) for name in ("rotation", "translation"))
    yaw = values["yaw"].astype(np.float64)
    heading = np.stack([np.cos(yaw), np.zeros_like(yaw), -np.sin(yaw)], axis=-1) @ turn.T
    columns = {
        "translation": values["center"].astype(np.float64) @ turn.T + move,
        "size": values["dims"][:, [1, 2, 0]],  # nuScenes: width, length, height
        "yaw": np.arctan2(heading[:, 1], heading[:, 0]),
        "velocity": (values["velocity"].astype(np.float64) @ turn.T)[:, :2],
        "score": values["scores"],
        "label": values["labels"],
        "attribute": values["attribute"],
    }
    return {name: columns[name].astype(kind) for name, (kind, _) in BOXES.items()}


class NuScenesEvaluator:
    """MEASURES by nuscenes-devkit, and AP/NAME of each class; without the devkit none, and one line says so.

    root, version, split  of the data set, as `data` loads them; the split serves to tell how much of it was scored
    modalities            of the submission file: names of "camera" and "radar"
    merge                 metres: of boxes of one class from different cameras of a sample whose centres lie closer
                          together than this, only the one of highest score stays. 0: all stay, as in the source
    say                   prints a line

    Only samples that were loaded are scored, with all the objects that the tables have for them.
    """

    def __init__(self, root, version, split, modalities=("camera", "radar"), merge=0.0, say=print):
        self.root, self.version, self.split = str(root), version, split
        self.modalities, self.merge, self.say = modalities, merge, say
        self._parts = []
        self._submission = None
        self._metrics = {}

    def update(self, targets, detections):
        """Adds pictures: two lists of dicts of the same length. Tensors may lie on any device."""
        for target, detection in zip(targets, detections, strict=True):
            boxes = to_global(detection, target)
            values = (target["image_id"], target["sample_token"], target["camera"], len(boxes["label"]))
            self._parts.append((dict(zip(PICTURES, ([value] for value in values))), boxes))

    def compute(self, gather=None, is_main=True):
        """Metrics of all pictures so far, of all processes: dict of floats, the same in every process.

        gather   see `evaluation`
        is_main  True in one process alone: it opens the tables and scores, the others wait for it
        """
        mine = [stacked([part[i] for part in self._parts], columns) for i, columns in enumerate((PICTURES, BOXES))]
        everyone = gather(mine) if gather else [mine]
        metrics = None
        if is_main:
            pictures, boxes = (joined(parts) for parts in zip(*everyone))
            pictures, boxes = each_once(pictures, boxes)
            self._submission = submission(pictures, boxes, self.modalities, self.merge)
            metrics = self._metrics = self._official(pictures)
        return metrics if gather is None else next(found for found in gather(metrics) if found is not None)

    def write(self, path):
        """Writes the submission file of `compute`, in the process that was main: a whole file or none. Where there is
        an official score, per_class.csv beside it too."""
        if self._submission is None:
            raise RuntimeError("call compute() first")
        write_json(path, self._submission)
        if self._metrics:
            rows = [(name, f"{self._metrics[f'AP/{name}']:.6f}") for name in CLASSES]
            write_csv(Path(path).with_name("per_class.csv"), [("class", "AP"), *rows])

    def _official(self, pictures):
        if not has_devkit():
            self.say("no official score: nuscenes-devkit is not installed (pip install -r requirements-nuscenes.txt)")
            return {}
        if not len(pictures["image_id"]):
            self.say("no official score: no picture was evaluated")
            return {}
        self.say(coverage(pictures, self.split))
        samples = frozenset(self._submission["results"])
        return official(self._submission, open_tables(self.root, self.version, samples))


def coverage(pictures, split):
    """One line: how many samples of the split are scored, and how many lack a camera."""
    _, cameras = np.unique(pictures["sample"], return_counts=True)
    whole = SAMPLES.get(split, len(cameras))
    fewer = int((cameras < 6).sum())
    partial = "partial: " if len(cameras) < whole or fewer else ""
    line = f"{partial}{len(cameras)} of {whole} samples of {split} are scored"
    return line + (f", {fewer} of them with fewer than six cameras" if fewer else "")


def stacked(parts, columns):
    """One array a column of a list of dicts."""
    arrays = {name: [np.zeros((0, *shape), kind)] for name, (kind, shape) in columns.items()}
    for name, (kind, shape) in columns.items():
        arrays[name] += [np.asarray(part[name], kind).reshape(-1, *shape) for part in parts]
    return joined([{name: np.concatenate(array) for name, array in arrays.items()}])


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def each_once(pictures, boxes):
    """Pictures by rising image_id, each once (the first stays); boxes in that order with `picture`, 0 to I - 1."""
    _, first = np.unique(pictures["image_id"], return_index=True)
    place = np.full(len(pictures["image_id"]), -1)
    place[first] = np.arange(len(first))
    picture = np.repeat(place, pictures["count"])
    order = np.argsort(picture, kind="stable")
    order = order[picture[order] >= 0]
    kept = {name: column[order] for name, column in boxes.items()} | {"picture": picture[order]}
    return {name: column[first] for name, column in pictures.items()}, kept


def submission(pictures, boxes, modalities=("camera", "radar"), merge=0.0):
    """nuScenes' results json: {"meta", "results"}, a list of boxes for every sample token, at most 500, best first.

    pictures, boxes  of `each_once`; merge: see NuScenesEvaluator
    """
    samples, sample_of = np.unique(pictures["sample"], return_inverse=True)
    sample_of = sample_of[boxes["picture"]]
    order = np.lexsort((-boxes["score"], sample_of))
    ends = np.searchsorted(sample_of[order], np.arange(len(samples) + 1))
    results = {}
    for number, token in enumerate(samples.tolist()):
        rows = order[ends[number] : ends[number + 1]]
        rows = rows[~repeated({name: column[rows] for name, column in boxes.items()}, merge)][:MOST_BOXES]
        results[token] = as_results(token, {name: column[rows] for name, column in boxes.items()})
    names = ("camera", "lidar", "radar", "map", "external")
    return {"meta": {f"use_{name}": name in modalities for name in names}, "results": results}


def repeated(boxes, merge):
    """Which of a sample's boxes, highest score first, another camera has shown before within `merge` metres: bool."""
    if merge <= 0:
        return np.zeros(len(boxes["label"]), bool)
    apart = np.linalg.norm(boxes["translation"][:, None, :2] - boxes["translation"][None, :, :2], axis=-1)
    same = (boxes["label"][:, None] == boxes["label"]) & (boxes["picture"][:, None] != boxes["picture"])
    return np.tril(same & (apart < merge), -1).any(1)


def as_results(token, boxes):
    """A list of nuScenes' dicts of plain values, one a box."""
    yaw, label = boxes["yaw"] / 2, boxes["label"].tolist()
    nothing = np.zeros_like(yaw)
    columns = {
        "translation": boxes["translation"].tolist(),
        "size": np.maximum(boxes["size"], SMALLEST).tolist(),
        "rotation": np.stack([np.cos(yaw), nothing, nothing, np.sin(yaw)], axis=-1).tolist(),  # upright
        "velocity": boxes["velocity"].tolist(),
        "detection_name": [CLASSES[one] for one in label],
        "detection_score": boxes["score"].tolist(),
        "attribute_name": ["" if one < 0 else ATTRIBUTES[one] for one in boxes["attribute"].tolist()],
    }
    return [{"sample_token": token, **dict(zip(columns, row))} for row in zip(*columns.values())]


def rows_of(folder, table, keep=None):
    """The rows of a table that `keep` takes, or all. What it does not take is dropped while the file is read."""
    with open(Path(folder) / f"{table}.json", encoding="utf-8") as file:
        if keep is None:
            return json.load(file)
        return [row for row in json.load(file, object_hook=lambda row: row if keep(row) else None) if row is not None]


@functools.lru_cache(maxsize=1)  # every validation of a run asks for the same samples
def open_tables(root, version, samples):
    """The devkit's NuScenes of what the score of `samples` (a frozenset of tokens) needs: the annotations, key frames
    and poses of their scenes. Of maps, logs and visibilities, which a partial copy may lack, next to nothing."""
    from nuscenes import NuScenes
    from nuscenes.eval.detection.utils import category_to_detection_name

    folder = Path(root) / version
    everything = rows_of(folder, "sample")
    scenes = {row["scene_token"] for row in everything if row["token"] in samples}
    near = {row["token"] for row in everything if row["scene_token"] in scenes}  # velocities look at the neighbours
    frames = rows_of(folder, "sample_data", lambda row: row["is_key_frame"] and row["sample_token"] in near)
    poses = {row["ego_pose_token"] for row in frames}
    loaded = {
        "sample": everything,
        "sample_data": frames,
        "sample_annotation": rows_of(folder, "sample_annotation", lambda row: row["sample_token"] in near),
        "ego_pose": rows_of(folder, "ego_pose", lambda row: row["token"] in poses),
    } | {"map": [{"token": "", "log_tokens": [], "filename": ""}], "log": [], "visibility": []}

    class Tables(NuScenes):
        def __load_table__(self, table_name):
            return loaded[table_name] if table_name in loaded else super().__load_table__(table_name)

    tables = Tables(version, str(root), verbose=False)
    for row in tables.sample_annotation:
        if category_to_detection_name(row["category_name"]) and not is_box(row):
            row["category_name"] = ""  # the score passes over classes that it does not know
    return tables


def is_box(row):
    """Can anything have the size, rotation and translation of this annotation? What cannot is not trained on either."""
    size, rotation = (np.asarray(row[name], np.float32) for name in ("size", "rotation"))
    finite = all(np.isfinite(values).all() for values in (size, rotation, np.asarray(row["translation"], np.float64)))
    return bool(finite and (size > 0).all() and rotation.any())


def official(results, tables):
    """nuscenes-devkit's DetectionEval for a `submission`, MEASURES and AP/NAME. tables: a NuScenes of the devkit.

    Its constructor insists on a whole split; what it does there is done here for the samples that `results` has.
    """
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.common.loaders import add_center_dist, filter_eval_boxes, load_gt_of_sample_tokens
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.eval.detection.evaluate import DetectionEval

    scorer = DetectionEval.__new__(DetectionEval)
    scorer.cfg, scorer.verbose = config_factory("detection_cvpr_2019"), False
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        goal = load_gt_of_sample_tokens(tables, list(results["results"]), DetectionBox)
        sides = [EvalBoxes.deserialize(results["results"], DetectionBox), goal]
        for boxes in sides:
            add_center_dist(tables, boxes)
            if boxes.all:
                filter_eval_boxes(tables, boxes, scorer.cfg.class_range)
        scorer.pred_boxes, scorer.gt_boxes = sides
        metrics = scorer.evaluate()[0].serialize()
    values = {"NDS": metrics["nd_score"], "mAP": metrics["mean_ap"]}
    values |= {name: metrics["tp_errors"][error] for name, error in ERRORS.items()}
    values |= {f"AP/{name}": metrics["mean_dist_aps"][name] for name in CLASSES}
    return {name: float(value) for name, value in values.items()}
