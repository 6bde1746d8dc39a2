"""Command lines of mrnabati/CenterFusion."""

import argparse
import re

import pytest

from training import centerfusion_options, cli


def parser():
    built = cli.ArgumentParser("train.py", "")
    built.add_argument("--input-size", type=int, nargs=2, default=[448, 800])
    built.add_argument("--color-jitter", type=float, default=0.5)
    built.add_argument("--pillar-dims", type=cli.numbers, default="1.5,0.2,0.2")
    built.add_argument("--pointcloud", action="store_true")
    cli.add_nuscenes_arguments(built)
    cli.add_run_arguments(built)
    built.set_defaults(model_dir="runs/here", optimizer="adam")
    centerfusion_options.add_arguments(built)
    return built


def parse(words):
    return parser().parse(words.split())


def test_options_without_effect_are_accepted_and_named_on_one_line():
    args = parse(
        "ddd --dataset nuscenes --debug 4 --nms --shuffle_train --K 100 --test_scales 1.0 --num_iters -1 --nms"
    )
    assert centerfusion_options.notes(args) == [
        "no effect here: --K, --dataset, --debug, --nms, --num-iters, --shuffle-train, --test-scales"
    ]
    assert centerfusion_options.notes(parse("ddd")) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset kitti", "--dataset kitti: this script reads nuScenes alone"),
        ("--demo clip.mp4", r"use python predict\.py"),
        ("--keep_res", "--input-size H W"),
        ("--K 50", "only 100 is supported"),
        ("--wh_weight 0.2", "only 0.1 is supported"),
        ("--out_thresh 0.2", "--threshold"),
        ("--tracking", "leave it out"),
        ("--model_output_list", r"export\.py"),
    ],
)
def test_what_would_change_the_result_is_an_error_with_a_remedy(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(words)
    assert re.search(message, capsys.readouterr().err)


def test_options_that_have_another_name_here():
    args = parse("--exp_id night --eval --optim sgd --no_color_aug --save_all --trainval --input_res 512 --input_w 640")
    assert (args.model_dir, args.eval_only, args.optimizer, args.color_jitter) == ("runs/night", True, "sgd", 0.0)
    assert (args.save_every_epochs, args.val_split, args.input_size) == (1, "test", [512, 640])
    args = parse("--input_h 64 --input_w -1")
    assert (args.model_dir, args.optimizer, args.val_split, args.input_size) == (
        *("runs/here", "adam", "mini_val"),
        [64, 800],
    )
    assert centerfusion_options.architecture("dla_34") == "centerfusion_dla34"


def test_they_are_not_among_the_flags_that_are_suggested(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--rotat 3")
    assert "--rotate" not in capsys.readouterr().err


def test_pillars_other_than_the_published_are_noted():
    (line,) = centerfusion_options.notes(parse("--pointcloud --pillar_dims 1.0,0.2,0.2"))
    assert line.startswith("--pillar-dims 1,0.2,0.2 is used; ") and "1.5,0.2,0.2" in line
    assert not centerfusion_options.notes(parse("--pointcloud --pillar_dims 1.5,0.2,0.2"))


def test_parsing_over_a_namespace_without_defaults():
    """Whoever asks which flags a command line has parses it over a namespace of placeholders."""
    unset = argparse.Namespace(no_effect=None, input_size=None, model_dir=None)
    args = parser().parse_args(["--nms", "--input-h", "64"], unset)
    assert args.no_effect == ["--nms"] and args.input_size[0] == 64
