"""What train_centerfusion.py alone does; tests/test_scripts.py has what all scripts do."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
import predict
import train_centerfusion
from data import nuscenes
from data.nuscenes import splits, tables
from losses import centerfusion
from ops import radar
from tests.script_helpers import ROOT, Script, last
from utils.errors import DataError, UsageError

pytestmark = pytest.mark.slow


@pytest.fixture
def script(drawn):
    return Script("centerfusion", drawn("centerfusion"))


@pytest.fixture
def tables_copy(script, tmp_path):
    """A data set whose tables may be changed; the images are those of `script`."""
    data = tmp_path / "data"
    (data / "v1.0-mini").mkdir(parents=True)
    for path in (script.data / "v1.0-mini").glob("*.json"):
        (data / "v1.0-mini" / path.name).write_bytes(path.read_bytes())
    for folder in ("samples", "sweeps"):
        (data / folder).symlink_to(script.data / folder)
    return data


def without(words, *flags):
    return [word for word in words if word not in flags]


def test_heads_and_images_of_a_camera_network(script, tmp_path):
    words = without(script.words(tmp_path, "--max-steps", 1), "--pointcloud")
    metrics = train_centerfusion.main(words)
    heads = [name for name in centerfusion.WEIGHTS if not name.endswith("_sec")]
    assert set(metrics) == {"loss", *heads} and metrics["velocity"] > 0
    assert metrics["loss"] == pytest.approx(sum(metrics[name] for name in heads))
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["images"]
    assert any("above" in tag.lower() for tag in tags)  # bird's-eye view
    net = models.load(tmp_path / "best.pt")
    assert (net.name, len(net.classes), net.image_size) == ("centerfusion_resnet18", 10, (64, 128))


def test_a_frozen_backbone_does_not_change(script, tmp_path):
    script.main(tmp_path, "--freeze_backbone", "--save-every-steps", 1, "--max-steps", 2)
    first = torch.load(tmp_path / "step_000001.pt", weights_only=True)["model"]
    second = last(tmp_path)["model"]
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert changed >= {"hm", "velocity"} and not changed & {"base", "dla_up", "ida_up"}


def test_the_command_line_of_centerfusion_runs_unchanged(script, tmp_path, monkeypatch):
    line = "ddd --exp_id centerfusion --shuffle_train --train_split mini_train --val_split mini_val --val_intervals 1 "
    line += "--run_dataset_eval --nuscenes_att --velocity --batch_size 2 --lr 2.5e-4 --num_epochs 60 --lr_step 50 "
    line += "--save_point 20,40,50 --not_rand_crop --flip 0.5 --shift 0.1 --pointcloud --radar_sweeps 3 "
    line += "--pc_z_offset 0.0 --pillar_dims 1.0,0.2,0.2 --max_pc_dist 60.0"
    monkeypatch.chdir(tmp_path)
    more = ["--data", str(script.data), "--version", "v1.0-mini", "--arch", "resnet18", "--input-size", "64", "128"]
    more += ["--workers", "0", "--device", "cpu"]
    train_centerfusion.main([*line.split(), *more, "--max-steps", "1"])
    assert (tmp_path / "runs" / "centerfusion" / "last.pt").is_file()
    assert set(json.loads((tmp_path / "runs/centerfusion/submission.json").read_text())) == {"meta", "results"}
    train_centerfusion.main([*line.split(), *more, "--max-steps", "2", "--resume"])
    assert last(tmp_path / "runs/centerfusion")["step"] == 2


def test_the_test_command_of_centerfusion_evaluates(script, tables_copy, tmp_path, monkeypatch, capsys):
    """On the validation split alone, and on v1.0-test, which has no annotations and gives a submission."""
    line = "ddd --exp_id centerfusion --dataset nuscenes --val_split {} --run_dataset_eval --num_workers 4 "
    line += "--nuscenes_att --velocity --gpus -1 --pointcloud --radar_sweeps 3 --max_pc_dist 60.0 --pc_z_offset -0.0 "
    line += "--load_model {} --flip_test"
    more = "--eval-only --arch resnet18 --input-size 64 128 --workers 0 --batch-size 4 --precision fp32 --model-dir"
    script.main(tmp_path / "run", "--max-steps", 1)
    (tables_copy / "v1.0-test").mkdir()
    for table in tables.TABLES:
        file = tables_copy / "v1.0-mini" / f"{table}.json"
        (tables_copy / "v1.0-test" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setitem(splits.SPLITS, "mini_train", ["none"])  # an error if it were read
    metrics, submissions = {}, {}
    for split in ("mini_val", "test"):
        words = [*line.format(split, tmp_path / "run/best.pt").split(), *more.split(), str(tmp_path / split)]
        metrics[split] = train_centerfusion.main([*words, "--data", str(tables_copy)])
        submissions[split] = json.loads((tmp_path / split / "evaluation" / "submission.json").read_text())["results"]
        assert "no effect here: --dataset\n" in capsys.readouterr().out
    assert metrics["mini_val"]["loss"] > 0 and metrics["test"] == {}
    assert set(submissions["mini_val"]) < set(submissions["test"])  # of all scenes
    for sample, boxes in submissions["mini_val"].items():
        assert submissions["test"][sample] == boxes


@pytest.mark.realdata
def test_a_real_key_frame_trains(script, shared, tmp_path):
    more = ["--val_split", "mini_train", "--skip-missing", "--cache-dir", tmp_path / "cache", "--max-steps", 1]
    metrics = script.main(tmp_path / "run", *more, data=shared / "data/nuscenes_one_sample")
    assert metrics["loss"] > 0 and metrics["velocity"] == 0  # velocities need more than one key frame


def test_radar_is_projected_in_full_precision_as_pillars_of_the_run(script, tmp_path, monkeypatch):
    """Under autocast a matrix product is rounded to bf16, which moves the points by up to 14 pixels. --pillar_dims has
    its effect in training, validation and predict."""
    under_autocast, project = [], radar.project
    monkeypatch.setattr(
        radar, "project", lambda *args: under_autocast.append(torch.is_autocast_enabled("cpu")) or project(*args)
    )
    pillars, make = [], radar.pillar_map
    monkeypatch.setattr(radar, "pillar_map", lambda *args: pillars.append(args[-1]) or make(*args))
    script.main(tmp_path, "--max-steps", 1, "--precision", "bf16", "--pillar_dims", "1,0.4,0.3")
    trained = len(under_autocast)
    predict.main([str(tmp_path / "last.pt"), str(script.data), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert len(under_autocast) > trained > 0
    assert not any(under_autocast)
    assert len(pillars) == len(under_autocast) and set(map(tuple, pillars)) == {(1.0, 0.4, 0.3)}


def test_flip_test_and_class_weights_change_what_they_should(script, tmp_path):
    """The mirror image changes the boxes, not the losses; a larger class weight changes the loss, not the boxes."""
    script.main(tmp_path, "--max-steps", 1)
    results = []
    for more in ([], ["--flip_test"], ["--class-weights", "car=3"]):
        metrics = script.main(tmp_path, "--eval-only", "--resume", tmp_path / "last.pt", *more)
        losses = {name: metrics[name] for name in ("loss", *centerfusion.WEIGHTS)}
        results.append((losses, (tmp_path / "evaluation/submission.json").read_text()))
    (plain, boxes), (flipped, other_boxes), (weighted, same_boxes) = results
    assert flipped == plain and other_boxes != boxes
    assert weighted["hm"] > plain["hm"] and weighted["dep"] == plain["dep"] and same_boxes == boxes


def test_missing_radar_sweeps_are_listed_or_skipped(script, tables_copy, tmp_path, capsys):
    (tables_copy / "samples").unlink()
    (tables_copy / "samples").mkdir()
    for folder in (script.data / "samples").iterdir():
        (tables_copy / "samples" / folder.name).mkdir()
        for path in folder.iterdir():
            (tables_copy / "samples" / folder.name / path.name).symlink_to(path)
    image = min((tables_copy / "samples/CAM_BACK").iterdir())
    image.unlink()
    image.write_bytes(b"not an image")
    sweep = min((tables_copy / "samples/RADAR_FRONT").iterdir())
    sweep.unlink()
    with pytest.raises(DataError, match="2 errors"):
        script.main(tmp_path / "run", "--check-data", data=tables_copy)
    errors = json.loads((tmp_path / "run" / "data_errors.json").read_text())["errors"]
    assert sorted(error["path"] for error in errors) == sorted(map(str, (image, sweep)))
    capsys.readouterr()
    more = ["--bad-images", "skip", "--skip-missing", "--max-steps", 1]
    script.main(tmp_path / "run", *more, data=tables_copy)
    assert f"{image}" in capsys.readouterr().out


def test_impossible_boxes_are_listed_dropped_or_refused(script, tables_copy, tmp_path, capsys):
    file = tables_copy / "v1.0-mini/sample_annotation.json"
    records = json.loads(file.read_text())
    for record in records[:4]:
        record["size"] = [0.0, 1.0, 1.0]
    file.write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"4 errors .* --bad-boxes drop"):
        script.main(tmp_path / "run", "--check-data", data=tables_copy)
    errors = json.loads((tmp_path / "run" / "data_errors.json").read_text())["errors"]
    assert [error["place"] for error in errors] == [f"record {number}" for number in range(1, 5)]
    with pytest.raises(DataError, match="4 errors"):
        script.main(tmp_path / "run", "--bad-boxes", "error", data=tables_copy)
    capsys.readouterr()
    script.main(tmp_path / "run", "--max-steps", 1, data=tables_copy)
    printed = capsys.readouterr().out
    assert f"{file}: record 4: " in printed and "(box dropped)" in printed


def test_untrained_heads_predict_nothing(script, tmp_path):
    words = without(script.words(tmp_path, "--max-steps", 1), "--velocity", "--nuscenes_att")
    found = []
    for more in ([], ["--velocity", "--nuscenes_att"]):
        train_centerfusion.main([*words, *more, "--overwrite"])
        train_centerfusion.main([*words, "--eval-only", "--resume"])  # the heads of the run count, not the flags
        results = json.loads((tmp_path / "evaluation/submission.json").read_text())["results"]
        boxes = [box for boxes in results.values() for box in boxes]
        found.append({(any(box["velocity"]), bool(box["attribute_name"])) for box in boxes})
    assert found[0] == {(False, False)} and (True, True) in found[1]
    with pytest.raises(UsageError, match="--monitor velocity: not measured"):
        train_centerfusion.main([*words, "--monitor", "velocity"])


def test_rare_classes_are_drawn_more_often(script, tmp_path):
    options = {"version": "v1.0-mini", "train_split": "mini_train", "val_split": "mini_val"}
    dataset, _, _ = nuscenes.load(script.data, **options)
    weights = dataset.balance_weights()
    labels = [dataset.annotation(i)["labels"].tolist() for i in range(len(dataset))]
    counts = [sum(label in each for each in labels) for label in range(10)]
    rarest = min(range(10), key=lambda label: counts[label] or 99)
    assert weights.sum() == pytest.approx(1)
    assert {weights[i] for i, each in enumerate(labels) if rarest in each} == {weights.max()}
    script.main(tmp_path, "--balance-data", "--max-steps", 1)


@pytest.mark.parametrize("size", [(100, 128), (64, 0)])
def test_an_impossible_input_size(script, tmp_path, size):
    with pytest.raises(UsageError, match="multiples of 32"):
        script.main(tmp_path, "--input-size", *size)


@pytest.mark.parametrize("dims", ["1.5,0.2", "1.5,0.2,0"])
def test_impossible_pillars(script, tmp_path, dims, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(tmp_path, "--pillar_dims", dims)
    assert f"--pillar-dims: {dims}: must be three numbers above 0" in capsys.readouterr().err


def test_the_official_score_cannot_be_the_monitor_without_the_devkit(script, tmp_path, monkeypatch):
    monkeypatch.setattr(train_centerfusion, "devkit_is_installed", lambda: False)
    with pytest.raises(UsageError, match=r"--monitor NDS: .*requirements-nuscenes\.txt"):
        script.main(tmp_path, "--run_dataset_eval", "--monitor", "NDS")


def test_color_jitter_by_default_and_not_in_the_small_recipe():
    recipe = ["--config", str(ROOT / "configs/centerfusion_small.toml")]
    assert [train_centerfusion.parse_args(more).color_jitter for more in ([], recipe)] == [0.5, 0]


def test_exp_id_names_the_run_folder():
    assert train_centerfusion.parse_args(["--exp_id", "night"]).model_dir == "runs/night"


def test_a_folder_without_tables(script, tmp_path):
    with pytest.raises(DataError, match=r"v1\.0-mini"):
        script.main(tmp_path / "run", data=tmp_path)


def test_the_official_score_by_class(script, tmp_path, capsys):
    pytest.importorskip("nuscenes")
    script.main(tmp_path, "--max-steps", 1)
    metrics = script.main(tmp_path, "--eval-only", "--run_dataset_eval", "--resume", "--monitor", "NDS")
    table = [line.split(",") for line in (tmp_path / "evaluation/per_class.csv").read_text().splitlines()]
    assert {name: float(value) for name, value in table[1:]} == pytest.approx(
        {name.removeprefix("AP/"): value for name, value in metrics.items() if name.startswith("AP/")}, abs=1e-6
    )
    assert "ground truth scored as predictions: NDS " in capsys.readouterr().out
