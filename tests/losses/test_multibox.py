"""SSD's MultiBox loss against plain loops and torchvision, and on extreme inputs."""

import math
from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.ssd import SSD

from losses import assignment, multibox
from ops.boxes import encode
from ops.matching import BACKGROUND, match, pad_boxes
from tests.box_helpers import random_boxes, random_target

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
CLASSES, PRIORS = 3, 60


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


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
    """One prior and one number at a time: (regression sum, classification sum, positives)."""
    regression = classification = positives = 0
    weights = weights or [1.0] * (CLASSES + 1)
    for i, target in enumerate(targets):
        matched = match(*pad_boxes([target]).values(), anchors, threshold)[0].tolist()
        entropy_of, background = {}, []
        for prior, box in enumerate(matched):
            logits = outputs["logits"][i, prior].tolist()
            log_sum = max(logits) + math.log(sum(math.exp(v - max(logits)) for v in logits))
            if box >= 0:
                label = int(target["labels"][box]) + 1
                expected = encode(target["boxes"][box], anchors[prior], WEIGHTS).tolist()
                offsets = outputs["offsets"][i, prior].tolist()
                regression += sum(smooth_l1(a - b) for a, b in zip(offsets, expected))
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
def test_equals_plain_loops(batch, weights):
    anchors, targets, outputs = batch
    matched = assignment.assign(anchors, pad_boxes(targets), WEIGHTS)
    num_positives = assignment.count_positives(matched)
    losses = multibox.loss(outputs, matched, num_positives, class_weights=weights and torch.tensor(weights))
    regression, classification, count = plain_loss(outputs, anchors, targets, weights=weights)
    assert num_positives.item() == count > 5
    assert set(losses) == {"regression_loss", "classification_loss"}
    torch.testing.assert_close(losses["regression_loss"].item(), regression / count, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["classification_loss"].item(), classification / count, rtol=1e-5, atol=1e-5)


def test_equals_torchvision(random):
    """For images that all have a positive prior: without one, torchvision has no negatives either."""
    anchors, outputs = random_boxes(PRIORS, random), random_outputs(3, random)
    targets = [random_target(count, random) for count in (4, 1, 6)]
    matched = assignment.assign(anchors, pad_boxes(targets), WEIGHTS)
    losses = multibox.loss(outputs, matched, assignment.count_positives(matched))
    indices = list(match(*pad_boxes(targets).values(), anchors, 0.5))
    settings = SimpleNamespace(box_coder=BoxCoder(WEIGHTS), neg_to_pos_ratio=3)
    raw = {"bbox_regression": outputs["offsets"], "cls_logits": outputs["logits"]}
    targets = [{**target, "labels": target["labels"] + 1} for target in targets]
    expected = SSD.compute_loss(settings, targets, raw, [anchors] * 3, indices)
    torch.testing.assert_close(losses["regression_loss"], expected["bbox_regression"])
    torch.testing.assert_close(losses["classification_loss"], expected["classification"])


def test_without_boxes(random):
    anchors, outputs = random_boxes(PRIORS, random), random_outputs(2, random)
    matched = assignment.assign(anchors, pad_boxes([random_target(0, random)] * 2), WEIGHTS)
    losses = multibox.loss(outputs, matched, assignment.count_positives(matched).clamp(min=1))
    assert losses["regression_loss"].item() == 0
    assert losses["classification_loss"].item() > 0
    sum(losses.values()).backward()
    for value in outputs.values():  # DDP needs a gradient for every parameter
        assert value.grad is not None and value.grad.isfinite().all()
    assert (outputs["offsets"].grad == 0).all()
    negatives = (outputs["logits"].grad != 0).any(dim=2).sum(1)
    assert negatives.tolist() == [3, 3]  # as for one positive


def test_a_batch_equals_single_images(batch):
    anchors, targets, outputs = batch
    matched = assignment.assign(anchors, pad_boxes(targets), WEIGHTS)
    num_positives = assignment.count_positives(matched)
    together = multibox.loss(outputs, matched, num_positives)
    single = []
    for i, target in enumerate(targets):
        image_outputs = {name: value[i : i + 1] for name, value in outputs.items()}
        single.append(
            multibox.loss(image_outputs, assignment.assign(anchors, pad_boxes([target]), WEIGHTS), num_positives)
        )
    torch.testing.assert_close({name: sum(losses[name] for losses in single) for name in together}, together)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 7])
