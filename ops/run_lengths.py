"""Masks as COCO's compressed run lengths, by pycocotools: some hundred bytes for some hundred thousand pixels.

Runs go down the columns, the first of them outside the object. A mask here is its bytes alone; (h, w) of the picture is
the same for all of its objects and kept beside them. H, W of the picture, M masks.
"""

import math
from array import array

import numpy as np
import torch
from pycocotools import mask as coco_masks

FEWEST = 6  # numbers of a polygon: pycocotools takes four for a box
FARTHEST = 10  # sides of the picture that a corner may lie off it; pycocotools walks along every edge


def encode(masks):
    """bool or 0 and 1 [M,H,W], tensor or array on any device -> list of M bytes."""
    pixels = np.asarray(torch.as_tensor(masks).detach().cpu()).astype(bool).astype(np.uint8)
    if not len(pixels):
        return []
    return [runs["counts"] for runs in coco_masks.encode(np.asfortranarray(pixels.transpose(1, 2, 0)))]


def decode(runs, size):
    """list of M bytes, (h, w) -> uint8 [M,H,W], 0 or 1."""
    if not len(runs):
        return torch.zeros(0, *size, dtype=torch.uint8)
    pixels = coco_masks.decode([as_coco(one, size) for one in runs])  # [H,W,M], columns together
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def as_coco(runs, size):
    """One mask as pycocotools takes it."""
    return {"size": [int(side) for side in size], "counts": runs}


def compact(segmentation):
    """A `segmentation` of a COCO file in a tenth of its memory, for `from_coco`; what is none stays as it is."""
    try:
        if isinstance(segmentation, list):
            return [array("d", polygon) for polygon in segmentation]
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
            return segmentation | {"counts": array("q", segmentation["counts"])}
    except (TypeError, KeyError, OverflowError):
        pass  # from_coco says what is wrong with it
    return segmentation


def from_coco(segmentation, size):
    """A `segmentation` of a COCO file, polygons or run lengths, compressed or not, as bytes.

    size: (h, w) of the picture. Raises ValueError saying what is wrong with it.
    """
    if isinstance(segmentation, dict):
        return _from_runs(segmentation, size)
    if not (isinstance(segmentation, list) and segmentation):
        raise ValueError("no segmentation: expected polygons or run lengths")
    return coco_masks.merge([_from_polygon(polygon, size) for polygon in segmentation])["counts"]


def _from_polygon(polygon, size):
    if not (isinstance(polygon, list | array) and len(polygon) >= FEWEST and len(polygon) % 2 == 0):
        raise ValueError("segmentation holds a polygon that is no list of three or more x, y")
    try:
        finite = math.isfinite(sum(polygon))
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        raise ValueError("segmentation holds a corner that is no number")
    if max(polygon) > FARTHEST * max(size) or min(polygon) < -FARTHEST * max(size):
        raise ValueError(f"segmentation reaches from {min(polygon):g} to {max(polygon):g}, far off the picture")
    return coco_masks.frPyObjects([list(polygon)], *size)[0]


def _from_runs(segmentation, size):
    counts, told = segmentation.get("counts"), segmentation.get("size")
    if told != list(size):
        raise ValueError(f"segmentation is of h, w {told}, the picture of {list(size)}")
    if isinstance(counts, list | array):
        if not all(isinstance(run, int) and run >= 0 for run in counts):
            raise ValueError("segmentation holds a run that is no whole number from 0")
        covered = sum(counts)
    elif isinstance(counts, str | bytes):
        counts = counts.encode(errors="replace") if isinstance(counts, str) else counts
        covered = _covered(counts)
    else:
        raise ValueError("segmentation holds no counts")
    if covered != math.prod(size):
        raise ValueError(f"segmentation covers {covered} pixels of {math.prod(size)}")
    if isinstance(counts, bytes):
        return counts
    return coco_masks.frPyObjects({"size": told, "counts": list(counts)}, *size)["counts"]


def _covered(counts):
    """Pixels that compressed runs cover in all, or -1 where they are none: pycocotools fills a gap with what memory
    holds, and checks nothing.

    A number is characters from 48 on, five bits each, the low ones first; 32 says that more follow, and 16 in the last
    one that it is negative. From the fourth on it is the difference to the run before the last.
    """
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((digits & 32) == 0)
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or ends[-1] != len(digits) - 1:
        return -1
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 6:  # more than a mask of 32 bits
        return -1
    place = 5 * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((digits & 31) << place, starts)
    numbers -= np.where(digits[ends] & 16, 1 << (place[ends] + 5), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return int(numbers.sum()) if (numbers >= 0).all() else -1
