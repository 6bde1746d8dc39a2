"""train_ssd.py as a person runs them, on drawn data small enough for seconds."""

import json
import os
import signal
import subprocess

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
import train_ssd
from data import DataError, drawn
from tests import scripts
from tests.scripts import last_line, tensors, wait_for
from training import checkpoints, flags, log

SMALL = ["--dataset-type", "voc", "--pretrained-ssd", "none", "--resolution", "96", "--batch-size", "4"]
SMALL += ["--workers", "0", "--device", "cpu", "--precision", "fp32", "--lr", "0.001", "--log-level", "warning"]


def train(data, out, *more):
    return train_ssd.main([*SMALL, "--data", str(data), "--model-dir", str(out), *map(str, more)])


def launch(data, out, *more, processes=0):
    words = [*SMALL, "--data", str(data), "--model-dir", str(out), *more]
    return scripts.launch("train_ssd.py", *words, processes=processes)


def test_trains_evaluates_and_leaves_a_whole_run(drawn_voc, tmp_path):
    metrics = train(drawn_voc, tmp_path, "--max-steps", 3, "--validation-mean-ap", "--debug-steps", 1, "--ema", 0.9)
    assert 0 <= metrics["mAP"] <= 1
    assert metrics["loss"] == pytest.approx(metrics["regression_loss"] + metrics["classification_loss"])
    for name in ("last.pt", "best.pt", "flags.json", "versions.json", "metrics.jsonl", "labels.txt"):
        assert (tmp_path / name).is_file(), name
    events = EventAccumulator(str(tmp_path)).Reload().Tags()
    wanted = {"Loss/train", "Loss/val", "Regression Loss/train", "Regression Loss/val", "Classification Loss/train"}
    wanted |= {"Classification Loss/val", "Mean Average Precision/val", "lr", "speed/images_per_second"}
    assert wanted <= set(events["scalars"])
    assert any(tag.startswith("Class Average Precision/") for tag in events["scalars"])
    assert any(tag.startswith("Truth left") for tag in events["images"])
    net = models.load(tmp_path / "best.pt")
    assert (net.name, net.num_classes, tuple(net.image_size)) == ("mb1-ssd", len(net.classes), (96, 96))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(drawn_voc, tmp_path, workers):
    more = ["--workers", workers, "--save-every-steps", 4, "--ema", 0.9, "--validation-epochs", 9]
    train(drawn_voc, tmp_path / "whole", *more, "--max-steps", 7)
    train(drawn_voc, tmp_path / "cut", *more, "--max-steps", 7, "--resume", tmp_path / "whole" / "step_000004.pt")
    whole, cut = (checkpoints.read(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 7
    assert checkpoints.fingerprint(whole) == checkpoints.fingerprint(cut)
    torch.testing.assert_close(whole["ema"], cut["ema"], rtol=0, atol=0)


def test_a_killed_run_resumes_to_the_same_weights(drawn_voc, tmp_path):
    more = ["--save-every-steps", 3, "--max-steps", 6, "--validation-epochs", 9]
    train(drawn_voc, tmp_path / "whole", *more)
    process = launch(drawn_voc, tmp_path / "killed", *more)
    wait_for(tmp_path / "killed" / "step_000003.pt", process)
    process.kill()
    process.communicate()
    train(drawn_voc, tmp_path / "killed", *more, "--resume", "auto")
    whole, killed = (checkpoints.read(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    assert checkpoints.fingerprint(whole) == checkpoints.fingerprint(killed)


def test_sigterm_finishes_the_step_and_saves(drawn_voc, tmp_path):
    process = launch(drawn_voc, tmp_path, "--epochs", 1000, "--validation-epochs", 1000, "--debug-steps", 1)
    wait_for(tmp_path / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    saved = checkpoints.read(tmp_path / "last.pt")
    assert saved["step"] == last_line(tmp_path)["step"]


def test_two_processes_equal_one(drawn_voc, tmp_path):
    """Most pictures lose their boxes, so that one process's share often holds none."""
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(drawn_voc), str(data)], check=True)
    for path in sorted((data / "Annotations").glob("*.xml"))[::2] + sorted((data / "Annotations").glob("*.xml"))[1::4]:
        head, *_ = path.read_text().split("\t<object>")
        path.write_text(head.replace("</annotation>", "") + "</annotation>\n")
    more = [
        "--freeze-bn",
        "--batch-size",
        2,
        "--max-steps",
        3,
        "--validation-mean-ap",
        "--lr",
        2e-4,
        "--base-net-lr",
        2e-4,
    ]
    train(data, tmp_path / "one", *more)
    process = launch(data, tmp_path / "two", *more, processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    torch.testing.assert_close(tensors(tmp_path / "two"), tensors(tmp_path / "one"), rtol=1e-5, atol=1e-5)
    one, two = last_line(tmp_path / "one"), last_line(tmp_path / "two")
    assert one.keys() == two.keys()
    for tag in one:
        assert two[tag] == pytest.approx(one[tag], rel=1e-4, abs=1e-6), tag


def test_accumulation_equals_the_whole_batch(drawn_voc, tmp_path):
    train(drawn_voc, tmp_path / "whole", "--max-steps", 2, "--freeze-bn")
    train(drawn_voc, tmp_path / "pieces", "--max-steps", 2, "--freeze-bn", "--accumulate", 4)
    torch.testing.assert_close(tensors(tmp_path / "pieces"), tensors(tmp_path / "whole"), rtol=1e-5, atol=1e-5)


def test_freezing_keeps_weights_and_statistics(drawn_voc, tmp_path):
    more = ["--save-every-steps", 1, "--max-steps", 2, "--lr", 0.1, "--base-net-lr", 0.1, "--freeze-net"]
    train(drawn_voc, tmp_path, *more)
    first, last = checkpoints.read(tmp_path / "step_000001.pt")["model"], tensors(tmp_path)
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert changed == {"classification_headers", "regression_headers"}


def test_eval_only_writes_tables(drawn_voc, tmp_path):
    train(drawn_voc, tmp_path, "--max-steps", 1)
    before = (tmp_path / "last.pt").read_bytes()
    metrics = train(drawn_voc, tmp_path, "--resume", "auto", "--eval-only")
    assert 0 <= metrics["mAP"] <= 1
    assert (tmp_path / "per_class.csv").is_file()
    assert (tmp_path / "confusion.csv").is_file()
    assert (tmp_path / "last.pt").read_bytes() == before
    with pytest.raises(flags.UsageError, match=r"box_sizes .*; give --box-sizes as in that run"):
        train(drawn_voc, tmp_path, "--resume", "auto", "--eval-only", "--box-sizes", *range(20, 160, 20))


def test_a_folder_with_a_run_is_refused(drawn_voc, tmp_path):
    train(drawn_voc, tmp_path, "--max-steps", 1)
    with pytest.raises(flags.UsageError, match="--resume auto"):
        train(drawn_voc, tmp_path, "--max-steps", 1)
    train(drawn_voc, tmp_path, "--max-steps", 1, "--overwrite")


def test_reordered_classes_are_refused_or_remapped(drawn_voc, tmp_path):
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(drawn_voc), str(data)], check=True)
    train(data, tmp_path / "run", "--max-steps", 1)
    kept = train(data, tmp_path / "run", "--resume", "auto", "--eval-only")
    names = (data / "labels.txt").read_text().split()
    (data / "labels.txt").write_text("\n".join(reversed(names)) + "\n")
    with pytest.raises(DataError, match="--remap-by-name"):
        train(data, tmp_path / "run", "--resume", "auto", "--eval-only")
    assert train(data, tmp_path / "run", "--resume", "auto", "--eval-only", "--remap-by-name") == kept


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(drawn_voc, tmp_path):
    more = ["--lr", 1e30, "--base-net-lr", 1e30, "--save-every-steps", 1, "--max-steps", 8, "--warmup-steps", 0]
    with pytest.raises(log.NonFinite):
        train(drawn_voc, tmp_path, *more)
    report = json.loads((tmp_path / "nan_report.json").read_text())
    assert {"step", "images", "losses", "lr"} <= set(report)
    assert len(report["images"]) == len(report["paths"]) == 4 and all(map(os.path.isfile, report["paths"]))
    assert checkpoints.read(tmp_path / "last.pt")["step"] < report["step"]


def test_check_data(drawn_voc, tmp_path):
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(drawn_voc), str(data)], check=True)
    assert train(data, tmp_path / "run", "--check-data") == {}
    picture = sorted((data / "JPEGImages").iterdir())[0]
    picture.write_bytes(picture.read_bytes()[:500])
    process = launch(data, tmp_path / "run", "--check-data")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert picture.name in errors
    assert "Traceback" not in errors
    assert len(json.loads((tmp_path / "run" / "data_faults.json").read_text())["faults"]) == 1


