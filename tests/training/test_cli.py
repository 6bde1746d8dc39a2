import argparse
import os
import re
import signal

import pytest

from data.loader import Loader
from tests.training import small_run
from training import cli
from utils.errors import DataError, UsageError


@pytest.fixture
def parser():
    parser = cli.ArgumentParser("train.py", "One.\n\n  Two.")
    parser.add_argument("--coco_path", default="", help="declared with an underscore")
    parser.add_argument("--net", choices=("mb1-ssd", "mb2-ssd-lite"), default="mb1-ssd", help="which")
    parser.add_argument("--data", nargs="+", default=["data"], help="folders")
    parser.add_argument("--use-cuda", type=cli.boolean, default=True, help="false: the CPU")
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, help="yes or no")
    parser.add_argument("--share", type=cli.probability, default=1.0, help="of something")
    parser.add_argument("--pair", nargs=2, type=int, help="two")
    parser.add_argument("--depth", type=cli.prefixed("resnet"), choices=("resnet18", "resnet50"), help="of the network")
    cli.add_run_arguments(parser)
    parser.set_defaults(monitor="mAP50")
    return parser


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_start_options(parser):
    parser.add_argument("--weights", default="auto")
    expected = {"weights": "auto", "backbone_weights": "none", "strict": False, "freeze_bn": True}
    assert cli.start_options(parser.parse(["--freeze-bn"])) == expected
    parser.add_argument("--backbone-weights", default="auto")
    assert cli.start_options(parser.parse(["--eval-only"])) == {
        **expected,
        "backbone_weights": "auto",
        "strict": True,
        "freeze_bn": False,
    }


def test_size(parser, capsys):
    """One number or two, after which nothing else may follow."""
    parser.add_argument("inputs", nargs="*")
    cli.add_weights_arguments(parser, "of the input")
    assert parser.parse([]).size is None
    assert parser.parse(["a.jpg", "--size", "512"]).size == [512, 512]
    assert parser.parse(["--size", "160", "224", "--labels", "b"]).size == [160, 224]
    assert refusal(parser, ["--size", "16", "32", "64"], capsys).endswith("--size 16 32 64: give one number, or two")
    assert refusal(parser, ["--size", "512", "a.jpg"], capsys).endswith(
        "argument --size: 'a.jpg' is not a whole number"
    )


