"""What train_backbone.py alone does; tests/test_scripts.py has what all scripts do."""

import json
from pathlib import Path

import pytest
import torch

import models
import synthetic
import train_backbone
from tests.script_helpers import Script, last, log_lines
from utils.errors import DataError, UsageError, WeightsError

pytestmark = pytest.mark.slow


@pytest.fixture
def script(drawn):
    return Script("backbone", drawn("backbone"))


def test_the_best_averaged_weights_are_exported(script, tmp_path, capsys):
    metrics = script.main(tmp_path, "--max-steps", 2, "--ema", 0.9)
    assert "ground truth scored as predictions: top-1 1.000" in capsys.readouterr().out
    assert set(metrics) == {"loss", "top1", "top5"} and 0 <= metrics["top1"] <= metrics["top5"] <= 1
    net = models.load(tmp_path / "backbone.pt")
    assert (net.name, net.classes, net.image_size) == ("resnet18", sorted(net.classes), (32, 32))
    best = torch.load(tmp_path / "best.pt", weights_only=True)["ema"]["model"]
    torch.testing.assert_close(dict(net.state_dict()), best, rtol=0, atol=0)


def test_no_backbone_file_without_a_better_validation(script, tmp_path, capsys):
    """A run that continues in another folder and never improves writes no backbone.pt there, nor names one."""
    more = ["--lr", 0, "--freeze-bn"]
    script.main(tmp_path / "first", *more, "--max-steps", 1)
    script.main(tmp_path / "second", *more, "--max-steps", 2, "--resume", tmp_path / "first")
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("best top1"))
    assert first.endswith("backbone.pt") and second.endswith("at step 1")


@pytest.mark.parametrize("arch", ["resnet50", "squeezenet1_1", "mobilenet_v2", "dla34"])  # vgg16: see tests/models
def test_other_networks_train(script, tmp_path, arch):
    assert script.main(tmp_path, "--arch", arch, "--max-steps", 1, "--resolution", 64)["loss"] > 0
    assert models.load(tmp_path / "backbone.pt").name == arch


