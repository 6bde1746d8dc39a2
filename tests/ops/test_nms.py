"""Detections of SSD and RetinaNet against torchvision, from the same raw outputs."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.ops import clip_boxes_to_image, nms

from ops.nms import multiclass_nms, nms_of_groups, retinanet_detections, ssd_detections, suppress
from tests.box_helpers import random_boxes

SHAPES = [(200, 260), (240, 180)]
LEVELS = [400, 100, 25]


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


# ---- multiclass NMS, SSD


def plain_nms(scores, boxes, size, score_threshold, iou_threshold, max_candidates, max_detections):
    """One class after the other with torchvision's nms."""
    boxes = clip_boxes_to_image(boxes, size)
    detections = []
    for label, class_scores in enumerate(scores.T):
        index = (class_scores > score_threshold).nonzero()[:, 0]
        index = index[class_scores[index].argsort(descending=True)][:max_candidates]
        index = index[nms(boxes[index], class_scores[index], iou_threshold)]
        detections += [(class_scores[i].item(), label, boxes[i].tolist()) for i in index]
    return sorted(detections, reverse=True)[:max_detections]


@pytest.mark.parametrize("limits", [(0.01, 0.45, 400, 200), (0.5, 0.3, 10, 12), (0.2, 0.6, 5, 200)])
def test_multiclass_nms_equals_torchvision_class_by_class(random, limits):
    scores = torch.rand(3, 80, 4, generator=random)
    boxes = random_boxes(240, random, side=120).view(3, 80, 4) - 10  # some extend beyond the image
    results = multiclass_nms(scores, boxes, (90, 100), *limits)
    for result, image_scores, image_boxes in zip(results, scores, boxes, strict=True):
        expected = plain_nms(image_scores, image_boxes, (90, 100), *limits)
        torch.testing.assert_close(result["scores"], torch.tensor([score for score, _, _ in expected]))
        assert result["labels"].tolist() == [label for _, label, _ in expected]
        torch.testing.assert_close(result["boxes"], torch.tensor([box for _, _, box in expected]))
        assert len(expected) > 5


def test_multiclass_nms_of_a_batch_equals_single_images(random):
    scores, boxes = torch.rand(3, 50, 2, generator=random), random_boxes(150, random).view(3, 50, 4)
    for i, result in enumerate(multiclass_nms(scores, boxes, (100, 100))):
        single = multiclass_nms(scores[i : i + 1], boxes[i : i + 1], (100, 100))[0]
        torch.testing.assert_close(single, result, rtol=0, atol=0)


@pytest.mark.parametrize("side", [100, 4000])
def test_one_call_for_the_batch_keeps_what_a_call_per_image_keeps(random, side):
    """A GPU gets one call for all images and classes, a CPU one for each image."""
    count = 4 * 300
    boxes = random_boxes(count, random, side).view(4, 300, 4)
    scores, labels = torch.rand(4, 300, generator=random), torch.randint(5, (4, 300), generator=random)
    valid = torch.rand(4, 300, generator=random) < 0.8
    keep = suppress(boxes, scores, labels, valid, 0.4)
    image, row = valid.nonzero(as_tuple=True)
    kept = nms_of_groups(boxes[valid], scores[valid], labels[valid], image, 0.4)
    expected = torch.zeros_like(valid)
    expected[image[kept], row[kept]] = True
    assert 0 < keep.sum() < valid.sum()
    assert torch.equal(keep, expected)


def test_nothing_is_kept_of_no_candidates(random):
    boxes, none = random_boxes(6, random).view(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
    assert torch.equal(suppress(boxes, torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.int64), none, 0.5), none)


def test_multiclass_nms_without_detections(random):
    result = multiclass_nms(torch.zeros(1, 5, 3), random_boxes(5, random)[None], (100, 100))[0]
    assert result["boxes"].shape == (0, 4) and result["boxes"].dtype == torch.float32
    assert result["labels"].shape == result["scores"].shape == (0,) and result["labels"].dtype == torch.int64


