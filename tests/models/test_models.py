"""build, describe and load for every kind of network, and the files and arguments that are refused."""

import copy
import math
import resource

import pytest
import torch

import models
from tests.model_helpers import assert_same_state, checkpoint
from utils.errors import WeightsError

SIZES = [[20 * i + 20, 20 * i + 40] for i in range(6)]


@pytest.mark.parametrize(
    ("name", "arguments", "sizes"),
    [
        ("mb2-ssd-lite", {"width_mult": 0.5, "box_sizes": SIZES}, {"image_size": (256, 320)}),
        ("mb1-ssd", {"priors": "jetson"}, {"image_size": (512, 512)}),
        ("retinanet", {"depth": 18, "anchors": "torchvision", "anchor_scale": 2.0}, {"min_side": 320, "max_side": 480}),
        (
            "centerfusion_resnet18",
            {"radar": True, "threshold": "paper", "max_distance": 40.0},
            {"image_size": (64, 96)},
        ),
        ("maskrcnn_resnet18", {"proposals": 30, "width": 12, "hidden": 16}, {"min_side": 320, "max_side": 480}),
        ("mobilenet_v2", {"width_mult": 0.35}, {"image_size": (64, 96)}),
    ],
)
def test_load_builds_the_network_of_a_checkpoint(name, arguments, sizes, tmp_path, capsys):
    net = models.build(name, 2, **arguments)
    torch.save(checkpoint(net, **sizes), tmp_path / "last.pt")
    loaded = models.load(tmp_path / "last.pt")
    assert (loaded.name, loaded.arguments, loaded.classes) == (name, net.arguments, ["class 0", "class 1"])
    assert arguments.items() <= loaded.arguments.items() and not loaded.training
    if "image_size" in sizes:
        assert loaded.image_size == sizes["image_size"]
    else:
        assert (loaded.image_size, loaded.min_side, loaded.max_side) == (None, 320, 480)
    for attribute in ("box_weights", "sizes"):
        assert getattr(loaded, attribute, None) == getattr(net, attribute, None)
    assert_same_state(loaded, net)
    assert capsys.readouterr().out == ""


def test_load_prefers_averaged_weights(tmp_path, capsys):
    net = models.build("resnet18", 2)
    averaged = copy.deepcopy(net)
    for parameter in averaged.parameters():
        parameter.data += 1
    ema = {"model": averaged.state_dict(), "updates": 3}
    torch.save(checkpoint(net, image_size=32, ema=ema), tmp_path / "last.pt")
    loaded = models.load(tmp_path / "last.pt")
    assert_same_state(loaded, averaged)
    assert loaded.image_size == (32, 32)  # early checkpoints have one number
    assert "averaged weights" in capsys.readouterr().out


def test_load_accepts_a_published_file(tmp_path):
    net = models.build("mb1-ssd", 5)
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    loaded = models.load(tmp_path / "bare.pth")
    assert (loaded.classes, loaded.num_classes, loaded.image_size) == (None, 5, (300, 300))
    assert_same_state(loaded, net)


