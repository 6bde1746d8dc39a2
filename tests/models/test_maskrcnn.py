"""Mask R-CNN against torchvision's own detector, and independence of batch, padding and earlier inputs."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

import models
from models import maskrcnn, pretrained
from tests.fake_cuda import FakeCuda
from tests.model_helpers import (
    assert_each_parameter_in_one_group,
    assert_stages_are_the_backbone,
    freeze_norms,
    padded_batch,
    randomize_detector,
)
from training.optim import set_train_mode

BUILDERS = {
    "maskrcnn_resnet50": torchvision.models.detection.maskrcnn_resnet50_fpn,
    "maskrcnn_resnet50_v2": torchvision.models.detection.maskrcnn_resnet50_fpn_v2,
}
LIMITS = {"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 60, "box_detections_per_img": 15}
SMALL = {"width": 8, "hidden": 16, "proposals": 20}


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def small(num_classes=2, **arguments):
    """A network that is even smaller than maskrcnn_resnet18, with scores that differ."""
    net = models.build("maskrcnn_resnet18", num_classes, **{**SMALL, **arguments})
    nn.init.normal_(net.roi_heads.box_predictor.cls_score.weight, std=3.0)
    nn.init.normal_(net.rpn.head.cls_logits.weight, std=1.0)
    return net.to(memory_format=torch.channels_last)


def center(predictor, inputs):
    """RoIs of a random network are similar: without this, all would have the same class."""
    predictor.cls_score.bias.data = -predictor.cls_score.weight @ inputs[0].mean(0)


def torchvision_net(name, num_classes):
    """torchvision's detector with random weights, which does not resize images of 128 to 160 pixels."""
    net = BUILDERS[name](
        weights=None, weights_backbone=None, num_classes=num_classes + 1, min_size=128, max_size=160, **LIMITS
    )
    randomize_detector(net)
    nn.init.normal_(net.roi_heads.box_predictor.cls_score.weight, std=0.5)
    net.roi_heads.box_predictor.register_forward_pre_hook(center)
    nn.init.normal_(net.roi_heads.mask_predictor.mask_fcn_logits.weight, std=0.3)
    nn.init.normal_(net.rpn.head.bbox_pred.weight, std=0.02)
    return net.eval()


