"""COCO's AP and AR of boxes and masks, computed by pycocotools, and detections in COCO's results format.

pycocotools visits every pair of an image and a category and keeps a dict per box. Here it gets one category at a time,
with the images that have it in ground truth or detections; other images add nothing. So memory stays bounded with many
categories, and the metrics are the same.
"""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation import Evaluator
from evaluation.buffers import ImageBuffer, check_batch, structured
from ops import rle
from utils import files
from utils.coco import CocoTruth

# In the order of pycocotools' stats. AP and AR are means over the IoUs 0.5, 0.55 .. 0.95 unless the name has an IoU.
# AR_n: with n detections per image and category, the others with 100. small, medium: up to 32, 96 pixels a side
MEASURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
MEASURES += ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
MASK_MEASURES = tuple(f"mask {name}" for name in MEASURES)
OBJECT = [("image", np.int64), ("label", np.int64), ("box", np.float32, 4), ("score", np.float32)]
OBJECT += [("ignore", np.bool_), ("height", np.int32), ("width", np.int32)]  # height, width: of the mask
Columns = dict[str, np.ndarray]


class COCOEvaluator(Evaluator):
    """MEASURES over all classes, 0 to 1, or -1 where there is no ground truth, as in pycocotools.

    classes   names in label order
    truth     the ground truth as in the COCO file, with its crowds and areas; only images that were evaluated count.
              Detections of a class that the file does not have are left out. None: the ground truth is that of the
              targets, boxes to ignore are crowds, image ids stay as they are and category k + 1 is label k
    masks     detections, and targets without `truth`, have masks: MASK_MEASURES follow

    Boxes and masks are in pixels of the file. An object is small, medium or large by the area of its mask where masks
    are scored; a detection by the area of its box for box metrics, of its mask for mask metrics.
    """

    def __init__(self, classes: Sequence[str], truth: CocoTruth | None = None, masks: bool = False):
        self.classes, self.truth, self.masks = list(classes), truth, masks
        ids = range(1, len(self.classes) + 1) if truth is None else truth.category_ids
        self.category_ids = np.asarray(ids, dtype=np.int64)
        self._buffer = ImageBuffer(OBJECT, object, OBJECT, object)  # truth, its masks, detections, their masks

    def update(self, targets: Sequence[Mapping], detections: Sequence[Mapping]) -> None:
        check_batch(targets, detections, len(self.classes))
        for target, detection in zip(targets, detections):
            truth = structured(OBJECT, label=[]), np.zeros(0, object)
            if self.truth is None:
                truth = self._rows(target, target, ignore=target["ignore"])
            self._buffer.add(target["image_id"], *truth, *self._rows(detection, target, score=detection["scores"]))

    def compute(self, gather: Callable | None = None) -> dict[str, float]:
        ids, truth, truth_masks, detections, masks = self._buffer.gathered(gather)
        if self.truth is None:
            truth = self._columns(truth, truth_masks, ids)
            truth["area"] = mask_areas(truth) if self.masks else truth["bbox"][:, 2:].prod(1)
        else:
            ids, truth = self.truth.image_ids[ids], self.truth.annotations
            truth = select(truth, np.isin(truth["image_id"], ids))
        detections = self._columns(detections, masks, ids)
        categories = self.category_ids[self.category_ids >= 0]
        stats, per_category = coco_stats(truth, detections, categories, "bbox")
        metrics, tables = dict(zip(MEASURES, stats)), {"COCO": per_category}
        if self.masks:
            stats, tables["COCO_mask"] = coco_stats(truth, detections, categories, "segm")
            metrics |= dict(zip(MASK_MEASURES, stats))
        self._computed = detections, metrics, tables
        return metrics

    def per_class(self) -> list[list[str]]:
        """AP and AP50 of each class, of boxes and masks: the names of the columns, then a row per class; cells of a
        class without ground truth are empty."""
        tables = self.computed()[2]
        rows = [[f"{kind}_{name}" for kind in tables for name in ("AP", "AP50")]]
        for category in self.category_ids.tolist():
            values = [value for table in tables.values() for value in table.get(category, (-1.0, -1.0))]
            rows.append([f"{value:.6f}" if value >= 0 else "" for value in values])
        return rows

    def write(self, folder: Path) -> list[str]:
        """Write the detections in COCO's results format, detections.json; returns the names of the files.

        Masks go into a file of their own, detections_masks.json: where a result has a box too, pycocotools takes the
        area of the box for that of the mask.
        """
        detections = self.computed()[0]
        boxes = as_dicts({name: detections[name] for name in ("image_id", "category_id", "bbox", "score")})
        files.write_json(Path(folder) / "detections.json", boxes)
        if not self.masks:
            return ["detections.json"]
        rows = as_dicts({name: detections[name] for name in ("image_id", "category_id", "score")})
        for row, mask in zip(rows, segmentations(detections), strict=True):
            row["segmentation"] = {**mask, "counts": mask["counts"].decode()}
        files.write_json(Path(folder) / "detections_masks.json", rows)
        return ["detections.json", "detections_masks.json"]

    def summary(self) -> str:
        """AP of boxes and masks."""
        metrics = self.computed()[1]
        return f"AP {metrics['AP']:.3f}" + (f", mask AP {metrics['mask AP']:.3f}" if self.masks else "")

    def table(self) -> str:
        """AP and AP50 on one line."""
        metrics = self.computed()[1]
        names = ["AP", "AP50", *["mask AP", "mask AP50"] * self.masks]
        return "COCO: " + ", ".join(f"{name} {metrics[name]:.3f}" for name in names)

    def _rows(self, objects, target, **fields):
        """(rows OBJECT, masks as run lengths) of a target or of detections."""
        masks = np.zeros(0, object)
        if self.masks:
            masks, (height, width) = run_lengths(objects["masks"], tuple(target["size"])), target["size"]
            fields |= {"height": np.full(len(masks), height), "width": np.full(len(masks), width)}
        return structured(OBJECT, label=objects["labels"], box=objects["boxes"], **fields), masks

    def _columns(self, rows, masks, image_ids):
        """COCO's columns of the rows whose class the file has."""
        category = self.category_ids[rows["label"]]
        known = category >= 0
        rows = rows[known]
        low, high = np.split(rows["box"].astype(np.float64), 2, axis=1)
        columns = {"image_id": image_ids[rows["image"]], "category_id": category[known]}
        columns |= {"bbox": np.concatenate([low, high - low], axis=1), "score": rows["score"].astype(np.float64)}
        columns["iscrowd"] = rows["ignore"].astype(np.int64)
        if self.masks:
            columns |= {"counts": masks[known], "height": rows["height"], "width": rows["width"]}
        return columns


