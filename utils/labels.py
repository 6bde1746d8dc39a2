"""Class names: from a text file, and in messages."""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from utils.errors import UNPRINTABLE, DataError
from utils.files import read_lines

MAX_CLASSES = 100_000
MAX_BYTES = 200  # of a name in UTF-8: it becomes a part of the names of files, which have 255


def read_labels(path: str | Path) -> list[str]:
    """The class names in a labels.txt, one per line, without blank lines and BACKGROUND. Raises DataError, also for a
    repeated name."""
    names = [line.strip() for line in read_lines(path)]
    names = [name for name in names if name and name.upper() != "BACKGROUND"]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise DataError(path, "", f"repeated: {first_names(repeated)}; keep one line per class")
    if not names:
        raise DataError(path, "", "contains no class name; write one name per line")
    check_names(names, path)
    return names


def check_names(names: Collection[str], source: str | Path) -> None:
    """Raises DataError for class names that are not fit for terminals and files; `source` is the file or folder that
    has them."""
    if len(names) > MAX_CLASSES:
        raise DataError(source, "", f"has {len(names)} class names, more than {MAX_CLASSES}; give a list of classes")
    for name in names:
        if UNPRINTABLE.search(name):
            raise DataError(source, "", f"class name {name!r} has a control character; rename the class")
        if len(name.encode()) > MAX_BYTES:
            raise DataError(source, "", f"class name {name[:20]!r}... is longer than {MAX_BYTES} bytes; shorten it")


def first_names(names: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names, for a message."""
    return ", ".join(names[:limit]) + ", ..." * (len(names) > limit)
