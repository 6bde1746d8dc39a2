import dataclasses
import errno
import json
import math
import os
import re
import resource
import shutil
import signal
import types
from pathlib import Path

import pytest
import torch

from tests.training import small_run
from training import checkpoint, distributed, run_folder
from training.checkpoint import Progress
from training.meter import NonFiniteLoss
from training.plan import Plan
from training.run_folder import RunFolder
from training.signals import StopSignals
from utils.errors import UsageError, WriteError

TRAIN_SET = types.SimpleNamespace(image_path=str)


@pytest.fixture(scope="module")
def run():
    return distributed.init_device("cpu")


@pytest.fixture
def folder(tmp_path):
    """A run of 4 steps saved at 2 and 4."""
    return small_run.make(tmp_path / "run")


def read_step(path):
    return checkpoint.read(path)["step"]


def save(folder, step, copies=(), keep=0):
    _, parts, progress = small_run.parts()
    progress.step = step
    small_run.save(folder, parts, progress, copies, keep)


def test_a_flag_that_was_not_given_is_that_of_the_run_or_chosen(run, tmp_path):
    args = small_run.flags(f"--model-dir {tmp_path / 'run'}")
    args.freeze_bn = None
    assert RunFolder(args, run).choose("freeze_bn", "stats") == args.freeze_bn == "stats"
    args.freeze_bn = False
    assert RunFolder(args, run).choose("freeze_bn", "stats") is False
    continued, args.freeze_bn = RunFolder(args, run), None
    continued.checkpoint = {"flags": {"freeze_bn": True}}
    assert continued.choose("freeze_bn", "stats") is args.freeze_bn is True


def test_two_checkpoints_and_the_copies_are_kept(folder):
    assert (read_step(folder / "last.pt"), read_step(folder / "previous.pt")) == (4, 2)
    save(folder, 6, copies=["best.pt", "epoch_003.pt", "step_000006.pt"])
    save(folder, 8)
    save(folder, 8)
    names = ["last.pt", "previous.pt", "best.pt", "epoch_003.pt", "step_000006.pt"]
    assert [read_step(folder / name) for name in names] == [8, 8, 6, 6, 6]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_copies_without_hard_links(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    save(folder, 6, copies=["best.pt"])
    assert [read_step(folder / name) for name in ("last.pt", "previous.pt", "best.pt")] == [6, 4, 6]


def test_only_the_newest_numbered_copies_are_kept(folder):
    (folder / "step_final.pt").touch()  # a file of the user's
    for step in (8, 9, 10):
        save(folder, step, copies=[f"step_{step:06d}.pt"], keep=2)
    assert sorted(path.name for path in folder.glob("step_*.pt")) == ["step_000009.pt", "step_000010.pt"]
    assert read_step(folder / "last.pt") == 10


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", range(10))
def test_a_kill_between_any_two_steps_of_a_save(folder, run, monkeypatch, call):
    """A whole last.pt, old or new, exists at every moment, and the next save works."""
    calls, real_unlink = [], Path.unlink

    def watched(function):
        def wrapper(*arguments):
            calls.append(function)
            if len(calls) == call + 1:
                raise Killed
            return function(*arguments)

        return wrapper

    def unlink(path, missing_ok=False):  # a killed process cleans nothing up
        if len(calls) <= call:
            real_unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        for name in ("link", "replace", "fsync"):
            patch.setattr(os, name, watched(getattr(os, name)))
        patch.setattr(torch, "save", watched(torch.save))
        patch.setattr(Path, "unlink", unlink)
        try:
            save(folder, 6, copies=["best.pt"])
        except Killed:
            pass
        else:
            assert call == 9, "a save has nine calls that a kill can separate"
    (folder / "notes.tmp").touch()  # a file of the user's
    resumed, _ = opened(folder, run, "--resume")
    step = resumed.progress.step
    assert step in (4, 6) and read_step(folder / "last.pt") == step
    assert step == 4 or read_step(folder / "best.pt") == 6, "progress would claim a best.pt that is not there"
    assert read_step(folder / "previous.pt") in (2, 4)
    left = {path.name for path in folder.iterdir()} - {"last.pt", "previous.pt", "best.pt", "notes.tmp", "run.lock"}
    assert not left, "leftovers of the killed save"
    resumed.progress.step = 7
    resumed.save()
    assert read_step(folder / "last.pt") == 7
    assert read_step(folder / "previous.pt") == step


def test_numbered_copies_that_a_killed_save_left_are_removed(folder, run):
    for step in (8, 9, 10):
        save(folder, step, copies=[f"step_{step:06d}.pt"])
    opened(folder, run, "--resume --keep 2")
    assert sorted(path.name for path in folder.glob("step_*.pt")) == ["step_000009.pt", "step_000010.pt"]


def test_a_full_disk_is_reported_and_leaves_the_old_checkpoint(folder, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = r"last.pt: not written: No space left on device; free some disk space, then continue with --resume auto"
        with pytest.raises(WriteError, match=line):
            save(folder, 6)
    assert read_step(folder / "last.pt") == 4
    assert not list(folder.glob("*.tmp"))


def test_a_full_disk_as_torch_reports_it(folder):
    """As a RuntimeError of its own writer, with the OSError behind it."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"last.pt: not written: File too large; raise the limit"):
            run_folder.save(folder, {"model": {"a": torch.zeros(10000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_step(folder / "last.pt") == 4


def test_a_disk_that_has_become_read_only(folder, monkeypatch):
    """Where nothing can be removed either."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(WriteError, match=r"last.pt: not written: Read-only file system; mount the disk for writing"):
        save(folder, 6)
    assert read_step(folder / "last.pt") == 4


def test_a_run_whose_folder_was_removed_makes_no_other(tmp_path, run):
    folder, _ = opened(tmp_path / "run", run)
    folder.save()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(WriteError, match=r"run: not written: the folder was removed or its disk unmounted during"):
        folder.save()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.99])
