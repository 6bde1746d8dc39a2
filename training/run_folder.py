"""The folder of a run: created or refused, continued from, saved to.

RUN/last.pt  previous.pt  best.pt          the latest checkpoint, the one before it, the best one
RUN/epoch_012.pt  step_000200.pt           numbered copies, if flags ask for them
RUN/metrics.jsonl  flags.json  versions.json  events.out.tfevents.*
RUN/evaluation/  evaluation_SPLIT/         what --eval-only writes
RUN/run.lock                               while a training has the folder, see run_lock
"""

import argparse
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from training import checkpoint, cli, finite, memory
from training.checkpoint import Progress
from training.distributed import Run
from training.ema import Ema
from training.logger import Logger
from training.plan import Plan
from training.run_lock import WAIT_SECONDS, RunLock
from training.saved_flags import BEST, LAST, NOT_TAKEN, NUMBERED, PREVIOUS, newest_first
from training.signals import StopSignals
from utils import files, torch_files
from utils.errors import UsageError, WeightsError, WriteError

WEIGHTS = "backbone.pt"  # weights alone, see RunFolder.save_weights
EVALUATION = "evaluation.json"  # in evaluation or evaluation_SPLIT, see RunFolder.report
NOT_ALWAYS_WRITTEN = ("per_class.csv", "confusion.csv", "pr_curves.*", "det_test_*.txt")  # beside it
DIVERGED = "diverged.pt"  # a last.pt with which the loss is not finite
UNFINISHED = ("new.pt", "*.*.tmp")  # left by a process that was killed while it wrote
LOGS = ("metrics.jsonl", "nan_report.json", "events.out.tfevents.*")
SHARED = ".shared_"  # beginning of the name of a file that exists while open_run looks whether all processes see it
SHARED_SECONDS = 5  # time for it to appear on the other machines
RESTART_SECONDS = 30  # time for the processes of a restarted job to end on other machines
CONTINUE = "continue with --resume auto"
EVALUATION_TRIES = 3  # to read the same checkpoint in all processes while a training goes on
RUN_FILES = (LAST, PREVIOUS, BEST, WEIGHTS, DIVERGED, *NUMBERED, *UNFINISHED, "*.pt.damaged", f"{SHARED}*", *LOGS)
RUN_FILES += (f"evaluation*/{EVALUATION}",)
SCORE_FLAGS = ("score_threshold", "nms_iou", "detections_per_image", "flip_test")  # they change AP, mAP, NDS
MAP_FLAGS = ("iou_threshold", "use_2007_metric")  # they change mAP


