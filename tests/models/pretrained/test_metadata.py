"""What bare weights do not store: names, size and priors from flags, from a labels.txt beside the file, or assumed."""

import pytest
import torch

import models
from models.pretrained import backbones
from tests.model_helpers import checkpoint
from utils.errors import DataError, WeightsError

ANIMALS = ["ant", "bee", "cow"]


@pytest.fixture(scope="module")
def ssds():
    """State dicts of an mb1-ssd by their number of classes."""
    return {count: models.build("mb1-ssd", count).state_dict() for count in (3, 20)}


@pytest.fixture
def bare(ssds, tmp_path):
    """A file of bare mb1-ssd weights for three classes."""
    torch.save(ssds[3], tmp_path / "bare.pth")
    return tmp_path / "bare.pth"


def write_labels(path, names):
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def test_names_of_bare_weights(bare, tmp_path, capsys):
    """From --labels, else from labels.txt beside the file; a number that does not fit is an error of both files."""
    assert models.load(bare).classes is None
    printed = capsys.readouterr().out
    assert f"{bare}: contains no class names" in printed and "give them with --labels FILE" in printed
    assert f"{bare}: bare weights do not store the input size: 300 x 300, as published (else give --size)" in printed
    beside = write_labels(tmp_path / "labels.txt", ["BACKGROUND", *ANIMALS, ""])
    assert models.load(bare).classes == ANIMALS
    assert f"{bare}: class names from {beside}\n" in capsys.readouterr().out
    other = write_labels(tmp_path / "other.txt", reversed(ANIMALS))
    assert models.load(bare, labels=other).classes == ANIMALS[::-1]
    write_labels(beside, ANIMALS[:2])
    for labels in ("", beside):
        with pytest.raises(WeightsError, match=f"{beside} has 2 class names, {bare} has 3 classes; give a file"):
            models.load(bare, labels=labels)
    write_labels(beside, ["ant", "bee", "ant"])
    with pytest.raises(DataError, match=r"labels.txt: repeated: ant"):
        models.load(bare)
    with pytest.raises(DataError, match=r"gone.txt: cannot be read"):
        models.load(bare, labels=tmp_path / "gone.txt")


def test_names_of_published_weights(ssds, tmp_path, capsys):
    """A labels.txt beside them replaces the names of VOC where it has as many; else it belongs to another network."""
    torch.save(ssds[20], tmp_path / "voc.pth")
    assert models.load(tmp_path / "voc.pth").classes[14] == "person"
    assert "class names aeroplane, bicycle, bird, ... as published (else give --labels FILE)" in capsys.readouterr().out
    beside = write_labels(tmp_path / "labels.txt", ANIMALS)
    assert models.load(tmp_path / "voc.pth").classes[14] == "person"
    assert f"{beside} has 3 class names, {tmp_path / 'voc.pth'} has 20 classes: not used" in capsys.readouterr().out
    write_labels(beside, [f"class {number}" for number in range(20)])
    assert models.load(tmp_path / "voc.pth").classes[14] == "class 14"


def test_names_of_a_checkpoint(tmp_path):
    """Only --labels replaces them."""
    net = models.build("resnet18", 3)
    torch.save(checkpoint(net, image_size=32), tmp_path / "best.pt")
    labels = write_labels(tmp_path / "labels.txt", ANIMALS)
    assert models.load(tmp_path / "best.pt").classes == ["class 0", "class 1", "class 2"]
    assert models.load(tmp_path / "best.pt", labels).classes == ANIMALS


@pytest.mark.parametrize(
    ("name", "count", "width"), [("resnet18", 1000, None), ("mobilenet_v2", 5, 0.35), ("squeezenet1_1", 1000, None)]
)
def test_bare_classifiers(name, count, width, tmp_path):
    """Those of torchvision have ImageNet's names, in its order."""
    net = models.build(name, count, **({"width_mult": width} if width else {}))
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    loaded = models.load(tmp_path / "bare.pth")
    assert (loaded.name, loaded.num_classes, loaded.arguments) == (name, count, net.arguments)
    assert (loaded.image_size, loaded.training) == ((224, 224), False)
    if count == 1000:
        assert (loaded.classes[0], loaded.classes[-1], len(loaded.classes)) == ("tench", "toilet tissue", 1000)
    else:
        assert loaded.classes is None


