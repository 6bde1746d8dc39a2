"""Box coding, matching, suppression and pixels against torchvision and against plain loops."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, nms

from ops import matching
from ops.boxes import decode, encode, in_file_pixels, pairwise_iou, to_centers, to_corners
from ops.images import normalize
from ops.matching import BACKGROUND, IGNORE, match, pad_boxes
from ops.suppress import detections, from_multibox

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def random_boxes(count, random, side=100.0):
    corners = torch.rand(count, 2, 2, generator=random) * side
    low, high = corners.amin(1), corners.amax(1)
    return torch.cat([low, torch.maximum(high, low + 4)], dim=1)


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


# ---- boxes ----


def test_coder_round_trip(random):
    anchors, boxes = random_boxes(200, random), random_boxes(200, random)
    offsets = encode(boxes, anchors, WEIGHTS)
    torch.testing.assert_close(decode(offsets, anchors, WEIGHTS), boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(encode(anchors, anchors, WEIGHTS), torch.zeros(200, 4))
    torch.testing.assert_close(to_corners(to_centers(boxes)), boxes)


def test_coder_equals_torchvision(random):
    anchors, boxes = random_boxes(200, random), random_boxes(200, random)
    coder = BoxCoder(WEIGHTS)
    offsets = encode(boxes, anchors, WEIGHTS)
    torch.testing.assert_close(offsets, coder.encode_single(boxes, anchors), rtol=1e-4, atol=1e-4)
    wild = 20 * torch.randn(200, 4, generator=random)  # beyond the limit on the exponent
    torch.testing.assert_close(decode(wild, anchors, WEIGHTS), coder.decode_single(wild, anchors), rtol=1e-4, atol=1e-2)


def test_decode_a_batch_and_half_precision(random):
    anchors = random_boxes(20, random)
    offsets = torch.randn(3, 20, 4, generator=random)
    together = decode(offsets, anchors, WEIGHTS)
    torch.testing.assert_close(together, torch.stack([decode(one, anchors, WEIGHTS) for one in offsets]))
    half = decode(offsets.bfloat16(), anchors, WEIGHTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, decode(offsets.bfloat16().float(), anchors, WEIGHTS))
    assert decode(torch.full((1, 4), 1e4), anchors[:1], WEIGHTS).isfinite().all()


def test_pairwise_iou_equals_torchvision(random):
    boxes, anchors = random_boxes(60, random).view(3, 20, 4), random_boxes(30, random)
    iou = pairwise_iou(boxes, anchors)
    assert iou.shape == (3, 20, 30)
    torch.testing.assert_close(iou, torch.stack([box_iou(one, anchors) for one in boxes]))
    assert pairwise_iou(boxes[0, :0], anchors).shape == (0, 30)


def test_a_box_of_no_area_overlaps_nothing():
    point, anchors = torch.tensor([[5.0, 5, 5, 5]]), torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 5]])
    torch.testing.assert_close(pairwise_iou(point, anchors), torch.zeros(1, 2))


def test_in_file_pixels():
    targets = [{"boxes": torch.tensor([[10.0, 10, 20, 40]]), "shape": (100, 200), "size": (50, 400), "image_id": 7}]
    targets.append({"boxes": torch.zeros(0, 4), "shape": (10, 10), "size": (20, 20), "image_id": 8})
    scaled = in_file_pixels(targets, targets)
    torch.testing.assert_close(scaled[0]["boxes"], torch.tensor([[20.0, 5, 40, 20]]))
    assert scaled[1]["boxes"].shape == (0, 4) and [one["image_id"] for one in scaled] == [7, 8]
    assert targets[0]["boxes"][0, 0] == 10  # a copy
    found = in_file_pixels([{"boxes": targets[0]["boxes"], "scores": 1}, targets[1]], targets)
    assert set(found[0]) == {"boxes", "scores"}
    torch.testing.assert_close(found[0]["boxes"], scaled[0]["boxes"])


# ---- matching ----


def plain_match(target, anchors, threshold, low=None, keep_best=True):
    """The rule in words: what each anchor answers for, one at a time."""
    low = threshold if low is None else low
    boxes, ignore = target["boxes"], target["ignore"].tolist()
    iou = box_iou(boxes, anchors).tolist()
    result = []
    for a in range(len(anchors)):
        best, overlap = BACKGROUND, -1.0
        for b in range(len(boxes)):
            if not ignore[b] and iou[b][a] > overlap:
                best, overlap = b, iou[b][a]
        if overlap < threshold:
            on_ignored = any(ignore[b] and iou[b][a] >= threshold for b in range(len(boxes)))
            best = IGNORE if on_ignored or overlap >= low else BACKGROUND
        result.append(best)
    for b in range(len(boxes)):
        if not ignore[b] and keep_best:
            result[max(range(len(anchors)), key=lambda a: iou[b][a])] = b
    return result


def random_target(count, random, ignored=0.3):
    return {
        "boxes": random_boxes(count, random),
        "labels": torch.randint(5, (count,), generator=random),
        "ignore": torch.rand(count, generator=random) < ignored,
    }


def target_of(boxes, ignore=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    ignore = torch.zeros(len(boxes), dtype=torch.bool) if ignore is None else torch.tensor(ignore)
    return {"boxes": boxes, "labels": torch.arange(len(boxes)), "ignore": ignore}


def match_targets(targets, anchors, *rule):
    return match(*pad_boxes(targets, anchors.device), anchors, *(rule or (0.5,)))


@pytest.mark.parametrize(("low", "keep_best"), [(None, True), (0.08, False), (0.05, True)])
def test_match_equals_a_plain_reference(random, low, keep_best):
    seen = set()
    for case in range(60):
        anchors = random_boxes(40, random)
        targets = [random_target(count, random) for count in (case % 9, 3, 0)]
        threshold = (0.1, 0.3, 0.5)[case % 3]
        rule = (threshold, low, keep_best)
        matched = match_targets(targets, anchors, *rule)
        assert matched.tolist() == [plain_match(target, anchors, *rule) for target in targets]
        seen |= set(matched.flatten().tolist())
    assert {BACKGROUND, IGNORE, 0, 1, 2, 3} <= seen


def test_batched_match_equals_single(random):
    anchors = random_boxes(50, random)
    targets = [random_target(count, random) for count in (5, 0, 1, 9)]
    together = match_targets(targets, anchors)
    for target, matched in zip(targets, together, strict=True):
        assert match_targets([target], anchors)[0].tolist() == matched.tolist()


def test_pictures_in_groups_match_as_together(random, monkeypatch):
    anchors, targets = random_boxes(50, random), [random_target(count, random) for count in (5, 0, 1, 9, 2)]
    together = match_targets(targets, anchors, 0.5, 0.4)
    for pairs in (1, 2 * 9 * 50, 3 * 9 * 50):  # one, two, three pictures at once
        monkeypatch.setattr(matching, "PAIRS_AT_ONCE", pairs)
        assert match_targets(targets, anchors, 0.5, 0.4).tolist() == together.tolist()


def test_the_thresholds_are_inclusive():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.9], [0, 0, 10, 2.5], [0, 0, 10, 2.4]])
    target = target_of([[0, 0, 10, 10]])
    assert match_targets([target], anchors).tolist() == [[0, 0, BACKGROUND, BACKGROUND, BACKGROUND]]
    assert match_targets([target], anchors, 0.5, 0.25).tolist() == [[0, 0, IGNORE, IGNORE, BACKGROUND]]


def test_without_keep_best_a_box_may_have_no_anchor():
    anchors, small = torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90]]), target_of([[2, 2, 3, 3]])
    assert match_targets([small], anchors, 0.5, 0.4, False).tolist() == [[BACKGROUND, BACKGROUND]]
    assert match_targets([small], anchors, 0.5, 0.4, True).tolist() == [[0, BACKGROUND]]


@pytest.mark.parametrize("rule", [(0.0, None, False), (0.5, 0.0, True)])
def test_no_threshold_matches_padding(rule):
    anchors, target = torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90]]), target_of([[0, 0, 10, 10]])
    matched = match_targets([target, target_of([])], anchors, *rule)
    assert matched.tolist() == [[0, BACKGROUND], [BACKGROUND, BACKGROUND]]


def test_every_box_keeps_its_best_anchor_and_the_later_wins():
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90]])
    small = [2, 2, 3, 3]
    assert match_targets([target_of([small])], anchors).tolist() == [[0, BACKGROUND]]
    assert match_targets([target_of([[0, 0, 10, 10], small])], anchors).tolist() == [[1, BACKGROUND]]
    assert match_targets([target_of([small, [0, 0, 10, 10]])], anchors).tolist() == [[1, BACKGROUND]]


def test_boxes_to_ignore_take_no_anchor_from_real_ones():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    matched = match_targets(
        [target_of([[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30]], [False, True, True])], anchors
    )
    assert matched.tolist() == [[0, IGNORE, BACKGROUND]]
    assert match_targets([target_of([[2, 2, 3, 3]], [True])], anchors).tolist() == [[BACKGROUND] * 3]


def test_pad_boxes():
    boxes, kind = pad_boxes([target_of([[0, 0, 1, 1], [2, 2, 3, 3]], [False, True]), target_of([])], "cpu")
    assert boxes.shape == (2, 2, 4)
    assert kind.tolist() == [[0, IGNORE], [BACKGROUND, BACKGROUND]]
    boxes, kind = pad_boxes([target_of([])], "cpu")
    assert match(boxes, kind, torch.rand(7, 4), 0.5).tolist() == [[BACKGROUND] * 7]


# ---- suppression ----


def plain_detections(scores, boxes, size, score_threshold, iou_threshold, candidates, most):
    """One class after the other with torchvision's nms."""
    height, width = size
    boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], 2).flatten(1)
    found = []
    for label in range(scores.shape[1]):
        of_class = scores[:, label]
        kept = (of_class > score_threshold).nonzero()[:, 0]
        kept = kept[of_class[kept].argsort(descending=True)][:candidates]
        kept = kept[nms(boxes[kept], of_class[kept], iou_threshold)]
        found += [(of_class[i].item(), label, boxes[i].tolist()) for i in kept]
    return sorted(found, reverse=True)[:most]


