"""What all five training scripts promise: complete runs, exact resume, the same result with several processes."""

import json
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
from tests import two_processes
from tests.script_helpers import FLAGS, Script, copy_writable, fingerprint, last, launch, log_lines, wait_for
from training import distributed
from training.checkpoint import Progress
from training.finite import first_nonfinite
from training.logger import Logger
from training.meter import NonFiniteLoss
from utils.errors import DataError, UsageError

STEPS = 4
RUN = ["--max-steps", STEPS, "--save-every-steps", 2, "--ema", 0.9, "--log-every", 1, "--validation-epochs", 99]
FILES = ("last.pt", "previous.pt", "best.pt", "step_000002.pt", "flags.json", "versions.json", "metrics.jsonl")
# With these, N processes, or the parts of a batch, compute what one does up to rounding.
COMPARABLE = {
    "backbone": "--freeze-bn --batch-size 6 --lr 1e-3 --mixup 0 --cutmix 0",
    "retinanet": "--freeze-bn-stats --batch-size 2 --lr 1e-3 --optimizer sgd --match-best",
    "ssd": "--freeze-bn --batch-size 2 --lr 2e-4 --backbone-lr 2e-4 --validation-mean-ap",
    "centerfusion": "--freeze-bn --lr 1e-5 --optimizer sgd",
    "maskrcnn": "--freeze-bn --lr 1e-3",
}
DIVERGING = {
    "backbone": "--lr 1e30 --freeze-bn",
    "retinanet": "--lr 1e12 --clip-norm 0 --optimizer sgd",
    "ssd": "--lr 1e30 --backbone-lr 1e30 --warmup-steps 0",
    "centerfusion": "--lr 1e30 --optimizer sgd",
    "maskrcnn": "--lr 1e30 --backbone-lr 1e30 --warmup-steps 0",
}
COMMAND_LINES = {  # of the programs whose work the scripts do, as their users write them -> some flags that they set
    "retinanet --dataset coco --coco_path ../coco --depth 50": {"data": ["../coco"], "arch": "retinanet_resnet50"},
    "retinanet --dataset csv --csv_train train.csv --csv_classes classes.csv --csv_val val.csv --depth 18 --epochs "
    "100": {"csv_val": "val.csv", "arch": "retinanet_resnet18", "epochs": 100},
    "ssd --dataset-type=voc --data=data/drone/ --model-dir=models/drone/ --resolution=512": {
        "dataset": "voc",
        "model_dir": "models/drone/",
        "resolution": 512,
    },
    "ssd --dataset-type=voc --data=data/drone/ --model-dir=models/x/ --resolution=512 --num-workers=2 --batch-size=4 "
    "--lr=0.01 --epochs=1000": {"workers": 2, "batch_size": 4, "lr": 0.01, "epochs": 1000},
    "ssd --dataset-type=open_images --data data/fruit --model-dir models/fruit --batch-size 4 --epochs 30 "
    "--resume FILE": {"dataset": "open_images", "data": ["data/fruit"], "resume": "FILE"},
    "centerfusion ddd --exp_id centerfusion --shuffle_train --train_split train --val_split mini_val --val_intervals 1 "
    "--run_dataset_eval --nuscenes_att --velocity --batch_size 32 --lr 2.5e-4 --num_epochs 60 --lr_step 50 "
    "--save_point 20,40,50 --gpus 0,1 --not_rand_crop --flip 0.5 --shift 0.1 --pointcloud --radar_sweeps 3 "
    "--pc_z_offset 0.0 --pillar_dims 1.0,0.2,0.2 --max_pc_dist 60.0 --load_model FILE --freeze_backbone --resume": {
        "weights": "FILE",
        "milestones": [50],
        "save_epochs": [20, 40, 50],
        "pillar_dims": [1.0, 0.2, 0.2],
        "resume": "auto",
    },
    "centerfusion ddd --exp_id centerfusion --dataset nuscenes --val_split mini_val --run_dataset_eval --num_workers 4 "
    "--nuscenes_att --velocity --gpus 0 --pointcloud --radar_sweeps 3 --max_pc_dist 60.0 --pc_z_offset -0.0 "
    "--load_model FILE --flip_test --eval-only": {
        "model_dir": "runs/centerfusion",
        "weights": "FILE",
        "flip_test": True,
        "pillar_dims": [1.5, 0.2, 0.2],
        "no_effect": ["--dataset"],
    },
}


