"""Mask R-CNN's losses against torchvision's own, and what may not change them: batches, processes, empty pictures."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.mask_rcnn import MaskRCNN

import models
from losses import maskrcnn
from ops.matching import BACKGROUND, IGNORE
from training.modes import train_mode

SIZE = (96, 128)
LIMITS = {"anchors": 40, "regions": 24}


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def target(boxes, labels, image_id, ignore=None, size=SIZE):
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
    first = target([[10, 8, 70, 80], [50, 20, 120, 90], [5, 60, 30, 94]], [1, 0, 2], 7)
    return [first, target([[30.5, 12.25, 90, 77]], [2], 12)]


def network(width=8, hidden=16, proposals=15):
    net = models.build("maskrcnn_resnet18", 3, width=width, hidden=hidden, proposals=proposals)
    nn.init.normal_(net.rpn.head.bbox_pred.weight, std=0.1)
    nn.init.normal_(net.roi_heads.box_predictor.bbox_pred.weight, std=0.1)
    train_mode(net, freeze_bn=True)
    return net


def compute(net, images, targets, seed=(0, 1), counts=None):
    """(losses, counts, outputs, goals)."""
    goals = maskrcnn.Goals(targets, seed, **LIMITS)
    outputs = net(images, [SIZE] * len(images), goals.sample)
    own = maskrcnn.count(outputs, goals)
    return maskrcnn.loss(outputs, goals, own.clamp(min=1) if counts is None else counts), own, outputs, goals


class Taken:
    """A sampler for torchvision that takes what ours has drawn, and holds that both saw the same matches."""

    def __init__(self, drawn):
        self.drawn = drawn

    def __call__(self, labels):
        taken = []
        for each, (matched, positive, negative) in zip(labels, self.drawn, strict=True):
            assert torch.equal(each >= 1, matched >= 0) and torch.equal(each == 0, matched == BACKGROUND)
            assert len(positive) > 2 and len(negative) > 2
            masks = torch.zeros(2, len(each), dtype=torch.uint8)
            masks[0, positive], masks[1, negative] = 1, 1
            taken.append(masks)
        return [each[0] for each in taken], [each[1] for each in taken]


def torchvisions(net, drawn):
    """torchvision's detector with the weights of `net`, training on the samples that ours has drawn."""
    few = {"rpn_pre_nms_top_n_train": 200, "rpn_post_nms_top_n_train": 200, "min_size": SIZE[0], "max_size": SIZE[1]}
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    other = MaskRCNN(backbone, num_classes=4, **few)
    state = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    other.load_state_dict(state)
    other.roi_heads.fg_bg_sampler, other.rpn.fg_bg_sampler = Taken(drawn[:2]), Taken(drawn[2:])
    return other.train()


def test_losses_and_gradients_are_torchvisions(monkeypatch):
    drawn, draw = [], maskrcnn.draw

    def keep(matched, *rest):
        drawn.append((matched, *draw(matched, *rest)))
        return drawn[-1][1:]

    monkeypatch.setattr(maskrcnn, "draw", keep)
    net = network(width=256, hidden=1024, proposals=100)
    nn.init.normal_(net.rpn.head.bbox_pred.weight, std=0.01)
    pictures = torch.rand(2, 3, *SIZE)
    mean, std = (torch.tensor(v).view(3, 1, 1) / 255 for v in (net.image_mean, net.image_std))
    losses, counts, _, _ = compute(net, (pictures - mean) / std, two_targets())
    other = torchvisions(net, drawn)
    theirs = [{**one, "labels": one["labels"] + 1} for one in two_targets()]
    expected = other(list(pictures), theirs)
    names = {"loss_objectness": "objectness", "loss_rpn_box_reg": "rpn_box", "loss_classifier": "classification"}
    names |= {"loss_box_reg": "box", "loss_mask": "mask"}
    assert set(names) == set(expected) and set(names.values()) == set(losses) == set(maskrcnn.NORMALISERS)
    for key, name in names.items():
        assert losses[name] > 1e-3, name
        torch.testing.assert_close(losses[name], expected[key], rtol=1e-5, atol=1e-5, msg=name)
    assert counts.tolist() == [80, 48, sum(len(positive) for _, positive, _ in drawn[:2])]
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    ours = dict(net.named_parameters())
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_picture_without_an_object_trains():
    net = network()
    images, nothing = torch.randn(2, 3, *SIZE), [target([], [], 3), target([[10, 10, 60, 60]], [0], 4, [True])]
    losses, counts, outputs, goals = compute(net, images, nothing)
    assert counts[2] == 0 and counts[0] > 40 and counts[1] > 20 and len(outputs["masks"]) == 0
    assert all(value.isfinite() for value in losses.values())
    assert losses["rpn_box"] == losses["box"] == losses["mask"] == 0
    assert losses["objectness"] > 0 and losses["classification"] > 0
    sum(losses.values()).backward()
    for name, parameter in net.named_parameters():
        learns = "bn" not in name and "downsample.1" not in name
        assert (parameter.grad is not None and parameter.grad.isfinite().all()) == learns, name
    assert goals.sample([torch.zeros(0, 4)] * 2)[1][0].shape == (0, 4)


