"""export.py on small networks: what comes in and out of its files, what they say of themselves, what is refused."""

import itertools
import json

import pytest
import torch
import torchvision

import export
import models
from data import drawn
from models import WeightsError, deploy, deploy_radar, published
from models.published_retinanet import published_state
from ops import radar, suppress
from tests import exports
from training.flags import UsageError

SIZE = (96, 128)


@pytest.fixture
def onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    return pytest.importorskip("onnx")


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def saved(tmp_path, name, size=SIZE, classes=3, **arguments):
    """(network, path of its checkpoint)."""
    net = exports.lively(models.build(name, classes, **arguments), size)
    return net, exports.checkpoint(net, tmp_path / "best.pt", size)


def shapes_of(values):
    return {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}


def test_jetson_layout(onnx, tmp_path, capsys):
    net, given = saved(tmp_path, "mb2-ssd-lite", (160, 160), width_mult=0.25)
    out = tmp_path / "deep" / "ssd.onnx"
    largest = export.main([given, "--out", str(out), "--layout", "jetson"])
    assert max(largest.values()) < 1e-3
    graph, priors = onnx.load(out).graph, len(net.anchors((160, 160)))
    assert shapes_of(graph.input) == {"input_0": [1, 3, 160, 160]}
    assert shapes_of(graph.output) == {"scores": [1, priors, 4], "boxes": [1, priors, 4]}
    assert (tmp_path / "deep" / "labels.txt").read_text() == "BACKGROUND\nthing 0\nthing 1\nthing 2\n"
    images = torch.stack(export.real_pictures("", (160, 160))[:1])
    found = exports.run_file(out, images, normalised=net)
    torch.testing.assert_close(found["scores"].sum(-1), torch.ones(1, priors))
    pixels = (found["boxes"] * 160).clamp(0, 160)
    found = suppress.detections(found["scores"][..., 1:], pixels, (160, 160))
    exports.assert_same_detections(found, exports.detections_of(net, images))
    assert "in: input_0; out: scores, boxes" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "arguments"), [("mb1-ssd-lite", {}), ("retinanet", {"depth": 18})])
def test_suppression_in_the_graph(onnx, name, arguments, tmp_path):
    net, given = saved(tmp_path, name, **arguments)
    out = tmp_path / "net.onnx"
    largest = export.main([given, "--out", str(out), "--nms", "--dynamic-batch"])
    assert largest["labels"] == 0
    most = 200 if name == "mb1-ssd-lite" else 100
    graph = onnx.load(out).graph
    assert shapes_of(graph.input) == {"images": ["batch", 3, *SIZE]}
    sizes = {"boxes": ["batch", most, 4], "labels": ["batch", most], "scores": ["batch", most]}
    assert shapes_of(graph.output) == sizes
    images = torch.stack(export.real_pictures("", SIZE)[:3])
    found = exports.run_file(out, images)
    held = found["labels"] >= 0
    assert (found["scores"][~held] == 0).all()
    pictures = [{key: value[one] for key, value in parts.items()} for one, parts in cut_up(found, held)]
    exports.assert_same_detections(pictures, exports.detections_of(net, images))


def cut_up(found, held):
    """(which are detections, outputs) of each picture."""
    return [(held[i], {name: value[i] for name, value in found.items()}) for i in range(len(held))]


@pytest.mark.parametrize(("name", "arguments"), [("mb1-ssd-lite", {}), ("retinanet", {"depth": 18})])
@torch.no_grad()
def test_graphs_suppress_as_evaluation_does(name, arguments):
    """The graph of tensors of fixed size, without ONNX: the same detections, and nothing where the threshold is 1."""
    net = exports.lively(models.build(name, 3, **arguments), SIZE)
    images = torch.stack(export.real_pictures("", SIZE)[:2])
    boxes, labels, scores, *_ = deploy.graph(net, SIZE, suppress=True)(images.float())
    parts = {"boxes": boxes, "labels": labels, "scores": scores}
    pictures = [{key: value[one] for key, value in parts.items()} for one, parts in cut_up(parts, labels >= 0)]
    exports.assert_same_detections(pictures, exports.detections_of(net, images))
    boxes, labels, scores, *_ = deploy.graph(net, SIZE, suppress=True, threshold=1.0)(images.float())
    assert boxes.abs().max() == scores.max() == 0
    assert labels.max() == -1


