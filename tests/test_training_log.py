import json
import math
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import devices, log


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    return EventAccumulator(str(folder)).Reload()


def run_to(folder, first, last, total=10):
    with log.Logger(folder, total_steps=total, first_step=first, every=2, flags={"lr": 0.1}) as logger:
        for step, _ in enumerate(logger.steps(range(last - first)), start=first + 1):
            if logger.due(step):
                logger.log(step, {"Loss/train": 1 / step}, images=8)


def test_one_call_fills_three_sinks(tmp_path, capsys):
    with log.Logger(tmp_path, total_steps=3, every=1) as logger:
        logger.log(1, {"Loss/train": torch.tensor(2.5), "lr": 1e-3, "bad": math.inf})
    assert lines(tmp_path) == [{"step": 1, "Loss/train": 2.5, "lr": 1e-3, "bad": None}]
    assert capsys.readouterr().out == "step 1/3  Loss/train 2.5  lr 0.001  bad inf\n"
    board = events(tmp_path)
    assert [(e.step, e.value) for e in board.Scalars("Loss/train")] == [(1, 2.5)]


def test_speed_of_the_steps_since_the_last_line(tmp_path):
    run_to(tmp_path, 0, 5, total=5)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 5]
    for line in lines(tmp_path):
        assert line["speed/images_per_second"] > 0
        assert 0 <= line["speed/data_wait"] <= 1
        assert line["speed/peak_memory_mb"] > 1


def test_clock_counts_only_the_time_between_start_and_stop(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])

    def loader():
        for item in range(2):
            now[0] += 3.0
            yield item

    clock = log._Clock()
    for _ in range(2):
        clock.start()
        for _ in clock.waiting(loader()):
            now[0] += 1.0
        clock.stop()
        now[0] += 100.0  # an evaluation
    assert clock.read() == (16.0, 12.0)
    assert clock.read() == (0.0, 0.0)


def test_a_resumed_run_logs_each_step_once(tmp_path):
    run_to(tmp_path, 0, 8)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "cut sho')
    run_to(tmp_path, 4, 10)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8, 10]
    assert [event.step for event in events(tmp_path).Scalars("Loss/train")] == [2, 4, 6, 8, 10]


def test_a_run_that_died_before_its_first_checkpoint_leaves_no_trace(tmp_path):
    run_to(tmp_path, 0, 4)
    run_to(tmp_path, 0, 2)
    assert [line["step"] for line in lines(tmp_path)] == [2]
    assert [event.step for event in events(tmp_path).Scalars("Loss/train")] == [2]


def test_an_evaluation_inside_the_loop_is_not_counted(tmp_path, monkeypatch):
    now = [0.0]
    with log.Logger(tmp_path, total_steps=1) as logger:
        monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
        for _ in logger.steps(range(1)):
            now[0] += 2.0
            with logger.paused():
                now[0] += 100.0
            logger.log(1, {}, images=8)
        monkeypatch.undo()
    assert lines(tmp_path)[0]["speed/images_per_second"] == 4.0


def test_flags_and_versions_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.1"])
    with log.Logger(tmp_path, total_steps=1, flags={"lr": 0.1, "data": ["a"]}):
        pass
    assert json.loads((tmp_path / "flags.json").read_text()) == {"lr": 0.1, "data": ["a"]}
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["argv"] == ["train.py", "--lr", "0.1"]
    assert versions["torch"] == torch.__version__
    assert {"python", "torchvision", "numpy", "cuda", "git_revision"} <= set(versions)
    assert "flags/text_summary" in events(tmp_path).Tags()["tensors"]


def test_without_a_terminal_there_is_no_bar(tmp_path, capsys):
    run_to(tmp_path, 0, 5, total=5)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [line.split("  ")[0] for line in captured.out.splitlines()] == ["step 2/5", "step 4/5", "step 5/5"]


def test_many_values_are_cut_on_the_console_only(tmp_path, capsys):
    with log.Logger(tmp_path, total_steps=1) as logger:
        logger.log(1, {f"Class Average Precision/{i}": 0.5 for i in range(80)})
    assert "(64 more in metrics.jsonl)" in capsys.readouterr().out
    assert len(lines(tmp_path)[0]) == 81


