"""Classifiers against torchvision's own, DLA-34 against the published names, and how their weights come in."""

import json

import pytest
import torch
import torchvision

import models
from models import WeightsError, backbones, dla, published, published_backbones, resnet

NAMES = tuple(backbones.NETWORKS)
OF_TORCHVISION = [name for name in NAMES if hasattr(torchvision.models, name)]


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def checkpoint(net, **more):
    """What train_backbone.py writes as backbone.pt, as far as it is read."""
    return {
        "format_version": 1,
        "architecture": net.name,
        "arguments": net.arguments,
        "num_classes": net.num_classes,
        "classes": [f"thing {i}" for i in range(net.num_classes)],
        "image_mean": net.image_mean,
        "image_std": net.image_std,
        "image_size": (64, 96),
        "model": net.state_dict(),
        **more,
    }


def assert_same_state(actual, expected):
    torch.testing.assert_close(dict(actual.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_names_are_torchvisions(name):
    with torch.device("meta"):
        net, other = models.build(name, 7), getattr(torchvision.models, name)(weights=None, num_classes=7)
    assert [(k, v.shape) for k, v in net.state_dict().items()] == [(k, v.shape) for k, v in other.state_dict().items()]
    assert (net.name, net.num_classes, net.image_mean) == (name, 7, (123.675, 116.28, 103.53))


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("training", [False, True])
def test_resnet_is_torchvisions(depth, training):
    net = models.build(f"resnet{depth}", 5).train(training)
    for name, values in net.state_dict().items():
        if "running_var" in name:
            values.uniform_(0.5, 1.5)
        elif "running_mean" in name or (values.ndim == 1 and name.endswith("bias")):
            values.normal_(std=0.1)
    other = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=5).train(training)
    other.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, 64, 96)
    actual, expected = net(images), other(images)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    assert_same_state(net, other)
    assert [x.shape[1] for x in net.maps(images)] == list(net.channels)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("vgg16", "vgg16_bn", "resnet101", "resnet152")]
)
def test_fresh_network_trains(name):
    """Every parameter that learns gets a finite gradient, and first logits are of moderate size."""
    net = models.build(name, 3)
    logits = net(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 3)
    assert 1e-4 < logits.std() < 10
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    for parameter_name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), parameter_name
    assert sum(parameter.grad.abs().sum() for parameter in net.parameters() if parameter.requires_grad) > 0


def test_dla34_has_the_published_names(shared):
    """The body under CenterFusion, name for name; 15.7 million parameters with ImageNet's classes."""
    case = json.loads((shared / "upstream" / "centerfusion.json").read_text())
    expected = {k.removeprefix("base."): s for k, s in case["state_dict"].items() if k.startswith("base.")}
    assert {name: list(value.shape) for name, value in dla.DLA34().state_dict().items()} == expected
    assert sum(p.numel() for p in models.build("dla34", 1000).parameters()) == 15783832


