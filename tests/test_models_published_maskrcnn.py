"""How Mask R-CNN's weights come in: published names, classes by name, and what a new run starts from."""

import pytest
import torch
import torchvision

import models
from models import WeightsError, published
from models.published_maskrcnn import COCO_WEIGHTS, HEADS, describe, fine_tune, our_name
from models.published_retinanet import COCO, COCO_IDS

SMALL = {"width": 8, "hidden": 16}


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def build(classes, **arguments):
    net = models.build("maskrcnn_resnet18", len(classes), **{**SMALL, **arguments})
    net.classes = list(classes)
    return net


def checkpoint(net):
    """What a training run writes, as far as models.load reads it."""
    return {**models.describe(net), "format_version": 1, "min_side": 320, "max_side": 480, "model": net.state_dict()}


@pytest.mark.parametrize(
    ("theirs", "ours"),
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
def test_names_of_published_files(theirs, ours):
    assert our_name(theirs) == ours


@pytest.mark.parametrize(("count", "names"), [(80, COCO), (90, COCO_IDS[1:]), (7, None)])
def test_a_published_file_says_its_classes_and_widths(count, names):
    net = published.load(models.build("maskrcnn_resnet18", count, **SMALL).state_dict())
    assert (net.num_classes, net.classes, net.image_size) == (count, names, None)
    assert net.arguments == {"proposals": 1000, **SMALL} and not net.training


def test_torchvisions_kinds_are_told_apart():
    for name in COCO_WEIGHTS:
        with torch.device("meta"):
            state = models.build(name, 90).state_dict()
        assert describe(state, "x")[0] == name
        assert len(COCO_WEIGHTS[name].meta["categories"]) == 91


def test_published_load_is_strict():
    state = build(["a"]).state_dict()
    with pytest.raises(WeightsError, match=r"1 tensors do not fit maskrcnn_resnet18, the first: more is unknown"):
        published.load({**state, "more": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"bbox_pred.bias is missing"):
        published.load({k: v for k, v in state.items() if k != f"{HEADS[1]}.bias"})
    with pytest.raises(WeightsError, match="unknown weights"):
        published.load({k: v for k, v in state.items() if k != f"{HEADS[2]}.weight"})
    deeper = {**state, "backbone.body.layer3.5.conv2.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match="holds a maskrcnn_resnet34; known are maskrcnn_resnet50, "):
        published.load(deeper)


def test_pretrained_takes_classes_by_name(tmp_path):
    source, net, said = build(["cat", "dog", "cow"]), build(["cow", "cat"]), []
    torch.save(checkpoint(source), tmp_path / "x.pt")
    published.begin_maskrcnn(net, str(tmp_path / "x.pt"), said.append)
    count = len(net.state_dict())
    assert said == [f"{tmp_path / 'x.pt'}: {count} of {count} tensors loaded, 2 of its 3 classes by name"]
    images, box = torch.randn(1, 3, 64, 64), [torch.tensor([[3.0, 4, 50, 60]])]
    with torch.no_grad():
        ours, theirs = (each.eval()(images, [(64, 64)], lambda _: (box, box)) for each in (net, source))
    rows = [0, 3, 1]
    torch.testing.assert_close(ours["logits"], theirs["logits"][:, rows])
    torch.testing.assert_close(ours["offsets"], theirs["offsets"].unflatten(1, (4, 4))[:, rows].flatten(1))
    torch.testing.assert_close(ours["masks"], theirs["masks"][:, rows])


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        (["bus", "car"], "checkpoint 3 classes, data 2"),
        (["bus", "car", "van"], "other classes"),
        (["cat", "dog", "cow"], ""),
    ],
)
def test_heads_of_other_classes_start_fresh(classes, why):
    source, net = build(["cat", "dog", "cow"]), build(classes)
    before, count = {k: v.clone() for k, v in net.state_dict().items()}, len(net.state_dict())
    line = fine_tune(net, checkpoint(source))
    heads = f"; these heads start fresh ({why}): {', '.join(HEADS)}"
    assert line == (f"{count - 6} of {count} tensors loaded{heads}" if why else f"{count} of {count} tensors loaded")
    for name, value in net.state_dict().items():
        kept = before if why and name.startswith(HEADS) else source.state_dict()
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0, msg=name)


