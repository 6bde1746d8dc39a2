"""Mask R-CNN's losses against torchvision, without objects, and in several processes; sampling of anchors and RoIs."""

import pytest
import torch
from torch import nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.mask_rcnn import MaskRCNN
from torchvision.ops import box_iou

import models
from data.loader import Targets
from losses import maskrcnn
from ops.matching import BACKGROUND, IGNORE, pad_boxes
from tests.fake_cuda import FakeCuda
from training import optim

SIZE = (96, 128)
LIMITS = {"anchors_per_image": 40, "rois_per_image": 24}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_target(boxes, labels, image_id, ignore=None, size=SIZE):
    """A target whose masks are ellipses in their boxes."""
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist()):
        mask[((2 * x - x1 - x2) / (x2 - x1)).square() + ((2 * y - y1 - y2) / (y2 - y1)).square() <= 1] = 1
    ignore = torch.tensor(ignore or [False] * len(boxes), dtype=torch.bool)
    labels = torch.tensor(labels, dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "masks": masks, "ignore": ignore, "image_id": image_id}


def two_targets():
    first = make_target([[10, 8, 70, 80], [50, 20, 120, 90], [5, 60, 30, 94]], [1, 0, 2], 7)
    return [first, make_target([[30.5, 12.25, 90, 77]], [2], 12)]


def sampled_targets(targets, *seed_and_limits, **limits):
    """SampledTargets of a batch as a loader makes it."""
    return maskrcnn.SampledTargets(Targets(targets, pad_boxes(targets)), *seed_and_limits, **limits)


def network(width=8, hidden=16, proposals=15):
    net = models.build("maskrcnn_resnet18", 3, width=width, hidden=hidden, proposals=proposals)
    nn.init.normal_(net.rpn.head.bbox_pred.weight, std=0.1)
    nn.init.normal_(net.roi_heads.box_predictor.bbox_pred.weight, std=0.1)
    optim.set_train_mode(net, freeze_bn=True)
    return net


def compute(net, images, targets, seed=(0, 1), counts=None):
    """(losses, own counts, outputs, sampled targets); the losses are divided by `counts`, else by the own counts."""
    sampled = sampled_targets(targets, seed, **LIMITS)
    outputs = net(images, [SIZE] * len(images), sampled.sample)
    own = maskrcnn.count(outputs, sampled)
    return maskrcnn.loss(outputs, sampled, own.clamp(min=1) if counts is None else counts), own, outputs, sampled


class RecordedSampler:
    """A sampler for torchvision that repeats our samples, after a check that both programs matched alike."""

    def __init__(self, samples):
        self.samples = samples

    def __call__(self, labels):
        masks = []
        for each, (matched, *indices) in zip(labels, self.samples, strict=True):
            assert torch.equal(each >= 1, matched >= 0) and torch.equal(each == 0, matched == BACKGROUND)
            masks.append([torch.zeros(len(each), dtype=torch.uint8).index_fill(0, index, 1) for index in indices])
            assert min(map(len, indices)) > 2
        positive, negative = zip(*masks)
        return list(positive), list(negative)


def torchvision_network(net, samples):
    """torchvision's Mask R-CNN with the weights of `net`, in training on the samples that ours has drawn."""
    limits = {"rpn_pre_nms_top_n_train": 200, "rpn_post_nms_top_n_train": 200, "min_size": SIZE[0], "max_size": SIZE[1]}
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    other = MaskRCNN(backbone, num_classes=4, **limits)
    state = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    other.load_state_dict(state)
    other.roi_heads.fg_bg_sampler, other.rpn.fg_bg_sampler = RecordedSampler(samples[:2]), RecordedSampler(samples[2:])
    return other.train()


