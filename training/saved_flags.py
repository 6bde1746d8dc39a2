"""The flags of the run whose checkpoint --eval-only evaluates; they are its defaults."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import torch_files

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
NUMBERED = ("epoch_*.pt", "step_*.pt")  # named by training.plan
# Flags about this process, or about what training starts from: an evaluation does not take them from the run.
NOT_TAKEN = {"config", "model_dir", "resume", "overwrite", "eval_only", "split", "preflight", "check_data", "monitor"}
NOT_TAKEN |= {"weights", "backbone_weights", "device", "use_cuda", "gpus", "compile", "sync_bn", "accumulate"}
NOT_TAKEN |= {"workers", "log_level", "log_every", "no_effect"}
# A new --data stands for all of these.
PARTS_OF_DATA = {"train", "val", "csv_train", "csv_val", "csv_classes"}
SPLITS = {"split", "val_split"}  # of nuScenes: the split chooses the version


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a run folder: last.pt, previous.pt, then the others, the newest first."""
    others = [path for pattern in (*NUMBERED, BEST) for path in folder.glob(pattern)]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()] + others


def find(args: argparse.Namespace) -> tuple[Path, Mapping[str, Any]] | None:
    """(file, flags in it) of the checkpoint of ours that --resume or --weights names; None if there is none.

    Nothing is an error here: RunFolder reads the file again, as a whole, and explains what is wrong.
    """
    source = Path(args.model_dir if args.resume == "auto" else args.resume or getattr(args, "weights", "none"))
    for file in newest_first(source) if source.is_dir() else [source]:
        contents = torch_files.peek(file)
        if "format_version" in contents:
            return file, contents.get("flags", {})
    return None


def choose(saved: Mapping[str, Any], given: set[str]) -> dict[str, Any]:
    """Those of the `saved` flags that an evaluation takes if the flags `given` are on its command line."""
    skipped = NOT_TAKEN | given | (PARTS_OF_DATA if "data" in given else set())
    skipped |= {"version"} if given & SPLITS else set()
    return {name: value for name, value in saved.items() if name not in skipped}


def misfit(value: Any, default: Any, actions: Sequence[argparse.Action]) -> str:
    """Why `value`, from a file, cannot be that of the flag which these actions of argparse set; "" if it can.

    default: a value that the flag has without being given
    """
    kinds = {_kind(known) for known in (default, *(action.const for action in actions)) if known is not None}
    kinds |= {"bool" for action in actions if isinstance(action, argparse.BooleanOptionalAction)}
    if value is not None and kinds and _kind(value) not in kinds:
        return f"a {_kind(value)} instead of a {' or '.join(sorted(kinds))}"
    if value is None or isinstance(value, bool):
        return ""
    action = actions[0]
    items = value if action.nargs and isinstance(value, (list, tuple)) else [value]
    for item in items if callable(action.type) else ():
        word = ",".join(map(str, item)) if isinstance(item, (list, tuple)) else str(item)
        try:
            parsed = action.type(word)
        except (argparse.ArgumentTypeError, ValueError) as error:
            return str(error)
        if _kind(parsed) != _kind(item):
            return f"a {_kind(item)} instead of a {_kind(parsed)}"
    return ""


def _kind(value):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "number" if number else "list" if isinstance(value, (list, tuple)) else type(value).__name__
