"""How RetinaNet's weights come in: published names, classes by name, and what a new run starts from."""

import pytest
import torch
import torchvision

import models
from models import WeightsError, published, published_retinanet
from models.published_retinanet import COCO, COCO_IDS, LOGITS, our_name

DEPTH = 18


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def build(classes, **arguments):
    net = models.build("retinanet", len(classes), depth=DEPTH, **arguments)
    net.classes = list(classes)
    return net


def checkpoint(net, **more):
    """What a training run writes, as far as models.load reads it."""
    return {
        "format_version": 1,
        "architecture": net.name,
        "arguments": net.arguments,
        "num_classes": net.num_classes,
        "classes": net.classes,
        "min_side": 320,
        "max_side": 480,
        "model": net.state_dict(),
        **more,
    }


def assert_same_state(actual, expected):
    torch.testing.assert_close(dict(actual.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_load_gives_the_network_of_a_checkpoint(tmp_path):
    net = build(["a", "b"], anchors="torchvision", anchor_scale=2.0)
    torch.save(checkpoint(net), tmp_path / "last.pt")
    again = models.load(tmp_path / "last.pt")
    assert not again.training
    assert (again.arguments, again.classes) == (net.arguments, ["a", "b"])
    assert (again.min_side, again.max_side, again.image_size) == (320, 480, None)
    assert again.box_weights == (1, 1, 1, 1)
    assert_same_state(again, net)


@pytest.mark.parametrize(
    ("theirs", "ours"),
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
def test_names_of_published_files(theirs, ours):
    assert our_name(theirs) == ours


def test_coco_names():
    """yhenon's label is the place among 80, torchvision's is COCO's id."""
    assert (len(COCO), COCO[0], COCO[79]) == (80, "person", "toothbrush")
    assert (len(COCO_IDS), COCO_IDS[1], COCO_IDS[90], COCO_IDS[12]) == (91, "person", "toothbrush", "N/A")


@pytest.mark.parametrize(("count", "names"), [(80, COCO), (91, COCO_IDS), (7, None)])
def test_classes_of_published_files(count, names):
    state = models.build("retinanet", count, depth=DEPTH, anchors="torchvision").state_dict()
    assert published.load(state).classes == names


def test_published_load_is_strict():
    state = build(["a"], anchors="torchvision").state_dict()
    with pytest.raises(WeightsError, match=r"1 tensors do not fit retinanet, the first: more is unknown"):
        published.load({**state, "more": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"bbox_reg.bias is missing"):
        published.load({k: v for k, v in state.items() if not k.endswith("bbox_reg.bias")})
    with pytest.raises(WeightsError, match="no whole RetinaNet on a ResNet"):
        published.load({k: v for k, v in state.items() if k != f"{LOGITS}.bias"})


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"x.pt: .* would run code"):
        published.begin_retinanet(build(["a"]), str(tmp_path / "x.pt"), "auto")


def rows(net):
    """The last layer's weights by class: [K,S,256,3,3]."""
    weight = net.state_dict()[f"{LOGITS}.weight"]
    return weight.unflatten(0, (9, net.num_classes)).transpose(0, 1)


def test_pretrained_takes_classes_by_name(tmp_path):
    source, net, said = build(["cat", "dog", "cow"]), build(["cow", "cat"]), []
    torch.save(checkpoint(source), tmp_path / "x.pt")
    published.begin_retinanet(net, str(tmp_path / "x.pt"), "auto", say=said.append)
    assert said == [f"{tmp_path / 'x.pt'}: 156 of 156 tensors loaded, 2 of its 3 classes by name"]
    torch.testing.assert_close(rows(net), rows(source)[[2, 0]], rtol=0, atol=0)
    with torch.no_grad():
        images = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(net.eval()(images)["logits"], source.eval()(images)["logits"][..., [2, 0]])


def test_pretrained_of_other_classes_leaves_the_head():
    source = build(["cat", "dog", "cow"])
    fresh = "head re-initialised, 154 of 156 tensors loaded"
    for classes, line in (
        (["bus", "car"], f"checkpoint 3 classes, data 2: {fresh}"),
        (["bus", "car", "van"], f"checkpoint 3 classes, data 3: {fresh}, its classes have other names"),
        (["cat", "dog", "cow"], "156 of 156 tensors loaded"),
    ):
        net = build(classes)
        head = rows(net).clone()
        assert published_retinanet.fine_tune(net, checkpoint(source)) == line
        kept = head if "re-initialised" in line else rows(source)
        torch.testing.assert_close(rows(net), kept, rtol=0, atol=0)
        torch.testing.assert_close(net.backbone.body.conv1.weight, source.backbone.body.conv1.weight, rtol=0, atol=0)


def test_pretrained_of_another_make_is_refused():
    source, kind = build(["a", "b"]), "state dict: was made with"
    with pytest.raises(WeightsError, match=f"{kind} --anchors yhenon, this run has torchvision; give --anchors yhenon"):
        published_retinanet.fine_tune(build(["a", "b"], anchors="torchvision"), checkpoint(source))
    with pytest.raises(WeightsError, match=f"{kind} --anchor-scale 4.0, this run has 2.0"):
        published_retinanet.fine_tune(build(["a", "b"], anchor_scale=2.0), checkpoint(source))
    with pytest.raises(WeightsError, match=f"{kind} --depth 18, this run has 34"):
        published_retinanet.fine_tune(models.build("retinanet", 2, depth=34), checkpoint(source))
    with pytest.raises(WeightsError, match="holds a resnet18, not a retinanet; give it as --backbone-weights"):
        published_retinanet.fine_tune(source, {**checkpoint(source), "architecture": "resnet18"})


def test_begin_from_a_backbone(tmp_path):
    source, net, said = models.build("resnet18", 5), build(["a"]), []
    path = tmp_path / "backbone.pt"
    torch.save({"architecture": "resnet18", "model": source.state_dict()}, path)
    published.begin_retinanet(net, "", str(path), say=said.append)
    assert said == [f"{path}: 120 of 120 tensors of the backbone taken"]
    for name, value in net.backbone.body.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name], rtol=0, atol=0)
    with pytest.raises(WeightsError, match=r"backbone.pt: holds a resnet18, but retinanet-34 stands on resnet34"):
        published.begin_retinanet(models.build("retinanet", 1, depth=34), "", str(path))


def test_begin_with_imagenet_weights(tmp_path, monkeypatch):
    """auto takes torchvision's file; without it the run starts from scratch, and that is said loudly."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    net, said = build(["a"]), []
    before = net.backbone.body.conv1.weight.clone()
    published.begin_retinanet(net, "", "auto", say=said.append)
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert f"(no network); put it at {path} or name a file with --backbone-weights" in said[0]
    assert said[1].startswith("WARNING: ") and "FROM SCRATCH" in said[1] and "--no-freeze-bn" in said[1]
    published.begin_retinanet(net, "", "none", say=said.append)
    published.begin_retinanet(net, "", "auto", fetch=False, say=said.append)
    assert len(said) == 3 and "--no-freeze-bn" in said[2]
    torch.testing.assert_close(net.backbone.body.conv1.weight, before, rtol=0, atol=0)

    source = torchvision.models.resnet18(weights=None)
    torch.save(source.state_dict(), path)
    published.begin_retinanet(net, "", "auto", say=said.append)
    assert said[3] == "ImageNet weights of resnet18: 120 of 120 tensors of the backbone taken"
    torch.testing.assert_close(net.backbone.body.conv1.weight, source.conv1.weight, rtol=0, atol=0)