def test_metadata_batch_and_pictures(onnx, tmp_path):
    net, given = saved(tmp_path, "resnet18", (32, 64))
    folder = drawn.draw_voc(tmp_path / "voc", images=3, seed=0) / "JPEGImages"
    out = tmp_path / "net.onnx"
    largest = export.main([given, "--out", str(out), "--batch", "2", "--check-images", str(folder)])
    assert largest.keys() == {"scores"}
    file = onnx.load(out)
    assert shapes_of(file.graph.input) == {"images": [2, 3, 32, 64]}
    assert b"site-packages" not in out.read_bytes()
    about = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(about["classes"]) == net.classes
    assert json.loads(about["size"]) == [32, 64]
    assert json.loads(about["mean"]) == list(net.image_mean)
    assert json.loads(about["std"]) == list(net.image_std)
    assert (about["architecture"], about["mean_order"]) == ("resnet18", "rgb")
    assert about["version"].startswith("sightline ")
    with pytest.raises(Exception, match="Got: 1 Expected: 2"):  # onnxruntime's own class
        exports.run_file(out, torch.zeros(1, 3, 32, 64, dtype=torch.uint8))


def test_a_file_that_differs_is_not_kept(onnx, tmp_path):
    _, given = saved(tmp_path, "resnet18", (32, 32))
    out = tmp_path / "net.onnx"
    out.write_text("the one before")
    with pytest.raises(export.NotKept, match=r"net.onnx: not kept: the difference is above --tolerance 0"):
        export.main([given, "--out", str(out), "--tolerance", "0"])
    assert out.read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "net.onnx"]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    _, given = saved(tmp_path, "resnet18", (32, 32))
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"no onnx here: pip install -r requirements-export.txt"):
        export.main([given])


def test_fits():
    assert export.fits("boxes", 0.01, 300.0, 1e-3)
    assert not export.fits("boxes", 0.31, 300.0, 1e-3)
    assert not export.fits("scores", 0.01, 0.5, 1e-3)
    assert not export.fits("scores", float("nan"), 0.5, 1e-3)
    assert not export.fits("labels", 1.0, 1999.0, 1e-3)


def test_averaged_weights_are_exported(tmp_path, capsys):
    net = models.build("mb1-ssd-lite", 2)
    averaged = {name: value + 1 for name, value in net.state_dict().items()}
    given = exports.checkpoint(net, tmp_path / "best.pt", (300, 300), ema={"model": averaged, "updates": 3})
    export.main([given, "--weights", str(tmp_path / "bare.pth")])
    assert "averaged weights" in capsys.readouterr().out
    torch.testing.assert_close(torch.load(tmp_path / "bare.pth"), averaged, rtol=0, atol=0)


@torch.no_grad()
def test_radar_in_a_graph(onnx, tmp_path):
    """Boxes of many sizes and depths, so that returns are found and rectangles cover each other."""
    net = models.build("centerfusion_resnet18", 3).eval()
    for name, bias in (("wh", 12.0), ("dim", 9.0), ("dep", -3.2)):
        torch.nn.init.normal_(getattr(net, name)[-1].weight, std=0.3)
        torch.nn.init.constant_(getattr(net, name)[-1].bias, bias)
    graph = deploy.graph(net, SIZE)
    given, own = export.feeds(net, graph, torch.stack(export.real_pictures("", SIZE)[:2]))
    outputs = net(*own)
    assert 0.02 < (outputs["pc_hm"] > 0).float().mean() < 0.98
    assert outputs["pc_hm"].unique().numel() > 10
    torch.testing.assert_close(dict(zip(graph.outputs, graph(*given))), outputs, rtol=1e-5, atol=1e-5)
    for threshold, surest_last in itertools.product(radar.THRESHOLDS, (False, True)):
        expected = radar.associate_peaks(outputs, *own[1:], threshold, 50.0, surest_last=surest_last)
        found = deploy_radar.associate_peaks(outputs, *own[1:], threshold, 50.0, surest_last)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    out = tmp_path / "net.onnx"
    largest = export.main([exports.checkpoint(net, tmp_path / "best.pt", SIZE), "--out", str(out), "--dynamic-batch"])
    assert max(largest.values()) < 1e-3