@pytest.fixture(params=FLAGS)
def script(request, drawn):
    return Script(request.param, drawn(request.param))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A function: Script -> (run folder of four steps, its metrics), trained once. Not to be changed."""
    runs = {}

    def train(script):
        if script.name not in runs:
            out = tmp_path_factory.mktemp("trained") / script.name
            runs[script.name] = out, script.main(out, *RUN)
        return runs[script.name]

    return train


@pytest.fixture
def run_copy(script, trained, tmp_path):
    return copy_writable(trained(script)[0], tmp_path / "copy")


@pytest.mark.slow
def test_a_run_leaves_checkpoints_logs_and_images(script, trained):
    out, metrics = trained(script)
    for name in FILES:
        assert (out / name).is_file(), name
    lines = log_lines(out)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert {tag: value for tag, value in lines[-1].items() if tag.startswith("val/")} == pytest.approx(
        {f"val/{name}": value for name, value in metrics.items()}
    )
    tags = EventAccumulator(str(out)).Reload().Tags()
    assert {"train/loss", "val/loss", "lr", "speed/images_per_second"} <= set(tags["scalars"])
    assert tags["images"] and all(tag.startswith("val/") for tag in tags["images"])
    net, saved = models.load(out / "best.pt"), last(out)
    assert (net.name, net.classes) == (saved["architecture"], saved["classes"])
    torch.testing.assert_close(dict(net.state_dict()), saved["ema"]["model"], rtol=0, atol=0)


@pytest.mark.slow
def test_resume_is_exact_and_workers_change_nothing(script, trained, tmp_path):
    """A run that continues from step 2 with two workers ends as the uninterrupted one without workers."""
    out, _ = trained(script)
    script.main(tmp_path, *RUN, "--workers", 2, "--resume", out / "step_000002.pt")
    whole, resumed = last(out), last(tmp_path)
    assert resumed["step"] == STEPS
    assert fingerprint(tmp_path) == fingerprint(out)
    torch.testing.assert_close(resumed["ema"], whole["ema"], rtol=0, atol=0)
    assert resumed["plateau"] == whole["plateau"]


@pytest.mark.slow
def test_a_signal_finishes_the_step_and_saves(script, tmp_path, monkeypatch):
    step, steps = script.module.optim.step, []

    def signal_in_second_step(*args):
        steps.append(step(*args))
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(script.module.optim, "step", signal_in_second_step)
    with pytest.raises(SystemExit) as stopped:
        script.main(tmp_path, "--epochs", 1000, "--validation-epochs", 1000)
    assert stopped.value.code == 143
    assert last(tmp_path)["step"] == log_lines(tmp_path)[-1]["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssd"])
def test_a_killed_process_resumes_to_the_same_weights(name, drawn, tmp_path):
    script = Script(name, drawn(name))
    more = ["--save-every-steps", 3, "--max-steps", 6, "--validation-epochs", 9]
    script.main(tmp_path / "whole", *more)
    process = script.launch(tmp_path / "killed", *more)
    wait_for(tmp_path / "killed" / "step_000003.pt", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    script.main(tmp_path / "killed", *more, "--resume", "auto")
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet"])
def test_sigterm_ends_a_process_with_code_143(name, drawn, tmp_path):
    script = Script(name, drawn(name))
    process = script.launch(tmp_path, "--epochs", 1000, "--validation-epochs", 1000, "--log-every", 1)
    wait_for(tmp_path / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert last(tmp_path)["step"] == log_lines(tmp_path)[-1]["step"]


def without_most_objects(name, source, target):
    """A copy of a data set in which most training images have no object, so that one process's share often has none."""
    data = copy_writable(source, target)
    if name == "retinanet":
        path = data / "annotations" / "instances_train2017.json"
        content = json.loads(path.read_text())
        ids = [image["id"] for image in content["images"]][::3]
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in ids]
        path.write_text(json.dumps(content))
    elif name == "ssd":
        for path in [path for n, path in enumerate(sorted((data / "Annotations").glob("*.xml"))) if n % 4 != 2]:
            head, *_ = path.read_text().split("\t<object>")
            path.write_text(head.replace("</annotation>", "") + "</annotation>\n")
    elif name == "maskrcnn":
        for path in sorted((data / "PedMasks").iterdir())[::3]:
            Image.fromarray(np.zeros_like(Image.open(path))).save(path)
    return data