def test_ssd_detections_are_decoded_and_without_background():
    anchors = torch.tensor([[10.0, 10, 30, 30], [50, 50, 90, 90]])
    outputs = {"logits": torch.tensor([[[0.0, 9, 0], [9, 0, 0]]]), "offsets": torch.zeros(1, 2, 4)}
    result = ssd_detections(outputs, anchors, (10, 10, 5, 5), (100, 100))[0]
    assert result["labels"][0] == 0
    torch.testing.assert_close(result["boxes"][0], anchors[0])
    assert result["scores"][0] > 0.99
    assert (result["scores"][1:] < 0.01).all()


# ---- RetinaNet


@pytest.fixture
def raw(random):
    """Outputs for two images on three levels, and anchors that overlap and extend beyond the image."""
    centers = torch.rand(sum(LEVELS), 2, generator=random) * 260
    sides = 20 + 60 * torch.rand(sum(LEVELS), 2, generator=random)
    anchors = torch.cat([centers - sides / 2, centers + sides / 2], 1)
    logits = torch.randn(2, sum(LEVELS), 4, generator=random) - 1
    offsets = 0.3 * torch.randn(2, sum(LEVELS), 4, generator=random)
    return {"logits": logits, "offsets": offsets}, anchors


def torchvision_detections(outputs, anchors, weights, score_threshold, iou_threshold, max_candidates, max_detections):
    settings = SimpleNamespace(
        score_thresh=score_threshold,
        nms_thresh=iou_threshold,
        topk_candidates=max_candidates,
        detections_per_img=max_detections,
        box_coder=BoxCoder(weights),
    )
    raw = {"cls_logits": outputs["logits"].split(LEVELS, 1), "bbox_regression": outputs["offsets"].split(LEVELS, 1)}
    return RetinaNet.postprocess_detections(settings, raw, [list(anchors.split(LEVELS))] * 2, SHAPES)


def detect(outputs, anchors, **limits):
    return retinanet_detections(outputs, anchors, (1, 1, 1, 1), SHAPES, LEVELS, **limits)


@pytest.mark.parametrize("limits", [(0.05, 0.5, 1000, 100), (0.05, 0.5, 50, 300), (0.6, 0.3, 1000, 300)])
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (10, 10, 5, 5)])
def test_retinanet_detections_equal_torchvision(raw, limits, weights):
    outputs, anchors = raw
    outputs["offsets"] *= torch.tensor(weights)
    results = retinanet_detections(outputs, anchors, weights, SHAPES, LEVELS, *limits)
    for result, expected in zip(results, torchvision_detections(outputs, anchors, weights, *limits), strict=True):
        assert 20 < len(expected["scores"]) <= limits[-1]
        torch.testing.assert_close(result["scores"], expected["scores"], rtol=0, atol=0)
        torch.testing.assert_close(result["boxes"], expected["boxes"], rtol=0, atol=1e-3)
        assert result["labels"].tolist() == expected["labels"].tolist()


def test_boxes_are_clipped_to_their_own_image(raw):
    for result, (height, width) in zip(detect(*raw), SHAPES, strict=True):
        low, high = result["boxes"].amin(0), result["boxes"].amax(0)
        assert low.min() == 0
        assert (high[2], high[3]) == (width, height)


def test_each_level_keeps_its_candidates(raw):
    """With one candidate per level and without suppression, the detections are the best of each level."""
    results = detect(*raw, iou_threshold=1.0, max_candidates=1)
    for result, logits in zip(results, raw[0]["logits"], strict=True):
        best = torch.stack([level.max() for level in logits.split(LEVELS)]).sigmoid()
        torch.testing.assert_close(result["scores"], best.sort(descending=True).values)


def test_half_precision_outputs_give_float32(raw):
    outputs, anchors = raw
    half = {name: value.bfloat16() for name, value in outputs.items()}
    expected = detect({name: value.float() for name, value in half.items()}, anchors)
    for result, same in zip(detect(half, anchors), expected, strict=True):
        assert result["boxes"].dtype == result["scores"].dtype == torch.float32
        torch.testing.assert_close(result, same, rtol=0, atol=0)


def test_retinanet_without_detections(raw):
    outputs, anchors = raw
    outputs["logits"] -= 100
    for result in detect(outputs, anchors):
        assert result["boxes"].shape == (0, 4) and result["boxes"].dtype == torch.float32
        assert result["labels"].shape == result["scores"].shape == (0,) and result["labels"].dtype == torch.int64
