"""RetinaNet's losses against torchvision and the published program, and on extreme inputs."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from losses import assignment, focal
from models import pretrained
from ops.matching import pad_boxes
from tests import golden

BATCH, ANCHORS, CLASSES = 3, 70, 5


def random_case(seed=0, dtype=torch.float32):
    """Outputs and matched targets with labels of all kinds; the last image has no positive."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, CLASSES + 1, (BATCH, ANCHORS), generator=random)
    labels[-1] = labels[-1].clamp(max=0)
    logits = 3 * torch.randn(BATCH, ANCHORS, CLASSES, generator=random)
    offsets = torch.randn(BATCH, ANCHORS, 4, generator=random)
    outputs = {"logits": logits.to(dtype).requires_grad_(), "offsets": offsets.to(dtype).requires_grad_()}
    return outputs, {"labels": labels, "offsets": torch.randn(BATCH, ANCHORS, 4, generator=random)}


def plain_loss(outputs, matched, num_positives, alpha=0.25, gamma=2.0, beta=1 / 9, class_weights=None):
    """The same losses with one-hot targets, torchvision's focal loss and autograd."""
    labels = matched["labels"]
    used, positive = labels >= 0, labels > 0
    one_hot = F.one_hot(labels.clamp(min=0), CLASSES + 1)[..., 1:].to(outputs["logits"].dtype)
    terms = sigmoid_focal_loss(outputs["logits"], one_hot, alpha, gamma)[used]
    weights = torch.ones(CLASSES) if class_weights is None else class_weights
    classification = (terms * torch.where(one_hot[used] > 0, weights, 1)).sum()
    offsets, expected = outputs["offsets"][positive], matched["offsets"][positive]
    regression = F.smooth_l1_loss(offsets, expected, reduction="sum", beta=beta)
    return {"regression_loss": regression / num_positives, "classification_loss": classification / num_positives}


def gradients(losses, outputs):
    return torch.autograd.grad(sum(losses.values()), [outputs["logits"], outputs["offsets"]])


@pytest.mark.parametrize("chunk_logits", [7, 1 << 21])
@pytest.mark.parametrize(
    "settings",
    [{}, {"alpha": 0.6, "gamma": 0.0}, {"gamma": 1.5, "beta": 1.0}, {"class_weights": torch.arange(1.0, CLASSES + 1)}],
)
def test_equals_torchvision(settings, chunk_logits, monkeypatch):
    monkeypatch.setitem(focal.CHUNK_LOGITS, "cpu", chunk_logits)
    outputs, matched = random_case()
    num_positives = assignment.count_positives(matched)
    losses = focal.loss(outputs, matched, num_positives, **settings)
    expected = plain_loss(outputs, matched, num_positives, **settings)
    assert num_positives > 50 and (matched["labels"] == -1).any()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradients(losses, outputs), gradients(expected, outputs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 3.0])
def test_the_slope_is_the_derivative(gamma):
    def background_loss(logits):
        power, entropy, _ = focal.background_terms(logits, gamma)
        return power * entropy

    logits = torch.linspace(-18, 18, 601, dtype=torch.float64)
    power, _, slope = focal.background_terms(logits, gamma)
    difference = background_loss(logits + 1e-4) - background_loss(logits - 1e-4)
    torch.testing.assert_close(power * slope, difference / 2e-4, rtol=1e-6, atol=1e-8)


def test_anchors_to_ignore_have_no_loss():
    outputs, matched = random_case(2)
    with torch.no_grad():
        outputs["logits"][matched["labels"] == -1] = 50.0  # would have a large loss
    losses = focal.loss(outputs, matched, torch.tensor(1.0))
    logits, offsets = gradients(losses, outputs)
    assert losses["classification_loss"] < 1e4 and (matched["labels"] == -1).sum() > 10
    assert (logits[matched["labels"] == -1] == 0).all() and (logits[matched["labels"] >= 0] != 0).all()
    assert (offsets[matched["labels"] <= 0] == 0).all() and (offsets[matched["labels"] > 0] != 0).all()


def test_without_boxes():
    outputs, matched = random_case(3)
    matched["labels"] = torch.zeros_like(matched["labels"])
    losses = focal.loss(outputs, matched, assignment.count_positives(matched).clamp(min=1))
    assert losses["regression_loss"].item() == 0
    assert losses["classification_loss"].item() > 0
    logits, offsets = gradients(losses, outputs)  # both heads are connected: DDP needs a gradient for every parameter
    assert (offsets == 0).all()
    assert logits.isfinite().all() and (logits > 0).all()
    matched["labels"] -= 1  # all anchors are to be ignored
    assert focal.loss(outputs, matched, torch.tensor(1.0))["classification_loss"].item() == 0


