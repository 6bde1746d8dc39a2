"""Arrays cached between runs: a folder of .npy files that appears in one step, and is memory-mapped when read."""

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np

MIN_MAPPED = 1 << 16  # bytes; smaller files are read at once


def save_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> bool:
    """Write a dict of arrays as the folder `folder`, replacing an older one; False if that cannot be written."""
    temporary, old = (folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp") for _ in range(2))
    try:
        temporary.mkdir(parents=True)
        for name, values in arrays.items():
            np.save(temporary / f"{name}.npy", values)
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
    used, and shared by all processes of a machine. Raises OSError, ValueError or EOFError if a file is damaged."""
    arrays = {}
    for path in folder.glob("*.npy"):
        mapped = path.stat().st_size >= MIN_MAPPED
        arrays[path.stem] = np.load(path, mmap_mode="r" if mapped else None).view(np.ndarray)
    return arrays
