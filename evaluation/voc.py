"""Average precision by the rules of Pascal VOC, with the tables and curves that come from the same matches.

The rules: a detection, taken in falling score, belongs to the box of its class and picture with the highest IoU. Below
the threshold it is a false positive; else, if that box is to be ignored (difficult, group, crowd), it does not count at
all; else it is a true positive if it is the first one there, and a false positive if not. Equal scores keep the order
of image_id, then of the detections in the picture. IoU is that of continuous boxes (no + 1), in float64.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.rows import Rows, ragged, write_csv

PAIRS_AT_ONCE = 1 << 20  # bounds the memory of the IoU step: about 200 MB


@dataclass
class ClassResult:
    """One class after matching. N detections that count (neutral ones are gone), in falling score."""

    name: str
    positives: int  # ground truth boxes that count
    true: np.ndarray  # bool [N]
    scores: np.ndarray  # float64 [N]

    def __post_init__(self):
        self.true_count = np.cumsum(self.true)
        self.precision = self.true_count / np.arange(1, len(self.true) + 1)  # float64 [N]
        self.recall = self.true_count / max(self.positives, 1)
        # the best precision at this recall or a higher one
        self.envelope = np.maximum.accumulate(self.precision[::-1])[::-1]

    def average_precision(self):
        """Area under the envelope, 0 to 1. Recall rises by 1 / positives at each true positive and nowhere else."""
        return float(self.envelope[self.true].sum() / self.positives)

    def average_precision_11(self):
        """Mean of the envelope at recall 0, 0.1 .. 1, 0 where it is not reached (VOC2007)."""
        levels = np.arange(11) * self.positives  # recall >= k / 10 in whole numbers: 3 of 10 does reach 0.3
        at = np.searchsorted(10 * self.true_count, levels)
        return float(np.append(self.envelope, 0.0)[at].sum() / 11)

    def best_f1(self):
        """(score threshold, precision, recall) where F1 is highest; a threshold keeps all detections of equal score."""
        ends = np.flatnonzero(np.append(self.scores[1:] != self.scores[:-1], True)) if len(self.scores) else []
        if len(ends) == 0:
            return None
        f1 = 2 * self.true_count[ends] / (ends + 1 + self.positives)
        best = ends[int(np.argmax(f1))]
        return float(self.scores[best]), float(self.precision[best]), float(self.recall[best])


class VOCEvaluator:
    """Mean AP at one IoU threshold.

    compute() returns `mAP` (area form, every point), `mAP_11point` (VOC2007) and, for each class, `AP/NAME` and
    `AP_11point/NAME`. A class without a ground truth box that counts has no AP: it is left out of the dict and of the
    means. No class at all gives 0.0, as do no detections: there is never a NaN.
    """

    def __init__(self, classes, iou=0.5):
        self.classes = list(classes)
        self.iou = iou
        self._rows = Rows(len(self.classes))
        self._data = self._results = None

    def update(self, targets, detections):
        """Adds pictures: two lists of dicts of the same length, see `evaluation`. Tensors may lie on any device."""
        self._rows.add(targets, detections)

    def compute(self, gather=None):
        """Metrics of all pictures so far, of all processes: dict of floats. Every process gets the same answer."""
        self._data = data = self._rows.gathered(gather)
        state = match(data, len(self.classes), self.iou)
        self._results = results = by_class(data, state, self.classes)
        scored = [result for result in results if result.positives]
        area = {f"AP/{result.name}": result.average_precision() for result in scored}
        points = {f"AP_11point/{result.name}": result.average_precision_11() for result in scored}
        means = {"mAP": mean(area.values()), "mAP_11point": mean(points.values())}
        return {**means, **area, **points}

    def curves(self):
        """{class name: (precision, recall, scores)}, float64 [N] each, in falling score; classes with ground truth."""
        return {r.name: (r.precision, r.recall, r.scores) for r in self._computed() if r.positives}

    def confusion(self, score=0.5):
        """int64 [K+1,K+1]: row the true class, column the detected one, background last in both.

        Detections of at least `score`, in falling score, each take the free box of their picture with the highest IoU,
        of whatever class, if it reaches the threshold (at equal IoU one of their own class first). A box to be ignored
        stays free; neither it nor the detections that take it are counted.
        """
        self._computed()
        data, background = self._data, len(self.classes)
        matched = match_any_class(data, score, self.iou)  # [detections]: truth row, NOTHING or BELOW_SCORE
        free = np.ones(len(data["truth_labels"]), bool)
        free[matched[matched >= 0]] = False
        free &= ~data["truth_ignore"]
        hit, alone = np.flatnonzero(matched >= 0), np.flatnonzero(matched == NOTHING)
        hit = hit[~data["truth_ignore"][matched[hit]]]
        rows = [data["truth_labels"][matched[hit]], data["truth_labels"][free], np.full(len(alone), background)]
        columns = [data["found_labels"][hit], np.full(free.sum(), background), data["found_labels"][alone]]
        cells = np.concatenate(rows).astype(np.int64) * (background + 1) + np.concatenate(columns)
        return np.bincount(cells, minlength=(background + 1) ** 2).reshape(background + 1, background + 1)

    def table(self):
        """The AP of each class and their mean as lines of text, for a console."""
        results = [result for result in self._computed() if result.positives]
        width = max([4, *(len(result.name) for result in results)])
        rows = [(r.name, r.positives, r.average_precision(), r.average_precision_11()) for r in results]
        rows.append(("mean", sum(r[1] for r in rows), mean(r[2] for r in rows), mean(r[3] for r in rows)))
        lines = [f"{name:{width}}  {boxes:6}  {area:.3f}  {points:.3f}" for name, boxes, area, points in rows]
        if not any(len(result.true) for result in results):
            lines.append("no detection at all: train longer, or look at the learning rate and the pictures")
        return "\n".join([f"{'':{width}}   boxes     AP  11-point", *lines])

    def write_tables(self, folder, score=0.5):
        """Writes per_class.csv and confusion.csv (at `score`) into the folder; cells without a value are empty."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        head = ["class", "ground_truth_boxes", "detections", "AP", "AP_11point", "best_F1_threshold"]
        rows = [[*head, "precision_there", "recall_there"]]
        for result in self._computed():
            row = [result.name, result.positives, len(result.true)]
            if result.positives:
                best = result.best_f1() or ()
                values = [result.average_precision(), result.average_precision_11(), *best]
                row += [f"{value:.6f}" for value in values]
            rows.append(row + [""] * (len(rows[0]) - len(row)))
        names = [*self.classes, "background"]
        table = self.confusion(score).tolist()
        write_csv(folder / "per_class.csv", rows)
        write_csv(
            folder / "confusion.csv",
            [["truth / detection", *names], *([n, *r] for n, r in zip(names, table, strict=True))],
        )

    def _computed(self):
        if self._results is None:
            raise RuntimeError("call compute() first")
        return self._results