def run_lengths(masks: torch.Tensor | np.ndarray | list[Mapping], size: tuple[int, int]) -> np.ndarray:
    """The bytes of run lengths of masks in either form, see `evaluation`; ValueError if `size` is not their size."""
    if isinstance(masks, list):
        sizes = {tuple(mask["size"]) for mask in masks}
        runs = [mask["counts"] for mask in masks]
        runs = [counts.encode() if isinstance(counts, str) else counts for counts in runs]
    else:
        sizes, runs = {tuple(masks.shape[-2:])}, rle.encode(masks)
    if sizes - {size}:
        raise ValueError(f"masks of h, w {(sizes - {size}).pop()}, but the file has {size}")
    array = np.empty(len(runs), dtype=object)
    array[:] = runs
    return array


def segmentations(columns: Columns) -> list[dict]:
    """Masks in the form that pycocotools reads."""
    sizes = zip(columns["height"].tolist(), columns["width"].tolist(), strict=True)
    return [rle.as_coco(counts, size) for counts, size in zip(columns["counts"], sizes, strict=True)]


def mask_areas(columns: Columns) -> np.ndarray:
    """float64 [M], pixels of each mask."""
    return np.array([coco_masks.area(mask) for mask in segmentations(columns)], dtype=np.float64)


def select(columns: Columns, rows: np.ndarray) -> Columns:
    """The columns at `rows`, indices or a mask."""
    return {name: column[rows] for name, column in columns.items()}


def as_dicts(columns: Columns) -> list[dict]:
    """One dict of plain values per row."""
    return [dict(zip(columns, row)) for row in zip(*(column.tolist() for column in columns.values()))]


def coco_stats(
    truth: Columns, detections: Columns, category_ids: np.ndarray, kind: str
) -> tuple[list[float], dict[int, tuple[float, float]]]:
    """pycocotools' twelve stats, and (AP, AP50) of each category with ground truth; kind: bbox or segm."""
    categories = np.intersect1d(category_ids, truth["category_id"]).tolist()  # the others have no AP
    if not categories:
        return [-1.0] * len(MEASURES), {}
    precision, recall, per_category = [], [], {}
    for category in categories:
        parts = [select(columns, columns["category_id"] == category) for columns in (truth, detections)]
        scorer = accumulate(*parts, category, kind)
        precision.append(scorer.eval["precision"])
        recall.append(scorer.eval["recall"])
        at_iou = precision[-1][:, :, 0, 0, -1].mean(1)  # of all areas, 100 detections; -1 if all objects are crowds
        per_category[category] = float(at_iou.mean()), float(at_iou[0])
    scorer.eval = {"precision": np.concatenate(precision, axis=2), "recall": np.concatenate(recall, axis=1)}
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.summarize()
    return [float(value) for value in scorer.stats], per_category


def accumulate(truth: Columns, detections: Columns, category: int, kind: str) -> COCOeval:
    """pycocotools' COCOeval of one category, after its `accumulate`."""
    image_ids = np.union1d(truth["image_id"], detections["image_id"]).tolist()
    area = mask_areas(detections) if kind == "segm" else detections["bbox"][:, 2:].prod(1)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        sets = COCO(), COCO()
        for coco, columns in zip(sets, (truth, detections | {"area": area})):
            rows = as_dicts(columns)
            for number, row in enumerate(rows, start=1):  # pycocotools takes the id 0 for "not matched"
                row["id"] = number
            for row, mask in zip(rows, segmentations(columns) if kind == "segm" else ()):
                row["segmentation"] = mask
            # pycocotools reads the size of an image even where the mask is encoded and needs none
            images = [{"id": image_id, "height": 0, "width": 0} for image_id in image_ids]
            coco.dataset = {"images": images, "annotations": rows, "categories": [{"id": category}]}
            coco.createIndex()
        scorer = COCOeval(*sets, kind)
        scorer.evaluate()
        scorer.accumulate()
    return scorer
