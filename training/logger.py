"""One call, three sinks: a line on the console, a line in metrics.jsonl, scalars in TensorBoard; main process only."""

import json
import math
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from training import distributed, memory
from training.board import Board
from training.distributed import Run
from training.meter import Meter, NonFiniteLoss
from utils import files

METRICS = "metrics.jsonl"
CONSOLE_VALUES = 16  # maximum in a line on the console; metrics.jsonl and TensorBoard get all
CURVE_POINTS = 127  # maximum that TensorBoard draws of a precision-recall curve
MAX_NONFINITE = 20  # steps in a row, in fp16: the GradScaler skips them while it searches its scale

Item = TypeVar("Item")


class Logger:
    """The log of a run: flags.json, versions.json, metrics.jsonl, TensorBoard files, the progress bar.

    folder        run folder
    run           only its main process writes anything
    total_steps   of the whole run
    first_step    steps completed before (a resume). Later steps that an earlier process logged are dropped, so that
                  each step is logged once
    state         `state_dict` after these steps
    validates     the validation of first_step follows: what was logged of it is dropped too, and its losses are logged
                  again from `state`
    batch_size    images per step
    flags         plain values. `log_level` "warning": no line per step and no bar; "debug": prints the flags too
    image_path    image_path(image_id) is the file of a training image, for the report of a non-finite loss
    remedy        remedy(step) says how to go on after a non-finite loss at that step
    enabled       False: nothing is written or printed

    metrics, evaluators   of the last validation
    """

    def __init__(
        self,
        folder: Path,
        run: Run,
        total_steps: int,
        first_step: int = 0,
        state: Mapping[str, Any] | None = None,
        validates: bool = False,
        batch_size: int = 1,
        flags: Mapping[str, Any] | None = None,
        image_path: Callable[[int], str] | None = None,
        remedy: Callable[[int], str] | None = None,
        enabled: bool = True,
    ):
        flags, state = dict(flags or {}), state or {}
        self.folder, self.run, self.total_steps, self.remedy = folder, run, total_steps, remedy
        self.batch_size, self.image_path, self.enabled = batch_size, image_path, enabled and run.is_main
        self.metrics, self.evaluators = {}, []
        self.quiet = flags.get("log_level") == "warning"
        self.meter = Meter(MAX_NONFINITE if run.scaler.is_enabled() else 0)
        self._loss_names = ()
        self._logged_step = first_step  # the last step whose losses were logged
        self._recent = deque(state.get("recent", ()))  # (loss, steps) of the latest log lines, for the running loss
        self._losses = state.get("losses", {})  # the last log line with losses
        self._clock_start, self._waited = time.perf_counter(), 0.0  # waited: seconds since then, for data
        hidden = None if self.enabled and not self.quiet else True  # None: no bar if stderr is not a terminal
        self._bar = tqdm(total=total_steps, initial=first_step, disable=hidden, unit="step", dynamic_ncols=True)
        self._metrics = self._board = self._steps = None
        if not self.enabled:
            return
        files.write_json(folder / "flags.json", flags, indent=1)
        files.write_json(folder / "versions.json", versions(), indent=1)
        last_step = first_step - validates  # whose lines stay
        drop_later(folder / METRICS, last_step)
        with files.writing(folder / METRICS):
            self._metrics = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115, see close()
        self._board = Board(folder, last_step, self._print)
        rows = [f"| {name} | `{value}` |" for name, value in sorted(flags.items())]
        self._board.add_text("flags", "\n".join(["| flag | value |", "| --- | --- |", *rows]), first_step)
        if flags.get("log_level") == "debug":
            self._print(json.dumps(flags, indent=1, default=str))
        if validates:
            self._log(first_step, self._losses)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        with files.writing(self.folder / METRICS, "continue with --resume auto"):  # also the rest of a failed line
            for sink in (self._steps, self._bar, self._board, self._metrics):
                if sink is not None:
                    sink.close()

    def flush(self) -> None:
        """Hand what TensorBoard has not got yet to the operating system, so that it outlives this process."""
        if self._board is not None:
            self._board.flush()

    def state_dict(self) -> dict:
        """What the log of a process that continues the run starts from, plain values."""
        return {"recent": list(self._recent), "losses": self._losses}

    def steps(self, loader: Iterable[Item]) -> Iterator[Item]:
        """An iterator over the items of `loader`, one per step, with a progress bar; measures the wait for each."""
        self._steps = self._timed(loader)  # `close` ends it, and with it the processes of the loader
        return self._steps

    def _timed(self, loader):
        self._clock_start = waiting_since = time.perf_counter()
        for item in loader:
            self._waited += time.perf_counter() - waiting_since
            yield item
            self._bar.update()
            waiting_since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """`with logger.paused():` around a validation inside the loop, the time of which does not count as training."""
        start = time.perf_counter()
        yield
        self._clock_start += time.perf_counter() - start

    def add(
        self,
        step: int,
        losses: Mapping[str, torch.Tensor],
        image_ids: Sequence[int],
        metrics: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Add the loss terms (0-d tensors) of a batch, or of one of its micro-batches, to be logged by `log_losses`.

        image_ids   of the whole batch, for the report of a non-finite loss
        metrics     other means to log, which are not part of the loss
        """
        self._loss_names = tuple(losses)
        self.meter.add(step, {**losses, **(metrics or {})}, image_ids)

    def log_losses(self, step: int, optimizer: torch.optim.Optimizer, running: int = 0) -> float:
        """Log the means since the last call, over all processes, as train/...; returns that of the whole loss.

        running: also log train/running_loss, the mean over about this many of the latest steps; 0: do not

        A non-finite loss in any process raises NonFiniteLoss in all, after its step, images, losses and learning rate
        are written to FOLDER/nan_report.json.
        """
        lr, failure = optimizer.param_groups[-1]["lr"], None
        try:
            means = self.meter.read()
        except NonFiniteLoss as error:
            failure = (error.step, error.images, error.losses)
        failures = [failure for failure in self.run.gather(failure) if failure]
        if failures:  # the first one is the cause: one step later all processes have it
            first_step, images, losses = min(failures, key=lambda failure: failure[0])
            self._raise_non_finite(first_step, images, losses, lr)
        means = {name: float(self.run.mean(value)) for name, value in means.items()}
        total = sum(means[name] for name in self._loss_names)
        if len(self._loss_names) == 1:
            del means[self._loss_names[0]]  # it is the whole loss
        tags = {"train/loss": total} | {f"train/{name}": value for name, value in means.items()}
        steps, self._logged_step = step - self._logged_step, step
        if running:
            self._recent.append((total, steps))
            while sum(n for _, n in self._recent) - self._recent[0][1] >= running:
                self._recent.popleft()
            tags["train/running_loss"] = sum(loss * n for loss, n in self._recent) / sum(n for _, n in self._recent)
        self.log(step, {**tags, "lr": lr}, images=steps * self.batch_size)
        return total

    def _raise_non_finite(self, step, images, losses, lr):
        paths = [self.image_path(image) for image in images] if self.image_path else []
        if self.enabled:
            values = {name: value if math.isfinite(value) else str(value) for name, value in losses.items()}
            report = {"step": step, "images": images, "paths": paths, "losses": values, "lr": lr}
            files.write_json(self.folder / "nan_report.json", report, indent=1)
        raise NonFiniteLoss(step, images, losses, paths, self.remedy(step) if self.remedy else "")

    def log(self, step: int, values: Mapping[str, Any], images: int | None = None) -> None:
        """Write `values` (tag -> float or 0-d tensor) for `step`.

        images: number of images trained on since it was last given. If given, adds images per second, the share of the
        time spent waiting for data, and the peak memory (of the GPU if one is in use, else RAM) in MB.

        Every process calls this. WriteError in all of them if the main process cannot write metrics.jsonl.
        """
        with self.run.raise_in_all():
            if self.enabled:
                self._log(step, values, images)

    def _log(self, step, values, images=None):
        values = {tag: float(value) for tag, value in values.items()}
        if images is not None:
            seconds = time.perf_counter() - self._clock_start
            values["speed/images_per_second"] = images / seconds
            values["speed/data_wait"] = self._waited / seconds
            values["speed/peak_memory_mb"] = (memory.peak_gpu() or memory.peak_ram()) / memory.MB
            self._clock_start, self._waited = time.perf_counter(), 0.0
            memory.reset_peak()
            self._losses = values
        line = {"step": step} | {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        with files.writing(self.folder / METRICS, "continue with --resume auto"):
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)
        if not self.quiet:
            shown = [f"{tag} {value:.4g}" for tag, value in values.items()]
            if len(shown) > CONSOLE_VALUES:
                shown[CONSOLE_VALUES:] = [f"({len(shown) - CONSOLE_VALUES} more in metrics.jsonl)"]
            self._print(f"step {step}/{self.total_steps}  {'  '.join(shown)}")

    def log_validation(
        self,
        step: int,
        metrics: Mapping[str, float],
        evaluators: Sequence[Any] = (),
        images: Iterable[tuple[str, torch.Tensor]] = (),
    ) -> None:
        """Log a validation: metrics as val/..., images (name, uint8 [3,H,W]), the evaluators' precision-recall curves;
        let the evaluators write their files into the run folder. A loss that is not finite is printed as a warning."""
        self.metrics, self.evaluators = metrics, evaluators
        self.log(step, {f"val/{name}": value for name, value in metrics.items()})
        with self.run.raise_in_all():
            for evaluator in evaluators if self.enabled else ():
                evaluator.write(self.folder)
        if not self.enabled:
            return
        bad = {name: value for name, value in metrics.items() if "loss" in name and not math.isfinite(value)}
        for name, value in bad.items():
            self._print(f"WARNING: val/{name} is {value} at step {step}: use a lower learning rate if that persists")
        for evaluator in evaluators:
            for name, (precision, recall, _) in evaluator.curves().items():
                self._add_pr_curve(f"val/PR/{name}", precision, recall, step)
        for name, image in images:
            self._board.add_image(f"val/{name}", image.cpu(), step)

    def _print(self, line):
        """Print a line above the progress bar."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _add_pr_curve(self, tag, precision, recall, step):
        """A precision-recall curve for TensorBoard, both [N] in order of falling score; N may be 0."""
        precision, recall = (torch.as_tensor(values).double().cpu().numpy() for values in (precision, recall))
        if len(recall) == 0:
            precision = recall = np.zeros(1)
        chosen = np.linspace(len(recall) - 1, 0, CURVE_POINTS).round().astype(int)  # in order of rising score
        precision, recall = precision[chosen], recall[chosen]
        # TensorBoard also wants counts, and cuts the curve where no detection is counted: those of 1000 objects.
        true = np.maximum(1000 * recall, 1)
        false = true / np.maximum(precision, 1e-3) - true
        zeros, missed = np.zeros(CURVE_POINTS), 1000 - true
        self._board.add_pr_curve_raw(tag, true, false, zeros, missed, precision, recall, step, CURVE_POINTS)


def versions() -> dict:
    """The software and hardware this process runs on, as plain values for versions.json."""
    project = Path(__file__).resolve().parents[1]
    revision = _git(project, "rev-parse", "HEAD")
    changed = _git(project, "status", "--porcelain", "--untracked-files=no").splitlines()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": distributed.gpu_names(),
        "machine": platform.platform(),
        "git_revision": revision,
        "git_changed_files": len(changed) if revision else None,
        "argv": list(sys.argv),
    }


def drop_later(path: Path, step: int) -> None:
    """Drop the lines of the metrics.jsonl at `path` after `step`, all if it is 0, and lines cut short by a kill."""
    if not path.is_file():
        return
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if 0 < json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    files.write_text(path, "".join(lines))


def _git(folder, *command):
    """Output of a git command, or "" without git or without a repository."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
