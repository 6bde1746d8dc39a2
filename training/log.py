"""One call, three sinks: a line on the console, a line in metrics.jsonl, scalars in TensorBoard; main process only."""

import json
import math
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from training import devices, files, schedule

CONSOLE_VALUES = 16  # a line shows so many; metrics.jsonl and TensorBoard get all
CURVE_POINTS = 127  # TensorBoard draws no more of a PR curve


class Logger:
    """The log of a run in `folder`: flags.json, versions.json, metrics.jsonl, TensorBoard events, progress bar.

    total_steps: of the whole run. first_step: steps done before (a resume); what an earlier process logged of later
    ones is dropped, so each step is logged once. enabled: false in all processes but the main one; then nothing is
    written. every: steps between two lines. flags: plain values. level: "info"; "warning": files alone, no line a step
    and no bar; "debug": prints the flags too.
    """

    def __init__(self, folder, total_steps, first_step=0, enabled=True, every=10, flags=None, level="info"):
        self.folder, self.total_steps, self.step = Path(folder), total_steps, first_step
        self.enabled, self.every, self.quiet = enabled, every, level == "warning"
        self._bar = self._metrics = self._board = None
        self._clock = _Clock()
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import; loader workers never need it

        self.folder.mkdir(parents=True, exist_ok=True)
        _write_json(self.folder / "flags.json", flags or {})
        _write_json(self.folder / "versions.json", versions())
        drop_later(self.folder / "metrics.jsonl", first_step)
        self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, see close()
        self._board = SummaryWriter(str(self.folder), purge_step=first_step + 1 if first_step else 0)
        self._board.add_text("flags", _table(flags or {}), first_step)
        if level == "debug":
            self.say(json.dumps(flags, indent=1, default=str))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def due(self, step):
        """Whether a line is due after `step`: every `every` steps and after the last."""
        return schedule.due(step, self.every, self.total_steps)

    def close(self):
        for sink in (self._bar, self._metrics, self._board):
            if sink is not None:
                sink.close()

    def steps(self, loader):
        """Yield the items of `loader`, one a step, under the run's progress bar; measures the wait for each."""
        if self._bar is None:
            # disable=None: no bar where stderr is no terminal
            hidden = None if self.enabled and not self.quiet else True
            self._bar = tqdm(total=self.total_steps, initial=self.step, disable=hidden, unit="step", dynamic_ncols=True)
        self._clock.start()
        try:
            for item in self._clock.waiting(loader):
                yield item
                self._bar.update()
        finally:
            self._clock.stop()

    @contextmanager
    def paused(self):
        """`with logger.paused():` around an evaluation inside the loop, whose time is not the training's."""
        running = self._clock.stop()
        try:
            yield
        finally:
            if running:
                self._clock.start()

    def log(self, step, values, images=None):
        """Write `values` (tag -> float or 0-d tensor) for `step`.

        images: pictures trained on since the last call that said so; adds their rate a second, the share of that time
        spent waiting for data, and the peak memory (of the GPU if one is in use, else RAM) in MB. Time outside of
        `steps` or inside of `paused` is not counted.
        """
        if not self.enabled:
            return
        values = {tag: float(value) for tag, value in values.items()}
        if images is not None:
            values |= self._speed(images)
        self.step = step
        line = {"step": step} | {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)
        if not self.quiet:
            self.say(_console_line(step, self.total_steps, values))

    def say(self, line):
        """Print a line above the progress bar."""
        if self.enabled:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def images(self, tag, image, step):
        """A picture for TensorBoard: uint8 [3,H,W]."""
        if self.enabled:
            self._board.add_image(tag, image.cpu(), step)

    def pr_curve(self, tag, precision, recall, step):
        """A precision-recall curve for TensorBoard, both [N] in order of falling score; N may be 0."""
        if not self.enabled:
            return
        precision, recall = (torch.as_tensor(x).double().cpu().numpy() for x in (precision, recall))
        if len(recall) == 0:
            precision = recall = np.zeros(1)
        # From the end, for TensorBoard wants rising thresholds.
        chosen = np.linspace(len(recall) - 1, 0, CURVE_POINTS).round().astype(int)
        precision, recall = precision[chosen], recall[chosen]
        # It cuts the curve where no detection is counted, so give counts that agree with the two: of 1000 truths.
        hits = np.maximum(1000 * recall, 1)
        false = hits / np.maximum(precision, 1e-3) - hits
        self._board.add_pr_curve_raw(tag, hits, false, false * 0, 1000 - hits, precision, recall, step, CURVE_POINTS)

    def text(self, tag, text, step):
        """Markdown for TensorBoard."""
        if self.enabled:
            self._board.add_text(tag, text, step)

    def flush(self):
        """Put what was logged where a TensorBoard server sees it now."""
        if self.enabled:
            self._board.flush()

    def _speed(self, images):
        seconds, waited = self._clock.read()
        peak = devices.peak_memory() or devices.peak_ram()
        devices.reset_peak()
        return {
            "speed/images_per_second": images / seconds if seconds else 0.0,
            "speed/data_wait": waited / seconds if seconds else 0.0,
            "speed/peak_memory_mb": peak / devices.MB,
        }


