"""nuScenes: the official submission file of detections, and their official score.

evaluator.update(targets, detections)                  # detections: see ops.decode3d
metrics = evaluator.compute(run.gather, run.is_main)
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation import Evaluator, nuscenes_devkit, tables
from evaluation.buffers import ImageBuffer, structured
from evaluation.nuscenes_devkit import MATCH_DISTANCE, MEASURES, Score
from utils import files
from utils.nuscenes import ATTRIBUTES, CLASSES, devkit_is_installed, is_annotated

__all__ = ["MEASURES", "NuScenesEvaluator", "score_ground_truth", "to_submission", "true_detections"]

SAMPLES = {"train": 28130, "val": 6019, "test": 6008, "mini_train": 323, "mini_val": 81}  # in the official splits
MIN_TRUTH_SCORE = 0.95  # of the ground truth: a few objects are not whole in any camera
MAX_BOXES = 500  # per sample, set by nuScenes
MIN_SIZE = 0.01  # meters: the devkit requires sizes above 0
IMAGE = [("image", np.int64), ("sample", "U64")]
BOX = [
    ("image", np.int64),
    ("translation", np.float64, 3),
    ("size", np.float32, 3),
    ("yaw", np.float32),
]  # global frame
BOX += [("velocity", np.float32, 2), ("score", np.float32), ("label", np.int8), ("attribute", np.int8)]


class NuScenesEvaluator(Evaluator):
    """MEASURES by nuscenes-devkit, and AP/NAME of each class; without the devkit, and for v1.0-test, which has no
    annotations, no metrics and a line saying so.

    root, version, split   of the data set; the split serves to report which share of it was scored
    radar                  whether radar was used besides the cameras, for the submission file
    merge_distance         meters: of boxes of one class from different cameras of a sample whose centers are closer
                           than this, only the top-scoring one stays. 0: all stay, as in CenterFusion
    print                  prints a line
    draw                   draws pr_curves.png, see tables.write_curves; None: it is not written

    Only samples that were loaded are scored, with all objects that the tables have for them.
    """

    def __init__(
        self,
        root: str | Path,
        version: str,
        split: str,
        radar: bool = True,
        merge_distance: float = 0.0,
        print: Callable[[str], object] = print,
        draw: tables.Draw | None = None,
    ):
        self.root, self.version, self.split = str(root), version, split
        self.radar, self.merge_distance, self.print, self.draw = radar, merge_distance, print, draw
        self._buffer = ImageBuffer(IMAGE, BOX)

    def update(self, targets: Sequence[Mapping], detections: Sequence[Mapping]) -> None:
        for target, detection in zip(targets, detections, strict=True):
            image = structured(IMAGE, sample=[target["sample_token"]])
            self._buffer.add(target["image_id"], image, to_global(detection, target))

    def compute(self, gather: Callable | None = None, is_main: bool = True) -> dict[str, float]:
        """See Evaluator. is_main: True in one process only, which reads the tables and scores; the others wait."""
        _, images, boxes = self._buffer.gathered(gather)
        metrics = None
        if is_main:
            submission = make_submission(images, boxes, self.radar, self.merge_distance)
            score = self._score(submission, images)
            metrics = score.metrics
            self._computed = submission, score
        return metrics if gather is None else next(result for result in gather(metrics) if result is not None)

    def write(self, folder: Path) -> list[str]:
        """Write submission.json and, if there is an official score, per_class.csv, confusion.csv, pr_curves.csv and
        pr_curves.png; returns the names of the files. To be called in the main process."""
        submission, score = self.computed()
        files.write_json(Path(folder) / "submission.json", submission)
        if not score.metrics:
            return ["submission.json"]
        rows = [(name, f"{score.metrics[f'AP/{name}']:.6f}") for name in CLASSES]
        files.write_csv(Path(folder) / "per_class.csv", [("class", "AP"), *rows])
        names = ["submission.json", "per_class.csv", *tables.write_confusion(folder, score.confusion, CLASSES)]
        title = f"nuScenes, centers within {MATCH_DISTANCE:g} m"
        return names + tables.write_curves(folder, score.curves, score.ap, title, self.draw)

    def curves(self) -> dict[str, tables.Curve]:
        """Of all classes at MATCH_DISTANCE, see Evaluator; {} without an official score or in other processes."""
        return self._computed[1].curves if self._computed else {}

    def average_precisions(self) -> dict[str, float]:
        return self._computed[1].ap if self._computed else {}

    def table(self) -> str:
        """The official metrics on one line."""
        metrics = self.computed()[1].metrics
        return ", ".join(f"{name} {metrics[name]:.3f}" for name in MEASURES if name in metrics)

    def _score(self, submission, images):
        if not is_annotated(self.version):
            self.print(f"no official score: {self.version} has no annotations; upload submission.json to nuScenes")
            return Score({})
        if not devkit_is_installed():
            self.print("no official score: nuscenes-devkit is not installed (pip install -r requirements-nuscenes.txt)")
            return Score({})
        if not len(images):
            self.print("no official score: no image was evaluated")
            return Score({})
        self.print(coverage(images["sample"], self.split))
        opened = nuscenes_devkit.open_tables(self.root, self.version, frozenset(submission["results"]))
        return nuscenes_devkit.score(submission, opened)


def true_detections(target: Mapping) -> dict[str, torch.Tensor]:
    """The objects of a target as detections with score 1; unknown velocities are 0."""
    keep = ~target["ignore"]
    names = ("labels", "center", "dims", "yaw", "velocity", "attribute", "boxes")
    detections = {name: target[name][keep] for name in names}
    return detections | {"velocity": detections["velocity"].nan_to_num(), "scores": torch.ones(int(keep.sum()))}


def score_ground_truth(
    evaluator: NuScenesEvaluator, dataset: Any, gather: Callable | None = None, is_main: bool = True
) -> str:
    """One line about the ground truth of `dataset` scored as predictions, a warning if the score is low; "" without the
    devkit. gather, is_main: see NuScenesEvaluator.compute; one process scores, the others wait."""
    for index in range(len(dataset)) if is_main else ():
        target = dataset.annotation(index)
        evaluator.update([target], [true_detections(target)])
    metrics = evaluator.compute(gather, is_main)
    if not metrics:
        return ""
    line = f"ground truth scored as predictions: NDS {metrics['NDS']:.3f}, mAP {metrics['mAP']:.3f}"
    if min(metrics["NDS"], metrics["mAP"]) >= MIN_TRUTH_SCORE:
        return line
    return f"WARNING: {line}; both should be near 1: the data is wrong, or the way it is read"


def to_submission(targets: Sequence[Mapping], detections: Sequence[Mapping], radar: bool) -> dict:
    """nuScenes' results json of camera images: two lists of dicts of the same length, see ops.decode3d."""
    evaluator = NuScenesEvaluator("", "", "", radar)
    evaluator.update(targets, detections)
    _, images, boxes = evaluator._buffer.gathered()
    return make_submission(images, boxes, radar)


