"""CenterFusion against the golden outputs of its source, and how its weights come in."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

import models
from models import WeightsError, centerfusion, published
from models.dla import DLA34
from models.layers import IMAGENET_MEAN

CALIB = torch.tensor([[[633.0, 0, 48, 0], [0, 633.0, 32, 0], [0, 0, 1, 0]]])
CHANNELS = {"hm": 10, "reg": 2, "wh": 2, "dep": 1, "rot": 8, "dim": 3, "amodel_offset": 2}
SECOND = {"dep_sec": 1, "rot_sec": 8, "nuscenes_att": 8, "velocity": 3}


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture
def golden(golden, shared):
    golden.case = json.loads((shared / "upstream" / "centerfusion.json").read_text())
    return golden


def golden_state(golden, prefix=""):
    case = golden.case
    state = {name: torch.from_numpy(golden.seeded_array(name, shape)) for name, shape in case["state_dict"].items()}
    state |= {name: torch.tensor(values) for name, values in case["override"].items()}
    return {prefix + name: value for name, value in state.items()}


@pytest.fixture
def small():
    """A network on ResNet-18 whose batch norms are not the identity, in evaluation mode."""
    net = models.build("centerfusion_resnet18", 10)
    for name, values in net.state_dict().items():
        if name.endswith("running_var"):
            values.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            values.normal_(std=0.05)
    return net.eval()


def given(batch=2, size=(64, 96)):
    """Images, radar map and calib for the networks' forward."""
    radar_map = torch.zeros(batch, 3, size[0] // 4, size[1] // 4)
    radar_map[:, :, 4:8, ::3] = torch.tensor([1.0, 2.0, -3.0])[:, None, None]
    return torch.randn(batch, 3, *size), radar_map, CALIB.expand(batch, 3, 4)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_golden(golden, prefix):
    """DLA-34 with radar: every head within 1e-4 of its deviation, and the association itself; the names in order."""
    case = golden.case
    net = published.load({"epoch": 60, "state_dict": golden_state(golden, prefix)})
    assert list(net.state_dict()) == list(case["state_dict"])
    assert (net.name, net.num_classes, net.image_size) == ("centerfusion_dla34", 10, (448, 800))
    assert net.arguments == {"radar": True, "threshold": "published", "max_distance": 60.0}
    assert net.classes[::9] == ["car", "barrier"] and not net.training
    images = torch.from_numpy(golden.seeded_input(**case["input"]))
    height, width = case["shapes"]["hm"][2:]
    radar_map = torch.from_numpy(golden.radar_map(**case["radar"], height=height, width=width))
    if prefix:  # the memory format that training uses
        net, images = (x.to(memory_format=torch.channels_last) for x in (net, images))
    with torch.no_grad():
        outputs = net(images, radar_map, torch.tensor(case["calib"])[None])
    assert {name: list(value.shape) for name, value in outputs.items()} == case["shapes"]
    differences = {name: golden.worst_difference(outputs[name], values) for name, values in case["outputs"].items()}
    assert len(differences) == 12 and max(differences.values()) < 1e-4, differences


def test_published_names_load_strictly(golden):
    state = golden_state(golden)
    without = {name: value for name, value in state.items() if name != "ida_up.up_2.weight"}
    with pytest.raises(WeightsError, match=r"1 tensors do not fit centerfusion_dla34.*up_2.weight is missing"):
        published.load(without)
    with pytest.raises(WeightsError, match=r"1 tensors do not fit centerfusion_dla34.*more is unknown"):
        published.load({**state, "more": torch.zeros(1)})
    with pytest.raises(WeightsError, match="no whole centerfusion_dla34, it lacks hm"):
        published.load({name: value for name, value in state.items() if not name.startswith("hm.")})


def test_pixels_are_blue_first():
    net = models.build("centerfusion_resnet18", 10)
    assert net.channels == "bgr"
    torch.testing.assert_close(torch.tensor(net.image_mean) / 255, torch.tensor([0.40789654, 0.44719302, 0.47026115]))
    torch.testing.assert_close(torch.tensor(net.image_std) / 255, torch.tensor([0.28863828, 0.27408164, 0.27809835]))
    torch.testing.assert_close(torch.tensor(net.image_mean[::-1]), torch.tensor(IMAGENET_MEAN), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", list(centerfusion.NETWORKS))
def test_heads_by_name(name):
    """With radar and without, where velocity and attribute come from the first stage."""
    images, radar_map, calib = given(1, (32, 64))
    with torch.no_grad():
        with_radar = models.build(name, 10).eval()(images, radar_map, calib)
        camera = models.build(name, 10, radar=False).eval()
        alone = camera(images)
    assert {n: v.shape[1] for n, v in with_radar.items()} == {**CHANNELS, "pc_hm": 1, **SECOND}
    assert {n: v.shape[1] for n, v in alone.items()} == {**CHANNELS, "velocity": 3, "nuscenes_att": 8}
    assert {v.shape[2:] for v in (*with_radar.values(), *alone.values())} == {(8, 16)}
    assert camera.velocity[0].in_channels == 64 and len(camera.velocity) == 3


def test_the_second_stage_sees_what_is_associated(small):
    """The radar map through the network's own peaks, or what training made from the ground truth."""
    small.dep[-1].bias.data.fill_(0.0)  # about 1 m
    small.wh[-1].bias.data.fill_(6.0)
    small.dim[-1].bias.data.fill_(3.0)
    images, radar_map, calib = given()
    with torch.no_grad():
        own = small(images, radar_map, calib)
        empty = small(images, torch.zeros_like(radar_map), calib)
        found = torch.zeros_like(radar_map)
        found[:, :, 3:9, 5:9] = 0.5
        passed = small(images, association=found)
        nothing = small(images, association=torch.zeros_like(radar_map))
    assert own["pc_hm"].any() and not empty["pc_hm"].any()
    torch.testing.assert_close(own["pc_hm"][own["pc_hm"] > 0].unique(), torch.tensor([1 / 60]))
    torch.testing.assert_close(passed["pc_hm"], found[:, :1], rtol=0, atol=0)
    torch.testing.assert_close(nothing, empty)
    for name in SECOND:
        assert not torch.equal(own[name], empty[name]), name
        assert not torch.equal(passed[name], empty[name]), name
    for name in CHANNELS:
        torch.testing.assert_close(passed[name], own[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("name", "seen_by_it"), [("resnet18", math.log(30 / 20)), ("dla34", 0.5)])
def test_a_resnets_second_depth_begins_at_the_radars(name, seen_by_it):
    """Radar at 30 m of 60, where the first stage says 20: logarithms apart for a ResNet, parts of 60 m as published."""
    net = models.build(f"centerfusion_{name}", 10)
    torch.nn.init.zeros_(net.dep_sec[-1].weight)
    inputs = []
    net.dep_sec.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    dep = torch.full((1, 1, 4, 6), -math.log(20.0), requires_grad=True)
    association = torch.zeros(1, 3, 4, 6)
    association[0, :, 2, 3] = torch.tensor([0.5, 7.0, -8.0])
    outputs = net.second(torch.randn(1, 64, 4, 6), dep, association)
    torch.testing.assert_close(inputs[0][0, 64:, 2, 3], torch.tensor([seen_by_it, 7.0, -8.0]))
    assert inputs[0][0, 64:].count_nonzero() == 3
    torch.testing.assert_close(outputs["pc_hm"], association[:, :1])
    start = torch.full_like(dep, -math.log(20.0) if name == "resnet18" else centerfusion.DEPTH_BIAS)
    if name == "resnet18":
        start[0, 0, 2, 3] = -math.log(30.0)
    torch.testing.assert_close(outputs["dep_sec"], start)
    outputs["dep_sec"].sum().backward()
    assert dep.grad is None  # the first stage learns from its own loss alone


def test_batched_equals_single(small):
    images, radar_map, calib = given()
    with torch.no_grad():
        both = small(images, radar_map, calib)
        second = small(images[1:], radar_map[1:], calib[1:])
    for name, values in second.items():
        torch.testing.assert_close(both[name][1:], values, rtol=1e-4, atol=1e-5, msg=name)


def test_fresh_network_trains():
    """Scores start at 0.01, upsampling as bilinear; every parameter is in one group and gets a finite gradient."""
    net = models.build("centerfusion_resnet18", 10)
    images, radar_map, _ = given()
    outputs = net(images, association=radar_map)
    torch.testing.assert_close(net.hm[-1].bias.sigmoid(), torch.full((10,), 0.01), rtol=0.01, atol=0)
    x = torch.arange(8.0).expand(1, 64, 8, 8)
    expected = F.interpolate(x, scale_factor=4, mode="bilinear")[..., 4:-4, 4:-4]
    torch.testing.assert_close(net.ida_up.up_2(x)[..., 4:-4, 4:-4], expected)
    sum(value.square().mean() for value in outputs.values()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), name
    groups = net.parameter_groups()
    assert list(groups) == ["backbone", "heads"]
    assert sorted(id(p) for part in groups.values() for p in part) == sorted(id(p) for p in net.parameters())
    assert [id(p) for stage in net.stages() for p in stage.parameters()] == [id(p) for p in groups["backbone"]]


def test_dla_leaves_no_learning_parameter_without_gradient():
    net = models.build("centerfusion_dla34", 10)
    images, radar_map, _ = given(2, (32, 32))
    sum(value.square().mean() for value in net(images, association=radar_map).values()).backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


def test_folded_norms_change_nothing():
    """A deformable layer with fixed norms, and its gradients, equal convolution and norm one after the other."""
    layer = centerfusion.DeformableNorm(64, 64).double().eval()
    torch.nn.init.normal_(layer.conv.conv_offset_mask.weight, std=0.05)
    layer.actf[0].running_mean.normal_(std=0.05)
    layer.actf[0].running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 64, 6, 9, dtype=torch.float64, requires_grad=True)
    weights = list(layer.parameters())
    actual = layer(x)
    expected = layer.actf[0](layer.conv(x)).relu()
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(*(torch.autograd.grad(y.square().mean(), [x, *weights]) for y in (actual, expected))):
        torch.testing.assert_close(ours, theirs)


def test_deformable_without_offsets_is_a_convolution():
    """Offsets of 0 and weights of sigmoid(0), as at the start; an offset of one cell looks one row further down."""
    layer = centerfusion.Deformable(4, 5)
    x = torch.randn(2, 4, 7, 8)
    plain = F.conv2d(x, layer.weight, padding=1) / 2
    torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-5)
    layer.conv_offset_mask.bias.data[0:18:2] = 1.0
    torch.testing.assert_close(layer(x)[:, :, :-2, :], plain[:, :, 1:-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_autocast_on_a_cpu(training, small):
    """bf16 outputs near those of float32, and finite gradients."""
    small.train(training)
    images, radar_map, _ = given()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = small(images, association=radar_map)
    assert outputs["velocity"].dtype == torch.bfloat16
    for name in centerfusion.EXACT:  # not a number of bfloat16 among float32
        assert (outputs[name] != outputs[name].bfloat16().float()).any(), name
    if not training:
        exact = small(images, association=radar_map)
        for name in ("hm", "velocity"):
            torch.testing.assert_close(outputs[name].float(), exact[name], rtol=0.1, atol=0.05, msg=name)
    sum(value.float().square().mean() for value in outputs.values()).backward()
    assert all(p.grad.isfinite().all() for p in small.parameters() if p.grad is not None)


def test_compiles_in_one_graph(small):
    """Where the association comes from outside, as in training."""
    images, radar_map, _ = given(1)
    with torch.no_grad():
        compiled = torch.compile(small, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images, association=radar_map), small(images, association=radar_map))


def checkpoint(net, **more):
    """What a training run writes, as far as models.load reads it."""
    described = {"num_classes": net.num_classes, "classes": net.classes, "image_size": (64, 96)}
    return {"format_version": 1, "architecture": net.name, "arguments": net.arguments, **described, **more}


def test_load_gives_the_network_of_a_checkpoint(tmp_path):
    net = models.build("centerfusion_resnet18", 3, threshold="paper", max_distance=40.0)
    net.classes = ["car", "truck", "bus"]
    torch.save(checkpoint(net, model=net.state_dict()), tmp_path / "last.pt")
    again = models.load(tmp_path / "last.pt")
    assert again.arguments == {"radar": True, "threshold": "paper", "max_distance": 40.0}
    assert (again.classes, again.image_size) == (net.classes, (64, 96))
    torch.testing.assert_close(dict(again.state_dict()), dict(net.state_dict()), rtol=0, atol=0)


def start(net, state):
    """What `begin_centerfusion` says of `state`, and which heads it left alone."""
    before, said = {name: value.clone() for name, value in net.state_dict().items()}, []
    published.begin_centerfusion(net, state, said.append)
    kept = [name for name, value in net.state_dict().items() if torch.equal(value, before[name])]
    heads = {name.split(".")[0] for name in kept if name.endswith(".weight")} & {*net.first_stage, *net.second_stage}
    return said, heads


def test_begin_from_the_camera_alone():
    """A baseline's velocity and attribute have another shape, the rest of the second stage is missing: all fresh."""
    baseline = models.build("centerfusion_resnet18", 10, radar=False)
    net = models.build("centerfusion_resnet18", 10)
    said, fresh = start(net, {"state_dict": {f"module.{k}": v for k, v in baseline.state_dict().items()}})
    assert fresh == set(SECOND)
    taken, total = len(net.state_dict()) - 4 * 8, len(net.state_dict())
    heads = ", ".join(SECOND)
    assert said == [f"state dict: {taken} of {total} tensors loaded; these heads start fresh: {heads}"]
    torch.testing.assert_close(net.hm[0].weight, baseline.hm[0].weight, rtol=0, atol=0)
    assert not net.velocity[0].bias.any()  # of the same shape in both, but of a head that is fresh


def test_begin_from_the_whole_network():
    other, net = (models.build("centerfusion_resnet18", 10) for _ in range(2))
    said, fresh = start(net, other.state_dict())
    assert not fresh and said == [f"state dict: {len(net.state_dict())} of {len(net.state_dict())} tensors loaded"]
    camera = models.build("centerfusion_resnet18", 10, radar=False)
    said, fresh = start(camera, other.state_dict())
    assert fresh == {"velocity", "nuscenes_att"} and said[0].endswith("; not used: dep_sec, rot_sec")


def test_begin_ignores_the_classifier_of_a_body():
    """CenterNet's files of 2019 carry that of ImageNet."""
    other, net = (models.build("centerfusion_resnet18", 10) for _ in range(2))
    said, fresh = start(net, {**other.state_dict(), "base.fc.weight": torch.zeros(1000, 512, 1, 1)})
    assert not fresh and said[0].endswith("tensors loaded; not used: base.fc")


def test_begin_with_other_classes():
    other, net = models.build("centerfusion_resnet18", 3), models.build("centerfusion_resnet18", 10)
    assert start(net, other.state_dict())[1] == {"hm"}
    other, net = (models.build("centerfusion_resnet18", 2) for _ in range(2))
    other.classes, net.classes = ["car", "truck"], ["truck", "car"]
    assert start(net, checkpoint(other, model=other.state_dict()))[1] == {"hm"}


@pytest.mark.parametrize("name", ["resnet18", "dla34"])
def test_begin_from_a_backbone(name):
    """Its first layer saw red first; the picture with its channels turned gives what the backbone gave."""
    backbone = models.build(name, 5).eval()
    net = models.build(f"centerfusion_{name}", 10).eval()
    said, fresh = start(net, backbone.state_dict())
    assert len(fresh) == 11 and said[0].endswith("of the backbone taken, its first layer turned to blue first")
    images = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        found, expected = net.base.maps(images.flip(1))[-1], backbone.maps(images)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_begin_from_nothing_and_from_the_wrong_file():
    net = models.build("centerfusion_resnet18", 10)
    said, fresh = start(net, "")
    assert len(fresh) == 11 and said[0].startswith("WARNING: no weights to start from: TRAINING FROM SCRATCH")
    with pytest.raises(WeightsError, match="holds a centerfusion_resnet34, not a centerfusion_resnet18"):
        start(net, models.build("centerfusion_resnet34", 10).state_dict())
    with pytest.raises(WeightsError, match="holds a dla34, but centerfusion_resnet18 stands on resnet18"):
        start(net, DLA34(7).state_dict())
    with pytest.raises(WeightsError, match="unknown weights"):
        start(net, {"a": torch.zeros(1)})
    state = net.state_dict()
    with pytest.raises(WeightsError, match=r"ida_up.up_1.weight is missing"):
        start(net, {name: value for name, value in state.items() if name != "ida_up.up_1.weight"})


def test_families_tell_the_networks_apart():
    for name in centerfusion.NETWORKS:
        with torch.device("meta"):
            net = models.build(name, 4, radar=False)
        state = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in net.state_dict().items()}
        loaded = published.load(state)
        assert (loaded.name, loaded.num_classes, loaded.classes) == (name, 4, None)
        assert not loaded.arguments["radar"]


def test_wrong_arguments_are_named():
    with pytest.raises(WeightsError, match="no threshold called 'mine'; there are published, paper"):
        models.build("centerfusion_resnet18", 10, threshold="mine")
    with pytest.raises(WeightsError, match="max_distance 0: must lie above 0 metres"):
        models.build("centerfusion_resnet18", 10, max_distance=0)
    with pytest.raises(WeightsError, match="takes no 'depth'; it takes radar, threshold, max_distance"):
        models.build("centerfusion_resnet18", 10, depth=18)