@pytest.mark.parametrize("limits", [(0.01, 0.45, 400, 200), (0.5, 0.3, 10, 12), (0.2, 0.6, 5, 200)])
def test_detections_equal_torchvision_class_by_class(random, limits):
    scores = torch.rand(3, 80, 4, generator=random)
    boxes = random_boxes(240, random, side=120).view(3, 80, 4) - 10  # some reach over the border
    results = detections(scores, boxes, (90, 100), *limits)
    for one, image_scores, image_boxes in zip(results, scores, boxes, strict=True):
        expected = plain_detections(image_scores, image_boxes, (90, 100), *limits)
        torch.testing.assert_close(one["scores"], torch.tensor([score for score, _, _ in expected]))
        assert one["labels"].tolist() == [label for _, label, _ in expected]
        torch.testing.assert_close(one["boxes"], torch.tensor([box for _, _, box in expected]))
        assert len(expected) > 5


def test_batched_detections_equal_single(random):
    scores, boxes = torch.rand(3, 50, 2, generator=random), random_boxes(150, random).view(3, 50, 4)
    together = detections(scores, boxes, (100, 100))
    for i, one in enumerate(together):
        alone = detections(scores[i : i + 1], boxes[i : i + 1], (100, 100))[0]
        for name, value in one.items():
            torch.testing.assert_close(alone[name], value, rtol=0, atol=0)


