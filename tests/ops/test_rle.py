"""Run-length encoded masks against pycocotools, and segmentations that it would read wrongly."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_masks

from ops import rle
from synthetic.shapes import layouts

SIZE = (60, 90)


def test_masks_survive_encoding():
    random = torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(0))
    masks = random < torch.tensor([0, 0.3, 0.9, 1])[:, None, None]
    again = rle.decode(rle.encode(masks), SIZE)
    assert again.dtype == torch.uint8 and again.is_contiguous()
    torch.testing.assert_close(again, masks.to(torch.uint8), rtol=0, atol=0)
    assert rle.encode(masks[:0]) == [] and rle.decode([], SIZE).shape == (0, *SIZE)


def test_all_forms_of_a_segmentation_are_one_mask():
    polygons = [[10.0, 5, 70, 8.5, 60.5, 50, 12, 40], [70, 40, 88, 40, 88, 58]]
    expected = coco_masks.merge(coco_masks.frPyObjects(polygons, *SIZE))
    pixels = coco_masks.decode(expected).astype(bool)
    plain = {"size": list(SIZE), "counts": layouts.run_lengths(pixels)["counts"]}
    compressed = {"size": list(SIZE), "counts": expected["counts"].decode()}
    for form in (polygons, plain, compressed):
        assert rle.from_coco(form, SIZE) == expected["counts"]
        assert rle.from_coco(rle.compact(form), SIZE) == expected["counts"]


def test_compressed_runs_of_any_mask_are_valid():
    """Long runs and differences of both signs: numbers of several characters, and negative ones."""
    random = np.random.default_rng(0)
    for share in (0, 0.0005, 0.01, 0.5, 1):
        for size in ((1, 1), (300, 500), (7, 2000)):
            runs = rle.encode(torch.from_numpy(random.random((1, *size)) < share))[0]
            assert rle.from_coco({"size": list(size), "counts": runs.decode()}, size) == runs


INVALID = [  # segmentation of a 60 x 90 image, a part of the reason
    (None, "no segmentation"),
    ([], "no segmentation: expected"),
    ([[1, 1, 9, 9]], "three or more x, y"),
    ([[1, 1, 9, 9, 4, 4, 5]], "three or more x, y"),
    ([[1, 1, 9, "9", 4, 4]], "not a finite number"),
    ([[1, 1, 9, float("nan"), 4, 4]], "not a finite number"),
    ([[1, 1, 9, 1e9, 4, 4]], "far outside the image"),
    ({"size": [90, 60], "counts": [5400]}, r"\[90, 60\], the image \[60, 90\]"),
    ({"counts": [5400]}, "None, the image"),
    ({"size": [60, 90]}, "no counts"),
    ({"size": [60, 90], "counts": [-1, 5401]}, "not a non-negative integer"),
    ({"size": [60, 90], "counts": [5000, 399]}, "covers 5399 pixels of 5400"),
    ({"size": [60, 90], "counts": "5"}, "covers 5 pixels"),  # pycocotools leaves the other pixels uninitialized
    ({"size": [60, 90], "counts": "zzP"}, "malformed"),
    ({"size": [60, 90], "counts": "é"}, "malformed"),
    ({"size": [60, 90], "counts": ""}, "malformed"),
    ({"size": [60, 90], "counts": "oooooooooooo0"}, "malformed"),
    ({"size": [60, 90], "counts": "oooo"}, "malformed"),  # no number ends
    ({"size": [60, 90], "counts": "0o"}, "malformed"),  # the last one does not
    ({"size": [60, 90], "counts": "/0"}, "malformed"),  # a character below those of numbers
    ({"size": [60, 90], "counts": {}}, "no counts"),
]


@pytest.mark.parametrize(("segmentation", "reason"), INVALID)
def test_invalid_segmentations(segmentation, reason):
    for form in (segmentation, rle.compact(segmentation)):
        with pytest.raises(ValueError, match=reason):
            rle.from_coco(form, SIZE)


def test_a_polygon_longer_than_any_outline_is_refused():
    """pycocotools would take memory for every pixel of it."""
    zigzag = [x for n in range(40) for x in (0, 0, 100_000, 100_000)]
    with pytest.raises(ValueError, match="perimeter"):
        rle.from_coco([zigzag], (100_000, 100_000))
