"""RetinaNet against yhenon's golden outputs and torchvision's own detector, and its anchors and their order."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import models
from models import pretrained, retinanet
from ops.nms import retinanet_detections
from tests import golden
from tests.model_helpers import (
    assert_compiles_in_one_graph,
    assert_each_parameter_in_one_group,
    assert_stages_are_the_backbone,
    freeze_norms,
    padded_batch,
    randomize_detector,
)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def golden_net(name):
    case = golden.case("retinanet", name)
    state = golden.state_dict(case)
    net = pretrained.load({f"module.{key}": value * case["scale"].get(key, 1) for key, value in state.items()})
    return net, case


def test_golden():
    """yhenon's RetinaNet-18: probabilities, offsets and anchors, in the memory format of training."""
    net, case = golden_net("retinanet-18-3")
    images = golden.images(case).contiguous(memory_format=torch.channels_last)
    net.to(memory_format=torch.channels_last)
    assert (net.arguments["depth"], net.num_classes, net.classes) == (18, 3, None)
    with torch.no_grad():
        outputs = net(images)
    assert list(outputs["logits"].shape) == case["shapes"]["probability"]
    assert golden.worst_difference(outputs["logits"].sigmoid(), case["probability"]) < 1e-4
    assert golden.worst_difference(outputs["offsets"], case["regression"]) < 1e-4
    assert golden.worst_difference(net.anchors((256, 320)), case["anchors"]) < 1e-4


@pytest.mark.slow
def test_golden_50_loads_strictly():
    net, _ = golden_net("retinanet-50-80")
    assert net.arguments == {"depth": 50, "anchors": "yhenon", "anchor_scale": 4.0}
    assert (net.min_side, net.max_side, net.box_weights) == (608, 1024, (10, 10, 5, 5))
    assert (net.classes[0], net.classes[79]) == ("person", "toothbrush")


def torchvision_net(num_classes):
    """torchvision's detector with random weights, which does not resize images of 128 to 160 pixels."""
    net = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=num_classes, min_size=128, max_size=160
    )
    randomize_detector(net)
    nn.init.normal_(net.head.classification_head.cls_logits.weight, std=0.1)
    nn.init.constant_(net.head.classification_head.cls_logits.bias, -8)
    nn.init.normal_(net.head.regression_head.bbox_reg.weight, std=0.005)
    return net.eval()


def with_old_names(state):
    """The names of torchvision's published file: no Conv2dNormActivation around the layers of pyramid and heads."""
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if name.startswith("head") and "conv" in parts:
            parts[3:5] = [str(2 * int(parts[3]))]
        elif "blocks" in name and "extra" not in name:
            del parts[4]
        renamed[".".join(parts)] = value
    return renamed


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_detections_are_torchvisions(old):
    torchvisions = torchvision_net(11)
    if old:
        freeze_norms(torchvisions)
    state = torchvisions.state_dict()
    net = pretrained.load(with_old_names(state) if old else state)
    assert (net.min_side, net.max_side, net.box_weights) == (800, 1333, (1, 1, 1, 1))
    shapes, size = [(128, 160), (140, 128)], (160, 160)
    images = [torch.randint(0, 256, (3, *shape)).float() for shape in shapes]
    with torch.no_grad():
        expected = torchvisions([image / 255 for image in images])
        outputs = net(padded_batch(images, net, size))
    detections = retinanet_detections(
        outputs, net.anchors(size), net.box_weights, shapes, net.level_sizes(size), max_detections=300
    )
    for ours, theirs in zip(detections, expected, strict=True):
        assert 100 < len(theirs["scores"]) < 300 and theirs["scores"].max() > 0.15
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=0.01)
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=0, atol=1e-4)
        assert ours["labels"].tolist() == theirs["labels"].tolist()


def test_names_are_torchvisions():
    with torch.device("meta"):
        other = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7)
        net = models.build("retinanet", 7, anchors="torchvision")
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert list(net.state_dict()) == list(other.state_dict())


@pytest.mark.parametrize("size", [(128, 160), (608, 1024), (800, 1344), (100, 130)])
def test_anchors_are_torchvisions(size):
    with torch.device("meta"):
        other = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7)
    net = models.build("retinanet", 1, depth=18, anchors="torchvision")
    maps = [torch.zeros(1, 1, *map_size) for map_size in net.map_sizes(size)]
    expected = other.anchor_generator(ImageList(torch.zeros(1, 3, *size), [size]), maps)[0]
    torch.testing.assert_close(net.anchors(size), expected, rtol=0, atol=0)


