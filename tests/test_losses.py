"""SSD's MultiBox loss against the published rule in plain loops, and where it must not break."""

import math

import pytest
import torch

from losses import assignment, multibox
from ops.boxes import encode
from ops.matching import BACKGROUND, match, pad_boxes

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
CLASSES, PRIORS = 3, 60


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def random_boxes(count, random):
    corners = torch.rand(count, 2, 2, generator=random) * 100
    return torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1)


def random_target(count, random, ignored=0.0):
    return {
        "boxes": random_boxes(count, random),
        "labels": torch.randint(CLASSES, (count,), generator=random),
        "ignore": torch.rand(count, generator=random) < ignored,
    }


def random_outputs(batch, random, scale=1.0):
    return {
        "logits": (scale * torch.randn(batch, PRIORS, CLASSES + 1, generator=random)).requires_grad_(),
        "offsets": (scale * torch.randn(batch, PRIORS, 4, generator=random)).requires_grad_(),
    }


@pytest.fixture
def batch(random):
    """Anchors, targets (many boxes, none, one, some to ignore) and outputs."""
    anchors = random_boxes(PRIORS, random)
    targets = [random_target(4, random), random_target(0, random), random_target(1, random)]
    return anchors, [*targets, random_target(5, random, ignored=0.5)], random_outputs(4, random)


def smooth_l1(difference):
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def plain_loss(outputs, anchors, targets, threshold=0.5, weights=None):
    """The published rule, a prior and a number at a time: (regression sum, classification sum, positives)."""
    regression = classification = positives = 0
    weights = weights or [1.0] * (CLASSES + 1)
    for i, target in enumerate(targets):
        matched = match(*pad_boxes([target], "cpu"), anchors, threshold)[0].tolist()
        entropy_of, background = {}, []
        for prior, box in enumerate(matched):
            logits = outputs["logits"][i, prior].tolist()
            log_sum = max(logits) + math.log(sum(math.exp(v - max(logits)) for v in logits))
            if box >= 0:
                label = int(target["labels"][box]) + 1
                goal = encode(target["boxes"][box], anchors[prior], WEIGHTS).tolist()
                said = outputs["offsets"][i, prior].tolist()
                regression += sum(smooth_l1(a - b) for a, b in zip(said, goal))
                entropy_of[prior] = weights[label] * (log_sum - logits[label])
            elif box == BACKGROUND:
                background.append((log_sum - logits[0], prior))
        count = len(entropy_of)
        background.sort(key=lambda pair: (-pair[0], pair[1]))
        mined = background[: 3 * max(1, count)]
        classification += sum(entropy_of.values()) + weights[0] * sum(value for value, _ in mined)
        positives += count
    return regression, classification, positives


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 4.0]])
def test_equals_the_published_rule_in_plain_loops(batch, weights):
    anchors, targets, outputs = batch
    goals = assignment.assign(anchors, targets, WEIGHTS)
    positives = assignment.count(goals)
    losses = multibox.loss(outputs, goals, positives, class_weights=weights and torch.tensor(weights))
    regression, classification, count = plain_loss(outputs, anchors, targets, weights=weights)
    assert positives.item() == count > 5
    assert set(losses) == {"regression_loss", "classification_loss"}
    torch.testing.assert_close(losses["regression_loss"].item(), regression / count, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["classification_loss"].item(), classification / count, rtol=1e-5, atol=1e-5)


def test_without_a_box(random):
    anchors, outputs = random_boxes(PRIORS, random), random_outputs(2, random)
    goals = assignment.assign(anchors, [random_target(0, random)] * 2, WEIGHTS)
    losses = multibox.loss(outputs, goals, assignment.count(goals).clamp(min=1))
    assert losses["regression_loss"].item() == 0
    assert losses["classification_loss"].item() > 0
    sum(losses.values()).backward()
    for value in outputs.values():  # DDP needs a gradient for every parameter
        assert value.grad is not None and value.grad.isfinite().all()
    assert (outputs["offsets"].grad == 0).all()
    assert (outputs["logits"].grad != 0).any(dim=2).sum(1).tolist() == [3, 3]  # as if there were one positive


def test_batched_equals_single_pictures(batch):
    anchors, targets, outputs = batch
    goals = assignment.assign(anchors, targets, WEIGHTS)
    positives = assignment.count(goals)
    together = multibox.loss(outputs, goals, positives)
    alone = []
    for i, target in enumerate(targets):
        one = {name: value[i : i + 1] for name, value in outputs.items()}
        alone.append(multibox.loss(one, assignment.assign(anchors, [target], WEIGHTS), positives))
    for name, value in together.items():
        torch.testing.assert_close(sum(losses[name] for losses in alone), value)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7])