def refusal(parser, argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        parser.parse(argv)
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_defaults(parser):
    args = parser.parse([])
    assert (args.lr, args.epochs, args.monitor) == (0.01, 30, "mAP50")
    assert (args.resume, args.device, args.gpus, args.precision) == ("", "auto", "", "auto")
    assert (args.accumulate, args.ema, args.clip_norm, args.max_steps, args.seed) == (1, 0.0, 0.0, 0, 0)
    assert (args.milestones, args.milestone_steps, args.save_epochs) == ([8.0, 11.0], None, [])
    assert not (args.overwrite or args.eval_only or args.compile or args.preflight or args.sync_bn or args.freeze_bn)


def test_default_then_recipe_then_command_line(parser, recipe):
    args = parser.parse([*recipe("lr = 0.1\nepochs = 7\n"), "--learning_rate", "0.5"])
    assert (args.lr, args.epochs, args.net) == (0.5, 7, "mb1-ssd")


def test_hyphen_and_underscore_are_one_flag(parser, recipe):
    args = parser.parse(["--num_epochs=3", "--coco-path", "x", "--save_every_steps", "5", "--eval_only"])
    assert (args.epochs, args.coco_path, args.save_every_steps, args.eval_only) == (3, "x", 5, True)
    args = parser.parse(recipe("num_epochs = 4\ncoco-path = 'y'\nsave_every_steps = 6\neval-only = true\n"))
    assert (args.epochs, args.coco_path, args.save_every_steps, args.eval_only) == (4, "y", 6, True)


def test_values_and_words_after_a_double_hyphen_are_not_changed(parser):
    parser.add_argument("rest", nargs="*")
    args = parser.parse(["--coco_path", "a_b", "--", "--not_a_flag"])
    assert (args.coco_path, args.rest) == ("a_b", ["--not_a_flag"])


def test_recipe_values_have_the_types_of_the_command_line(parser, recipe):
    lines = ["lr = 1", "data = ['a', 'b']", "milestones = [80, 100]", "use-cuda = false", "clip = true"]
    args = parser.parse(recipe("\n".join([*lines, "pair = [1, -2]", "depth = 18"])))
    assert (args.lr, args.data, args.milestones, args.use_cuda) == (1.0, ["a", "b"], [80.0, 100.0], False)
    assert isinstance(args.lr, float)
    assert (args.clip, args.pair, args.depth) == (True, [1, -2], "resnet18")
    args = parser.parse(recipe("data = 'one'\nno-clip = true\ngpus = 0\nresume = ''\n"))
    assert (args.data, args.clip, args.gpus, args.resume) == (["one"], False, "0", "")


def test_recipe_switches(parser, recipe):
    parser.add_argument("--no-validation", action="store_true")
    parser.add_argument("--no-flip", dest="flip", action="store_false")
    args = parser.parse(recipe("no-validation = true\nno_flip = true\neval_only = false\n"))
    assert (args.no_validation, args.flip, args.eval_only) == (True, False, False)
    parser.set_defaults(freeze_bn=True)
    assert parser.parse(recipe("freeze-bn = false")).freeze_bn is False
    assert parser.parse(recipe("no-freeze-bn = true")).freeze_bn is False
    assert parser.parse(recipe("no-freeze-bn = false")).freeze_bn is True
    assert parser.parse([*recipe("freeze-bn = false"), "--freeze-bn"]).freeze_bn is True


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--epoch", "3"], ["unknown flag --epoch", "did you mean --epochs?"]),
        (["--batch_siz", "3"], ["unknown flag --batch_siz", "did you mean --batch-size?"]),
        (["--save_every_step=3"], ["did you mean --save-every-steps?"]),
        (["--accumulate", "0"], ["--accumulate", "0 is below 1"]),
        (["--ema", "1"], ["--ema", "1 is not below 1"]),
        (["--clip-norm", "nan"], ["--clip-norm", "nan is below 0"]),
        (["--max-steps", "1.5"], ["--max-steps", "'1.5' is not a whole number"]),
        (["--lr", "fast"], ["--lr", "'fast' is not a number"]),
        (["--weight-decay", "-1"], ["--weight-decay", "-1 is below 0"]),
        (["--gamma", "inf"], ["--gamma", "inf is not finite"]),
        (["--share", "1.5"], ["--share", "1.5 is above 1"]),
        (["--use-cuda", "maybe"], ["--use-cuda", "neither true nor false"]),
        (["--depth", "19"], ["--depth", "invalid choice: 'resnet19'"]),
    ],
)
def test_bad_command_lines_name_flag_and_reason(parser, argv, parts, capsys):
    message = refusal(parser, argv, capsys)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("epoch = 3", ["unknown key epoch", "did you mean epochs?"]),
        ("config = 'b.toml'", ["unknown key config"]),
        ("zzzzz = 1", ["unknown key zzzzz", "--help"]),
        ("epochs = 3.5", ["epochs", "'3.5' is not a whole number"]),
        ("epochs = true", ["epochs", "'true' is not a whole number"]),
        ("epochs = 'ten'", ["epochs", "'ten' is not a whole number"]),
        ("epochs = [1, 2]", ["epochs", "'1,2' is not a whole number"]),
        ("accumulate = 0", ["accumulate", "0 is below 1"]),
        ("net = 'vgg'", ["net", "invalid choice: 'vgg'", "mb1-ssd", "mb2-ssd-lite"]),
        ("net = ['mb1-ssd', 'mb2-ssd-lite']", ["net", "invalid choice"]),
        ("eval-only = 1", ["eval-only", "expected true or false, not 1"]),
        ("data = []", ["data", "expected at least one argument"]),
        ("pair = [1]", ["pair", "expected 2 arguments"]),
        ("lr = 1\nlearning-rate = 2", ["lr and learning-rate are the same flag"]),
        ("[lr]\nx = 1", ["lr", "a recipe is a flat list"]),
        ("lr = 1\nepochs = = 2", ["not a TOML file", "line 2"]),
    ],
)
def test_bad_recipes_name_file_key_and_reason(parser, recipe, text, parts, capsys):
    message = refusal(parser, recipe(text), capsys)
    assert all(part in message for part in ["recipe.toml", *parts]), message


