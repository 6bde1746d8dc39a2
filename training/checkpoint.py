"""Checkpoints: files that hold all that a run needs to continue exactly, and that are read safely.

A checkpoint is a flat dict: `format_version`, state dicts by name (model, optimizer, scaler, ema, plateau, log), the
fields of Progress (step, epoch, best, best_step, stale, validation_due), plain values (architecture, arguments,
classes, flags ...), and a `checksum` over all of them, see utils.torch_files. utils.checkpoint_fields has the kinds and
ranges of the fields. It is always read with `weights_only=True`: code in a file is never run.

    python -m training.checkpoint RUN/last.pt      # epoch, step, sha256 of model and optimizer
"""

import argparse
import copy
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training import cli
from utils import files, torch_files
from utils.checkpoint_fields import NUMBER
from utils.errors import UsageError

# what optimizers keep of each parameter after the first step, in its shape; `step` is one number
MOMENTS = {"SGD": ("momentum_buffer",)} | dict.fromkeys(("Adam", "AdamW"), ("step", "exp_avg", "exp_avg_sq"))
# flags that do not change the training
NOT_COMPARED = ("resume", "overwrite", "eval_only", "split", "preflight", "config", "workers", "no_effect")
FLAG_OF_PART = {"scaler": "--precision", "ema": "--ema", "plateau": "--scheduler"}  # flags that turn a part on
# flags that set an argument of a network, where their names differ
FLAG_OF_ARGUMENT = {"radar": "--pointcloud", "threshold": "--frustum", "max_distance": "--max-pc-dist"}
FLAG_OF_ARGUMENT |= {"depth": "--arch"}
FORMER_ARGUMENTS = {"priors": "scaled"}  # what checkpoints mean that are older than these arguments
FORMER_PROGRESS = {"validation_due": False}  # what checkpoints mean that are older than these fields of Progress
FREE_ARGUMENTS = {"proposals"}  # may differ from the checkpoint's: the weights mean the same
# sizes of the images in evaluation, see models.describe, and the flags that set them
FLAG_OF_SIZE = {"image_size": "--resolution (a backbone's --val-resolution, CenterFusion's --input-size)"}
FLAG_OF_SIZE |= {"min_side": "--min-side", "max_side": "--max-side"}


@dataclass
class Progress:
    """How far a run is: completed steps and epochs, and the best validation (`best` is None before the first)."""

    step: int = 0
    epoch: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # validations since the best one, for --patience
    validation_due: bool = False  # of the weights at `step`; they were saved before it

    def record(self, value: float, higher_is_better: bool) -> bool:
        """Record the validation of the current step; returns whether it is the best so far. NaN and infinity never
        are."""
        value, self.validation_due = float(value), False
        better = math.isfinite(value)
        if better and self.best is not None:
            better = value > self.best if higher_is_better else value < self.best
        if better:
            self.best, self.best_step, self.stale = value, self.step, 0
        else:
            self.stale += 1
        return better


def write(path: Path, contents: Mapping[str, Any]) -> None:
    """Write name -> object with state_dict(), or plain value, to a file that loads with weights_only=True.

    TypeError for a value of any other kind, OSError if the file cannot be written.
    """
    plain = {name: _plain(name, _state_of(value)) for name, value in contents.items()}
    plain = {"format_version": torch_files.FORMAT_VERSION, **plain}
    plain[torch_files.CHECKSUM] = torch_files.checksum(plain)
    try:
        files.write(path, lambda file: torch.save(plain, file))
    except RuntimeError as error:  # torch raises it while it handles the OSError of a full disk
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def read(path: str | Path) -> dict:
    """The checkpoint of a run, tensors on the CPU, and under `file` its path.

    WeightsError as utils.torch_files.read, and for weights or averages that are not finite; UsageError for bare weights
    and for a newer format.
    """
    contents = torch_files.read(path)
    if "format_version" not in contents or "step" not in contents:
        tensors = all(isinstance(value, torch.Tensor) for value in contents.values())
        weights = f"bare weights ({len(contents)} tensors)" if contents and tensors else "weights"
        raise UsageError(
            f"{path}: {weights}, not a checkpoint of a run (no optimizer, no step); to start from weights use "
            f"--weights {path}; to continue a run name its folder or its last.pt"
        )
    if contents["format_version"] > torch_files.FORMAT_VERSION:
        version = contents["format_version"]
        raise UsageError(f"{path}: format {version}, this program knows {torch_files.FORMAT_VERSION}; update it")
    torch_files.check_finite(path, contents.get("model", {}))
    if contents.get("ema"):
        torch_files.check_finite(f"{path}: ema", contents["ema"]["model"])
    return {**FORMER_PROGRESS, "flags": {}, **contents, "file": str(path)}