@pytest.mark.slow
def test_two_processes_equal_one(script, tmp_path):
    """They start from other weights, buffers and seeds; those of process 0 count."""
    data = without_most_objects(script.name, script.data, tmp_path / "data")
    frozen = ["--max-steps", 3, *COMPARABLE[script.name].split()]
    whole = {"plain": frozen, "parts": [*frozen, "--accumulate", 2, "--ema", 0.9, "--batch-size", 4]}
    trained = ["--max-steps", 3, "--no-freeze-bn", "--validation-epochs", 99]  # batch norm differs from one process's
    jobs = [(name, more, True) for name, more in whole.items()]
    jobs += [(f"differ {differ}", [*frozen, *trained], differ) for differ in (True, False)]
    out = {name: tmp_path / name for name, _, _ in jobs}
    common = {"name": script.name}
    two_processes.run(
        [
            {**common, "out": out[name], "differ": differ, "words": script.words(out[name], *more, data=data)}
            for name, more, differ in jobs
        ]
    )
    for name, more in whole.items():
        script.main(tmp_path / "one" / name, *more, data=data)
        one, two = last(tmp_path / "one" / name), last(out[name])
        torch.testing.assert_close(two["model"], one["model"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(two["ema"], one["ema"], rtol=1e-4, atol=1e-5)
        first, second = (torch.load(out[name] / f"rank_{rank}.pt") for rank in range(2))
        torch.testing.assert_close(second, first, rtol=0, atol=0)
        lines = [log_lines(folder)[-1] for folder in (tmp_path / "one" / name, out[name])]
        assert lines[0].keys() == lines[1].keys()
        for tag, value in lines[0].items():
            assert lines[1][tag] == pytest.approx(value, rel=1e-3, abs=1e-4), tag
    assert fingerprint(out["differ True"]) == fingerprint(out["differ False"])
    first, second = (torch.load(out["differ True"] / f"rank_{rank}.pt")["parameters"] for rank in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["backbone", "retinanet", "ssd", "centerfusion"])  # Mask R-CNN samples per micro-batch
def test_micro_batches_equal_the_whole_batch(name, drawn, tmp_path):
    script = Script(name, drawn(name))
    more = ["--max-steps", 2, *COMPARABLE[name].split()]
    script.main(tmp_path / "whole", *more)
    script.main(tmp_path / "parts", *more, "--accumulate", 2)
    torch.testing.assert_close(
        last(tmp_path / "parts")["model"], last(tmp_path / "whole")["model"], rtol=1e-5, atol=1e-5
    )


def without_training_part(script, run, target):
    """A copy of a data set that has its validation part alone; CenterFusion's tables have both."""
    data = copy_writable(script.data, target)
    if script.name == "backbone":
        shutil.rmtree(data / "train")
    elif script.name == "retinanet":
        shutil.rmtree(data / "train2017")
        (data / "annotations" / "instances_train2017.json").unlink()
    elif script.name == "ssd":
        for name in ("train", "val", "trainval"):
            (data / "ImageSets" / "Main" / f"{name}.txt").unlink()
        names = (data / "ImageSets" / "Main" / "test.txt").read_text().split()
        for path in [*data.glob("JPEGImages/*"), *data.glob("Annotations/*")]:
            if path.stem not in names:
                path.unlink()
    elif script.name == "maskrcnn":
        names = (run / "held_out.txt").read_text().split()
        for path in [path for path in (data / "PNGImages").iterdir() if path.name not in names]:
            path.unlink()
    return data


@pytest.mark.slow
def test_eval_only_gives_the_last_validation_again(script, run_copy, tmp_path):
    """To the last digit, with no flag of the run, and on the validation set alone; the files of the training stay."""
    logged = {tag.removeprefix("val/"): value for tag, value in log_lines(run_copy)[-1].items() if "val/" in tag}
    before = {path: path.read_bytes() for path in run_copy.iterdir()}
    own = ["--resume", str(run_copy), "--eval-only", "--device", "cpu", "--workers", "0"]
    for more in ([], ["--data", str(without_training_part(script, run_copy, tmp_path / "data"))]):
        script.module.main([*own, *more])
        written = json.loads((run_copy / "evaluation" / "evaluation.json").read_text())
        assert {name: written["metrics"][name] for name in logged} == logged
        assert {path: path.read_bytes() for path in before} == before
        assert {path.name for path in run_copy.iterdir()} == {path.name for path in before} | {"evaluation"}
    name = {"maskrcnn": "detections_masks.json", "centerfusion": "submission.json"}.get(script.name, "per_class.csv")
    assert (run_copy / "evaluation" / name).is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "available"),
    [
        ("backbone", "folders in .*: train, val"),
        ("retinanet", "available: instances_train2017.json, instances_val2017.json"),
        ("ssd", "available: test.txt, train.txt, trainval.txt, val.txt"),
        ("maskrcnn", "give all, or a text file of image names"),
    ],
)
def test_an_unknown_split_is_refused(name, available, drawn, trained, tmp_path):
    script = Script(name, drawn(name))
    with pytest.raises(DataError, match=rf"nowhere.*{available}"):
        script.main(tmp_path, "--eval-only", "--resume", trained(script)[0], "--split", "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flag", "value"), [("ssd", "--resolution", 128), ("retinanet", "--max-side", 128)])
