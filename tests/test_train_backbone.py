"""train_backbone.py as a person runs it, on drawn data small enough for seconds."""

import json
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
import train_backbone
import train_ssd
from data import DataError, drawn
from models import WeightsError
from tests.scripts import fingerprint, last_line, launch, tensors, wait_for
from training import checkpoints, flags, log

SMALL = ["--resolution", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--precision", "fp32"]
SMALL += ["--lr", "0.01", "--log-level", "warning"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return drawn.draw_imagefolder(tmp_path_factory.mktemp("drawn") / "shapes", images=30, seed=1)


def words(data, out, *more):
    return [*SMALL, "--data", str(data), "--model-dir", str(out), *map(str, more)]


def train(data, out, *more):
    return train_backbone.main(words(data, out, *more))


def test_trains_evaluates_and_leaves_a_whole_run(shapes, tmp_path, capsys):
    metrics = train(shapes, tmp_path, "--max-steps", 3, "--debug-steps", 1, "--ema", 0.9)
    assert "ground truth scored as predictions: top-1 1.000" in capsys.readouterr().out
    assert set(metrics) == {"loss", "top1", "top5"} and 0 <= metrics["top1"] <= metrics["top5"] <= 1
    for name in ("last.pt", "best.pt", "backbone.pt", "flags.json", "versions.json", "metrics.jsonl"):
        assert (tmp_path / name).is_file(), name
    events = EventAccumulator(str(tmp_path)).Reload().Tags()
    wanted = {f"{name}/{part}" for name in train_backbone.TAGS.values() for part in ("train", "val")}
    assert wanted | {"lr", "speed/images_per_second"} <= set(events["scalars"])
    assert len(events["images"]) == 1
    net = models.load(tmp_path / "backbone.pt")
    assert (net.name, net.classes, net.image_size) == ("resnet18", sorted(net.classes), (32, 32))
    best = checkpoints.read(tmp_path / "best.pt")["ema"]["model"]
    torch.testing.assert_close(net.state_dict(), best, rtol=0, atol=0)  # the averages, which were judged


@pytest.mark.parametrize("arch", ["resnet50", "mobilenet_v2", "dla34"])  # VGG's gigabytes are left to test_models
def test_other_networks_train(shapes, tmp_path, arch):
    assert train(shapes, tmp_path, "--arch", arch, "--max-steps", 1, "--resolution", 64)["loss"] > 0
    assert models.load(tmp_path / "backbone.pt").name == arch


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1"])  # the latter drops out at random
def test_resume_is_exact(shapes, tmp_path, workers, arch):
    more = ["--workers", workers, "--arch", arch, "--save-every-steps", 4, "--ema", 0.9, "--validation-epochs", 9]
    more += ["--mixup", 0.2, "--cutmix", 1.0, "--erase", 0.5, "--label-smoothing", 0.1, "--max-steps", 7]
    train(shapes, tmp_path / "whole", *more)
    train(shapes, tmp_path / "cut", *more, "--resume", tmp_path / "whole" / "step_000004.pt")
    whole, cut = (checkpoints.read(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 7
    assert checkpoints.fingerprint(whole) == checkpoints.fingerprint(cut)
    torch.testing.assert_close(whole["ema"], cut["ema"], rtol=0, atol=0)


def test_workers_change_nothing(shapes, tmp_path):
    for workers in (0, 1, 2):
        train(shapes, tmp_path / str(workers), "--workers", workers, "--max-steps", 3, "--erase", 0.5)
    assert fingerprint(tmp_path / "0") == fingerprint(tmp_path / "1") == fingerprint(tmp_path / "2")


def test_sigterm_saves_and_a_killed_run_resumes_to_the_same_weights(shapes, tmp_path):
    more = ["--save-every-steps", 3, "--max-steps", 6, "--validation-epochs", 9]
    train(shapes, tmp_path / "whole", *more)
    process = launch("train_backbone.py", *words(shapes, tmp_path / "killed", *more))
    wait_for(tmp_path / "killed" / "step_000003.pt", process)
    process.kill()
    process.communicate()
    train(shapes, tmp_path / "killed", *more, "--resume", "auto")
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")
    more = ["--epochs", 1000, "--validation-epochs", 1000, "--debug-steps", 1]
    process = launch("train_backbone.py", *words(shapes, tmp_path / "ended", *more))
    wait_for(tmp_path / "ended" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert checkpoints.read(tmp_path / "ended" / "last.pt")["step"] == last_line(tmp_path / "ended")["step"]


def test_two_processes_equal_one(shapes, tmp_path):
    more = ["--freeze-bn", "--batch-size", 6, "--max-steps", 3, "--lr", 1e-3]
    train(shapes, tmp_path / "one", *more)
    process = launch("train_backbone.py", *words(shapes, tmp_path / "two", *more), processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    torch.testing.assert_close(tensors(tmp_path / "two"), tensors(tmp_path / "one"), rtol=1e-5, atol=1e-5)
    one, two = last_line(tmp_path / "one"), last_line(tmp_path / "two")
    assert one.keys() == two.keys()
    for tag in one:
        assert two[tag] == pytest.approx(one[tag], rel=1e-4, abs=1e-6), tag


def test_accumulation_equals_the_whole_batch(shapes, tmp_path):
    more = ["--max-steps", 2, "--freeze-bn", "--mixup", 0.2]
    train(shapes, tmp_path / "whole", *more)
    train(shapes, tmp_path / "pieces", *more, "--accumulate", 4)
    torch.testing.assert_close(tensors(tmp_path / "pieces"), tensors(tmp_path / "whole"), rtol=1e-5, atol=1e-5)


def test_schedules_by_epochs_and_by_steps(shapes, tmp_path):
    def rates(name, *more):
        train(shapes, tmp_path / name, "--debug-steps", 1, "--lr", 1e-3, "--validation-epochs", 99, *more)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line["lr"] for line in lines if "lr" in line]

    assert rates("steps", "--steps", 6, "--milestone-steps", "2,4") == pytest.approx(
        [1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2
    )
    by_epochs = rates("epochs", "--epochs", 2, "--milestones", 1, "--batch-size", 13)
    assert by_epochs == pytest.approx([1e-3] * 2 + [1e-4] * 2)
    assert rates("cosine", "--steps", 4, "--scheduler", "cosine")[2] == pytest.approx(5e-4)


def test_validation_by_steps(shapes, tmp_path):
    train(shapes, tmp_path, "--steps", 5, "--validation-steps", 2, "--debug-steps", 9)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "Accuracy top-1/val" in line] == [2, 4, 5]


def test_a_backbone_starts_another_and_an_ssd(shapes, drawn_voc, tmp_path, capsys):
    """Weights for another class count lose their last layer alone; the detector says how many tensors it took."""
    train(shapes, tmp_path / "first", "--arch", "mobilenet_v1", "--max-steps", 2)
    file = tmp_path / "first" / "backbone.pt"
    train(shapes, tmp_path / "second", "--arch", "mobilenet_v1", "--weights", file, "--max-steps", 1, "--lr", 0)
    given, taken = torch.load(file, weights_only=True)["model"], tensors(tmp_path / "second")
    torch.testing.assert_close(taken["model.3.0.weight"], given["model.3.0.weight"], rtol=0, atol=0)
    small = ["--resolution", "96", "--workers", "0", "--device", "cpu", "--max-steps", "1", "--log-level", "warning"]
    data = ["--dataset-type", "voc", "--data", str(drawn_voc)]
    train_ssd.main([*small, *data, "--base-net", str(file), "--model-dir", str(tmp_path / "ssd")])
    assert "162 of 162 tensors of the base net taken" in capsys.readouterr().out
    wrong = ["--net", "vgg16-ssd", "--base-net", str(file), "--model-dir", str(tmp_path / "wrong")]
    with pytest.raises(WeightsError, match="holds a mobilenet_v1, but vgg16-ssd stands on vgg16"):
        train_ssd.main([*small, *data, *wrong])


def test_eval_only_writes_tables(shapes, tmp_path):
    train(shapes, tmp_path, "--max-steps", 1)
    before = (tmp_path / "last.pt").read_bytes()
    metrics = train(shapes, tmp_path, "--resume", "auto", "--eval-only")
    assert 0 <= metrics["top1"] <= 1
    assert (tmp_path / "per_class.csv").is_file() and (tmp_path / "confusion.csv").is_file()
    assert (tmp_path / "last.pt").read_bytes() == before


def test_mistakes_are_told(shapes, tmp_path):
    with pytest.raises(DataError, match="train"):
        train(tmp_path / "nothing", tmp_path / "run")
    train(shapes, tmp_path / "run", "--max-steps", 1)
    with pytest.raises(flags.UsageError, match="--resume auto"):
        train(shapes, tmp_path / "run", "--max-steps", 1)
    with pytest.raises(flags.UsageError, match="--monitor"):
        train(shapes, tmp_path / "run", "--monitor", "mAP", "--overwrite")


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--lr -1", "--learning-rate/--lr"),
        ("--lr inf", "--learning-rate/--lr"),
        ("--erase 2", "--erase"),
        ("--label-smoothing 1.5", "--label-smoothing"),
        ("--mixup -1", "--mixup"),
        ("--cutmix nan", "--cutmix"),
        ("--jitter -1", "--jitter"),
        ("--crop-scale 0.5 1.1", "--crop-scale"),
    ],
)
def test_numbers_out_of_range_are_refused(words, flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_backbone.main(words.split())
    assert f"argument {flag}: " in capsys.readouterr().err


def test_flags_that_do_not_go_together(shapes, tmp_path):
    with pytest.raises(flags.UsageError, match="--width-mult: resnet18 has one width; leave it out, or give --arch"):
        train(shapes, tmp_path, "--width-mult", 0.5)
    with pytest.raises(flags.UsageError, match="--val-resize 40: give 0, or at least the 48 pixels cut out"):
        train(shapes, tmp_path, "--val-resolution", 48, "--val-resize", 40)
    assert not list(tmp_path.iterdir())


def test_validation_at_another_size(shapes, tmp_path, monkeypatch):
    """It is what the network is judged and handed on at; training keeps its own."""
    sizes, real = [], train_backbone.normalize

    def normalize(images, *moments):
        sizes.append(tuple(images.shape[-2:]))
        return real(images, *moments)

    monkeypatch.setattr(train_backbone, "normalize", normalize)
    train(shapes, tmp_path, "--val-resolution", 48, "--max-steps", 1)
    assert set(sizes[:1]) == {(32, 32)} and set(sizes[1:]) == {(48, 48)}
    assert models.load(tmp_path / "backbone.pt").image_size == (48, 48)
    recipe = train_backbone.parse_args(["--config", "configs/resnet50_imagenet.toml"])  # torchvision's 176, 232, 224
    assert (recipe.resolution, recipe.val_resize, recipe.val_resolution) == (176, 232, 224)


def test_eval_only_refuses_weights_of_other_classes(shapes, tmp_path):
    train(shapes, tmp_path / "run", "--max-steps", 1)
    file = tmp_path / "run" / "backbone.pt"
    more = ["--weights", file, "--eval-only"]
    saved = torch.load(file, weights_only=True)
    assert train(shapes, tmp_path / "good", *more).keys() == {"loss", "top1", "top5"}
    torch.save(saved | {"classes": saved["classes"][::-1]}, file)
    with pytest.raises(WeightsError, match=r"its 5 classes are \(.*\), the data's 5 \(.*\); give the data"):
        train(shapes, tmp_path / "bad", *more)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(shapes, tmp_path):
    more = ["--lr", 1e30, "--save-every-steps", 1, "--max-steps", 8, "--freeze-bn", "--validation-epochs", 99]
    with pytest.raises(log.NonFinite):
        train(shapes, tmp_path, *more)
    report = json.loads((tmp_path / "nan_report.json").read_text())
    assert len(report["images"]) == 4
    assert checkpoints.read(tmp_path / "last.pt")["step"] < report["step"]


def test_check_data_names_a_broken_picture(shapes, tmp_path):
    assert train(shapes, tmp_path / "run", "--check-data") == {}
    data = drawn.draw_imagefolder(tmp_path / "data", images=20, seed=2)
    broken = sorted(data.rglob("*.jpg"))[0]
    broken.write_bytes(broken.read_bytes()[:300])
    for name in ("train/bare", "val/bare", "val/other"):
        (data / name).mkdir()
    process = launch("train_backbone.py", *words(data, tmp_path / "run", "--check-data"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "5 faults in the data" in errors and "Traceback" not in errors
    report = json.loads((tmp_path / "run" / "data_faults.json").read_text())
    faults = [Path(fault["path"]).relative_to(data) for fault in report["faults"]]
    assert [str(path) for path in faults[:-1]] == ["train/bare", "val/bare", "val/other", "val/other"]
    assert faults[-1] == broken.relative_to(data)
    for name in ("train/bare", "val/bare", "val/other"):
        (data / name).rmdir()
    assert train(data, tmp_path / "skipped", "--bad-images", "skip", "--max-steps", 1)["loss"] > 0
    for file in (data / "val").rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="no picture left for val"):
        train(data, tmp_path / "none", "--bad-images", "skip")


def test_preflight(shapes, tmp_path, capsys):
    train(shapes, tmp_path, "--preflight")
    assert "peak GPU memory" in capsys.readouterr().out
    assert not (tmp_path / "last.pt").exists()