def restore(saved: Mapping[str, Any], parts: Mapping[str, Any], for_evaluation: bool = False) -> Progress:
    """Load a checkpoint into the objects of a run, in place, exactly; returns its progress.

    parts            name -> object: model, optimizer, scaler, ema, plateau
    for_evaluation   load the model alone, with the weights that the run evaluates: the averaged ones if it has any

    Tensors and learning rates come from the checkpoint; the optimizer's other settings stay those it was built with, so
    flags also have their effect after a resume. UsageError names a part that is missing or does not fit.
    """
    file, net = saved["file"], parts["model"]
    needed = ("model", "ema") if for_evaluation else [name for name, part in parts.items() if part.state_dict()]
    missing = [name for name in (*needed, *asdict(Progress())) if name not in saved]
    if missing:
        raise UsageError(f"{file}: {', '.join(missing)} missing, so the run cannot be continued; start a new run")
    _check_arguments(file, saved.get("arguments", {}), getattr(net, "arguments", {}))
    if not for_evaluation:
        for name, part in parts.items():
            _load_part(file, name, part, saved.get(name, {}))
    elif saved["ema"]:
        _load_network(file, "ema", net, saved["ema"]["model"])
    else:
        _load_network(file, "model", net, saved["model"])
    return Progress(**{name: saved[name] for name in asdict(Progress())})