class _Clock:
    """Seconds spent in the training loop, and those of them spent waiting for data, since the last `read`."""

    def __init__(self):
        self._spent = self._waited = 0.0
        self._mark = None  # where counting goes on from; None while stopped

    def start(self):
        self._mark = time.perf_counter()

    def stop(self):
        """Stop counting -> whether it was running."""
        running = self._mark is not None
        self._spent += self._since()
        self._mark = None
        return running

    def read(self):
        self._spent += self._since()
        spent, waited = self._spent, self._waited
        self._spent = self._waited = 0.0
        return spent, waited

    def waiting(self, loader):
        """Yield the items of `loader`, counting the time it takes to get each."""
        begin = time.perf_counter()
        for item in loader:
            self._waited += time.perf_counter() - begin
            yield item
            begin = time.perf_counter()

    def _since(self):
        if self._mark is None:
            return 0.0
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before


class NonFinite(FloatingPointError):
    """A loss that is nan or infinite: `step`, `images` (ids of the batch or piece), `losses` (term -> float), `paths`
    (of the images' files, or [] where they are not known)."""

    def __init__(self, step, images, losses, paths=()):
        self.step, self.images, self.losses, self.paths = step, list(images), losses, list(paths)
        terms = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        shown = ", ".join(map(str, self.paths or self.images)) or "unknown"
        super().__init__(f"non-finite loss at step {step}: {terms}; images {shown}")


class Meter:
    """Losses as they come, kept on their device and read when they are logged: no step waits for the GPU.

    limit: non-finite steps in a row to bear before `read` raises; a GradScaler skips them, and a few are normal.
    """

    def __init__(self, limit=0):
        self.limit = limit
        self.nonfinite = 0  # steps left out so far
        self._in_a_row = 0
        self._names = None
        self._rows = []  # (step, image ids, terms [T] on their device)

    def add(self, losses, image_ids=(), step=None):
        """Note the terms (name -> 0-d tensor) of a batch. Pieces of one batch have the same `step` and are summed."""
        if self._rows and self._names != tuple(losses):
            raise ValueError(f"terms {tuple(losses)} follow {self._names}: read the meter in between")
        self._names = tuple(losses)
        terms = torch.stack([value.detach().float() for value in losses.values()])
        self._rows.append((step, tuple(image_ids), terms))

    def read(self):
        """Mean of each term over the finite steps since the last read -> dict name -> float; {} if there was none.

        One copy from the device. NonFinite for the first bad step past the limit.
        """
        if not self._rows:
            return {}
        rows, self._rows = self._rows, []
        values = torch.stack([terms for _, _, terms in rows]).cpu().double()
        steps = {}  # key -> indices of the rows of one step
        for index, (step, _, _) in enumerate(rows):
            steps.setdefault(("row", index) if step is None else step, []).append(index)
        sums = []
        for indices in steps.values():
            total = values[indices].sum(0)
            if torch.isfinite(total).all():
                sums.append(total)
                self._in_a_row = 0
                continue
            self.nonfinite += 1
            self._in_a_row += 1
            if self._in_a_row > self.limit:
                bad = next((i for i in indices if not torch.isfinite(values[i]).all()), indices[0])
                raise NonFinite(rows[bad][0], rows[bad][1], dict(zip(self._names, values[bad].tolist(), strict=True)))
        mean = torch.stack(sums).mean(0).tolist() if sums else [math.nan] * len(self._names)
        return dict(zip(self._names, mean, strict=True))


def read_losses(meter, run, optimizer, folder, paths=None):
    """`meter.read()` averaged over the processes of `run`, and their sum under "loss".

    A loss that is not finite is written to FOLDER/nan_report.json, with step, pictures and lr; NonFinite then goes on.
    paths: paths[id] is the file of a picture, for that report.
    """
    try:
        losses = {name: float(run.mean(value)) for name, value in meter.read().items()}
    except NonFinite as fault:
        files_of = [str(paths[image]) for image in fault.images] if paths is not None else []
        fault = NonFinite(fault.step, fault.images, fault.losses, files_of)
        write_nan_report(Path(folder) / "nan_report.json", fault, optimizer.param_groups[-1]["lr"])
        raise fault from None
    return {"loss": sum(losses.values()), **losses}


def write_nan_report(path, fault, lr):
    """Write a NonFinite as JSON: step, images, paths, losses, lr; nan and infinite values as text."""
    losses = {name: value if math.isfinite(value) else str(value) for name, value in fault.losses.items()}
    seen = {"step": fault.step, "images": fault.images, "paths": fault.paths}
    _write_json(Path(path), {**seen, "losses": losses, "lr": lr})


def versions():
    """What this process runs on -> dict of plain values for versions.json."""
    project = Path(__file__).resolve().parents[1]
    revision = _git(project, "rev-parse", "HEAD")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _installed("torchvision"),
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": devices.gpu_names(),
        "machine": platform.platform(),
        "git_revision": revision,
        "git_changed_files": len(_git(project, "status", "--porcelain", "--untracked-files=no").splitlines())
        if revision
        else None,
        "argv": list(sys.argv),
    }


def drop_later(path, step):
    """Keep the lines of the metrics.jsonl at `path` up to `step` (0: none); one cut short by a kill goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step and step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    files.write_text(path, "".join(kept))


def _console_line(step, total, values):
    shown = [f"{tag} {value:.4g}" for tag, value in list(values.items())[:CONSOLE_VALUES]]
    more = f"  ({len(values) - CONSOLE_VALUES} more in metrics.jsonl)" if len(values) > CONSOLE_VALUES else ""
    return f"step {step}/{total}  {'  '.join(shown)}{more}"


def _table(flags):
    rows = [f"| {name} | `{value}` |" for name, value in sorted(flags.items())]
    return "\n".join(["| flag | value |", "| --- | --- |", *rows])


def _write_json(path, value):
    files.write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def _installed(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder, *command):
    """Output of a git command, or "" where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