def with_old_names(state):
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


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_detections_are_torchvisions(name):
    """v1 as in its published file, with frozen norms and old names; v2 as torchvision has it today."""
    torchvisions = torchvision_net(name, 4)
    old = name == "maskrcnn_resnet50"
    if old:
        freeze_norms(torchvisions)
    shapes = [(128, 160), (140, 128)]
    images = [torch.randint(0, 256, (3, *shape)).float() for shape in shapes]
    with torch.no_grad():
        expected = torchvisions([image / 255 for image in images])
    net = pretrained.load(with_old_names(torchvisions.state_dict()) if old else torchvisions.state_dict())
    assert (net.name, net.num_classes, net.min_side, net.max_side, net.classes) == (name, 4, 800, 1333, None)
    net.rpn._pre_nms_top_n, net.rpn._post_nms_top_n = torchvisions.rpn._pre_nms_top_n, torchvisions.rpn._post_nms_top_n
    net.roi_heads.detections_per_img = LIMITS["box_detections_per_img"]
    with torch.no_grad():
        batch = padded_batch(images, net, (160, 160)).contiguous(memory_format=torch.channels_last)
        detections = net.to(memory_format=torch.channels_last)(batch, shapes)
    for ours, theirs, shape in zip(detections, expected, shapes, strict=True):
        assert len(theirs["scores"]) == 15 and theirs["scores"].std() > 1e-3 and len(set(theirs["labels"].tolist())) > 1
        assert ours["labels"].tolist() == [label - 1 for label in theirs["labels"].tolist()]
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=0.01)
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=0, atol=1e-4)
        assert ours["masks"].shape == (15, 28, 28) and ours["masks"].std() > 0.02
        masks = paste_masks_in_image(ours["masks"][:, None], ours["boxes"], shape)
        torch.testing.assert_close(masks, theirs["masks"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", BUILDERS)
def test_names_and_limits_are_torchvisions(name):
    with torch.device("meta"):
        expected = BUILDERS[name](weights=None, weights_backbone=None, num_classes=8)
        net = models.build(name, 7)
    net.limit_detections()
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    assert list(net.state_dict()) == list(expected.state_dict())
    for limit in ("_pre_nms_top_n", "_post_nms_top_n", "nms_thresh", "score_thresh", "min_size"):
        assert getattr(net.rpn, limit) == getattr(expected.rpn, limit), limit
    for limit in ("score_thresh", "nms_thresh", "detections_per_img"):
        assert getattr(net.roi_heads, limit) == getattr(expected.roi_heads, limit), limit
    assert net.roi_heads.box_coder.weights == expected.roi_heads.box_coder.weights
    assert (net.rpn.anchor_generator.sizes, net.rpn.anchor_generator.aspect_ratios) == (
        expected.rpn.anchor_generator.sizes,
        expected.rpn.anchor_generator.aspect_ratios,
    )
    assert torch.tensor(net.image_mean).div(255).tolist() == pytest.approx(expected.transform.image_mean)
    assert torch.tensor(net.image_std).div(255).tolist() == pytest.approx(expected.transform.image_std)


def assert_same_detections(detections, expected):
    for ours, theirs in zip(detections, expected, strict=True):
        assert len(theirs["scores"]) > 3
        assert ours["labels"].tolist() == theirs["labels"].tolist()
        for name in ("boxes", "scores", "masks"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


def test_batched_equals_single_and_the_first_batch_changes_nothing():
    """torchvision's poolers guess their scales from the first batch; ours do not."""
    net = small().eval()
    images, shapes = torch.randn(3, 3, 96, 128), [(96, 128), (65, 40), (33, 34)]
    with torch.no_grad():
        single = [net(image[None], [shape])[0] for image, shape in zip(images, shapes)]
        batch = net(images, shapes)
        assert_same_detections(batch, single)
        new = small()
        new.load_state_dict(net.state_dict())
        new.eval()(images[2:, :, :64, :64], [(33, 34)])
        assert_same_detections(new(images, shapes), batch)
    for detections, (height, width) in zip(batch, shapes):
        boxes, labels, masks = detections["boxes"], detections["labels"], detections["masks"]
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all() and detections["scores"].diff().max() <= 0
        assert labels.dtype == torch.int64 and labels.min() >= 0 and labels.max() < 2
        assert masks.shape == (len(labels), 28, 28) and 0 <= masks.min() <= masks.max() <= 1


def take_first(rois, mask_rois):
    """A `sample` that takes the first proposals of each image."""
    return lambda proposals: ([p[:rois] for p in proposals], [p[:mask_rois] for p in proposals])


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("mask_rois", [0, 2])
def test_every_parameter_is_in_one_group_and_gets_a_gradient(v2, mask_rois):
    """Also if no RoI has an object, and with batch norms in training."""
    net = maskrcnn.MaskRCNN("small", 3, depth=18, v2=v2, **SMALL).train()
    outputs = net(torch.randn(2, 3, 64, 96), [(64, 96), (50, 70)], take_first(5, mask_rois))
    anchors = 3 * (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2)
    shapes = {"objectness": (2, anchors), "deltas": (2, anchors, 4), "anchors": (anchors, 4)}
    shapes |= {"logits": (10, 4), "offsets": (10, 16), "masks": (2 * mask_rois, 4, 28, 28)}
    assert {key: tuple(value.shape) for key, value in outputs.items()} == shapes
    sum(outputs[key].square().sum() for key in outputs).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any() == (mask_rois > 0) or "mask" not in key, key
    for key, value in net.named_buffers():
        assert value.isfinite().all(), key
    assert_each_parameter_in_one_group(net, ["backbone", "heads"])
    assert_stages_are_the_backbone(net)


def test_detections_and_raw_outputs_of_one_pass():
    net = small().eval()
    images, shapes, sample = torch.randn(2, 3, 96, 96), [(96, 96), (80, 96)], take_first(7, 2)
    with torch.no_grad():
        features, proposals, outputs = net.propose(images, shapes)
        assert_same_detections(net.detect(features, proposals, shapes), net(images, shapes))
        detections, copy = net.detect(features, proposals, shapes, outputs["anchors"])
        assert_same_detections(detections, net(images, shapes))
        assert torch.equal(copy, outputs["anchors"])
        outputs |= net.roi_outputs(features, shapes, *sample(proposals))
        torch.testing.assert_close(outputs, net(images, shapes, sample))


def test_detections_keep_no_graph():
    """Also where gradients are enabled: it would keep the features of the whole batch alive."""
    images, shapes = torch.randn(2, 3, 96, 96), [(96, 96), (70, 80)]
    for detection in small().eval()(images, shapes):
        assert len(detection["scores"]) and not any(value.requires_grad for value in detection.values())


def test_a_gpu_gets_the_same_with_padding():
    net = small().eval()
    images, shapes = torch.randn(2, 3, 96, 96), [(96, 96), (70, 80)]
    with torch.no_grad():
        expected = net(images, shapes), net(images, shapes, take_first(9, 4))
        with FakeCuda() as gpu:
            net.to("cuda")
            images = images.to("cuda")
            outputs = {name: x.cpu() for name, x in net(images, shapes, take_first(9, 4)).items()}
            gpu.waits.clear()
            detections = net(images, shapes)
            assert len(gpu.waits) == 3
    assert_same_detections(detections, expected[0])
    torch.testing.assert_close(outputs, expected[1], rtol=1e-4, atol=1e-4)


def test_frozen_parts_get_no_gradient():
    net = small()
    set_train_mode(net, net.stages()[:2], freeze_bn=True)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    outputs = net(torch.randn(1, 3, 64, 64), [(64, 64)], take_first(4, 2))
    sum(value.square().mean() for value in outputs.values()).backward()
    without_gradient = {key for key, parameter in net.named_parameters() if parameter.grad is None}
    norms = {f"{key}." for key, part in net.named_modules() if isinstance(part, nn.BatchNorm2d)}
    for key, _ in net.named_parameters():
        frozen = "body.conv1" in key or "layer1" in key or key.startswith(tuple(norms))
        assert (key in without_gradient) == frozen, key
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_without_any_proposal():
    """No detections, and every parameter still gets a gradient."""
    net = small()
    nn.init.constant_(net.rpn.head.bbox_pred.bias, -1e4)  # all boxes are far to the left of the image
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        detections = net.eval()(images, [(64, 64)] * 2)
    assert [tuple(each[key].shape) for each in detections for key in ("boxes", "masks")] == [(0, 4), (0, 28, 28)] * 2
    outputs = net.train()(images, [(64, 64)] * 2, take_first(5, 5))
    assert len(outputs["logits"]) == len(outputs["masks"]) == 0
    sum(value.sum() for value in outputs.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_autocast_on_a_cpu():
    """Anchors, boxes and pooling stay float32, and bf16 outputs are near those in float32."""
    net = small().eval()
    images, shapes = torch.randn(2, 3, 96, 96), [(96, 96), (80, 96)]
    boxes = torch.tensor([[3.0, 5, 60, 70], [20, 20, 95, 79]])
    with torch.no_grad():
        expected = net(images, shapes, lambda proposals: ([boxes, boxes], [boxes, boxes]))
        with torch.autocast("cpu", torch.bfloat16):
            features, proposals, outputs = net.propose(images, shapes)
            half = net(images, shapes, lambda proposals: ([boxes, boxes], [boxes, boxes]))
            detections = net(images, shapes)
    assert {x.dtype for x in (*features, proposals, outputs["anchors"])} == {torch.float32}
    torch.testing.assert_close(half["anchors"], expected["anchors"], rtol=0, atol=0)
    for name in ("objectness", "deltas", "logits", "offsets", "masks"):
        difference = (half[name].float() - expected[name]).norm() / expected[name].norm()
        assert difference < 0.05, name
    assert all(each[key].dtype == torch.float32 for each in detections for key in ("boxes", "scores", "masks"))
    assert all(len(each["boxes"]) for each in detections)


def test_training_is_deterministic():
    """No operation raises under use_deterministic_algorithms, and two passes give the same bits."""
    net = small().train()
    images = torch.randn(2, 3, 64, 64)
    passes = []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            set_train_mode(net, freeze_bn=True)
            net.zero_grad()
            outputs = net(images, [(64, 64), (60, 50)], take_first(6, 3))
            sum(value.square().sum() for value in outputs.values()).backward()
            gradients = [parameter.grad for parameter in net.parameters() if parameter.requires_grad]
            passes.append([value.detach().clone() for value in (*outputs.values(), *gradients)])
    finally:
        torch.use_deterministic_algorithms(before)
    torch.testing.assert_close(*passes, rtol=0, atol=0)


def test_evaluation_has_half_the_proposals_of_training():
    assert small(proposals=30).rpn._post_nms_top_n == {"training": 60, "testing": 30}
