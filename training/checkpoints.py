"""Checkpoints of a run: written whole or not at all, read safely, continued exactly.

A run folder holds `last.pt`, `previous.pt` (the one before), `best.pt`, and numbered copies `epoch_012.pt`,
`step_000200.pt`. A checkpoint is a flat dict: `format_version`, state dicts by name (model, optimizer, scaler, ema),
the fields of Progress (step, epoch, best, best_step, stale), and plain values that the script adds (architecture,
arguments, classes, flags ...). It loads with `weights_only=True`: no code in a file is ever run.

    python -m training.checkpoints RUN/last.pt      # epoch, step, sha256 over model and optimizer
"""

import argparse
import hashlib
import pickle
import re
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from training import devices, files, flags
from training.digest import feed
from training.ema import Ema
from training.flags import UsageError
from training.restore import first_line, restore
from training.signals import StopSignals

__all__ = ["Ema", "Progress", "StopSignals", "changed", "export", "fingerprint", "open_run", "read", "restore", "save"]

FORMAT_VERSION = 1
NEW, LAST, PREVIOUS, BEST = "new.pt", "last.pt", "previous.pt", "best.pt"
NUMBERED = ("epoch_*.pt", "step_*.pt")
LOGS = ("metrics.jsonl", "nan_report.json", "events.out.tfevents.*")
OF_A_RUN = (NEW, LAST, PREVIOUS, BEST, "backbone.pt", *NUMBERED, "*.pt.tmp", "*.pt.damaged", *LOGS)
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before version 1.6


@dataclass
class Progress:
    """How far a run is. `step` and `epoch` are those done; `best` is None before the first evaluation."""

    step: int = 0
    epoch: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best one, for --patience

    def improved(self, value, lower_is_better=False):
        """Note an evaluation at the present step -> whether it is the best so far. NaN never is."""
        value = float(value)
        if self.best is None:
            better = value == value
        else:
            better = value < self.best if lower_is_better else value > self.best
        if better:
            self.best, self.best_step, self.stale = value, self.step, 0
        else:
            self.stale += 1
        return better

    def state_dict(self):
        return asdict(self)

    def load_state_dict(self, state):
        """Take the fields out of a flat checkpoint. KeyError names one that is missing."""
        for name in asdict(self):
            setattr(self, name, state[name])


def save(folder, state, *, epoch_copy=None, step_copy=None, best=False, keep=0):
    """Write `state` as FOLDER/last.pt; what was last.pt becomes previous.pt. Only the main process writes.

    state: name -> object with state_dict(), or plain value (TypeError for any other). A Progress under any name is
    spread into its fields. epoch_copy, step_copy: also keep a numbered copy. best: also make it best.pt.
    keep: numbered copies of each kind that stay, the newest; 0: all.
    Killed at any moment, the folder holds a whole last.pt, old or new. UsageError where it cannot be written.
    """
    if not devices.is_main():
        return
    folder = Path(folder)
    contents = {"format_version": FORMAT_VERSION}
    for name, value in state.items():
        contents |= value.state_dict() if isinstance(value, Progress) else {name: _plain(name, _state_of(value))}
    names = [BEST] if best else []
    names += [f"epoch_{epoch_copy:03d}.pt"] if epoch_copy is not None else []
    names += [f"step_{step_copy:06d}.pt"] if step_copy is not None else []
    new, last = folder / NEW, folder / LAST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write(new, lambda file: _serialise(contents, file))
        for name in names:  # before last.pt, whose progress says that they were made
            files.duplicate(new, folder / name)
        if last.exists():
            files.duplicate(last, folder / PREVIOUS)  # a second name, so that there is a last.pt at every moment
        new.replace(last)
        for pattern in NUMBERED if keep else ():
            for old in sorted(folder.glob(pattern), key=_number_of)[:-keep]:
                old.unlink()
        files.sync_folder(folder)
    except OSError as fault:
        new.unlink(missing_ok=True)
        raise UsageError(
            f"{last}: not written: {fault.strerror or fault}; free some room, then --resume auto"
        ) from fault


