"""What train_ssd.py alone does; tests/test_scripts.py has what all scripts do."""

import pytest
import torch

import models
import synthetic
import train_ssd
from tests.script_helpers import Script, copy_writable, last, log_lines
from utils.errors import DataError, UsageError

pytestmark = pytest.mark.slow


@pytest.fixture
def script(drawn):
    return Script("ssd", drawn("ssd"))


def test_validation_by_mean_ap(script, tmp_path, capsys):
    more = ["--score-threshold", 0.02, "--max-detections", 3, "--iou-threshold", 0.1, "--use-2007-metric"]
    more += ["--priors", "scaled"]
    metrics = script.main(tmp_path, "--max-steps", 2, "--validation-mean-ap", *more)
    assert "mAP 1.000 (VOC2007 11-point AP at IoU 0.1)" in capsys.readouterr().out
    assert 0 < metrics["mAP"] == metrics["mAP_11point"] <= 1
    lines = [line.split() for file in tmp_path.glob("det_test_*.txt") for line in file.read_text().splitlines()]
    names = [line[0] for line in lines]
    val = (script.data / "ImageSets/Main/test.txt").read_text().split()
    assert set(names) <= set(val) and max(names.count(name) for name in val) == 3
    assert (
        min(float(line[1]) for line in lines) > 0.02 and max(float(value) for line in lines for value in line[2:]) > 96
    )
    assert (tmp_path / "pr_curves.png").is_file()
    assert metrics["loss"] == pytest.approx(metrics["regression_loss"] + metrics["classification_loss"])
    assert (tmp_path / "labels.txt").read_text().split() == ["BACKGROUND", *last(tmp_path)["classes"]]
    assert "val/AP/disc" in log_lines(tmp_path)[-1]
    net = models.load(tmp_path / "best.pt")
    assert (net.name, net.num_classes, net.image_size) == ("mb1-ssd", len(net.classes), (96, 96))


def test_freezing_all_but_the_heads(script, tmp_path):
    more = ["--save-every-steps", 1, "--max-steps", 2, "--lr", 0.1, "--backbone-lr", 0.1, "--freeze-net"]
    script.main(tmp_path, *more)
    first, second = (torch.load(tmp_path / f"step_00000{n}.pt", weights_only=True)["model"] for n in (1, 2))
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"classification_headers", "regression_headers"}


def test_a_learning_rate_of_zero_is_zero(script, tmp_path):
    """--extra-layers-lr 0 freezes the extra layers; it does not fall back to --lr."""
    script.main(tmp_path, "--max-steps", 1, "--extra-layers-lr", 0)
    rates = {round(group["base_lr"], 9) for group in last(tmp_path)["optimizer"]["param_groups"]}
    assert rates == {0.001, 0.0}


def test_other_prior_sizes_than_the_checkpoint_are_refused(script, tmp_path):
    script.main(tmp_path, "--max-steps", 1)
    with pytest.raises(UsageError, match=r"box_sizes .*; give --box-sizes as in that run"):
        script.main(tmp_path, "--resume", "auto", "--eval-only", "--box-sizes", *range(20, 160, 20))


def test_priors_of_the_run_are_kept(script, tmp_path):
    """At other sizes than 300 jetson-inference's; those of an older checkpoint, without the argument, are scaled."""
    script.main(tmp_path, "--max-steps", 1)
    saved = last(tmp_path)
    assert saved["arguments"]["priors"] == "jetson"
    with pytest.raises(UsageError, match=r"priors jetson, .* scaled; give --priors as in that run"):
        script.main(tmp_path, "--resume", "auto", "--eval-only", "--priors", "scaled")
    del saved["arguments"]["priors"], saved["file"], saved["checksum"]
    torch.save(saved, tmp_path / "last.pt")
    script.main(tmp_path, "--resume", "auto", "--max-steps", 2)
    assert last(tmp_path)["arguments"]["priors"] == "scaled"
    assert torch.equal(models.load(tmp_path / "last.pt").priors((96, 96)), models.build("mb1-ssd", 1).priors((96, 96)))


def test_reordered_classes_are_refused_or_remapped(script, tmp_path):
    data = copy_writable(script.data, tmp_path / "data")
    script.main(tmp_path / "run", "--max-steps", 1)
    metrics = script.main(tmp_path / "run", "--resume", "auto", "--eval-only")
    names = (data / "labels.txt").read_text().split()
    (data / "labels.txt").write_text("\n".join(reversed(names)) + "\n")
    more = ["--resume", "auto", "--eval-only"]
    with pytest.raises(DataError, match="--remap-by-name"):
        script.main(tmp_path / "run", *more, data=data)
    assert script.main(tmp_path / "run", *more, "--remap-by-name", data=data) == metrics


def test_weights_of_other_classes_are_not_evaluated(script, tmp_path):
    """Not even if there are as many: the file of a run is compared by name, whichever flag names it."""
    script.main(tmp_path / "run", "--max-steps", 1)
    data = copy_writable(script.data, tmp_path / "data")
    for path in [data / "labels.txt", *(data / "Annotations").iterdir()]:
        text = path.read_text()
        for name in last(tmp_path / "run")["classes"]:
            text = text.replace(name, f"other_{name}")
        path.write_text(text)
    for flag in ("--resume", "--weights"):
        with pytest.raises(DataError, match="no class in common: checkpoint "):
            train_ssd.main([flag, str(tmp_path / "run/last.pt"), "--eval-only", "--data", str(data)])


@pytest.mark.parametrize("layout", ["coco", "csv", "open_images"])
def test_other_layouts(script, tmp_path, layout, capsys):
    draw = {"coco": synthetic.draw_coco, "csv": synthetic.draw_csv, "open_images": synthetic.draw_open_images}[layout]
    data = draw(tmp_path / "data", images=12, seed=2)
    more = ["--dataset", layout, "--validation-mean-ap", "--max-steps", 1]
    assert 0 <= script.main(tmp_path / "run", *more, data=data)["mAP"] <= 1
    assert "ground truth scored as predictions: mAP 1.000" in capsys.readouterr().out


def test_the_command_line_of_jetson_inference_runs_unchanged(script, tmp_path):
    line = f"--dataset-type=voc --data={script.data} --model-dir={tmp_path} --resolution=96 --batch-size=4 --lr=0.01"
    more = "--num-workers=0 --epochs=1 --max_steps=1 --pretrained_ssd=none --use_cuda=false"
    train_ssd.main([*line.split(), *more.split()])
    assert (tmp_path / "last.pt").is_file()


def test_device_is_automatic_unless_cuda_is_refused():
    assert train_ssd.parse_args([]).device == "auto"
    assert train_ssd.parse_args(["--use-cuda", "true"]).device == "auto"
    assert train_ssd.parse_args(["--use-cuda", "false"]).device == "cpu"
    assert train_ssd.parse_args(["--device", "cuda:1"]).device == "cuda:1"
