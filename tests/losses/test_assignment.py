"""Targets of anchors against the matching, and micro-batches."""

import pytest
import torch

from losses import assignment
from ops.boxes import encode
from ops.matching import BACKGROUND, IGNORE, match, pad_boxes
from tests.box_helpers import random_boxes, random_target

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
RULES = [(0.5, None, True), (0.5, 0.4, False), (0.5, 0.3, True)]  # threshold, low, keep_best


@pytest.fixture
def case():
    """Anchors and targets: many boxes, none, one, some to ignore."""
    random = torch.Generator().manual_seed(0)
    anchors, targets = random_boxes(200, random), [random_target(count, random) for count in (4, 0, 1, 5)]
    targets[3] |= {"boxes": anchors[[3, 50, 70, 90, 120]], "ignore": torch.tensor([True, False, True, False, True])}
    return anchors, targets


@pytest.mark.parametrize("rule", RULES)
def test_labels_and_offsets_are_those_of_the_matched_boxes(case, rule):
    anchors, targets = case
    matched = assignment.assign(anchors, pad_boxes(targets), WEIGHTS, *rule)
    assert matched["labels"].shape == (4, 200) and matched["labels"].dtype == torch.int64
    assert matched["offsets"].shape == (4, 200, 4) and matched["offsets"].isfinite().all()
    for i, target in enumerate(targets):
        for anchor, box in enumerate(match(*pad_boxes([target]).values(), anchors, *rule)[0].tolist()):
            expected = {BACKGROUND: 0, IGNORE: -1}.get(box)
            assert matched["labels"][i, anchor] == (target["labels"][box] + 1 if expected is None else expected)
            if box >= 0:
                offsets = encode(target["boxes"][box], anchors[anchor], WEIGHTS)
                torch.testing.assert_close(matched["offsets"][i, anchor], offsets)
    assert {-1, 0, 1, 3} <= set(matched["labels"].flatten().tolist())
    assert assignment.count_positives(matched).item() == (matched["labels"] > 0).sum().item() > 0


def test_the_defaults_are_those_of_ssd(case):
    default, explicit = (
        assignment.assign(case[0], pad_boxes(case[1]), WEIGHTS, *rule) for rule in ((), (0.5, 0.5, True))
    )
    torch.testing.assert_close(default, explicit, rtol=0, atol=0)


def test_a_batch_without_boxes(case):
    matched = assignment.assign(case[0], pad_boxes([random_target(0, torch.Generator())] * 2), WEIGHTS, 0.5, 0.4, False)
    assert matched["labels"].tolist() == [[0] * 200] * 2
    torch.testing.assert_close(matched["offsets"], torch.zeros(2, 200, 4))
    assert assignment.count_positives(matched).item() == 0


def test_assign_does_not_keep_the_graph(case):
    matched = assignment.assign(case[0].requires_grad_(), pad_boxes(case[1]), WEIGHTS)
    assert not matched["offsets"].requires_grad


@pytest.mark.parametrize(("accumulate", "parts"), [(1, 1), (2, 2), (3, 2), (4, 4), (9, 4)])
def test_micro_batches_are_the_batch_in_order(case, accumulate, parts):
    matched, images = assignment.assign(case[0], pad_boxes(case[1]), WEIGHTS), torch.arange(4.0)[:, None]
    batches = assignment.micro_batches(accumulate, images, matched)
    assert len(batches) == parts
    torch.testing.assert_close(torch.cat([part for part, _ in batches]), images)
    for name, value in matched.items():
        torch.testing.assert_close(torch.cat([part_matched[name] for _, part_matched in batches]), value)