@pytest.mark.parametrize("size", [(64, 96), (50, 75)])
def test_dla34_levels(size):
    with torch.no_grad():
        levels = dla.DLA34().maps(torch.randn(1, 3, *size))
    for i, (level, channels) in enumerate(zip(levels, dla.CHANNELS, strict=True)):
        assert level.shape == (1, channels, *(-(-side // 2**i) for side in size))


def test_dla34_folds_fixed_norms():
    """Evaluation gives what a batch norm by itself gives."""
    net = dla.DLA34().double()
    for name, values in net.state_dict().items():
        if "running_var" in name:
            values.uniform_(0.5, 1.5)
        elif "running_mean" in name:
            values.normal_(std=0.1)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    folded = net.eval().maps(images)[-1]
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.training, module.momentum = True, 0.0
            module.forward = lambda x, m=module: torch.nn.functional.batch_norm(
                x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps
            )
    torch.testing.assert_close(net.maps(images)[-1], folded)


def test_width_mult_is_an_argument():
    net = models.build("mobilenet_v2", 3, width_mult=0.5)
    assert net.arguments == {"width_mult": 0.5}
    assert net.features[0][0].out_channels == 16
    with pytest.raises(WeightsError, match="width_mult 9: must lie between"):
        models.build("mobilenet_v2", 3, width_mult=9)
    with pytest.raises(WeightsError, match="resnet18 takes no 'width_mult'; it takes no argument"):
        models.build("resnet18", 3, width_mult=0.5)


def test_load_gives_the_network_of_a_checkpoint(tmp_path):
    net = models.build("mobilenet_v2", 4, width_mult=0.35)
    torch.save(checkpoint(net), tmp_path / "backbone.pt")
    again = models.load(tmp_path / "backbone.pt")
    assert not again.training
    assert (again.arguments, again.image_size, len(again.classes)) == ({"width_mult": 0.35}, (64, 96), 4)
    assert_same_state(again, net)


@pytest.mark.parametrize(
    ("detector", "name", "line"),
    [
        ("mb1-ssd", "mobilenet_v1", "162 of 162 tensors"),
        ("mb2-ssd-lite", "mobilenet_v2", "312 of 312 tensors"),
        ("sq-ssd-lite", "squeezenet1_1", "50 of 50 tensors"),
    ],
)
def test_ssd_starts_from_our_backbone(detector, name, line, tmp_path):
    """Every tensor arrives, the first layer for the pixels that SSD sees."""
    source, net = models.build(name, 5), models.build(detector, 2)
    torch.save(checkpoint(source), tmp_path / "backbone.pt")
    assert published.load_base_net(net, tmp_path / "backbone.pt") == line
    given = [v for k, v in source.state_dict().items() if not k.startswith(("fc.", "classifier."))]
    for actual, expected in list(zip(net.base_net.state_dict().values(), given, strict=True))[6:]:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    first, scale = (
        next(iter(net.base_net.state_dict().values())),
        torch.tensor([128 / 58.395, 128 / 57.12, 128 / 57.375]),
    )
    torch.testing.assert_close(first, given[0] * scale.view(3, 1, 1))


def test_detector_starts_from_any_file_of_its_family(tmp_path):
    source, body = models.build("resnet18", 5), resnet.body(18)
    torch.save(checkpoint(source), tmp_path / "backbone.pt")
    detector = {f"backbone.body.{name}": value for name, value in source.state_dict().items()}
    without_counters = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    for given in (tmp_path / "backbone.pt", detector, without_counters):
        body = resnet.body(18)
        assert published.load_backbone(body, "resnet18", given, "retinanet-18") == "120 of 120 tensors"
        for name, value in body.state_dict().items():
            torch.testing.assert_close(value, source.state_dict()[name], rtol=0, atol=0)
    level = dla.DLA34()
    given = {f"module.base.{name}": value for name, value in dla.DLA34().state_dict().items()}
    assert published.load_backbone(level, "dla34", given, "centerfusion") == "234 of 234 tensors"


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_known_by_its_names(name):
    with torch.device("meta"):
        state = models.build(name, 5).state_dict()
    families = published_backbones.FAMILIES
    assert published_backbones.family_of(published_backbones.bare_names(state), families, "x") == name


def test_wrong_family_names_both(tmp_path):
    torch.save(checkpoint(models.build("resnet18", 5)), tmp_path / "x.pt")
    line = "x.pt: holds a resnet18, but retinanet-50 stands on resnet50; give a resnet50 file"
    with pytest.raises(WeightsError, match=line):
        published.load_backbone(torch.nn.Identity(), "resnet50", tmp_path / "x.pt", "retinanet-50")
    wide = {**models.build("resnet18", 5).state_dict(), "layer4.1.conv2.weight": torch.zeros(512, 512, 1, 1)}
    with pytest.raises(WeightsError, match=r"layer4.1.conv2.weight is \[512, 512, 1, 1\], retinanet-18 needs"):
        published.load_backbone(resnet.body(18), "resnet18", wide, "retinanet-18")


def test_begin_from_a_file(tmp_path):
    source, said = models.build("resnet18", 5), []
    torch.save(checkpoint(source), tmp_path / "x.pt")
    net = models.build("resnet18", 5)
    published.begin_backbone(net, False, str(tmp_path / "x.pt"), say=said.append)
    assert_same_state(net, source)
    other = models.build("resnet18", 3)
    head = other.fc.weight.clone()
    published.begin_backbone(other, False, str(tmp_path / "x.pt"), say=said.append)
    torch.testing.assert_close(other.fc.weight, head, rtol=0, atol=0)
    torch.testing.assert_close(other.layer4[1].conv2.weight, source.layer4[1].conv2.weight, rtol=0, atol=0)
    assert said[0].endswith("x.pt: 122 of 122 tensors loaded")
    assert said[1].endswith("checkpoint 5 classes, data 3: head re-initialised, 120 of 122 tensors loaded")
    with pytest.raises(WeightsError, match=r"x.pt: holds a resnet18, but this run stands on dla34"):
        published.begin_backbone(models.build("dla34", 5), False, str(tmp_path / "x.pt"))
    with pytest.raises(WeightsError, match="give one of them"):
        published.begin_backbone(net, True, "x.pt")


def test_the_last_layer_is_taken_by_name(tmp_path):
    """Classes in another order or fewer of them keep their rows; others start afresh, and --eval-only refuses both."""
    source, said, file = models.build("resnet18", 3), [], str(tmp_path / "x.pt")
    torch.save(checkpoint(source, classes=["ant", "bee", "cow"]), file)
    for names, rows, line in (
        (["cow", "ant", "bee"], [2, 0, 1], "122 of 122 tensors loaded, 3 of its 3 classes by name"),
        (["bee", "ant"], [1, 0], "122 of 122 tensors loaded, 2 of its 3 classes by name"),
        (["ant", "bee", "dog"], None, "checkpoint 3 classes of other names, data 3: head re-initialised, 120 of 122"),
        (["ant", "bee", "dog", "cow"], None, "checkpoint 3 classes, data 4: head re-initialised, 120 of 122"),
    ):
        net = models.build("resnet18", len(names))
        net.classes, fresh = names, net.fc.weight.clone()
        with pytest.raises(WeightsError) as caught:
            published.begin_backbone(net, False, file, exact=True)
        assert "(ant, bee, cow)" in str(caught.value) and f"({', '.join(names)})" in str(caught.value)
        published.begin_backbone(net, False, file, say=said.append)
        assert line in said[-1]
        expected = source.fc.weight[rows] if rows else fresh
        torch.testing.assert_close(net.fc.weight, expected, rtol=0, atol=0)
    net = models.build("resnet18", 3)
    net.classes = ["ant", "bee", "cow"]
    published.begin_backbone(net, False, file, say=said.append, exact=True)
    assert said[-1].endswith("122 of 122 tensors loaded")
    torch.save(source.state_dict(), file)  # of unknown names
    with pytest.raises(WeightsError, match="holds 3 classes, the data 5"):
        published.begin_backbone(models.build("resnet18", 5), False, file, exact=True)


def test_begin_pretrained(tmp_path, monkeypatch):
    """torchvision's file where it lies already; clear errors where there is none and where it has none."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source, said = torchvision.models.resnet18(weights=None), []
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(source.state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    net = models.build("resnet18", 3)
    published.begin_backbone(net, True, "", say=said.append)
    assert said == ["ImageNet weights: checkpoint 1000 classes, data 3: head re-initialised, 120 of 122 tensors loaded"]
    torch.testing.assert_close(net.conv1.weight, source.conv1.weight, rtol=0, atol=0)

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    published.begin_backbone(models.build("resnet34", 3), True, "", fetch=False)
    with pytest.raises(
        WeightsError, match=r"--pretrained: cannot fetch https://.*resnet34.* \(no network\); put it at"
    ):
        published.begin_backbone(models.build("resnet34", 3), True, "")
    with pytest.raises(WeightsError, match="torchvision has no weights of mobilenet_v1, or name a file with --weights"):
        published.begin_backbone(models.build("mobilenet_v1", 3), True, "")
