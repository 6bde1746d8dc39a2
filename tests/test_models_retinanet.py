"""RetinaNet against yhenon's golden outputs and torchvision's own detector, and its anchors, order and folded norms."""

import json

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.image_list import ImageList

import models
from models import WeightsError, layers, published, resnet, retinanet
from ops.boxes import to_centers
from ops.suppress import from_pyramid


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture
def golden(golden, shared):
    golden.cases = json.loads((shared / "upstream" / "retinanet.json").read_text())
    return golden


def golden_net(golden, name):
    case = golden.cases[name]
    seeded = {k: torch.from_numpy(golden.seeded_array(k, s)) for k, s in case["state_dict"].items()}
    net = published.load({f"module.{k}": v * case["scale"].get(k, 1) for k, v in seeded.items()})
    return net, case


def test_golden(golden):
    """yhenon's RetinaNet-18: probabilities, offsets and anchors, also in the memory format that training uses."""
    net, case = golden_net(golden, "retinanet-18-3")
    images = torch.from_numpy(golden.seeded_input(**case["input"])).contiguous(memory_format=torch.channels_last)
    net.to(memory_format=torch.channels_last)
    assert (net.arguments["depth"], net.num_classes, net.classes) == (18, 3, None)
    with torch.no_grad():
        outputs = net(images)
    assert list(outputs["logits"].shape) == case["shapes"]["probability"]
    assert golden.worst_difference(outputs["logits"].sigmoid(), case["probability"]) < 1e-4
    assert golden.worst_difference(outputs["offsets"], case["regression"]) < 1e-4
    assert golden.worst_difference(net.anchors((256, 320)), case["anchors"]) < 1e-4


def test_golden_50_loads_strictly(golden):
    net, _ = golden_net(golden, "retinanet-50-80")
    assert net.arguments == {"depth": 50, "anchors": "yhenon", "anchor_scale": 4.0}
    assert (net.min_side, net.max_side, net.box_weights) == (608, 1024, (10, 10, 5, 5))
    assert (net.classes[0], net.classes[79]) == ("person", "toothbrush")


def torchvision_net(num_classes):
    """torchvision's detector with random weights of moderate outputs, and pictures that it does not resize."""
    net = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=num_classes, min_size=128, max_size=160
    )
    for name, values in net.state_dict().items():
        if values.ndim == 4:  # convolutions; maps before a norm are small, so that its epsilon counts
            values.normal_(std=(2 / values[0].numel()) ** 0.5 * (0.03 if "body" in name else 1))
        elif name.endswith("running_var"):
            values.uniform_(5e-4, 2e-3)
        elif name.endswith("running_mean"):
            values.normal_(std=3e-3)
        elif "body" in name and name.endswith("weight"):
            values.uniform_(0.3, 0.6)
    nn.init.normal_(net.head.classification_head.cls_logits.weight, std=0.1)
    nn.init.constant_(net.head.classification_head.cls_logits.bias, -8)
    nn.init.normal_(net.head.regression_head.bbox_reg.weight, std=0.005)
    return net.eval()


def fix_norms(module):
    """Norms as torchvision's published detector has them: fixed, epsilon 0, without counters; in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fixed = torchvision.ops.FrozenBatchNorm2d(child.num_features, eps=0.0)
            fixed.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
            setattr(module, name, fixed)
        else:
            fix_norms(child)


def as_of_old(state):
    """The names of torchvision's published file: the layers of pyramid and heads lie one level higher."""
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if name.startswith("head") and "conv" in parts:
            parts[3:5] = [str(2 * int(parts[3]))]
        elif "blocks" in name and "extra" not in name:
            del parts[4]
        renamed[".".join(parts)] = value
    return renamed


@pytest.mark.parametrize("old", [False, True])
def test_detections_are_torchvisions_own(old):
    other = torchvision_net(11)
    if old:
        fix_norms(other)
    state = other.state_dict()
    net = published.load(as_of_old(state) if old else state)
    assert (net.min_side, net.max_side, net.box_weights) == (800, 1333, (1, 1, 1, 1))
    shapes = [(128, 160), (140, 128)]
    pictures = [torch.randint(0, 256, (3, *shape)).float() for shape in shapes]
    images = torch.zeros(2, 3, 160, 160)
    for image, picture in zip(images, pictures):
        image[:, : picture.shape[1], : picture.shape[2]] = normalised(picture, net)
    size = images.shape[-2:]
    with torch.no_grad():
        expected = other([picture / 255 for picture in pictures])
        outputs = net(images)
    found = from_pyramid(outputs, net.anchors(size), net.box_weights, shapes, net.level_sizes(size), most=300)
    for one, theirs in zip(found, expected, strict=True):
        assert 100 < len(theirs["scores"]) < 300 and theirs["scores"].max() > 0.15
        torch.testing.assert_close(one["boxes"], theirs["boxes"], rtol=0, atol=0.01)
        torch.testing.assert_close(one["scores"], theirs["scores"], rtol=0, atol=1e-4)
        assert one["labels"].tolist() == theirs["labels"].tolist()


