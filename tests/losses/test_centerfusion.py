"""CenterFusion's targets and losses against plain loops, without objects, and in several processes."""

import math

import pytest
import torch
from torch.nn import functional as F

from losses import assignment, centerfusion
from ops import heatmaps
from ops.radar import associate, depth_tolerance

SIZE, STRIDE, CLASSES = (14, 25), 4, 10
CHANNELS = {"hm": 10, "reg": 2, "wh": 2, "dep": 1, "rot": 8, "dim": 3, "amodel_offset": 2}
CHANNELS |= {"velocity": 3, "nuscenes_att": 8, "dep_sec": 1, "rot_sec": 8}
GROUPS = [range(0, 2), range(2, 5), range(5, 8)]


def make_target(objects, random):
    """A target of a 56 x 100 image; some objects are to be ignored or have no known velocity or attribute."""
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
    return [make_target(objects, random) for objects in (9, 0, 14)]


def random_outputs(batch=3, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    shapes = {name: (batch, channels, *SIZE) for name, channels in CHANNELS.items()}
    return {name: torch.randn(shape, generator=random).to(dtype).requires_grad_() for name, shape in shapes.items()}


def assign(targets):
    return centerfusion.assign(targets, size=SIZE, stride=STRIDE, num_classes=CLASSES)


def gradients(losses, outputs):
    return torch.autograd.grad(sum(losses.values()), list(outputs.values()))


def plain_loss(outputs, targets):
    """(losses, hm), one object after the other: each sum is divided by its own count, weights are not applied."""
    sums, counts = dict.fromkeys(CHANNELS, 0.0), dict.fromkeys(CHANNELS, 0)
    rot = {name: [[], []] for name in ("rot", "rot_sec")}
    hm = torch.zeros(len(targets), CLASSES, *SIZE)
    for image, target in enumerate(targets):
        for i in range(len(target["labels"])):
            x1, y1, x2, y2 = (target["boxes"][i] / STRIDE).tolist()
            x, y, label = int((x1 + x2) / 2), int((y1 + y2) / 2), int(target["labels"][i])
            if target["ignore"][i]:
                hm[image, label, math.floor(y1) : math.ceil(y2), math.floor(x1) : math.ceil(x2)] = 1
                continue
            radius = heatmaps.gaussian_radius(torch.tensor(math.ceil(y2 - y1)), torch.tensor(math.ceil(x2 - x1)))
            peak = heatmaps.draw_gaussian(torch.tensor([[x, y]]), radius[None], torch.tensor([0]), 1, SIZE)[0]
            hm[image, label] = torch.maximum(hm[image, label], peak)
            here = {name: maps[image, :, y, x] for name, maps in outputs.items()}
            p = here["hm"][label].sigmoid()
            sums["hm"] = sums["hm"] - (1 - p) ** 2 * p.log()
            expected = {
                "reg": torch.tensor([(x1 + x2) / 2 - x, (y1 + y2) / 2 - y]),
                "wh": torch.tensor([x2 - x1, y2 - y1]),
                "dim": target["dims"][i],
                "amodel_offset": target["amodal"][i] / STRIDE - torch.tensor([x, y]),
            }
            if not target["velocity"][i].isnan().any():
                expected["velocity"] = target["velocity"][i]
            for name, value in expected.items():
                sums[name] = sums[name] + (here[name] - value).abs().mean()
                counts[name] += 1
            for name in ("dep", "dep_sec"):
                sums[name] = sums[name] + (1 / here[name][0].sigmoid() - 1 - target["center"][i, 2]).abs()
                counts[name] += 1
            counts["hm"] += 1
            alpha = target["alpha"][i].item()
            inside = (alpha < math.pi / 6 or alpha > 5 * math.pi / 6, alpha > -math.pi / 6 or alpha < -5 * math.pi / 6)
            for name in rot:
                for k, residual in enumerate((alpha + math.pi / 2, alpha - math.pi / 2)):
                    predicted = here[name][4 * k : 4 * k + 4]
                    sums[name] = sums[name] - predicted[:2].log_softmax(0)[int(inside[k])]
                    if inside[k]:
                        sine_cosine = torch.tensor([math.sin(residual), math.cos(residual)])
                        rot[name][k].append(F.smooth_l1_loss(predicted[2:], sine_cosine, reduction="sum"))
                counts[name] += 1
            attribute = int(target["attribute"][i])
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


def test_losses_of_all_heads_equal_plain_loops(targets):
    outputs, matched = random_outputs(), assign(targets)
    losses = centerfusion.loss(outputs, matched, centerfusion.count(matched))
    expected, hm = plain_loss(outputs, targets)
    torch.testing.assert_close(matched["hm"], hm)
    assert list(losses) == list(centerfusion.WEIGHTS) and set(losses) == set(CHANNELS)
    expected["wh"] = 0.1 * expected["wh"]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(losses, outputs), gradients(expected, outputs), rtol=1e-3, atol=1e-5)


