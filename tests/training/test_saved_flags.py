"""An evaluation takes the flags of the run that it evaluates, below those of its own command line."""

import math
import os

import pytest
import torch

from tests.training import small_run
from training import cli


def save(path, step=1, **flags):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"format_version": 1, "step": step, "flags": flags}, path)
    return path


def parse(*words):
    parser = cli.ArgumentParser("train.py", "")
    parser.add_argument("--arch", type=cli.prefixed("resnet"), choices=("resnet18", "resnet50"), default="resnet18")
    parser.add_argument("--data", nargs="+", default=["data"])
    parser.add_argument("--csv-val", default="")
    parser.add_argument("--weights", default="auto")
    cli.add_run_arguments(parser)
    parser.set_defaults(model_dir="runs/new", lr_batch_size=4)
    return parser.parse([str(word) for word in words])


@pytest.mark.parametrize("source", ["--resume={}", "--resume={}/last.pt", "--weights={}/last.pt"])
def test_default_then_recipe_then_run_then_command_line(tmp_path, source):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("lr = 0.7\nseed = 7\nkeep = 7\n")
    flags = {"lr": 0.5, "seed": 5, "arch": "resnet50", "milestones": [3.0], "clip_norm": 0.0, "norm_weight_decay": None}
    save(tmp_path / "run" / "last.pt", **flags)
    words = [source.format(tmp_path / "run"), "--config", recipe, "--seed", 0]
    args = parse(*words, "--eval-only")
    assert (args.keep, args.lr, args.seed, args.arch, args.milestones) == (7, 0.5, 0, "resnet50", [3.0])
    assert (args.norm_weight_decay, args.model_dir) == (None, str(tmp_path / "run"))
    assert parse(*words, "--eval-only", "--model-dir", "runs/new").model_dir == "runs/new"
    args = parse(*words)
    assert (args.lr, args.arch, args.model_dir) == (0.7, "resnet18", "runs/new"), "it trains with its own flags"


def test_what_is_about_the_process_is_not_taken(tmp_path):
    taken = {"batch_size": 9, "precision": "bf16", "deterministic": False, "ema": 0.9, "freeze_bn": True}
    process = {"device": "cuda:1", "gpus": "0,1", "workers": 9, "accumulate": 3, "compile": True, "sync_bn": True}
    process |= {"overwrite": True, "preflight": True, "eval_only": False, "log_level": "debug", "config": "x.toml"}
    save(tmp_path / "last.pt", **taken, **process, weights="x.pt", model_dir="elsewhere", flag_of_an_earlier_version=3)
    args = vars(parse("--model-dir", tmp_path, "--resume", "auto", "--eval-only"))
    defaults = vars(parse("--model-dir", tmp_path, "--resume", "auto")) | {"eval_only": True}
    assert {name: args[name] for name in taken} == taken
    assert {name for name in args if args[name] != defaults[name]} == taken.keys()


def test_new_data_replace_all_parts_of_the_data_of_the_run(tmp_path):
    save(tmp_path / "last.pt", data=["a"], csv_val="a/val.csv")
    resume = ["--resume", tmp_path, "--eval-only"]
    assert (parse(*resume).data, parse(*resume).csv_val) == (["a"], "a/val.csv")
    assert (parse(*resume, "--data", "b").data, parse(*resume, "--data", "b").csv_val) == (["b"], "")
    assert parse(*resume, "--csv-val", "b.csv").csv_val == "b.csv"


def test_the_flags_are_those_of_the_newest_checkpoint_that_can_be_read(tmp_path):
    save(tmp_path / "previous.pt", lr=0.5)
    small_run.truncate(save(tmp_path / "last.pt", lr=0.6))
    assert parse("--resume", tmp_path, "--eval-only").lr == 0.5
    (tmp_path / "previous.pt").unlink()
    for n, name in enumerate(("best.pt", "step_000002.pt")):
        os.utime(save(tmp_path / name, lr=n), (n, n))
    assert parse("--resume", tmp_path, "--eval-only").lr == 1


@pytest.mark.parametrize(
    "words", ["--resume nowhere", "--weights nowhere.pt", "--weights auto", "--weights published.pt"]
)
def test_without_a_checkpoint_of_a_run_the_defaults_apply(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": torch.zeros(2)}, "published.pt")
    args = parse(*words.split(), "--eval-only", "--lr", "3")
    assert (args.lr, args.seed, args.model_dir) == (3, 0, "runs/new")


def test_a_run_of_another_script_is_refused(tmp_path, capsys):
    save(tmp_path / "last.pt", arch="mb1-ssd")
    with pytest.raises(SystemExit, match="2"):
        parse("--resume", tmp_path, "--eval-only")
    assert f"{tmp_path / 'last.pt'}: its --arch is mb1-ssd, which this script does not have" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"lr": "fast"}, "its --lr cannot be read: a str instead of a number"),
        ({"lr": -1.0}, "its --lr cannot be read: -1.0 is below 0"),
        ({"lr": math.nan}, "its --lr cannot be read: nan is below 0"),
        ({"batch_size": 1.5}, "its --batch_size cannot be read: '1.5' is not a whole number"),
        ({"milestones": "soon"}, "its --milestones cannot be read: a str instead of a list"),
        ({"milestones": ["soon"]}, "its --milestones cannot be read: 'soon' is not a list of numbers"),
        ({"scale_lr": "no"}, "its --scale_lr cannot be read: a str instead of a bool"),
        ({"norm_weight_decay": [1]}, "its --norm_weight_decay cannot be read: a list instead of a number"),
        ({"data": 3}, "its --data cannot be read: a number instead of a list"),
    ],
)
def test_flags_of_another_kind_in_a_checkpoint(tmp_path, capsys, flags, reason):
    save(tmp_path / "last.pt", **flags)
    with pytest.raises(SystemExit, match="2"):
        parse("--resume", tmp_path, "--eval-only")
    assert f"{tmp_path / 'last.pt'}: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["", "--freeze-bn", "--freeze-bn-stats", "--no-freeze-bn --lr 1e-5", "--lr-step 3,4.5"]
)
def test_the_flags_of_every_run_are_taken(tmp_path, words):
    flags = vars(parse(*words.split()))
    save(tmp_path / "last.pt", **{name: value for name, value in flags.items() if name != "eval_only"})
    args = vars(parse("--resume", tmp_path, "--eval-only"))
    assert {name for name in flags if args[name] != flags[name]} == {"resume", "eval_only", "model_dir"}


def test_a_split_is_for_an_evaluation(tmp_path, capsys):
    assert parse("--resume", tmp_path, "--eval-only", "--split", "test").split == "test"
    with pytest.raises(SystemExit, match="2"):
        parse("--split", "test")
    assert "--split test: is for --eval-only; add it" in capsys.readouterr().err