def test_a_backbone_predicts_nothing(tmp_path):
    state = {f"features.{key}": value for key, value in models.build("mb2-ssd-lite", 2).base_net.state_dict().items()}
    assert backbones.family_of(backbones.bare_names(state), backbones.FAMILIES, "x") == "mobilenet_v2"
    torch.save(state, tmp_path / "backbone.pth")
    with pytest.raises(WeightsError, match=r"unknown weights \(first keys: features.0.0.weight, "):
        models.load(tmp_path / "backbone.pth")


def test_size(bare, tmp_path):
    assert models.load(bare, size=(300, 300)).image_size == (300, 300)
    for name, arguments, sides in (
        ("retinanet", {"depth": 18}, {"min_side": 320, "max_side": 480}),
        ("centerfusion_resnet18", {}, {"image_size": (64, 96)}),
    ):
        torch.save(checkpoint(models.build(name, 2, **arguments), **sides), tmp_path / "x.pt")
        loaded = models.load(tmp_path / "x.pt", size=(256, 192))
        if name == "retinanet":
            assert (loaded.image_size, loaded.min_side, loaded.max_side) == (
                None,
                320,
                480,
            )  # what a size means, the caller knows
        else:
            assert loaded.image_size == (256, 192)
    with pytest.raises(WeightsError, match="--size 100 192: centerfusion_resnet18 needs multiples of 32"):
        models.load(tmp_path / "x.pt", size=(100, 192))
    with pytest.raises(WeightsError, match="--priors jetson: centerfusion_resnet18 has no other priors"):
        models.load(tmp_path / "x.pt", priors="jetson")


def test_priors_of_bare_weights(bare):
    """They matter at other sizes than 300, and cannot be told from tensors."""
    jetson = models.build("mb1-ssd", 3, priors="jetson").priors((512, 512))
    with pytest.raises(WeightsError, match=r"do not store their priors, so --size 512 512 needs --priors: jetson"):
        models.load(bare, size=(512, 512))
    loaded = models.load(bare, size=(512, 512), priors="jetson")
    assert (loaded.arguments["priors"], loaded.image_size) == ("jetson", (512, 512))
    assert torch.equal(loaded.priors((512, 512)), jetson)
    loaded = models.load(bare, size=(512, 512), priors="scaled")
    assert not torch.equal(loaded.priors((512, 512)), jetson)


def test_priors_of_a_checkpoint(tmp_path):
    """They are known; one without the argument is older than it. At 300 jetson-inference's are other ones."""
    net, path = models.build("mb1-ssd", 3, priors="jetson"), tmp_path / "best.pt"
    saved = checkpoint(net, image_size=(512, 512))
    torch.save(saved, path)
    for priors, size in (("", None), ("jetson", None), ("", (640, 640))):
        loaded = models.load(path, size=size, priors=priors)
        assert loaded.arguments == net.arguments
        assert torch.equal(loaded.priors((512, 512)), net.priors((512, 512)))
    with pytest.raises(WeightsError, match="was trained with --priors jetson; leave out --priors scaled"):
        models.load(path, priors="scaled")
    with pytest.raises(WeightsError, match=r"was trained at 512 x 512 with jetson-inference's priors, .* at 300 x 300"):
        models.load(path, size=(300, 300))
    del saved["arguments"]["priors"]
    torch.save(saved, path)
    loaded = models.load(path)
    assert loaded.arguments["priors"] == "scaled"
    assert torch.equal(loaded.priors((512, 512)), models.build("mb1-ssd", 3).priors((512, 512)))