def test_micro_batches_sum_to_the_whole_batch(batch, accumulate):
    anchors, targets, outputs = batch
    matched = assignment.assign(anchors, pad_boxes(targets), WEIGHTS)
    num_positives = assignment.count_positives(matched)
    whole = multibox.loss(outputs, matched, num_positives)
    losses = []
    for rows, part in assignment.micro_batches(accumulate, torch.arange(4), matched):
        losses.append(multibox.loss({name: value[rows] for name, value in outputs.items()}, part, num_positives))
    total = {name: sum(each[name] for each in losses) for name in whole}
    torch.testing.assert_close(total, whole)
    gradients = [torch.autograd.grad(sum(each.values()), list(outputs.values())) for each in (total, whole)]
    torch.testing.assert_close(*gradients)


def plain_hard_negatives(logits, labels, ratio):
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    for i in range(len(labels)):
        background = (labels[i] == 0).nonzero()[:, 0].tolist()
        value = (torch.logsumexp(logits[i], -1) - logits[i, :, 0]).tolist()
        background.sort(key=lambda prior: (-value[prior], prior))
        for prior in background[: ratio * max(1, int((labels[i] > 0).sum()))]:
            chosen[i, prior] = True
    return chosen


def test_hard_negatives_equal_plain_loops(random):
    for ratio in (1, 3, 3, 3):
        logits = torch.randn(5, 30, 4, generator=random)
        logits[3:] = logits[3:].round()  # many ties
        labels = torch.randint(-1, 4, (5, 30), generator=random) * (torch.rand(5, 30, generator=random) < 0.3)
        labels[0] = labels[0].clamp(max=0)  # no positive
        labels[1] = 1  # nothing to mine
        labels[2, 8:] = 1  # too few to mine
        logits[4, :, 0] += 9  # all are sure to be background: losses near 0, also of priors that are none
        expected = plain_hard_negatives(logits, labels, ratio)
        torch.testing.assert_close(multibox.hard_negatives(logits, labels, ratio), expected)


def test_hard_negatives_of_known_logits():
    logits = torch.zeros(1, 8, 2)
    logits[0, :, 1] = torch.tensor([5.0, 9, 1, 1, 1, 2, 9, 9])  # the higher, the higher the loss as background
    labels = torch.tensor([[1, 0, 0, 0, 0, 0, -1, 0]])
    assert multibox.hard_negatives(logits, labels, 3)[0].nonzero()[:, 0].tolist() == [1, 5, 7]
    assert multibox.hard_negatives(logits, labels, 4)[0].nonzero()[:, 0].tolist() == [
        1,
        2,
        5,
        7,
    ]  # the first of equal ones


def test_boxes_to_ignore_are_neither_positive_nor_negative(random):
    anchors = random_boxes(PRIORS, random)
    target = {
        "boxes": anchors[[7, 20]],
        "labels": torch.tensor([1, 2]),
        "ignore": torch.tensor([True, False]),
    }
    matched = assignment.assign(anchors, pad_boxes([target]), WEIGHTS)
    assert matched["labels"][0, 7] == -1 and matched["labels"][0, 20] == 3
    outputs = random_outputs(1, random)
    with torch.no_grad():
        outputs["logits"][0, 7] = torch.tensor([-50.0, 0, 50, 0])  # would be the first negative
    sum(multibox.loss(outputs, matched, assignment.count_positives(matched)).values()).backward()
    assert (outputs["logits"].grad[0, 7] == 0).all() and (outputs["offsets"].grad[0, 7] == 0).all()
    assert (outputs["logits"].grad[0, 20] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(batch, dtype):
    anchors, targets, outputs = batch
    matched = assignment.assign(anchors, pad_boxes(targets), WEIGHTS)
    half = {name: value.detach().to(dtype).requires_grad_() for name, value in outputs.items()}
    losses = multibox.loss(half, matched, assignment.count_positives(matched))
    wide = {name: value.float() for name, value in half.items()}
    torch.testing.assert_close(losses, multibox.loss(wide, matched, assignment.count_positives(matched)))
    assert all(value.dtype == torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    assert all(value.grad.isfinite().all() for value in half.values())


@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_extreme_outputs_stay_finite(batch, random, scale):
    anchors, targets, _ = batch
    matched = assignment.assign(anchors, pad_boxes(targets), WEIGHTS)
    outputs = random_outputs(4, random, scale)
    losses = multibox.loss(outputs, matched, assignment.count_positives(matched))
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(value.grad.isfinite().all() for value in outputs.values())
