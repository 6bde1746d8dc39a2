"""export.py: what its files take and return, their metadata, bare weights, and what is refused."""

import json

import onnx
import pytest
import torch
import torchvision
from torchvision.transforms.v2.functional import to_pil_image

import export
import models
import synthetic
from models import pretrained
from models.pretrained.retinanet import published_state
from ops import nms
from ops.images import normalize
from tests import export_helpers
from utils.errors import DataError, UsageError, WeightsError, WriteError

pytestmark = pytest.mark.slow

SIZE = (96, 128)
DETECTORS = [(name, {}, (160, 160)) for name in ("mb1-ssd", "mb2-ssd-lite", "sq-ssd-lite")]
DETECTORS += [("vgg16-ssd", {}, (272, 272)), ("retinanet", {"depth": 18}, SIZE)]


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def saved(tmp_path, name, size=SIZE, classes=3, **arguments):
    """(network, path of its checkpoint)."""
    net = export_helpers.randomize(models.build(name, classes, **arguments), size)
    return net, export_helpers.save_checkpoint(net, tmp_path / "best.pt", size)


def shapes_of(values):
    return {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}


@pytest.mark.parametrize(("name", "arguments", "size"), DETECTORS)
def test_detectors(name, arguments, size, tmp_path):
    """onnxruntime finds the boxes of evaluation within 1e-3 pixels, and exactly its classes, at any batch size."""
    net, given = saved(tmp_path, name, size, **arguments)
    to_pil_image(export_helpers.generated_images(size, 1)[0]).save(tmp_path / "one.png")  # fewer than by default
    export.main([given, "--out", str(tmp_path / "net.onnx"), "--dynamic-batch", "--check-images", str(tmp_path)])
    for count in (1, 3):
        images = export_helpers.generated_images(size, count)
        outputs = export_helpers.run_onnx(tmp_path / "net.onnx", images)
        detections = export_helpers.detect_in_candidates(net, outputs, size)
        export_helpers.assert_same_detections(detections, export_helpers.detect(net, images))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_classifiers(name, tmp_path):
    net, given = saved(tmp_path, name, (64, 64))
    export.main([given, "--out", str(tmp_path / "net.onnx"), "--dynamic-batch"])
    for count in (1, 3):
        images = export_helpers.generated_images((64, 64), count)
        with torch.no_grad():
            expected = net(normalize(images, net.image_mean, net.image_std)).softmax(1)
        assert expected.amax() - expected.amin() > 0.01
        scores = export_helpers.run_onnx(tmp_path / "net.onnx", images)["scores"]
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
        assert scores.argmax(1).tolist() == expected.argmax(1).tolist()


@pytest.mark.parametrize(("name", "arguments"), [("mb1-ssd-lite", {}), ("retinanet", {"depth": 18})])
def test_nms_in_the_graph(name, arguments, tmp_path):
    net, given = saved(tmp_path, name, **arguments)
    out = tmp_path / "net.onnx"
    largest = export.main([given, "--out", str(out), "--nms", "--dynamic-batch"])
    assert largest["labels"] == 0
    rows = 200 if name == "mb1-ssd-lite" else 100
    graph = onnx.load(out).graph
    inputs, sizes = {"images": ["batch", 3, *SIZE]}, ()
    if name == "retinanet":
        inputs, sizes = inputs | {"sizes": ["batch", 2]}, [SIZE, (50, 128), (96, 33)]
    assert shapes_of(graph.input) == inputs
    outputs = {"boxes": ["batch", rows, 4], "labels": ["batch", rows], "scores": ["batch", rows]}
    assert shapes_of(graph.output) == outputs
    images = export_helpers.generated_images(SIZE)
    outputs = export_helpers.run_onnx(out, images, sizes=sizes)
    assert (outputs["scores"][outputs["labels"] < 0] == 0).all()
    detections = export_helpers.without_unused_rows(outputs)
    expected = [export_helpers.detect_alone(net, *image) for image in zip(images, sizes)]
    export_helpers.assert_same_detections(detections, expected or export_helpers.detect(net, images))


@pytest.mark.parametrize(("size", "sides"), [((160, 160), (96, 128)), ((32, 96), (32, 96))])
def test_the_size_of_the_input_is_not_that_of_the_images(size, sides, tmp_path):
    """They are resized as in training, and are part of the input; or to what fits."""
    _, given = saved(tmp_path, "retinanet", depth=18)
    out = tmp_path / "net.onnx"
    export.main([given, "--out", str(out), "--nms", "--size", *map(str, size)])
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(out).metadata_props if "side" in entry.key}
    assert metadata == {"min_side": sides[0], "max_side": sides[1]}


