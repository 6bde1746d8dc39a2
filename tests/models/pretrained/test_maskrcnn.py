"""Mask R-CNN from torchvision's files: names, classes, and weights of other classes or variants."""

import pytest
import torch

import models
from models import pretrained
from models.pretrained.maskrcnn import COCO_WEIGHTS, HEADS, describe, fine_tune, load_backbone, our_name
from models.pretrained.retinanet import COCO, COCO_IDS
from tests.model_helpers import checkpoint
from utils.errors import WeightsError

SMALL = {"width": 8, "hidden": 16}


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def build(classes, **arguments):
    net = models.build("maskrcnn_resnet18", len(classes), **{**SMALL, **arguments})
    net.classes = list(classes)
    return net


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("backbone.fpn.layer_blocks.3.bias", "backbone.fpn.layer_blocks.3.0.bias"),
        ("backbone.fpn.layer_blocks.3.0.bias", "backbone.fpn.layer_blocks.3.0.bias"),
        ("rpn.head.conv.weight", "rpn.head.conv.0.0.weight"),
        ("rpn.head.conv.1.0.weight", "rpn.head.conv.1.0.weight"),
        ("roi_heads.mask_head.mask_fcn4.weight", "roi_heads.mask_head.3.0.weight"),
        ("roi_heads.mask_predictor.mask_fcn_logits.weight", "roi_heads.mask_predictor.mask_fcn_logits.weight"),
        ("backbone.body.layer1.0.conv1.weight", "backbone.body.layer1.0.conv1.weight"),
    ],
)
def test_names_of_published_files(published, ours):
    assert our_name(published) == ours


@pytest.mark.parametrize(("count", "names"), [(80, COCO), (90, COCO_IDS[1:]), (7, None)])
def test_classes_and_widths_of_published_files(count, names):
    net = pretrained.load(models.build("maskrcnn_resnet18", count, **SMALL).state_dict())
    assert (net.num_classes, net.classes, net.image_size) == (count, names, None)
    assert net.arguments == {"proposals": 1000, **SMALL} and not net.training


def test_both_versions_of_torchvision_are_recognized():
    for name in COCO_WEIGHTS:
        with torch.device("meta"):
            state = models.build(name, 90).state_dict()
        assert describe("maskrcnn", state, "x").name == name
        assert len(COCO_WEIGHTS[name].meta["categories"]) == 91


def test_published_files_load_strictly():
    state = build(["a"]).state_dict()
    for wrong, line in (
        ({**state, "more": torch.zeros(1)}, "1 tensors do not fit maskrcnn_resnet18, .*more is not in this network"),
        ({k: v for k, v in state.items() if k != f"{HEADS[1]}.bias"}, "bbox_pred.bias is missing"),
        ({k: v for k, v in state.items() if k != f"{HEADS[2]}.weight"}, "unknown weights"),
        (
            {**state, "backbone.body.layer3.5.conv2.weight": torch.zeros(1)},
            "contains a maskrcnn_resnet34; known are maskrcnn_resnet50, ",
        ),
    ):
        with pytest.raises(WeightsError, match=line):
            pretrained.load(wrong)


def test_classes_are_loaded_by_name():
    source, net = build(["cat", "dog", "cow"]), build(["cow", "cat"])
    count = len(net.state_dict())
    line = fine_tune(net, checkpoint(source), strict=True)
    assert line == f"{count} of {count} tensors loaded, 2 of its 3 classes by name"
    images, box = torch.randn(1, 3, 64, 64), [torch.tensor([[3.0, 4, 50, 60]])]
    with torch.no_grad():
        ours, theirs = (each.eval()(images, [(64, 64)], lambda _: (box, box)) for each in (net, source))
    rows = [0, 3, 1]
    torch.testing.assert_close(ours["logits"], theirs["logits"][:, rows])
    torch.testing.assert_close(ours["offsets"], theirs["offsets"].unflatten(1, (4, 4))[:, rows].flatten(1))
    torch.testing.assert_close(ours["masks"], theirs["masks"][:, rows])


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (["bus", "car"], "checkpoint 3 classes, data 2: head re-initialized, "),
        (["bus", "car", "van"], "checkpoint 3 classes, data 3 of other names: head re-initialized, "),
        (["cat", "dog", "cow"], ""),
    ],
)
def test_the_heads_of_other_classes_are_not_loaded(classes, line):
    source, net = build(["cat", "dog", "cow"]), build(classes)
    before, count = {k: v.clone() for k, v in net.state_dict().items()}, len(net.state_dict())
    assert fine_tune(net, checkpoint(source)) == f"{line}{count - 6 * bool(line)} of {count} tensors loaded"
    for name, value in net.state_dict().items():
        expected = before if line and name.startswith(HEADS) else source.state_dict()
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_other_variants_are_refused():
    source = build(["a"])
    with pytest.raises(WeightsError, match="was made with width 8, this run has 12; make them the same"):
        fine_tune(build(["a"], width=12), checkpoint(source))
    with pytest.raises(WeightsError, match="contains a maskrcnn_resnet50, not a maskrcnn_resnet18; give a maskrcnn_"):
        fine_tune(source, {**checkpoint(source), "architecture": "maskrcnn_resnet50"})
    with pytest.raises(WeightsError, match="unknown weights"):
        fine_tune(source, {"conv1.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="contains a resnet34, but maskrcnn_resnet18 needs a resnet18"):
        load_backbone(source, models.build("resnet34", 2).state_dict())
