"""Every benchmark runs, on data so small that its figures mean nothing, and prints a row for each comparison."""

import argparse
import json

import numpy as np
import pytest
import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from benchmarks import __main__ as command_line
from benchmarks import nuscenes_tables, programs
from benchmarks.programs import Speed
from data.nuscenes import tables
from tests.script_helpers import Script, log_lines
from training import distributed

pytestmark = pytest.mark.slow
TINY = "--size 96 --batch-size 2 --steps 2 --rounds 1 --device cpu"
DRAWN_FOR = {"ssd": "retinanet", "maskrcnn": "retinanet"}  # benchmark -> the script whose drawn data it uses
DRAWN_LAYOUT = {"imagefolder": "backbone", "coco": "retinanet", "nuscenes": "centerfusion"}


@pytest.mark.parametrize(
    ("benchmark", "flags", "references"),
    [
        ("backbone", "--precision fp32 bf16 --size 32", ["torchvision", "network alone"]),
        ("ssd", "--precision fp32 --arch mb1-ssd", ["network alone"]),
        ("retinanet", "--precision bf16 --variants ema", ["torchvision", "network alone", "--ema 0.999"]),
        ("maskrcnn", "--precision fp32 --arch maskrcnn_resnet18 --batch-size 1", ["torchvision"]),
        ("centerfusion", "--precision fp32 --variants accumulate --size 64", ["network alone", "--accumulate 2"]),
    ],
)
def test_script_is_compared_with_every_reference(benchmark, flags, references, drawn, monkeypatch, capsys):
    if benchmark == "maskrcnn":  # as if torchvision had the small network too
        monkeypatch.setattr(programs, "in_torchvision", lambda args: True)
    data = drawn(DRAWN_FOR.get(benchmark, benchmark))
    header, *rows = command_line.main([benchmark, *TINY.split(), *flags.split(), "--data", str(data)])
    precisions = [word for word in flags.split() if word in ("fp32", "bf16")]
    assert [row[header.index("compared with")] for row in rows] == references * len(precisions)
    for row, precision in zip(rows, np.repeat(precisions, len(references)), strict=True):
        assert row[0].endswith(precision)
        assert row[1] == "script"
        assert float(row[header.index("ratio")]) > 0
    assert capsys.readouterr().out.count("| script ") == len(rows)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("backbone --arch resnet50", True),
        ("backbone --arch dla34", False),
        ("ssd --arch vgg16-ssd", True),
        ("ssd --arch vgg16-ssd --size 512", False),
        ("ssd --arch mb1-ssd", False),
        ("retinanet --arch retinanet_resnet50", True),
        ("maskrcnn --arch maskrcnn_resnet50", True),
        ("maskrcnn --arch maskrcnn_resnet18", False),
        ("centerfusion", False),
    ],
)
def test_which_networks_torchvision_has(flags, expected):
    assert programs.in_torchvision(command_line.parse_args(flags.split())) == expected


