import contextlib
import dataclasses
import json
import math
import sys
import threading

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.util import tensor_util

from training import distributed, logger
from training.logger import Logger
from training.meter import NonFiniteLoss
from utils.errors import WriteError


@pytest.fixture(scope="module")
def run():
    return distributed.init_device("cpu")


@pytest.fixture(autouse=True)
def event_files_sort_by_age(monkeypatch):
    """TensorBoard reads files of one second by the number of the writer in its process, as text: 10 before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.zeros(1)], lr=0.5)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    return EventAccumulator(str(folder)).Reload()


def run_to(folder, run, first, last):
    """Log every second step of ten."""
    with Logger(folder, run, total_steps=10, first_step=first, flags={"lr": 0.1}) as log:
        for step, _ in enumerate(log.steps(range(last - first)), start=first + 1):
            if step % 2 == 0:
                log.log(step, {"train/loss": 1 / step}, images=8)


def terms(**values):
    return {name: torch.tensor(float(value)) for name, value in values.items()}


def test_one_call_writes_to_three_sinks(tmp_path, run, capsys):
    with Logger(tmp_path, run, total_steps=3) as log:
        log.log(1, {"train/loss": torch.tensor(2.5), "lr": 1e-3, "bad": math.inf})
    assert lines(tmp_path) == [{"step": 1, "train/loss": 2.5, "lr": 1e-3, "bad": None}]
    assert capsys.readouterr().out == "step 1/3  train/loss 2.5  lr 0.001  bad inf\n"
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")] == [(1, 2.5)]


def test_speed_is_that_of_the_steps_since_the_last_line(tmp_path, run, monkeypatch):
    now = [0.0]

    def loader():
        for item in range(4):
            now[0] += 3.0
            yield item

    monkeypatch.setattr(logger.time, "perf_counter", lambda: now[0])
    with Logger(tmp_path, run, total_steps=4) as log:
        now[0] += 50.0  # before the first step
        for step, _ in enumerate(log.steps(loader()), start=1):
            now[0] += 1.0
            if step % 2 == 0:
                log.log(step, {}, images=40)
                with log.paused():
                    now[0] += 100.0  # a validation
                log.log(step, {"val/loss": 1.0})
        monkeypatch.undo()
    first, _, second, _ = lines(tmp_path)
    for line in (first, second):
        assert line["speed/images_per_second"] == 40 / 8
        assert line["speed/data_wait"] == 6 / 8
        assert line["speed/peak_memory_mb"] > 1


def test_a_resumed_run_logs_each_step_once(tmp_path, run):
    run_to(tmp_path, run, 0, 8)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "cut sho')
    run_to(tmp_path, run, 4, 10)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8, 10]
    assert [event.step for event in events(tmp_path).Scalars("train/loss")] == [2, 4, 6, 8, 10]


def validated_run(folder, run, optimizer, steps, state=None, validates=False, save=None):
    """Log losses and validations of `steps`; `save` is called with the state of the log between the two."""
    first_step = steps[0] if validates else steps[0] - 1
    with Logger(folder, run, 10, first_step, state, validates) as log:
        for step in steps:
            if not (validates and step == first_step):
                log.add(step, terms(box=step, cls=1), [0])
                log.log_losses(step, optimizer, running=3)
            if save:
                log.flush()
                save(step, log.state_dict())
            image = torch.full((3, 4, 5), step, dtype=torch.uint8)
            log.log_validation(step, {"AP": step / 8}, [Evaluator()], [("images", image)])


def logged(folder):
    """All that a run has logged but speeds: lines, and what TensorBoard has under each tag."""
    kept = [{tag: value for tag, value in line.items() if not tag.startswith("speed")} for line in lines(folder)]
    board = events(folder)
    tags = board.Tags()
    read = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags["scalars"] if "speed" not in tag}
    read |= {tag: [(e.step, e.encoded_image_string) for e in board.Images(tag)] for tag in tags["images"]}
    curves = [tag for tag in tags["tensors"] if "PR" in tag]
    return kept, read | {tag: [(e.step, str(e.tensor_proto)) for e in board.Tensors(tag)] for tag in curves}


@pytest.mark.parametrize("step", [1, 2])
def test_a_validation_that_was_interrupted_after_its_log_is_logged_once(tmp_path, run, optimizer, step):
    """With its losses, which came before it, and the running loss goes on."""
    states = {}
    validated_run(tmp_path / "whole", run, optimizer, [1, 2, 3])
    validated_run(tmp_path / "killed", run, optimizer, [1, 2][:step], save=states.__setitem__)
    validated_run(tmp_path / "killed", run, optimizer, [1, 2, 3][step - 1 :], states[step], validates=True)
    whole, killed = logged(tmp_path / "whole"), logged(tmp_path / "killed")
    assert killed == whole
    assert len(whole[0]) == 6 and len(whole[1]["val/PR/cell"]) == 3


@pytest.mark.parametrize("cut", [1, 5, 11, 12, 40])
def test_tensorboard_files_cut_short_by_a_kill_are_continued(tmp_path, run, cut):
    run_to(tmp_path, run, 0, 8)
    (file,) = tmp_path.glob("events*")
    file.write_bytes(file.read_bytes()[:-cut])
    run_to(tmp_path, run, 4, 10)
    assert [event.step for event in events(tmp_path).Scalars("train/loss")] == [2, 4, 6, 8, 10]


def test_what_is_flushed_is_on_the_disk(tmp_path, run):
    with Logger(tmp_path, run, total_steps=1) as log:
        log.log(1, {"train/loss": 1.0})
        log.flush()
        assert [event.value for event in events(tmp_path).Scalars("train/loss")] == [1.0]


def test_the_end_of_the_log_ends_the_loader(tmp_path, run):
    ended = []

    def loader():
        try:
            yield from range(3)
        finally:
            ended.append(True)

    with Logger(tmp_path, run, total_steps=3, enabled=False) as log:
        assert next(log.steps(loader())) == 0
    assert ended


def test_a_validation_loss_that_is_not_finite_is_printed(tmp_path, run, capsys):
    with Logger(tmp_path, run, total_steps=3, flags={"log_level": "warning"}) as log:
        log.log_validation(2, {"loss": math.inf, "AP_small": math.nan})
    printed = capsys.readouterr().out
    assert printed.startswith("WARNING: val/loss is inf at step 2: ") and len(printed.splitlines()) == 1


def test_a_run_that_ended_before_its_first_checkpoint_leaves_no_lines(tmp_path, run):
    run_to(tmp_path, run, 0, 4)
    run_to(tmp_path, run, 0, 2)
    assert [line["step"] for line in lines(tmp_path)] == [2]
    assert [event.step for event in events(tmp_path).Scalars("train/loss")] == [2]


def test_flags_and_versions_are_written(tmp_path, run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.1"])
    with Logger(tmp_path, run, total_steps=1, flags={"lr": 0.1, "data": ["a"]}):
        pass
    assert json.loads((tmp_path / "flags.json").read_text()) == {"lr": 0.1, "data": ["a"]}
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["argv"] == ["train.py", "--lr", "0.1"]
    assert versions["torch"] == torch.__version__
    assert {"python", "torchvision", "numpy", "cuda", "git_revision"} <= set(versions)
    assert "flags/text_summary" in events(tmp_path).Tags()["tensors"]


def test_without_a_terminal_there_is_no_bar(tmp_path, run, capsys):
    run_to(tmp_path, run, 0, 5)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [line.split("  ")[0] for line in captured.out.splitlines()] == ["step 2/10", "step 4/10"]


def test_many_values_are_cut_on_the_console_only(tmp_path, run, capsys):
    with Logger(tmp_path, run, total_steps=1) as log:
        log.log(1, {f"val/AP/{i}": 0.5 for i in range(80)})
    printed = capsys.readouterr().out
    assert printed.endswith("val/AP/15 0.5  (64 more in metrics.jsonl)\n")
    assert len(lines(tmp_path)[0]) == 81


class Evaluator:
    def write(self, folder):
        (folder / "per_class.csv").touch()

    def curves(self):
        recall = torch.linspace(0, 1, 300)
        return {"cell": (1 - recall / 2, recall, None), "none": ([], [], None)}


@pytest.mark.parametrize("reason", ["another process", "disabled"])
def test_nothing_is_written(tmp_path, run, optimizer, reason, capsys):
    enabled = reason != "disabled"
    run = dataclasses.replace(run, rank=int(reason == "another process"))
    with Logger(tmp_path / "run", run, total_steps=2, enabled=enabled) as log:
        for item in log.steps("ab"):
            log.add(1, terms(loss=item == "a"), [0])
        assert log.log_losses(2, optimizer) == 1.0
        log.log_validation(1, {"AP": 1.0}, [Evaluator()], [("x", torch.zeros(3, 2, 2, dtype=torch.uint8))])
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_validation_logs_metrics_images_curves_and_tables(tmp_path, run):
    with Logger(tmp_path, run, total_steps=1) as log:
        image = torch.full((3, 4, 5), 9, dtype=torch.uint8)
        log.log_validation(1, {"AP": 0.25}, [Evaluator()], [("images", image)])
    assert lines(tmp_path) == [{"step": 1, "val/AP": 0.25}]
    assert (tmp_path / "per_class.csv").exists()
    board = events(tmp_path)
    (image,) = board.Images("val/images")
    assert (image.width, image.height) == (5, 4)
    assert {"val/PR/cell", "val/PR/none"} <= set(board.Tags()["tensors"])
    curve = tensor_util.make_ndarray(board.Tensors("val/PR/cell")[0].tensor_proto)
    true, false, _, missed, precision, recall = curve
    assert curve.shape == (6, 127)
    assert (recall[0], recall[-1]) == (1.0, 0.0)
    assert (precision[0], precision[-1]) == (0.5, 1.0)
    assert (true + false)[-1] >= 1, "TensorBoard cuts a curve where nothing is detected"
    torch.testing.assert_close(torch.tensor(true + missed), torch.full((127,), 1000.0))


def test_losses_are_logged_as_means_over_steps_and_their_sum(tmp_path, run, optimizer):
    with Logger(tmp_path, run, total_steps=4, first_step=1) as log:
        for step, box in ((2, 1), (2, 1), (3, 4)):  # step 2 has two micro-batches
            log.add(step, terms(box=box, cls=1), [step])
        assert log.log_losses(3, optimizer) == 4.5
        log.add(4, terms(cross_entropy=2), [0], {"top1": torch.tensor(0.25)})
        assert log.log_losses(4, optimizer) == 2.0
    first, second = ({k: v for k, v in line.items() if not k.startswith("speed")} for line in lines(tmp_path))
    assert first == {"step": 3, "train/loss": 4.5, "train/box": 3.0, "train/cls": 1.5, "lr": 0.5}
    assert second == {"step": 4, "train/loss": 2.0, "train/top1": 0.25, "lr": 0.5}, "a single term is the whole loss"


def test_the_running_loss_is_the_mean_over_the_latest_steps(tmp_path, run, optimizer):
    with Logger(tmp_path, run, total_steps=9) as log:
        for step, loss in ((2, 1), (4, 3), (5, 5), (7, 7), (9, 9)):  # logged after 2, 2, 1, 2 and 2 steps
            log.add(step, terms(loss=loss), [0])
            log.log_losses(step, optimizer, running=4)
    running = [line["train/running_loss"] for line in lines(tmp_path)]
    assert running == pytest.approx([1, 2, 13 / 5, (6 + 5 + 14) / 5, (14 + 18) / 4])


def test_a_non_finite_loss_is_reported_with_its_files(tmp_path, run, optimizer):
    image_path, remedy = "data/{}.jpg".format, "after step {} do this".format
    with Logger(tmp_path, run, total_steps=1, image_path=image_path, remedy=remedy) as log:
        log.add(2, terms(box=math.nan, cls=math.inf), [7, 8])
        message = r"step 2: box nan, cls inf; images data/7\.jpg, data/8\.jpg; after step 2 do this$"
        with pytest.raises(NonFiniteLoss, match=message):
            log.log_losses(2, optimizer)
    report = json.loads((tmp_path / "nan_report.json").read_text())
    paths, losses = ["data/7.jpg", "data/8.jpg"], {"box": "nan", "cls": "inf"}
    assert report == {"step": 2, "images": [7, 8], "paths": paths, "losses": losses, "lr": 0.5}


@pytest.mark.filterwarnings("ignore:.*slow:UserWarning")
@pytest.mark.parametrize(("precision", "tolerated"), [("fp32", 0), ("fp16", 20)])
def test_fp16_tolerates_non_finite_steps_while_the_scale_is_searched(tmp_path, optimizer, precision, tolerated):
    run = distributed.init_device("cpu", precision=precision)
    with Logger(tmp_path, run, total_steps=99, enabled=False) as log:
        for step in range(tolerated + 1):
            error = pytest.raises(NonFiniteLoss) if step == tolerated else contextlib.nullcontext()
            log.add(step, terms(loss=math.inf), [0])
            with error:
                assert math.isnan(log.log_losses(step, optimizer))


@pytest.mark.parametrize(("level", "flags", "line"), [("debug", True, True), ("info", False, True)])
def test_levels_print_flags_and_lines(tmp_path, run, level, flags, line, capsys):
    with Logger(tmp_path, run, 3, flags={"lr": 0.125, "log_level": level}) as log:
        log.log(1, {"loss": 2.0})
    printed = capsys.readouterr().out
    assert ('"lr": 0.125' in printed) == flags
    assert ("loss 2" in printed) == line


def test_level_warning_prints_nothing_and_writes_all(tmp_path, run, capsys):
    with Logger(tmp_path, run, 3, flags={"log_level": "warning"}) as log:
        log.log(1, {"loss": 2.0})
    assert capsys.readouterr().out == ""
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("name", ["flags.json", "metrics.jsonl", "run"])
def test_a_log_that_cannot_be_opened_is_one_error(tmp_path, run, name):
    """A folder where a file should be, or the reverse."""
    (tmp_path / "run").touch() if name == "run" else (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(WriteError, match=r"run.*: not written: .*; move away the file or folder that is in the way"):
        Logger(tmp_path / "run", run, total_steps=1)


def test_metrics_on_a_full_disk_are_one_error(tmp_path, run):
    """The closing of the file, which writes the rest of the line, raises nothing else."""

    def log_to_a_full_disk():
        with Logger(tmp_path, run, total_steps=1) as log:
            log._metrics.close()
            log._metrics = open("/dev/full", "a")  # noqa: SIM115
            log.log(1, {"x": 1.0})

    line = r"metrics.jsonl: not written: No space left on device; free some disk space, then continue with --resume"
    with pytest.raises(WriteError, match=line):
        log_to_a_full_disk()


def test_the_training_goes_on_without_tensorboard(tmp_path, run, capfd):
    hook = threading.excepthook
    with Logger(tmp_path, run, total_steps=3) as log:
        (file,) = tmp_path.glob("events.*")
        log._board.flush()
        file.unlink()
        file.mkdir()
        for step in (1, 2, 3):
            log.log(step, {"x": 1.0})
            log.log_validation(step, {"AP": 1.0}, [Evaluator()])
            log._board.flush()
    assert [line["step"] for line in lines(tmp_path)] == [1, 1, 2, 2, 3, 3]
    printed, errors = capfd.readouterr()
    assert printed.count("events.out.tfevents.*: not written: Is a directory; ") == 1
    assert errors == "", "no traceback of TensorBoard's thread"
    assert threading.excepthook is hook


def test_only_the_trace_of_tensorboards_thread_is_hidden(tmp_path, run, monkeypatch):
    class _AsyncWriterThread:
        pass

    shown = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    with Logger(tmp_path, run, total_steps=1):
        for kind, thread in ((OSError, _AsyncWriterThread()), (ValueError, _AsyncWriterThread()), (OSError, object())):
            threading.excepthook(threading.ExceptHookArgs((kind, kind(), None, thread)))
    assert [failed.exc_type for failed in shown] == [ValueError, OSError]


def test_tensorboard_that_cannot_begin(tmp_path, run, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(event_file_writer, "EventFileWriter", full)
    monkeypatch.setattr("torch.utils.tensorboard.writer.EventFileWriter", full)
    run_to(tmp_path, run, 0, 4)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]
    assert capsys.readouterr().out.count("until a resume TensorBoard shows no more of this run") == 1


def test_lines_nested_too_deeply_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "[" * 200_000 + '\n{"step": 2}\n')
    logger.drop_later(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
