"""CenterFusion from other CenterFusions, camera-only networks, CenterNet's files and backbones."""

import pytest
import torch

import models
from models import pretrained
from models.backbones.dla import DLA34
from models.centerfusion import NETWORKS
from models.pretrained import centerfusion
from tests.model_helpers import checkpoint
from utils.errors import WeightsError

SECOND_HEADS = {"dep_sec", "rot_sec", "nuscenes_att", "velocity"}


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def build(num_classes=10, **arguments):
    return models.build("centerfusion_resnet18", num_classes, **arguments)


def random_heads(net, state):
    """(line of fine_tune, heads that kept their random weights)."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    line = centerfusion.fine_tune(net, state)
    weights = {name: value for name, value in net.state_dict().items() if name.endswith(".weight")}
    random = {name.split(".")[0] for name, value in weights.items() if torch.equal(value, before[name])}
    return line, random & {*net.first_heads, *net.second_heads}


def test_camera_only_network():
    """Its velocity and attribute heads have another shape, and it has no other heads of the second stage."""
    camera, net = build(radar=False), build()
    line, heads = random_heads(net, {"state_dict": {f"module.{k}": v for k, v in camera.state_dict().items()}})
    assert heads == SECOND_HEADS
    loaded, total = len(net.state_dict()) - 4 * 8, len(net.state_dict())
    names = "dep_sec, rot_sec, nuscenes_att, velocity"
    assert line == f"{loaded} of {total} tensors loaded; these heads keep random weights: {names}"
    torch.testing.assert_close(net.hm[0].weight, camera.hm[0].weight, rtol=0, atol=0)
    assert not net.velocity[0].bias.any()  # same shape in both, but part of a head that is not loaded


@pytest.mark.parametrize("radar", [True, False])
def test_evaluation_with_radar_where_the_file_has_none(radar):
    """And the other way around: heads would be random."""
    with pytest.raises(WeightsError, match="leave out --pointcloud" if radar else "add --pointcloud"):
        centerfusion.fine_tune(build(radar=radar), build(radar=not radar).state_dict(), strict=True)


def test_whole_network():
    source, net = build(), build()
    line, heads = random_heads(net, source.state_dict())
    assert not heads and line == f"{len(net.state_dict())} of {len(net.state_dict())} tensors loaded"
    line, heads = random_heads(build(radar=False), source.state_dict())
    assert heads == {"velocity", "nuscenes_att"} and line.endswith("; not used: dep_sec, rot_sec")


def test_the_classifier_of_the_body_is_ignored():
    """CenterNet's files of 2019 contain that of ImageNet."""
    line, heads = random_heads(build(), {**build().state_dict(), "base.fc.weight": torch.zeros(1000, 512, 1, 1)})
    assert not heads and line.endswith("tensors loaded; not used: base.fc")


def test_other_classes():
    assert random_heads(build(10), build(3).state_dict())[1] == {"hm"}
    source, net = build(2), build(2)
    source.classes, net.classes = ["car", "truck"], ["truck", "car"]
    assert random_heads(net, checkpoint(source))[1] == {"hm"}
    with pytest.raises(WeightsError, match="state dict: has other classes than the data"):
        centerfusion.fine_tune(net, checkpoint(source), strict=True)


@pytest.mark.parametrize("name", ["resnet18", "dla34"])
def test_backbone(name):
    """It was trained on RGB: BGR images through the flipped first layer give the same maps."""
    backbone = models.build(name, 5).eval()
    net = models.build(f"centerfusion_{name}", 10).eval()
    line = centerfusion.load_backbone(net, backbone.state_dict())
    assert line.endswith("tensors of the backbone loaded, its first layer flipped from RGB to BGR")
    images = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        actual, expected = net.base.feature_maps(images.flip(1))[-1], backbone.feature_maps(images)[-1]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_other_networks_are_refused():
    net = build()
    with pytest.raises(WeightsError, match="contains a centerfusion_resnet34, not a centerfusion_resnet18"):
        centerfusion.fine_tune(net, models.build("centerfusion_resnet34", 10).state_dict())
    with pytest.raises(WeightsError, match="contains a dla34, but centerfusion_resnet18 needs a resnet18"):
        centerfusion.load_backbone(net, DLA34(7).state_dict())
    for load in (centerfusion.fine_tune, centerfusion.load_backbone):
        with pytest.raises(WeightsError, match="unknown weights"):
            load(net, {"a": torch.zeros(1)})
    state = {name: value for name, value in net.state_dict().items() if name != "ida_up.up_1.weight"}
    with pytest.raises(WeightsError, match=r"ida_up.up_1.weight is missing"):
        centerfusion.fine_tune(net, state)
    with pytest.raises(WeightsError, match="the published weights of centerfusion_resnet18 cannot be downloaded"):
        centerfusion.published(net)


def test_families_are_recognized():
    for name in NETWORKS:
        with torch.device("meta"):
            net = models.build(name, 4, radar=False)
        loaded = pretrained.load({k: torch.zeros(v.shape, dtype=v.dtype) for k, v in net.state_dict().items()})
        assert (loaded.name, loaded.num_classes, loaded.classes) == (name, 4, None)
        assert not loaded.arguments["radar"]