def test_auto_falls_back_from_a_truncated_file_and_prints_why(folder, run, share, capsys):
    small_run.truncate(folder / "last.pt", share)
    saved = run_folder.open_run(run, folder, "auto")
    assert saved["step"] == 2
    printed = capsys.readouterr().out
    assert str(folder / "last.pt") in printed
    assert "empty" in printed or "truncated" in printed or "not a PyTorch file" in printed
    assert f"using {folder / 'previous.pt'}" in printed
    # The damaged file must not replace the whole one at the next save.
    assert (folder / "last.pt.damaged").exists()
    save(folder, 3)
    assert (read_step(folder / "last.pt"), read_step(folder / "previous.pt")) == (3, 2)


@pytest.mark.parametrize("change", [{"step": "text"}, {"model": {"a": torch.tensor(math.nan)}}, {"classes": [1]}])
def test_a_checkpoint_of_impossible_contents_is_passed_over(tmp_path, run, capsys, change):
    folder = small_run.make(tmp_path / "run")
    saved = torch.load(folder / "last.pt", weights_only=True)
    checkpoint.write(folder / "last.pt", {**saved, **change})
    assert run_folder.open_run(run, folder, "auto")["step"] == 2
    assert re.search(r"last.pt: .*; using .*previous.pt", capsys.readouterr().out)


def test_auto_without_last_and_with_numbered_copies(folder, run):
    (folder / "last.pt").unlink()
    assert run_folder.open_run(run, folder, "auto")["step"] == 2
    save(folder, 9, copies=["step_000009.pt"])
    small_run.truncate(folder / "previous.pt")
    (folder / "last.pt").unlink()
    assert run_folder.open_run(run, folder, "auto")["step"] == 9


def test_auto_without_a_whole_checkpoint(folder, run, tmp_path):
    assert run_folder.open_run(run, tmp_path / "new", "auto") is None
    small_run.truncate(folder / "last.pt")
    small_run.truncate(folder / "previous.pt", 0)
    reasons = r"no whole checkpoint: .*last.pt: truncated.*previous.pt: is empty.*--overwrite"
    with pytest.raises(UsageError, match=reasons):
        run_folder.open_run(run, folder, "auto")