def check_sizes(saved: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """UsageError if a run with this `metadata` (see models.describe) would continue `saved` with images of another
    size."""
    for name in FLAG_OF_SIZE:
        before, now = saved.get(name), metadata.get(name)
        before = (before, before) if name == "image_size" and isinstance(before, int) else before  # early checkpoints
        if before is not None and now is not None and before != now:
            raise UsageError(
                f"{saved['file']}: its run has {name} {before}, this one {now}, with which its weights and its best "
                f"validation would mean something else; give {FLAG_OF_SIZE[name]} as in that run, or start a new run "
                f"from its weights: --weights {saved['file']} --model-dir NEW, without --resume"
            )


def changed_flags(
    before: Mapping[str, Any], now: Mapping[str, Any], not_compared: Iterable[str] = NOT_COMPARED
) -> list[str]:
    """Lines `epochs: 30 -> 60` for the flags, known to both dicts, whose values differ; in order of name."""
    before, now = _plain("flags", before), _plain("flags", now)
    names = sorted((before.keys() & now.keys()) - set(not_compared))
    return [f"{name}: {before[name]} -> {now[name]}" for name in names if before[name] != now[name]]


def fingerprint(state: Mapping[str, Any]) -> str:
    """sha256 over the tensors of model and optimizer: names in order, dtype, shape and bytes -> 64 hex digits.

    state: a checkpoint, or any mapping with `model` and `optimizer` as state dicts or as objects that have them.
    """
    digest = hashlib.sha256()
    for name in ("model", "optimizer"):
        if name in state:
            _feed(digest, name, _state_of(state[name]))
    return digest.hexdigest()


def _feed(digest, name, value):
    """Feed every tensor in `value`, nested dicts and lists of tensors, to the hash `digest`, in order of name."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _feed(digest, f"{name}.{key}", value[key])
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _feed(digest, f"{name}.{index}", item)


def _state_of(value):
    state = value.state_dict() if hasattr(value, "state_dict") else value
    return {**state, "class": type(value).__name__} if isinstance(value, torch.optim.Optimizer) else state


def _plain(place, value):
    """`value` in types that load with weights_only=True; a Path becomes text. TypeError names the place of any other
    type."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        plain = {key: _plain(f"{place}.{key}", item) for key, item in value.items()}
        # A state dict stays the object it is: it carries the versions of its modules.
        return value if all(plain[key] is item for key, item in value.items()) else plain
    if isinstance(value, (list, tuple)):
        plain = [_plain(f"{place}[{i}]", item) for i, item in enumerate(value)]
        return plain if isinstance(value, list) else tuple(plain)
    if type(value) in (str, int, float, bool, type(None), torch.dtype) or isinstance(value, torch.Tensor):
        return value
    raise TypeError(
        f"checkpoint value {place} is a {type(value).__name__}; save plain values or objects with state_dict()"
    )


def _check_arguments(file, saved, own):
    """UsageError if the network was built with other arguments than the saved one. The weights might fit all the same
    but mean something else."""
    saved = FORMER_ARGUMENTS | saved
    for name in sorted((saved.keys() & own.keys()) - FREE_ARGUMENTS):
        if saved[name] != own[name]:
            raise UsageError(
                f"{file}: its network has {name} {str(saved[name])[:200]}, this run's has {own[name]}; "
                f"give {FLAG_OF_ARGUMENT.get(name, '--' + name.replace('_', '-'))} as in that run"
            )


def _load_part(file, name, part, state):
    is_on = bool(part.state_dict())  # what is switched off has an empty state
    if is_on and not state:
        raise UsageError(f"{file}: {name} was off in that run and is on now; resume with its {FLAG_OF_PART[name]}")
    if name == "ema" and state and not is_on:
        raise UsageError(f"{file}: ema was on in that run and is off now; resume with its --ema")
    if isinstance(part, nn.Module):
        _load_network(file, name, part, state)
    elif isinstance(part, torch.optim.Optimizer):
        _load_optimizer(file, part, state)
    else:
        try:
            part.load_state_dict(state)
        except (KeyError, RuntimeError, TypeError) as error:
            reason = torch_files.first_line(error)
            raise UsageError(f"{file}: {name} does not fit: {reason}; use the flags of that run") from None


def _load_network(file, name, net, tensors):
    own = net.state_dict()
    wrong = torch_files.mismatches(tensors, own)
    if wrong:
        raise UsageError(
            f"{file}: {name} does not fit this network, {len(wrong)} of {len(own)} tensors: {wrong[0]}; "
            "resume with the network and classes of that run"
        )
    net.load_state_dict(dict(tensors))  # without the versions of modules in it, which no network of ours needs


def _load_optimizer(file, optimizer, state):
    own, kind = optimizer.state_dict()["param_groups"], type(optimizer).__name__
    if state.get("class", kind) != kind:
        raise UsageError(
            f"{file}: its optimizer is {state['class']}, this run's {kind}; resume with the optimizer of that run"
        )
    saved_groups = state.get("param_groups", [])
    if not all(NUMBER.fits(group.get("lr")) and isinstance(group.get("params"), list) for group in saved_groups):
        raise UsageError(f"{file}: a group of its optimizer has no lr or no list of params; use another copy")
    saved_sizes = [(group.get("name"), len(group["params"])) for group in saved_groups]
    own_sizes = [(group.get("name"), len(group["params"])) for group in own]
    if saved_sizes != own_sizes:
        raise UsageError(
            f"{file}: its optimizer has groups {saved_sizes}, this run's {own_sizes}; "
            "resume with the --freeze flags of that run"
        )
    _check_moments(file, optimizer, state.get("state", {}))
    groups = [{**group, "lr": saved["lr"]} for group, saved in zip(own, saved_groups)]
    # A copy, because the optimizer would go on to write into the caller's tensors.
    optimizer.load_state_dict({"state": copy.deepcopy(state["state"]), "param_groups": groups})


def _check_moments(file, optimizer, state):
    """UsageError if the saved `state` of a parameter is not what this optimizer has after its first step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state.items():
        shape = tuple(parameters[index].shape) if index in range(len(parameters)) else "no parameter"
        needed = {name: () if name == "step" else shape for name in MOMENTS.get(type(optimizer).__name__, ())}
        saved = values if isinstance(values, dict) else {}
        shapes = {name: tuple(value.shape) for name, value in saved.items() if torch.is_tensor(value)}
        if not (needed.items() <= shapes.items() or saved == {"momentum_buffer": None}):
            raise UsageError(
                f"{file}: its optimizer's state of parameter {index} ({shape}) does not fit: needed are tensors "
                f"{', '.join(needed)} of its shape; use another copy"
            )


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print epoch, step and sha256 (model and optimizer) of checkpoints.")
    parser.add_argument("files", nargs="+", metavar="FILE")
    for path in parser.parse_args(argv).files:
        saved = read(path)
        print(f"{path} epoch {saved['epoch']} step {saved['step']} sha256 {fingerprint(saved)}")


if __name__ == "__main__":
    cli.run(main)