def to_global(detection: Mapping, target: Mapping) -> np.ndarray:
    """The boxes of a detection in the global frame, by the camera pose of its target: rows BOX."""
    values = {name: value.detach().cpu().numpy() for name, value in detection.items()}
    rotation, translation = (np.asarray(target[name], dtype=np.float64) for name in ("rotation", "translation"))
    yaw = values["yaw"].astype(np.float64)
    heading = np.stack([np.cos(yaw), np.zeros_like(yaw), -np.sin(yaw)], axis=-1) @ rotation.T
    return structured(
        BOX,
        translation=values["center"].astype(np.float64) @ rotation.T + translation,
        size=values["dims"][:, [1, 2, 0]],  # nuScenes: width, length, height
        yaw=np.arctan2(heading[:, 1], heading[:, 0]),
        velocity=(values["velocity"].astype(np.float64) @ rotation.T)[:, :2],
        score=values["scores"],
        label=values["labels"],
        attribute=values["attribute"],
    )


def coverage(samples: np.ndarray, split: str) -> str:
    """One line: how many samples of the split are scored, and how many have fewer than six cameras. samples: the token
    of each image."""
    _, cameras = np.unique(samples, return_counts=True)
    total = SAMPLES.get(split, len(cameras))
    fewer = int((cameras < 6).sum())
    partial = "partial: " if len(cameras) < total or fewer else ""
    line = f"{partial}{len(cameras)} of {total} samples of {split} are scored"
    return line + (f", {fewer} of them with fewer than six cameras" if fewer else "")


def make_submission(images: np.ndarray, boxes: np.ndarray, radar: bool, merge_distance: float = 0.0) -> dict:
    """nuScenes' results json: {"meta", "results"}, the top-scoring boxes of each sample token, at most 500, in
    descending order of score.

    images, boxes: rows IMAGE and BOX of ImageBuffer.gathered; radar, merge_distance: see NuScenesEvaluator
    """
    samples, sample_of = np.unique(images["sample"], return_inverse=True)
    sample_of = sample_of[boxes["image"]]
    order = np.lexsort((-boxes["score"], sample_of))
    ends = np.searchsorted(sample_of[order], np.arange(len(samples) + 1))
    results = {}
    for number, token in enumerate(samples.tolist()):
        rows = boxes[order[ends[number] : ends[number + 1]]]
        results[token] = as_results(token, rows[~duplicates(rows, merge_distance)][:MAX_BOXES])
    used = {"camera": True, "lidar": False, "radar": radar, "map": False, "external": False}
    return {"meta": {f"use_{name}": value for name, value in used.items()}, "results": results}


def duplicates(boxes: np.ndarray, merge_distance: float) -> np.ndarray:
    """bool [N]: which boxes of a sample, in descending order of score, are closer than `merge_distance` to an earlier
    one of their class from another camera."""
    if merge_distance <= 0:
        return np.zeros(len(boxes), bool)
    distance = np.linalg.norm(boxes["translation"][:, None, :2] - boxes["translation"][None, :, :2], axis=-1)
    same = (boxes["label"][:, None] == boxes["label"]) & (boxes["image"][:, None] != boxes["image"])
    return np.tril(same & (distance < merge_distance), -1).any(1)


def as_results(token: str, boxes: np.ndarray) -> list[dict]:
    """nuScenes' dicts of plain values, one per box."""
    half_yaw = boxes["yaw"] / 2
    zeros = np.zeros_like(half_yaw)
    columns = {
        "translation": boxes["translation"].tolist(),
        "size": np.maximum(boxes["size"], MIN_SIZE).tolist(),
        "rotation": np.stack([np.cos(half_yaw), zeros, zeros, np.sin(half_yaw)], axis=-1).tolist(),  # upright
        "velocity": boxes["velocity"].tolist(),
        "detection_name": [CLASSES[label] for label in boxes["label"].tolist()],
        "detection_score": boxes["score"].tolist(),
        "attribute_name": ["" if index < 0 else ATTRIBUTES[index] for index in boxes["attribute"].tolist()],
    }
    return [{"sample_token": token, **dict(zip(columns, row))} for row in zip(*columns.values())]
