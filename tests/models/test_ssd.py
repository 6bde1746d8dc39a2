"""The five SSD networks against what the published programs compute."""

import itertools
import math

import pytest
import torch

import models
from models import pretrained, ssd
from tests import golden
from tests.model_helpers import (
    assert_compiles_in_one_graph,
    assert_each_parameter_in_one_group,
    assert_same_state,
)
from utils.errors import WeightsError

PRIORS = {"mb1-ssd": 3000, "mb1-ssd-lite": 3000, "mb2-ssd-lite": 3000, "sq-ssd-lite": 2568, "vgg16-ssd": 8732}
NAMES = [*list(PRIORS)[:-1], pytest.param("vgg16-ssd", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    case = golden.case("ssd", name)
    net = pretrained.load(golden.state_dict(case, "module."))
    assert list(net.state_dict()) == list(case["state_dict"])
    assert (net.name, net.num_classes, net.classes[14]) == (name, 20, "person")
    assert net.image_mean == tuple(case["image_mean"])
    assert net.image_std == (case["image_std"],) * 3
    assert golden.worst_difference(net.priors((300, 300)), case["priors"]) < 1e-6
    with torch.no_grad():
        outputs = net(golden.images(case))
    for key, published_key in (("logits", "confidence"), ("offsets", "location")):
        assert list(outputs[key].shape) == case["shapes"][published_key]
        if published_key in case:
            assert golden.worst_difference(outputs[key], case[published_key]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_priors_match_the_outputs_at_any_size(name):
    net = models.build(name, 3).train()
    assert net.priors((300, 300)).shape == (PRIORS[name], 4)
    net.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for size in ((320, 320), (272, 304)):
        with torch.inference_mode():
            priors, anchors = net.priors(size), net.anchors(size)
        with torch.no_grad():
            outputs = net(torch.zeros(1, 3, *size).contiguous(memory_format=torch.channels_last))
        assert outputs["logits"].shape == (1, len(priors), 4)
        assert outputs["offsets"].shape == (1, len(priors), 4)
        assert priors.dtype == anchors.dtype == torch.float32
        assert 0 <= priors.min() <= priors.max() <= 1
        assert not anchors.is_inference()
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
    # In an image of another shape and the area of 300 x 300, squares are the same squares in pixels.
    box = net.anchors((150, 600))[0]
    torch.testing.assert_close(box[2:] - box[:2], torch.tensor([60.0, 60.0]))


def test_priors_are_in_the_order_of_the_outputs():
    """Map, row, column, shape: centers increase along columns first, then rows."""
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
            inside = part[:, axis] < 1  # padded maps extend beyond the image, where centers are clamped
            step = part[0, axis] * 2
            torch.testing.assert_close(part[inside, axis], ((index + 0.5) * step)[inside])
    assert start == len(priors)


def test_box_sizes():
    sizes = [[20, 40], [40, 80], [80, 120], [120, 160], [160, 200], [200, 240]]
    net = models.build("mb1-ssd", 3, box_sizes=sizes)
    assert net.arguments["box_sizes"] == sizes
    torch.testing.assert_close(net.priors((300, 300))[0, 2:] * 300, torch.tensor([20.0, 20.0]))


MOBILE_300 = [(60, 105), (105, 150), (150, 195), (195, 240), (240, 285), (285, 330)]
JETSON_SHARES = [0.10, 0.20, 0.37, 0.54, 0.71, 0.88, 1.05]


def jetson_priors(side, cells, strides, boxes):
    """jetson-inference's priors for images of `side` x `side`; cells, strides and (min, max) in pixels of each map."""
    rows = []
    for count, stride, (low, high) in zip(cells, strides, boxes):
        shapes = [(low, low), (math.sqrt(low * high), math.sqrt(low * high))]
        for ratio in (2, 3):
            wide, narrow = low * math.sqrt(ratio), low / math.sqrt(ratio)
            shapes += [(wide, narrow), (narrow, wide)]
        for y in range(count):
            for x in range(count):
                center = [(x + 0.5) / (side / stride), (y + 0.5) / (side / stride)]
                rows += [[*center, width / side, height / side] for width, height in shapes]
    return torch.tensor(rows, dtype=torch.float64).clamp(0, 1).float()


@pytest.mark.parametrize(
    ("side", "cells", "strides"),
    [
        (300, (19, 10, 5, 3, 2, 1), (16, 32, 64, 100, 150, 300)),
        (512, (32, 16, 8, 4, 2, 1), (16, 32, 64, 128, 256, 512)),
        (640, (40, 20, 10, 5, 3, 2), (16, 32, 64, 128, 214, 320)),
        (400, (25, 13, 7, 4, 2, 1), (16, 31, 58, 100, 200, 400)),  # strides that are not those of 300
    ],
)
def test_jetson_priors(side, cells, strides):
    shares = [(low * side, high * side) for low, high in itertools.pairwise(JETSON_SHARES)]
    expected = jetson_priors(side, cells, strides, MOBILE_300 if side == 300 else shares)
    net = models.build("mb1-ssd", 3, priors="jetson")
    torch.testing.assert_close(net.priors((side, side)), expected, rtol=0, atol=1e-6)
    assert net.arguments["priors"] == "jetson"
    scaled = models.build("mb1-ssd", 3).priors((side, side))
    assert torch.equal(scaled, net.priors((side, side))) == (side == 300)
    if side == 512:  # where the strides of 300 are the same
        sizes = [30, 60, 111, 162, 213, 264, 315]
        net = models.build("mb1-ssd", 3, box_sizes=list(itertools.pairwise(sizes)))
        torch.testing.assert_close(net.priors((side, side)), expected, rtol=0, atol=1e-6)


def test_priors_of_a_run():
    """--priors, else the resumed run's, else jetson-inference's where they differ from the others."""
    saved = {"arguments": {"priors": "jetson"}}
    for arguments, priors in (
        (("mb1-ssd", None, 512, None, None), {"priors": "jetson"}),
        (("mb1-ssd", None, 300, None, None), {"priors": "scaled"}),
        (("mb1-ssd", None, 512, [30, 60], None), {"priors": "scaled"}),
        (("mb1-ssd", "scaled", 512, None, saved), {"priors": "scaled"}),
        (("mb1-ssd", None, 300, None, saved), {"priors": "jetson"}),
        (("mb1-ssd", None, 512, None, {"arguments": {}}), {"priors": "scaled"}),
        (("mb1-ssd", None, 512, [30, 60], saved), {"priors": "scaled"}),
        (("mb2-ssd-lite", None, 512, None, None), {}),
    ):
        assert ssd.choose_priors(*arguments) == priors
    with pytest.raises(WeightsError, match="--priors jetson: vgg16-ssd has no other priors; leave it out"):
        ssd.choose_priors("vgg16-ssd", "jetson", 512, None, None)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(WeightsError, match="vgg16-ssd: an image of 200x200 is too small"):
        models.build("vgg16-ssd", 3).priors((200, 200))


@pytest.mark.parametrize("width_mult", [0.35, 0.5, 1.4])
def test_width_mult(width_mult):
    net = models.build("mb2-ssd-lite", 2, width_mult=width_mult).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 96, 96))["logits"].shape == (1, len(net.priors((96, 96))), 3)
    loaded = pretrained.load(net.state_dict())
    assert loaded.arguments == net.arguments
    assert_same_state(loaded, net)


@pytest.mark.parametrize("name", NAMES)
def test_new_network_trains(name):
    """First outputs are of moderate size, and every parameter gets a finite gradient."""
    net = models.build(name, 3)
    assert_each_parameter_in_one_group(net, ["base_net", "extras", "heads"])
    vgg = name == "vgg16-ssd"  # needs larger images; its pixels are not divided by their deviation
    outputs = net(60 * torch.randn(1, 3, 272, 272) if vgg else 0.5 * torch.randn(2, 3, 128, 128))
    assert 0.01 < outputs["logits"].std() < 10
    assert outputs["offsets"].std() < 2
    (outputs["logits"].square().mean() + outputs["offsets"].square().mean()).backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.slow
def test_compiles_in_one_graph():
    assert_compiles_in_one_graph(models.build("mb2-ssd-lite", 2).eval(), torch.randn(1, 3, 64, 64))
