"""Mask R-CNN against torchvision's own detector, and where ours must not depend on batch, padding or history."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

import models
from models import WeightsError, maskrcnn, published
from training.modes import train_mode

BUILDERS = {
    "maskrcnn_resnet50": torchvision.models.detection.maskrcnn_resnet50_fpn,
    "maskrcnn_resnet50_v2": torchvision.models.detection.maskrcnn_resnet50_fpn_v2,
}
FEW = {"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 60, "box_detections_per_img": 15}
SMALL = {"width": 8, "hidden": 16, "proposals": 20}


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def small(num_classes=2, **arguments):
    """The small network, smaller still, whose scores say something."""
    net = models.build("maskrcnn_resnet18", num_classes, **{**SMALL, **arguments})
    nn.init.normal_(net.roi_heads.box_predictor.cls_score.weight, std=3.0)
    nn.init.normal_(net.rpn.head.cls_logits.weight, std=1.0)
    return net.to(memory_format=torch.channels_last)


def centre(predictor, inputs):
    """Regions of a random network are much alike: without this one class would have them all."""
    predictor.cls_score.bias.data = -predictor.cls_score.weight @ inputs[0].mean(0)


def torchvision_net(name, num_classes):
    """torchvision's detector with random weights of moderate outputs, for pictures that it does not resize."""
    net = BUILDERS[name](
        weights=None, weights_backbone=None, num_classes=num_classes + 1, min_size=128, max_size=160, **FEW
    )
    for key, values in net.state_dict().items():
        if values.ndim == 4:  # maps before a norm of the body are small, so that its epsilon counts
            values.normal_(std=(2 / values[0].numel()) ** 0.5 * (0.03 if "body" in key else 1))
        elif key.endswith("running_var"):
            values.uniform_(5e-4, 2e-3) if "body" in key else values.uniform_(0.5, 2)
        elif key.endswith("running_mean"):
            values.normal_(std=3e-3)
        elif "body" in key and key.endswith("weight"):
            values.uniform_(0.3, 0.6)
    nn.init.normal_(net.roi_heads.box_predictor.cls_score.weight, std=0.5)
    net.roi_heads.box_predictor.register_forward_pre_hook(centre)
    nn.init.normal_(net.roi_heads.mask_predictor.mask_fcn_logits.weight, std=0.3)
    nn.init.normal_(net.rpn.head.bbox_pred.weight, std=0.02)
    return net.eval()


def fix_norms(module):
    """Norms as torchvision's first published detector has them: fixed, epsilon 0, without counters; in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fixed = torchvision.ops.FrozenBatchNorm2d(child.num_features, eps=0.0)
            fixed.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
            setattr(module, name, fixed)
        else:
            fix_norms(child)


def as_of_old(state):
    """The names of torchvision's first published file."""
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if "blocks" in name:
            del parts[4]
        elif "mask_head" in name:
            parts[2:4] = [f"mask_fcn{int(parts[2]) + 1}"]
        elif name.startswith("rpn.head.conv"):
            del parts[3:5]
        renamed[".".join(parts)] = value
    return renamed