# ---- pairs of boxes: M ground truth boxes, N detections of all pictures end to end ----


def iou_rows(a, b):
    """IoU of the boxes a[i] and b[i], xyxy [P,4] each: float64 [P]. 0 for boxes without area or with NaN."""
    a, b = a.astype(np.float64).T, b.astype(np.float64).T
    w = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])
    h = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])
    common = np.clip(w, 0, None) * np.clip(h, 0, None)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return np.divide(common, union, out=np.zeros_like(common), where=(union > 0) & (common > 0))


def pairs(data, found, found_key, truth_key):
    """Yields (detections [P], truths [P], IoU [P]): all pairs with the same key, for the detections with index `found`.

    Pairs of one detection stay together, in the order of `found`, truths in the order of their rows.
    """
    by_key = np.argsort(truth_key, kind="stable")
    sorted_key = truth_key[by_key]
    starts = np.searchsorted(sorted_key, found_key[found])
    counts = np.searchsorted(sorted_key, found_key[found], side="right") - starts
    found, starts, counts = (array[counts > 0] for array in (found, starts, counts))
    ends = np.cumsum(counts)
    begin = 0
    while begin < len(found):
        done = ends[begin - 1] if begin else 0
        stop = max(begin + 1, int(np.searchsorted(ends, done + PAIRS_AT_ONCE, side="right")))
        detections = np.repeat(found[begin:stop], counts[begin:stop])
        truths = by_key[ragged(starts[begin:stop], counts[begin:stop])]
        yield detections, truths, iou_rows(data["found_boxes"][detections], data["truth_boxes"][truths])
        begin = stop


