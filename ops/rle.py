"""Masks as COCO's compressed run-length encoding (RLE), by pycocotools: some hundred bytes instead of H * W.

Runs go down the columns; the first is of background. A mask here is the bytes of its `counts` alone; its size (h, w)
is that of the image, stored once for all objects. M masks of an image of H x W.
"""

import math
from array import array

import numpy as np
import torch
from pycocotools import mask as coco_masks

MIN_NUMBERS = 6  # of a polygon: pycocotools takes four for a box
MAX_PERIMETER = 4_000_000  # pixels of a polygon, along x or y: pycocotools keeps five points for each
MAX_OFFSET = 10  # image sides that a corner may be outside the image; pycocotools walks along every edge


def encode(masks):
    """bool or 0 and 1 [M,H,W], tensor or array on any device -> list of M bytes."""
    pixels = np.asarray(torch.as_tensor(masks).detach().cpu()).astype(bool).astype(np.uint8)
    if not len(pixels):
        return []
    return [mask["counts"] for mask in coco_masks.encode(np.asfortranarray(pixels.transpose(1, 2, 0)))]


def decode(masks, size):
    """list of M bytes, (h, w) -> uint8 [M,H,W], 0 or 1."""
    if not len(masks):
        return torch.zeros(0, *size, dtype=torch.uint8)
    pixels = coco_masks.decode([as_coco(mask, size) for mask in masks])  # [H,W,M], column-major
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def as_coco(mask, size):
    """One mask in pycocotools' form, a dict."""
    return {"size": [int(side) for side in size], "counts": mask}


def compact(segmentation):
    """A `segmentation` of a COCO file in a tenth of the memory, for `from_coco`; an invalid one is not changed."""
    try:
        if isinstance(segmentation, list):
            return [array("d", polygon) for polygon in segmentation]
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
            return segmentation | {"counts": array("q", segmentation["counts"])}
    except (TypeError, KeyError, OverflowError):
        pass  # from_coco raises the error
    return segmentation


def from_coco(segmentation, size):
    """A `segmentation` of a COCO file (polygons, or run lengths, compressed or not) for an image of `size` (h, w) as
    bytes. Raises ValueError with the reason where it is invalid.
    """
    if isinstance(segmentation, dict):
        return _from_runs(segmentation, size)
    if not (isinstance(segmentation, list) and segmentation):
        raise ValueError("no segmentation: expected polygons or run lengths")
    return coco_masks.merge([_from_polygon(polygon, size) for polygon in segmentation])["counts"]


def _from_polygon(polygon, size):
    if not (isinstance(polygon, list | array) and len(polygon) >= MIN_NUMBERS and len(polygon) % 2 == 0):
        raise ValueError("segmentation has a polygon that is not a list of three or more x, y")
    try:
        finite = math.isfinite(sum(polygon))
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        raise ValueError("segmentation has a coordinate that is not a finite number")
    if max(polygon) > MAX_OFFSET * max(size) or min(polygon) < -MAX_OFFSET * max(size):
        raise ValueError(f"segmentation extends from {min(polygon):g} to {max(polygon):g}, far outside the image")
    x, y = np.array(polygon, dtype=np.float64).reshape(-1, 2).T
    length = np.maximum(np.abs(x - np.roll(x, 1)), np.abs(y - np.roll(y, 1))).sum()
    if length > MAX_PERIMETER:
        raise ValueError(f"segmentation has a polygon with a perimeter of {length:g} pixels")
    return coco_masks.frPyObjects([list(polygon)], *size)[0]


def _from_runs(segmentation, size):
    counts, annotated_size = segmentation.get("counts"), segmentation.get("size")
    if annotated_size != list(size):
        raise ValueError(f"segmentation has the size (h, w) {annotated_size}, the image {list(size)}")
    if isinstance(counts, list | array):
        if not all(isinstance(run, int) and run >= 0 for run in counts):
            raise ValueError("segmentation has a run length that is not a non-negative integer")
        covered = sum(counts)
    elif isinstance(counts, str | bytes):
        counts = counts.encode(errors="replace") if isinstance(counts, str) else counts
        covered = _covered_pixels(counts)
        if covered < 0:
            raise ValueError("segmentation has malformed compressed counts")
    else:
        raise ValueError("segmentation has no counts")
    if covered != math.prod(size):
        raise ValueError(f"segmentation covers {covered} pixels of {math.prod(size)}")
    if isinstance(counts, bytes):
        return counts
    return coco_masks.frPyObjects({"size": annotated_size, "counts": list(counts)}, *size)["counts"]


def _covered_pixels(counts):
    """The sum of all runs in compressed counts, or -1 where they are malformed: pycocotools does not check them, and
    reads beyond their end or leaves pixels uninitialized.

    A number is characters of five bits each, lowest first, plus 48; 32 is added where more follow, and 16 is set in the
    last one of a negative number. From the fourth number on, it is the difference to the run before the last.
    """
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((digits & 32) == 0)
    if not len(ends) or ends[-1] != len(digits) - 1 or digits.min() < 0 or digits.max() > 63:
        return -1
    lengths = np.diff(ends, prepend=-1)
    if lengths.max() > 7:  # beyond 32 bits
        return -1
    starts = ends - lengths + 1
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((digits & 31) << shifts, starts)
    numbers -= np.where(digits[ends] & 16, 1 << (5 * lengths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return int(numbers.sum()) if (numbers >= 0).all() else -1