@pytest.mark.slow
def test_losses_and_gradients_equal_torchvision(monkeypatch):
    samples, sample_balanced = [], maskrcnn.sample_balanced

    def recorded(matched, *rest):
        index, drawn = sample_balanced(matched, *rest)
        real = matched != IGNORE if len(samples) < 2 else torch.ones_like(matched, dtype=torch.bool)  # RoIs are first
        rows = zip(matched, real, real.cumsum(1) - 1, index, drawn)  # torchvision's candidates are without padding
        samples.extend((m[r], order[i[d >= 0]], order[i[d == BACKGROUND]]) for m, r, order, i, d in rows)
        return index, drawn

    monkeypatch.setattr(maskrcnn, "sample_balanced", recorded)
    net = network(width=256, hidden=1024, proposals=100)
    nn.init.normal_(net.rpn.head.bbox_pred.weight, std=0.01)
    images = torch.rand(2, 3, *SIZE)
    mean, std = (torch.tensor(v).view(3, 1, 1) / 255 for v in (net.image_mean, net.image_std))
    losses, counts, _, _ = compute(net, (images - mean) / std, two_targets())
    other = torchvision_network(net, samples)
    expected = other(list(images), [{**target, "labels": target["labels"] + 1} for target in two_targets()])
    names = {"loss_objectness": "objectness", "loss_rpn_box_reg": "rpn_box", "loss_classifier": "classification"}
    names |= {"loss_box_reg": "box", "loss_mask": "mask"}
    expected = {names[name]: value for name, value in expected.items()}
    assert min(losses.values()) > 1e-3 and losses.keys() == maskrcnn.NORMALIZERS.keys()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [80, 48, sum(len(positive) for _, positive, _ in samples[:2])]
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    parameters = dict(net.named_parameters())
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_without_objects():
    """An image without objects, and one with an object to ignore."""
    net = network()
    targets = [make_target([], [], 3), make_target([[10, 10, 60, 60]], [0], 4, [True])]
    losses, counts, outputs, sampled = compute(net, torch.randn(2, 3, *SIZE), targets)
    assert counts[2] == 0 and counts[0] > 40 and counts[1] > 20 and len(outputs["masks"]) == 0
    assert all(value.isfinite() for value in losses.values())
    assert losses["rpn_box"] == losses["box"] == losses["mask"] == 0
    assert losses["objectness"] > 0 and losses["classification"] > 0
    sum(losses.values()).backward()
    for name, parameter in net.named_parameters():
        trained = "bn" not in name and "downsample.1" not in name
        assert (parameter.grad is not None and parameter.grad.isfinite().all()) == trained, name
    assert sampled.sample(torch.zeros(2, 0, 4))[1][0].shape == (0, 4)


def test_two_processes_equal_one():
    net = network()
    images, targets = torch.randn(2, 3, *SIZE), two_targets()
    losses, counts, _, _ = compute(net, images, targets)
    whole = gradients(net, losses)
    halves = [compute(net, images[i : i + 1], targets[i : i + 1])[1] for i in (0, 1)]
    assert halves[0][2] != halves[1][2]
    mean = torch.stack(halves).mean(0)
    torch.testing.assert_close(2 * mean, counts)
    parts = [compute(net, images[i : i + 1], targets[i : i + 1], counts=mean)[0] for i in (0, 1)]
    averaged = {name: (parts[0][name] + parts[1][name]) / 2 for name in losses}
    torch.testing.assert_close(averaged, losses, rtol=1e-5, atol=1e-6)
    both = zip(*(gradients(net, part) for part in parts), strict=True)
    torch.testing.assert_close([(a + b) / 2 for a, b in both], whole, rtol=1e-3, atol=1e-5)


def gradients(net, losses):
    return torch.autograd.grad(sum(losses.values()), [p for p in net.parameters() if p.requires_grad])


def test_sums_divided_by_counts_are_the_losses():
    net = network()
    losses, counts, outputs, sampled = compute(net, torch.randn(2, 3, *SIZE), two_targets())
    for name, value in maskrcnn.loss_sums(outputs, sampled).items():
        torch.testing.assert_close(value / counts[maskrcnn.NORMALIZERS[name]], losses[name])
    assert len(counts) == len(maskrcnn.COUNTS)


def proposals(number=60):
    corner, size = torch.rand(number, 2) * 60, 10 + torch.rand(number, 2) * 50
    return torch.cat([corner, corner + size], 1)


def test_samples_depend_on_seed_step_and_image_alone():
    candidates, targets = torch.stack([proposals(), proposals()]), two_targets()
    limits = {"rois_per_image": 16}
    rois, positives = sampled_targets(targets, (3, 5), **limits).sample(candidates)
    torch.rand(7)  # torch's global generator has no influence
    again = sampled_targets(targets[::-1], (3, 5), **limits).sample(candidates.flip(0))
    torch.testing.assert_close(again, (rois[::-1], positives[::-1]), rtol=0, atol=0)
    for seed, image_id in (((4, 5), 7), ((3, 6), 7), ((3, 5), 8)):
        target = {**targets[0], "image_id": image_id}
        other = sampled_targets([target], seed, **limits).sample(candidates[:1])
        assert not torch.equal(other[0][0], rois[0])
    fewer = sampled_targets(targets[:1], (3, 5), **limits).sample(candidates[:1, :-1])[0][0]
    same = sum(any(torch.equal(a, b) for b in fewer) for a in rois[0])
    assert same >= 14  # without one proposal, only it and the objects' boxes, which have other numbers, are replaced


