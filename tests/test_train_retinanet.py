"""train_retinanet.py as a person runs it, on drawn data small enough for seconds."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
import train_backbone
import train_retinanet
from data import DataError, drawn
from evaluation.coco import MEASURES
from models import WeightsError
from tests.scripts import fingerprint, last_line, launch, tensors, wait_for
from training import checkpoints, log
from training.flags import UsageError

SMALL = ["--depth", "18", "--backbone-weights", "none", "--min-side", "64", "--max-side", "96", "--batch-size", "4"]
SMALL += ["--workers", "0", "--device", "cpu", "--precision", "fp32", "--lr", "1e-4", "--log-level", "warning"]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return drawn.draw_coco(tmp_path_factory.mktemp("drawn") / "coco", images=24, seed=1)


def words(data, out, *more):
    return [*SMALL, "--coco_path", str(data), "--model-dir", str(out), *map(str, more)]


def train(data, out, *more):
    return train_retinanet.main(words(data, out, *more))


def test_trains_evaluates_and_leaves_a_whole_run(coco, tmp_path, capsys):
    metrics = train(coco, tmp_path, "--max-steps", 3, "--debug-steps", 1, "--ema", 0.9, "--no-freeze-bn")
    assert "ground truth scored as predictions: AP 1.000" in capsys.readouterr().out
    assert set(MEASURES) < set(metrics) and 0 <= metrics["mAP"] <= 1
    assert metrics["loss"] == pytest.approx(metrics["regression_loss"] + metrics["classification_loss"])
    for name in ("last.pt", "best.pt", "flags.json", "versions.json", "metrics.jsonl", "detections.json"):
        assert (tmp_path / name).is_file(), name
    events = EventAccumulator(str(tmp_path)).Reload().Tags()
    wanted = {f"{name}/{part}" for name in train_retinanet.TAGS.values() for part in ("train", "val")}
    wanted |= {"Mean Average Precision/val", "COCO/AP", "COCO/AR_100", "Running Loss/train", "lr"}
    assert wanted <= set(events["scalars"])
    assert any(tag.startswith("Class Average Precision/") for tag in events["scalars"])
    assert any(tag.startswith("Truth left") for tag in events["images"])
    net = models.load(tmp_path / "best.pt")
    assert (net.name, net.num_classes, net.min_side, net.max_side) == ("retinanet", 5, 64, 96)


def test_the_twelve_numbers_are_those_of_pycocotools_on_the_written_file(coco, tmp_path):
    """A threshold of 0 lets an untrained network's boxes through, and a few of them overlap the truth."""
    more = ["--max-steps", 30, "--score-threshold", 0, "--lr", 1e-3, "--no-freeze-bn", "--match-best"]
    metrics = train(coco, tmp_path, *more, "--validation-epochs", 99)
    truth = COCO(str(coco / "annotations" / "instances_val2017.json"))
    scored = COCOeval(truth, truth.loadRes(str(tmp_path / "detections.json")), "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    assert scored.stats[8] > 0  # AR_100: something was found
    assert [metrics[name] for name in MEASURES] == pytest.approx(scored.stats.tolist(), abs=1e-12)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(coco, tmp_path, workers):
    more = ["--workers", workers, "--save-every-steps", 4, "--ema", 0.9, "--validation-epochs", 9, "--max-steps", 7]
    train(coco, tmp_path / "whole", *more)
    train(coco, tmp_path / "cut", *more, "--resume", tmp_path / "whole" / "step_000004.pt")
    whole, cut = (checkpoints.read(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 7
    assert checkpoints.fingerprint(whole) == checkpoints.fingerprint(cut)
    torch.testing.assert_close(whole["ema"], cut["ema"], rtol=0, atol=0)
    assert whole["plateau"] == cut["plateau"]


def test_workers_change_nothing(coco, tmp_path):
    for workers in (0, 1):
        train(coco, tmp_path / str(workers), "--workers", workers, "--max-steps", 3, "--min-side", 48, 64)
    assert fingerprint(tmp_path / "0") == fingerprint(tmp_path / "1")


def test_sigterm_saves_and_a_killed_run_resumes_to_the_same_weights(coco, tmp_path):
    more = ["--save-every-steps", 3, "--max-steps", 6, "--validation-epochs", 9]
    train(coco, tmp_path / "whole", *more)
    process = launch("train_retinanet.py", *words(coco, tmp_path / "killed", *more))
    wait_for(tmp_path / "killed" / "step_000003.pt", process)
    process.kill()
    process.communicate()
    train(coco, tmp_path / "killed", *more, "--resume", "auto")
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")
    more = ["--epochs", 1000, "--validation-epochs", 1000, "--debug-steps", 1]
    process = launch("train_retinanet.py", *words(coco, tmp_path / "ended", *more))
    wait_for(tmp_path / "ended" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert checkpoints.read(tmp_path / "ended" / "last.pt")["step"] == last_line(tmp_path / "ended")["step"]


def test_two_processes_equal_one(coco, tmp_path):
    """Two pictures of three lose their boxes, so that one process's share often holds none."""
    data = tmp_path / "data"
    shutil.copytree(coco, data)
    path = data / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    kept = [image["id"] for image in content["images"]][::3]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    path.write_text(json.dumps(content))
    more = ["--batch-size", 2, "--max-steps", 3, "--freeze-bn", "--match-best", "--optimizer", "sgd", "--lr", 1e-3]
    train(data, tmp_path / "one", *more)
    process = launch("train_retinanet.py", *words(data, tmp_path / "two", *more), processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    torch.testing.assert_close(tensors(tmp_path / "two"), tensors(tmp_path / "one"), rtol=1e-5, atol=1e-5)
    one, two = last_line(tmp_path / "one"), last_line(tmp_path / "two")
    assert one.keys() == two.keys()
    for tag in one:
        assert two[tag] == pytest.approx(one[tag], rel=1e-4, abs=1e-6), tag


def test_accumulation_equals_the_whole_batch(coco, tmp_path):
    more = ["--max-steps", 2, "--optimizer", "sgd"]
    train(coco, tmp_path / "whole", *more)
    train(coco, tmp_path / "pieces", *more, "--accumulate", 4)
    torch.testing.assert_close(tensors(tmp_path / "pieces"), tensors(tmp_path / "whole"), rtol=1e-5, atol=1e-5)


def test_frozen_stages_and_batch_norms_stay_as_they_are(coco, tmp_path):
    more = ["--save-every-steps", 1, "--max-steps", 2, "--lr", 0.01, "--freeze-stages", 3, "--match-best"]
    train(coco, tmp_path, *more)
    first, last = checkpoints.read(tmp_path / "step_000001.pt")["model"], tensors(tmp_path)
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    frozen = ("backbone.body.conv1", "backbone.body.layer1", "backbone.body.layer2")
    assert not [name for name in changed if name.startswith(frozen) or ".bn" in name or "downsample.1" in name]
    assert "backbone.body.layer4.0.conv1.weight" in changed and "backbone.body.layer3.0.conv1.weight" in changed


def test_a_backbone_trained_here_starts_a_detector_here(coco, tmp_path, capsys):
    shapes = drawn.draw_imagefolder(tmp_path / "shapes", images=20, seed=0)
    small = ["--resolution", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--log-level", "warning"]
    for arch in ("resnet18", "mobilenet_v1"):
        run = ["--arch", arch, "--data", str(shapes), "--model-dir", str(tmp_path / arch), "--max-steps", "2"]
        train_backbone.main([*small, *run])
    file = tmp_path / "resnet18" / "backbone.pt"
    train(coco, tmp_path / "run", "--max-steps", 1, "--backbone-weights", file)
    assert "120 of 120 tensors of the backbone taken" in capsys.readouterr().out
    given, taken = torch.load(file, weights_only=True)["model"], tensors(tmp_path / "run")
    torch.testing.assert_close(taken["backbone.body.bn1.running_mean"], given["bn1.running_mean"], rtol=0, atol=0)
    with pytest.raises(WeightsError, match="holds a mobilenet_v1, but retinanet-18 stands on resnet18"):
        train(coco, tmp_path / "wrong", "--backbone-weights", tmp_path / "mobilenet_v1" / "backbone.pt")


@pytest.mark.parametrize("layout", ["csv", "voc", "open_images"])
def test_the_other_layouts_train_too(tmp_path, layout):
    data = {"csv": drawn.draw_csv, "voc": drawn.draw_voc, "open_images": drawn.draw_open_images}[layout]
    metrics = train(data(tmp_path / "data", images=12, seed=2), tmp_path / "run", "--dataset", layout, "--max-steps", 1)
    assert {"AP", "mAP"} < set(metrics)


def test_command_lines_of_the_source_run_unchanged(coco, tmp_path):
    data = drawn.draw_csv(tmp_path / "data", images=12, seed=2)
    lines = [
        f"--dataset coco --coco_path {coco} --depth 50",
        f"--dataset csv --csv_train {data}/train.csv --csv_classes {data}/classes.csv --csv_val {data}/val.csv "
        "--depth 18 --epochs 100",
    ]
    for number, line in enumerate(lines):
        more = ["--max-steps=1", "--min-side=64", "--backbone-weights=none", "--workers=0", "--device=cpu"]
        train_retinanet.main([*line.split(), *more, "--model-dir", str(tmp_path / str(number))])
        assert (tmp_path / str(number) / "last.pt").is_file()


def test_all_faults_of_a_csv_are_listed_in_one_pass(tmp_path):
    data = drawn.draw_csv(tmp_path / "data", images=12, seed=2)
    rows = list(csv.reader((data / "train.csv").open()))
    path = next(row[0] for row in rows if row[5])
    start = len(rows)
    rows += [[path, "1.5", "2.25", "40.75", "50", rows[0][5] or "disc"], [path, "90", "10", "20", "60", "disc"]]
    rows += [[path, "1", "1", "20", "20", "cube"], ["images/none.jpg", "1", "1", "20", "20", "disc"]]
    with (data / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    process = launch("train_retinanet.py", *words(data, tmp_path / "run", "--dataset", "csv", "--check-data"))
    process.communicate(timeout=60)
    assert process.returncode == 2
    faults = json.loads((tmp_path / "run" / "data_faults.json").read_text())["faults"]
    assert [fault["place"] for fault in faults] == [f"line {start + n}" for n in (2, 3, 4)]
    reasons = [fault["reason"] for fault in faults]
    assert "x2 20 <= x1 90" in reasons[0] and "cube" in reasons[1] and "none.jpg" in reasons[2]


def test_eval_only_writes_tables_and_results(coco, tmp_path):
    train(coco, tmp_path, "--max-steps", 1)
    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "detections.json").unlink()
    metrics = train(coco, tmp_path, "--resume", "auto", "--eval-only")
    assert 0 <= metrics["AP"] <= 1
    for name in ("per_class.csv", "confusion.csv", "detections.json"):
        assert (tmp_path / name).is_file(), name
    assert (tmp_path / "last.pt").read_bytes() == before
    with pytest.raises(UsageError, match=r"anchor_scale 4.0, this run's 2.0; give --anchor-scale"):
        train(coco, tmp_path, "--resume", "auto", "--eval-only", "--anchor-scale", 2)


def test_eval_only_needs_no_flag_of_the_recipe_and_takes_the_averages(coco, tmp_path):
    recipe = ["--optimizer", "adamw", "--ema", 0.9, "--lr", 0.01]
    kept = train(coco, tmp_path, "--max-steps", 3, *recipe)
    assert train(coco, tmp_path, "--resume", "auto", "--eval-only") == pytest.approx(kept)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(coco, tmp_path):
    more = ["--lr", 1e30, "--clip-norm", 0, "--optimizer", "sgd", "--save-every-steps", 1, "--max-steps", 8]
    with pytest.raises(log.NonFinite):
        train(coco, tmp_path, *more)
    report = json.loads((tmp_path / "nan_report.json").read_text())
    assert len(report["images"]) == len(report["paths"]) == 4 and all(map(os.path.isfile, report["paths"]))
    assert checkpoints.read(tmp_path / "last.pt")["step"] < report["step"]


def test_preflight_pads_the_most_and_leaves_a_run_alone(coco, tmp_path, capsys):
    train(coco, tmp_path, "--preflight", "--min-side", 64, 32)
    said = capsys.readouterr().out
    assert "preflight: 4 pictures, padded to 64 x 96" in said and "peak GPU memory" in said
    assert not (tmp_path / "last.pt").exists()
    train(coco, tmp_path, "--max-steps", 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for more in ([], ["--overwrite"]):
        train(coco, tmp_path, "--preflight", *more)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_preflight_of_two_processes_takes_half_a_batch_each(coco, tmp_path, capfd):
    process = launch("train_retinanet.py", *words(coco, tmp_path, "--preflight"), processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "preflight: 2 pictures" in capfd.readouterr().out


def test_a_full_gpu_in_preflight_is_told(coco, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_retinanet, "evaluate", full)
    with pytest.raises(UsageError, match=r"out of memory: .* next, try --accumulate 2"):
        train(coco, tmp_path, "--preflight")


def test_a_kill_in_an_evaluation_loses_no_step(coco, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(train_retinanet, "evaluate", killed)
    with pytest.raises(InterruptedError):
        train(coco, tmp_path, "--max-steps", 2)
    assert checkpoints.read(tmp_path / "last.pt")["step"] == 2


def test_a_folder_that_is_no_coco_set_is_told(tmp_path):
    with pytest.raises(DataError, match=r"no instances_train2017\.json; .* --coco-train"):
        train(tmp_path, tmp_path / "run")