def test_another_network_is_refused(tmp_path):
    source = build(["a"])
    with pytest.raises(WeightsError, match="was made with width 8, this run has 12; make them the same"):
        fine_tune(build(["a"], width=12), checkpoint(source))
    with pytest.raises(WeightsError, match="holds a maskrcnn_resnet50, not a maskrcnn_resnet18; give a file of that"):
        fine_tune(source, {**checkpoint(source), "architecture": "maskrcnn_resnet50"})
    with pytest.raises(WeightsError, match="unknown weights"):
        fine_tune(source, {"conv1.weight": torch.zeros(1)})
    torch.save({"architecture": "resnet34", "model": models.build("resnet34", 2).state_dict()}, tmp_path / "b.pt")
    with pytest.raises(WeightsError, match=r"b.pt: holds a resnet34, but maskrcnn_resnet18 stands on resnet18"):
        published.begin_maskrcnn(source, str(tmp_path / "b.pt"))


@pytest.mark.parametrize("ours", [True, False])
def test_begin_from_a_backbone(tmp_path, ours):
    """A checkpoint of train_backbone.py and torchvision's bare state dict."""
    source = models.build("resnet18", 5) if ours else torchvision.models.resnet18(weights=None)
    state = {"architecture": "resnet18", "model": source.state_dict()} if ours else source.state_dict()
    path, net, said = tmp_path / "backbone.pt", build(["a"]), []
    torch.save(state, path)
    published.begin_maskrcnn(net, str(path), said.append)
    assert said == [f"{path}: 120 of 120 tensors of the backbone taken"]
    for name, value in net.backbone["body"].state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name], rtol=0, atol=0)


def test_begin_with_weights_to_download(tmp_path, monkeypatch):
    """Named weights must come; auto takes what it gets and else says loudly that it starts from scratch."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    net, said = build(["a"]), []
    before = {k: v.clone() for k, v in net.state_dict().items()}
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    wrong = rf"\(no network\); put it at {path} or name a file with --weights"
    with pytest.raises(WeightsError, match=wrong):
        published.begin_maskrcnn(net, "imagenet", said.append)
    with pytest.raises(WeightsError, match="there are no COCO weights of maskrcnn_resnet18, only of maskrcnn_resnet50"):
        published.begin_maskrcnn(net, "coco", said.append)
    published.begin_maskrcnn(net, "imagenet", said.append, fetch=False)
    assert said == []
    published.begin_maskrcnn(net, "none", said.append)
    published.begin_maskrcnn(net, "auto", said.append)
    assert "--no-freeze-bn" in said[0] and str(path) in said[1]
    assert said[2].startswith("WARNING: ") and "FROM SCRATCH" in said[2]
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)

    source = torchvision.models.resnet18(weights=None)
    torch.save(source.state_dict(), path)
    published.begin_maskrcnn(net, "auto", said.append)
    assert said[3] == "ImageNet weights of resnet18: 120 of 120 tensors of the backbone taken"
    torch.testing.assert_close(net.backbone["body"].conv1.weight, source.conv1.weight, rtol=0, atol=0)


def test_begin_with_torchvisions_coco_weights(tmp_path, monkeypatch):
    """The file is torchvision's; a class that COCO has is taken by its name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    path = tmp_path / "hub" / "checkpoints" / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
    path.parent.mkdir(parents=True)
    torch.save(source.state_dict(), path)
    net, said = models.build("maskrcnn_resnet50", 1), []
    net.classes = ["person"]
    published.begin_maskrcnn(net, "coco", said.append)
    count = len(net.state_dict())
    line = f"{count} of {count} tensors loaded, 1 of its 90 classes by name"
    assert said == [f"COCO weights of maskrcnn_resnet50: {line}"]
    rows = source.roi_heads.box_predictor.cls_score.weight[:2]  # background, and person, COCO's id 1
    torch.testing.assert_close(net.roi_heads.box_predictor.cls_score.weight, rows, rtol=0, atol=0)
