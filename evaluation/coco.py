"""COCO's twelve numbers for boxes, and for masks, by pycocotools, and detections in COCO's results format.

pycocotools looks at every pair of a picture and a category and keeps a dict a box. Here it gets one category at a time,
with the pictures that hold it in truth or detection; the others add nothing. So memory stays bounded where categories
are many, and the numbers are the same.
"""

import contextlib
import functools
import io
import json
import math
import os
from array import array
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.rows import Rows, write_json
from ops import run_lengths

# in the order of pycocotools' stats. APs and ARs are means over the IoUs 0.5, 0.55 .. 0.95 unless the name says one;
# AR_n with n detections a picture and category, all else with 100; small, medium, large: up to 32, 96 pixels a side
MEASURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
MEASURES += ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
MASK_MEASURES = tuple(f"mask {name}" for name in MEASURES)


class COCOEvaluator:
    """MEASURES over all classes, 0 to 1, or -1 where there is no ground truth box to find, as pycocotools has it.

    classes          names in label order
    annotation_file  COCO's json. Truth is then what it says, also of crowds and areas, of the pictures that were
                     evaluated; image_ids [I] and category_ids [K] are the file's ids of `target["image_id"]` and of the
                     labels, -1 for a class that the file lacks: its detections are left out. Without a file truth is
                     the targets', boxes to ignore are crowds, image ids stay as they are and category k + 1 is label k
    masks            detections, and targets where there is no file, have masks: MASK_MEASURES follow

    Boxes and masks are in pixels of the file. No detections at all give 0.0. A true object is as large as its mask
    where masks are scored, and a detected one as large as its box among boxes and as its mask among masks.
    """

    def __init__(self, classes, annotation_file=None, image_ids=None, category_ids=None, masks=False):
        self.classes, self.annotation_file, self.masks = list(classes), annotation_file, masks
        self.image_ids = None if image_ids is None else np.asarray(image_ids)
        ids = range(1, len(self.classes) + 1) if category_ids is None else category_ids
        self.category_ids = np.asarray(ids, dtype=np.int64)
        with_masks = () if not masks else ("found",) if annotation_file else ("truth", "found")
        self._rows = Rows(len(self.classes), with_masks)
        self._results = None

    def update(self, targets, detections):
        """Adds pictures: two lists of dicts of the same length, see `evaluation`. Tensors may lie on any device."""
        self._rows.add(targets, detections)

    def compute(self, gather=None):
        """Metrics of all pictures so far, of all processes: dict of floats. Every process gets the same answer."""
        data = self._rows.gathered(gather)
        images = data["image_id"] if self.image_ids is None else self.image_ids[data["image_id"]]
        self._results = found = self._as_coco(data, images, "found")
        found["score"] = data["found_scores"].astype(np.float64)[found.pop("rows")]
        if self.annotation_file is None:
            truth = self._as_coco(data, images, "truth")
            truth["iscrowd"] = data["truth_ignore"].astype(np.int64)[truth.pop("rows")]
            truth["area"] = areas(truth) if self.masks else truth["bbox"][:, 2:].prod(1)
        else:
            truth = read_truth(str(self.annotation_file), os.stat(self.annotation_file).st_mtime_ns, self.masks)
            truth = chosen(truth, np.isin(truth["image_id"], images))
        categories = self.category_ids[self.category_ids >= 0]
        metrics = dict(zip(MEASURES, twelve(truth, found, categories)))
        if self.masks:
            metrics |= dict(zip(MASK_MEASURES, twelve(truth, found, categories, "segm")))
        return metrics

    def write(self, path):
        """Writes the detections that `compute` scored as COCO's results json: a whole file or none. Masks go beside it,
        detections_masks.json beside detections.json: where a box stands too, pycocotools takes its area for the
        mask's."""
        if self._results is None:
            raise RuntimeError("call compute() first")
        about = {name: self._results[name] for name in ("image_id", "category_id")}
        write_json(path, as_dicts(about | {name: self._results[name] for name in ("bbox", "score")}))
        if self.masks:
            rows = as_dicts(about | {"score": self._results["score"]})
            for row, runs in zip(rows, segmentations(self._results), strict=True):
                row["segmentation"] = {**runs, "counts": runs["counts"].decode()}
            path = Path(path)
            write_json(path.with_stem(f"{path.stem}_masks"), rows)

    def _as_coco(self, data, images, prefix):
        """COCO's columns of truth or detections, less those of classes that the file lacks; `rows` of `data`. Masks are
        `counts`, `height` and `width`."""
        categories = self.category_ids[data[f"{prefix}_labels"]]
        rows = np.flatnonzero(categories >= 0)
        low, high = np.split(data[f"{prefix}_boxes"][rows].astype(np.float64), 2, axis=1)
        image = data[f"{prefix}_image"][rows]
        columns = {"image_id": images[image], "category_id": categories[rows], "rows": rows}
        columns["bbox"] = np.concatenate([low, high - low], axis=1)
        if self.masks:
            columns |= {"counts": data[f"{prefix}_masks"][rows], "height": data["height"][image]}
            columns["width"] = data["width"][image]
        return columns


