"""Average precision by the rules of Pascal VOC, precision-recall curves and a confusion matrix.

The rules: each detection is assigned to the ground truth box with the highest IoU among those of its class in its
image. Below the threshold it is a false positive. Else, if that box is to be ignored (difficult, group, crowd), the
detection does not count at all. Else it is a true positive if no detection of a higher score is assigned to that box,
and a false positive if one is. Equal scores keep the order of image_id, then of the detections in the image. IoU is
that of continuous boxes (no + 1), in float64.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation import Evaluator, tables
from evaluation.buffers import ImageBuffer, check_batch, structured, to_numpy
from utils import files

FALSE, TRUE, IGNORED, BACKGROUND = 0, 1, -1, -2
# outcome: FALSE, TRUE or IGNORED. matched_score, matched_label: of the other one of a pair in the confusion matrix;
# -inf for a box that was not detected, BACKGROUND for a detection without a box, IGNORED for one of a box to ignore
TRUTH = [("image", np.int64), ("label", np.int32), ("ignore", np.bool_), ("matched_score", np.float32)]
DETECTION = [("image", np.int64), ("label", np.int32), ("score", np.float32), ("outcome", np.int8)]
DETECTION += [("matched_label", np.int32)]
BOX = [("box", np.float32, 4)]
MEASURES = ("mAP", "mAP_11point")  # over the classes
CONFUSION_SCORE = 0.5  # minimum score of a detection in confusion.csv


@dataclass
class ClassResult:
    """One class after matching: N detections in descending order of score, without those that do not count."""

    name: str
    positives: int  # ground truth boxes that count
    true: np.ndarray  # bool [N]
    scores: np.ndarray  # float64 [N]

    def __post_init__(self):
        self.true_count = np.cumsum(self.true)
        self.precision = self.true_count / np.arange(1, len(self.true) + 1)  # float64 [N]
        self.recall = self.true_count / max(self.positives, 1)
        # the highest precision at this recall or a higher one
        self.envelope = np.maximum.accumulate(self.precision[::-1])[::-1]

    def average_precision(self) -> float:
        """Area under the envelope, 0 to 1. Recall rises by 1 / positives at each true positive and nowhere else."""
        return float(self.envelope[self.true].sum() / self.positives)

    def average_precision_11(self) -> float:
        """Mean of the envelope at recall 0, 0.1 .. 1, and 0 where it is not reached (VOC2007)."""
        levels = np.arange(11) * self.positives  # recall >= k / 10 in whole numbers: 3 of 10 does reach 0.3
        first = np.searchsorted(10 * self.true_count, levels)
        return float(np.append(self.envelope, 0.0)[first].sum() / 11)

    def best_f1(self) -> tuple[float, float, float] | None:
        """(score threshold, precision, recall) where F1 is highest; None without detections."""
        if not len(self.scores):
            return None
        ends = np.flatnonzero(np.append(self.scores[1:] != self.scores[:-1], True))  # a threshold keeps equal scores
        f1 = 2 * self.true_count[ends] / (ends + 1 + self.positives)
        best = ends[int(np.argmax(f1))]
        return float(self.scores[best]), float(self.precision[best]), float(self.recall[best])


class VOCEvaluator(Evaluator):
    """Mean AP at one IoU threshold.

    compute() returns `mAP` (area under the curve), `mAP_11point` (VOC2007) and, for each class, `AP/NAME` and
    `AP_11point/NAME`. A class without a ground truth box that counts has no AP: it is not in the dict and not in the
    means. The means are 0.0 without any such class, and never NaN.

    iou          minimum IoU of a true positive, in AP, the curves and the confusion matrix
    use_2007     `mAP` and `AP/NAME` are VOC2007's 11-point ones too
    image_path   image_path(image_id) is the file of an image; given, `write` also writes VOC's results files, and boxes
                 must be in pixels of the file
    offset       coordinate of the first pixel in those files, see data.detection.voc
    draw         draws pr_curves.png, see tables.write_curves; None: it is not written
    """

    def __init__(
        self,
        classes: Sequence[str],
        iou: float = 0.5,
        use_2007: bool = False,
        image_path: Callable[[int], str] | None = None,
        offset: int = 1,
        draw: tables.Draw | None = None,
    ):
        self.classes, self.iou, self.use_2007 = list(classes), iou, use_2007
        self.image_path, self.offset, self.draw = image_path, offset, draw
        self._detection = DETECTION + BOX * bool(image_path)
        self._buffer = ImageBuffer(TRUTH, self._detection)

    def update(self, targets: Sequence[Mapping], detections: Sequence[Mapping]) -> None:
        check_batch(targets, detections, len(self.classes))
        for target, detection in zip(targets, detections):
            truth = structured(TRUTH, label=target["labels"], ignore=target["ignore"])
            fields = {"label": detection["labels"], "score": detection["scores"]}
            fields |= {"box": detection["boxes"]} if self.image_path else {}
            detected = structured(self._detection, **fields)
            iou = pairwise_iou(to_numpy(detection["boxes"]), to_numpy(target["boxes"]))
            match_by_class(truth, detected, iou, self.iou)
            match_any_class(truth, detected, iou, self.iou)
            self._buffer.add(target["image_id"], truth, detected)

    def compute(self, gather: Callable | None = None) -> dict[str, float]:
        ids, truth, detections = self._buffer.gathered(gather)
        results = class_results(truth, detections, self.classes)
        self._computed = ids, truth, detections, results
        points = {f"AP_11point/{result.name}": result.average_precision_11() for result in results if result.positives}
        ap = {f"AP/{name}": value for name, value in self.average_precisions().items()}
        return {"mAP": mean(ap.values()), "mAP_11point": mean(points.values()), **ap, **points}

    def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of the classes with ground truth, see Evaluator."""
        results = self.computed()[-1]
        return {result.name: (result.precision, result.recall, result.scores) for result in results if result.positives}

    def average_precisions(self) -> dict[str, float]:
        """Of the classes with ground truth: `AP/NAME`."""
        return {result.name: self._ap(result) for result in self.computed()[-1] if result.positives}

    def _ap(self, result):
        return result.average_precision_11() if self.use_2007 else result.average_precision()

    def rule(self) -> str:
        """What AP is here, in words."""
        return f"{'VOC2007 11-point AP' if self.use_2007 else 'area under the curve'} at IoU {self.iou:g}"

    def summary(self) -> str:
        """mAP and what it is."""
        return f"mAP {mean(self.average_precisions().values()):.3f} ({self.rule()})"

    def confusion(self, score: float = CONFUSION_SCORE) -> np.ndarray:
        """int64 [K+1,K+1]: row the true class, column the detected one, background last in both.

        Detections of at least `score`, in descending order of score, are each paired with the free box of any class in
        their image that has the highest IoU, if it reaches the threshold (at equal IoU one of their own class first). A
        box to ignore stays free; neither it nor the detections paired with it are counted.
        """
        _, truth, detections, _ = self.computed()
        return confusion_matrix(truth, detections, len(self.classes), score)

    def table(self) -> str:
        """The AP of each class and their mean, one per line."""
        results = [result for result in self.computed()[-1] if result.positives]
        width = max([4, *(len(result.name) for result in results)])
        rows = [(r.name, r.positives, self._ap(r), r.average_precision_11()) for r in results]
        rows.append(("mean", sum(row[1] for row in rows), mean(row[2] for row in rows), mean(row[3] for row in rows)))
        lines = [f"{name:{width}}  {boxes:6}  {area:.3f}  {points:.3f}" for name, boxes, area, points in rows]
        if not any(len(result.true) for result in results):
            lines.append("no detections: train longer, or check the learning rate and the images")
        return "\n".join([f"{'':{width}}   boxes     AP  11-point", *lines])

    def write(self, folder: Path, score: float = CONFUSION_SCORE, more: Sequence[Sequence] = ()) -> list[str]:
        """Write per_class.csv, confusion.csv (at `score`), pr_curves.csv, pr_curves.png and VOC's results files; cells
        without a value are empty. Returns the names of the files.

        more: further columns of per_class.csv: their names, then the cells of each class
        """
        folder, rows = Path(folder), self.per_class()
        rows = [[*row, *cells] for row, cells in zip(rows, more, strict=True)] if more else rows
        files.write_csv(folder / "per_class.csv", rows)
        names = ["per_class.csv", *tables.write_confusion(folder, self.confusion(score), self.classes)]
        names += tables.write_curves(folder, self.curves(), self.average_precisions(), f"AP: {self.rule()}", self.draw)
        return names + (self.write_results(folder) if self.image_path else [])

    def per_class(self) -> list[list]:
        """The rows of per_class.csv, the names of its columns first."""
        head = ["class", "ground_truth_boxes", "detections", "AP", "AP_11point", "best_F1_threshold"]
        rows = [[*head, "precision_there", "recall_there"]]
        for result in self.computed()[-1]:
            values = []
            if result.positives:
                values = [self._ap(result), result.average_precision_11(), *(result.best_f1() or ())]
            row = [result.name, result.positives, len(result.true), *(f"{value:.6f}" for value in values)]
            rows.append(row + [""] * (len(rows[0]) - len(row)))
        return rows

    def write_results(self, folder: Path) -> list[str]:
        """Write the detections as VOC's development kit reads them, det_test_CLASS.txt: name of the image without
        suffix, score, x1, y1, x2, y2 of the first and the last pixel; returns the names of the files."""
        ids, _, detections, _ = self.computed()
        stems = [Path(self.image_path(image_id)).stem for image_id in ids.tolist()]
        names = [f"det_test_{name.replace('/', '%2F')}.txt" for name in self.classes]
        for label, name in enumerate(names):
            rows = detections[detections["label"] == label]
            boxes = rows["box"].astype(np.float64) + [self.offset, self.offset, 0, 0]
            columns = zip(rows["image"].tolist(), rows["score"].tolist(), boxes.tolist(), strict=True)
            # nine digits keep every float32 apart: equal scores stay equal, others do not become so
            lines = [f"{stems[i]} {s:.9g} {a:.9g} {b:.9g} {c:.9g} {d:.9g}\n" for i, s, (a, b, c, d) in columns]
            files.write_text(folder / name, "".join(lines))
        return names


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes xyxy [N,4] and [M,4]: float64 [N,M]. 0 for boxes without area or with NaN."""
    ax1, ay1, ax2, ay2 = a.reshape(-1, 4).astype(np.float64).T[:, :, None]  # [N,1] each
    bx1, by1, bx2, by2 = b.reshape(-1, 4).astype(np.float64).T  # [M] each
    width = np.minimum(ax2, bx2) - np.maximum(ax1, bx1)  # [N,M]
    height = np.minimum(ay2, by2) - np.maximum(ay1, by1)
    common = np.clip(width, 0, None) * np.clip(height, 0, None)
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - common
    return np.divide(common, union, out=np.zeros_like(common), where=(union > 0) & (common > 0))


def match_by_class(truth: np.ndarray, detections: np.ndarray, iou: np.ndarray, threshold: float) -> None:
    """Set the outcome of each detection of an image by VOC's rules. iou [N,M] of detections and truth."""
    if not len(truth):
        return
    iou = np.where(detections["label"][:, None] == truth["label"], iou, -1.0)
    best = iou.argmax(1)  # [N], of equal ones the first
    reached = iou.max(1) >= threshold
    ignored = reached & truth["ignore"][best]
    order = by_score(detections)
    order = order[(reached & ~ignored)[order]]
    _, first = np.unique(best[order], return_index=True)  # the first detection of each box
    detections["outcome"][order[first]] = TRUE
    detections["outcome"][ignored] = IGNORED