def padded(pictures, net):
    """Pictures [3,h,w] of 0..255 as one batch of normalised ones, and their shapes."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (net.image_mean, net.image_std))
    images = torch.zeros(len(pictures), 3, 160, 160)
    for image, picture in zip(images, pictures):
        image[:, : picture.shape[1], : picture.shape[2]] = (picture - mean) / std
    return images.contiguous(memory_format=torch.channels_last), [tuple(p.shape[1:]) for p in pictures]


@pytest.mark.parametrize("name", BUILDERS)
def test_detections_are_torchvisions_own(name):
    """v1 as its published file is, with fixed norms and old names; v2 as torchvision has it today."""
    other = torchvision_net(name, 4)
    old = name == "maskrcnn_resnet50"
    if old:
        fix_norms(other)
    pictures = [torch.randint(0, 256, (3, *shape)).float() for shape in ((128, 160), (140, 128))]
    with torch.no_grad():
        expected = other([picture / 255 for picture in pictures])
    net = published.load(as_of_old(other.state_dict()) if old else other.state_dict())
    assert (net.name, net.num_classes, net.min_side, net.max_side, net.classes) == (name, 4, 800, 1333, None)
    net.rpn._pre_nms_top_n, net.rpn._post_nms_top_n = other.rpn._pre_nms_top_n, other.rpn._post_nms_top_n
    net.roi_heads.detections_per_img = FEW["box_detections_per_img"]
    with torch.no_grad():
        found = net.to(memory_format=torch.channels_last)(*padded(pictures, net))
    for one, theirs, picture in zip(found, expected, pictures, strict=True):
        assert len(theirs["scores"]) == 15 and theirs["scores"].std() > 1e-3 and len(set(theirs["labels"].tolist())) > 1
        assert one["labels"].tolist() == [label - 1 for label in theirs["labels"].tolist()]
        torch.testing.assert_close(one["boxes"], theirs["boxes"], rtol=0, atol=0.01)
        torch.testing.assert_close(one["scores"], theirs["scores"], rtol=0, atol=1e-4)
        assert one["masks"].shape == (15, 28, 28) and one["masks"].std() > 0.02
        masks = paste_masks_in_image(one["masks"][:, None], one["boxes"], picture.shape[1:])
        torch.testing.assert_close(masks, theirs["masks"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", BUILDERS)
def test_names_and_numbers_are_torchvisions(name):
    with torch.device("meta"):
        other = BUILDERS[name](weights=None, weights_backbone=None, num_classes=8)
        net = models.build(name, 7)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert list(net.state_dict()) == list(other.state_dict())
    for part in ("_pre_nms_top_n", "_post_nms_top_n", "nms_thresh", "score_thresh", "min_size"):
        assert getattr(net.rpn, part) == getattr(other.rpn, part), part
    for part in ("score_thresh", "nms_thresh", "detections_per_img"):
        assert getattr(net.roi_heads, part) == getattr(other.roi_heads, part), part
    assert net.roi_heads.box_coder.weights == other.roi_heads.box_coder.weights
    assert (net.rpn.anchor_generator.sizes, net.rpn.anchor_generator.aspect_ratios) == (
        other.rpn.anchor_generator.sizes,
        other.rpn.anchor_generator.aspect_ratios,
    )
    assert torch.tensor(net.image_mean).div(255).tolist() == pytest.approx(other.transform.image_mean)
    assert torch.tensor(net.image_std).div(255).tolist() == pytest.approx(other.transform.image_std)


def assert_same_detections(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert len(other["scores"]) > 3
        assert one["labels"].tolist() == other["labels"].tolist()
        for name in ("boxes", "scores", "masks"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-3)


def test_batched_equals_single_and_history_changes_nothing():
    """torchvision's poolers take their scales from the first batch they see; ours do not look at it."""
    net = small().eval()
    images, shapes = torch.randn(3, 3, 96, 128), [(96, 128), (65, 40), (33, 34)]
    with torch.no_grad():
        single = [net(image[None], [shape])[0] for image, shape in zip(images, shapes)]
        batch = net(images, shapes)
        assert_same_detections(batch, single)
        fresh = small()
        fresh.load_state_dict(net.state_dict())
        fresh.eval()(images[2:, :, :64, :64], [(33, 34)])
        assert_same_detections(fresh(images, shapes), batch)
    for one, (height, width) in zip(batch, shapes):
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert (one["boxes"][:, 2:] > one["boxes"][:, :2]).all() and one["scores"].diff().max() <= 0
        assert one["labels"].dtype == torch.int64 and one["labels"].min() >= 0 and one["labels"].max() < 2
        assert one["masks"].shape == (len(one["labels"]), 28, 28) and 0 <= one["masks"].min() <= one["masks"].max() <= 1


def first_ones(regions, objects):
    """A `sample` that takes the first proposals as they come."""
    return lambda proposals: ([p[:regions] for p in proposals], [p[:objects] for p in proposals])


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("objects", [0, 2])
def test_every_parameter_is_in_one_group_and_gets_a_gradient(v2, objects):
    """Also where no region has an object, and with norms that learn from what they see."""
    net = maskrcnn.MaskRCNN("small", 3, depth=18, v2=v2, **SMALL).train()
    outputs = net(torch.randn(2, 3, 64, 96), [(64, 96), (50, 70)], first_ones(5, objects))
    anchors = 3 * (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2)
    shapes = {"objectness": (2, anchors), "deltas": (2, anchors, 4), "anchors": (anchors, 4)}
    shapes |= {"logits": (10, 4), "offsets": (10, 16), "masks": (2 * objects, 4, 28, 28)}
    assert {key: tuple(value.shape) for key, value in outputs.items()} == shapes
    sum(outputs[key].square().sum() for key in outputs).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any() == (objects > 0) or "mask" not in key, key
    for key, value in net.named_buffers():
        assert value.isfinite().all(), key
    groups = net.parameter_groups()
    assert list(groups) == ["backbone", "heads"]
    assert sorted(id(p) for part in groups.values() for p in part) == sorted(id(p) for p in net.parameters())
    assert [id(p) for stage in net.stages() for p in stage.parameters()] == [id(p) for p in groups["backbone"]]


def test_losses_and_detections_in_steps():
    """An evaluation wants both of one pass through the body."""
    net = small().eval()
    images, shapes, sample = torch.randn(2, 3, 96, 96), [(96, 96), (80, 96)], first_ones(7, 2)
    with torch.no_grad():
        features, proposals, outputs = net.propose(images, shapes)
        assert_same_detections(net.detect(features, proposals, shapes), net(images, shapes))
        outputs |= net.answer(features, shapes, *sample(proposals))
        torch.testing.assert_close(outputs, net(images, shapes, sample))