@pytest.mark.parametrize("anchors", ["yhenon", "torchvision"])
def test_retinanet_weights_in_published_names(anchors, tmp_path):
    net, given = saved(tmp_path, "retinanet", depth=18, anchors=anchors)
    assert export.main([given, "--weights", str(tmp_path / "bare.pth")]) == {"weights": 0.0}
    state = torch.load(tmp_path / "bare.pth")
    assert ("fpn.P5_1.weight" in state) == (anchors == "yhenon")
    again = published.load(tmp_path / "bare.pth")
    assert (again.box_weights, again.num_classes) == (net.box_weights, 3)
    torch.testing.assert_close(dict(again.state_dict()), dict(net.state_dict()), rtol=0, atol=0)


def test_torchvision_loads_our_retinanet(tmp_path):
    net = models.build("retinanet", 3, depth=50, anchors="torchvision")
    other = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    assert other.load_state_dict(published_state(net)).missing_keys == []


def test_yhenon_names_are_all_there(shared):
    case = json.loads((shared / "upstream" / "retinanet.json").read_text())["retinanet-50-80"]
    ours = published_state(models.build("retinanet", 80, depth=50))
    assert {name: list(value.shape) for name, value in ours.items()} == case["state_dict"]


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_classifier_weights_are_torchvisions(name, tmp_path):
    _, given = saved(tmp_path, name, (64, 64))
    assert export.main([given, "--weights", str(tmp_path / "bare.pth")]) == {"weights": 0.0}
    other = getattr(torchvision.models, name)(num_classes=3)
    other.load_state_dict(torch.load(tmp_path / "bare.pth"))


def test_weights_that_would_be_read_wrongly_are_refused(tmp_path):
    _, given = saved(tmp_path, "retinanet", depth=18, anchor_scale=2.0)
    with pytest.raises(WeightsError, match=r"bare.pth: bare weights cannot say anchor_scale 2.0: .* takes 4.0"):
        export.main([given, "--weights", str(tmp_path / "bare.pth")])
    assert not (tmp_path / "bare.pth").exists()


def test_what_a_network_has_no_graph_for():
    with pytest.raises(WeightsError, match="jetson-inference reads no retinanet"):
        deploy.graph(models.build("retinanet", 2, depth=18), SIZE, "jetson")
    with pytest.raises(WeightsError, match="resnet18 gives no boxes to suppress; leave --nms out"):
        deploy.graph(models.build("resnet18", 2), SIZE, suppress=True)
    with pytest.raises(WeightsError, match="jetson-inference suppresses by itself"):
        deploy.graph(models.build("mb1-ssd-lite", 2), (300, 300), "jetson", suppress=True)
    with pytest.raises(WeightsError, match=r"no ONNX file of maskrcnn_resnet18: .* Tried: torch.export"):
        deploy.graph(models.build("maskrcnn_resnet18", 2), SIZE)


def test_flags_that_do_not_fit(onnx, tmp_path, capsys):
    _, given = saved(tmp_path, "retinanet", depth=18)
    for words, line in (
        (["--batch", "2", "--dynamic-batch"], "give one of them"),
        (["--layout", "jetson", "--batch", "2"], "one picture at a time"),
        (["--threshold", "0.5"], "add --nms"),
    ):
        with pytest.raises(SystemExit, match="2"):
            export.main([given, *words])
        assert line in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"--size 100 128: retinanet takes multiples of 32"):
        export.main([given, "--size", "100", "128"])
    with pytest.raises(export.DataError, match="no picture in it"):
        export.main([given, "--check-images", str(tmp_path)])
