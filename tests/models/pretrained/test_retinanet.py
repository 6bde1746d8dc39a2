"""RetinaNet from published files: names, classes, and weights of other classes or variants."""

import pytest
import torch

import models
from models import pretrained
from models.pretrained import retinanet
from models.pretrained.retinanet import COCO, COCO_IDS, LOGITS, our_name, published_state
from tests import golden
from tests.model_helpers import checkpoint
from utils.errors import WeightsError


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def build(classes, **arguments):
    net = models.build("retinanet", len(classes), **{"depth": 18, **arguments})
    net.classes = list(classes)
    return net


@pytest.mark.parametrize("arguments", [{"depth": 18}, {"depth": 50}, {"depth": 18, "anchors": "torchvision"}])
def test_only_torchvisions_retinanet_can_be_downloaded(arguments):
    with torch.device("meta"), pytest.raises(WeightsError, match="the only one to download"):
        retinanet.published(models.build("retinanet", 2, **arguments))


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("conv1.weight", "backbone.body.conv1.weight"),
        ("layer1.0.downsample.0.weight", "backbone.body.layer1.0.downsample.0.weight"),
        ("fpn.P5_1.weight", "backbone.fpn.inner_blocks.2.0.weight"),
        ("fpn.P3_2.bias", "backbone.fpn.layer_blocks.0.0.bias"),
        ("fpn.P6.weight", "backbone.fpn.extra_blocks.p6.weight"),
        ("fpn.P7_2.weight", "backbone.fpn.extra_blocks.p7.weight"),
        ("regressionModel.conv4.bias", "head.regression_head.conv.3.0.bias"),
        ("regressionModel.output.weight", "head.regression_head.bbox_reg.weight"),
        ("classificationModel.output.bias", f"{LOGITS}.bias"),
        ("backbone.fpn.inner_blocks.1.weight", "backbone.fpn.inner_blocks.1.0.weight"),
        ("head.classification_head.conv.6.weight", "head.classification_head.conv.3.0.weight"),
        ("head.regression_head.conv.3.0.weight", "head.regression_head.conv.3.0.weight"),
        ("backbone.fpn.inner_blocks.1.0.weight", "backbone.fpn.inner_blocks.1.0.weight"),
        ("backbone.body.layer1.0.conv1.weight", "backbone.body.layer1.0.conv1.weight"),
    ],
)
def test_names_of_published_files(published, ours):
    """Those of yhenon, and of torchvision before and since 0.14."""
    yhenon = not published.startswith(("backbone.", "head."))
    assert our_name(published, "yhenon" if yhenon else "torchvision") == ours


def test_published_state_has_yhenons_names():
    shapes = golden.case("retinanet", "retinanet-50-80")["state_dict"]
    state = published_state(models.build("retinanet", 80, depth=50))
    assert {name: list(value.shape) for name, value in state.items()} == shapes


def test_coco_names():
    """A label of yhenon's is a position among 80 names, one of torchvision's is COCO's id."""
    assert (len(COCO), COCO[0], COCO[79]) == (80, "person", "toothbrush")
    assert (len(COCO_IDS), COCO_IDS[1], COCO_IDS[90], COCO_IDS[12]) == (91, "person", "toothbrush", "N/A")


@pytest.mark.parametrize(("count", "names"), [(80, COCO), (91, COCO_IDS), (7, None)])
def test_classes_of_published_files(count, names):
    state = models.build("retinanet", count, depth=18, anchors="torchvision").state_dict()
    assert pretrained.load(state).classes == names


def test_frozen_batch_norms_with_an_epsilon_of_0_compute_the_same_with_ours():
    state = {"bn.weight": torch.rand(4), "bn.running_mean": torch.rand(4), "bn.running_var": torch.rand(4) + 0.1}
    ours = retinanet.with_norm_eps(state)
    torch.testing.assert_close(ours["bn.running_var"] + 1e-5, state["bn.running_var"], rtol=1e-7, atol=0)
    assert ours["bn.running_mean"] is state["bn.running_mean"]
    trained = state | {"bn.num_batches_tracked": torch.tensor(3)}
    assert retinanet.with_norm_eps(trained) == trained