def test_counts(targets):
    objects, first, second, velocities, attributes = centerfusion.count(assign(targets)).tolist()
    used = [~target["ignore"] for target in targets]
    assert objects == sum(each.sum() for each in used) == 7 + 11
    alpha = torch.cat([target["alpha"][each] for target, each in zip(targets, used)])
    assert first == ((alpha < math.pi / 6) | (alpha > 5 * math.pi / 6)).sum()
    assert second == ((alpha > -math.pi / 6) | (alpha < -5 * math.pi / 6)).sum() and first + second > objects
    assert velocities == sum((~target["velocity"][each].isnan().any(1)).sum() for target, each in zip(targets, used))
    groups = torch.cat([target["attribute"][each] for target, each in zip(targets, used)]).tolist()
    assert attributes == sum(0 if k < 0 else 2 if k < 2 else 3 for k in groups)


def test_farther_objects_come_first_and_padding_has_no_loss(targets):
    matched = assign(targets)
    assert matched["mask"].shape == (3, 14) and not matched["mask"][1].any() and not matched["mask"][0, 9:].any()
    assert (matched["dep"][2, :, 0].diff() <= 0).all() and matched["dep"][2, 0] > matched["dep"][2, -1]
    outputs = random_outputs()
    changed = matched | {
        name: torch.where(matched["mask"][..., None], matched[name], 1e6) for name in ("dep", "dim", "wh")
    }
    counts = centerfusion.count(matched)
    torch.testing.assert_close(centerfusion.loss(outputs, changed, counts), centerfusion.loss(outputs, matched, counts))


def test_boxes_to_ignore_have_no_loss(targets):
    outputs = random_outputs()
    for target in targets:
        target["ignore"][:] = True
    matched = assign(targets)
    losses = centerfusion.loss(outputs, matched, torch.ones(5))
    assert all(value == 0 for name, value in losses.items() if name != "hm") and losses["hm"] > 0
    (gradient,) = torch.autograd.grad(losses["hm"], outputs["hm"])
    box, label = (targets[0]["boxes"][0] / STRIDE).tolist(), targets[0]["labels"][0]
    inside = gradient[0, label, math.floor(box[1]) : math.ceil(box[3]), math.floor(box[0]) : math.ceil(box[2])]
    assert inside.numel() > 0 and (inside == 0).all() and (gradient[1] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [None, -200.0, 200.0])
def test_without_objects(dtype, value):
    outputs = random_outputs(2, dtype=dtype)
    if value is not None:
        for maps in outputs.values():
            maps.data.fill_(value)
    matched = assign([make_target(0, torch.Generator()) for _ in range(2)])
    assert (centerfusion.count(matched) == 0).all() and (matched["hm"] == 0).all()
    losses = centerfusion.loss(outputs, matched, centerfusion.count(matched).clamp(min=1))
    assert set(losses) == set(CHANNELS)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(loss == 0 for name, loss in losses.items() if name != "hm")
    for name, gradient in zip(outputs, gradients(losses, outputs), strict=True):  # DDP needs one for every parameter
        assert gradient.isfinite().all()
        assert (gradient == 0).all() or name == "hm"


def test_unknown_velocities_and_attributes_have_no_loss():
    random = torch.Generator().manual_seed(5)
    target = make_target(6, random) | {"ignore": torch.zeros(6, dtype=torch.bool)}
    target |= {"velocity": torch.full((6, 3), math.nan), "attribute": torch.full((6,), -1)}
    outputs, matched = random_outputs(1), assign([target])
    losses = centerfusion.loss(outputs, matched, centerfusion.count(matched).clamp(min=1))
    assert losses["velocity"] == 0 and losses["nuscenes_att"] == 0 and losses["dep"] > 0
    gradients_of = dict(zip(outputs, gradients(losses, outputs)))
    assert all(gradient.isfinite().all() for gradient in gradients_of.values())
    assert (gradients_of["velocity"] == 0).all() and (gradients_of["dim"] != 0).any()