def test_torchvision_trains_its_ssd(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(programs.detection, "ssd300_vgg16", ssdlite320_mobilenet_v3_large)  # ten times faster
    args = command_line.parse_args(["ssd", "--batch-size", "2", "--steps", "2", "--device", "cpu"])
    assert programs.torchvision_loop(args, "fp32", drawn("retinanet"), tmp_path).per_second > 0


@pytest.mark.parametrize("benchmark", ["backbone", "ssd", "retinanet", "maskrcnn"])
def test_torchvision_network_is_as_large_as_ours(benchmark):
    args = command_line.parse_args([benchmark])
    norms = (torch.nn.BatchNorm2d,) if benchmark in programs.FROZEN_BN else ()  # torchvision's have no parameters
    ours = programs.build_network(args, num_classes=5)
    theirs = programs.torchvision_network(args, num_classes=5 if benchmark == "backbone" else 6)
    counts = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    counts[0] -= sum(p.numel() for module in ours.modules() if isinstance(module, norms) for p in module.parameters())
    assert counts[0] == pytest.approx(counts[1], rel=2e-3)  # the background is a class in torchvision's heads


def test_loaders_are_compared_with_pillow(drawn, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "draw", lambda layout, folder: drawn(DRAWN_LAYOUT[layout]))
    header, *rows = command_line.main(["loader", "--rounds", "1", "--workers", "0"])
    assert [row[0].split()[0] for row in rows] == ["backbone", "ssd", "retinanet", "centerfusion"]
    assert all(float(row[2]) > 0 and row[header.index("compared with")] == "Pillow" for row in rows)
    assert capsys.readouterr().out.count("loader, without workers") == 4


def test_cached_tables_are_compared_with_parsing():
    header, row = command_line.main(["tables", "--copies", "2", "--rounds", "1"])
    assert row[0] == "nuScenes tables, 16 samples"
    assert float(row[2]) > 0
    assert float(row[header.index("ratio")]) > 0


def test_copies_of_the_tables_are_whole_and_separate(tmp_path):
    nuscenes_tables.draw(tmp_path, copies=3)
    drawn, copied = tables.load(tmp_path / "drawn", "v1.0-mini"), tables.load(tmp_path, "v1.0-mini")
    assert len(copied.sample_time) == 3 * nuscenes_tables.SAMPLES
    assert len(set(copied.sample_tokens)) == 3 * nuscenes_tables.SAMPLES
    assert len(copied.invalid_record) == 0
    for name in ("annotation_center", "annotation_velocity", "frame_channel", "sample_time"):
        value = getattr(drawn, name)
        np.testing.assert_array_equal(getattr(copied, name), np.concatenate([value] * 3), err_msg=name)
    previous, frames = drawn.frame_previous, len(drawn.frame_previous)
    shifted = [np.where(previous < 0, -1, previous + copy * frames) for copy in range(3)]
    np.testing.assert_array_equal(copied.frame_previous, np.concatenate(shifted))


def test_speed_is_the_median_after_the_warm_up(tmp_path):
    values = [(10, 1.0, 0.9), (20, 8.0, 0.2), (20, None, None), (30, 4.0, 0.1), (40, 6.0, 0.3)]
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step, speed, wait in values:
            line = {"val/loss": 1.0} if speed is None else {"speed/images_per_second": speed, "speed/data_wait": wait}
            file.write(json.dumps({"step": step, **line}) + "\n")
    assert programs.read_speed(argparse.Namespace(log_every=10), tmp_path) == Speed(6.0, 0.2)


def test_row_has_the_median_ratio_with_and_without_waiting():
    speeds, reference = [Speed(8.0, 0.5), Speed(2.0), Speed(6.0)], [Speed(4.0, 0, 30), Speed(2.0, 0, 31), Speed(2.0)]
    row = command_line.row("setting", "script", speeds, "torchvision", reference)
    reference_cells = ["torchvision", "2", "0%", "31 MB"]
    assert row == ["setting", "script", "6", "0%", "", *reference_cells, "2.00", "1.00 to 3.00", "3.00"]


def test_empty_columns_are_left_out_of_the_table():
    rows = [("a", "b", "c"), ("1", "", "2"), ("3", "", "")]
    assert command_line.table(rows) == "| a | c |\n| - | - |\n| 1 | 2 |\n| 3 |   |"


def test_set_for_gpus_has_valid_flags_which_others_replace():
    parsed = command_line.parse_all(["gpu", "--batch-size", "1"])
    assert [args.benchmark for args in parsed] == ["backbone", "ssd", "ssd", "retinanet", "maskrcnn", "centerfusion"]
    for args in parsed:
        assert (args.device, args.deterministic, args.batch_size) == ("cuda", False, 1)
        assert args.workers == distributed.cores()
        assert Script(args.benchmark, None).module.parse_args(["--arch", args.arch]).arch == args.arch
    assert [programs.in_torchvision(args) for args in parsed] == [True, False, True, True, True, False]


def test_set_for_gpus_runs_on_a_cpu(drawn, monkeypatch, capsys):
    lines = ("backbone --arch resnet18 --size 32", "centerfusion --arch centerfusion_resnet18 --size 64")
    monkeypatch.setattr(command_line, "GPU", lines)
    monkeypatch.setattr(command_line, "draw", lambda layout, folder, images: drawn(DRAWN_LAYOUT[layout]))
    small = "--steps 2 --log-every 1 --rounds 1 --batch-size 2 --workers 0 --precision fp32 --device cpu"
    rows = command_line.main(["gpu", *small.split()])
    assert [row[0].split(",")[0] for row in rows[1:]] == ["resnet18", "resnet18", "centerfusion_resnet18"]
    assert capsys.readouterr().out.count("| script ") == 3


def test_no_epoch_ends_in_the_time_that_is_measured(drawn, tmp_path):
    words = ["backbone", "--size", "32", "--batch-size", "8", "--steps", "8", "--log-every", "2", "--device", "cpu"]
    programs.script(command_line.parse_args(words), "fp32", drawn("backbone"), tmp_path)  # fewer than 64 images
    assert [line["step"] for line in log_lines(tmp_path) if "train/loss" in line] == [2, 4, 6, 8]


def test_peak_memory_is_that_of_a_gpu(tmp_path, monkeypatch):
    line = {"step": 2, "speed/images_per_second": 1.0, "speed/data_wait": 0.0, "speed/peak_memory_mb": 7.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    assert programs.read_speed(argparse.Namespace(log_every=1), tmp_path).memory == 0
    monkeypatch.setattr(programs.memory, "peak_gpu", lambda: 1)
    assert programs.read_speed(argparse.Namespace(log_every=1), tmp_path).memory == 7


def test_quick_set_has_valid_flags_and_every_benchmark():
    names = [args.benchmark for args in command_line.parse_all([])]
    assert names == ["tables", "loader", *command_line.DEFAULTS]


def test_too_few_steps_are_an_error(capsys):
    with pytest.raises(SystemExit) as error:
        command_line.parse_args(["ssd", "--steps", "19", "--log-every", "10"])
    assert error.value.code == 2
    assert "--steps 19: must be at least twice --log-every" in capsys.readouterr().err
