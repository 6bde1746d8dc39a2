import argparse

import pytest

from training import flags


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(prog="train.py", description="One.\n\n  Two.", formatter_class=flags.HelpFormatter)
    parser.add_argument("--lr", "--learning-rate", type=float, default=0.01, help="base rate")
    parser.add_argument("--coco_path", default="", help="registered with an underscore")
    parser.add_argument("--net", choices=("mb1-ssd", "mb2-ssd-lite"), default="mb1-ssd", help="which")
    parser.add_argument("--data", nargs="+", default=["data"], help="folders")
    parser.add_argument("--use-cuda", type=flags.str2bool, default=True, help="false: the CPU")
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, help="yes or no")
    parser.add_argument("--share", type=flags.chance, default=1.0, help="of something")
    parser.add_argument("--pair", nargs=2, type=int, help="two")
    flags.add_run_arguments(parser)
    parser.set_defaults(monitor="mAP50")
    return parser


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def refusal(parser, argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.parse(parser, argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_defaults(parser):
    args = flags.parse(parser, [])
    assert (args.lr, args.epochs, args.monitor) == (0.01, 30, "mAP50")
    assert (args.resume, args.device, args.gpus, args.precision) == ("", "auto", "", "auto")
    assert (args.accumulate, args.ema, args.clip_norm, args.max_steps, args.seed) == (1, 0.0, 0.0, 0, 0)
    assert not (args.overwrite or args.eval_only or args.compile or args.preflight or args.sync_bn or args.freeze_bn)


def test_default_then_recipe_then_command_line(parser, recipe):
    argv = recipe("lr = 0.1\nepochs = 7\n")
    args = flags.parse(parser, [*argv, "--learning_rate", "0.5"])
    assert (args.lr, args.epochs, args.net) == (0.5, 7, "mb1-ssd")


def test_hyphen_and_underscore_are_one_flag(parser, recipe):
    argv = ["--num_epochs=3", "--coco-path", "x", "--save_every_steps", "5", "--eval_only"]
    args = flags.parse(parser, argv)
    assert (args.epochs, args.coco_path, args.save_every_steps, args.eval_only) == (3, "x", 5, True)
    args = flags.parse(parser, recipe("num_epochs = 4\ncoco-path = 'y'\nsave_every_steps = 6\neval-only = true\n"))
    assert (args.epochs, args.coco_path, args.save_every_steps, args.eval_only) == (4, "y", 6, True)


def test_words_after_a_double_hyphen_and_values_are_left_alone(parser):
    parser.add_argument("rest", nargs="*")
    args = flags.parse(parser, ["--coco_path", "a_b", "--", "--not_a_flag"])
    assert (args.coco_path, args.rest) == ("a_b", ["--not_a_flag"])


def test_recipe_values_have_the_types_of_the_command_line(parser, recipe):
    lines = [
        "lr = 1",
        "data = ['a', 'b']",
        "milestones = [80, 100]",
        "use-cuda = false",
        "clip = true",
        "pair = [1, 2]",
    ]
    args = flags.parse(parser, recipe("\n".join(lines)))
    assert (args.lr, args.data, args.milestones, args.use_cuda) == (1.0, ["a", "b"], [80.0, 100.0], False)
    assert isinstance(args.lr, float)
    assert (args.clip, args.pair) == (True, [1, 2])
    args = flags.parse(parser, recipe("data = 'one'\nno-clip = true\ngpus = 0\n"))
    assert (args.data, args.clip, args.gpus) == (["one"], False, "0")


def test_recipe_switches(parser, recipe):
    parser.add_argument("--no-validation", action="store_true")
    parser.add_argument("--no-flip", dest="flip", action="store_false")
    args = flags.parse(parser, recipe("no-validation = true\nno_flip = true\neval_only = false\n"))
    assert (args.no_validation, args.flip, args.eval_only) == (True, False, False)


def test_recipe_satisfies_a_required_flag(parser, recipe):
    parser.add_argument("--labels", required=True)
    assert flags.parse(parser, recipe("labels = 'l.txt'")).labels == "l.txt"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--epoch", "3"], ["unknown flag --epoch", "did you mean --epochs?"]),
        (["--batch_siz", "3"], ["unknown flag --batch_siz"]),
        (["--save_every_step=3"], ["did you mean --save-every-steps?"]),
        (["--accumulate", "0"], ["--accumulate", "0 is below 1"]),
        (["--ema", "1"], ["--ema", "1 is not below 1"]),
        (["--clip-norm", "nan"], ["--clip-norm", "nan is below 0"]),
        (["--max-steps", "1.5"], ["--max-steps", "'1.5' is not a whole number"]),
        (["--weight-decay", "-1"], ["--weight-decay", "-1 is below 0"]),
        (["--gamma", "inf"], ["--gamma", "inf is not finite"]),
        (["--share", "1.5"], ["--share", "1.5 is above 1"]),
        (["--use-cuda", "maybe"], ["--use-cuda", "neither true nor false"]),
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
        ("epochs = true", ["epochs", "expected a number, not true"]),
        ("epochs = '3'", ["epochs", "expected a number, not the text '3'"]),
        ("epochs = [1, 2]", ["epochs", "expected one value, not [1, 2]"]),
        ("accumulate = 0", ["accumulate", "0 is below 1"]),
        ("net = 'vgg'", ["net", "'vgg' is none of mb1-ssd, mb2-ssd-lite"]),
        ("net = ['mb1-ssd']", ["net", "expected one value"]),
        ("eval-only = 1", ["eval-only", "expected true or false, not 1"]),
        ("data = []", ["data", "expected 1 values, not 0"]),
        ("pair = [1]", ["pair", "expected 2 values, not 1"]),
        ("lr = 1\nlearning-rate = 2", ["lr and learning-rate are one flag"]),
        ("[lr]\nx = 1", ["lr", "a recipe is a flat list"]),
        ("lr = 1\nepochs = = 2", ["not a TOML file", "line 2"]),
    ],
)
def test_bad_recipes_name_file_key_and_reason(parser, recipe, text, parts, capsys):
    message = refusal(parser, recipe(text), capsys)
    assert all(part in message for part in ["recipe.toml", *parts]), message


