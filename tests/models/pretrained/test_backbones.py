"""Backbones from files: families, the body of a detector, and classifiers by class name."""

import pytest
import torch

import models
from models import backbones as classifiers
from models.backbones import dla, resnet
from models.pretrained import backbones
from tests.model_helpers import assert_same_state, checkpoint
from utils.errors import WeightsError


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", classifiers.NETWORKS)
def test_families_are_recognized(name):
    with torch.device("meta"):
        state = models.build(name, 5).state_dict()
    assert backbones.family_of(backbones.bare_names(state), backbones.FAMILIES, "x") == name


def test_load_body_from_any_file_of_its_family(tmp_path):
    source = models.build("resnet18", 5)
    torch.save(checkpoint(source), tmp_path / "backbone.pt")
    detector = {f"backbone.body.{name}": value for name, value in source.state_dict().items()}
    without_counters = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    for given in (tmp_path / "backbone.pt", detector, without_counters):
        body = resnet.body(18)
        line = backbones.load_body(body, "resnet18", given, "retinanet")
        assert line == "120 of 120 tensors of the backbone loaded"
        for name, value in body.state_dict().items():
            torch.testing.assert_close(value, source.state_dict()[name], rtol=0, atol=0)
    body, source = dla.DLA34(), dla.DLA34()
    given = {f"module.base.{name}": value for name, value in source.state_dict().items()}
    assert backbones.load_body(body, "dla34", given, "centerfusion").startswith("234 of 234 tensors")
    assert_same_state(body, source)


def test_another_family_or_shape_is_refused(tmp_path):
    torch.save(checkpoint(models.build("resnet18", 5)), tmp_path / "x.pt")
    line = "x.pt: contains a resnet18, but retinanet needs a resnet50; give a resnet50 file"
    with pytest.raises(WeightsError, match=line):
        backbones.load_body(resnet.body(50), "resnet50", tmp_path / "x.pt", "retinanet")
    wrong = {**models.build("resnet18", 5).state_dict(), "layer4.1.conv2.weight": torch.zeros(512, 512, 1, 1)}
    with pytest.raises(WeightsError, match=r"layer4.1.conv2.weight is \[512, 512, 1, 1\], retinanet needs"):
        backbones.load_body(resnet.body(18), "resnet18", wrong, "retinanet")
    with pytest.raises(WeightsError, match=r"x.pt: contains a resnet18, but this run needs a dla34; give a dla34 file"):
        backbones.fine_tune(models.build("dla34", 5), tmp_path / "x.pt")


def test_last_layer_by_class_name(tmp_path):
    """Rows of known classes are loaded by name; a head of other classes keeps its initial values, unless strict."""
    source, file = models.build("resnet18", 3), tmp_path / "x.pt"
    source.classes = ["ant", "bee", "cow"]
    torch.save(checkpoint(source), file)
    for names, rows, line in (
        (["cow", "ant", "bee"], [2, 0, 1], "122 of 122 tensors loaded, 3 of its 3 classes by name"),
        (["bee", "ant"], [1, 0], "122 of 122 tensors loaded, 2 of its 3 classes by name"),
        (["ant", "bee", "dog"], None, "checkpoint 3 classes, data 3 of other names: head re-initialized, 120 of 122"),
        (["ant", "bee", "dog", "cow"], None, "checkpoint 3 classes, data 4: head re-initialized, 120 of 122"),
    ):
        net = models.build("resnet18", len(names))
        net.classes, initial = names, net.fc.weight.clone()
        with pytest.raises(WeightsError, match=rf"\(ant, bee, cow\), the data's .*\({', '.join(names)}\)"):
            backbones.fine_tune(net, file, strict=True)
        torch.testing.assert_close(net.fc.weight, initial, rtol=0, atol=0)
        assert line in backbones.fine_tune(net, file)
        torch.testing.assert_close(net.fc.weight, source.fc.weight[rows] if rows else initial, rtol=0, atol=0)
        torch.testing.assert_close(net.layer4[1].conv2.weight, source.layer4[1].conv2.weight, rtol=0, atol=0)
    net = models.build("resnet18", 3)
    net.classes = ["ant", "bee", "cow"]
    assert backbones.fine_tune(net, file, strict=True) == "122 of 122 tensors loaded"
    assert_same_state(net, source)
    with pytest.raises(WeightsError, match="state dict: contains 3 classes, the data 5"):  # of unknown names
        backbones.fine_tune(models.build("resnet18", 5), source.state_dict(), strict=True)