def test_nothing_found(random):
    one = detections(torch.zeros(1, 5, 3), random_boxes(5, random)[None], (100, 100))[0]
    assert one["boxes"].shape == (0, 4) and one["boxes"].dtype == torch.float32
    assert one["labels"].shape == one["scores"].shape == (0,) and one["labels"].dtype == torch.int64


# ---- pixels ----


def test_normalize():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    mean, std = (123.0, 117.0, 104.0), (1.0, 2.0, 128.0)
    result = normalize(images, mean, std)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    for channel in range(3):
        torch.testing.assert_close(result[:, channel], (images[:, channel].float() - mean[channel]) / std[channel])
    # what a loader hands over may lie in either order
    torch.testing.assert_close(normalize(images.contiguous(memory_format=torch.channels_last), mean, std), result)


def test_from_multibox_takes_background_off_and_decodes():
    anchors = torch.tensor([[10.0, 10, 30, 30], [50, 50, 90, 90]])
    logits = torch.tensor([[[0.0, 9, 0], [9, 0, 0]]])
    found = from_multibox({"logits": logits, "offsets": torch.zeros(1, 2, 4)}, anchors, (10, 10, 5, 5), (100, 100))
    assert found[0]["labels"][0] == 0
    torch.testing.assert_close(found[0]["boxes"][0], anchors[0])
    assert found[0]["scores"][0] > 0.99
    assert (found[0]["scores"][1:] < 0.01).all()