def test_two_processes_equal_one(targets):
    outputs = random_outputs()
    matched = assign(targets)
    whole = centerfusion.loss(outputs, matched, centerfusion.count(matched).clamp(min=1))
    shares = [(slice(0, 1), assign(targets[:1])), (slice(1, 3), assign(targets[1:]))]
    mean = (sum(centerfusion.count(share) for _, share in shares) / 2).clamp(min=1 / 2)
    parts = [centerfusion.loss({n: v[rows] for n, v in outputs.items()}, share, mean) for rows, share in shares]
    averaged = {name: sum(part[name] for part in parts) / 2 for name in whole}
    torch.testing.assert_close(averaged, whole)
    torch.testing.assert_close(gradients(averaged, outputs), gradients(whole, outputs))


def test_micro_batches_sum_to_the_whole_batch(targets):
    outputs, matched = random_outputs(), assign(targets)
    counts = centerfusion.count(matched)
    whole = centerfusion.loss(outputs, matched, counts)
    parts = [
        centerfusion.loss({name: value[rows] for name, value in outputs.items()}, some, counts)
        for rows, some in assignment.micro_batches(3, torch.arange(3), matched)
    ]
    torch.testing.assert_close({name: sum(part[name] for part in parts) for name in whole}, whole)


def test_only_heads_in_outputs_and_weights_have_a_loss(targets):
    outputs, matched = random_outputs(), assign(targets)
    some = {name: outputs[name] for name in ("hm", "dep")} | {"pc_hm": torch.zeros(3, 1, *SIZE)}
    losses = centerfusion.loss(some, matched, centerfusion.count(matched), {"hm": 2.0, "dep": 0.0, "wh": 1.0})
    whole = centerfusion.loss(outputs, matched, centerfusion.count(matched))
    assert list(losses) == ["hm", "dep"] and losses["dep"] == 0
    torch.testing.assert_close(losses["hm"], 2 * whole["hm"])


def test_class_weights(targets):
    """The weighted loss is the sum over classes of the weight and the loss of that class alone."""
    outputs, matched = random_outputs(), assign(targets)
    counts = centerfusion.count(matched)
    eye = torch.eye(CLASSES)
    alone = torch.stack([centerfusion.loss(outputs, matched, counts, class_weights=each)["hm"] for each in eye])
    weights = torch.arange(CLASSES) / 3
    weighted, plain = (centerfusion.loss(outputs, matched, counts, class_weights=w) for w in (weights, None))
    torch.testing.assert_close(weighted["hm"], (weights * alone).sum())
    torch.testing.assert_close(alone.sum(), plain["hm"])
    assert all(weighted[name] == plain[name] for name in plain if name != "hm")


def test_radar_is_associated_with_the_true_boxes(targets):
    """As by ops.radar.associate; objects to ignore and padding are not valid."""
    calib = torch.tensor([[1266.0, 0, 816, 0], [0, 1266, 491, 0], [0, 0, 1, 0]]).expand(3, 3, 4)
    radar_map = torch.zeros(3, 3, *SIZE)
    for image, i in ((0, 1), (0, 3), (2, 5)):  # object 3 is to be ignored
        x1, y1, x2, y2 = targets[image]["boxes"][i] / STRIDE
        values = torch.tensor([targets[image]["center"][i, 2], 1.5, -2.0])
        radar_map[image, :, int((y1 + y2) / 2), int((x1 + x2) / 2)] = values
    matched = centerfusion.assign(targets, radar_map, calib, size=SIZE, stride=STRIDE, max_distance=50.0)
    tolerance = depth_tolerance(matched["dim"], matched["alpha"], matched["boxes"][..., ::2].mean(-1), calib)
    options = {"max_distance": 50.0, "valid": matched["mask"]}
    expected = associate(radar_map, matched["boxes"], matched["dep"][..., 0], tolerance, **options)
    torch.testing.assert_close(matched["radar"], expected, rtol=0, atol=0)
    assert matched["radar"][0].any() and matched["radar"][2].any() and not matched["radar"][1].any()
    assert assign(targets).keys() == matched.keys() - {"radar"}


def test_correct_outputs_have_no_loss(targets):
    matched = assign(targets[2:])
    outputs = {name: torch.zeros(1, channels, *SIZE) for name, channels in CHANNELS.items()}
    mask = matched["mask"][0]
    cells = matched["index"][0][mask]
    assert len(cells.unique()) == len(cells)
    for name in ("reg", "wh", "dim", "amodel_offset", "velocity"):
        outputs[name].flatten(2)[0][:, cells] = matched[name][0][mask].T
    outputs["dep"].flatten(2)[0][:, cells] = -matched["dep"][0][mask].log().T  # 1 / sigmoid(x) - 1 = exp(-x)
    losses = centerfusion.loss(outputs, matched, centerfusion.count(matched))
    for name in ("reg", "wh", "dim", "amodel_offset", "velocity"):
        assert losses[name] == 0
    assert losses["dep"] < 1e-3 < losses["dep_sec"]
