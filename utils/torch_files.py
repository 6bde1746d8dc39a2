"""Files that torch.save wrote, read without running any code in them, and whether their tensors fit a network.

`read` is the only way in which weights enter a program. What it returns is what was saved: our checkpoints contain a
checksum over all that is in them, of other files the checksums of the zip file are verified, and a damaged or hostile
file is one line.
"""

import hashlib
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils import checkpoint_fields
from utils.errors import WeightsError

FORMAT_VERSION = 1  # of our checkpoints
CHECKSUM = "checksum"  # its name in them; those of earlier versions have none
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of torch.save before version 1.6
END_OF_ZIP = b"PK\x05\x06"
END_BYTES = 22  # of a zip file, without a comment
MAX_VALUES, MAX_DEPTH, MAX_NAME = 200_000, 50, 500  # in a file; a few bytes of pickle can stand for any number
# What zipfile, pickle and torch raise on damaged files; RuntimeError and ValueError include RecursionError,
# NotImplementedError and UnicodeDecodeError.
UNREADABLE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, MemoryError),
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, ImportError),
)


def read(path: str | Path) -> dict:
    """The dict in a file, tensors on the CPU.

    WeightsError if the file is missing, truncated or damaged (checksums are verified), if it contains pickled objects,
    which are never executed, or anything but a dict, and if a field of a checkpoint of ours is not what it must be.
    """
    path = Path(path)
    if not path.is_file():
        reason = "is a folder, not a file of weights" if path.is_dir() else "no such file"
        raise WeightsError(f"{path}: {reason}; {checkpoints_nearby(path)}")
    try:
        with open(path, "rb") as file:
            _check_records(path, file)
            contents = _load(file, "cpu")
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not name and "unrecognized function" not in str(error):
            raise WeightsError(f"{path}: damaged: its pickle cannot be read; use another copy") from None
        what = f"a pickled object ({name[1]})" if name else "pickled objects"
        raise WeightsError(
            f"{path}: contains {what}, and loading it would run its code: refused; "
            "in the program that wrote it, save model.state_dict() instead"
        ) from None
    except UNREADABLE as error:
        raise WeightsError(f"{path}: damaged: {first_line(error)}; use another copy") from None
    if not isinstance(contents, dict):
        raise WeightsError(f"{path}: contains a {type(contents).__name__}, not a dict of tensors")
    _check_values(path, contents)
    if CHECKSUM in contents and checkpoint_fields.is_ours(contents) and contents[CHECKSUM] != checksum(contents):
        raise WeightsError(f"{path}: damaged: its contents do not match its checksum; use another copy")
    checkpoint_fields.check(path, contents)
    return contents


def peek(path: str | Path) -> dict:
    """The dict in a checkpoint of ours, without the data of its tensors; {} if there is none or it cannot be read.

    Only its fields are verified: what it says is preliminary until `read` has read the file.
    """
    try:
        with open(path, "rb") as file:
            contents = _load(file, "meta") if file.read(2) == b"PK" else {}
        contents = contents if isinstance(contents, dict) and checkpoint_fields.is_ours(contents) else {}
        list(_leaves(path, contents))
        checkpoint_fields.check(path, contents)
    except (WeightsError, *UNREADABLE):
        return {}
    return contents


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


def checksum(contents: Mapping[str, Any]) -> str:
    """64 hex digits that depend on every value in a checkpoint, except `checksum`; of tensors on dtype, shape, bytes.

    Of a tensor's bytes a CRC-32 is taken: it is to find damage, not a forger, and several times faster than a
    cryptographic hash. Tensors may be on any device.
    """
    outline = [(name, _outline(value)) for name, value in contents.items() if name != CHECKSUM]
    return hashlib.sha256(ascii(outline).encode()).hexdigest()