def test_jetson_layout(tmp_path, capsys):
    net, given = saved(tmp_path, "mb1-ssd", (160, 160), priors="jetson")
    out, labels = tmp_path / "new" / "ssd.onnx", tmp_path / "new" / "labels.txt"
    labels.parent.mkdir()
    labels.write_text("BACKGROUND\nclass 0\nclass 2\nclass 1\n")
    line = rf"{labels}: would be overwritten with other names \(BACKGROUND, class 0, class 1, class 2\)"
    with pytest.raises(UsageError, match=line):
        export.main([given, "--out", str(out), "--layout", "jetson"])
    labels.write_text("BACKGROUND\nclass 0\n\nclass 1\r\nclass 2")  # the same names
    largest = export.main([given, "--out", str(out), "--layout", "jetson"])
    assert max(largest.values()) < 1e-3
    graph, priors = onnx.load(out).graph, len(net.anchors((160, 160)))
    assert shapes_of(graph.input) == {"input_0": [1, 3, 160, 160]}
    assert shapes_of(graph.output) == {"scores": [1, priors, 4], "boxes": [1, priors, 4]}
    assert labels.read_text() == "BACKGROUND\nclass 0\nclass 1\nclass 2\n"
    images = export_helpers.generated_images((160, 160), 1)
    outputs = export_helpers.run_onnx(out, images, normalize_for=net)
    torch.testing.assert_close(outputs["scores"].sum(-1), torch.ones(1, priors))
    boxes = (outputs["boxes"] * 160).clamp(0, 160)
    detections = nms.multiclass_nms(outputs["scores"][..., 1:], boxes, (160, 160))
    export_helpers.assert_same_detections(detections, export_helpers.detect(net, images))
    assert "inputs: input_0; outputs: scores, boxes" in capsys.readouterr().out


def test_metadata_batch_size_and_check_images(tmp_path):
    net, given = saved(tmp_path, "resnet18", (32, 64))
    folder = synthetic.draw_voc(tmp_path / "voc", images=3, seed=0) / "JPEGImages"
    out = tmp_path / "net.onnx"
    largest = export.main([given, "--out", str(out), "--batch", "2", "--check-images", str(folder)])
    assert largest.keys() == {"scores"}
    file = onnx.load(out)
    assert shapes_of(file.graph.input) == {"images": [2, 3, 32, 64]}
    assert b"site-packages" not in out.read_bytes()
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(metadata["classes"]) == net.classes
    assert json.loads(metadata["size"]) == [32, 64]
    assert json.loads(metadata["mean"]) == list(net.image_mean)
    assert json.loads(metadata["std"]) == list(net.image_std)
    assert (metadata["architecture"], metadata["mean_order"]) == ("resnet18", "rgb")
    assert metadata["version"].startswith("sightline ")
    with pytest.raises(Exception, match="Got: 1 Expected: 2"):  # onnxruntime's own class
        export_helpers.run_onnx(out, torch.zeros(1, 3, 32, 64, dtype=torch.uint8))


def test_a_file_that_differs_is_not_written(tmp_path):
    _, given = saved(tmp_path, "resnet18", (32, 32))
    out = tmp_path / "net.onnx"
    out.write_text("the previous one")
    with pytest.raises(UsageError, match=r"net.onnx: not written: the difference is above --tolerance 0"):
        export.main([given, "--out", str(out), "--tolerance", "0"])
    assert out.read_text() == "the previous one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "net.onnx"]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    _, given = saved(tmp_path, "resnet18", (32, 32))
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"onnx is not installed: pip install -r requirements-export.txt"):
        export.main([given])


def test_is_close():
    assert export.is_close("boxes", 0.01, 300.0, 1e-3)
    assert not export.is_close("boxes", 0.31, 300.0, 1e-3)
    assert not export.is_close("scores", 0.01, 0.5, 1e-3)
    assert not export.is_close("scores", float("nan"), 0.5, 1e-3)
    assert not export.is_close("labels", 1.0, 1999.0, 1e-3)


def test_averaged_weights_are_exported(tmp_path, capsys):
    net = models.build("mb1-ssd-lite", 2)
    averaged = {name: value + 1 for name, value in net.state_dict().items()}
    ema = {"model": averaged, "updates": 3}
    given = export_helpers.save_checkpoint(net, tmp_path / "best.pt", (300, 300), ema=ema)
    assert given == str(tmp_path / "best.pt")
    export.main([str(tmp_path), "--state-dict", str(tmp_path / "bare.pth")])
    printed = capsys.readouterr().out
    assert f"{tmp_path}: using best.pt" in printed and "averaged weights" in printed
    torch.testing.assert_close(torch.load(tmp_path / "bare.pth"), averaged, rtol=0, atol=0)