def test_two_halves_with_averaged_counts_equal_the_whole():
    net = network()
    images, targets = torch.randn(2, 3, *SIZE), two_targets()
    losses, counts, _, _ = compute(net, images, targets)
    whole = gradients(net, losses)
    halves = [compute(net, images[i : i + 1], targets[i : i + 1])[1] for i in (0, 1)]
    assert halves[0][2] != halves[1][2]
    mean = torch.stack(halves).mean(0)
    torch.testing.assert_close(2 * mean, counts)
    parts = [compute(net, images[i : i + 1], targets[i : i + 1], counts=mean)[0] for i in (0, 1)]
    for name, value in losses.items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, value, rtol=1e-5, atol=1e-6)
    both = zip(*(gradients(net, part) for part in parts), strict=True)
    torch.testing.assert_close([(a + b) / 2 for a, b in both], whole, rtol=1e-3, atol=1e-5)


def gradients(net, losses):
    return torch.autograd.grad(sum(losses.values()), [p for p in net.parameters() if p.requires_grad])


def test_sums_and_counts_of_an_evaluation_give_the_losses():
    net = network()
    losses, counts, outputs, goals = compute(net, torch.randn(2, 3, *SIZE), two_targets())
    for name, value in maskrcnn.sums(outputs, goals).items():
        torch.testing.assert_close(value / counts[maskrcnn.NORMALISERS[name]], losses[name])
    assert len(counts) == len(maskrcnn.COUNTS)


def proposals(number=60):
    corner, size = torch.rand(number, 2) * 60, 10 + torch.rand(number, 2) * 50
    return torch.cat([corner, corner + size], 1)


def test_what_is_drawn_depends_on_seed_step_and_picture_alone():
    places, targets = [proposals(), proposals()], two_targets()
    limits = {"regions": 16}
    regions, objects = maskrcnn.Goals(targets, (3, 5), **limits).sample(places)
    torch.rand(7)  # the state of torch's own generator does not matter
    again = maskrcnn.Goals(targets[::-1], (3, 5), **limits).sample(places[::-1])
    torch.testing.assert_close(again[0][::-1], regions, rtol=0, atol=0)
    torch.testing.assert_close(again[1][::-1], objects, rtol=0, atol=0)
    for seed, name in (((4, 5), 7), ((3, 6), 7), ((3, 5), 8)):
        other = maskrcnn.Goals([{**targets[0], "image_id": name}], seed, **limits).sample(places[:1])
        assert not torch.equal(other[0][0], regions[0])
    fewer = maskrcnn.Goals(targets[:1], (3, 5), **limits).sample([places[0][:-1]])[0][0]
    kept = sum(any(torch.equal(a, b) for b in fewer) for a in regions[0])
    assert kept >= 14  # one proposal less, or as the objects' boxes move up a number: the others are drawn as before


def test_regions_are_drawn_with_their_objects_first():
    targets, places = two_targets(), [proposals(), proposals()]
    goals = maskrcnn.Goals(targets, (0, 0), regions=20)
    regions, objects = goals.sample(places)
    for one, boxes, own, kept in zip(targets, regions, objects, goals.regions, strict=True):
        count = len(own)
        assert 0 < count <= 5 and len(boxes) <= 20 and torch.equal(own, boxes[:count])
        assert torch.equal(kept["labels"][:count], one["labels"][kept["owner"]] + 1)
        assert not kept["labels"][count:].any()
    everything = maskrcnn.Goals(targets, (0, 0), regions=500, region_share=1.0)
    everything.sample(places)
    for one, kept in zip(targets, everything.regions):
        assert set(kept["owner"].tolist()) == set(range(len(one["boxes"])))  # each finds at least its own box


