"""Arrays cached between runs: a folder of .npy files that appears in one step, and is memory-mapped when read."""

import os
import shutil
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

CHECKSUMS = "checksums.txt"
MIN_MAPPED = 1 << 16  # bytes; smaller files are read at once


def save_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> bool:
    """Write a dict of arrays as the folder `folder`, replacing an older one; False if that cannot be written."""
    temporary, old = (folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp") for _ in range(2))
    try:
        temporary.mkdir(parents=True)
        for name, values in arrays.items():
            np.save(temporary / f"{name}.npy", values)
        (temporary / CHECKSUMS).write_bytes(_checksums(temporary))
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except OSError:
        return False
    finally:
        for path in (temporary, old):
            shutil.rmtree(path, ignore_errors=True)
    return True


def load_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays that `save_arrays` wrote. Large ones are read-only memory maps: their pages are loaded when they are
    used, and shared by all processes of a machine. Raises OSError or ValueError if a file is damaged or missing."""
    arrays = {}
    if (folder / CHECKSUMS).read_bytes() != _checksums(folder):
        raise ValueError("a file does not match its checksum")
    for path in folder.glob("*.npy"):
        mapped = path.stat().st_size >= MIN_MAPPED
        arrays[path.stem] = np.load(path, mmap_mode="r" if mapped else None).view(np.ndarray)
    return arrays


def _checksums(folder):
    """A line for each array in `folder`: the name of its file, and its checksum (CRC-32)."""
    lines = []
    for path in sorted(folder.glob("*.npy")):
        checksum = 0
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                checksum = zlib.crc32(chunk, checksum)
        lines.append(f"{path.name} {checksum:08x}\n")
    return "".join(lines).encode()
