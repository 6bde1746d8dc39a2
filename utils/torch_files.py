"""Files that torch.save wrote, read without running any code in them, and whether their tensors fit a network."""

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch

from utils.errors import WeightsError

FORMAT_VERSION = 1  # of our checkpoints
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of torch.save before version 1.6


def read(path: str | Path) -> dict:
    """The dict in a file, tensors on the CPU.

    WeightsError if the file is missing, truncated or damaged (checksums are verified), if it contains pickled objects,
    which are never executed, or anything but a dict.
    """
    path = Path(path)
    if not path.is_file():
        reason = "is a folder, not a file of weights" if path.is_dir() else "no such file"
        raise WeightsError(f"{path}: {reason}; {checkpoints_nearby(path)}")
    _check_whole(path)
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"a pickled object ({name[1]})" if name else "pickled objects"
        raise WeightsError(
            f"{path}: contains {what}, and loading it would run its code: refused; "
            "in the program that wrote it, save model.state_dict() instead"
        ) from None
    except (RuntimeError, EOFError, LookupError, ValueError, OSError, struct.error) as error:
        raise WeightsError(f"{path}: damaged: {first_line(error)}; use another copy") from None
    if not isinstance(contents, dict):
        raise WeightsError(f"{path}: contains a {type(contents).__name__}, not a dict of tensors")
    return contents


def peek(path: str | Path) -> dict:
    """The dict in a file as `read` gives it, but its tensors stay on the disk until they are used; {} if there is none
    or it cannot be read."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, struct.error):
        try:
            contents = read(path)  # a disk or a format that cannot be mapped into memory
        except WeightsError:
            return {}
    return contents if isinstance(contents, dict) else {}


def find_checkpoint(path: str | Path) -> Path:
    """The file at `path`, or in the run folder at `path` best.pt, else last.pt, which is printed. WeightsError."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("best.pt", "last.pt"):
        if (path / name).is_file():
            print(f"{path}: using {name}")
            return path / name
    raise WeightsError(f"{path}: neither best.pt nor last.pt is in this folder; {checkpoints_nearby(path)}")


def mismatches(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    """Why `state` does not load strictly into a network with the state dict `own`: one text per tensor."""
    texts = [f"{name} is missing" for name in own if name not in state]
    texts += [f"{name} is not in this network" for name in state if name not in own]
    for name, value in own.items():
        if name in state and state[name].shape != value.shape:
            texts.append(f"{name} is {tuple(state[name].shape)}, here {tuple(value.shape)}")
    return texts


def checkpoints_nearby(path: Path) -> str:
    """The checkpoints at or next to `path`, for the end of an error message."""
    base = path if path.is_dir() else next((parent for parent in path.parents if parent.is_dir()), Path())
    patterns = ("*.pt", "*.pth", "*/*.pt", "*/*.pth")
    paths = (str(nearby) for pattern in patterns for nearby in base.glob(pattern) if nearby != path)
    names = ", ".join(sorted(islice(paths, 8)))
    return f"checkpoints nearby: {names}" if names else f"no checkpoint in {base} either"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_whole(path):
    """WeightsError if the file ends early or its contents do not match their checksums."""
    with open(path, "rb") as file:
        head = file.read(len(LEGACY_MAGIC))
    if head == LEGACY_MAGIC:
        return  # torch.load itself notices a truncated one
    if not head.startswith(b"PK"):
        reason = "is not a PyTorch file" if head else "is empty"
        raise WeightsError(f"{path}: {reason}; {checkpoints_nearby(path)}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError):
        damaged = "the end of the file"
    if damaged:
        size = path.stat().st_size
        raise WeightsError(f"{path}: truncated or damaged at {damaged}, {size} bytes; {checkpoints_nearby(path)}")
