"""VOC's and COCO's evaluation of a 2D detector in one evaluator, with one table of the classes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import Evaluator, coco, voc
from evaluation.coco import MASK_MEASURES, COCOEvaluator
from evaluation.voc import VOCEvaluator
from utils.coco import CocoTruth

__all__ = ["MASK_MEASURES", "MEASURES", "DetectionEvaluator"]

MEASURES = (*coco.MEASURES, *voc.MEASURES)


class DetectionEvaluator(Evaluator):
    """The metrics and files of a VOCEvaluator and of a COCOEvaluator; boxes are in pixels of the file.

    classes, truth, masks   see COCOEvaluator
    options                 further arguments of VOCEvaluator, which scores boxes
    """

    def __init__(self, classes: Sequence[str], truth: CocoTruth | None = None, masks: bool = False, **options: Any):
        self.voc, self.coco = VOCEvaluator(classes, **options), COCOEvaluator(classes, truth, masks)

    def update(self, targets: Sequence[Mapping], detections: Sequence[Mapping]) -> None:
        self.voc.update(targets, detections)
        self.coco.update(targets, detections)

    def compute(self, gather: Callable | None = None) -> dict[str, float]:
        return self.voc.compute(gather) | self.coco.compute(gather)

    def table(self) -> str:
        """The AP of each class and their mean by VOC's rules, then COCO's."""
        return f"{self.voc.table()}\n{self.coco.table()}"

    def write(self, folder: Path) -> list[str]:
        """Write the files of both; per_class.csv also has COCO's AP and AP50. Returns the names of the files."""
        return self.voc.write(folder, more=self.coco.per_class()) + self.coco.write(folder)

    def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return self.voc.curves()

    def average_precisions(self) -> dict[str, float]:
        return self.voc.average_precisions()

    def summary(self) -> str:
        """COCO's AP of boxes and masks, mAP and what it is."""
        return f"{self.coco.summary()}, {self.voc.summary()}"
