"""CenterFusion against the golden outputs of the published program, and its two stages."""

import math

import pytest
import torch
from torch.nn import functional as F

import models
from models import centerfusion, pretrained
from models.backbones.layers import IMAGENET_MEAN
from ops.geometry import decode_depth
from tests import golden
from tests.model_helpers import (
    assert_compiles_in_one_graph,
    assert_each_parameter_in_one_group,
    assert_stages_are_the_backbone,
    randomize_norms,
)
from utils.errors import WeightsError

CALIB = torch.tensor([[[633.0, 0, 48, 0], [0, 633.0, 32, 0], [0, 0, 1, 0]]])
FIRST_HEADS = {"hm": 10, "reg": 2, "wh": 2, "dep": 1, "rot": 8, "dim": 3, "amodel_offset": 2}
SECOND_HEADS = {"dep_sec": 1, "rot_sec": 8, "nuscenes_att": 8, "velocity": 3}


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def golden_state():
    case = golden.case("centerfusion")
    return golden.state_dict(case) | {name: torch.tensor(values) for name, values in case["override"].items()}


@pytest.fixture
def small():
    """A network on ResNet-18 whose batch norms are not the identity, in evaluation mode."""
    return randomize_norms(models.build("centerfusion_resnet18", 10)).eval()


def make_inputs(batch=2, size=(64, 96)):
    """Images, radar map and calib."""
    radar_map = torch.zeros(batch, 3, size[0] // 4, size[1] // 4)
    radar_map[:, :, 4:8, ::3] = torch.tensor([1.0, 2.0, -3.0])[:, None, None]
    return torch.randn(batch, 3, *size), radar_map, CALIB.expand(batch, 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_golden(golden_state, memory_format):
    """DLA-34 with radar: names in order, every head and the association within 1e-4 of its standard deviation."""
    case = golden.case("centerfusion")
    net = pretrained.load({"epoch": 60, "state_dict": {f"module.{k}": v for k, v in golden_state.items()}})
    assert list(net.state_dict()) == list(case["state_dict"])
    assert (net.name, net.num_classes, net.image_size) == ("centerfusion_dla34", 10, (448, 800))
    assert net.arguments == {"radar": True, "threshold": "published", "max_distance": 60.0}
    assert net.classes[::9] == ["car", "barrier"] and not net.training
    radar_map = golden.radar_map(case, *case["shapes"]["hm"][2:])
    net, images = (x.to(memory_format=memory_format) for x in (net, golden.images(case)))
    with torch.no_grad():
        outputs = net(images, radar_map, torch.tensor(case["calib"])[None])
    assert {name: list(value.shape) for name, value in outputs.items()} == case["shapes"]
    differences = {name: golden.worst_difference(outputs[name], values) for name, values in case["outputs"].items()}
    assert len(differences) == 12 and max(differences.values()) < 1e-4, differences


def test_published_names_load_strictly(golden_state):
    missing = {name: value for name, value in golden_state.items() if name != "ida_up.up_2.weight"}
    with pytest.raises(WeightsError, match=r"1 tensors do not fit centerfusion_dla34.*up_2.weight is missing"):
        pretrained.load(missing)
    with pytest.raises(WeightsError, match=r"1 tensors do not fit centerfusion_dla34.*more is not in this network"):
        pretrained.load({**golden_state, "more": torch.zeros(1)})
    with pytest.raises(WeightsError, match="not a complete centerfusion_dla34, hm is missing"):
        pretrained.load({name: value for name, value in golden_state.items() if not name.startswith("hm.")})


def test_images_are_bgr():
    net = models.build("centerfusion_resnet18", 10)
    torch.testing.assert_close(torch.tensor(net.image_mean) / 255, torch.tensor([0.40789654, 0.44719302, 0.47026115]))
    torch.testing.assert_close(torch.tensor(net.image_std) / 255, torch.tensor([0.28863828, 0.27408164, 0.27809835]))
    torch.testing.assert_close(torch.tensor(net.image_mean[::-1]), torch.tensor(IMAGENET_MEAN), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", list(centerfusion.NETWORKS))
def test_heads(name):
    """With radar and without, where velocity and attribute come from the first stage."""
    images, radar_map, calib = make_inputs(1, (32, 64))
    with torch.no_grad():
        with_radar = models.build(name, 10).eval()(images, radar_map, calib)
        camera_net = models.build(name, 10, radar=False).eval()
        camera_only = camera_net(images)
    assert {head: value.shape[1] for head, value in with_radar.items()} == {**FIRST_HEADS, "pc_hm": 1, **SECOND_HEADS}
    expected = {**FIRST_HEADS, "velocity": 3, "nuscenes_att": 8}
    assert {head: value.shape[1] for head, value in camera_only.items()} == expected
    assert {value.shape[2:] for value in (*with_radar.values(), *camera_only.values())} == {(8, 16)}
    assert camera_net.velocity[0].in_channels == 64 and len(camera_net.velocity) == 3


def test_a_new_network_begins_with_low_scores_at_twenty_meters():
    net = models.build("centerfusion_resnet18", 10).eval()
    with torch.no_grad():
        outputs = net(torch.zeros(1, 3, 32, 64), torch.zeros(1, 3, 8, 16), CALIB)
    torch.testing.assert_close(outputs["hm"].sigmoid(), torch.full((1, 10, 8, 16), 0.01), rtol=0, atol=1e-3)
    torch.testing.assert_close(decode_depth(outputs["dep"]), torch.full((1, 1, 8, 16), 20.0), rtol=0.05, atol=0)


def test_the_second_stage_uses_the_association(small):
    """Of the network's own peaks, or passed in, as in training."""
    small.dep[-1].bias.data.fill_(0.0)  # about 1 m
    small.wh[-1].bias.data.fill_(6.0)
    small.dim[-1].bias.data.fill_(3.0)
    images, radar_map, calib = make_inputs()
    association = torch.zeros_like(radar_map)
    association[:, :, 3:9, 5:9] = 0.5
    with torch.no_grad():
        own = small(images, radar_map, calib)
        no_radar = small(images, torch.zeros_like(radar_map), calib)
        passed = small(images, association=association)
        passed_none = small(images, association=torch.zeros_like(radar_map))
    assert own["pc_hm"].any() and not no_radar["pc_hm"].any()
    torch.testing.assert_close(own["pc_hm"][own["pc_hm"] > 0].unique(), torch.tensor([1 / 60]))
    torch.testing.assert_close(passed["pc_hm"], association[:, :1], rtol=0, atol=0)
    torch.testing.assert_close(passed_none, no_radar)
    for name in SECOND_HEADS:
        assert not torch.equal(own[name], no_radar[name]), name
        assert not torch.equal(passed[name], no_radar[name]), name
    for name in FIRST_HEADS:
        torch.testing.assert_close(passed[name], own[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("name", "depth_input"), [("resnet18", math.log(30 / 20)), ("dla34", 0.5)])
def test_residual_depth(name, depth_input):
    """Radar at 30 m of 60, where the first stage predicts 20: the input is the difference of logarithms for a ResNet,
    whose second depth starts from the radar's, and a fraction of 60 m as published."""
    net = models.build(f"centerfusion_{name}", 10)
    torch.nn.init.zeros_(net.dep_sec[-1].weight)
    inputs = []
    net.dep_sec.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    dep = torch.full((1, 1, 4, 6), -math.log(20.0), requires_grad=True)
    association = torch.zeros(1, 3, 4, 6)
    association[0, :, 2, 3] = torch.tensor([0.5, 7.0, -8.0])
    outputs = net.second_stage(torch.randn(1, 64, 4, 6), dep, association)
    torch.testing.assert_close(inputs[0][0, 64:, 2, 3], torch.tensor([depth_input, 7.0, -8.0]))
    assert inputs[0][0, 64:].count_nonzero() == 3
    torch.testing.assert_close(outputs["pc_hm"], association[:, :1])
    expected = torch.full_like(dep, -math.log(20.0) if name == "resnet18" else centerfusion.DEPTH_BIAS)
    if name == "resnet18":
        expected[0, 0, 2, 3] = -math.log(30.0)
    torch.testing.assert_close(outputs["dep_sec"], expected)
    outputs["dep_sec"].sum().backward()
    assert dep.grad is None  # the loss of the second stage does not train the first


def test_batched_equals_single(small):
    images, radar_map, calib = make_inputs()
    with torch.no_grad():
        both = small(images, radar_map, calib)
        second = small(images[1:], radar_map[1:], calib[1:])
    for name, values in second.items():
        torch.testing.assert_close(both[name][1:], values, rtol=1e-4, atol=1e-5, msg=name)


def test_new_network_trains():
    """Initial scores are 0.01, upsampling is bilinear, and every parameter gets a finite gradient."""
    net = models.build("centerfusion_resnet18", 10)
    images, radar_map, _ = make_inputs()
    outputs = net(images, association=radar_map)
    torch.testing.assert_close(net.hm[-1].bias.sigmoid(), torch.full((10,), 0.01), rtol=0.01, atol=0)
    x = torch.arange(8.0).expand(1, 64, 8, 8)
    expected = F.interpolate(x, scale_factor=4, mode="bilinear")[..., 4:-4, 4:-4]
    torch.testing.assert_close(net.ida_up.up_2(x)[..., 4:-4, 4:-4], expected)
    sum(value.square().mean() for value in outputs.values()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert_each_parameter_in_one_group(net, ["backbone", "heads"])
    assert_stages_are_the_backbone(net)


def test_all_trainable_parameters_of_dla34_get_a_gradient():
    net = models.build("centerfusion_dla34", 10)
    images, radar_map, _ = make_inputs(2, (32, 32))
    sum(value.square().mean() for value in net(images, association=radar_map).values()).backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


def test_untrained_heads():
    net = models.build("centerfusion_resnet18", 10)
    assert net.untrained_heads() == ["nuscenes_att", "velocity"]
    net.velocity[-1].bias.data[0] = 0.1
    assert net.untrained_heads() == ["nuscenes_att"]


def test_folded_norms_change_nothing():
    """Values and gradients of a deformable block with fixed statistics, against convolution and norm in sequence."""
    block = randomize_norms(centerfusion.DeformableBlock(64, 64).double()).eval()
    torch.nn.init.normal_(block.conv.conv_offset_mask.weight, std=0.05)
    x = torch.randn(2, 64, 6, 9, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    actual, expected = block(x), block.actf[0](block.conv(x)).relu()
    torch.testing.assert_close(actual, expected)
    gradients, expected_gradients = (torch.autograd.grad(y.square().mean(), inputs) for y in (actual, expected))
    torch.testing.assert_close(gradients, expected_gradients)


def test_deformable_convolution_with_zero_offsets_is_a_convolution():
    """Initially offsets are 0 and weights sigmoid(0); an offset of one cell reads one row further down."""
    layer = centerfusion.DeformableConv2d(4, 5)
    x = torch.randn(2, 4, 7, 8)
    expected = F.conv2d(x, layer.weight, padding=1) / 2
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    layer.conv_offset_mask.bias.data[0:18:2] = 1.0
    torch.testing.assert_close(layer(x)[:, :, :-2, :], expected[:, :, 1:-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_autocast_on_a_cpu(training, small):
    """bf16 outputs are near those in float32, and gradients are finite."""
    small.train(training)
    images, radar_map, _ = make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = small(images, association=radar_map)
    assert outputs["velocity"].dtype == torch.bfloat16
    for name in centerfusion.FLOAT32_HEADS:  # not rounded to bfloat16
        assert (outputs[name] != outputs[name].bfloat16().float()).any(), name
    if not training:
        expected = small(images, association=radar_map)
        for name in ("hm", "velocity"):
            torch.testing.assert_close(outputs[name].float(), expected[name], rtol=0.1, atol=0.05, msg=name)
    sum(value.float().square().mean() for value in outputs.values()).backward()
    assert all(p.grad.isfinite().all() for p in small.parameters() if p.grad is not None)


@pytest.mark.slow
def test_compiles_in_one_graph(small):
    """With an association from outside, as in training."""
    images, radar_map, _ = make_inputs(1)
    assert_compiles_in_one_graph(small, images, association=radar_map)