def test_anchor_values_and_scale():
    """At the centers of cells; the area depends on the scale, not on the ratio, which is height / width."""
    net = models.build("retinanet", 1, depth=18, anchor_scale=2.0)
    anchors = box_convert(net.anchors((64, 96)), "xyxy", "cxcywh")
    first, last = anchors[: retinanet.SHAPES], anchors[-1]
    torch.testing.assert_close(first[:, :2], torch.full((9, 2), 4.0))
    areas = torch.tensor([16.0, 16 * 2 ** (1 / 3), 16 * 2 ** (2 / 3)]).square().repeat(3)
    torch.testing.assert_close(first[:, 2] * first[:, 3], areas)
    torch.testing.assert_close(first[:, 3] / first[:, 2], torch.tensor([0.5, 1, 2]).repeat_interleave(3))
    torch.testing.assert_close(last[:2], torch.tensor([64.0, 64.0]))
    assert net.level_sizes((64, 96)) == [9 * cells for cells in (8 * 12, 4 * 6, 2 * 3, 1 * 2, 1 * 1)]


def test_anchors_are_cached_for_the_most_recently_used_sizes():
    net = models.build("retinanet", 1, depth=18)
    with torch.inference_mode():
        first = net.anchors(torch.Size((64, 64)))
    assert not first.is_inference()
    for side in range(32, 32 * retinanet.CACHED_SIZES, 32):
        net.anchors((side, 32))
        assert net.anchors((64, 64)) is first
    for side in range(32, 32 * (retinanet.CACHED_SIZES + 1), 32):
        net.anchors((side, 64 + 32))
    assert net.anchors((64, 64)) is not first
    assert len(net._anchors) == retinanet.CACHED_SIZES


def test_outputs_are_in_the_order_of_the_anchors():
    """Level, row, column, shape: tested with a head that outputs its own position."""
    head = retinanet.Head("last", 2, bias=0)
    head.conv, head.last = nn.Identity(), nn.Identity()
    levels = []
    for level, (height, width) in enumerate([(4, 6), (2, 3)]):
        shape, row, column = torch.meshgrid(torch.arange(9), torch.arange(height), torch.arange(width), indexing="ij")
        position = level * 1000 + row * 100 + column * 10 + shape
        both = torch.stack([position, -position], 1).flatten(0, 1)[None]  # [1,S*2,h,w]
        levels.append(both.float().contiguous(memory_format=torch.channels_last))
    expected = [
        level * 1000 + row * 100 + column * 10 + shape
        for level, (height, width) in enumerate([(4, 6), (2, 3)])
        for row in range(height)
        for column in range(width)
        for shape in range(9)
    ]
    expected = torch.tensor(expected).float()
    torch.testing.assert_close(head(levels), torch.stack([expected, -expected], 1)[None])


@pytest.mark.parametrize("size", [(96, 64), (75, 101), (32, 32)])
def test_any_size_goes_through(size):
    net = models.build("retinanet", 3, depth=18).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        outputs = net(torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last))
    count = len(net.anchors(size))
    assert outputs["logits"].shape == (2, count, 3) and outputs["offsets"].shape == (2, count, 4)
    assert sum(net.level_sizes(size)) == count


def test_new_network_trains():
    """Initial scores are the prior, and every parameter gets a finite gradient."""
    net = models.build("retinanet", 3, depth=18)
    outputs = net(torch.randn(2, 3, 96, 96))
    torch.testing.assert_close(outputs["logits"].sigmoid().mean().item(), 0.01, rtol=0.05, atol=0)
    (outputs["logits"].square().mean() + outputs["offsets"].square().mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert_each_parameter_in_one_group(net, ["backbone", "heads"])
    assert_stages_are_the_backbone(net)


@pytest.mark.parametrize("p6_from_c5", [True, False])
def test_pyramid_is_torchvisions(p6_from_c5):
    maps = [torch.randn(1, channels, 16 // stride, 24 // stride) for channels, stride in ((8, 1), (16, 2), (32, 4))]
    pyramid = retinanet.FeaturePyramid((8, 16, 32), p6_from_c5)
    last_levels = LastLevelP6P7(32 if p6_from_c5 else retinanet.WIDTH, retinanet.WIDTH)
    expected = FeaturePyramidNetwork([8, 16, 32], retinanet.WIDTH, last_levels)
    expected.load_state_dict(pyramid.state_dict())
    levels = list(expected({str(i): x for i, x in enumerate(maps)}).values())
    torch.testing.assert_close(pyramid(maps), levels, rtol=0, atol=0)


def test_memory_stays_channels_last():
    """No map is copied into another memory format on its way to the outputs."""
    net = models.build("retinanet", 3, depth=18).eval().to(memory_format=torch.channels_last)
    outputs = {}

    def keep(name):
        return lambda module, inputs, output: outputs.update({name: output})

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Sequential) and "downsample" not in name:
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        net(torch.randn(2, 3, 128, 128).contiguous(memory_format=torch.channels_last))
    assert len(outputs) > 30
    for name, output in outputs.items():
        assert output.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.slow
def test_compiles_in_one_graph():
    assert_compiles_in_one_graph(models.build("retinanet", 2, depth=18).eval(), torch.randn(1, 3, 64, 64))
