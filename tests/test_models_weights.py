"""Every way weights come in: checkpoints, published SSD files, base nets, and what is refused."""

import copy
import urllib.error

import pytest
import torch
import torchvision

import models
from models import WeightsError, published, published_backbones, published_ssd


@pytest.fixture(scope="module", autouse=True)
def _one_seed():
    torch.manual_seed(0)


def checkpoint(net, **more):
    """What a training run writes, as far as models.load reads it."""
    return {
        "format_version": 1,
        "architecture": net.name,
        "arguments": net.arguments,
        "num_classes": net.num_classes,
        "classes": [f"thing {i}" for i in range(net.num_classes)],
        "image_size": [256, 320],
        "model": net.state_dict(),
        "ema": {},
        **more,
    }


def assert_same_state(actual, expected):
    torch.testing.assert_close(dict(actual.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_load_gives_the_network_of_a_checkpoint(tmp_path, capsys):
    sizes = [[20 * i + 20, 20 * i + 40] for i in range(6)]
    net = models.build("mb2-ssd-lite", 2, width_mult=0.5, box_sizes=sizes).eval()
    torch.save(checkpoint(net), tmp_path / "last.pt")
    again = models.load(tmp_path / "last.pt")
    assert not again.training
    assert again.arguments == net.arguments
    assert again.classes == ["thing 0", "thing 1"]
    assert again.image_size == (256, 320)
    assert_same_state(again, net)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(again(images), net(images), rtol=0, atol=0)
    assert capsys.readouterr().out == ""


def test_load_prefers_averaged_weights(tmp_path, capsys):
    net = models.build("mb1-ssd-lite", 2)
    averaged = copy.deepcopy(net)
    for parameter in averaged.parameters():
        parameter.data += 1
    torch.save(checkpoint(net, ema={"model": averaged.state_dict(), "updates": 3}), tmp_path / "last.pt")
    assert_same_state(models.load(tmp_path / "last.pt"), averaged)
    assert "averaged weights" in capsys.readouterr().out


def test_load_takes_a_published_file(tmp_path):
    net = models.build("mb1-ssd", 5)
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    again = models.load(tmp_path / "bare.pth")
    assert again.classes is None
    assert again.num_classes == 5
    assert_same_state(again, net)


def test_bad_files_are_named(tmp_path):
    net = models.build("mb1-ssd-lite", 2)
    path = tmp_path / "x.pt"
    with pytest.raises(WeightsError, match=r"x.pt: no such file"):
        models.load(path)
    path.write_text("no weights")
    with pytest.raises(WeightsError, match=r"x.pt: damaged"):
        models.load(path)
    torch.save(net, path)
    with pytest.raises(WeightsError, match=r"x.pt: .* would run code"):
        published.load(path)
    torch.save(checkpoint(net), path)
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(WeightsError, match=r"x.pt: damaged"):
        models.load(path)
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match="holds a list"):
        models.load(path)
    torch.save({"architecture": "mb1-ssd", "model": {}}, path)
    with pytest.raises(WeightsError, match="not a whole checkpoint, it lacks format_version"):
        models.load(path)
    torch.save(checkpoint(net, format_version=99), path)
    with pytest.raises(WeightsError, match="version 99 is newer"):
        models.load(path)


def test_published_load_is_strict():
    with pytest.raises(
        WeightsError, match=r"unknown weights \(first keys: conv1.weight, fc.bias\); known families: vgg16"
    ):
        published.load({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)})
    state = models.build("mb1-ssd", 2).state_dict()
    with pytest.raises(WeightsError, match=r"1 tensors do not fit mb1-ssd, the first: more is unknown"):
        published.load({**state, "more": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"extras.0.0.bias is missing"):
        published.load({k: v for k, v in state.items() if k != "extras.0.0.bias"})
    with pytest.raises(WeightsError, match=r"extras.0.0.bias is \[3\], not \[256\]"):
        published.load({**state, "extras.0.0.bias": torch.zeros(3)})


def test_old_files_lack_step_counters():
    net = models.build("mb1-ssd", 2)
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert_same_state(published.load(state), net)


def features_of(name):
    """torchvision's network with random features and a classifier of zeros that takes no memory."""
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


def imagenet(pixels):
    return (pixels / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)


def normalised(pixels, net):
    mean, std = torch.tensor(net.image_mean), torch.tensor(net.image_std)
    return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@pytest.mark.parametrize(
    ("name", "source", "layers", "line"),
    [
        ("mb2-ssd-lite", "mobilenet_v2", 2, "312 of 312 tensors"),
        ("vgg16-ssd", "vgg16", 9, "30 of 30 tensors"),
        ("sq-ssd-lite", "squeezenet1_1", 5, "50 of 50 tensors"),
    ],
)
def test_base_net_from_torchvision(name, source, layers, line):
    """The same pixels, each normalised in its own way, give the same features away from the padded border."""
    net, other = models.build(name, 2).eval(), features_of(source)
    assert published.load_base_net(net, other.state_dict()) == line
    pixels = torch.full((1, 3, 128, 128), 40.0) + 120 * torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        actual = net.base_net[:layers](normalised(pixels, net))
        expected = other.features[:layers](imagenet(pixels))
    margin = slice(8, -8) if name != "sq-ssd-lite" else slice(2, -2)
    torch.testing.assert_close(actual[..., margin, margin], expected[..., margin, margin], rtol=1e-3, atol=1e-4)


def test_every_torchvision_tensor_arrives():
    """Names beyond the first layers: the deepest tensors of MobileNet v2 and VGG's decimated classifier."""
    net, other = models.build("mb2-ssd-lite", 2), features_of("mobilenet_v2")
    published.load_base_net(net, other.state_dict())
    ours = list(net.base_net.state_dict().values())
    theirs = list(other.features.state_dict().values())
    for a, b in list(zip(ours, theirs, strict=True))[6:]:  # the first convolution and its batch norm are adapted
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_vgg_classifier_is_decimated():
    net = models.build("vgg16-ssd", 2)
    state = {f"features.{k}": v for k, v in net.base_net.state_dict().items() if int(k.split(".")[0]) < 30}
    kept = net.base_net[33].weight.clone()
    assert published.load_base_net(net, state) == "26 of 30 tensors; fc6 and fc7 stay fresh"
    torch.testing.assert_close(net.base_net[33].weight, kept, rtol=0, atol=0)
    small = torch.arange(4096.0)
    fc6 = small[:, None].expand(4096, 25088)
    classifier = {"0.weight": fc6, "0.bias": small, "3.weight": small[:, None] + small / 4096, "3.bias": small}
    reduced = published_backbones.vgg_decimated({f"classifier.{k}": v for k, v in classifier.items()})
    assert reduced["31.weight"].shape == net.base_net[31].weight.shape
    assert reduced["33.weight"].shape == net.base_net[33].weight.shape
    torch.testing.assert_close(reduced["31.weight"][:, 0, 0, 0], reduced["31.bias"])
    torch.testing.assert_close(reduced["33.weight"][2, 3, 0, 0], torch.tensor(8 + 12 / 4096))


def test_base_net_from_our_kin(tmp_path):
    source = models.build("mb1-ssd", 7)
    base = source.base_net.state_dict()
    torch.save(checkpoint(source), tmp_path / "last.pt")
    for given in (base, source.state_dict(), {f"module.{k}": v for k, v in base.items()}, tmp_path / "last.pt"):
        net = models.build("mb1-ssd-lite", 2)
        assert published.load_base_net(net, given) == "162 of 162 tensors"
        assert_same_state(net.base_net, source.base_net)


def test_base_net_of_another_family():
    net = models.build("mb1-ssd", 2)
    with pytest.raises(WeightsError, match="holds a mobilenet_v2, but mb1-ssd stands on mobilenet_v1"):
        published.load_base_net(net, features_of("mobilenet_v2").state_dict())
    for other in ("resnet18", "vgg16_bn"):
        with pytest.raises(WeightsError, match=f"holds a {other}, but mb1-ssd stands on mobilenet_v1"):
            published.load_base_net(net, features_of(other).state_dict())
    with pytest.raises(WeightsError, match="holds a dla34, but mb1-ssd"):
        published.load_base_net(net, models.build("dla34", 2).state_dict())
    with pytest.raises(WeightsError, match=r"0.0.weight is \[16, 3, 3, 3\], mb2-ssd-lite needs \[32, 3, 3, 3\]"):
        published.load_base_net(
            models.build("mb2-ssd-lite", 2), models.build("mb2-ssd-lite", 2, width_mult=0.5).state_dict()
        )


@pytest.mark.parametrize("width_mult", [0.5, 1.4, 2.0])
def test_widths_of_a_base_net(width_mult):
    """Only at whole numbers are a backbone's channels, rounded to 8, those of the detector, which are cut off."""
    state = models.build("mobilenet_v2", 3, width_mult=width_mult).state_dict()
    net = models.build("mb2-ssd-lite", 2, width_mult=width_mult)
    if width_mult == 2:
        assert published.load_base_net(net, state) == "312 of 312 tensors"
        return
    with pytest.raises(WeightsError, match="--width-mult there and --mb2-width-mult here the same whole number"):
        published.load_base_net(net, state)


def test_load_matching_leaves_the_head_of_other_classes():
    source, net = models.build("mb1-ssd", 20), models.build("mb1-ssd", 5)
    head = net.classification_headers[0].weight.clone()
    taken, total, skipped = published.load_matching(net, source.state_dict())
    assert (taken, total, len(skipped)) == (190, 202, 12)
    assert all(name.startswith("classification_headers.") for name in skipped)
    torch.testing.assert_close(net.classification_headers[0].weight, head, rtol=0, atol=0)
    torch.testing.assert_close(net.regression_headers[0].weight, source.regression_headers[0].weight, rtol=0, atol=0)


def test_fine_tune_says_what_it_took():
    source, net = models.build("mb1-ssd", 20), models.build("mb1-ssd", 5)
    line = "checkpoint 21 classes, data 6 (with background): head re-initialised, 190 of 202 tensors loaded"
    assert published.fine_tune(net, checkpoint(source)) == line
    assert published.fine_tune(net, net.state_dict()) == "202 of 202 tensors loaded"
    lite = models.build("mb1-ssd-lite", 20)
    assert published.fine_tune(lite, source.state_dict()).startswith("172 of 230 tensors loaded, the rest is fresh")
    with pytest.raises(WeightsError, match=r"state dict: only .* of 478 tensors fit mb2-ssd-lite"):
        published.fine_tune(models.build("mb2-ssd-lite", 20), source.state_dict())


def test_download(tmp_path, monkeypatch, capsys):
    def refuse(url, path, digest, progress):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    assert published.download("mb1-ssd", tmp_path / "models") is None
    said = capsys.readouterr().out
    for part in (published_ssd.URLS["mb1-ssd"], str(tmp_path / "models"), "--pretrained-ssd"):
        assert part in said
    assert published.download("sq-ssd-lite", tmp_path) is None
    (tmp_path / "mobilenet-v1-ssd-mp-0_675.pth").touch()
    assert published.download("mb1-ssd", tmp_path).name == "mobilenet-v1-ssd-mp-0_675.pth"
