"""CenterFusion's targets and losses against plain loops, where nothing is to be seen, and shared among processes."""

import math

import pytest
import torch
from torch.nn import functional as F

from losses import assignment, centerfusion
from ops import heatmap

SIZE, STRIDE, CLASSES = (14, 25), 4, 10
CHANNELS = {"hm": 10, "reg": 2, "wh": 2, "dep": 1, "rot": 8, "dim": 3, "amodel_offset": 2}
CHANNELS |= {"velocity": 3, "nuscenes_att": 8, "dep_sec": 1, "rot_sec": 8}
GROUPS = [range(0, 2), range(2, 5), range(5, 8)]


def target(objects, random):
    """A picture of 56 x 100 with so many objects, some to ignore, some of unknown velocity or attribute."""
    low = torch.rand(objects, 2, generator=random) * torch.tensor([80.0, 40.0])
    center = torch.randn(objects, 3, generator=random) + torch.tensor([0.0, 0.0, 20.0])
    velocity = torch.randn(objects, 3, generator=random)
    velocity[::3] = math.nan
    boxes = torch.cat([low, low + 1 + 15 * torch.rand(objects, 2, generator=random)], 1)
    return {
        "boxes": boxes,
        "labels": torch.randint(CLASSES, (objects,), generator=random),
        "ignore": torch.arange(objects) % 4 == 3,
        "center": center,
        "dims": 1 + torch.rand(objects, 3, generator=random),
        "alpha": math.pi * (2 * torch.rand(objects, generator=random) - 1),
        "velocity": velocity,
        "attribute": torch.arange(objects) % 9 - 1,
        "amodal": boxes[:, :2] + 20 * torch.randn(objects, 2, generator=random),
    }


@pytest.fixture
def targets():
    random = torch.Generator().manual_seed(3)
    return [target(objects, random) for objects in (9, 0, 14)]


