"""What an evaluator keeps of targets and detections: flat arrays, one row an image, a ground truth box, a detection.

I images, M ground truth boxes, N detections, those of all pictures end to end.
"""

import csv
import functools
import json
import os
from pathlib import Path

import numpy as np
import torch

from ops import run_lengths

# name of the field -> type kept
IMAGE_FIELDS = {"image_id": np.int64, "truths": np.int64, "found": np.int64}  # id, and how many rows of the two below
TRUTH_FIELDS = {"truth_boxes": np.float32, "truth_labels": np.int32, "truth_ignore": np.bool_}
FOUND_FIELDS = {"found_boxes": np.float32, "found_labels": np.int32, "found_scores": np.float32}
SIZE_FIELDS = {"height": np.int32, "width": np.int32}  # of the file, where masks are kept


class Rows:
    """The pictures of one process, batch after batch, then those of all.

    masks   keep masks of these too, of "truth", "found": run lengths (see ops.run_lengths), in files' pixels
    """

    def __init__(self, num_classes, masks=()):
        self.num_classes = num_classes
        self._image = IMAGE_FIELDS | (SIZE_FIELDS if masks else {})
        self._truth = TRUTH_FIELDS | ({"truth_masks": object} if "truth" in masks else {})
        self._found = FOUND_FIELDS | ({"found_masks": object} if "found" in masks else {})
        self._fields = self._image | self._truth | self._found
        self._parts = {field: [] for field in self._fields}

    def add(self, targets, detections):
        """Two lists of dicts of the same length, see `evaluation`. Tensors may lie on any device."""
        if len(targets) != len(detections):
            raise ValueError(f"{len(targets)} targets, but {len(detections)} detections")
        if not targets:
            return
        rows = {
            "image_id": np.array([int(target["image_id"]) for target in targets]),
            "truths": np.array([len(target["boxes"]) for target in targets]),
            "found": np.array([len(found["boxes"]) for found in detections]),
        }
        if "height" in self._fields:
            rows["height"], rows["width"] = np.array([target["size"] for target in targets]).T
        for prefix, dicts, fields in (("truth_", targets, self._truth), ("found_", detections, self._found)):
            for field, kind in fields.items():
                join = functools.partial(joined_masks, targets=targets) if kind is object else joined
                rows[field] = join(dicts, field.removeprefix(prefix))
        for labels in (rows["truth_labels"], rows["found_labels"]):
            if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
                raise ValueError(f"labels from {labels.min()} to {labels.max()}, but {self.num_classes} classes from 0")
        for prefix, count, fields in (("truth", "truths", self._truth), ("found", "found", self._found)):
            lengths = {field: len(rows[field]) for field in fields}
            if set(lengths.values()) != {int(rows[count].sum())}:
                raise ValueError(f"{prefix} fields differ in length: {lengths}")
        for field, kind in self._fields.items():
            self._parts[field].append(rows[field].astype(kind))

    def gathered(self, gather=None):
        """The arrays of all processes by field, in the order of `in_order`; gather: see `evaluation`."""
        mine = {field: stacked(self._parts[field], field, kind) for field, kind in self._fields.items()}
        everyone = gather(mine) if gather else [mine]
        data = {field: np.concatenate([part[field] for part in everyone]) for field in self._fields}
        return in_order(data, {"image": self._image, "truth": self._truth, "found": self._found})


def joined(dicts, key):
    """One numpy array of a field of all dicts: tensors or arrays, on any device, copied once for the whole batch."""
    parts = [torch.as_tensor(item[key]).detach() for item in dicts]
    whole = torch.cat([part.reshape(-1, 4) if key == "boxes" else part.reshape(-1) for part in parts])
    return (whole.float() if whole.is_floating_point() else whole).cpu().numpy()


def joined_masks(dicts, key, targets):
    """One object array of bytes: masks of all dicts, run lengths as COCO writes them or pixels [N,H,W]."""
    runs = []
    for item, target in zip(dicts, targets, strict=True):
        masks, size = item[key], tuple(target["size"])
        if isinstance(masks, list):
            sizes = {tuple(one["size"]) for one in masks} - {size}
            runs += [one["counts"].encode() if isinstance(one["counts"], str) else one["counts"] for one in masks]
        else:
            sizes = {tuple(masks.shape[-2:])} - {size}
            runs += run_lengths.encode(masks)
        if sizes:
            raise ValueError(f"masks of h, w {sizes.pop()}, but the file has {size}")
    out = np.empty(len(runs), dtype=object)
    out[:] = runs
    return out


def stacked(parts, field, kind):
    empty = np.zeros((0, 4) if field.endswith("boxes") else 0, kind)
    return np.concatenate([empty, *parts])


def ragged(starts, counts):
    """Indices start, start + 1 .. of every run of `count`, end to end."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def in_order(data, fields):
    """The rows by rising image_id, each image once (the first stays), with `truth_image`, `found_image`: 0 to I - 1.

    fields: names of those of "image", "truth" and "found".
    """
    ids, first = np.unique(data["image_id"], return_index=True)
    out = {field: data[field][first] for field in fields["image"] if field not in ("truths", "found")}
    for prefix, count in (("truth", "truths"), ("found", "found")):
        counts = data[count][first]
        rows = ragged((np.cumsum(data[count]) - data[count])[first], counts)
        out.update({field: data[field][rows] for field in fields[prefix]})
        out[f"{prefix}_image"] = np.repeat(np.arange(len(ids)), counts)
    return out


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_json(path, value):
    """A whole file or none; its folder is made where it lacks."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(partial, path)
