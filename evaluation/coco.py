"""COCO's twelve numbers for boxes, by pycocotools, and detections in COCO's results format.

pycocotools looks at every pair of a picture and a category and keeps a dict a box. Here it gets one category at a time,
with the pictures that hold it in truth or detection; the others add nothing. So memory stays bounded where categories
are many, and the numbers are the same.
"""

import contextlib
import functools
import io
import json
import os

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.rows import Rows, write_json

# in the order of pycocotools' stats. APs and ARs are means over the IoUs 0.5, 0.55 .. 0.95 unless the name says one;
# AR_n with n detections a picture and category, all else with 100; small, medium, large: up to 32, 96 pixels a side
MEASURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
MEASURES += ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")


class COCOEvaluator:
    """MEASURES over all classes, 0 to 1, or -1 where there is no ground truth box to find, as pycocotools has it.

    classes          names in label order
    annotation_file  COCO's json. Truth is then what it says, also of crowds and areas, of the pictures that were
                     evaluated; image_ids [I] and category_ids [K] are the file's ids of `target["image_id"]` and of the
                     labels, -1 for a class that the file lacks: its detections are left out. Without a file truth is
                     the targets', boxes to ignore are crowds, image ids stay as they are and category k + 1 is label k

    Boxes are in pixels of the file. No detections at all give 0.0.
    """

    def __init__(self, classes, annotation_file=None, image_ids=None, category_ids=None):
        self.classes, self.annotation_file = list(classes), annotation_file
        self.image_ids = None if image_ids is None else np.asarray(image_ids)
        ids = range(1, len(self.classes) + 1) if category_ids is None else category_ids
        self.category_ids = np.asarray(ids, dtype=np.int64)
        self._rows = Rows(len(self.classes))
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
            truth["area"] = truth["bbox"][:, 2:].prod(1)
        else:
            truth = read_truth(str(self.annotation_file), os.stat(self.annotation_file).st_mtime_ns)
            truth = chosen(truth, np.isin(truth["image_id"], images))
        return dict(zip(MEASURES, twelve(truth, found, self.category_ids[self.category_ids >= 0])))

    def write(self, path):
        """Writes the detections that `compute` scored as COCO's results json: a whole file or none."""
        if self._results is None:
            raise RuntimeError("call compute() first")
        write_json(path, as_dicts(self._results))

    def _as_coco(self, data, images, prefix):
        """COCO's columns of truth or detections, less those of classes that the file lacks; `rows` of `data`."""
        categories = self.category_ids[data[f"{prefix}_labels"]]
        rows = np.flatnonzero(categories >= 0)
        low, high = np.split(data[f"{prefix}_boxes"][rows].astype(np.float64), 2, axis=1)
        columns = {"image_id": images[data[f"{prefix}_image"][rows]], "category_id": categories[rows], "rows": rows}
        return columns | {"bbox": np.concatenate([low, high - low], axis=1)}


@functools.lru_cache(maxsize=1)  # every validation of a run asks for the same file
def read_truth(path, changed):
    """Columns of an annotation file: image_id, category_id, bbox [M,4] x, y, w, h, area, iscrowd. changed: its time."""
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)["annotations"]
    bbox = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
    columns = {name: np.array([row[name] for row in rows], dtype=np.int64) for name in ("image_id", "category_id")}
    columns["iscrowd"] = np.array([row.get("iscrowd", 0) for row in rows], dtype=np.int64)
    area = [row.get("area", width * height) for row, (_, _, width, height) in zip(rows, bbox.tolist(), strict=True)]
    return columns | {"bbox": bbox, "area": np.array(area, dtype=np.float64)}


def chosen(columns, rows):
    """The columns at `rows`, an index or a mask."""
    return {name: column[rows] for name, column in columns.items()}


def as_dicts(columns):
    """A list of dicts of plain values, one a row."""
    return [dict(zip(columns, row)) for row in zip(*(column.tolist() for column in columns.values()))]


def twelve(truth, found, category_ids):
    """pycocotools' stats, 12 floats, of two dicts of columns."""
    scorer = None
    precision, recall = [], []
    for category in np.intersect1d(category_ids, truth["category_id"]):  # the others have no AP
        some = [chosen(columns, columns["category_id"] == category) for columns in (truth, found)]
        scorer = scored(*some, category)
        precision.append(scorer.eval["precision"])
        recall.append(scorer.eval["recall"])
    if scorer is None:
        return [-1.0] * len(MEASURES)
    scorer.eval = {"precision": np.concatenate(precision, axis=2), "recall": np.concatenate(recall, axis=1)}
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.summarize()
    return [float(value) for value in scorer.stats]


def scored(truth, found, category):
    """pycocotools' COCOeval after `accumulate` for the boxes of one category."""
    images = np.union1d(truth["image_id"], found["image_id"]).tolist()
    found = found | {"area": found["bbox"][:, 2:].prod(1)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every turn
        sets = [COCO(), COCO()]
        for coco, columns in zip(sets, (truth, found), strict=True):
            rows = as_dicts(columns)
            for number, row in enumerate(rows, 1):  # pycocotools takes id 0 for "no box"
                row["id"] = number
            coco.dataset = {"images": [{"id": image} for image in images], "annotations": rows}
            coco.dataset["categories"] = [{"id": int(category)}]
            coco.createIndex()
        scorer = COCOeval(*sets, "bbox")
        scorer.evaluate()
        scorer.accumulate()
    return scorer