def test_preflight(drawn_voc, tmp_path, capsys):
    train(drawn_voc, tmp_path, "--preflight", "--log-level", "info")
    assert "peak GPU memory" in capsys.readouterr().out
    assert not (tmp_path / "last.pt").exists()
    train(drawn_voc, tmp_path, "--max-steps", 1)
    train(drawn_voc, tmp_path, "--preflight", "--overwrite")
    assert checkpoints.read(tmp_path / "last.pt")["step"] == 1


@pytest.mark.parametrize(
    "command", ["--dataset-type=voc --data={} --model-dir={} --resolution=96 --batch-size=4 --lr=0.01"]
)
def test_command_lines_of_the_source_run_unchanged(drawn_voc, tmp_path, command):
    words = command.format(drawn_voc, tmp_path).split()
    train_ssd.main([*words, "--max_steps=1", "--pretrained_ssd=none", "--workers=0", "--use_cuda=false"])
    assert (tmp_path / "last.pt").is_file()


@pytest.mark.parametrize("layout", ["coco", "csv", "open_images"])
def test_the_other_layouts_train_too(tmp_path, layout, capsys):
    draw = {"coco": drawn.draw_coco, "csv": drawn.draw_csv, "open_images": drawn.draw_open_images}[layout]
    data = draw(tmp_path / "data", images=12, seed=2)
    words = [*SMALL, "--data", str(data), "--model-dir", str(tmp_path / "run"), "--validation-mean-ap"]
    metrics = train_ssd.main([*words, "--dataset-type", layout, "--max-steps", "1"])
    assert 0 <= metrics["mAP"] <= 1
    assert "ground truth scored as predictions: mAP 1.000" in capsys.readouterr().out