def test_a_run_is_not_overwritten_by_accident(folder, run, tmp_path):
    for name in ("metrics.jsonl", "events.out.tfevents.1", "step_000002.pt", "best.pt", "backbone.pt", "notes.txt"):
        (folder / name).touch()
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").touch()
    refused = "it already has a run; continue it with --resume auto, or give --overwrite or another folder"
    with pytest.raises(UsageError, match=refused):
        run_folder.open_run(run, folder)
    assert run_folder.open_run(run, folder, read_only=True) is None
    assert run_folder.open_run(run, folder, read_only=True, overwrite=True) is None
    with pytest.raises(UsageError, match=r"--overwrite would remove .*last.pt"):
        run_folder.open_run(run, folder, "auto", overwrite=True)
    other = tmp_path / "other"
    assert run_folder.open_run(run, other, str(folder))["step"] == 4
    assert run_folder.open_run(run, other, str(folder / "previous.pt"))["step"] == 2
    save(other, 1)
    with pytest.raises(UsageError, match=f"other: {refused}"):
        run_folder.open_run(run, other, str(folder))
    assert run_folder.open_run(dataclasses.replace(run, rank=1), folder, overwrite=True) is None
    assert (folder / "last.pt").exists(), "only the main process removes anything"
    assert run_folder.open_run(run, folder, overwrite=True) is None
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "evaluation"}
    assert not list((folder / "evaluation").iterdir())


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_needs_resume_auto(folder, run, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(UsageError, match=r"restarted job has a run there; .* add --resume auto to the command line"):
        run_folder.open_run(run, folder)
    with pytest.raises(UsageError, match="add --resume auto instead of --overwrite, which would delete it"):
        run_folder.open_run(run, folder, overwrite=True)
    assert run_folder.open_run(run, folder, "auto")["step"] == 4


def test_an_evaluation_needs_the_checkpoint_that_it_names(folder, run, tmp_path):
    assert run_folder.open_run(run, tmp_path / "x", str(folder), read_only=True)["step"] == 4
    with pytest.raises(UsageError, match=r"--resume auto: no checkpoint in .*x; checkpoints nearby: .*last.pt"):
        run_folder.open_run(run, tmp_path / "x", "auto", read_only=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"--resume .*empty: no checkpoint in .*empty; no checkpoint in "):
        run_folder.open_run(run, tmp_path / "x", str(tmp_path / "empty"))


class Evaluator:
    def write(self, folder):
        (folder / "table.csv").touch()
        return ["table.csv"]

    def table(self):
        return "the table"


def test_a_folder_in_the_way_of_checkpoints_is_an_error_before_training(folder, run):
    (folder / "new.pt").mkdir()
    with pytest.raises(WriteError, match=r"new.pt: not written: .*; move away the file or folder that is in the way"):
        opened(folder, run, "--resume auto")


def test_auto_does_not_pass_over_a_checkpoint_of_a_newer_version(folder, run):
    """The program is too old for it; it is not damaged."""
    torch.save({"format_version": 2, "step": 6}, folder / "last.pt")
    with pytest.raises(UsageError, match=r"last.pt: format 2, this program knows 1; update it"):
        run_folder.open_run(run, folder, "auto")
    assert (folder / "last.pt").exists() and not (folder / "last.pt.damaged").exists()


def opened(path, run, words="", monitor="AP"):
    """(RunFolder, its parts) of a run of `small_run.network`, resumed if `words` ask for it."""
    folder = RunFolder(small_run.flags(f"--model-dir {path} {words}"), run, monitor)
    _, parts, _ = small_run.parts()
    plan = Plan(folder.args, 10, lambda line: None)
    folder.restore(parts["model"], parts["optimizer"], parts["ema"], plan, {"classes": ["a", "b"], "arguments": {}})
    return folder, folder.parts


def test_a_run_is_saved_and_resumed(tmp_path, run, capsys):
    first, _ = opened(tmp_path, run)
    assert (first.checkpoint, first.classes, first.progress) == (None, None, Progress())
    first.progress.step, first.progress.epoch = 7, 2
    first.save()
    assert not (tmp_path / "best.pt").exists()
    first.progress.record(0.5, higher_is_better=True)
    first.save()
    assert read_step(tmp_path / "best.pt") == 7
    first.progress.step = 8
    first.save()
    assert (read_step(tmp_path / "last.pt"), read_step(tmp_path / "best.pt")) == (8, 7)
    assert capsys.readouterr().out == ""

    second, parts = opened(tmp_path, run, "--resume --epochs 60")
    assert (second.classes, second.progress) == (["a", "b"], first.progress)
    assert checkpoint.fingerprint(parts) == checkpoint.fingerprint(first.parts)
    printed = capsys.readouterr().out
    assert printed == f"resumed epoch 2 step 8 lr 1.0e-01 from {tmp_path / 'last.pt'}\n  changed: epochs: 30 -> 60\n"
    opened(tmp_path / "x", run, f"--resume {tmp_path} --eval-only")
    assert f"step 8 averaged weights from {tmp_path / 'last.pt'}" in capsys.readouterr().out


def test_a_step_is_saved_before_and_after_its_validation(tmp_path, run, capsys):
    """previous.pt stays that of an earlier step; the numbered copies and best.pt come with the second."""
    folder, _ = opened(tmp_path, run, "--save-every-steps 2")
    folder.progress.step = 2
    folder.save()
    folder.progress.step, folder.progress.validation_due = 4, True
    folder.save()
    assert (read_step(tmp_path / "last.pt"), read_step(tmp_path / "previous.pt")) == (4, 2)
    assert not (tmp_path / "step_000004.pt").exists()

    capsys.readouterr()
    resumed, _ = opened(tmp_path, run, "--resume --save-every-steps 2")
    assert "the validation of step 4 was interrupted, and comes first" in capsys.readouterr().out
    assert resumed.progress.validation_due
    for continued in (resumed, folder):
        continued.progress.record(0.5, higher_is_better=True)
        continued.save()
        names = ["last.pt", "previous.pt", "best.pt", "step_000004.pt"]
        assert [read_step(tmp_path / name) for name in names] == [4, 2, 4, 4]
        assert not checkpoint.read(tmp_path / "last.pt")["validation_due"]


def spoil(parts, name):
    net, optimizer = parts["model"], parts["optimizer"]
    if name == "optimizer":
        optimizer.state[net[0].weight]["momentum_buffer"] = torch.full_like(net[0].weight, math.inf)
    elif name == "ema":
        parts["ema"].averages["0.bias"][0] = math.nan
    else:
        net.state_dict()[name.removeprefix("model.")].view(-1)[0] = math.nan


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("model.5.weight", "model.5.weight"),
        ("model.1.running_var", "model.1.running_var"),
        ("ema", "ema.model.0.bias"),
        ("optimizer", "optimizer.state.0.momentum_buffer"),
    ],
)
def test_what_is_not_finite_is_not_saved(tmp_path, run, part, name):
    folder, parts = opened(tmp_path, run, "--save-every-steps 1 --lr 0.5")
    for step in (1, 2):
        folder.progress.step = step
        folder.save()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    folder.progress.step = 3
    spoil(parts, part)
    remedy = "continue from step 2 with --resume auto and a lower --lr, such as 0.05; if that fails again, with "
    remedy += f"--resume {tmp_path / 'previous.pt'}"
    with pytest.raises(UsageError, match=f"^{name} is not finite after step 3, which is not saved; {remedy}$"):
        folder.save()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_after_a_loss_that_is_not_finite_the_checkpoint_to_go_on_from_is_named(tmp_path, run):
    folder, parts = opened(tmp_path, run, "--lr 0.5")
    nan, such_as = {"loss": torch.tensor(math.nan)}, "a lower --lr, such as 0.05"

    def after(step, remedy):
        with folder.logger(Plan(folder.args, 10), TRAIN_SET) as log:
            log.add(step, nan, [0])
            with pytest.raises(NonFiniteLoss, match=f"; {remedy} {such_as}"):
                log.log_losses(step, parts["optimizer"])

    after(1, "there is no checkpoint yet: start again with")
    folder.progress.step = 3
    folder.save()
    after(5, "continue from step 3 with --resume auto and")
    after(4, "last.pt leads to it and is the only checkpoint: start again with --overwrite and")
    folder.progress.step = 4
    folder.save()
    after(6, "continue from step 4 with --resume auto and")
    assert (read_step(tmp_path / "last.pt"), read_step(tmp_path / "previous.pt")) == (4, 3)
    after(5, "last.pt led to it and is now diverged.pt: continue from the one before with --resume auto and")
    assert (read_step(tmp_path / "last.pt"), read_step(tmp_path / "diverged.pt")) == (3, 4)


