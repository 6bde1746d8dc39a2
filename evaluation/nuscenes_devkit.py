"""The official score of nuScenes, by nuscenes-devkit in the same process.

The devkit insists on a whole split and loads every table. Here it gets the tables of the samples that were evaluated,
so partial copies of the set can be scored too.
"""

import contextlib
import functools
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.buffers import structured
from evaluation.tables import Curve
from evaluation.voc import CONFUSION_SCORE, DETECTION, TRUTH, confusion_matrix, match_any_class
from utils.nuscenes import CLASSES

MATCH_DISTANCE = 2.0  # meters in the ground plane, of curves and confusion matrix; that of the devkit's true positives
MEASURES = ("NDS", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE")
ERRORS = {"mATE": "trans_err", "mASE": "scale_err", "mAOE": "orient_err", "mAVE": "vel_err", "mAAE": "attr_err"}


@dataclass
class Score:
    """metrics    MEASURES and AP/NAME of each class, the mean over the devkit's four distances
    curves, ap    of each class at MATCH_DISTANCE
    confusion     int64 [K+1,K+1], see VOCEvaluator.confusion; pairs are of centers within MATCH_DISTANCE
    """

    metrics: dict[str, float]
    curves: dict[str, Curve] = field(default_factory=dict)
    ap: dict[str, float] = field(default_factory=dict)
    confusion: np.ndarray | None = None


@functools.lru_cache(maxsize=1)  # every validation of a run asks for the same samples
def open_tables(root: str, version: str, samples: frozenset[str]) -> Any:
    """The devkit's NuScenes with what the score of `samples` (tokens) needs: annotations, key frames and poses of their
    scenes. Maps, logs and visibilities, which a partial copy may not have, are left empty."""
    from nuscenes import NuScenes
    from nuscenes.eval.detection.utils import category_to_detection_name

    folder = Path(root) / version
    everything = _rows(folder, "sample")
    scenes = {row["scene_token"] for row in everything if row["token"] in samples}
    near = {
        row["token"] for row in everything if row["scene_token"] in scenes
    }  # velocities come from the samples before and after
    frames = _rows(folder, "sample_data", lambda row: row["is_key_frame"] and row["sample_token"] in near)
    poses = {row["ego_pose_token"] for row in frames}
    loaded = {
        "sample": everything,
        "sample_data": frames,
        "sample_annotation": _rows(folder, "sample_annotation", lambda row: row["sample_token"] in near),
        "ego_pose": _rows(folder, "ego_pose", lambda row: row["token"] in poses),
    } | {"map": [{"token": "", "log_tokens": [], "filename": ""}], "log": [], "visibility": []}

    class Tables(NuScenes):
        def __load_table__(self, table_name):
            return loaded[table_name] if table_name in loaded else super().__load_table__(table_name)

    tables = Tables(version, str(root), verbose=False)
    for row in tables.sample_annotation:
        if category_to_detection_name(row["category_name"]) and not _is_valid(row):
            row["category_name"] = ""  # the score skips categories that it does not know
    return tables


def score(results: Mapping, tables: Any) -> Score:
    """The score of a submission, by the devkit's DetectionEval.

    tables: of `open_tables`, or any NuScenes of the devkit. DetectionEval's constructor insists on a whole split; what
    it does is done here for the samples in `results`.
    """
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.common.loaders import add_center_dist, filter_eval_boxes, load_gt_of_sample_tokens
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.eval.detection.evaluate import DetectionEval

    scorer = DetectionEval.__new__(DetectionEval)
    scorer.cfg, scorer.verbose = config_factory("detection_cvpr_2019"), False
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        truth = load_gt_of_sample_tokens(tables, list(results["results"]), DetectionBox)
        sides = [EvalBoxes.deserialize(results["results"], DetectionBox), truth]
        for boxes in sides:
            add_center_dist(tables, boxes)
            if boxes.all:
                filter_eval_boxes(tables, boxes, scorer.cfg.class_range)
        scorer.pred_boxes, scorer.gt_boxes = sides
        metrics, data = scorer.evaluate()
    metrics = metrics.serialize()
    values = {"NDS": metrics["nd_score"], "mAP": metrics["mean_ap"]}
    values |= {name: metrics["tp_errors"][error] for name, error in ERRORS.items()}
    values |= {f"AP/{name}": metrics["mean_dist_aps"][name] for name in CLASSES}
    values = {name: float(value) for name, value in values.items()}
    at_distance = {name: data[name, MATCH_DISTANCE] for name in CLASSES}
    curves = {name: _curve(of_class) for name, of_class in at_distance.items()}
    ap = {name: float(metrics["label_aps"][name][MATCH_DISTANCE]) for name in CLASSES}
    return Score(values, curves, ap, _confusion(scorer.gt_boxes, scorer.pred_boxes))


def _curve(data):
    """The devkit's 101 points up to the recall that was reached, precision interpolated; empty without a detection."""
    count = data.max_recall_ind + 1 if data.confidence.any() else 0
    return data.precision[:count], data.recall[:count], data.confidence[:count]


def _confusion(truth, detections):
    """The confusion matrix of the boxes that the devkit scores, each sample matched by distance in the ground plane."""
    table = np.zeros((len(CLASSES) + 1,) * 2, np.int64)
    for token in truth.sample_tokens:
        sides = truth[token], [box for box in detections[token] if box.detection_score >= CONFUSION_SCORE]
        labels = [[CLASSES.index(box.detection_name) for box in boxes] for boxes in sides]
        places = [np.array([box.translation[:2] for box in boxes]).reshape(-1, 2) for boxes in sides]
        rows = structured(TRUTH, label=labels[0])
        found = structured(DETECTION, label=labels[1], score=[box.detection_score for box in sides[1]])
        distance = np.linalg.norm(places[1][:, None] - places[0], axis=-1)  # [N,M]
        match_any_class(rows, found, -distance, -MATCH_DISTANCE)
        table += confusion_matrix(rows, found, len(CLASSES), CONFUSION_SCORE)
    return table


def _rows(folder: Path, table: str, keep: Callable[[dict], bool] | None = None) -> list[dict]:
    """The rows of a table that `keep` accepts, or all. The others are dropped while the file is read."""
    with open(folder / f"{table}.json", encoding="utf-8") as file:
        if keep is None:
            return json.load(file)
        return [row for row in json.load(file, object_hook=lambda row: row if keep(row) else None) if row is not None]


def _is_valid(row):
    """Whether a box can have the size, rotation and translation of this annotation; others are not trained on
    either."""
    size, rotation = (np.asarray(row[name], np.float32) for name in ("size", "rotation"))
    finite = all(np.isfinite(values).all() for values in (size, rotation, np.asarray(row["translation"], np.float64)))
    return bool(finite and (size > 0).all() and rotation.any())
