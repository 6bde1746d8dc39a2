"""What a new run starts from: every value of --weights and --backbone-weights, for every family."""

import pytest
import torch
import torchvision

import models
from models import pretrained
from models.pretrained import backbones, maskrcnn, retinanet, ssd
from tests.model_helpers import assert_same_state, checkpoint
from utils.errors import WeightsError

NETWORKS = {  # the smallest of each family; all have a ResNet-18 but SSD
    "ssd": ("mb1-ssd-lite", {}),
    "retinanet": ("retinanet", {"depth": 18}),
    "centerfusion": ("centerfusion_resnet18", {}),
    "maskrcnn": ("maskrcnn_resnet18", {"width": 8, "hidden": 16}),
    "classifier": ("resnet18", {}),
}
ON_RESNET18 = ["retinanet", "centerfusion", "maskrcnn"]


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def downloads(monkeypatch):
    """Files that can be downloaded: {part of the URL: file}. The others raise WeightsError."""
    files = {}

    def fetch(url):
        for part, file in files.items():
            if part in url:
                return file
        raise WeightsError(f"cannot download {url} (no network)")

    for module in (backbones, ssd, retinanet, maskrcnn):
        monkeypatch.setattr(module, "fetch", fetch)
    return files


@pytest.fixture
def resnet18_file(tmp_path):
    """torchvision's ImageNet file."""
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    return tmp_path / "resnet18.pth"


def build(family, num_classes=2):
    name, arguments = NETWORKS[family]
    net = models.build(name, num_classes, **arguments)
    net.classes = [f"class {label}" for label in range(num_classes)]
    return net


def init(net, *args, **kwargs):
    """The lines that init_weights prints."""
    lines = []
    pretrained.init_weights(net, *args, print=lines.append, **kwargs)
    return lines


def unchanged(net, *args, **kwargs):
    """The lines that init_weights prints; the weights must stay as they are."""
    before = {key: value.clone() for key, value in net.state_dict().items()}
    lines = init(net, *args, **kwargs)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    return lines


@pytest.mark.parametrize("family", NETWORKS)
def test_none(family):
    assert unchanged(build(family), "none") == ["no weights to start from: training from scratch"]
    (line,) = unchanged(build(family), "none", freeze_bn=True)
    assert line.startswith("no weights to start from: training from scratch; frozen batch norm")
    assert line.endswith(": give --no-freeze-bn")


@pytest.mark.slow
@pytest.mark.parametrize("family", NETWORKS)
def test_file_of_the_network(family, tmp_path):
    source, net = build(family), build(family)
    torch.save(checkpoint(source), tmp_path / "x.pt")
    for strict in (False, True):
        count = len(net.state_dict())
        assert init(net, str(tmp_path / "x.pt"), strict=strict) == [
            f"{tmp_path / 'x.pt'}: {count} of {count} tensors loaded"
        ]
        assert_same_state(net, source)


@pytest.mark.slow
@pytest.mark.parametrize("family", NETWORKS)
def test_file_with_other_classes(family, tmp_path):
    """The head keeps its random weights; an evaluation refuses that."""
    source = build(family, 5)
    source.classes = ["ant", "bee", "cow", "dog", "emu"]
    torch.save(checkpoint(source), tmp_path / "x.pt")
    net = build(family)
    (line,) = init(net, str(tmp_path / "x.pt"))
    assert "re-initialized" in line or line.endswith("heads keep random weights: hm")
    with pytest.raises(WeightsError, match=r"x.pt: .*(classes|needs all)"):
        init(net, str(tmp_path / "x.pt"), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["weights", "backbone_weights"])
@pytest.mark.parametrize("family", ON_RESNET18)
def test_file_of_the_backbone(family, option, resnet18_file):
    """Of train_backbone.py or torchvision. For an evaluation it is not enough."""
    net = build(family)
    (line,) = init(net, **{"weights": "none", option: str(resnet18_file)})
    assert line.startswith(f"{resnet18_file}: 120 of 120 tensors of the backbone loaded")
    expected = torch.load(resnet18_file)["layer4.1.conv2.weight"]
    body = net.base if family == "centerfusion" else net.backbone["body"]
    torch.testing.assert_close(body.layer4[1].conv2.weight, expected, rtol=0, atol=0)
    if option == "weights":
        with pytest.raises(WeightsError, match=f"{resnet18_file}: not a complete {net.name}"):
            init(net, str(resnet18_file), strict=True)


def test_two_files_are_refused():
    for backbone_weights in ("y.pt", "imagenet"):
        with pytest.raises(WeightsError, match=f"--weights x.pt and --backbone-weights {backbone_weights}: give one"):
            init(build("maskrcnn"), "x.pt", backbone_weights)


def test_other_processes_download_nothing(downloads):
    for family in NETWORKS:
        assert unchanged(build(family), "auto", download=False) == []


@pytest.mark.parametrize("family", NETWORKS)
def test_auto_without_published_weights(family, downloads):
    """Each attempt is printed, and then a warning."""
    options = ("auto", "none" if family == "classifier" else "auto")
    lines = unchanged(build(family), *options, freeze_bn=True)
    assert all("or name a file with --weights" in line for line in lines[:-1])
    assert len(lines) == (2 if family == "classifier" else 3)
    assert lines[-1].startswith("WARNING: ") and "FROM SCRATCH (--weights none --backbone-" in lines[-1]
    assert lines[-1].endswith("give --no-freeze-bn")
    assert "freeze" not in unchanged(build(family), *options)[-1]