@pytest.mark.parametrize("value", [-1e8, -80.0, 80.0, 1e8])
def test_extreme_logits_stay_finite(value):
    outputs, matched = random_case(4)
    with torch.no_grad():
        outputs["logits"].fill_(value)
    losses = focal.loss(outputs, matched, torch.tensor(1.0))
    logits, _ = gradients(losses, outputs)
    positive, background = (matched["labels"] > 0).sum(), (matched["labels"] == 0).sum()
    wrong = 0.25 * positive if value < 0 else 0.75 * ((CLASSES - 1) * positive + CLASSES * background)
    torch.testing.assert_close(losses["classification_loss"], wrong * abs(value))
    torch.testing.assert_close(logits.abs().sum(), wrong)
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(dtype):
    outputs, matched = random_case(5, dtype)
    wide = {name: value.detach().float().requires_grad_() for name, value in outputs.items()}
    losses, expected = (focal.loss(each, matched, torch.tensor(9.0)) for each in (outputs, wide))
    torch.testing.assert_close(losses, expected)
    assert all(value.dtype == torch.float32 for value in losses.values())
    for gradient, wide_gradient in zip(gradients(losses, outputs), gradients(expected, wide), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), wide_gradient, rtol=1e-2, atol=1e-6)


def test_loss_scaling_preserves_small_float16_gradients():
    outputs, matched = random_case(6, torch.float16)
    matched["labels"] = torch.zeros_like(matched["labels"])
    with torch.no_grad():
        outputs["logits"].fill_(-6.0)  # p ** 3 is 1.5e-8, below the smallest float16
    loss = focal.loss(outputs, matched, torch.tensor(1.0))["classification_loss"] * 65536.0
    (gradient,) = torch.autograd.grad(loss, outputs["logits"])
    power, _, slope = focal.background_terms(torch.tensor([-6.0]), 2.0)
    expected = (65536 * 0.75 * power * slope).expand(gradient.numel())
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient.float().flatten(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("accumulate", [2, 3])  # 3: single images
def test_micro_batches_sum_to_the_whole_batch(accumulate):
    outputs, matched = random_case(7)
    num_positives = assignment.count_positives(matched)
    whole = focal.loss(outputs, matched, num_positives, box_weight=0.25)
    losses = []
    for rows, part in assignment.micro_batches(accumulate, torch.arange(BATCH), matched):
        part_outputs = {name: value[rows] for name, value in outputs.items()}
        losses.append(focal.loss(part_outputs, part, num_positives, box_weight=0.25))
    total = {name: sum(each[name] for each in losses) for name in whole}
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradients(total, outputs), gradients(whole, outputs))


def test_box_weight_scales_the_regression_loss_alone():
    outputs, matched = random_case(8)
    plain, weighted = (focal.loss(outputs, matched, torch.tensor(3.0), box_weight=w) for w in (1.0, 0.25))
    torch.testing.assert_close(weighted["regression_loss"], plain["regression_loss"] / 4)
    torch.testing.assert_close(weighted["classification_loss"], plain["classification_loss"])


def test_deterministic_algorithms():
    outputs, matched = random_case(9)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(focal.loss(outputs, matched, torch.tensor(3.0)), outputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_without_gradient_and_with_two_backward_passes():
    outputs, matched = random_case(10)
    losses = focal.loss(outputs, matched, torch.tensor(3.0))
    with torch.no_grad():
        torch.testing.assert_close(focal.loss(outputs, matched, torch.tensor(3.0)), losses)
    for _ in range(2):
        sum(losses.values()).backward(retain_graph=True)
    torch.testing.assert_close(outputs["logits"].grad / 2, gradients(losses, outputs)[0])


def test_losses_of_the_published_program():
    """yhenon/pytorch-retinanet divides by the positives of each image and takes the mean over images."""
    case = golden.case("retinanet", "retinanet-18-3")
    state = golden.state_dict(case)
    state |= {name: state[name] * factor for name, factor in case["scale"].items()}
    net, images = pretrained.load(state), golden.images(case)
    with torch.no_grad():
        outputs = net(images)
    losses = []
    for i, rows in enumerate(case["annotations"]):
        rows = torch.tensor([row for row in rows if row[4] >= 0])
        target = {"boxes": rows[:, :4], "labels": rows[:, 4].long(), "ignore": torch.zeros(len(rows), dtype=torch.bool)}
        anchors = net.anchors(images.shape[-2:])
        matched = assignment.assign(anchors, pad_boxes([target]), net.box_weights, 0.5, 0.4, keep_best=False)
        image_outputs = {name: value[i : i + 1] for name, value in outputs.items()}
        num_positives = assignment.count_positives(matched).clamp(min=1)
        losses.append(focal.loss(image_outputs, matched, num_positives, box_weight=0.25))
    for name in ("classification_loss", "regression_loss"):
        mean = torch.stack([each[name] for each in losses]).mean().item()
        assert mean == pytest.approx(case[name], rel=1e-3)
