"""Class names: from a text file, and in messages."""

from collections.abc import Sequence
from pathlib import Path

from utils.errors import DataError
from utils.files import read_lines


def read_labels(path: str | Path) -> list[str]:
    """The class names in a labels.txt, one per line, without blank lines and BACKGROUND. Raises DataError, also for a
    repeated name."""
    names = [line.strip() for line in read_lines(path)]
    names = [name for name in names if name and name.upper() != "BACKGROUND"]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(path, "", f"repeated: {', '.join(repeated)}; keep one line per class")
    if not names:
        raise DataError(path, "", "contains no class name; write one name per line")
    return names


def first_names(names: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names, for a message."""
    return ", ".join(names[:limit]) + ", ..." * (len(names) > limit)
