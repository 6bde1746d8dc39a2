"""The official score of nuScenes, by nuscenes-devkit in the same process.

The devkit insists on a whole split and loads every table. Here it gets the tables of the samples that were evaluated,
so partial copies of the set can be scored too.
"""

import contextlib
import functools
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.nuscenes import CLASSES

MEASURES = ("NDS", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE")
ERRORS = {"mATE": "trans_err", "mASE": "scale_err", "mAOE": "orient_err", "mAVE": "vel_err", "mAAE": "attr_err"}


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


def score(results: Mapping, tables: Any) -> dict[str, float]:
    """MEASURES and AP/NAME of each class for a submission, by the devkit's DetectionEval.

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
        metrics = scorer.evaluate()[0].serialize()
    values = {"NDS": metrics["nd_score"], "mAP": metrics["mean_ap"]}
    values |= {name: metrics["tp_errors"][error] for name, error in ERRORS.items()}
    values |= {f"AP/{name}": metrics["mean_dist_aps"][name] for name in CLASSES}
    return {name: float(value) for name, value in values.items()}


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