def check_finite(label: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """WeightsError that names the first of the tensors that contains NaN or infinity."""
    for name, value in tensors.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise WeightsError(f"{label}: {name} contains NaN or infinity, no usable weights; use an older copy")


def mismatches(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    """Why `state` does not load strictly into a network with the state dict `own`: one text per tensor."""
    texts = [f"{name} is missing" for name in own if name not in state]
    texts += [f"{name} is not in this network" for name in state if name not in own]
    for name, value in own.items():
        if name in state and state[name].shape != value.shape:
            texts.append(f"{name} is {tuple(state[name].shape)}, here {tuple(value.shape)}")
        elif name in state and state[name].is_floating_point() != value.is_floating_point():
            texts.append(f"{name} is {state[name].dtype}, here {value.dtype}")
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


def _load(file: BinaryIO, device: str) -> Any:
    """What torch.load reads; from an open file, because it takes some names for those of other formats."""
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are for the program that wrote the file
        return torch.load(file, map_location=device, weights_only=True)


def _check_records(path, file):
    """WeightsError if the file ends early or its records do not match their checksums, which torch.load ignores."""
    head = file.read(len(LEGACY_MAGIC))
    if head == LEGACY_MAGIC:
        return  # without checksums; torch.load itself notices a truncated one
    if not head.startswith(b"PK"):
        reason = "is not a PyTorch file" if head else "is empty"
        raise WeightsError(f"{path}: {reason}; {checkpoints_nearby(path)}")
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = _ambiguous(archive, file, size) or archive.testzip()
    except UNREADABLE:
        damaged = "the end of the file"
    if damaged:
        damaged = damaged[:MAX_NAME].encode("unicode_escape").decode()  # names of records can be anything
        raise WeightsError(f"{path}: truncated or damaged at {damaged}, {size} bytes; {checkpoints_nearby(path)}")


def _ambiguous(archive, file, size):
    """Where zipfile and torch's own reader could take different bytes for the records; "" if nowhere.

    torch.save writes neither a comment at the end, nor anything before the first record, nor compressed records.
    """
    file.seek(-END_BYTES, 2)
    if file.read(len(END_OF_ZIP)) != END_OF_ZIP:
        return "the end of the file"
    records, names = archive.infolist(), set()
    if min((record.header_offset for record in records), default=-1) != 0:
        return "the list of its records"
    for record in records:
        name = record.filename.lower()  # torch's reader does not distinguish case
        compressed = record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size
        if name in names or compressed or record.flag_bits & 1:
            return record.filename
        names.add(name)
    return "" if sum(record.file_size for record in records) < size else "the list of its records"


def _check_values(path, contents):
    """WeightsError for more values or tensors than can be in a file of this size, and for names of no use."""
    size, storages = path.stat().st_size, set()
    for names, value in _leaves(path, contents):
        if not isinstance(value, torch.Tensor):
            continue
        dense = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
        if not dense or value.device.type != "cpu" or value.is_quantized:
            raise WeightsError(f"{path}: {_joined(names)} is not a dense tensor; save model.state_dict() as torch does")
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            size -= storage.nbytes()
        if value.numel() * value.element_size() > storage.nbytes() or size < 0:
            raise WeightsError(f"{path}: damaged: {_joined(names)} is larger than its data; use another copy")


def _leaves(path, contents) -> Iterator[tuple[tuple, Any]]:
    """(names of the dicts' keys that lead to it, value) of all values that are not dicts, lists or tuples."""
    waiting, count = [((), contents)], 0
    while waiting:
        names, value = waiting.pop()
        if not isinstance(value, (dict, list, tuple)):
            yield names, value
            continue
        count += 1 + len(value)
        if count > MAX_VALUES or len(names) > MAX_DEPTH:
            raise WeightsError(f"{path}: damaged: more values than a file of weights has; use another copy")
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if isinstance(key, str) and (len(key) > MAX_NAME or not key.isprintable()):
                raise WeightsError(f"{path}: damaged: {key[:40]!a} is no name; use another copy")
            waiting.append(((*names, key), item))


def _joined(names):
    return ".".join(name if isinstance(name, str) else str(name)[:20] for name in names)


def _outline(value):
    """`value` in built-in types, with (dtype, shape, CRC-32) for each tensor."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), zlib.crc32(data.numpy())
    if isinstance(value, Mapping):
        return [(key, _outline(item)) for key, item in value.items()]
    return [type(value).__name__, *map(_outline, value)] if isinstance(value, (list, tuple)) else value