def test_samples_of_an_image_do_not_depend_on_the_batch():
    """Nor do those without objects, or with objects to ignore; each has another number of proposals."""
    targets = [*two_targets(), make_target([], [], 3), make_target([[90, 80, 120, 94], [5, 5, 30, 30]], [0, 1], 4)]
    targets[3]["ignore"][0] = True
    candidates, anchors = torch.stack([proposals() for _ in targets]), proposals(400)
    for image, count in ((1, 50), (3, 20)):
        candidates[image, count:] = 0
    sampled = sampled_targets(targets, (0, 1), 40, 24)
    sampled.sample(candidates)
    for i, (target, count) in enumerate(zip(targets, (60, 50, 60, 20))):
        alone = sampled_targets([target], (0, 1), 40, 24)
        alone.sample(candidates[i : i + 1, :count])
        torch.testing.assert_close(sampled.rois[i], alone.rois[0], rtol=0, atol=0)
        assert (alone.rois[0]["boxes"][:, 2] > 0).all() and len(alone.rois[0]["boxes"]) > 8
        ours, theirs = ([x[j] for x in each.anchor_targets(anchors)] for each, j in ((sampled, i), (alone, 0)))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    counts = sampled.counts(anchors).tolist()
    assert counts[1:] == [sum(len(roi[name]) for roi in sampled.rois) for name in ("labels", "object_index")]


def test_rois_with_objects_come_first(monkeypatch):
    targets, candidates = two_targets(), torch.stack([proposals(), proposals()])
    sampled = sampled_targets(targets, (0, 0), rois_per_image=20)
    rois, positives = sampled.sample(candidates)
    for target, boxes, own, roi in zip(targets, rois, positives, sampled.rois, strict=True):
        count = len(own)
        assert 0 < count <= 5 and len(boxes) <= 20 and torch.equal(own, boxes[:count])
        assert torch.equal(roi["labels"][:count], target["labels"][roi["object_index"]] + 1)
        assert not roi["labels"][count:].any()
    monkeypatch.setattr(maskrcnn, "ROI_POSITIVES", 1.0)
    everything = sampled_targets(targets, (0, 0), rois_per_image=500)
    everything.sample(candidates)
    for target, roi in zip(targets, everything.rois):
        assert set(roi["object_index"].tolist()) == set(range(len(target["boxes"])))  # at least by its own box


def test_box_and_mask_targets():
    """A RoI that equals its object's box has offsets of 0, and as its target the mask within the box."""
    target = make_target([[20, 10, 76, 66], [4, 4, 32, 32]], [1, 0], 0)
    sampled = sampled_targets([target], (0, 0))
    sampled.sample(torch.tensor([[[34.0, 10, 90, 66]]]))  # the first box, moved right by a quarter of its width
    index, offsets, masks = sampled.rois[0]["object_index"], sampled.rois[0]["offsets"][:3], sampled.mask_targets(28)
    moved = sampled.rois[0]["boxes"][: len(index), 0] == 34
    torch.testing.assert_close(offsets[moved], torch.tensor([[-2.5, 0, 0, 0]]))
    torch.testing.assert_close(offsets[~moved], torch.zeros(2, 4))
    assert masks.shape == (3, 28, 28) and masks.min() >= 0 and masks.max() <= 1
    ellipse = masks[~moved & (index == 1)][0]
    torch.testing.assert_close(ellipse.mean().item(), torch.pi / 4, rtol=0.06, atol=0)
    assert ellipse[14, 14] == 1 and ellipse[0, 0] == 0
    torch.testing.assert_close(masks[moved][0][:, :20], masks[~moved & (index == 0)][0][:, 7:27], rtol=0, atol=0.2)
    assert not masks[moved][0][:, 22:].any()