def read(path, weights_flag="--pretrained-ssd"):
    """Load a checkpoint of ours onto the CPU -> its dict, and under `file` the path it came from.

    UsageError for a file that is missing, truncated or damaged; for bare weights (names `weights_flag`, the way to
    start from them); for a pickled module (refused: nothing in it is executed); for a newer format.
    """
    path = Path(path)
    if not path.is_file():
        reason = "is a folder, not a checkpoint" if path.is_dir() else "no such checkpoint"
        raise UsageError(f"{path}: {reason}; {_found_near(path)}")
    _check_whole(path)
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as fault:
        found = re.search(r"GLOBAL ([\w.]+)", str(fault))
        what = f"a pickled object ({found[1]})" if found else "pickled objects"
        raise UsageError(
            f"{path}: holds {what}, which only running its code could load: refused; "
            "in the program that wrote it, save model.state_dict() instead"
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as fault:
        raise UsageError(f"{path}: damaged: {first_line(fault)}; use an older checkpoint") from None
    if not isinstance(contents, dict) or "format_version" not in contents:
        raise UsageError(
            f"{path}: {_describe_foreign(contents)}, not a checkpoint of a run (no optimizer, no step); "
            f"to start from weights use {weights_flag} {path}"
        )
    if contents["format_version"] > FORMAT_VERSION:
        raise UsageError(f"{path}: format {contents['format_version']}, this program knows {FORMAT_VERSION}; update it")
    return {**contents, "file": str(path)}


def open_run(folder, resume="", overwrite=False, evaluate_only=False, weights_flag="--pretrained-ssd"):
    """Decide what this run starts from -> the checkpoint to restore (see `read`), or None for a new run.

    resume: "" for a new run; "auto" for the newest whole checkpoint in `folder`, if it has any; a run folder; a file.
    A new run, or one that continues from elsewhere, is refused where `folder` holds a run, unless `overwrite`: then
    that run's files are removed. `evaluate_only` neither refuses nor removes anything. Every process calls this.
    """
    saved = _open(Path(folder), resume, overwrite, evaluate_only, weights_flag)
    steps = devices.gather(saved["step"] if saved else 0)
    if len(set(steps)) > 1:
        raise UsageError(
            f"{folder}: processes start from different steps {steps}; use a folder that all machines share"
        )
    return saved


def export(path, contents):
    """Write `contents` (name -> object with state_dict(), or plain value) as a file of its own, for other programs.

    Only the main process writes. UsageError where it cannot be written.
    """
    if not devices.is_main():
        return
    plain = {name: _plain(name, _state_of(value)) for name, value in contents.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, lambda file: _serialise({"format_version": FORMAT_VERSION, **plain}, file))
    except OSError as fault:
        raise UsageError(f"{path}: not written: {fault.strerror or fault}; free some room") from fault


def _number_of(path):
    """The number of a numbered copy; 0 where a person's file only looks like one."""
    number = path.stem.rpartition("_")[2]
    return int(number) if number.isdecimal() else 0


def _serialise(contents, file):
    try:
        torch.save(contents, file)
    except RuntimeError as fault:  # how torch ends after a full disk
        raise fault.__context__ if isinstance(fault.__context__, OSError) else fault from None


def _open(folder, resume, overwrite, evaluate_only, weights_flag):
    place = folder if resume == "auto" else Path(resume)
    saved, damaged = None, []
    if resume == "auto" or (resume and place.is_dir()):
        saved, damaged = _newest(place)
        if saved is None and (resume != "auto" or evaluate_only):
            raise UsageError(f"--resume {resume}: no checkpoint in {place}; {_found_near(place)}")
    elif resume:
        saved = read(place, weights_flag)
        if "step" not in saved:
            raise UsageError(
                f"{place}: bare weights of ours, no checkpoint of a run; to start from weights use {weights_flag} "
                f"{place}; to go on with a run name its folder or its last.pt"
            )
    if evaluate_only:
        return saved
    if saved and Path(saved["file"]).resolve().parent == folder.resolve():
        if overwrite:
            raise UsageError(f"--overwrite would remove {saved['file']}, which --resume continues; give one of them")
        for path in damaged if devices.is_main() else ():
            path.replace(f"{path}.damaged")  # else the next save would make it previous.pt, over the whole one
        return saved
    if not overwrite and any((folder / name).exists() for name in (LAST, PREVIOUS)):
        raise UsageError(
            f"{folder}: holds a run; use --resume auto to continue it, --overwrite to start anew, or another folder"
        )
    if overwrite and devices.is_main():
        for path in [path for pattern in OF_A_RUN for path in folder.glob(pattern)]:
            path.unlink()
    return saved


def changed(saved_flags, flags, ignore=("resume", "overwrite", "eval_only", "preflight", "config")):
    """Lines `epochs: 30 -> 60` for the settings that differ between two dicts of flags, in order of name -> list."""
    before, now = _plain("flags", saved_flags), _plain("flags", flags)
    absent = "(absent)"
    return [
        f"{name}: {before.get(name, absent)} -> {now.get(name, absent)}"
        for name in sorted(before.keys() | now.keys())
        if name not in ignore and before.get(name, absent) != now.get(name, absent)
    ]


def fingerprint(state):
    """sha256 over the tensors of model and optimizer: names sorted, dtype, shape and bytes -> 64 hex digits.

    state: a checkpoint, or any mapping with `model` and `optimizer` as state dicts or as objects that have them.
    """
    digest = hashlib.sha256()
    for name in ("model", "optimizer"):
        if name in state:
            feed(digest, name, _state_of(state[name]))
    return digest.hexdigest()


def _state_of(value):
    if isinstance(value, nn.Module):
        return devices.unwrap(value).state_dict()
    if isinstance(value, torch.optim.Optimizer):
        return {**value.state_dict(), "class": type(value).__name__}
    return value.state_dict() if hasattr(value, "state_dict") else value


def _plain(place, value):
    """`value` in types that load with weights_only=True; a Path becomes text. TypeError names any other's place."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        plain = {key: _plain(f"{place}.{key}", item) for key, item in value.items()}
        # A state dict goes as it came: it carries the versions of its modules.
        return value if all(plain[key] is item for key, item in value.items()) else plain
    if isinstance(value, (list, tuple)):
        plain = [_plain(f"{place}[{i}]", item) for i, item in enumerate(value)]
        return plain if isinstance(value, list) else tuple(plain)
    if type(value) in (str, int, float, bool, type(None), torch.dtype) or isinstance(value, torch.Tensor):
        return value
    raise TypeError(
        f"checkpoint value {place} is a {type(value).__name__}; save plain values or objects with state_dict()"
    )


def _check_whole(path):
    """UsageError where the file at `path` ends early or its contents do not match their checksums."""
    with open(path, "rb") as file:
        head = file.read(len(LEGACY_MAGIC))
    if head == LEGACY_MAGIC:
        return  # torch.load itself notices a short one
    if not head.startswith(b"PK"):
        what = "is empty" if not head else "is not a PyTorch file"
        raise UsageError(f"{path}: {what}; {_found_near(path)}")
    if fault := files.zip_fault(path):
        raise UsageError(f"{path}: truncated or damaged at {fault}, {path.stat().st_size} bytes; {_found_near(path)}")


def _describe_foreign(contents):
    if isinstance(contents, dict) and contents:
        if all(isinstance(value, torch.Tensor) for value in contents.values()):
            return f"bare weights ({len(contents)} tensors)"
        return f"a dict of {', '.join(map(str, islice(contents, 5)))}"
    return f"a {type(contents).__name__}"


def _newest(folder):
    """-> (newest whole checkpoint in `folder` or None if there is no file, paths of the damaged ones before it)"""
    kept = [path for pattern in (*NUMBERED, BEST) for path in folder.glob(pattern)]
    kept.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    damaged, reasons = [], []
    for path in [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()] + kept:
        try:
            saved = read(path)
        except UsageError as fault:
            damaged.append(path)
            reasons.append(str(fault).split(";")[0])
            continue
        if reasons and devices.is_main():
            print(f"{'; '.join(reasons)}; using {path}", flush=True)
        return saved, damaged
    if damaged:
        raise UsageError(f"no whole checkpoint: {'; '.join(reasons)}; start anew with --overwrite and without --resume")
    return None, []


def _found_near(path):
    """What checkpoints lie at or next to `path`, for the end of a message."""
    base = path if path.is_dir() else next((parent for parent in path.parents if parent.is_dir()), Path())
    patterns = ("*.pt", "*.pth", "*/*.pt", "*/*.pth")
    found = (str(near) for pattern in patterns for near in base.glob(pattern) if near != path)
    names = ", ".join(sorted(islice(found, 8)))
    return f"checkpoints near it: {names}" if names else f"there is none in {base} either"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print epoch, step and sha256 (model and optimizer) of checkpoints.")
    parser.add_argument("files", nargs="+", metavar="FILE")
    for path in parser.parse_args(argv).files:
        saved = read(path)
        print(f"{path} epoch {saved.get('epoch')} step {saved.get('step')} sha256 {fingerprint(saved)}")


if __name__ == "__main__":
    flags.run(main)