def test_what_one_process_cannot_save_ends_all(tmp_path, run, monkeypatch):
    """With its error. The others write nothing, and would wait for it."""
    folder, parts = opened(tmp_path / "new", dataclasses.replace(run, rank=1))
    folder.run = dataclasses.replace(folder.run, world_size=2)
    monkeypatch.setattr(distributed.Run, "gather", lambda run, value: [("host", "last.pt: not written: full"), value])
    for write in (folder.save, lambda: folder.save_weights(parts["model"])):
        with pytest.raises(UsageError, match=r"last\.pt: not written: full"):
            write()


def test_weights_are_saved_alone_with_the_metadata(tmp_path, run):
    folder, parts = opened(tmp_path, run)
    folder.save_weights(parts["model"])
    saved = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert set(saved) == {"format_version", "classes", "arguments", "flags", "model", "checksum"}
    small_run.network().load_state_dict(saved["model"])


def test_weights_that_cannot_be_saved_are_reported(tmp_path, run):
    folder, parts = opened(tmp_path / "x", run)
    (tmp_path / "x" / "backbone.pt").mkdir()
    with pytest.raises(WriteError, match=r"backbone.pt: not written: Is a directory; move away .*, then continue with"):
        folder.save_weights(parts["model"])
    assert [path.name for path in (tmp_path / "x").iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize("words", ["--check-data", "--preflight", "--eval-only --weights x.pt"])
def test_runs_that_do_not_train_leave_nothing(tmp_path, run, words):
    folder, parts = opened(tmp_path / "new", run, words)
    folder.save()
    folder.save_weights(parts["model"])
    folder.write_lines("labels.txt", ["a"])
    with folder.logger(Plan(folder.args, 10), TRAIN_SET) as logger:
        logger.log(1, {"x": 1.0})
    assert not (tmp_path / "new").exists()


def test_only_the_main_process_writes(tmp_path, run):
    folder, parts = opened(tmp_path / "new", dataclasses.replace(run, rank=1))
    folder.save()
    folder.save_weights(parts["model"])
    folder.write_lines("labels.txt", ["a"])
    assert not (tmp_path / "new").exists()
    opened(tmp_path, run)[0].write_lines("labels.txt", ["a", "b"])
    assert (tmp_path / "labels.txt").read_text() == "a\nb\n"


@pytest.mark.parametrize("weights", ["none", "auto"])
def test_an_untrained_network_is_not_evaluated(tmp_path, run, weights):
    words = f"--model-dir {tmp_path} --eval-only --weights {weights}"
    with pytest.raises(UsageError, match=r"--eval-only: no weights .*; give --resume auto or --weights FILE"):
        RunFolder(small_run.flags(words), run)


def test_the_logger_has_the_steps_and_flags_of_the_run(tmp_path, run):
    folder, _ = opened(tmp_path, run)
    folder.progress.step = 3
    with folder.logger(Plan(small_run.flags("--steps 5"), 10), TRAIN_SET) as logger:
        assert (logger.total_steps, logger.batch_size) == (5, 4)
    assert json.loads((tmp_path / "flags.json").read_text())["batch_size"] == 4


@pytest.mark.parametrize(("words", "name"), [("", "evaluation"), ("--split lists/test.csv", "evaluation_test")])
def test_the_end_of_an_evaluation_writes_and_prints_the_result(tmp_path, run, capsys, words, name):
    trained, _ = opened(tmp_path, run)
    trained.progress.step, trained.progress.epoch = 7, 2
    trained.save()
    saved = checkpoint.read(tmp_path / "last.pt")
    capsys.readouterr()
    folder, _ = opened(tmp_path, run, f"--resume --eval-only {words}")
    metrics, earlier = {"AP": 0.5, "AP_small": math.nan}, tmp_path / name / "det_test_cat.txt"
    earlier.parent.mkdir()
    earlier.touch()
    assert folder.report(metrics, [Evaluator()]) == metrics
    assert not earlier.exists()
    assert (tmp_path / name / "table.csv").exists()
    printed = capsys.readouterr().out
    assert printed.endswith(
        f'"AP": 0.5,\n "AP_small": NaN\n}}\n{tmp_path / name}: evaluation.json, table.csv written\n'
    )
    written = json.loads((tmp_path / name / "evaluation.json").read_text())
    assert written["metrics"] == {"AP": 0.5, "AP_small": None}
    assert (written["checkpoint"], written["step"], written["epoch"]) == (str(tmp_path / "last.pt"), 7, 2)
    assert written["fingerprint"] == checkpoint.fingerprint({"model": saved["ema"]["model"]})
    assert written["network"] == {"classes": ["a", "b"], "arguments": {}}
    assert written["flags"] == vars(folder.args)


def test_an_evaluation_that_cannot_be_written_is_printed(tmp_path, run, capsys):
    opened(tmp_path, run)[0].save()
    folder, _ = opened(tmp_path, run, "--resume --eval-only")
    (tmp_path / "evaluation").touch()  # a file in place of the folder
    with pytest.raises(WriteError, match=r"evaluation.evaluation.json: not written: File exists; .* another folder"):
        folder.report({"AP": 0.5}, [])
    assert '"AP": 0.5' in capsys.readouterr().out


def test_images_of_another_size_do_not_continue_a_run(tmp_path, run):
    def resume(words="--resume", **sizes):
        folder, (_, parts, _) = RunFolder(small_run.flags(f"--model-dir {tmp_path} {words}"), run), small_run.parts()
        plan = Plan(folder.args, 10, lambda line: None)
        folder.restore(parts["model"], parts["optimizer"], parts["ema"], plan, {"classes": ["a"], **sizes})
        return folder

    resume("", image_size=(96, 96), min_side=64).save()
    resume(image_size=(96, 96), min_side=64)
    resume("--resume --eval-only", image_size=(64, 64))
    with pytest.raises(
        UsageError, match=r"image_size \(96, 96\), this one \(64, 64\).*give --resolution .*--weights .*last.pt"
    ):
        resume(image_size=(64, 64))
    with pytest.raises(UsageError, match=r"min_side 64, this one 48.*give --min-side as in that run"):
        resume(min_side=48)


def test_another_monitor_starts_the_best_anew(tmp_path, run, capsys):
    first, _ = opened(tmp_path, run, monitor="loss")
    first.progress.step = 3
    first.progress.record(0.25, higher_is_better=False)
    first.save()
    same, _ = opened(tmp_path, run, "--resume", monitor="loss")
    assert (same.progress.best, same.progress.best_step) == (0.25, 3)
    capsys.readouterr()
    other, _ = opened(tmp_path, run, "--resume", monitor="AP")
    assert (other.progress.step, other.progress.best, other.progress.best_step, other.progress.stale) == (3, None, 0, 0)
    assert "start anew with AP; so far the best was loss 0.25 at step 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("monitor", "flag", "is_new"),
    [("mAP", "iou_threshold", True), ("AP", "iou_threshold", False), ("mask AP", "nms_iou", True)]
    + [("mAP", "later_flag", False), ("loss", "score_threshold", False)],
)
def test_a_changed_flag_that_the_monitor_depends_on_starts_the_best_anew(tmp_path, run, capsys, monitor, flag, is_new):
    def folder(words, **flags):
        args = small_run.flags(f"--model-dir {tmp_path} {words}")
        vars(args).update(flags)
        _, parts, _ = small_run.parts()
        plan = Plan(args, 10, lambda line: None)
        folder = RunFolder(args, run, monitor)
        folder.restore(parts["model"], parts["optimizer"], parts["ema"], plan, {"classes": ["a"]})
        return folder

    first = folder("", **{flag: 0.5})
    first.progress.step = 3
    first.progress.record(0.25, higher_is_better=True)
    first.save()
    assert folder("--resume", **{flag: 0.5}, use_2007_metric=True).progress.best == 0.25  # which the run did not know
    capsys.readouterr()
    assert folder("--resume", **{flag: 0.75}).progress.best == (None if is_new else 0.25)
    anew = f"start anew with {monitor} by the changed flags; so far the best was {monitor} 0.25 at step 3"
    assert (anew in capsys.readouterr().out) is is_new