def test_auto_loads_the_published_network(downloads, tmp_path):
    source, net = models.build("mb1-ssd", 20), models.build("mb1-ssd", 2)
    torch.save(source.state_dict(), tmp_path / "mb1.pth")
    downloads["mobilenet-v1-ssd-mp-0_675.pth"] = tmp_path / "mb1.pth"
    (line,) = init(net, "auto", "auto")
    assert line.startswith("published weights of mb1-ssd: checkpoint 21 classes, data 3") and "190 of 202" in line
    torch.testing.assert_close(net.base_net[5][0].weight, source.base_net[5][0].weight, rtol=0, atol=0)
    assert pretrained.init_weights(net, "auto", "auto", print=len)  # published weights were loaded
    assert not pretrained.init_weights(net, str(tmp_path / "mb1.pth"), print=len)
    assert not pretrained.init_weights(build("centerfusion"), "auto", print=len)


def test_auto_falls_back_to_the_backbone(downloads, resnet18_file):
    """Where there is no published network: for Mask R-CNN always, for the others if --backbone-weights is auto."""
    downloads["resnet18-"] = resnet18_file
    for family, backbone_weights in (("maskrcnn", "none"), ("retinanet", "auto"), ("centerfusion", "auto")):
        net = build(family)
        lines = init(net, "auto", backbone_weights)
        assert len(lines) == 2 and lines[1].startswith("ImageNet weights: 120 of 120 tensors of the backbone loaded")
    assert "WARNING" in init(net, "auto")[-1]
    (line,) = init(net, "none", "auto")
    assert line.startswith("ImageNet weights: ")


@pytest.mark.parametrize("family", ON_RESNET18)
def test_imagenet(family, downloads, resnet18_file):
    """Requested by name: an error if it cannot be downloaded, or if an evaluation needs the whole network."""
    net = build(family)
    for arguments in (("imagenet",), ("none", "imagenet"), ("auto", "imagenet")):
        with pytest.raises(WeightsError, match=r"no network.*or name a file with --weights"):
            init(net, *arguments)
    downloads["resnet18-"] = resnet18_file
    for arguments in (("imagenet",), ("none", "imagenet"), ("auto", "imagenet")):
        (line,) = init(net, *arguments)
        assert line.startswith("ImageNet weights: 120 of 120 tensors of the backbone loaded")
    with pytest.raises(WeightsError, match=r"not a complete .*, which an evaluation needs"):
        init(net, "imagenet", strict=True)


def test_imagenet_of_a_classifier(downloads, resnet18_file):
    downloads["resnet18-"] = resnet18_file
    for weights in ("imagenet", "auto"):
        net = build("classifier")
        line = "checkpoint 1000 classes, data 2: head re-initialized, 120 of 122 tensors loaded"
        assert init(net, weights) == [f"published weights of resnet18: {line}"]
        torch.testing.assert_close(net.conv1.weight, torch.load(resnet18_file)["conv1.weight"], rtol=0, atol=0)
    with pytest.raises(WeightsError, match="torchvision has no weights of mobilenet_v1; or name a file with --weights"):
        init(models.build("mobilenet_v1", 3), "imagenet")
    with pytest.raises(WeightsError, match="contains 1000 classes, the data 2"):
        init(build("classifier"), "imagenet", strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "builder"),
    [
        ("retinanet", {"anchors": "torchvision"}, torchvision.models.detection.retinanet_resnet50_fpn),
        ("maskrcnn_resnet50", {}, torchvision.models.detection.maskrcnn_resnet50_fpn),
    ],
)
def test_coco(name, arguments, builder, downloads, tmp_path):
    """torchvision's file; a class of COCO is loaded by its name."""
    source = builder(weights=None, weights_backbone=None).state_dict()
    torch.save(source, tmp_path / "coco.pth")
    downloads[f"{name.removesuffix('_resnet50')}_resnet50_fpn_coco"] = tmp_path / "coco.pth"
    net = models.build(name, 1, **arguments)
    net.classes = ["person"]
    count, classes = len(net.state_dict()), 91 if name == "retinanet" else 90
    line = f"published weights of {name}: {count} of {count} tensors loaded, 1 of its {classes} classes by name"
    assert init(net, "coco") == init(net, "auto") == init(net, "coco", strict=True) == [line]
    if name == "retinanet":
        head = source["head.classification_head.cls_logits.bias"].view(9, 91)[:, 1]
        torch.testing.assert_close(net.head["classification_head"].cls_logits.bias, head, rtol=0, atol=0)
    else:  # background, and person, COCO's id 1
        head = source["roi_heads.box_predictor.cls_score.weight"][:2]
        torch.testing.assert_close(net.roi_heads.box_predictor.cls_score.weight, head, rtol=0, atol=0)


def test_coco_weights_that_do_not_exist(downloads):
    for family, line in (
        ("ssd", "there are no COCO weights of mb1-ssd-lite"),
        ("centerfusion", "there are no COCO weights of centerfusion_resnet18"),
        ("classifier", "there are no COCO weights of resnet18"),
        ("maskrcnn", "there are no COCO weights of maskrcnn_resnet18, only of maskrcnn_resnet50"),
        ("retinanet", "the only one to download: --arch retinanet_resnet50 --anchors torchvision"),
    ):
        with pytest.raises(WeightsError, match=line):
            init(build(family), "coco")
