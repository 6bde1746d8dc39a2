"""The five SSD networks against what the published programs compute, and every way weights come in."""

import copy
import importlib.util
import json
import urllib.error

import pytest
import torch
import torchvision

import models
from models import WeightsError, layers, published

PRIORS = {"mb1-ssd": 3000, "mb1-ssd-lite": 3000, "mb2-ssd-lite": 3000, "sq-ssd-lite": 2568, "vgg16-ssd": 8732}


@pytest.fixture(scope="module", autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture
def golden(shared):
    spec = importlib.util.spec_from_file_location("golden", shared / "upstream" / "golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.cases = json.loads((shared / "upstream" / "ssd.json").read_text())
    return module


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


@pytest.mark.parametrize("name", PRIORS)
def test_golden(name, golden):
    case = golden.cases[name]
    state = {k: torch.from_numpy(golden.seeded_array(k, s)) for k, s in case["state_dict"].items()}
    net = published.load({f"module.{k}": v for k, v in state.items()})
    assert list(net.state_dict()) == list(case["state_dict"])
    assert net.name == name
    assert net.num_classes == 20
    assert net.classes[14] == "person"
    assert net.image_mean == tuple(case["image_mean"])
    assert net.image_std == (case["image_std"],) * 3
    assert golden.worst_difference(net.priors((300, 300)), case["priors"]) < 1e-6
    with torch.no_grad():
        outputs = net(torch.from_numpy(golden.seeded_input(**case["input"])))
    for key, published_key in (("logits", "confidence"), ("offsets", "location")):
        assert list(outputs[key].shape) == case["shapes"][published_key]
        if published_key in case:
            assert golden.worst_difference(outputs[key], case[published_key]) < 1e-4


@pytest.mark.parametrize("name", PRIORS)
def test_priors_fit_the_outputs_at_any_size(name):
    net = models.build(name, 3).train()
    assert net.priors((300, 300)).shape == (PRIORS[name], 4)
    net.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for size in ((512, 512), (288, 416)):
        with torch.inference_mode():
            priors, anchors = net.priors(size), net.anchors(size)
        with torch.no_grad():
            outputs = net(torch.zeros(1, 3, *size).contiguous(memory_format=torch.channels_last))
        assert outputs["logits"].shape == (1, len(priors), 4)
        assert outputs["offsets"].shape == (1, len(priors), 4)
        assert priors.dtype == anchors.dtype == torch.float32
        assert not anchors.is_inference()
        assert priors.min() >= 0
        assert priors.max() <= 1
        assert net.anchors(torch.Size(size)) is anchors
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_prior_values():
    net = models.build("mb1-ssd", 3)
    first = torch.tensor([8, 8, 60, 60, 8, 8, 6300**0.5, 6300**0.5, 8, 8, 60 * 2**0.5, 60 / 2**0.5]).view(3, 4) / 300
    torch.testing.assert_close(net.priors((300, 300))[:3], first)
    corners = torch.tensor([8 - 30.0, 8 - 30.0, 8 + 30.0, 8 + 30.0])
    torch.testing.assert_close(net.anchors((300, 300))[0], corners)
    # Twice the size: the same squares relative to the image, on a grid twice as fine.
    torch.testing.assert_close(net.priors((600, 600))[0], torch.tensor([8 / 600, 8 / 600, 0.2, 0.2]))
    # A square is one in pixels also in an image that is none; area as that of 300 x 300.
    box = net.anchors((150, 600))[0]
    torch.testing.assert_close(box[2:] - box[:2], torch.tensor([60.0, 60.0]))


def test_prior_order_is_the_order_of_the_heads():
    """A head that answers with its own position gives the centres of the priors."""
    net = models.build("sq-ssd-lite", 1).eval()
    sizes = net.map_sizes((320, 256))
    rows = [torch.arange(h).repeat_interleave(w * 6) for h, w in sizes]
    columns = [torch.arange(w).repeat_interleave(6).repeat(h) for h, w in sizes]
    priors = net.priors((320, 256))
    start = 0
    for row, column in zip(rows, columns):
        part = priors[start : start + len(row)]
        start += len(row)
        for axis, index in ((0, column), (1, row)):
            inside = part[:, axis] < 1  # padded maps reach over the edge, where centres are clamped
            step = part[0, axis] * 2
            torch.testing.assert_close(part[inside, axis], ((index + 0.5) * step)[inside])
    assert start == len(priors)


def test_box_sizes_are_an_argument():
    sizes = [[20, 40], [40, 80], [80, 120], [120, 160], [160, 200], [200, 240]]
    net = models.build("mb1-ssd", 3, box_sizes=sizes)
    assert net.arguments["box_sizes"] == sizes
    torch.testing.assert_close(net.priors((300, 300))[0, 2:] * 300, torch.tensor([20.0, 20.0]))
    with pytest.raises(WeightsError, match="need 6 pairs"):
        models.build("mb1-ssd", 3, box_sizes=sizes[:5])
    with pytest.raises(WeightsError, match="0 < min <= max"):
        models.build("mb1-ssd", 3, box_sizes=[[40, 20]] * 6)


def test_build_refuses_what_it_does_not_know():
    with pytest.raises(WeightsError, match=r"unknown network 'mb3'; known are mb1-ssd"):
        models.build("mb3", 3)
    with pytest.raises(WeightsError, match="mb1-ssd takes no 'width_mult'"):
        models.build("mb1-ssd", 3, width_mult=0.5)
    with pytest.raises(WeightsError, match="vgg16-ssd: an image of 200x200 is too small"):
        models.build("vgg16-ssd", 3).priors((200, 200))


@pytest.mark.parametrize("width_mult", [0.35, 0.5, 1.4])
def test_width_mult(width_mult):
    net = models.build("mb2-ssd-lite", 2, width_mult=width_mult).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 96, 96))["logits"].shape == (1, len(net.priors((96, 96))), 3)
    again = published.load(net.state_dict())
    assert again.arguments == net.arguments
    assert_same_state(again, net)


