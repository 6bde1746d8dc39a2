"""RetinaNet's losses against torchvision, against autograd and the published numbers, and where they must not break."""

import json
import runpy

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from losses import assignment, focal
from models import published

BATCH, ANCHORS, CLASSES = 3, 70, 5


def random_case(seed=0, scale=3.0, dtype=torch.float32):
    """Outputs and goals; labels of all kinds, the last picture without positives."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, CLASSES + 1, (BATCH, ANCHORS), generator=random)
    labels[-1] = labels[-1].clamp(max=0)
    logits = scale * torch.randn(BATCH, ANCHORS, CLASSES, generator=random)
    offsets = torch.randn(BATCH, ANCHORS, 4, generator=random)
    outputs = {"logits": logits.to(dtype).requires_grad_(), "offsets": offsets.to(dtype).requires_grad_()}
    return outputs, {"labels": labels, "offsets": torch.randn(BATCH, ANCHORS, 4, generator=random)}


def plain_loss(outputs, goals, positives, alpha=0.25, gamma=2.0, beta=1 / 9, class_weights=None):
    """The same by a one-hot target, torchvision's focal loss and autograd."""
    labels = goals["labels"]
    used, positive = labels >= 0, labels > 0
    one_hot = F.one_hot(labels.clamp(min=0), CLASSES + 1)[..., 1:].to(outputs["logits"].dtype)
    each = sigmoid_focal_loss(outputs["logits"], one_hot, alpha, gamma)[used]
    weights = torch.ones(CLASSES) if class_weights is None else class_weights
    classification = (each * torch.where(one_hot[used] > 0, weights, 1)).sum()
    regression = F.smooth_l1_loss(outputs["offsets"][positive], goals["offsets"][positive], reduction="sum", beta=beta)
    return {"regression_loss": regression / positives, "classification_loss": classification / positives}


def gradients(losses, outputs):
    return torch.autograd.grad(sum(losses.values()), [outputs["logits"], outputs["offsets"]])


@pytest.mark.parametrize("pieces", [7, 1 << 21])
@pytest.mark.parametrize(
    "settings",
    [{}, {"alpha": 0.6, "gamma": 0.0}, {"gamma": 1.5, "beta": 1.0}, {"class_weights": torch.arange(1.0, CLASSES + 1)}],
)
def test_equals_torchvision(settings, pieces, monkeypatch):
    monkeypatch.setattr(focal, "LOGITS_AT_ONCE", pieces)
    outputs, goals = random_case()
    positives = assignment.count(goals)
    losses = focal.loss(outputs, goals, positives, **settings)
    expected = plain_loss(outputs, goals, positives, **settings)
    assert set(losses) == {"regression_loss", "classification_loss"}
    assert positives > 50 and (goals["labels"] == -1).any()
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name])
    torch.testing.assert_close(gradients(losses, outputs), gradients(expected, outputs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 3.0])
def test_the_slope_is_that_of_the_value(gamma):
    logits = torch.linspace(-18, 18, 601, dtype=torch.float64)
    above, below = (focal.focal(logits + step, gamma)[0] for step in (1e-4, -1e-4))
    torch.testing.assert_close(focal.focal(logits, gamma)[1], (above - below) / 2e-4, rtol=1e-6, atol=1e-8)


def test_anchors_to_ignore_take_no_part():
    outputs, goals = random_case(2)
    with torch.no_grad():
        outputs["logits"][goals["labels"] == -1] = 50.0  # as wrong as can be
    losses = focal.loss(outputs, goals, torch.tensor(1.0))
    logits, offsets = gradients(losses, outputs)
    assert losses["classification_loss"] < 1e4 and (goals["labels"] == -1).sum() > 10
    assert (logits[goals["labels"] == -1] == 0).all() and (logits[goals["labels"] >= 0] != 0).all()
    assert (offsets[goals["labels"] <= 0] == 0).all() and (offsets[goals["labels"] > 0] != 0).all()


def test_without_a_box():
    outputs, goals = random_case(3)
    goals["labels"] = torch.zeros_like(goals["labels"])
    losses = focal.loss(outputs, goals, assignment.count(goals).clamp(min=1))
    assert losses["regression_loss"].item() == 0
    assert losses["classification_loss"].item() > 0
    logits, offsets = gradients(losses, outputs)  # both heads are connected: DDP needs a gradient for every parameter
    assert (offsets == 0).all()
    assert logits.isfinite().all() and (logits > 0).all()
    goals["labels"] -= 1  # everything to ignore
    assert focal.loss(outputs, goals, torch.tensor(1.0))["classification_loss"].item() == 0


