"""The five SSD networks against what the published programs compute."""

import json

import pytest
import torch

import models
from models import WeightsError, layers, published

PRIORS = {"mb1-ssd": 3000, "mb1-ssd-lite": 3000, "mb2-ssd-lite": 3000, "sq-ssd-lite": 2568, "vgg16-ssd": 8732}


@pytest.fixture(scope="module", autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture
def golden(golden, shared):
    golden.cases = json.loads((shared / "upstream" / "ssd.json").read_text())
    return golden


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