def raw(batch=3, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    shapes = {name: (batch, channels, *SIZE) for name, channels in CHANNELS.items()}
    return {name: torch.randn(shape, generator=random).to(dtype).requires_grad_() for name, shape in shapes.items()}


def goals_of(targets):
    return centerfusion.assign(targets, "cpu", size=SIZE, stride=STRIDE, num_classes=CLASSES)


def gradients(losses, outputs):
    return torch.autograd.grad(sum(losses.values()), list(outputs.values()))


def plain_loss(outputs, targets):
    """One object after the other, by FORMATS' table: every sum over its own count, weights not applied."""
    sums, counts = dict.fromkeys(CHANNELS, 0.0), dict.fromkeys(CHANNELS, 0)
    rot = {name: [[], []] for name in ("rot", "rot_sec")}
    hm = torch.zeros(len(targets), CLASSES, *SIZE)
    for picture, one in enumerate(targets):
        for i in range(len(one["labels"])):
            x1, y1, x2, y2 = (one["boxes"][i] / STRIDE).tolist()
            x, y, label = int((x1 + x2) / 2), int((y1 + y2) / 2), int(one["labels"][i])
            if one["ignore"][i]:
                hm[picture, label, math.floor(y1) : math.ceil(y2), math.floor(x1) : math.ceil(x2)] = 1
                continue
            reach = heatmap.radius(torch.tensor(math.ceil(y2 - y1)), torch.tensor(math.ceil(x2 - x1)))
            peak = heatmap.splat(torch.tensor([[x, y]]), reach[None], torch.tensor([0]), 1, SIZE)[0]
            hm[picture, label] = torch.maximum(hm[picture, label], peak)
            here = {name: maps[picture, :, y, x] for name, maps in outputs.items()}
            p = here["hm"][label].sigmoid()
            sums["hm"] = sums["hm"] - (1 - p) ** 2 * p.log()
            goals = {
                "reg": torch.tensor([(x1 + x2) / 2 - x, (y1 + y2) / 2 - y]),
                "wh": torch.tensor([x2 - x1, y2 - y1]),
            }
            goals |= {"dim": one["dims"][i]}
            goals |= {"amodel_offset": one["amodal"][i] / STRIDE - torch.tensor([x, y])}
            if not one["velocity"][i].isnan().any():
                goals["velocity"] = one["velocity"][i]
            for name, goal in goals.items():
                sums[name] = sums[name] + (here[name] - goal).abs().mean()
                counts[name] += 1
            for name in ("dep", "dep_sec"):
                sums[name] = sums[name] + (1 / here[name][0].sigmoid() - 1 - one["center"][i, 2]).abs()
                counts[name] += 1
            counts["hm"] += 1
            alpha = one["alpha"][i].item()
            inside = (alpha < math.pi / 6 or alpha > 5 * math.pi / 6, alpha > -math.pi / 6 or alpha < -5 * math.pi / 6)
            for name in rot:
                for k, residual in enumerate((alpha + math.pi / 2, alpha - math.pi / 2)):
                    said = here[name][4 * k : 4 * k + 4]
                    sums[name] = sums[name] - said[:2].log_softmax(0)[int(inside[k])]
                    if inside[k]:
                        goal = torch.tensor([math.sin(residual), math.cos(residual)])
                        rot[name][k].append(F.smooth_l1_loss(said[2:], goal, reduction="sum"))
                counts[name] += 1
            attribute = int(one["attribute"][i])
            for k in next((group for group in GROUPS if attribute in group), ()):
                p = here["nuscenes_att"][k].sigmoid()
                sums["nuscenes_att"] = sums["nuscenes_att"] - (p.log() if k == attribute else (1 - p).log())
                counts["nuscenes_att"] += 1
    p = outputs["hm"].sigmoid()
    sums["hm"] = sums["hm"] - ((1 - hm) ** 4 * p**2 * (1 - p).log()).sum()
    losses = {name: value / counts[name] for name, value in sums.items()}
    for name, bins in rot.items():
        losses[name] = losses[name] + sum(torch.stack(each).mean() for each in bins)
    return losses, hm


def test_every_head_equals_a_plain_loop(targets):
    outputs, goals = raw(), goals_of(targets)
    losses = centerfusion.loss(outputs, goals, centerfusion.count(goals))
    expected, hm = plain_loss(outputs, targets)
    torch.testing.assert_close(goals["hm"], hm)
    assert list(losses) == list(centerfusion.WEIGHTS) and set(losses) == set(CHANNELS)
    for name, value in expected.items():
        weight = 0.1 if name == "wh" else 1.0
        torch.testing.assert_close(
            losses[name], weight * value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    wanted = gradients({name: (0.1 if name == "wh" else 1) * value for name, value in expected.items()}, outputs)
    torch.testing.assert_close(gradients(losses, outputs), wanted, rtol=1e-3, atol=1e-5)


def test_counts(targets):
    objects, first, second, velocities, attributes = centerfusion.count(goals_of(targets)).tolist()
    kept = [~one["ignore"] for one in targets]
    assert objects == sum(each.sum() for each in kept) == 7 + 11
    alpha = torch.cat([one["alpha"][each] for one, each in zip(targets, kept)])
    assert first == ((alpha < math.pi / 6) | (alpha > 5 * math.pi / 6)).sum()
    assert second == ((alpha > -math.pi / 6) | (alpha < -5 * math.pi / 6)).sum() and first + second > objects
    assert velocities == sum((~one["velocity"][each].isnan().any(1)).sum() for one, each in zip(targets, kept))
    groups = torch.cat([one["attribute"][each] for one, each in zip(targets, kept)]).tolist()
    assert attributes == sum(0 if k < 0 else 2 if k < 2 else 3 for k in groups)


def test_far_objects_come_first_and_padding_means_nothing(targets):
    goals = goals_of(targets)
    assert goals["mask"].shape == (3, 14) and not goals["mask"][1].any() and not goals["mask"][0, 9:].any()
    assert (goals["dep"][2, :, 0].diff() <= 0).all() and goals["dep"][2, 0] > goals["dep"][2, -1]
    outputs = raw()
    changed = goals | {name: torch.where(goals["mask"][..., None], goals[name], 1e6) for name in ("dep", "dim", "wh")}
    counts = centerfusion.count(goals)
    torch.testing.assert_close(centerfusion.loss(outputs, changed, counts), centerfusion.loss(outputs, goals, counts))


def test_boxes_to_ignore_are_neither_wanted_nor_wrong(targets):
    outputs = raw()
    for one in targets:
        one["ignore"][:] = True
    goals = goals_of(targets)
    losses = centerfusion.loss(outputs, goals, torch.ones(5))
    assert all(value == 0 for name, value in losses.items() if name != "hm") and losses["hm"] > 0
    (slope,) = torch.autograd.grad(losses["hm"], outputs["hm"])
    box, label = (targets[0]["boxes"][0] / STRIDE).tolist(), targets[0]["labels"][0]
    inside = slope[0, label, math.floor(box[1]) : math.ceil(box[3]), math.floor(box[0]) : math.ceil(box[2])]
    assert inside.numel() > 0 and (inside == 0).all() and (slope[1] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [None, -200.0, 200.0])
def test_without_an_object(dtype, value):
    outputs = raw(2, dtype=dtype)
    if value is not None:
        for maps in outputs.values():
            maps.data.fill_(value)
    goals = goals_of([target(0, torch.Generator()) for _ in range(2)])
    assert (centerfusion.count(goals) == 0).all() and (goals["hm"] == 0).all()
    losses = centerfusion.loss(outputs, goals, centerfusion.count(goals).clamp(min=1))
    assert set(losses) == set(CHANNELS)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(loss == 0 for name, loss in losses.items() if name != "hm")
    for name, slope in zip(outputs, gradients(losses, outputs), strict=True):  # DDP needs one for every parameter
        assert slope.isfinite().all()
        assert (slope == 0).all() or name == "hm"


def test_unknown_velocities_and_attributes_cost_nothing():
    random = torch.Generator().manual_seed(5)
    one = target(6, random) | {"ignore": torch.zeros(6, dtype=torch.bool)}
    one |= {"velocity": torch.full((6, 3), math.nan), "attribute": torch.full((6,), -1)}
    outputs, goals = raw(1), goals_of([one])
    losses = centerfusion.loss(outputs, goals, centerfusion.count(goals).clamp(min=1))
    assert losses["velocity"] == 0 and losses["nuscenes_att"] == 0 and losses["dep"] > 0
    slopes = dict(zip(outputs, gradients(losses, outputs)))
    assert all(slope.isfinite().all() for slope in slopes.values())
    assert (slopes["velocity"] == 0).all() and (slopes["dim"] != 0).any()


def test_two_processes_equal_one(targets):
    outputs = raw()
    goals = goals_of(targets)
    whole = centerfusion.loss(outputs, goals, centerfusion.count(goals).clamp(min=1))
    shares = [(slice(0, 1), goals_of(targets[:1])), (slice(1, 3), goals_of(targets[1:]))]
    mean = (sum(centerfusion.count(share) for _, share in shares) / 2).clamp(min=1 / 2)
    parts = [centerfusion.loss({n: v[rows] for n, v in outputs.items()}, share, mean) for rows, share in shares]
    averaged = {name: sum(part[name] for part in parts) / 2 for name in whole}
    torch.testing.assert_close(averaged, whole)
    torch.testing.assert_close(gradients(averaged, outputs), gradients(whole, outputs))


def test_goals_are_cut_with_the_batch(targets):
    outputs, goals = raw(), goals_of(targets)
    counts = centerfusion.count(goals)
    whole = centerfusion.loss(outputs, goals, counts)
    parts = [
        centerfusion.loss({name: value[rows] for name, value in outputs.items()}, some, counts)
        for rows, some in assignment.pieces(3, torch.arange(3), goals)
    ]
    torch.testing.assert_close({name: sum(part[name] for part in parts) for name in whole}, whole)


def test_only_the_heads_that_are_there(targets):
    outputs, goals = raw(), goals_of(targets)
    some = {name: outputs[name] for name in ("hm", "dep")} | {"pc_hm": torch.zeros(3, 1, *SIZE)}
    losses = centerfusion.loss(some, goals, centerfusion.count(goals), {"hm": 2.0, "dep": 0.0, "wh": 1.0})
    whole = centerfusion.loss(outputs, goals, centerfusion.count(goals))
    assert list(losses) == ["hm", "dep"] and losses["dep"] == 0
    torch.testing.assert_close(losses["hm"], 2 * whole["hm"])


def test_right_outputs_cost_nothing(targets):
    """The goals said back by the network: every L1 term is 0."""
    one = targets[2]
    goals = goals_of([one])
    outputs = {name: torch.zeros(1, channels, *SIZE) for name, channels in CHANNELS.items()}
    index, counts = goals["index"][0], goals["mask"][0]
    cells = index[counts]
    assert len(cells.unique()) == len(cells)
    for name in ("reg", "wh", "dim", "amodel_offset", "velocity"):
        outputs[name].flatten(2)[0][:, cells] = goals[name][0][counts].T
    outputs["dep"].flatten(2)[0][:, cells] = -goals["dep"][0][counts].log().T  # 1 / sigmoid(x) - 1 = exp(-x)
    losses = centerfusion.loss(outputs, goals, centerfusion.count(goals))
    for name in ("reg", "wh", "dim", "amodel_offset", "velocity"):
        assert losses[name] == 0
    assert losses["dep"] < 1e-3 < losses["dep_sec"]