def test_schedules_by_epochs_and_by_steps(script, tmp_path):
    def rates(name, *more):
        script.main(tmp_path / name, "--log-every", 1, "--lr", 1e-3, "--validation-epochs", 99, *more)
        return [line["lr"] for line in log_lines(tmp_path / name) if "lr" in line]

    by_steps = rates("steps", "--steps", 6, "--milestone-steps", "2,4")
    assert by_steps == pytest.approx([1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2)
    by_epochs = rates("epochs", "--epochs", 2, "--milestones", 1, "--batch-size", 13)
    assert by_epochs == pytest.approx([1e-3] * 2 + [1e-4] * 2)
    assert rates("cosine", "--steps", 4, "--scheduler", "cosine")[2] == pytest.approx(5e-4)


def test_validation_by_steps(script, tmp_path):
    script.main(tmp_path, "--steps", 5, "--validation-steps", 2)
    assert [line["step"] for line in log_lines(tmp_path) if "val/top1" in line] == [2, 4, 5]


def test_a_backbone_starts_another_and_an_ssd(script, drawn, tmp_path, capsys):
    """For another number of classes only the last layer is new; an SSD prints how many tensors it loaded."""
    script.main(tmp_path / "first", "--arch", "mobilenet_v1", "--max-steps", 1)
    file = tmp_path / "first" / "backbone.pt"
    script.main(tmp_path / "second", "--arch", "mobilenet_v1", "--weights", file, "--max-steps", 1, "--lr", 0)
    given, loaded = torch.load(file, weights_only=True)["model"], last(tmp_path / "second")["model"]
    torch.testing.assert_close(loaded["model.3.0.weight"], given["model.3.0.weight"], rtol=0, atol=0)
    ssd = Script("ssd", drawn("ssd"))
    ssd.main(tmp_path / "ssd", "--backbone-weights", file, "--max-steps", 1)
    assert "162 of 162 tensors of the backbone loaded" in capsys.readouterr().out
    with pytest.raises(WeightsError, match=r"mobilenet_v1.* vgg16"):
        ssd.main(tmp_path / "wrong", "--arch", "vgg16-ssd", "--backbone-weights", file)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--erase 2", "--erase"),
        ("--label-smoothing 1.5", "--label-smoothing"),
        ("--mixup -1", "--mixup"),
        ("--cutmix nan", "--cutmix"),
        ("--jitter -1", "--jitter"),
        ("--crop-scale 0.5 1.1", "--crop-scale"),
    ],
)
def test_augmentation_out_of_range_is_refused(words, flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_backbone.parse_args(words.split())
    assert f"{flag}" in capsys.readouterr().err.split("error: argument ")[1].split(": ")[0]


def test_flags_that_exclude_each_other(script, tmp_path):
    with pytest.raises(UsageError, match="--width-mult: resnet18 "):
        script.main(tmp_path, "--width-mult", 0.5)
    with pytest.raises(UsageError, match="--val-resize 40: "):
        script.main(tmp_path, "--val-resolution", 48, "--val-resize", 40)
    assert not list(tmp_path.iterdir())


def test_validation_at_another_size(script, tmp_path, monkeypatch):
    """The checkpoint stores the size of validation; training has its own."""
    sizes, normalize = [], train_backbone.normalize

    def recording(images, *args):
        sizes.append(tuple(images.shape[-2:]))
        return normalize(images, *args)

    monkeypatch.setattr(train_backbone, "normalize", recording)
    script.main(tmp_path, "--val-resolution", 48, "--max-steps", 1)
    assert set(sizes[:1]) == {(32, 32)} and set(sizes[1:]) == {(48, 48)}
    assert models.load(tmp_path / "backbone.pt").image_size == (48, 48)
    recipe = train_backbone.parse_args(["--config", "configs/resnet50_imagenet.toml"])  # torchvision's 176, 232, 224
    assert (recipe.resolution, recipe.val_resize, recipe.val_resolution) == (176, 232, 224)


def test_weights_of_other_classes_are_not_evaluated(script, tmp_path):
    script.main(tmp_path / "run", "--max-steps", 1)
    file = tmp_path / "run" / "backbone.pt"
    saved = torch.load(file, weights_only=True)
    assert script.main(tmp_path / "good", "--weights", file, "--eval-only").keys() == {"loss", "top1", "top5"}
    torch.save(saved | {"classes": [f"other {name}" for name in saved["classes"]]}, file)
    with pytest.raises(DataError, match="not the checkpoint's classes: only the checkpoint has other "):
        script.main(tmp_path / "bad", "--weights", file, "--eval-only")


def test_folders_without_images_and_unreadable_images(script, tmp_path):
    data = synthetic.draw_imagefolder(tmp_path / "data", images=20, seed=2)
    broken = min(data.rglob("*.jpg"))
    broken.write_bytes(broken.read_bytes()[:300])
    empty = ("train/bare", "val/bare", "val/other")
    for name in empty:
        (data / name).mkdir()
    with pytest.raises(DataError, match="5 errors in the data"):
        script.main(tmp_path / "run", "--check-data", data=data)
    report = json.loads((tmp_path / "run" / "data_errors.json").read_text())
    paths = [Path(error["path"]).relative_to(data) for error in report["errors"]]
    assert [str(path) for path in paths[:-1]] == ["train/bare", "val/bare", "val/other", "val/other"]
    assert paths[-1] == broken.relative_to(data)
    for name in empty:
        (data / name).rmdir()
    assert script.main(tmp_path / "skipped", "--bad-images", "skip", "--max-steps", 1, data=data)["loss"] > 0
    for file in (data / "val").rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="no image left for val"):
        script.main(tmp_path / "none", "--bad-images", "skip", data=data)


def test_a_missing_folder(script, tmp_path):
    with pytest.raises(DataError, match="train"):
        script.main(tmp_path / "run", data=tmp_path / "nothing")
