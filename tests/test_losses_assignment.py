"""What each anchor should say, against its matching rule, and the pieces of a batch."""

import pytest
import torch

from losses import assignment
from ops.boxes import encode
from ops.matching import BACKGROUND, IGNORE, match, pad_boxes

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
RULES = [(0.5, None, True), (0.5, 0.4, False), (0.5, 0.3, True)]  # threshold, low, keep_best


def random_boxes(count, random):
    corners = torch.rand(count, 2, 2, generator=random) * 100
    return torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1)


def random_target(count, random):
    return {
        "boxes": random_boxes(count, random),
        "labels": torch.randint(3, (count,), generator=random),
        "ignore": torch.zeros(count, dtype=torch.bool),
    }


@pytest.fixture
def case():
    """Anchors and targets: many boxes, none, one, some to ignore."""
    random = torch.Generator().manual_seed(0)
    anchors, targets = random_boxes(200, random), [random_target(count, random) for count in (4, 0, 1, 5)]
    targets[3] |= {"boxes": anchors[[3, 50, 70, 90, 120]], "ignore": torch.tensor([True, False, True, False, True])}
    return anchors, targets


@pytest.mark.parametrize("rule", RULES)
def test_goals(case, rule):
    anchors, targets = case
    goals = assignment.assign(anchors, targets, WEIGHTS, *rule)
    assert goals["labels"].shape == (4, 200) and goals["labels"].dtype == torch.int64
    assert goals["offsets"].shape == (4, 200, 4) and goals["offsets"].isfinite().all()
    for i, target in enumerate(targets):
        for anchor, box in enumerate(match(*pad_boxes([target], "cpu"), anchors, *rule)[0].tolist()):
            expected = {BACKGROUND: 0, IGNORE: -1}.get(box)
            assert goals["labels"][i, anchor] == (target["labels"][box] + 1 if expected is None else expected)
            if box >= 0:
                goal = encode(target["boxes"][box], anchors[anchor], WEIGHTS)
                torch.testing.assert_close(goals["offsets"][i, anchor], goal)
    assert {-1, 0, 1, 3} <= set(goals["labels"].flatten().tolist())
    assert assignment.count(goals).item() == (goals["labels"] > 0).sum().item() > 0


def test_the_defaults_are_those_of_ssd(case):
    usual, spelled = (assignment.assign(*case, WEIGHTS, *rule) for rule in ((), (0.5, 0.5, True)))
    for name in usual:
        torch.testing.assert_close(usual[name], spelled[name], rtol=0, atol=0)


def test_no_box_at_all(case):
    goals = assignment.assign(case[0], [random_target(0, torch.Generator())] * 2, WEIGHTS, 0.5, 0.4, False)
    assert goals["labels"].tolist() == [[0] * 200] * 2
    torch.testing.assert_close(goals["offsets"], torch.zeros(2, 200, 4))
    assert assignment.count(goals).item() == 0


def test_assign_does_not_keep_the_graph(case):
    goals = assignment.assign(case[0].requires_grad_(), case[1], WEIGHTS)
    assert not goals["offsets"].requires_grad


@pytest.mark.parametrize("number", [1, 2, 3, 4, 9])
def test_pieces_are_the_batch_in_order(case, number):
    goals, images = assignment.assign(*case, WEIGHTS), torch.arange(4.0)[:, None]
    parts = assignment.pieces(number, images, goals)
    assert len(parts) == {1: 1, 2: 2, 3: 2, 4: 4, 9: 4}[number]  # as torch.chunk cuts
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), images)
    for name, value in goals.items():
        torch.testing.assert_close(torch.cat([part_goals[name] for _, part_goals in parts]), value)