def normalised(picture, net):
    mean, std = torch.tensor(net.image_mean), torch.tensor(net.image_std)
    return (picture - mean.view(3, 1, 1)) / std.view(3, 1, 1)


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
    """Centred cells, areas that grow by scale and not by ratio, ratio as height / width."""
    net = models.build("retinanet", 1, depth=18, anchor_scale=2.0)
    first = to_centers(net.anchors((64, 96)))[: retinanet.SHAPES]
    torch.testing.assert_close(first[:, :2], torch.full((9, 2), 4.0))
    areas = torch.tensor([16.0, 16 * 2 ** (1 / 3), 16 * 2 ** (2 / 3)]).square().repeat(3)
    torch.testing.assert_close(first[:, 2] * first[:, 3], areas)
    torch.testing.assert_close(first[:, 3] / first[:, 2], torch.tensor([0.5, 1, 2]).repeat_interleave(3))
    last = to_centers(net.anchors((64, 96)))[-1]
    torch.testing.assert_close(last[:2], torch.tensor([64.0, 64.0]))
    assert net.level_sizes((64, 96)) == [9 * cells for cells in (8 * 12, 4 * 6, 2 * 3, 1 * 2, 1 * 1)]


def test_anchors_are_cached_for_the_latest_sizes():
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
    assert len(net._cache) == retinanet.CACHED_SIZES


def test_outputs_are_in_the_order_of_the_anchors():
    """Level, row, column, shape: a head whose output is its own position."""
    head = retinanet.Head("last", 2, bias=0)
    head.conv, head.last = nn.Identity(), nn.Identity()
    levels = []
    for level, (height, width) in enumerate([(4, 6), (2, 3)]):
        shape, row, column = torch.meshgrid(torch.arange(9), torch.arange(height), torch.arange(width), indexing="ij")
        position = level * 1000 + row * 100 + column * 10 + shape
        both = torch.stack([position, -position], 1).flatten(0, 1)[None]  # [1,S*2,h,w], shape the slower half
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


def test_fresh_network_trains():
    """Scores start at the prior; every parameter is in one group and gets a finite gradient."""
    net = models.build("retinanet", 3, depth=18)
    outputs = net(torch.randn(2, 3, 96, 96))
    torch.testing.assert_close(outputs["logits"].sigmoid().mean().item(), 0.01, rtol=0.05, atol=0)
    (outputs["logits"].square().mean() + outputs["offsets"].square().mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), name
    groups = net.parameter_groups()
    assert list(groups) == ["backbone", "heads"]
    assert sorted(id(p) for part in groups.values() for p in part) == sorted(id(p) for p in net.parameters())
    stages = [id(p) for stage in net.stages() for p in stage.parameters()]
    assert stages == [id(p) for p in groups["backbone"]]


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("learning", [False, True])
def test_folded_norms_change_nothing(depth, learning):
    """Values and gradients of a body with fixed norms equal those of torchvision's, which runs every norm by itself.

    In float64: the sums of a gradient over many cells depend on their order in float32.
    """
    body = resnet.body(depth).double()
    for name, values in body.state_dict().items():
        if "running_var" in name or name.endswith(("bn1.weight", "bn2.weight")):
            values.uniform_(0.5, 1.5)
        elif "running_mean" in name or name.endswith(("bn1.bias", "bn2.bias")):
            values.normal_(std=0.1)
    other = getattr(torchvision.models, f"resnet{depth}")(weights=None).double().eval()
    other.load_state_dict(body.state_dict(), strict=False)
    body.eval()
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(learning)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    actual = body.maps(images)[-1]
    x = other.maxpool(other.relu(other.bn1(other.conv1(images))))
    expected = other.layer4(other.layer3(other.layer2(other.layer1(x))))
    torch.testing.assert_close(actual, expected)
    actual.square().mean().backward()
    expected.square().mean().backward()
    theirs = dict(other.named_parameters())
    for name, parameter in body.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)
        else:
            assert parameter.grad is None and parameter.ndim == 1


def test_a_norm_that_learns_runs_as_usual():
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(layers.conv_norm(x, conv, norm), nn.BatchNorm2d(4)(conv(x)), rtol=0, atol=0)
    assert norm.num_batches_tracked == 1


def test_memory_stays_channels_last():
    """No map is copied into another order on its way to the outputs."""
    net = models.build("retinanet", 3, depth=18).eval().to(memory_format=torch.channels_last)
    strides = {}

    def keep(name):
        return lambda module, inputs, output: strides.update({name: output})

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Sequential) and "downsample" not in name:
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        net(torch.randn(2, 3, 128, 128).contiguous(memory_format=torch.channels_last))
    assert len(strides) > 30
    for name, output in strides.items():
        assert output.is_contiguous(memory_format=torch.channels_last), name


def test_compiles_in_one_graph():
    net = models.build("retinanet", 2, depth=18).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), net(images))


def test_wrong_arguments_are_named():
    with pytest.raises(WeightsError, match="no ResNet of depth 20; there are 18, 34, 50, 101, 152"):
        models.build("retinanet", 3, depth=20)
    with pytest.raises(WeightsError, match="no anchors called 'mine'; there are yhenon, torchvision"):
        models.build("retinanet", 3, anchors="mine")
    with pytest.raises(WeightsError, match="anchor_scale 0: must lie above 0"):
        models.build("retinanet", 3, anchor_scale=0)
