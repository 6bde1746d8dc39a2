"""What train_retinanet.py alone does; tests/test_scripts.py has what all scripts do."""

import contextlib
import csv
import io
import json

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import models
import synthetic
import train_retinanet
from evaluation.coco import MEASURES
from tests.script_helpers import Script, finish, last
from utils.errors import DataError, UsageError, WeightsError

pytestmark = pytest.mark.slow


@pytest.fixture
def script(drawn):
    return Script("retinanet", drawn("retinanet"))


def test_loss_and_sizes(script, tmp_path, capsys):
    metrics = script.main(tmp_path, "--max-steps", 1, "--no-freeze-bn")
    line = "ground truth scored as predictions: AP 1.000, mAP 1.000 (area under the curve at IoU 0.5)"
    assert line in capsys.readouterr().out
    assert set(MEASURES) < set(metrics) and 0 <= metrics["mAP"] <= 1
    assert metrics["loss"] == pytest.approx(metrics["regression_loss"] + metrics["classification_loss"])
    net = models.load(tmp_path / "last.pt")
    assert (net.name, net.num_classes, net.min_side, net.max_side) == ("retinanet", 5, 48, 96)


def test_the_twelve_numbers_are_those_of_pycocotools_on_the_written_file(script, tmp_path):
    """A threshold of 0 keeps the boxes of a hardly trained network, and a few of them overlap the ground truth."""
    more = ["--max-steps", 10, "--score-threshold", 0, "--lr", 1e-3, "--no-freeze-bn", "--match-best"]
    metrics = script.main(tmp_path, *more, "--validation-epochs", 99)
    truth = COCO(str(script.data / "annotations" / "instances_val2017.json"))
    scored = COCOeval(truth, truth.loadRes(str(tmp_path / "detections.json")), "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    assert scored.stats[8] > 0  # AR_100: something was detected
    assert [metrics[name] for name in MEASURES] == pytest.approx(scored.stats.tolist(), abs=1e-12)


def test_frozen_stages_and_statistics_of_batch_norm_do_not_change(script, tmp_path):
    """The default freezes the statistics alone, as yhenon's program does."""
    more = ["--save-every-steps", 1, "--max-steps", 2, "--lr", 0.01, "--freeze-stages", 3, "--match-best"]
    script.main(tmp_path, *more)
    first = torch.load(tmp_path / "step_000001.pt", weights_only=True)["model"]
    second = last(tmp_path)["model"]
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    frozen = ("backbone.body.conv1", "backbone.body.layer1", "backbone.body.layer2")
    assert not [name for name in changed if name.startswith(frozen) or "running" in name or "num_batches" in name]
    assert {f"backbone.body.layer{stage}.0.bn1.{name}" for stage in (3, 4) for name in ("weight", "bias")} <= changed
    assert "backbone.body.layer4.0.conv1.weight" in changed and "backbone.body.layer3.0.conv1.weight" in changed


def test_a_backbone_trained_here_starts_a_detector_here(script, drawn, tmp_path, capsys):
    backbone = Script("backbone", drawn("backbone"))
    for arch in ("resnet18", "mobilenet_v1"):
        backbone.main(tmp_path / arch, "--arch", arch, "--max-steps", 1)
    file = tmp_path / "resnet18" / "backbone.pt"
    script.main(tmp_path / "run", "--max-steps", 1, "--backbone-weights", file)
    assert "120 of 120 tensors of the backbone loaded" in capsys.readouterr().out
    given, loaded = torch.load(file, weights_only=True)["model"], last(tmp_path / "run")["model"]
    torch.testing.assert_close(loaded["backbone.body.bn1.running_mean"], given["bn1.running_mean"], rtol=0, atol=0)
    with pytest.raises(WeightsError, match=r"mobilenet_v1.* resnet18"):
        script.main(tmp_path / "wrong", "--backbone-weights", tmp_path / "mobilenet_v1" / "backbone.pt")


@pytest.mark.parametrize("layout", ["csv", "voc", "open_images"])
def test_other_layouts(script, tmp_path, layout):
    draw = {"csv": synthetic.draw_csv, "voc": synthetic.draw_voc, "open_images": synthetic.draw_open_images}[layout]
    data = draw(tmp_path / "data", images=12, seed=2)
    assert {"AP", "mAP"} < set(script.main(tmp_path / "run", "--dataset", layout, "--max-steps", 1, data=data))


def test_command_lines_of_yhenon_run_unchanged(script, tmp_path):
    data = synthetic.draw_csv(tmp_path / "data", images=12, seed=2)
    lines = [
        f"--dataset coco --coco_path {script.data} --depth 50",
        f"--dataset csv --csv_train {data}/train.csv --csv_classes {data}/classes.csv --csv_val {data}/val.csv "
        "--depth 18 --epochs 100",
    ]
    for number, line in enumerate(lines):
        more = ["--max-steps=1", "--min-side=64", "--weights=none", "--workers=0", "--device=cpu"]
        more += ["--backbone-weights=none", "--model-dir", str(tmp_path / str(number))]
        train_retinanet.main([*line.split(), *more])
        assert (tmp_path / str(number) / "last.pt").is_file()


def test_all_errors_of_a_csv_file_are_listed_in_one_pass(script, tmp_path):
    data = synthetic.draw_csv(tmp_path / "data", images=12, seed=2)
    rows = list(csv.reader((data / "train.csv").open()))
    path = next(row[0] for row in rows if row[5])
    start = len(rows)
    rows += [[path, "1.5", "2.25", "40.75", "50", "disc"], [path, "90", "10", "20", "60", "disc"]]
    rows += [[path, "1", "1", "20", "20", "cube"], ["images/none.jpg", "1", "1", "20", "20", "disc"]]
    with (data / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(DataError, match="3 errors"):
        script.main(tmp_path / "run", "--dataset", "csv", "--check-data", data=data)
    errors = json.loads((tmp_path / "run" / "data_errors.json").read_text())["errors"]
    assert [error["place"] for error in errors] == [f"line {start + n}" for n in (2, 3, 4)]
    reasons = [error["reason"] for error in errors]
    assert "x2 20 <= x1 90" in reasons[0] and "cube" in reasons[1] and "none.jpg" in reasons[2]


def test_another_anchor_scale_than_the_checkpoint_is_refused(script, tmp_path):
    script.main(tmp_path, "--max-steps", 1)
    with pytest.raises(UsageError, match=r"anchor_scale 4.0, this run's has 2.0; give --anchor-scale"):
        script.main(tmp_path, "--resume", "auto", "--eval-only", "--anchor-scale", 2)


def test_preflight_of_two_processes_takes_half_a_batch_each(script, tmp_path):
    finish(script.launch(tmp_path, "--preflight", processes=2))
    assert not (tmp_path / "last.pt").exists()


def test_a_folder_that_is_not_a_coco_data_set(script, tmp_path):
    with pytest.raises(DataError, match=r"no instances_train2017\.json; .* --coco-train"):
        script.main(tmp_path / "run", data=tmp_path)