def test_a_run_that_patience_has_stopped_stays_so(tmp_path, run, capsys):
    stopped, _ = opened(tmp_path, run, "--patience 2")
    stopped.progress.step = 4
    for value in (0.5, 0.4, 0.3):
        stopped.progress.record(value, higher_is_better=True)
    stopped.save()
    for words, stopped in (("--patience 2", True), ("--patience 3", False), ("", False)):
        capsys.readouterr()
        opened(tmp_path, run, f"--resume --steps 10 {words}")
        assert ("--patience 2 has stopped this run" in capsys.readouterr().out) is stopped


def test_the_end_of_training_prints_the_best_validation(tmp_path, run, capsys):
    folder, parts = opened(tmp_path, run)
    folder.progress.step = 3
    folder.progress.record(0.25, higher_is_better=True)
    assert folder.finish(StopSignals(run), {"AP": 0.2}, [Evaluator()]) == {"AP": 0.2}
    assert capsys.readouterr().out.splitlines()[:2] == ["the table", "best AP 0.25 at step 3"]
    folder.save_weights(parts["model"])
    folder.finish(StopSignals(run), {}, [])
    assert f"best AP 0.25 at step 3, its weights in {tmp_path / 'backbone.pt'}" in capsys.readouterr().out


def test_the_end_of_training_asks_the_main_process_only_for_tables(tmp_path, run):
    """The others may not have what a table shows."""
    folder, _ = opened(tmp_path, dataclasses.replace(run, rank=1))
    evaluator = Evaluator()
    evaluator.table = lambda: pytest.fail("not the main process")
    assert folder.finish(StopSignals(run), {"AP": 0.2}, [evaluator]) == {"AP": 0.2}


