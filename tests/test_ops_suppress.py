"""Suppression over the levels of a pyramid against torchvision's own, on the same raw outputs."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNet

from ops.suppress import from_pyramid

SHAPES = [(200, 260), (240, 180)]
LEVELS = [400, 100, 25]


@pytest.fixture
def raw():
    """Outputs of two pictures on three levels, and anchors that overlap and reach over the border."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.rand(sum(LEVELS), 2, generator=generator) * 260
    sides = 20 + 60 * torch.rand(sum(LEVELS), 2, generator=generator)
    anchors = torch.cat([centers - sides / 2, centers + sides / 2], 1)
    logits = torch.randn(2, sum(LEVELS), 4, generator=generator) - 1
    offsets = 0.3 * torch.randn(2, sum(LEVELS), 4, generator=generator)
    return {"logits": logits, "offsets": offsets}, anchors


def of_torchvision(outputs, anchors, weights, score_threshold, iou_threshold, candidates, most):
    settings = SimpleNamespace(
        score_thresh=score_threshold,
        nms_thresh=iou_threshold,
        topk_candidates=candidates,
        detections_per_img=most,
        box_coder=BoxCoder(weights),
    )
    raw = {"cls_logits": outputs["logits"].split(LEVELS, 1), "bbox_regression": outputs["offsets"].split(LEVELS, 1)}
    return RetinaNet.postprocess_detections(settings, raw, [list(anchors.split(LEVELS))] * 2, SHAPES)


@pytest.mark.parametrize("limits", [(0.05, 0.5, 1000, 100), (0.05, 0.5, 50, 300), (0.6, 0.3, 1000, 300)])
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (10, 10, 5, 5)])
def test_equals_torchvision(raw, limits, weights):
    outputs, anchors = raw
    outputs["offsets"] *= torch.tensor(weights)
    found = from_pyramid(outputs, anchors, weights, SHAPES, LEVELS, *limits)
    expected = of_torchvision(outputs, anchors, weights, *limits)
    for one, theirs in zip(found, expected, strict=True):
        assert 20 < len(theirs["scores"]) <= limits[-1]
        torch.testing.assert_close(one["scores"], theirs["scores"], rtol=0, atol=0)
        torch.testing.assert_close(one["boxes"], theirs["boxes"], rtol=0, atol=1e-3)
        assert one["labels"].tolist() == theirs["labels"].tolist()


def test_boxes_are_clipped_to_their_own_picture(raw):
    outputs, anchors = raw
    for one, (height, width) in zip(from_pyramid(outputs, anchors, (1, 1, 1, 1), SHAPES, LEVELS), SHAPES, strict=True):
        low, high = one["boxes"].amin(0), one["boxes"].amax(0)
        assert low.min() == 0
        assert (high[2], high[3]) == (width, height)


def test_every_level_keeps_its_candidates(raw):
    """One candidate a level and no overlap to suppress: as many detections as levels, the best of each."""
    outputs, anchors = raw
    found = from_pyramid(outputs, anchors, (1, 1, 1, 1), SHAPES, LEVELS, iou_threshold=1.0, candidates=1)
    for one, logits in zip(found, outputs["logits"], strict=True):
        best = torch.stack([level.max() for level in logits.split(LEVELS)]).sigmoid()
        torch.testing.assert_close(one["scores"], best.sort(descending=True).values)


def test_half_precision_outputs_give_float32(raw):
    outputs, anchors = raw
    half = {name: value.bfloat16() for name, value in outputs.items()}
    expected = from_pyramid({k: v.float() for k, v in half.items()}, anchors, (1, 1, 1, 1), SHAPES, LEVELS)
    for one, same in zip(from_pyramid(half, anchors, (1, 1, 1, 1), SHAPES, LEVELS), expected, strict=True):
        assert one["boxes"].dtype == one["scores"].dtype == torch.float32
        torch.testing.assert_close(one, same, rtol=0, atol=0)


def test_nothing_found(raw):
    outputs, anchors = raw
    outputs["logits"] -= 100
    for one in from_pyramid(outputs, anchors, (1, 1, 1, 1), SHAPES, LEVELS):
        assert one["boxes"].shape == (0, 4) and one["boxes"].dtype == torch.float32
        assert one["labels"].shape == one["scores"].shape == (0,) and one["labels"].dtype == torch.int64