def test_an_error_on_the_command_line_does_not_name_the_recipe(parser, recipe, capsys):
    assert "recipe.toml" not in refusal(parser, [*recipe("lr = 1"), "--epochs", "0"], capsys)


def test_a_missing_recipe_lists_those_nearby(parser, recipe, tmp_path, capsys):
    recipe("lr = 1")
    message = refusal(parser, ["--config", str(tmp_path / "recip.toml")], capsys)
    assert "No such file" in message
    assert str(tmp_path / "recipe.toml") in message


def test_help_keeps_paragraphs_and_shows_informative_defaults(parser):
    text = parser.format_help()
    assert "One.\n\n  Two." in text
    assert "base learning rate (default: 0.01)" in text
    assert "folders (default: data)" in text
    assert "then exit\n" in text
    assert "(default: None)" not in text
    assert "(default: False)" not in text


@pytest.mark.parametrize("error", [UsageError, DataError])
def test_an_error_of_the_user_becomes_a_line_and_exit_code_2(error, capsys):
    def main():
        raise error("a.xml: object 3: no box")

    with pytest.raises(SystemExit, match="2"):
        cli.run(main)
    assert capsys.readouterr().err == "error: a.xml: object 3: no box\n"


def test_an_error_that_another_process_prints_is_not_printed_again(capsys):
    def main():
        error = UsageError("no folder")
        error.is_printed = False
        raise error

    with pytest.raises(SystemExit, match="2"):
        cli.run(main)
    assert capsys.readouterr().err == ""


def test_other_errors_keep_their_traceback_and_an_interrupt_has_exit_code_130():
    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="mat1"):
        cli.run(fail)
    with pytest.raises(SystemExit, match="130"):
        cli.run(interrupted)