def test_frozen_parts_stay():
    net = small()
    train_mode(net, net.stages()[:2], freeze_bn=True)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    outputs = net(torch.randn(1, 3, 64, 64), [(64, 64)], first_ones(4, 2))
    sum(value.square().mean() for value in outputs.values()).backward()
    still = {key for key, parameter in net.named_parameters() if parameter.grad is None}
    norms = {f"{key}." for key, part in net.named_modules() if isinstance(part, nn.BatchNorm2d)}
    for key, _ in net.named_parameters():
        frozen = "body.conv1" in key or "layer1" in key or key.startswith(tuple(norms))
        assert (key in still) == frozen, key
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_without_any_proposal():
    """A network that has gone astray proposes nothing: no detection, and still a gradient for everything."""
    net = small()
    nn.init.constant_(net.rpn.head.bbox_pred.bias, -1e4)  # everything far off to the left: clipped, nothing remains
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = net.eval()(images, [(64, 64)] * 2)
    assert [tuple(one[key].shape) for one in found for key in ("boxes", "masks")] == [(0, 4), (0, 28, 28)] * 2
    outputs = net.train()(images, [(64, 64)] * 2, first_ones(5, 5))
    assert len(outputs["logits"]) == len(outputs["masks"]) == 0
    sum(value.sum() for value in outputs.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_half_precision():
    """Under bf16 anchors, boxes and pooling stay float32, and outputs are near those in float32."""
    net = small().eval()
    images, shapes = torch.randn(2, 3, 96, 96), [(96, 96), (80, 96)]
    boxes = torch.tensor([[3.0, 5, 60, 70], [20, 20, 95, 79]])
    with torch.no_grad():
        wide = net(images, shapes, lambda proposals: ([boxes, boxes], [boxes, boxes]))
        with torch.autocast("cpu", torch.bfloat16):
            features, proposals, outputs = net.propose(images, shapes)
            half = net(images, shapes, lambda proposals: ([boxes, boxes], [boxes, boxes]))
            found = net(images, shapes)
    assert {x.dtype for x in (*features.values(), *proposals, outputs["anchors"])} == {torch.float32}
    torch.testing.assert_close(half["anchors"], wide["anchors"], rtol=0, atol=0)
    for name in ("objectness", "deltas", "logits", "offsets", "masks"):
        off = (half[name].float() - wide[name]).norm() / wide[name].norm()
        assert off < 0.05, name
    assert all(one[key].dtype == torch.float32 for one in found for key in ("boxes", "scores", "masks"))
    assert all(len(one["boxes"]) for one in found)


def test_training_is_deterministic():
    """Nothing refuses, and two passes give the same bits."""
    net = small().train()
    images = torch.randn(2, 3, 64, 64)
    seen = []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            train_mode(net, freeze_bn=True)
            net.zero_grad()
            outputs = net(images, [(64, 64), (60, 50)], first_ones(6, 3))
            sum(value.square().sum() for value in outputs.values()).backward()
            gradients = [parameter.grad for parameter in net.parameters() if parameter.requires_grad]
            seen.append([value.detach().clone() for value in (*outputs.values(), *gradients)])
    finally:
        torch.use_deterministic_algorithms(before)
    torch.testing.assert_close(*seen, rtol=0, atol=0)


def test_a_checkpoint_makes_the_network_again(tmp_path):
    net = small(width=12, proposals=30)
    net.classes = ["a", "b"]
    about = {"format_version": 1, "min_side": 320, "max_side": 480, "model": net.state_dict()}
    torch.save({**models.describe(net), **about}, tmp_path / "last.pt")
    again = models.load(tmp_path / "last.pt")
    assert (again.name, again.arguments) == ("maskrcnn_resnet18", {"proposals": 30, "width": 12, "hidden": 16})
    assert (again.classes, again.min_side, again.max_side, again.image_size) == (["a", "b"], 320, 480, None)
    assert (again.task, again.channels, again.training) == ("masks", "rgb", False)
    assert again.rpn._post_nms_top_n == {"training": 60, "testing": 30}
    torch.testing.assert_close(dict(again.state_dict()), dict(net.state_dict()), rtol=0, atol=0)


def test_wrong_arguments_are_named():
    with pytest.raises(WeightsError, match="proposals 0: must be 1 or more"):
        models.build("maskrcnn_resnet50", 3, proposals=0)
    with pytest.raises(WeightsError, match="maskrcnn_resnet50 takes no 'width'; it takes proposals"):
        models.build("maskrcnn_resnet50", 3, width=3)
    assert set(maskrcnn.NETWORKS) < set(models.ARCHITECTURES)