@pytest.mark.parametrize("value", [-1e8, -80.0, 80.0, 1e8])
def test_sure_logits_stay_finite(value):
    outputs, goals = random_case(4)
    with torch.no_grad():
        outputs["logits"].fill_(value)
    losses = focal.loss(outputs, goals, torch.tensor(1.0))
    logits, _ = gradients(losses, outputs)
    positive, background = (goals["labels"] > 0).sum(), (goals["labels"] == 0).sum()
    wrong = 0.25 * positive if value < 0 else 0.75 * ((CLASSES - 1) * positive + CLASSES * background)
    torch.testing.assert_close(losses["classification_loss"], wrong * abs(value))
    torch.testing.assert_close(logits.abs().sum(), wrong)
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(dtype):
    outputs, goals = random_case(5, dtype=dtype)
    wide = {name: value.detach().float().requires_grad_() for name, value in outputs.items()}
    losses, expected = (focal.loss(each, goals, torch.tensor(9.0)) for each in (outputs, wide))
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])
    for found, wanted in zip(gradients(losses, outputs), gradients(expected, wide), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-6)


def test_small_float16_gradients_survive_loss_scaling():
    outputs, goals = random_case(6, dtype=torch.float16)
    goals["labels"] = torch.zeros_like(goals["labels"])
    with torch.no_grad():
        outputs["logits"].fill_(-6.0)  # p ** 3 is 1.5e-8, below what float16 holds
    loss = focal.loss(outputs, goals, torch.tensor(1.0))["classification_loss"] * 65536.0
    (gradient,) = torch.autograd.grad(loss, outputs["logits"])
    expected = 65536 * 0.75 * focal.focal(torch.tensor([-6.0]), 2.0)[1].expand(gradient.numel())
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient.float().flatten(), expected, rtol=1e-3, atol=0)


def test_pieces_with_a_shared_normaliser_equal_the_whole_batch():
    outputs, goals = random_case(7)
    positives = assignment.count(goals)
    whole = focal.loss(outputs, goals, positives, box_weight=0.25)
    parts = assignment.pieces(2, torch.arange(BATCH), goals)
    losses = [
        focal.loss({name: value[rows] for name, value in outputs.items()}, part, positives, box_weight=0.25)
        for rows, part in parts
    ]
    total = {name: sum(each[name] for each in losses) for name in whole}
    for name, value in whole.items():
        torch.testing.assert_close(total[name], value)
    torch.testing.assert_close(gradients(total, outputs), gradients(whole, outputs))


def test_box_weight_scales_the_regression_alone():
    outputs, goals = random_case(8)
    plain, weighted = (focal.loss(outputs, goals, torch.tensor(3.0), box_weight=w) for w in (1.0, 0.25))
    torch.testing.assert_close(weighted["regression_loss"], plain["regression_loss"] / 4)
    torch.testing.assert_close(weighted["classification_loss"], plain["classification_loss"])


def test_deterministic_algorithms_have_nothing_to_say():
    outputs, goals = random_case(9)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(focal.loss(outputs, goals, torch.tensor(3.0)), outputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_without_gradients_and_twice_through_the_graph():
    outputs, goals = random_case(10)
    losses = focal.loss(outputs, goals, torch.tensor(3.0))
    with torch.no_grad():
        torch.testing.assert_close(focal.loss(outputs, goals, torch.tensor(3.0)), losses)
    for _ in range(2):
        sum(losses.values()).backward(retain_graph=True)
    kept = outputs["logits"].grad / 2
    torch.testing.assert_close(kept, gradients(losses, outputs)[0])


def test_published_losses(shared):
    """The source's program on rule-made weights: a mean over pictures, each normalised by its own positives."""
    golden = runpy.run_path(str(shared / "upstream/golden.py"))
    case = json.loads((shared / "upstream/retinanet.json").read_text())["retinanet-18-3"]
    state = {n: torch.from_numpy(golden["seeded_array"](n, shape)) for n, shape in case["state_dict"].items() if shape}
    state |= {name: state[name] * factor for name, factor in case["scale"].items()}
    net = published.load(state)
    images = torch.from_numpy(golden["seeded_input"](**case["input"]))
    with torch.no_grad():
        outputs = net(images)
    sums = {"classification_loss": [], "regression_loss": []}
    for i, rows in enumerate(case["annotations"]):
        rows = torch.tensor([row for row in rows if row[4] >= 0])
        target = {"boxes": rows[:, :4], "labels": rows[:, 4].long(), "ignore": torch.zeros(len(rows), dtype=torch.bool)}
        anchors = net.anchors(images.shape[-2:])
        goals = assignment.assign(anchors, [target], net.box_weights, 0.5, 0.4, keep_best=False)
        one = {name: value[i : i + 1] for name, value in outputs.items()}
        losses = focal.loss(one, goals, assignment.count(goals).clamp(min=1), box_weight=0.25)
        for name, value in losses.items():
            sums[name].append(value)
    for name, values in sums.items():
        assert torch.stack(values).mean().item() == pytest.approx(case[name], rel=1e-3)