def test_errors_name_the_file(tmp_path):
    net, path = models.build("resnet18", 2), tmp_path / "x.pt"
    with pytest.raises(WeightsError, match=r"x.pt: no such file"):
        models.load(path)
    torch.save({"architecture": "mb1-ssd", "model": {}}, path)
    with pytest.raises(WeightsError, match=r"x.pt: not a complete checkpoint: format_version, arguments, .* missing"):
        models.load(path)
    torch.save(checkpoint(net, format_version=99), path)
    with pytest.raises(WeightsError, match=r"x.pt: format version 99 is newer"):
        models.load(path)
    torch.save(checkpoint(net, arguments={"depth": 18}), path)
    with pytest.raises(WeightsError, match="resnet18 has no argument 'depth'"):
        models.load(path)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"num_classes": 10**6, "classes": ["a"] * 10**5 + ["b"] * 9 * 10**5},
            "more values than a file of weights has",
        ),
        ({"num_classes": 10**5, "classes": ["a"] * 10**5}, r"\d+ tensors do not fit mobilenet_v2, the first: classif"),
        ({"arguments": {"width_mult": 1e9}}, r"x.pt: width_mult 1000000000.0: must be from 0.1 to 4"),
        ({"arguments": {"width_mult": "wide"}}, "its arguments are those of no network: '<=' not supported"),
        ({"architecture": "retinanet", "arguments": {"depth": [18]}}, "its arguments are those of no network: unhash"),
        (
            {"architecture": "mb1-ssd", "arguments": {"box_sizes": [["a", "b"]] * 6}},
            "its arguments are those of no net",
        ),
        (
            {"architecture": "maskrcnn_resnet18", "arguments": {"width": 10**7}},
            "tensors do not fit|those of no network",
        ),
        ({"image_size": (10**6, 10**6)}, "image_size is a tuple, must be a whole number from 1 to 8192"),
        ({"model": {7: torch.zeros(1)}}, "model is a dict, must be a dict of tensors by name"),
        ({7: 1, "model": {}}, "tensors do not fit mobilenet_v2"),
        ({"flags": {"nms_iou": "text"}}, "flags.nms_iou is 'text', must be a number from 0 to 1"),
    ],
)
def test_a_network_larger_than_its_file_is_never_made(tmp_path, changed, reason):
    """Files whose fields ask for terabytes or are of another kind."""
    saved = checkpoint(models.build("mobilenet_v2", 2, width_mult=0.1), image_size=(32, 32))
    torch.save({**saved, **changed}, tmp_path / "x.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match=reason) as caught:
        models.load(tmp_path / "x.pt")
    assert len(str(caught.value).splitlines()) == 1 and str(tmp_path / "x.pt") in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_that_are_not_finite_are_refused(tmp_path, averaged):
    net = models.build("squeezenet1_1", 2)
    saved = checkpoint(net, image_size=(32, 32))
    wrong = {**net.state_dict(), "classifier.1.bias": torch.tensor([0.0, math.nan])}
    saved = {**saved, "ema": {"updates": 1, "model": wrong}} if averaged else {**saved, "model": wrong}
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"x.pt: classifier.1.bias contains NaN or infinity, no usable weights"):
        models.load(tmp_path / "x.pt")
    torch.save(wrong, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"x.pt: classifier.1.bias contains NaN or infinity, no usable weights"):
        models.load(tmp_path / "x.pt")


def test_a_run_of_a_size_that_could_not_be_loaded_is_refused():
    with pytest.raises(WeightsError, match=r"image_size \(9000, 9000\) of this run: must be a whole number from 1 to"):
        models.describe(models.build("squeezenet1_1", 2), image_size=(9000, 9000))


def test_unknown_names_and_arguments_are_refused():
    with pytest.raises(WeightsError, match=r"unknown network 'mb3'; known are mb1-ssd, "):
        models.build("mb3", 3)
    for name, arguments, line in (
        ("mb1-ssd", {"width_mult": 0.5}, "mb1-ssd has no argument 'width_mult'; it has box_sizes"),
        ("resnet18", {"width_mult": 0.5}, "resnet18 has no argument 'width_mult'; it has none"),
        ("maskrcnn_resnet50", {"width": 3}, "has no argument 'width'; it has proposals"),
        ("centerfusion_resnet18", {"depth": 18}, "has no argument 'depth'; it has radar, threshold, max_distance"),
        ("centerfusion_resnet18", {"threshold": "mine"}, "unknown threshold 'mine'; known are published, paper"),
        ("centerfusion_resnet18", {"max_distance": 0}, "max_distance 0: must be above 0 meters"),
        ("retinanet", {"depth": 20}, "no ResNet of depth 20; there are 18, 34, 50, 101, 152"),
        ("retinanet", {"anchors": "mine"}, "unknown anchors 'mine'; known are yhenon, torchvision"),
        ("retinanet", {"anchor_scale": 0}, "anchor_scale 0: must be above 0"),
        ("maskrcnn_resnet50", {"proposals": 0}, "proposals 0: must be 1 or more"),
        ("mobilenet_v2", {"width_mult": 9}, "width_mult 9: must be from 0.1 to 4"),
        ("mb2-ssd-lite", {"width_mult": 0}, "width_mult 0: must be from 0.1 to 4"),
        ("mb1-ssd", {"box_sizes": SIZES[:5]}, "need 6 pairs"),
        ("mb1-ssd", {"box_sizes": [[40, 20]] * 6}, "0 < min <= max"),
        ("mb1-ssd", {"priors": "mine"}, "unknown priors 'mine'; known are scaled, jetson"),
        ("mb1-ssd", {"priors": "jetson", "box_sizes": SIZES}, "give --priors scaled with --box-sizes"),
        ("mb2-ssd-lite", {"priors": "jetson"}, "mb2-ssd-lite has no argument 'priors'"),
    ):
        with pytest.raises(WeightsError, match=line):
            models.build(name, 3, **arguments)


def test_summary():
    assert models.summary(models.build("resnet18", 1000)) == "resnet18, 11.7 M parameters"