@pytest.mark.parametrize("name", PRIORS)
def test_fresh_network_trains(name):
    """Every parameter is in one group and gets a finite gradient; first outputs are of moderate size."""
    net = models.build(name, 3)
    groups = net.parameter_groups()
    assert list(groups) == ["base_net", "extras", "heads"]
    grouped = [id(p) for group in groups.values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters())
    size = 272 if name == "vgg16-ssd" else 128
    images = torch.randn(2, 3, size, size) * (60 if name == "vgg16-ssd" else 0.5)
    outputs = net(images)
    assert 0.01 < outputs["logits"].std() < 10
    assert outputs["offsets"].std() < 2
    (outputs["logits"].square().mean() + outputs["offsets"].square().mean()).backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name


def test_compiles_in_one_graph():
    net = models.build("mb2-ssd-lite", 2).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), net(images))


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
    reduced = published.vgg_decimated({f"classifier.{k}": v for k, v in classifier.items()})
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
    with pytest.raises(WeightsError, match=r"unknown weights \(first keys: conv1.weight, bn1.weight, bn1.bias\)"):
        published.load_base_net(net, features_of("resnet18").state_dict())
    with pytest.raises(WeightsError, match=r"0.0.weight is \[16, 3, 3, 3\], mb2-ssd-lite needs \[32, 3, 3, 3\]"):
        published.load_base_net(
            models.build("mb2-ssd-lite", 2), models.build("mb2-ssd-lite", 2, width_mult=0.5).state_dict()
        )


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
    def refuse(url, path, progress):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    assert published.download("mb1-ssd", tmp_path / "models") is None
    said = capsys.readouterr().out
    for part in (published.URLS["mb1-ssd"], str(tmp_path / "models"), "--pretrained-ssd"):
        assert part in said
    assert published.download("sq-ssd-lite", tmp_path) is None
    (tmp_path / "mobilenet-v1-ssd-mp-0_675.pth").touch()
    assert published.download("mb1-ssd", tmp_path).name == "mobilenet-v1-ssd-mp-0_675.pth"


@pytest.mark.parametrize(("groups", "stride"), [(1, 2), (1, 1), (8, 2)])
@pytest.mark.parametrize("height", [1, 2, 5])
def test_3x3_convolution_on_a_map_one_cell_wide(groups, stride, height):
    """The same values and gradients as torch's own, and the same bits every time under bf16 on a CPU."""
    torch.manual_seed(0)
    convolution = layers.Conv3x3(8, 16, stride, groups=groups)
    x = torch.randn(4, 8, height, 1)

    def gradient(forward, x):
        convolution.zero_grad()
        y = forward(x)
        y.float().square().sum().backward()
        return y.detach(), convolution.weight.grad.clone()

    plain = gradient(lambda x: torch.conv2d(x, convolution.weight, convolution.bias, stride, 1, 1, groups), x)
    torch.testing.assert_close(gradient(convolution, x), plain)
    with torch.autocast("cpu", torch.bfloat16):
        first = gradient(convolution, x)
        for _ in range(5):
            junk = [torch.full((4096,), float("nan"), dtype=torch.bfloat16) for _ in range(64)]  # for unwritten memory
            del junk
            torch.testing.assert_close(gradient(convolution, x), first, rtol=0, atol=0)
    torch.testing.assert_close(first[1], plain[1], rtol=0.05, atol=0.5)