class Killed:
    """A data set whose items kill the process that reads them."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: list(Loader(Killed(), 1, list)))
    line = (
        r"error: a data loading worker, process \d+, was ended by 'Killed': .*memory is full; use fewer --workers .*\n"
    )
    assert re.fullmatch(line, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("40", "scores are 0 to 1, and 40 % is 0.4"),
        ("40%", "and 40 % is 0.4"),
        ("101", "is above 1"),
        ("x", "is not a number"),
    ],
)
def test_scores_in_percent_are_told_so(text, reason):
    assert cli.score("0.4") == 0.4 and cli.score("1") == 1
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        cli.score(text)


def test_flags_without_effect_are_refused():
    args = argparse.Namespace(samples=0, cache_dir=None, save_frames=False, every=None)
    with pytest.raises(UsageError, match=r"^--samples: is for others$"):
        cli.refuse(args, vars(args), "is for others")
    cli.refuse(args, ("cache_dir", "save_frames", "every"), "is for others")


def test_numbers():
    assert cli.numbers("80,100.5") == [80.0, 100.5]
    assert cli.numbers("") == []
    with pytest.raises(argparse.ArgumentTypeError, match="80,100"):
        cli.numbers("80;100")


def test_options_of_data_sets_come_from_the_flags():
    parser = cli.ArgumentParser("train.py", "")
    cli.add_detection_arguments(parser)
    cli.add_run_arguments(parser)
    assert cli.layout_options(parser.parse(["--csv-train", "a", "--csv_val", "b", "--voc-offset", "0"])) == {
        "coco_sets": ("train2017", "val2017"),
        "remap_by_name": False,
        "val_only": False,
        "split": "",
        "csv_files": ("a", "b", ""),
        "voc_offset": 0,
    }
    parser = cli.ArgumentParser("train.py", "")
    cli.add_detection_arguments(parser, masks=True)
    cli.add_run_arguments(parser)
    assert cli.layout_options(parser.parse(["--coco-val", "x", "--eval-only", "--split", "y"])) == {
        "coco_sets": ("train2017", "x"),
        "remap_by_name": False,
        "val_only": True,
        "split": "y",
    }
    parser = cli.ArgumentParser("train.py", "")
    cli.add_nuscenes_arguments(parser)
    cli.add_data_arguments(parser)
    cli.add_run_arguments(parser)
    common = {"version": "", "skip_missing": False, "cache": None}
    for words, expected in (
        ("--val_split val --check-data", {"train_split": "train", "val_split": "val", "check": True}),
        ("--val_split val --eval-only", {"train_split": "", "val_split": "val", "check": False}),
        ("--split test --eval-only", {"train_split": "", "val_split": "test", "check": False}),
    ):
        assert cli.nuscenes_options(parser.parse(words.split())) == common | expected


def test_map50_is_ap50_or_the_map_of_voc_and_nothing_else():
    assert cli.choose_monitor("mAP50", "AP", ["loss", "AP", "AP50", "mAP", "mAP_11point"]) == "AP50"
    assert cli.choose_monitor("mAP50", "loss", ["loss", "mAP", "mAP_11point"]) == "mAP"
    assert cli.choose_monitor("", "loss", ["loss"]) == "loss"
    with pytest.raises(UsageError, match="--monitor mAP50: not measured"):
        cli.choose_monitor("mAP50", "loss", ["loss", "NDS", "mAP"])


def test_direction_of_metrics():
    higher = ["AP", "AP50", "mask AP", "mAP", "mAP_11point", "AR100", "mask AR1", "NDS", "top1", "top5"]
    lower = ["loss", "regression_loss", "mATE", "mAOE", "box_regression", "hm"]
    assert [name for name in higher + lower if cli.higher_is_better(name)] == higher


def test_flags_of_all_scripts_have_their_former_spellings():
    former = "--num-epochs 3 --learning-rate 1 --checkpoint-folder x --num-workers 1 --debug-steps 5 --lr-step 1,2"
    former += " --val-intervals 2 --save-point 3,4"
    new = "--epochs 3 --lr 1 --model-dir x --workers 1 --log-every 5 --milestones 1,2 --validation-epochs 2"
    assert small_run.flags(former) == small_run.flags(f"{new} --save-epochs 3,4")


@pytest.mark.parametrize(
    "words",
    [
        *("--seed 100000000000000000000000", "--seed -1", "--milestones nan", "--milestones 1e300", "--t-max 1e308"),
        *("--epochs 1000000000000000000", "--batch-size 1000000000000", "--workers 1000000", "--lr nan", "--lr inf"),
        *("--size 1000000", "--size 1", "--warmup-steps 99999999999999", f"--model-dir {'m' * 5000}"),
        *(f"--resume a/{'b' * 300}", f"--epochs {'9' * 100_000}", "--monitor \x1b[2J" + "x" * 300),
    ],
)
def test_absurd_values_are_refused_by_one_line(parser, capsys, words):
    cli.add_weights_arguments(parser, "of the input")
    line = refusal(parser, words.split(), capsys)
    assert words.split()[0] in line and len(line) < 5000 and "\x1b" not in line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("data = " + "[" * 100_000, "not a TOML file"),
        ("seed = " + "9" * 10_000, "not a TOML file"),
        ('data = ["a\\u0000b"]', "data: has a null byte"),
    ],
)
def test_hostile_recipes(parser, recipe, capsys, text, reason):
    assert reason in refusal(parser, recipe(text), capsys)


def test_a_recipe_that_is_no_regular_file(parser, capsys, tmp_path):
    assert "Is a directory" in refusal(parser, ["--config", str(tmp_path)], capsys)
    assert "not a regular file" in refusal(parser, ["--config", "/dev/zero"], capsys)


@pytest.mark.parametrize(("words", "value"), [(("true", "Yes", "ON", "1"), True), (("false", "No", "off", "0"), False)])
def test_flags_that_spell_their_value_out(words, value):
    assert all(cli.boolean(word) is value for word in words)