@pytest.mark.parametrize("rules", [maskrcnn.ANCHOR_MATCHING, maskrcnn.ROI_MATCHING])
def test_candidates_on_an_ignored_object_are_not_sampled(rules):
    boxes = torch.tensor([[0.0, 0, 20, 20], [30, 0, 60, 30]]).expand(3, -1, -1)
    candidates = [[0.0, 0, 20, 20], [31, 1, 60, 30], [50, 20, 80, 50], [80, 80, 90, 90], [15, 0, 33, 20]]
    labels = torch.tensor([[2, IGNORE], [BACKGROUND, IGNORE], [2, BACKGROUND]])  # BACKGROUND is padding
    matched = maskrcnn.match(boxes, labels, torch.tensor(candidates).expand(3, -1, -1), **rules)
    assert matched.tolist() == [
        [0, IGNORE, IGNORE, BACKGROUND, BACKGROUND],  # the last has a larger IoU with the real one
        [BACKGROUND, IGNORE, IGNORE, BACKGROUND, IGNORE],
        [0, BACKGROUND, BACKGROUND, BACKGROUND, BACKGROUND],
    ]


@pytest.mark.parametrize("rules", [maskrcnn.ANCHOR_MATCHING, maskrcnn.ROI_MATCHING])
def test_matches_are_torchvisions(rules):
    """Also where several candidates are equally good for a box: corners are whole pixels."""
    corner, size = torch.randint(0, 40, (2, 300, 2)), torch.randint(8, 30, (2, 300, 2))
    candidates = torch.cat([corner, corner + size], dim=-1).float()
    boxes, labels = candidates[:, :6] + 3, torch.tensor([[0, 1, 2, 0, 1, 2], [1, 1, 0, 2] + 2 * [BACKGROUND]])
    matcher = Matcher(rules["threshold"], rules["low"], allow_low_quality_matches=rules["keep_best"])
    matched = maskrcnn.match(boxes, labels, candidates, **rules)
    for image, count in ((0, 6), (1, 4)):
        assert torch.equal(matched[image], matcher(box_iou(boxes[image, :count], candidates[image])))
    assert len(set(matched.flatten().tolist())) >= 6


def test_ignored_objects_are_not_trained_on():
    """Masks and labels still belong to their boxes if an object between them is to be ignored."""
    target = two_targets()[0]
    target["ignore"][1] = True
    used = {name: target[name][[0, 2]] for name in ("boxes", "labels", "masks", "ignore")}
    with_ignored, without = (sampled_targets([each], (0, 0)) for each in (target, {**used, "image_id": 7}))
    for sampled in (with_ignored, without):
        sampled.sample(used["boxes"][None] + 1)
    assert set(with_ignored.rois[0]["labels"].tolist()) == {2, 3}
    index, expected = (sampled.rois[0]["object_index"].tolist() for sampled in (with_ignored, without))
    assert index == [(0, 2)[i] for i in expected]
    for name in ("boxes", "labels", "offsets"):
        torch.testing.assert_close(with_ignored.rois[0][name], without.rois[0][name], rtol=0, atol=0)
    torch.testing.assert_close(with_ignored.mask_targets(28), without.mask_targets(28), rtol=0, atol=0)


@torch.no_grad()
def test_a_gpu_gets_the_same_losses():
    net, images = network(), torch.randn(3, 3, *SIZE)
    targets = [*two_targets(), make_target([], [], 3)]
    targets[0]["ignore"][1] = True
    losses, counts, _, _ = compute(net, images, targets)
    with FakeCuda() as gpu:
        net.to("cuda")
        images = images.to("cuda")
        compute(net, images, targets)  # moves the anchors of a cell
        gpu.waits.clear()
        on_gpu = compute(net, images, targets)[:2]
        assert len(gpu.waits) == 2
        losses_of_gpu, counts_of_gpu = {name: value.cpu() for name, value in on_gpu[0].items()}, on_gpu[1].cpu()
    torch.testing.assert_close((losses_of_gpu, counts_of_gpu), (losses, counts), rtol=1e-4, atol=1e-5)


def test_class_weights():
    net = network()
    _, counts, outputs, sampled = compute(net, torch.randn(2, 3, *SIZE), two_targets())
    doubled = maskrcnn.loss(outputs, sampled, counts, class_weights=torch.full((4,), 2.0))
    for name, value in maskrcnn.loss(outputs, sampled, counts).items():
        factor = 2 if name == "classification" else 1
        torch.testing.assert_close(doubled[name], factor * value)


def test_half_precision_and_deterministic_kernels():
    net, images = network(), torch.randn(2, 3, *SIZE)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            sampled = sampled_targets(two_targets(), (0, 1), **LIMITS)
            outputs = net(images, [SIZE] * 2, sampled.sample)
        losses = maskrcnn.loss(outputs, sampled, maskrcnn.count(outputs, sampled))
        grads = gradients(net, losses)
    finally:
        torch.use_deterministic_algorithms(before)
    assert outputs["masks"].dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert all(value.isfinite().all() for value in grads)
