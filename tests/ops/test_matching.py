"""Matching against a plain loop over anchors."""

import pytest
import torch
from torchvision.ops import box_iou

from ops import matching
from ops.matching import BACKGROUND, IGNORE, match, pad_boxes
from tests.box_helpers import random_boxes, random_target


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def plain_match(target, anchors, threshold, low=None, keep_best=True):
    """The matching of each anchor, one at a time."""
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


def make_target(boxes, ignore=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    ignore = torch.zeros(len(boxes), dtype=torch.bool) if ignore is None else torch.tensor(ignore)
    return {"boxes": boxes, "labels": torch.arange(len(boxes)), "ignore": ignore}


def match_targets(targets, anchors, *rule):
    return match(*pad_boxes(targets).values(), anchors, *(rule or (0.5,)))


@pytest.mark.parametrize(("low", "keep_best"), [(None, True), (0.08, False), (0.05, True)])
def test_match_equals_plain_loops(random, low, keep_best):
    results = set()
    for case in range(60):
        anchors = random_boxes(40, random)
        targets = [random_target(count, random, ignored=0.3) for count in (case % 9, 3, 0)]
        threshold = (0.1, 0.3, 0.5)[case % 3]
        rule = (threshold, low, keep_best)
        matched = match_targets(targets, anchors, *rule)
        assert matched.tolist() == [plain_match(target, anchors, *rule) for target in targets]
        results |= set(matched.flatten().tolist())
    assert {BACKGROUND, IGNORE, 0, 1, 2, 3} <= results


@pytest.mark.parametrize("max_pairs", [1, 2 * 9 * 50, 3 * 9 * 50])  # one, two, three images at once
def test_batch_in_parts_equals_single_images(random, monkeypatch, max_pairs):
    anchors = random_boxes(50, random)
    targets = [random_target(count, random, ignored=0.3) for count in (5, 0, 1, 9, 2)]
    batch = match_targets(targets, anchors, 0.5, 0.4)
    assert batch.tolist() == [match_targets([target], anchors, 0.5, 0.4)[0].tolist() for target in targets]
    monkeypatch.setattr(matching, "MAX_PAIRS", max_pairs)
    assert match_targets(targets, anchors, 0.5, 0.4).tolist() == batch.tolist()


def test_thresholds_are_inclusive():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.9], [0, 0, 10, 2.5], [0, 0, 10, 2.4]])
    target = make_target([[0, 0, 10, 10]])
    assert match_targets([target], anchors).tolist() == [[0, 0, BACKGROUND, BACKGROUND, BACKGROUND]]
    assert match_targets([target], anchors, 0.5, 0.25).tolist() == [[0, 0, IGNORE, IGNORE, BACKGROUND]]


def test_without_keep_best_a_box_may_have_no_anchor():
    anchors, small = torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90]]), make_target([[2, 2, 3, 3]])
    assert match_targets([small], anchors, 0.5, 0.4, False).tolist() == [[BACKGROUND, BACKGROUND]]
    assert match_targets([small], anchors, 0.5, 0.4, True).tolist() == [[0, BACKGROUND]]


@pytest.mark.parametrize("rule", [(0.0, None, False), (0.5, 0.0, True)])
def test_padding_is_never_matched(rule):
    anchors, target = torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90]]), make_target([[0, 0, 10, 10]])
    matched = match_targets([target, make_target([])], anchors, *rule)
    assert matched.tolist() == [[0, BACKGROUND], [BACKGROUND, BACKGROUND]]


def test_of_two_boxes_with_the_same_best_anchor_the_later_is_matched():
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90]])
    small = [2, 2, 3, 3]
    assert match_targets([make_target([small])], anchors).tolist() == [[0, BACKGROUND]]
    assert match_targets([make_target([[0, 0, 10, 10], small])], anchors).tolist() == [[1, BACKGROUND]]
    assert match_targets([make_target([small, [0, 0, 10, 10]])], anchors).tolist() == [[1, BACKGROUND]]


def test_boxes_to_ignore_take_no_anchor_from_real_ones():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    target = make_target([[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30]], [False, True, True])
    assert match_targets([target], anchors).tolist() == [[0, IGNORE, BACKGROUND]]
    assert match_targets([make_target([[2, 2, 3, 3]], [True])], anchors).tolist() == [[BACKGROUND] * 3]


def test_pad_boxes():
    boxes, labels = pad_boxes([make_target([[0, 0, 1, 1], [2, 2, 3, 3]], [False, True]), make_target([])]).values()
    assert boxes.shape == (2, 2, 4)
    assert labels.tolist() == [[0, IGNORE], [BACKGROUND, BACKGROUND]]
    boxes, labels = pad_boxes([make_target([])]).values()
    assert match(boxes, labels, torch.rand(7, 4), 0.5).tolist() == [[BACKGROUND] * 7]