@functools.lru_cache(maxsize=1)  # every validation of a run asks for the same file
def read_truth(path, changed, masks=False):
    """Columns of an annotation file: image_id, category_id, bbox [M,4] x, y, w, h, area, iscrowd. changed: its time.

    Left out is what data.coco leaves out, rows without ids, without area or outside of their picture: no detection can
    find them. masks: also counts, height and width, and rows without a valid segmentation are left out too.
    """
    with open(path, encoding="utf-8-sig") as file:
        content = json.load(file, object_pairs_hook=packed if masks else without_outlines)
    size_of = sizes_of(content.get("images", ()))
    rows = [row for row in content["annotations"] if is_object(row, size_of)]
    if masks:
        sizes = [size_of.get(row["image_id"], (0, 0)) for row in rows]
        outlines = [outline(row.get("segmentation"), size) for row, size in zip(rows, sizes, strict=True)]
        whole = [index for index, counts in enumerate(outlines) if counts is not None]
        rows, sizes = [rows[index] for index in whole], [sizes[index] for index in whole]
    bbox = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
    columns = {name: np.array([row[name] for row in rows], dtype=np.int64) for name in ("image_id", "category_id")}
    columns["iscrowd"] = np.array([row.get("iscrowd") == 1 for row in rows], dtype=np.int64)
    area = [row["area"] if is_size(row.get("area")) else w * h for row, (_, _, w, h) in zip(rows, bbox.tolist())]
    columns |= {"bbox": bbox, "area": np.array(area, dtype=np.float64)}
    if masks:
        columns["height"], columns["width"] = np.array(sizes, dtype=np.int32).reshape(-1, 2).T
        columns["counts"] = np.empty(len(rows), dtype=object)
        columns["counts"][:] = [outlines[index] for index in whole]
    return columns


def sizes_of(images):
    """COCO's id -> (h, w) of the pictures that have both; of an id that comes twice the first."""
    sizes = {}
    for image in images:
        size = image.get("height"), image.get("width")
        if is_whole(image.get("id")) and all(isinstance(side, int | float) and 1 <= side < 1 << 31 for side in size):
            sizes.setdefault(image["id"], tuple(map(int, size)))
    return sizes


def is_whole(value):
    return isinstance(value, int) and -(1 << 63) <= value < 1 << 63


def is_size(value):
    return isinstance(value, int | float) and 0 <= value < 1 << 63


def is_object(row, size_of):
    """Does the row of an annotation file have ids, and a box with area in its picture where that has a size?"""
    box = row.get("bbox")
    if not (is_whole(row.get("image_id")) and is_whole(row.get("category_id")) and isinstance(box, list)):
        return False
    try:
        finite = all(map(math.isfinite, box))
    except (TypeError, OverflowError):
        return False
    if not finite or len(box) != 4 or box[2] <= 0 or box[3] <= 0:
        return False
    height, width = size_of.get(row["image_id"], (math.inf, math.inf))
    x, y = max(0.0, box[0]), max(0.0, box[1])
    x1, y1, x2, y2 = array("f", (x, y, min(box[0] + box[2], width), min(box[1] + box[3], height)))  # as data keeps them
    return x2 > x1 and y2 > y1


def packed(pairs):
    """A JSON object whose outlines, nine tenths of COCO, are packed as soon as they are read."""
    return {key: run_lengths.compact(value) if key == "segmentation" else value for key, value in pairs}


def without_outlines(pairs):
    """A JSON object without outlines."""
    return {key: value for key, value in pairs if key != "segmentation"}


def outline(segmentation, size):
    """Run lengths of a `segmentation` as bytes, or None where it is not valid."""
    try:
        return run_lengths.from_coco(segmentation, size)
    except ValueError:
        return None


def segmentations(columns):
    """Masks as pycocotools takes them, a list of dicts."""
    sizes = zip(columns["height"].tolist(), columns["width"].tolist(), strict=True)
    return [run_lengths.as_coco(counts, size) for counts, size in zip(columns["counts"], sizes, strict=True)]


def areas(columns):
    """float64 [M], pixels of each mask."""
    return np.array([coco_masks.area(runs) for runs in segmentations(columns)], dtype=np.float64)


def chosen(columns, rows):
    """The columns at `rows`, an index or a mask."""
    return {name: column[rows] for name, column in columns.items()}


def as_dicts(columns):
    """A list of dicts of plain values, one a row."""
    return [dict(zip(columns, row)) for row in zip(*(column.tolist() for column in columns.values()))]


def twelve(truth, found, category_ids, kind="bbox"):
    """pycocotools' stats, 12 floats, of two dicts of columns; kind: bbox or segm."""
    scorer = None
    precision, recall = [], []
    for category in np.intersect1d(category_ids, truth["category_id"]):  # the others have no AP
        some = [chosen(columns, columns["category_id"] == category) for columns in (truth, found)]
        scorer = scored(*some, category, kind)
        precision.append(scorer.eval["precision"])
        recall.append(scorer.eval["recall"])
    if scorer is None:
        return [-1.0] * len(MEASURES)
    scorer.eval = {"precision": np.concatenate(precision, axis=2), "recall": np.concatenate(recall, axis=1)}
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.summarize()
    return [float(value) for value in scorer.stats]


def scored(truth, found, category, kind):
    """pycocotools' COCOeval after `accumulate` for the boxes or masks of one category."""
    images = np.union1d(truth["image_id"], found["image_id"]).tolist()
    found = found | {"area": areas(found) if kind == "segm" else found["bbox"][:, 2:].prod(1)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every turn
        sets = [COCO(), COCO()]
        for coco, columns in zip(sets, (truth, found), strict=True):
            rows = as_dicts(columns)
            for number, row in enumerate(rows, 1):  # pycocotools takes id 0 for "no box"
                row["id"] = number
            for row, runs in zip(rows, segmentations(columns) if kind == "segm" else ()):
                row["segmentation"] = runs
            # it asks for a picture's size before it sees that a mask needs none
            coco.dataset = {"images": [{"id": image, "height": 0, "width": 0} for image in images], "annotations": rows}
            coco.dataset["categories"] = [{"id": int(category)}]
            coco.createIndex()
        scorer = COCOeval(*sets, kind)
        scorer.evaluate()
        scorer.accumulate()
    return scorer
