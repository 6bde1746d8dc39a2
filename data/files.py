"""Reading text files, and keeping arrays."""

import os
import tempfile
from pathlib import Path

import numpy as np

from data.errors import DataError

NAMED = 3  # missing pictures named in a message


def lines_of(path):
    """The lines of a UTF-8 text file, one after the other; a byte order mark is skipped. Raises DataError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError:
        raise DataError(path, "", "not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise DataError(path, "", f"cannot be read: {error.strerror}") from None


def missing_pictures(file, place, folder, names):
    """One fault for all pictures that `file` names and `folder` lacks: annotations of a whole set beside some of its
    pictures are usual, and a line for each would bury everything else."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return DataError(file, place, f"no picture in {folder} for {', '.join(names[:NAMED])}{more}", kind="image")


def is_true(text):
    """Does a mark in an annotation, such as VOC's `difficult`, say yes? Missing or empty says no."""
    return (text or "").strip().lower() in ("1", "1.0", "true")


def keep_arrays(file, arrays):
    """Write a dict of arrays to the .npz `file` in one step; False where its folder cannot be written."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name, suffix=".tmp", delete=False) as temporary:
            np.savez(temporary, **arrays)
        os.replace(temporary.name, file)
    except OSError:
        if temporary is not None:
            Path(temporary.name).unlink(missing_ok=True)
        return False
    return True