def test_pieces_with_a_shared_normaliser_equal_the_whole_batch(batch, number):
    anchors, targets, outputs = batch
    goals = assignment.assign(anchors, targets, WEIGHTS)
    positives = assignment.count(goals)
    whole = multibox.loss(outputs, goals, positives)
    sum(whole.values()).backward()
    expected = outputs["logits"].grad.clone()
    outputs["logits"].grad = None
    images, total = torch.arange(4.0), dict.fromkeys(whole, 0.0)
    parts = assignment.pieces(number, images, goals)
    assert torch.cat([part for part, _ in parts]).tolist() == images.tolist()
    for part, part_goals in parts:
        rows = part.long()
        losses = multibox.loss({k: v[rows] for k, v in outputs.items()}, part_goals, positives)
        sum(losses.values()).backward()
        total = {name: total[name] + losses[name].detach() for name in total}
    for name, value in whole.items():
        torch.testing.assert_close(total[name], value.detach())
    torch.testing.assert_close(outputs["logits"].grad, expected)


def plain_hardest(logits, labels, each):
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    for i in range(len(labels)):
        background = (labels[i] == 0).nonzero()[:, 0].tolist()
        value = (torch.logsumexp(logits[i], -1) - logits[i, :, 0]).tolist()
        background.sort(key=lambda prior: (-value[prior], prior))
        for prior in background[: each * max(1, int((labels[i] > 0).sum()))]:
            chosen[i, prior] = True
    return chosen


def test_hardest_equals_a_plain_reference(random):
    for each in (1, 3, 3, 3):
        logits = torch.randn(5, 30, 4, generator=random)
        logits[3:] = logits[3:].round()  # many ties
        labels = torch.randint(-1, 4, (5, 30), generator=random) * (torch.rand(5, 30, generator=random) < 0.3)
        labels[0] = labels[0].clamp(max=0)  # no positive
        labels[1] = 1  # nothing to mine
        labels[2, 8:] = 1  # too few to mine
        torch.testing.assert_close(multibox.hardest(logits, labels, each), plain_hardest(logits, labels, each))


def test_hardest_by_hand():
    logits = torch.zeros(1, 8, 2)
    logits[0, :, 1] = torch.tensor([5.0, 9, 1, 1, 1, 2, 9, 9])  # the greater, the worse for background
    labels = torch.tensor([[1, 0, 0, 0, 0, 0, -1, 0]])
    assert multibox.hardest(logits, labels, 3)[0].nonzero()[:, 0].tolist() == [1, 5, 7]
    assert multibox.hardest(logits, labels, 4)[0].nonzero()[:, 0].tolist() == [1, 2, 5, 7]  # of equals the first


def test_boxes_to_ignore_are_neither_positive_nor_mined(random):
    anchors = random_boxes(PRIORS, random)
    target = {
        "boxes": anchors[[7, 20]],
        "labels": torch.tensor([1, 2]),
        "ignore": torch.tensor([True, False]),
    }
    goals = assignment.assign(anchors, [target], WEIGHTS)
    assert goals["labels"][0, 7] == -1 and goals["labels"][0, 20] == 3
    outputs = random_outputs(1, random)
    with torch.no_grad():
        outputs["logits"][0, 7] = torch.tensor([-50.0, 0, 50, 0])  # would be mined first
    sum(multibox.loss(outputs, goals, assignment.count(goals)).values()).backward()
    assert (outputs["logits"].grad[0, 7] == 0).all() and (outputs["offsets"].grad[0, 7] == 0).all()
    assert (outputs["logits"].grad[0, 20] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(batch, dtype):
    anchors, targets, outputs = batch
    goals = assignment.assign(anchors, targets, WEIGHTS)
    half = {name: value.detach().to(dtype).requires_grad_() for name, value in outputs.items()}
    losses = multibox.loss(half, goals, assignment.count(goals))
    expected = multibox.loss({name: value.float() for name, value in half.items()}, goals, assignment.count(goals))
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])
    sum(losses.values()).backward()
    assert all(value.grad.isfinite().all() for value in half.values())


@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_absurd_outputs_stay_finite(batch, random, scale):
    anchors, targets, _ = batch
    goals = assignment.assign(anchors, targets, WEIGHTS)
    outputs = random_outputs(4, random, scale)
    losses = multibox.loss(outputs, goals, assignment.count(goals))
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(value.grad.isfinite().all() for value in outputs.values())
