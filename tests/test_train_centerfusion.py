"""train_centerfusion.py as a person runs it, on a drawn world small enough for seconds."""

import json
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
import train_centerfusion
from data import DataError, drawn, nuscenes_radar
from evaluation import nuscenes
from losses import centerfusion
from tests.scripts import ROOT, fingerprint, last_line, launch, tensors
from training import checkpoints
from training.flags import UsageError

SMALL = ["--version", "v1.0-mini", "--train_split", "mini_train", "--val_split", "mini_val", "--arch", "resnet18"]
SMALL += ["--input-size", "64", "128", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--precision", "fp32"]
SMALL += ["--velocity", "--nuscenes_att", "--log-level", "warning", "--validation-epochs", "99"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return drawn.draw_nuscenes(tmp_path_factory.mktemp("drawn") / "nuscenes", images=24, seed=1)


def words(data, out, *more):
    return [*SMALL, "--data", str(data), "--model-dir", str(out), *map(str, more)]


def train(data, out, *more):
    return train_centerfusion.main(words(data, out, *more))


@pytest.mark.parametrize("radar", [["--pointcloud"], []])
def test_trains_evaluates_and_leaves_a_whole_run(world, tmp_path, radar):
    metrics = train(world, tmp_path, *radar, "--max-steps", 2, "--debug-steps", 1, "--ema", 0.9)
    heads = [name for name in centerfusion.WEIGHTS if radar or not name.endswith("_sec")]
    assert set(metrics) == {"loss", *heads} and metrics["velocity"] > 0
    assert metrics["loss"] == pytest.approx(sum(metrics[name] for name in heads))
    events = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert {f"{part}/{name}" for part in ("train", "val") for name in ("loss", *heads)} <= set(events["scalars"])
    assert any(tag.startswith("Truth above") for tag in events["images"])
    assert any(tag.startswith("From above") for tag in events["images"])
    net = models.load(tmp_path / "best.pt")
    assert (net.name, len(net.classes), net.image_size) == ("centerfusion_resnet18", 10, (64, 128))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_and_workers_change_nothing(world, tmp_path, workers):
    more = ["--pointcloud", "--workers", workers, "--save-every-steps", 2, "--ema", 0.9, "--max-steps", 4]
    train(world, tmp_path / "whole", *more)
    train(world, tmp_path / "cut", *more, "--resume", tmp_path / "whole" / "step_000002.pt")
    whole, cut = (checkpoints.read(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 4
    assert checkpoints.fingerprint(whole) == checkpoints.fingerprint(cut)
    if workers:
        train(world, tmp_path / "alone", "--pointcloud", "--ema", 0.9, "--max-steps", 4)
        assert fingerprint(tmp_path / "alone") == fingerprint(tmp_path / "whole")


def test_two_processes_equal_one(world, tmp_path):
    more = ["--pointcloud", "--freeze-bn", "--max-steps", 2, "--optimizer", "sgd", "--lr", 1e-5]
    train(world, tmp_path / "one", *more)
    process = launch("train_centerfusion.py", *words(world, tmp_path / "two", *more), processes=2)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    torch.testing.assert_close(tensors(tmp_path / "two"), tensors(tmp_path / "one"), rtol=1e-5, atol=1e-5)
    one, two = last_line(tmp_path / "one"), last_line(tmp_path / "two")
    assert one.keys() == two.keys()
    for tag in one:
        assert two[tag] == pytest.approx(one[tag], rel=1e-3, abs=1e-5), tag


def test_a_frozen_backbone_stays_as_it_is(world, tmp_path):
    train(world, tmp_path, "--pointcloud", "--freeze_backbone", "--save-every-steps", 1, "--max-steps", 2)
    first, last = checkpoints.read(tmp_path / "step_000001.pt")["model"], tensors(tmp_path)
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert changed >= {"hm", "velocity"} and not changed & {"base", "dla_up", "ida_up"}


def test_the_source_s_command_line_runs_unchanged(world, tmp_path, monkeypatch):
    line = "ddd --exp_id centerfusion --shuffle_train --train_split mini_train --val_split mini_val --val_intervals 1 "
    line += "--run_dataset_eval --nuscenes_att --velocity --batch_size 2 --lr 2.5e-4 --num_epochs 60 --lr_step 50 "
    line += "--save_point 20,40,50 --not_rand_crop --flip 0.5 --shift 0.1 --pointcloud --radar_sweeps 3 "
    line += "--pc_z_offset 0.0 --pillar_dims 1.0,0.2,0.2 --max_pc_dist 60.0"
    monkeypatch.chdir(tmp_path)
    more = ["--data", str(world), "--version", "v1.0-mini", "--arch", "resnet18", "--input-size", "64", "128"]
    train_centerfusion.main([*line.split(), *more, "--max-steps", "1", "--workers", "0", "--device", "cpu"])
    assert (tmp_path / "runs" / "centerfusion" / "last.pt").is_file()
    assert set(json.loads((tmp_path / "runs/centerfusion/submission.json").read_text())) == {"meta", "results"}
    train_centerfusion.main([*line.split(), *more, "--max-steps", "2", "--workers", "0", "--device", "cpu", "--resume"])
    assert checkpoints.read(tmp_path / "runs/centerfusion/last.pt")["step"] == 2


def test_a_real_key_frame_trains(shared, tmp_path):
    data = shared / "data/nuscenes_one_sample"
    more = ["--val_split", "mini_train", "--skip-missing", "--cache-dir", tmp_path / "cache", "--max-steps", 1]
    metrics = train(data, tmp_path / "run", "--pointcloud", *more)
    assert metrics["loss"] > 0 and metrics["velocity"] == 0  # of a single key frame nobody knows the velocities


def test_a_folder_without_tables_is_told(tmp_path):
    with pytest.raises(DataError, match=r"v1\.0-mini"):
        train(tmp_path, tmp_path / "run")


def test_the_flip_test_and_weighted_classes_change_what_they_should(world, tmp_path):
    """The mirror image changes the boxes found, not the losses; a class that weighs more costs more."""
    train(world, tmp_path / "run", "--pointcloud", "--max-steps", 1)
    again = ["--pointcloud", "--eval-only", "--resume", tmp_path / "run" / "last.pt"]
    found = []
    for more in ([], ["--flip_test"], ["--class-weights", "car=3"]):
        metrics = train(world, tmp_path / "run", *again, *more)
        losses = {name: metrics[name] for name in ("loss", *centerfusion.WEIGHTS)}
        found.append((losses, (tmp_path / "run" / "submission.json").read_text()))
    (plain, boxes), (flipped, other_boxes), (weighted, same_boxes) = found
    assert flipped == plain and other_boxes != boxes
    assert weighted["hm"] > plain["hm"] and weighted["dep"] == plain["dep"] and same_boxes == boxes


def test_preflight_tells_the_memory_and_trains_nothing(world, tmp_path, capsys):
    assert train(world, tmp_path, "--pointcloud", "--preflight", "--accumulate", 2) == {}
    assert "memory" in capsys.readouterr().out and not (tmp_path / "last.pt").exists()
    train(world, tmp_path, "--pointcloud", "--max-steps", 1)
    before = fingerprint(tmp_path)
    for more in ([], ["--overwrite"], ["--resume"]):  # beside a run, which stays as it is
        assert train(world, tmp_path, "--pointcloud", "--preflight", *more) == {}
    assert fingerprint(tmp_path) == before


def test_preflight_has_what_the_optimiser_keeps_and_says_when_the_memory_is_full(world, tmp_path, monkeypatch):
    built, build = [], train_centerfusion.optimizers.build

    def noted(*args):
        built.append(build(*args))
        return built[0]

    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_centerfusion.optimizers, "build", noted)
    monkeypatch.setattr(train_centerfusion, "evaluate", full)
    with pytest.raises(UsageError, match=r"out of memory: .* next, try --accumulate 2"):
        train(world, tmp_path, "--pointcloud", "--preflight")
    assert built[0].state and all("exp_avg" in state for state in built[0].state.values())


def test_every_fault_is_listed_or_skipped(world, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(world, data)
    picture = min((data / "samples/CAM_BACK").iterdir())
    picture.write_bytes(b"no picture")
    sweep = min((data / "samples/RADAR_FRONT").iterdir())
    sweep.unlink()
    with pytest.raises(DataError, match="2 faults"):
        train(data, tmp_path / "run", "--pointcloud", "--check-data")
    faults = json.loads((tmp_path / "run" / "data_faults.json").read_text())["faults"]
    assert sorted(fault["path"] for fault in faults) == sorted(map(str, (picture, sweep)))
    capsys.readouterr()
    train(data, tmp_path / "run", "--pointcloud", "--bad-images", "skip", "--skip-missing", "--max-steps", 1)
    assert f"{picture}" in capsys.readouterr().out


def test_boxes_that_nothing_has_are_listed_dropped_or_refused(world, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(world / "v1.0-mini", data / "v1.0-mini")
    for folder in ("samples", "sweeps"):
        (data / folder).symlink_to(world / folder)
    file = data / "v1.0-mini/sample_annotation.json"
    records = json.loads(file.read_text())
    for record in records[:4]:
        record["size"] = [0.0, 1.0, 1.0]
    file.write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"4 faults .* --bad-boxes drop"):
        train(data, tmp_path / "run", "--check-data")
    faults = json.loads((tmp_path / "run" / "data_faults.json").read_text())["faults"]
    assert [fault["place"] for fault in faults] == [f"record {number}" for number in range(1, 5)]
    with pytest.raises(DataError, match="4 faults"):
        train(data, tmp_path / "run", "--bad-boxes", "error")
    capsys.readouterr()
    train(data, tmp_path / "run", "--max-steps", 1)
    said = capsys.readouterr().out
    assert f"{file}: record 4: no box: its size 0, 1, 1 (box dropped)" in said and "impossible boxes 4" in said


def test_heads_that_nobody_trained_say_nothing(world, tmp_path):
    bare = [word for word in words(world, tmp_path, "--max-steps", 1) if word not in ("--velocity", "--nuscenes_att")]
    found = []
    for more in ([], ["--velocity", "--nuscenes_att"]):
        train_centerfusion.main([*bare, *more, "--overwrite"])
        train_centerfusion.main([*bare, "--eval-only", "--resume"])  # the heads of the run count, not the flags
        results = json.loads((tmp_path / "submission.json").read_text())["results"]
        boxes = [box for boxes in results.values() for box in boxes]
        found.append({(any(box["velocity"]), bool(box["attribute_name"])) for box in boxes})
    assert found[0] == {(False, False)} and (True, True) in found[1]
    with pytest.raises(UsageError, match="--monitor velocity: not measured"):
        train_centerfusion.main([*bare, "--monitor", "velocity"])


def test_rare_classes_come_up_more_often(world, tmp_path):
    dataset = nuscenes_radar.load(world, "v1.0-mini", "mini_train", sweeps=0)
    weights = dataset.balance_weights()
    labels = [dataset.annotation(i)["labels"].tolist() for i in range(len(dataset))]
    having = [sum(label in each for each in labels) for label in range(10)]
    rarest = min(range(10), key=lambda label: having[label] or 99)
    assert weights.sum() == pytest.approx(1)
    assert {weights[i] for i, each in enumerate(labels) if rarest in each} == {weights.max()}
    train(world, tmp_path, "--balance-data", "--max-steps", 1)


@pytest.mark.parametrize("size", [(100, 128), (64, 0)])
def test_an_input_size_that_does_not_fit_is_told(world, tmp_path, size):
    with pytest.raises(UsageError, match="multiples of 32"):
        train(world, tmp_path, "--input-size", *size)


@pytest.mark.parametrize("dims", ["1.5,0.2", "1.5,0.2,0", "1.5,-1,0.2", "1.5,0.2,nan", "1.5,0.2,inf"])
def test_a_pillar_that_is_none_is_told(world, tmp_path, dims):
    with pytest.raises(UsageError, match=r"--pillar_dims .*three numbers above 0"):
        train(world, tmp_path, "--pillar_dims", dims)


def test_the_official_score_is_no_monitor_without_the_devkit(world, tmp_path, monkeypatch):
    monkeypatch.setattr(nuscenes, "has_devkit", lambda: False)
    with pytest.raises(UsageError, match=r"--monitor NDS: .*requirements-nuscenes\.txt"):
        train(world, tmp_path, "--run_dataset_eval", "--monitor", "NDS")


def test_evaluation_without_weights_is_told(world, tmp_path):
    with pytest.raises(UsageError, match=r"--eval-only: no weights; .*--load_model"):
        train(world, tmp_path, "--eval-only")


def test_colours_change_unless_the_recipe_says_not():
    recipe = ["--config", str(ROOT / "configs/centerfusion_small.toml")]
    assert [train_centerfusion.parse_args(more).colour for more in ([], recipe)] == [0.5, 0]


def test_the_official_score_by_class(world, tmp_path, capsys):
    pytest.importorskip("nuscenes")
    train(world, tmp_path, "--max-steps", 1)
    again = ["--eval-only", "--run_dataset_eval", "--resume", "--monitor", "NDS"]
    metrics = train(world, tmp_path, *again)
    table = [line.split(",") for line in (tmp_path / "per_class.csv").read_text().splitlines()]
    assert {name: float(value) for name, value in table[1:]} == pytest.approx(
        {name.removeprefix("AP/"): value for name, value in metrics.items() if name.startswith("AP/")}, abs=1e-6
    )
    assert "ground truth scored as predictions: NDS " in capsys.readouterr().out