def run_starts(values):
    """Indices where a run of equal neighbours begins."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1])) if len(values) else np.zeros(0, np.int64)


def falling(data):
    """Order of the detections by falling score; equal ones by image, then by their place in it."""
    return np.argsort(-data["found_scores"], kind="stable")


# ---- matching ----

TRUE, FALSE, NEUTRAL = 1, 0, -1  # what became of a detection
NOTHING, BELOW_SCORE = -1, -2  # in place of the row of a matched truth


def match(data, num_classes, threshold):
    """int8 [N]: TRUE, FALSE or NEUTRAL for every detection."""
    best = np.full(len(data["found_labels"]), NOTHING)  # row of the truth with the highest IoU, if that is enough
    found_key = data["found_image"] * num_classes + data["found_labels"]
    truth_key = data["truth_image"] * num_classes + data["truth_labels"]
    for detections, truths, iou in pairs(data, np.arange(len(best)), found_key, truth_key):
        starts = run_starts(detections)
        highest = np.maximum.reduceat(iou, starts)
        at = np.flatnonzero(iou == np.repeat(highest, np.diff(np.append(starts, len(iou)))))
        at = at[run_starts(detections[at])]  # of several equal ones the first
        at = at[iou[at] >= threshold]
        best[detections[at]] = truths[at]
    state = np.full(len(best), FALSE, np.int8)
    hit = best != NOTHING
    neutral = np.flatnonzero(hit)
    neutral = neutral[data["truth_ignore"][best[neutral]]]
    state[neutral] = NEUTRAL
    order = falling(data)
    order = order[hit[order] & (state[order] != NEUTRAL)]
    _, first = np.unique(best[order], return_index=True)
    state[order[first]] = TRUE
    return state


def match_any_class(data, score, threshold):
    """int64 [N]: the row of the truth that each detection takes, NOTHING or BELOW_SCORE; see VOCEvaluator.confusion."""
    matched = np.where(data["found_scores"] >= score, NOTHING, BELOW_SCORE)
    order = falling(data)
    order = order[matched[order] == NOTHING]
    close = [[], [], []]
    for part in pairs(data, order, data["found_image"], data["truth_image"]):
        near = part[2] >= threshold
        for kept, values in zip(close, part, strict=True):
            kept.append(values[near])
    if not close[0]:
        return matched
    detections, truths, iou = (np.concatenate(values) for values in close)
    # turn: how many detections of the same picture come before this one; one turn of all pictures is one step
    rank = np.empty(len(matched), np.int64)
    rank[order] = np.arange(len(order))
    ignored, other = data["truth_ignore"][truths], data["truth_labels"][truths] != data["found_labels"][detections]
    sort = np.lexsort((truths, ignored, other, -iou, rank[detections], data["found_image"][detections]))
    detections, truths, ignored = detections[sort], truths[sort], ignored[sort]
    image = data["found_image"][detections]
    new = np.zeros(len(detections), np.int64)
    new[run_starts(detections)] = 1
    count = np.cumsum(new)
    first_of_image = run_starts(image)
    turn = count - np.repeat(count[first_of_image], np.diff(np.append(first_of_image, len(image))))
    by_turn = np.argsort(turn, kind="stable")
    taken = np.zeros(len(data["truth_labels"]), bool)
    for rows in np.split(by_turn, run_starts(turn[by_turn])[1:]):
        rows = rows[~taken[truths[rows]]]
        rows = rows[run_starts(detections[rows])]
        matched[detections[rows]] = truths[rows]
        taken[truths[rows[~ignored[rows]]]] = True
    return matched


def by_class(data, state, classes):
    """List of ClassResult, one a class."""
    order = falling(data)
    order = order[state[order] != NEUTRAL]
    order = order[np.argsort(data["found_labels"][order], kind="stable")]
    edges = np.searchsorted(data["found_labels"][order], np.arange(len(classes) + 1))
    counted = data["truth_labels"][~data["truth_ignore"]]
    positives = np.bincount(counted, minlength=len(classes))
    results = []
    for label, name in enumerate(classes):
        rows = order[edges[label] : edges[label + 1]]
        scores = data["found_scores"][rows].astype(np.float64)
        results.append(ClassResult(name, int(positives[label]), state[rows] == TRUE, scores))
    return results


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0