def test_other_processes_write_nothing(tmp_path, capsys):
    with log.Logger(tmp_path / "run", total_steps=2, enabled=False) as logger:
        assert list(logger.steps("ab")) == ["a", "b"]
        logger.log(1, {"x": 1.0}, images=3)
        logger.say("hello")
        logger.images("x", torch.zeros(3, 2, 2, dtype=torch.uint8), 1)
        logger.pr_curve("x", [1.0], [1.0], 1)
        logger.text("x", "y", 1)
        logger.flush()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_pictures_curves_and_text_reach_tensorboard(tmp_path):
    recall = torch.linspace(0, 1, 300)
    with log.Logger(tmp_path, total_steps=1) as logger:
        logger.images("pictures", torch.full((3, 4, 5), 9, dtype=torch.uint8), 1)
        logger.pr_curve("PR/cell", 1 - recall / 2, recall, 1)
        logger.pr_curve("PR/none", [], [], 1)
        logger.text("note", "**bold**", 1)
    board = events(tmp_path)
    (picture,) = board.Images("pictures")
    assert (picture.width, picture.height) == (5, 4)
    assert {"PR/cell", "PR/none", "note/text_summary"} <= set(board.Tags()["tensors"])
    from tensorboard.util import tensor_util

    curve = tensor_util.make_ndarray(board.Tensors("PR/cell")[0].tensor_proto)
    hits, false, _, missed, precision, seen = curve
    assert curve.shape == (6, 127)
    assert (seen[0], seen[-1]) == (1.0, 0.0)
    assert (precision[0], precision[-1]) == (0.5, 1.0)
    assert (hits + false)[-1] >= 1, "TensorBoard cuts a curve where nothing was detected"
    torch.testing.assert_close(torch.tensor(hits + missed), torch.full((127,), 1000.0))


def terms(box, cls=1.0):
    return {"box": torch.tensor(float(box), requires_grad=True), "cls": torch.tensor(cls)}


def test_meter_averages_steps_and_sums_their_pieces():
    meter = log.Meter()
    assert meter.read() == {}
    meter.add(terms(1))
    meter.add(terms(3))
    assert meter.read() == {"box": 2.0, "cls": 1.0}
    for step, box in ((1, 1), (1, 2), (2, 5)):
        meter.add(terms(box), step=step)
    assert meter.read() == {"box": 4.0, "cls": 1.5}
    assert meter.read() == {}
    meter.add({"other": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="read the meter in between"):
        meter.add(terms(1))


def test_non_finite_loss_names_step_images_and_terms(tmp_path):
    meter = log.Meter()
    meter.add(terms(1), [10, 11], step=4)
    meter.add(terms(2), [12, 13], step=5)
    meter.add(terms(math.nan, cls=math.inf), [14, 15], step=5)
    meter.add(terms(math.nan), [16], step=6)
    with pytest.raises(log.NonFinite, match=r"non-finite loss at step 5: box nan, cls inf; images 14, 15") as caught:
        meter.read()
    assert isinstance(caught.value, FloatingPointError)
    log.write_nan_report(tmp_path / "nan_report.json", caught.value, lr=0.01)
    report = json.loads((tmp_path / "nan_report.json").read_text())
    assert report == {"step": 5, "images": [14, 15], "paths": [], "losses": {"box": "nan", "cls": "inf"}, "lr": 0.01}


def test_read_losses_sums_and_reports(tmp_path):
    run, meter = devices.setup(device="cpu"), log.Meter()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    meter.add(terms(2), [1], step=1)
    assert log.read_losses(meter, run, optimizer, tmp_path) == {"loss": 3.0, "box": 2.0, "cls": 1.0}
    meter.add(terms(math.nan), [7], step=2)
    with pytest.raises(log.NonFinite, match=r"box nan, cls 1; images data/seven\.jpg"):
        log.read_losses(meter, run, optimizer, tmp_path, {7: "data/seven.jpg"})
    report = json.loads((tmp_path / "nan_report.json").read_text())
    assert (report["images"], report["paths"], report["lr"]) == ([7], ["data/seven.jpg"], 0.5)


def test_some_non_finite_steps_in_a_row_are_borne():
    meter = log.Meter(limit=2)
    for step, box in enumerate([1, math.nan, math.inf, 3, math.nan]):
        meter.add(terms(box), step=step)
    assert meter.read()["box"] == 2.0
    assert meter.nonfinite == 3
    meter.add(terms(math.nan), step=5)
    assert math.isnan(meter.read()["box"])
    meter.add(terms(math.nan), [1], step=6)
    with pytest.raises(log.NonFinite, match="step 6"):
        meter.read()


def test_levels_show_flags_lines_or_nothing(tmp_path, capsys):
    shown = {}
    for level in ("debug", "info", "warning"):
        with log.Logger(tmp_path / level, 3, flags={"lr": 0.125}, level=level) as logger:
            logger.log(1, {"loss": 2.0})
        shown[level] = capsys.readouterr().out
    assert '"lr": 0.125' in shown["debug"] and "loss 2" in shown["debug"]
    assert "0.125" not in shown["info"] and "loss 2" in shown["info"]
    assert shown["warning"] == ""
