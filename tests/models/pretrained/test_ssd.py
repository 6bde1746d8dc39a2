"""SSD from published files and from backbones, and what is refused."""

import pytest
import torch
import torchvision

import models
from models import pretrained
from models.pretrained import backbones, ssd
from tests.model_helpers import assert_same_state, checkpoint
from utils.errors import WeightsError


@pytest.fixture(scope="module", autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def torchvision_features(name):
    """torchvision's network with random features, and a classifier of zeros without memory of its own."""
    with torch.device("meta"):
        net = getattr(torchvision.models, name)(weights=None).eval()
    state = {}
    for key, value in net.state_dict().items():
        if key.startswith(("classifier.", "fc.")):
            state[key] = torch.zeros(1).expand(value.shape)
        elif value.ndim > 1:
            state[key] = torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5
        else:
            state[key] = torch.rand(value.shape).add(0.5).to(value.dtype)
    net.load_state_dict(state, assign=True)
    return net


def normalized(pixels, mean, std):
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize(
    ("name", "source", "layers", "line"),
    [
        ("mb2-ssd-lite", "mobilenet_v2", 2, "312 of 312 tensors of the backbone loaded"),
        ("vgg16-ssd", "vgg16", 9, "30 of 30 tensors of the backbone loaded"),
        ("sq-ssd-lite", "squeezenet1_1", 5, "50 of 50 tensors of the backbone loaded"),
    ],
)
def test_backbone_from_torchvision(name, source, layers, line):
    """The same pixels, normalized as each network expects, give the same features except at the padded border."""
    net, theirs = models.build(name, 2).eval(), torchvision_features(source)
    assert ssd.load_backbone(net, theirs.state_dict()) == line
    pixels = 40.0 + 120 * torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        actual = net.base_net[:layers](normalized(pixels, net.image_mean, net.image_std))
        expected = theirs.features[:layers](normalized(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    margin = slice(8, -8) if name != "sq-ssd-lite" else slice(2, -2)
    torch.testing.assert_close(actual[..., margin, margin], expected[..., margin, margin], rtol=1e-3, atol=1e-4)
    deep, deep_expected = (list(n.state_dict().values()) for n in (net.base_net, theirs.features))
    for value, expected in list(zip(deep, deep_expected))[6:]:  # the first convolution and its norm are adapted
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("detector", "name", "count"),
    [("mb1-ssd", "mobilenet_v1", 162), ("mb2-ssd-lite", "mobilenet_v2", 312), ("sq-ssd-lite", "squeezenet1_1", 50)],
)
def test_backbone_from_our_classifier(detector, name, count, tmp_path):
    """Every tensor is loaded, the first layer adapted to SSD's normalization."""
    source, net = models.build(name, 5), models.build(detector, 2)
    torch.save(checkpoint(source), tmp_path / "backbone.pt")
    line = ssd.load_backbone(net, tmp_path / "backbone.pt")
    assert line == f"{count} of {count} tensors of the backbone loaded"
    expected = [v for k, v in source.state_dict().items() if not k.startswith(("fc.", "classifier."))]
    values = list(net.base_net.state_dict().values())
    for value, given in list(zip(values, expected, strict=True))[6:]:
        torch.testing.assert_close(value, given, rtol=0, atol=0)
    scale = torch.tensor([128 / 58.395, 128 / 57.12, 128 / 57.375])
    torch.testing.assert_close(values[0], expected[0] * scale.view(3, 1, 1))


def test_backbone_from_another_ssd(tmp_path):
    source = models.build("mb1-ssd", 7)
    base = source.base_net.state_dict()
    torch.save(checkpoint(source), tmp_path / "last.pt")
    for given in (base, source.state_dict(), {f"module.{k}": v for k, v in base.items()}, tmp_path / "last.pt"):
        net = models.build("mb1-ssd-lite", 2)
        assert ssd.load_backbone(net, given) == "162 of 162 tensors of the backbone loaded"
        assert_same_state(net.base_net, source.base_net)


def test_vgg_classifier_is_subsampled():
    net = models.build("vgg16-ssd", 2)
    state = {f"features.{k}": v for k, v in net.base_net.state_dict().items() if int(k.split(".")[0]) < 30}
    fc7 = net.base_net[33].weight.clone()
    line = ssd.load_backbone(net, state)
    assert line == "26 of 30 tensors of the backbone loaded; fc6 and fc7 keep random weights"
    torch.testing.assert_close(net.base_net[33].weight, fc7, rtol=0, atol=0)
    units = torch.arange(4096.0)
    classifier = {
        "classifier.0.weight": units[:, None].expand(4096, 25088),
        "classifier.0.bias": units,
        "classifier.3.weight": units[:, None] + units / 4096,
        "classifier.3.bias": units,
    }
    subsampled = backbones.subsampled_vgg(classifier)
    assert subsampled["31.weight"].shape == net.base_net[31].weight.shape
    assert subsampled["33.weight"].shape == net.base_net[33].weight.shape
    torch.testing.assert_close(subsampled["31.weight"][:, 0, 0, 0], subsampled["31.bias"])
    torch.testing.assert_close(subsampled["33.weight"][2, 3, 0, 0], torch.tensor(8 + 12 / 4096))


def test_backbones_of_another_family_are_refused():
    net = models.build("mb1-ssd", 2)
    for name in ("mobilenet_v2", "resnet18", "vgg16_bn"):
        with pytest.raises(WeightsError, match=f"contains a {name}, but mb1-ssd needs a mobilenet_v1"):
            ssd.load_backbone(net, torchvision_features(name).state_dict())
    with pytest.raises(WeightsError, match="contains a dla34, but mb1-ssd"):
        ssd.load_backbone(net, models.build("dla34", 2).state_dict())
    narrow = models.build("mb2-ssd-lite", 2, width_mult=0.5).state_dict()
    with pytest.raises(WeightsError, match=r"0.0.weight is \[16, 3, 3, 3\], mb2-ssd-lite needs \[32, 3, 3, 3\]"):
        ssd.load_backbone(models.build("mb2-ssd-lite", 2), narrow)


@pytest.mark.parametrize("width_mult", [0.5, 1.4, 2.0])
def test_widths_of_a_backbone(width_mult):
    """Channels are rounded to 8 in classifiers and truncated in SSD, which is the same only for whole widths."""
    state = models.build("mobilenet_v2", 3, width_mult=width_mult).state_dict()
    net = models.build("mb2-ssd-lite", 2, width_mult=width_mult)
    if width_mult == 2:
        assert ssd.load_backbone(net, state).startswith("312 of 312 tensors")
        return
    with pytest.raises(WeightsError, match="give both the same whole number as --width-mult"):
        ssd.load_backbone(net, state)


def test_published_files_load_strictly():
    with pytest.raises(
        WeightsError, match=r"unknown weights \(first keys: conv1.weight, fc.bias\); known families: vgg16-ssd, "
    ):
        pretrained.load({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)})
    state = models.build("mb1-ssd", 2).state_dict()
    for wrong, line in (
        ({**state, "more": torch.zeros(1)}, "1 tensors do not fit mb1-ssd, the first: more is not in this network"),
        ({k: v for k, v in state.items() if k != "extras.0.0.bias"}, "extras.0.0.bias is missing"),
        ({k: v for k, v in state.items() if k != "regression_headers.5.bias"}, "mb1-ssd without its last heads"),
    ):
        with pytest.raises(WeightsError, match=line):
            pretrained.load(wrong)


def test_fine_tune():
    source, net = models.build("mb1-ssd", 20), models.build("mb1-ssd", 5)
    line = "checkpoint 21 classes, data 6 (with background): head re-initialized, 190 of 202 tensors loaded"
    assert ssd.fine_tune(net, checkpoint(source)) == line
    assert ssd.fine_tune(net, net.state_dict(), strict=True) == "202 of 202 tensors loaded"
    with pytest.raises(WeightsError, match=r"only 190 of 202 .* needs all: checkpoint 21 classes, data 6 .*; give"):
        ssd.fine_tune(net, source.state_dict(), strict=True)
    partial = {name: value for name, value in net.state_dict().items() if name != "extras.0.0.bias"}
    with pytest.raises(WeightsError, match=r"an evaluation needs all: the first is extras\.0\.0\.bias"):
        ssd.fine_tune(net, partial, strict=True)
    lite = models.build("mb1-ssd-lite", 20)
    line = ssd.fine_tune(lite, source.state_dict())
    assert line.startswith("172 of 230 tensors loaded, the rest keeps random weights: ")
    with pytest.raises(WeightsError, match=r"state dict: only .* of 478 tensors fit mb2-ssd-lite"):
        ssd.fine_tune(models.build("mb2-ssd-lite", 20), source.state_dict())


def test_published_file_beside_the_program(tmp_path, monkeypatch):
    """dusty-nv's programs keep published files in models/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mobilenet-v1-ssd-mp-0_675.pth").touch()
    assert ssd.published(models.build("mb1-ssd", 2)).name == "mobilenet-v1-ssd-mp-0_675.pth"
    with pytest.raises(WeightsError, match="there are no published weights of sq-ssd-lite"):
        ssd.published(models.build("sq-ssd-lite", 2))