class RunFolder:
    """The folder --model-dir of a run, and what its checkpoints contain.

    path         Path
    checkpoint   the checkpoint that this run continues or evaluates; None without one, and after `restore`
    classes      the class names in it, or None
    monitor      the metric by which `progress` knows the best validation
    progress     of the run; `restore` sets it to that of the checkpoint
    """

    def __init__(self, args: argparse.Namespace, run: Run, monitor: str = ""):
        """Every process calls this. UsageError if the folder is refused, see `open_run`, and for --eval-only without
        weights to evaluate."""
        if args.eval_only and not args.resume and args.weights in ("none", "auto"):
            raise UsageError("--eval-only: no weights to evaluate; give --resume auto or --weights FILE")
        self.args, self.run, self.path, self.monitor = args, run, Path(args.model_dir), monitor
        self.writes = not (args.check_data or args.eval_only or args.preflight)  # checkpoints and logs
        weights = torch_files.peek(args.weights) if args.eval_only and not args.resume else {}
        weights = weights if "format_version" in weights else {}  # of ours
        resume = args.resume or (args.weights if "step" in weights else "")
        self.checkpoint = self.lock = None
        with run.raise_in_all():
            if self.writes and run.is_main:
                self.lock = RunLock(self.path, RESTART_SECONDS if _is_restart() else WAIT_SECONDS, run.print)
        if not args.check_data:
            self.checkpoint = open_run(run, self.path, resume, args.overwrite, read_only=not self.writes)
        self.classes = (self.checkpoint or weights).get("classes")
        self.source = self.checkpoint["file"] if self.checkpoint else args.weights  # of the weights
        self.parts, self.metadata, self.progress, self.fingerprint = {}, {}, Progress(), ""
        self._plan = self._logger = None
        self._log_state = {}  # of the logger, in the checkpoint
        self._saved_step = 0  # of last.pt; 0: there is none of this run yet

    def choose(self, flag: str, value: Any) -> Any:
        """The flag if it was given; if not (None), its value in the run that is continued, or else `value`, which is
        that of process 0 in all processes. Every process calls this; the flag has its value from then on."""
        if getattr(self.args, flag) is None:
            value = self.run.gather(value)[0]
            saved = self.checkpoint["flags"] if self.checkpoint else {}
            setattr(self.args, flag, saved.get(flag, value))
        return getattr(self.args, flag)

    def restore(
        self, net: nn.Module, optimizer: Optimizer, ema: Ema, plan: Plan, metadata: Mapping[str, Any]
    ) -> Progress:
        """Load the checkpoint, if there is one, into these objects, and remember what later checkpoints contain.

        metadata   plain values that describe the model, see models.describe

        UsageError if the checkpoint does not fit, or has images of another size. What a killed process left of a file
        that it was writing is removed; WriteError if it cannot be.
        """
        args, saved, parts = self.args, self.checkpoint, {"model": net, "optimizer": optimizer}
        parts |= {"scaler": self.run.scaler, "ema": ema, "plateau": plan.plateau}
        self.parts, self.metadata, self._plan = parts, metadata, plan
        with self.run.raise_in_all():
            if self.writes and self.run.is_main:
                for path in [path for pattern in UNFINISHED for path in self.path.glob(pattern)]:
                    with files.writing(path):
                        path.unlink()
                remove_old_copies(self.path, args.keep)
        if saved:
            if not args.eval_only:
                checkpoint.check_sizes(saved, metadata)
            self.progress = checkpoint.restore(saved, parts, args.eval_only)
            self._print_resumed(saved, optimizer)
            if not args.eval_only:
                self._continue_best(saved)
                self._saved_step, self._log_state = self.progress.step, saved.get("log", {})
                if plan.is_stale(self.progress):
                    self.run.print(
                        f"  --patience {args.patience} has stopped this run; to train on, give a larger one, or 0"
                    )
            self.checkpoint = None  # free its tensors
        if args.eval_only and self.run.is_main:
            self.fingerprint = checkpoint.fingerprint({"model": net})
        return self.progress

    def _print_resumed(self, saved, optimizer):
        args, loaded = self.args, f"lr {optimizer.param_groups[0]['lr']:.1e}"
        if args.eval_only:
            loaded = "averaged weights" if saved["ema"] else "weights"
        self.run.print(f"resumed epoch {saved['epoch']} step {saved['step']} {loaded} from {saved['file']}")
        if self.run.inexact and not args.eval_only:
            self.run.print(f"  later steps may differ from an uninterrupted run in the last bits: {self.run.inexact}")
        not_compared = NOT_TAKEN if args.eval_only else checkpoint.NOT_COMPARED
        for line in checkpoint.changed_flags(saved["flags"], vars(args), not_compared):
            self.run.print(f"  changed: {line}")
        if saved["validation_due"] and not args.eval_only:
            self.run.print(f"  the validation of step {saved['step']} was interrupted, and comes first")

    def _continue_best(self, saved):
        """Forget the best validation if it is of another metric, or if a flag has changed that this metric depends on.

        A loss depends on none of these flags.
        """
        before, progress, flags = saved.get("monitor", self.monitor), self.progress, vars(self.args)
        names = SCORE_FLAGS * cli.higher_is_better(self.monitor) + MAP_FLAGS * self.monitor.startswith("mAP")
        changed = [name for name in names if name in flags and saved["flags"].get(name, flags[name]) != flags[name]]
        if progress.best is None or (before == self.monitor and not changed):
            return
        now = self.monitor + (" by the changed flags" if changed else "")
        was = f"{before} {progress.best:.4g} at step {progress.best_step}"
        self.run.print(f"  best.pt and --patience start anew with {now}; so far the best was {was}")
        progress.best, progress.best_step, progress.stale = None, 0, 0

    def logger(self, plan: Plan, train_set: Any) -> Logger:
        """The log of the run; train_set.image_path(image_id) is the file of a training image. Every process calls
        this."""
        with self.run.raise_in_all():
            self._logger = Logger(
                self.path,
                self.run,
                plan.total_steps,
                first_step=self.progress.step,
                state=self._log_state,
                validates=self.progress.validation_due,
                batch_size=self.args.batch_size,
                flags=vars(self.args),
                image_path=train_set.image_path,
                remedy=lambda step: self._remedy(step == self._saved_step + 1),  # its loss is that of last.pt
                enabled=self.writes,
            )
        return self._logger

    def save(self) -> None:
        """Save a checkpoint as last.pt. If a validation is due after it, no more: the save after that one also has the
        numbered copies, and best.pt if it was the best so far.

        Every process calls this, and all raise the UserError if it cannot be written, or if weights, statistics,
        averages or the state of the optimizer are not finite. The checkpoints are then those of before.
        """
        with self.run.raise_in_all():
            if self.writes and self.run.is_main:
                self._save()
        self._saved_step = self.progress.step

    def _save(self):
        self.lock.check()
        progress, step = self.progress, self.progress.step
        name = finite.first_nonfinite({part: self.parts[part].state_dict() for part in ("model", "ema", "optimizer")})
        if name:
            raise UsageError(f"{name} is not finite after step {step}, which is not saved; {self._remedy(False)}")
        copies = [] if progress.validation_due else self._plan.copies(step)
        if progress.best is not None and progress.best_step == step:
            copies = [BEST, *copies]
        if self._logger:
            self._logger.flush()  # before the checkpoint that counts these steps as done
            self._log_state = self._logger.state_dict()
        contents = {**self.parts, **self.metadata, "flags": vars(self.args), **vars(progress)}
        contents |= {"monitor": self.monitor, "log": self._log_state}
        save(self.path, contents, copies, self.args.keep, self._saved_step == step)

    def _remedy(self, last_is_spoiled):
        """How to go on after a loss or the weights were not finite. A last.pt that gives such a loss is replaced by
        previous.pt."""
        lower, last, previous = f"a lower --lr, such as {self.args.lr / 10:g}", self.path / LAST, self.path / PREVIOUS
        if not (self.writes and newest_first(self.path)):
            return f"there is no checkpoint yet: start again with {lower}"
        if not last_is_spoiled:
            again = f"; if that fails again, with --resume {previous}" if previous.is_file() else ""
            return f"continue from step {self._saved_step} with --resume auto and {lower}{again}"
        if not previous.is_file():
            return f"{LAST} leads to it and is the only checkpoint: start again with --overwrite and {lower}"
        if self.run.is_main:
            last.replace(self.path / DIVERGED)
            files.link_or_copy(previous, last)
        return f"{LAST} led to it and is now {DIVERGED}: continue from the one before with --resume auto and {lower}"

    def save_weights(self, net: nn.Module) -> None:
        """Write backbone.pt: the weights of `net`, metadata and flags, for other training runs to start from. Every
        process calls this."""
        with self.run.raise_in_all():
            if self.writes and self.run.is_main:
                try:
                    checkpoint.write(self.path / WEIGHTS, {**self.metadata, "flags": vars(self.args), "model": net})
                except OSError as error:
                    raise WriteError(self.path / WEIGHTS, error, CONTINUE) from error

    def write_lines(self, name: str, lines: Sequence[str]) -> None:
        """Write a text file into the folder."""
        with self.run.raise_in_all():
            if self.writes and self.run.is_main:
                files.write_text(self.path / name, "".join(f"{line}\n" for line in lines))

    def read_lines(self, name: str) -> list[str] | None:
        """The lines of a text file beside the checkpoint, until `restore`; None without either."""
        file = Path(self.source).with_name(name) if self.checkpoint else None
        return [line.strip("\r\n") for line in files.read_lines(file)] if file and file.is_file() else None

    def report(self, metrics: Mapping[str, float], evaluators: Sequence) -> Mapping[str, float]:
        """The end of --eval-only: print the metrics, write them and the evaluators' files, return the metrics.

        They are written into RUN/evaluation, or RUN/evaluation_SPLIT, so that those of the training stay.
        """
        if self.run.is_main:
            self.run.print(json.dumps(metrics, indent=1))
            name = Path(self.args.split).name.removesuffix(".csv").removesuffix(".txt")
            folder = self.path / (f"evaluation_{name}" if name else "evaluation")
            written = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            result = {"checkpoint": str(self.source), "step": self.progress.step or None}  # None: not known
            result |= {"epoch": self.progress.epoch if self.progress.step else None}
            result |= {"fingerprint": self.fingerprint, "metrics": written, "network": self.metadata}
            result |= {"flags": vars(self.args)}
            with files.writing(folder):
                for old in [path for pattern in NOT_ALWAYS_WRITTEN for path in folder.glob(pattern)]:
                    old.unlink()  # of an earlier evaluation, of other classes or of another layout
                files.write_json(folder / EVALUATION, result, indent=1)
                names = [name for evaluator in evaluators for name in evaluator.write(folder)]
            self.run.print(f"{folder}: {', '.join([EVALUATION, *names])} written")
        self.run.close()
        return metrics

    def finish(self, stop: StopSignals, metrics: Mapping[str, float], evaluators: Sequence) -> Mapping[str, float]:
        """The end of training: print the result, return the metrics. SystemExit with code 130 or 143 after a signal."""
        if self.lock:
            self.lock.release()
        stop.requested()  # a signal to one process during the last validation ends all of them with its code
        self.run.close()
        progress = self.progress
        if stop.signal and self.args.preflight:
            raise SystemExit(stop.exit_code)
        if self.args.preflight:
            self.run.print(f"preflight: {memory.peaks()}")
            return metrics
        if stop.signal:
            self.run.print(f"stopped and saved at step {progress.step}; continue with --resume auto")
            raise SystemExit(stop.exit_code)
        for table in [evaluator.table() for evaluator in evaluators] if self.run.is_main else []:
            if table:
                self.run.print(table)
        if progress.best is not None:
            weights = f", its weights in {self.path / WEIGHTS}" if (self.path / WEIGHTS).is_file() else ""
            self.run.print(f"best {self.monitor} {progress.best:.4g} at step {progress.best_step}{weights}")
        self.run.print(f"checkpoints, curves and images: tensorboard --logdir {self.path}")
        return metrics