def test_missing_recipe_lists_those_there(parser, recipe, tmp_path, capsys):
    recipe("lr = 1")
    message = refusal(parser, ["--config", str(tmp_path / "recip.toml")], capsys)
    assert "No such file" in message
    assert str(tmp_path / "recipe.toml") in message


def test_help_keeps_paragraphs_and_shows_telling_defaults(parser):
    text = parser.format_help()
    assert "One.\n\n  Two." in text
    assert "base rate (default: 0.01)" in text
    assert "evaluate and exit\n" in text
    assert "(default: None)" not in text
    assert "(default: False)" not in text


def test_run_turns_mistakes_into_a_line_and_exit_2(capsys):
    class DataError(Exception):
        pass

    for mistake in (flags.UsageError, DataError):

        def main(mistake=mistake):
            raise mistake("a.xml: object 3: no box")

        with pytest.raises(SystemExit) as stopped:
            flags.run(main, DataError)
        assert stopped.value.code == 2
        assert capsys.readouterr().err == "error: a.xml: object 3: no box\n"
    with pytest.raises(ZeroDivisionError):
        flags.run(lambda: 1 / 0, DataError)


def test_numbers():
    assert flags.numbers("80,100.5") == [80.0, 100.5]
    with pytest.raises(argparse.ArgumentTypeError, match="80,100"):
        flags.numbers("80;100")


def test_eval_only_needs_weights():
    flags.need_weights(False, "", "--weights")
    flags.need_weights(True, "auto", "--weights")
    with pytest.raises(flags.UsageError, match="--eval-only: no weights; give --resume auto or --weights FILE"):
        flags.need_weights(True, "", "--weights")


def test_map50_is_ap50_or_the_map_of_voc_and_nothing_else():
    assert flags.choose_monitor("mAP50", "AP", ["loss", "AP", "AP50", "mAP", "mAP_11point"]) == "AP50"
    assert flags.choose_monitor("mAP50", "loss", ["loss", "mAP", "mAP_11point"]) == "mAP"
    assert flags.choose_monitor("", "loss", ["loss"]) == "loss"
    with pytest.raises(flags.UsageError, match="--monitor mAP50: not measured"):
        flags.choose_monitor("mAP50", "loss", ["loss", "NDS", "mAP"])