def test_images_of_another_size_do_not_continue_a_run(name, flag, value, drawn, trained, tmp_path):
    script = Script(name, drawn(name))
    with pytest.raises(UsageError, match=rf"give {flag} .*as in that run, or start a new run .*--weights"):
        script.main(tmp_path, "--resume", trained(script)[0], flag, value)


@pytest.mark.slow
def test_preflight_writes_nothing_and_leaves_a_run_alone(script, run_copy, tmp_path, capsys):
    script.main(tmp_path / "new", "--preflight", "--accumulate", 2, "--log-level", "info")
    assert "peak GPU memory" in capsys.readouterr().out
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())
    before = {path: path.read_bytes() for path in run_copy.iterdir()}
    script.main(run_copy, "--preflight", "--overwrite")
    assert {path: path.read_bytes() for path in run_copy.iterdir()} == before


@pytest.mark.slow
def test_out_of_memory_names_the_next_flag(script, tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(script.module, "evaluate", out_of_memory)
    with pytest.raises(UsageError, match=r"out of memory: .* next, try --accumulate 2"):
        script.main(tmp_path, "--preflight")


@pytest.mark.slow
@pytest.mark.parametrize("logged", [False, True])
def test_a_kill_during_validation_loses_nothing(script, run_copy, tmp_path, monkeypatch, logged):
    """Neither a kill within it nor one after its log, before it is saved: the resumed run validates first."""
    out, whole = tmp_path / "killed", {path.name for path in run_copy.iterdir() if "tfevents" not in path.name}
    log_validation = Logger.log_validation

    def killed(*args, **options):
        if logged:
            log_validation(*args)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(*(Logger, "log_validation") if logged else (script.module, "evaluate"), killed)
        with pytest.raises(InterruptedError):
            script.main(out, *RUN[2:], "--max-steps", STEPS, "--resume", run_copy / "step_000002.pt")
    assert (last(out)["step"], last(out)["validation_due"]) == (STEPS, True)
    metrics = script.main(out, *RUN, "--resume", "auto")
    val = {tag: value for tag, value in log_lines(run_copy)[-1].items() if "val/" in tag}
    assert {f"val/{name}": value for name, value in metrics.items()} == pytest.approx(val, nan_ok=True)
    one, two = ([without_speed(line) for line in log_lines(folder)[-3:]] for folder in (run_copy, out))
    assert two == one
    assert whole - {path.name for path in out.iterdir()} == {"step_000002.pt", "previous.pt"}
    best, again = (torch.load(folder / "best.pt", weights_only=True) for folder in (run_copy, out))
    torch.testing.assert_close(again["model"], best["model"], rtol=0, atol=0)
    assert {name: again[name] for name in asdict(Progress())} == {name: best[name] for name in asdict(Progress())}
    board = EventAccumulator(str(out)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [3, 4]
    assert all([event.step for event in board.Images(tag)] == [4] for tag in board.Tags()["images"])


def without_speed(line):
    return {tag: value for tag, value in line.items() if not tag.startswith("speed/")}


@pytest.mark.slow
def test_a_run_that_blows_up_leaves_a_checkpoint_from_which_a_lower_rate_goes_on(drawn, tmp_path):
    def run(step, *more):
        script.main(tmp_path, *common, "--max-steps", step, *more)

    def saved():
        files = {path.name: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
        for file, contents in files.items():
            assert not first_nonfinite(contents), file
        return {file: contents.get("step") for file, contents in files.items()}

    script, common = Script("backbone", drawn("backbone")), ["--freeze-bn", "--save-every-steps", 1, "--log-every", 1]
    run(2)
    before = saved()
    assert (before["last.pt"], before["previous.pt"], before["step_000002.pt"]) == (2, 1, 2)
    with pytest.raises(UsageError, match=r"is not finite after step 3, .* step 2 with --resume auto .* such as 3\.4e"):
        run(4, "--resume", "auto", "--lr", 3.4e38, "--weight-decay", 1e3)
    assert saved() == before
    with pytest.raises(NonFiniteLoss, match=r"last\.pt led to it .* continue from the one before with --resume auto "):
        run(4, "--resume", "auto", "--lr", 1e30)  # the weights of step 3 are finite, the loss with them is not
    assert saved()["last.pt"] == 2 and saved()["diverged.pt"] == 3
    run(4, "--resume", "auto")
    assert saved()["last.pt"] == 4


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(script, tmp_path):
    more = [*DIVERGING[script.name].split(), "--save-every-steps", 1, "--max-steps", 8, "--validation-epochs", 99]
    with pytest.raises(NonFiniteLoss):
        script.main(tmp_path, *more)
    report = json.loads((tmp_path / "nan_report.json").read_text())
    assert {"step", "images", "losses", "lr"} <= set(report)
    assert len(report["paths"]) == len(report["images"]) > 0
    assert all(Path(path).is_file() for path in report["paths"])
    assert last(tmp_path)["step"] < report["step"]


@pytest.mark.slow
def test_a_folder_with_a_run_is_refused(script, run_copy):
    with pytest.raises(UsageError, match="--resume auto"):
        script.main(run_copy, "--max-steps", 1)
    script.main(run_copy, "--max-steps", 1, "--overwrite")
    assert last(run_copy)["step"] == 1 and not (run_copy / "step_000002.pt").exists()


@pytest.mark.slow
def test_check_data_lists_a_damaged_image(script, tmp_path, monkeypatch):
    data = copy_writable(script.data, tmp_path / "data")
    suffix = "png" if script.name == "maskrcnn" else "jpg"
    folder = {"maskrcnn": "PNGImages", "centerfusion": "samples"}.get(script.name, "")
    image = min((data / folder).rglob(f"*.{suffix}"))
    closed, close = [], distributed.Run.close
    monkeypatch.setattr(distributed.Run, "close", lambda run: closed.append(close(run)))
    assert script.main(tmp_path / "run", "--check-data") == {}
    assert closed, "the process group is left"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(DataError, match=image.name):
        script.main(tmp_path / "run", "--check-data", data=data)
    (error,) = json.loads((tmp_path / "run" / "data_errors.json").read_text())["errors"]
    assert error["path"] == str(image)


@pytest.mark.slow
def test_an_error_of_the_user_is_one_line_and_exit_code_2(tmp_path):
    process = launch(
        "train_ssd.py", "--dataset", "voc", "--data", tmp_path / "nowhere", "--model-dir", tmp_path / "run"
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: ") and "nowhere" in errors and len(errors.splitlines()) == 1


def test_an_untrained_network_is_not_evaluated(script, tmp_path):
    with pytest.raises(UsageError, match=r"--eval-only: no weights .*--resume auto or --weights FILE"):
        script.main(tmp_path, "--eval-only")


def test_an_unknown_monitor_is_refused(script, tmp_path):
    with pytest.raises(UsageError, match="--monitor accuracy: not measured by this run; use one of loss"):
        script.main(tmp_path, "--monitor", "accuracy")
    assert not list(tmp_path.iterdir())


def test_the_default_learning_rates_are_for_the_default_batch_size(script):
    args = script.module.parse_args([])
    assert args.lr_batch_size == args.batch_size


def test_the_default_run_folder_is_in_runs(script):
    assert script.module.parse_args([]).model_dir == f"runs/{script.name}"


@pytest.mark.parametrize("words", ["--lr -1", "--lr inf", "--momentum 2"])
def test_numbers_out_of_range_are_refused(script, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.module.parse_args(words.split())
    assert "error: argument" in capsys.readouterr().err


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_of_the_programs_we_replace_are_accepted(line):
    name, *words = line.split()
    args = vars(Script(name, None).module.parse_args(words))
    assert {flag: args[flag] for flag in COMMAND_LINES[line]} == COMMAND_LINES[line]


def test_recipes_are_accepted(script):
    """Every recipe in configs/ sets flags of the script that its file names."""
    recipes = sorted(Path("configs").glob("*.toml"))
    ours = [path for path in recipes if f"train_{script.name}.py" in path.read_text()]
    assert ours
    for path in ours:
        script.module.parse_args(["--config", str(path)])


def test_every_flag_has_help(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.module.parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    flags = [n for n, line in enumerate(lines) if line.startswith("  --")]
    for n in flags:
        following = lines[n + 1] if n + 1 < len(lines) else ""
        assert len(lines[n].split("  ")) > 2 or following.startswith(" " * 20), lines[n]