def test_the_end_after_a_signal_has_its_exit_code(tmp_path, run, capsys):
    folder, _ = opened(tmp_path, run)
    with StopSignals(run) as stop:
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        folder.finish(stop, {}, [])
    assert "stopped and saved at step 0; continue with --resume auto" in capsys.readouterr().out


def test_the_end_of_a_preflight_prints_the_peaks(tmp_path, run, capsys):
    folder, _ = opened(tmp_path, run, "--preflight")
    folder.finish(StopSignals(run), {}, [Evaluator()])
    assert capsys.readouterr().out.startswith("preflight: peak GPU memory 0 MB, RAM ")


def test_a_signal_to_another_process_in_the_last_validation_ends_this_one_alike(tmp_path, run):
    folder, _ = opened(tmp_path, run)
    other = types.SimpleNamespace(max=lambda number: max(number, signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        folder.finish(StopSignals(other), {}, [])
    assert ended.value.code == 143


def test_a_resume_that_is_not_exact_says_why(tmp_path, run, capsys):
    opened(tmp_path, run)[0].save()
    opened(tmp_path, run, "--resume")
    assert "last bits" not in capsys.readouterr().out
    opened(tmp_path, dataclasses.replace(run, inexact="the reason"), "--resume")
    line = "  later steps may differ from an uninterrupted run in the last bits: the reason\n"
    assert line in capsys.readouterr().out
