"""Evaluators: `update(targets, detections)` for every batch, then `compute(gather)` once: a flat dict of floats.

`targets` and `detections` are lists with one dict per image, boxes of both on the same scale, tensors on any device.
Labels count from 0; background is not a class.

target      boxes [M,4] xyxy, labels [M], ignore bool [M], image_id int
detection   boxes [N,4] xyxy, labels [N], scores [N]
both        where masks are scored: `masks`, bool or 0 and 1 [N,H,W] in the file's pixels, or a list of N of COCO's run
            lengths {"size": [h, w], "counts": bytes or str}; the target's `size` (h, w) is the file's
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Evaluator:
    """Base class of the evaluators. The methods after `compute` describe what it computed last."""

    _computed: Any = None

    def update(self, targets: Sequence[Mapping], detections: Sequence[Mapping]) -> None:
        """Add the images of a batch; of a classifier, labels [B] and logits [B,K]."""
        raise NotImplementedError

    def compute(self, gather: Callable | None = None) -> dict[str, float]:
        """Metrics of all images so far, of all processes: the same dict in every process.

        gather   gather(obj) returns the list of every process's obj; None: one process. An image that two processes
                 evaluated counts once
        """
        raise NotImplementedError

    def table(self) -> str:
        """The metrics as text, for a console."""
        raise NotImplementedError

    def summary(self) -> str:
        """The main metrics on one line and what they mean, of the evaluators of 2D detectors."""
        raise NotImplementedError

    def write(self, folder: Path) -> list[str]:
        """Write tables and detections into a folder; returns the names of the files."""
        raise NotImplementedError

    def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Class name -> (precision, recall, scores), float64 [N] each, in descending order of score; {}: no curves."""
        return {}

    def average_precisions(self) -> dict[str, float]:
        """AP of each class of `curves`."""
        return {}

    def computed(self) -> Any:
        """What `compute` computed last; RuntimeError before it."""
        if self._computed is None:
            raise RuntimeError("call compute() first")
        return self._computed


def score_ground_truth(evaluator: Evaluator, dataset: Any) -> dict[str, float]:
    """Metrics of the ground truth of `dataset` scored as predictions: 1.0, or evaluator and data do not fit each other.

    evaluator: a new one. Reads no image, so it takes seconds even for a large set. Boxes to ignore (crowds, groups,
    difficult ones) are no predictions.
    """
    for index in range(len(dataset)):
        target = dataset.annotation(index)
        keep = ~target["ignore"]
        detection = {"boxes": target["boxes"][keep], "labels": target["labels"][keep]}
        if "masks" in target:
            detection["masks"] = [mask for mask, is_kept in zip(target["masks"], keep.tolist()) if is_kept]
        evaluator.update([target], [{**detection, "scores": torch.ones(len(detection["labels"]))}])
    return evaluator.compute()


def ground_truth_score(evaluator: Evaluator, dataset: Any) -> str:
    """One line about `score_ground_truth`."""
    score_ground_truth(evaluator, dataset)
    return f"ground truth scored as predictions: {evaluator.summary()}"