def test_the_goals_of_boxes_and_masks():
    """A region that is the object's own box asks for no offset, and for the mask as it lies in the box."""
    one = target([[20, 10, 76, 66], [4, 4, 32, 32]], [1, 0], 0)
    goals = maskrcnn.Goals([one], (0, 0))
    goals.sample([torch.tensor([[34.0, 10, 90, 66]])])  # the first, a quarter of its width to the right
    owner, boxes, masks = goals.regions[0]["owner"], goals.boxes(), goals.masks(28)
    shifted = goals.regions[0]["boxes"][: len(owner), 0] == 34
    torch.testing.assert_close(boxes[shifted], torch.tensor([[-2.5, 0, 0, 0]]))
    torch.testing.assert_close(boxes[~shifted], torch.zeros(2, 4))
    assert masks.shape == (3, 28, 28) and masks.min() >= 0 and masks.max() <= 1
    own = masks[~shifted & (owner == 1)][0]
    torch.testing.assert_close(own.mean().item(), torch.pi / 4, rtol=0.06, atol=0)
    assert own[14, 14] == 1 and own[0, 0] == 0
    torch.testing.assert_close(masks[shifted][0][:, :20], masks[~shifted & (owner == 0)][0][:, 7:27], rtol=0, atol=0.2)
    assert not masks[shifted][0][:, 22:].any()


@pytest.mark.parametrize("matcher", [maskrcnn.ANCHOR_MATCHER, maskrcnn.REGION_MATCHER])
def test_what_lies_on_an_ignored_object_takes_no_part(matcher):
    boxes, ignored = torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([[30.0, 0, 60, 30]])
    places = torch.tensor([[0.0, 0, 20, 20], [31, 1, 60, 30], [50, 20, 80, 50], [80, 80, 90, 90], [15, 0, 33, 20]])
    matched = maskrcnn.match(boxes, ignored, places, matcher)
    assert matched.tolist() == [0, IGNORE, IGNORE, BACKGROUND, BACKGROUND]  # the last lies more on the real one
    assert maskrcnn.match(boxes[:0], ignored, places, matcher).tolist() == [-1, IGNORE, IGNORE, -1, IGNORE]
    assert maskrcnn.match(boxes, ignored[:0], places, matcher).tolist() == [0, -1, -1, -1, -1]
    assert maskrcnn.match(boxes, ignored, places[:0], matcher).tolist() == []


def test_ignored_objects_are_never_learnt():
    """Masks and labels stay with their boxes when one in between is left out."""
    targets = two_targets()[:1]
    targets[0]["ignore"][1] = True
    kept = {name: targets[0][name][[0, 2]] for name in ("boxes", "labels", "masks", "ignore")}
    place, goals = [targets[0]["boxes"][[0, 2]] + 1], []
    for one in (targets[0], {**kept, "image_id": 7}):
        goals.append(maskrcnn.Goals([one], (0, 0)))
        goals[-1].sample(place)
    assert set(goals[0].regions[0]["labels"].tolist()) == {2, 3}
    torch.testing.assert_close(goals[0].regions, goals[1].regions, rtol=0, atol=0)
    torch.testing.assert_close(goals[0].masks(28), goals[1].masks(28), rtol=0, atol=0)


def test_class_weights():
    net = network()
    _, counts, outputs, goals = compute(net, torch.randn(2, 3, *SIZE), two_targets())
    doubled = maskrcnn.loss(outputs, goals, counts, class_weights=torch.full((4,), 2.0))
    for name, value in maskrcnn.loss(outputs, goals, counts).items():
        factor = 2 if name == "classification" else 1
        torch.testing.assert_close(doubled[name], factor * value)


def test_half_precision_and_deterministic_kernels():
    net, images = network(), torch.randn(2, 3, *SIZE)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            goals = maskrcnn.Goals(two_targets(), (0, 1), **LIMITS)
            outputs = net(images, [SIZE] * 2, goals.sample)
        losses = maskrcnn.loss(outputs, goals, maskrcnn.count(outputs, goals))
        found = gradients(net, losses)
    finally:
        torch.use_deterministic_algorithms(before)
    assert outputs["masks"].dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert all(value.isfinite().all() for value in found)