@pytest.mark.parametrize("anchors", ["yhenon", "torchvision"])
def test_bare_weights_of_a_retinanet_have_published_names(anchors, tmp_path):
    net = models.build("retinanet", 3, depth=18, anchors=anchors)
    given = export_helpers.save_checkpoint(net, tmp_path / "best.pt", SIZE)
    assert export.main([given, "--weights", str(tmp_path / "bare.pth")]) == {"weights": 0.0}
    state = torch.load(tmp_path / "bare.pth")
    assert ("fpn.P5_1.weight" in state) == (anchors == "yhenon")
    loaded = pretrained.load(tmp_path / "bare.pth")
    assert (loaded.box_weights, loaded.num_classes) == (net.box_weights, 3)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(net.state_dict()), rtol=0, atol=0)


def test_bare_weights_and_priors(tmp_path, capsys):
    """jetson-inference's programs take their own priors at other sizes than 300."""
    net, bare = models.build("mb1-ssd", 2, priors="jetson"), tmp_path / "bare.pth"
    given = export_helpers.save_checkpoint(net, tmp_path / "best.pt", (512, 512))
    export.main([given, "--state-dict", str(bare)])
    assert "nor its priors: give it --size 512 512 --priors jetson here" in capsys.readouterr().out
    for size, written in (((300, 300), True), ((512, 512), False)):
        bare.unlink()
        given = export_helpers.save_checkpoint(models.build("mb1-ssd", 2), tmp_path / "best.pt", size)
        if written:
            export.main([given, "--state-dict", str(bare)])
            continue
        with pytest.raises(WeightsError, match=r"cannot store priors scaled: programs that read them take jetson"):
            export.main([given, "--state-dict", str(bare)])


def test_torchvision_loads_our_retinanet():
    with torch.device("meta"):
        net = models.build("retinanet", 3, depth=50, anchors="torchvision")
        other = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    assert other.load_state_dict(published_state(net), assign=True).missing_keys == []


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_bare_weights_of_a_classifier_are_torchvisions(name, tmp_path):
    _, given = saved(tmp_path, name, (64, 64))
    assert export.main([given, "--state-dict", str(tmp_path / "bare.pth")]) == {"weights": 0.0}
    getattr(torchvision.models, name)(num_classes=3).load_state_dict(torch.load(tmp_path / "bare.pth"))


def test_bare_weights_that_cannot_be_read_back_are_not_written(tmp_path):
    """Arguments that the file does not store, and weights that are not finite."""
    net = models.build("retinanet", 3, depth=18, anchor_scale=2.0)
    given = export_helpers.save_checkpoint(net, tmp_path / "best.pt", SIZE)
    line = r"bare.pth: bare weights cannot store anchor_scale 2.0: .* take 4.0"
    with pytest.raises(WeightsError, match=line):
        export.main([given, "--state-dict", str(tmp_path / "bare.pth")])
    net, given = saved(tmp_path, "resnet18", (64, 64))
    net.fc.weight.data[0, 0] = float("nan")
    export_helpers.save_checkpoint(net, tmp_path / "best.pt", (64, 64))
    with pytest.raises(WeightsError, match=r"best.pt: fc.weight contains NaN or infinity"):
        export.main([given, "--state-dict", str(tmp_path / "bare.pth")])
    assert not (tmp_path / "bare.pth").exists()


def test_flags_that_do_not_fit(tmp_path, capsys):
    net = models.build("retinanet", 3, depth=18)
    given = export_helpers.save_checkpoint(net, tmp_path / "best.pt", SIZE)
    for words, line in (
        (["--batch", "2", "--dynamic-batch"], "give one of them"),
        (["--layout", "jetson", "--batch", "2"], "one image at a time"),
        (["--threshold", "0.5"], "add --nms"),
    ):
        with pytest.raises(SystemExit, match="2"):
            export.main([given, *words])
        assert line in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"--size 100 128: retinanet needs multiples of 32"):
        export.main([given, "--size", "100", "128"])
    with pytest.raises(DataError, match="no such folder, or no image in it"):
        export.main([given, "--check-images", str(tmp_path)])
    with pytest.raises(WriteError, match=r"best.pt/x.pth: not written: .*, or choose another folder"):
        export.main([given, "--state-dict", str(tmp_path / "best.pt" / "x.pth")])