def test_published_files_load_strictly():
    state = build(["a"], anchors="torchvision").state_dict()
    for wrong, line in (
        ({**state, "more": torch.zeros(1)}, "1 tensors do not fit retinanet, the first: more is not in this network"),
        ({k: v for k, v in state.items() if not k.endswith("bbox_reg.bias")}, "bbox_reg.bias is missing"),
        ({k: v for k, v in state.items() if k != f"{LOGITS}.bias"}, "not a complete RetinaNet on a ResNet"),
    ):
        with pytest.raises(WeightsError, match=line):
            pretrained.load(wrong)


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"x.pt: .* would run its code: refused"):
        retinanet.fine_tune(build(["a"]), tmp_path / "x.pt")


def rows_by_class(net):
    """The last layer's weights: [K,S,256,3,3]."""
    weight = net.state_dict()[f"{LOGITS}.weight"]
    return weight.unflatten(0, (9, net.num_classes)).transpose(0, 1)


def test_classes_are_loaded_by_name():
    source, net = build(["cat", "dog", "cow"]), build(["cow", "cat"])
    torch.nn.init.normal_(source.head["classification_head"].cls_logits.weight)
    line = retinanet.fine_tune(net, checkpoint(source), strict=True)
    assert line == "156 of 156 tensors loaded, 2 of its 3 classes by name"
    torch.testing.assert_close(rows_by_class(net), rows_by_class(source)[[2, 0]], rtol=0, atol=0)
    with torch.no_grad():
        images = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(net.eval()(images)["logits"], source.eval()(images)["logits"][..., [2, 0]])


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (["bus", "car"], "checkpoint 3 classes, data 2: head re-initialized, 154 of 156"),
        (["bus", "car", "van"], "checkpoint 3 classes, data 3 of other names: head re-initialized, 154 of 156"),
        (["cat", "dog", "cow"], "156 of 156"),
    ],
)
def test_the_head_of_other_classes_is_not_loaded(classes, line):
    source, net = build(["cat", "dog", "cow"]), build(classes)
    torch.nn.init.normal_(source.head["classification_head"].cls_logits.weight)
    head = rows_by_class(net).clone()
    assert retinanet.fine_tune(net, checkpoint(source)) == f"{line} tensors loaded"
    expected = head if "re-initialized" in line else rows_by_class(source)
    torch.testing.assert_close(rows_by_class(net), expected, rtol=0, atol=0)
    torch.testing.assert_close(net.backbone.body.conv1.weight, source.backbone.body.conv1.weight, rtol=0, atol=0)


def test_other_variants_are_refused():
    source, line = build(["a", "b"]), "state dict: was made with"
    with pytest.raises(WeightsError, match=f"{line} --anchors yhenon, this run has torchvision; give --anchors yhenon"):
        retinanet.fine_tune(build(["a", "b"], anchors="torchvision"), checkpoint(source))
    with pytest.raises(WeightsError, match=f"{line} --anchor-scale 4.0, this run has 2.0"):
        retinanet.fine_tune(build(["a", "b"], anchor_scale=2.0), checkpoint(source))
    with pytest.raises(WeightsError, match=f"{line} --depth 18, this run has 34"):
        retinanet.fine_tune(build(["a", "b"], depth=34), checkpoint(source))
    with pytest.raises(WeightsError, match="contains a resnet18, not a retinanet"):
        retinanet.fine_tune(source, {**checkpoint(source), "architecture": "resnet18"})
    with pytest.raises(WeightsError, match="contains a resnet18, but retinanet of depth 34 needs a resnet34"):
        retinanet.load_backbone(build(["a"], depth=34), models.build("resnet18", 5).state_dict())