def match_any_class(truth: np.ndarray, detections: np.ndarray, iou: np.ndarray, threshold: float) -> None:
    """Set `matched_score` and `matched_label` of an image, see VOCEvaluator.confusion. iou [N,M], or another measure
    that is higher for closer pairs.

    Detections below a score come after those above it and so change nothing for them: one matching serves every score.
    """
    truth["matched_score"], detections["matched_label"] = -np.inf, BACKGROUND
    near = iou >= threshold
    order = by_score(detections)
    for row in order[near[order].any(1)]:
        free = np.flatnonzero(near[row] & (truth["matched_score"] == -np.inf))
        if not len(free):
            continue
        other_class = truth["label"][free] != detections["label"][row]
        best = free[np.lexsort((truth["ignore"][free], other_class, -iou[row, free]))[0]]
        if truth["ignore"][best]:
            detections["matched_label"][row] = IGNORED
        else:
            detections["matched_label"][row] = truth["label"][best]
            truth["matched_score"][best] = detections["score"][row]


def confusion_matrix(truth: np.ndarray, detections: np.ndarray, num_classes: int, score: float) -> np.ndarray:
    """int64 [K+1,K+1] of images after `match_any_class`, see VOCEvaluator.confusion."""
    detections = detections[(detections["score"] >= score) & (detections["matched_label"] != IGNORED)]
    missed = truth[~truth["ignore"] & ~(truth["matched_score"] >= score)]
    table = np.zeros((num_classes + 1,) * 2, np.int64)
    rows = np.where(detections["matched_label"] == BACKGROUND, num_classes, detections["matched_label"])
    np.add.at(table, (rows, detections["label"]), 1)
    np.add.at(table, (missed["label"], num_classes), 1)
    return table


def by_score(detections: np.ndarray) -> np.ndarray:
    """Indices of the detections in descending order of score; equal scores keep their order."""
    return np.argsort(-detections["score"], kind="stable")


def class_results(truth: np.ndarray, detections: np.ndarray, classes: Sequence[str]) -> list[ClassResult]:
    """One ClassResult per class."""
    detections = detections[by_score(detections)]
    detections = detections[detections["outcome"] != IGNORED]
    detections = detections[np.argsort(detections["label"], kind="stable")]
    edges = np.searchsorted(detections["label"], np.arange(len(classes) + 1))
    positives = np.bincount(truth["label"][~truth["ignore"]], minlength=len(classes)).tolist()
    results = []
    for name, count, (start, end) in zip(classes, positives, itertools.pairwise(edges), strict=True):
        rows = detections[start:end]
        results.append(ClassResult(name, count, rows["outcome"] == TRUE, rows["score"].astype(np.float64)))
    return results


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