def save(
    folder: Path, contents: Mapping[str, Any], copies: Sequence[str] = (), keep: int = 0, again: bool = False
) -> None:
    """Write FOLDER/last.pt (see checkpoint.write); the last.pt before it becomes previous.pt. For one process only.

    copies   further names for it
    keep     how many numbered copies of each kind remain, the newest; 0: all
    again    last.pt is of the same step already: previous.pt stays, which is of an earlier one

    If the process is killed at any moment, the folder has a whole last.pt, old or new. WriteError if it cannot be
    written.
    """
    new, last = folder / "new.pt", folder / LAST
    try:
        checkpoint.write(new, contents)
        for name in copies:  # before last.pt: its progress says that best.pt exists
            files.link_or_copy(new, folder / name)
        if last.exists() and not again:
            files.link_or_copy(last, folder / PREVIOUS)  # a second name, so that last.pt exists at every moment
        new.replace(last)
        remove_old_copies(folder, keep)
        files.sync_folder(folder)
    except OSError as error:
        files.remove(new)
        raise WriteError(last, error, CONTINUE) from error


def remove_old_copies(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` numbered copies of each kind; 0: none."""
    for pattern in NUMBERED if keep else ():
        for old in sorted(folder.glob(pattern), key=_number_of)[:-keep]:
            old.unlink()


def open_run(run: Run, folder: Path, resume: str = "", overwrite: bool = False, read_only: bool = False) -> dict | None:
    """Decide what a run starts from: the checkpoint to restore (see checkpoint.read), or None for a new run.

    resume      "" for a new run; "auto" for the newest whole checkpoint in `folder`, if any; a run folder; a file
    overwrite   remove the run in the folder
    read_only   neither refuse nor remove anything

    A new run, or one that continues another folder's, is refused with a UsageError if `folder` has a run, unless
    `overwrite`. A folder that not all machines share is refused unless `read_only`. Every process calls this, and a
    refusal is raised in all of them.
    """
    main_place, name = run.gather((f"{folder.absolute()} on {socket.gethostname()}", f"{SHARED}{uuid.uuid4().hex}"))[0]
    token = None if read_only or run.world_size == 1 else folder / name
    try:
        for _ in range(EVALUATION_TRIES if read_only else 1):
            with run.main_first():  # NFS caches for a while that a folder is missing: look for it after it was created
                if token and not run.is_main:
                    _wait_for(token, main_place)
                saved, damaged = _find(run, folder, resume, overwrite, read_only)
                if token and run.is_main:
                    files.write_text(token, "")
            steps = run.gather(saved["step"] if saved else 0)
            if len(set(steps)) == 1:
                break
    finally:
        if token and run.is_main:
            files.remove(token)
    with run.raise_in_all():
        if len(set(steps)) > 1:
            raise UsageError(
                f"{folder}: processes start from different steps {steps}; use a folder that all machines share, and "
                "for --eval-only a checkpoint that no training replaces meanwhile"
            )
    if run.is_main and not read_only:
        with files.writing(folder):
            for path in damaged:
                path.replace(f"{path}.damaged")  # else the next save would make it previous.pt, over the whole one
            for path in [path for pattern in RUN_FILES for path in folder.glob(pattern)] if overwrite else ():
                path.unlink()
    return saved


def _wait_for(token, main_place):
    deadline = time.monotonic() + SHARED_SECONDS
    while not token.exists():
        if time.monotonic() > deadline:
            raise UsageError(
                f"{token.parent.absolute()} is not the folder of process 0, {main_place}; "
                "give a --model-dir on a disk that all machines share"
            )
        time.sleep(0.1)


def _find(run, folder, resume, overwrite, read_only):
    """(checkpoint to start from or None, paths of damaged checkpoints in `folder` that are newer); changes nothing"""
    source = folder if resume == "auto" else Path(resume)
    saved, damaged = None, []
    if resume == "auto" or (resume and source.is_dir()):
        saved, damaged = _newest(run, source)
        if saved is None and (resume != "auto" or read_only):
            raise UsageError(f"--resume {resume}: no checkpoint in {source}; {torch_files.checkpoints_nearby(source)}")
    elif resume:
        saved = checkpoint.read(source)
    if read_only:
        return saved, []
    if saved and Path(saved["file"]).resolve().parent == folder.resolve():
        if overwrite:
            raise UsageError(f"--overwrite would remove {saved['file']}, which --resume continues; give one of them")
        return saved, damaged
    if any((folder / name).exists() for name in (LAST, PREVIOUS)):
        if _is_restart():
            flag = "instead of --overwrite, which would delete it" if overwrite else "to the command line"
            raise UsageError(f"{folder}: the restarted job has a run there; to continue it, add --resume auto {flag}")
        if not overwrite:
            raise UsageError(
                f"{folder}: it already has a run; continue it with --resume auto, or give --overwrite or another folder"
            )
    return saved, []


def _is_restart():
    """Whether torchrun (--max-restarts) or Slurm (requeue) has started the same command line again."""
    return any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _newest(run, folder):
    """(newest whole checkpoint in `folder`, None if there is no file; paths of the damaged ones that are newer)"""
    damaged, reasons = [], []
    for path in newest_first(folder):
        try:
            saved = checkpoint.read(path)
        except WeightsError as error:
            damaged.append(path)
            reasons.append(str(error).split(";")[0])
            continue
        if reasons:
            run.print(f"{'; '.join(reasons)}; using {path}")
        return saved, damaged
    if damaged:
        raise UsageError(
            f"no whole checkpoint: {'; '.join(reasons)}; start a new run with --overwrite and without --resume"
        )
    return None, []


def _number_of(path):
    """The number in the name of a numbered copy; 0 for a file of the user's that only looks like one."""
    number = path.stem.rpartition("_")[2]
    return int(number) if number.isdecimal() else 0
