"""Reading text, and atomic file writing: under a temporary name, flushed to disk, then renamed."""

import contextlib
import csv
import errno
import io
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from utils.errors import DataError, WriteError


def open_regular(path: str | Path, mode: str = "rb", **options: Any) -> IO:
    """`open` of a file that exists and has an end. OSError for a pipe or a device, which may have none, and for a path
    that no file can have."""
    try:
        kind = os.stat(path).st_mode
    except ValueError as error:  # a null byte, or half of a surrogate pair
        raise OSError(errno.EINVAL, f"not the name of a file: {error}") from None
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # open() refuses a folder
        raise OSError(errno.EINVAL, "not a regular file but a pipe or a device; copy its contents into a file")
    return open(path, mode, **options)


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, without its byte order mark. Raises DataError."""
    try:
        with open_regular(path, "r", encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError:
        raise DataError(path, "", "not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise DataError(path, "", f"cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def writing(path: str | Path, then: str = "") -> Iterator[None]:
    """`with files.writing(path):` around what writes a file or folder: an OSError becomes a WriteError, see there."""
    try:
        yield
    except WriteError:
        raise  # it names the file within the folder `path`
    except OSError as error:
        raise WriteError(path, error, then) from error


def write(path: Path, write_to: Callable[[BinaryIO], object]) -> None:
    """Write `path` by calling `write_to(file)`: at any moment it has either its old or its new contents.

    Its folder is created if there is none. WriteError if it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write_to(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise


def remove(path: Path) -> None:
    """Remove what is left of a file that could not be written; nothing happens where that fails too."""
    with contextlib.suppress(OSError):
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8."""
    write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write plain values as JSON."""
    write_text(path, json.dumps(value, indent=indent))


def write_csv(path: Path, rows: Iterable[Iterable]) -> None:
    """Write rows of values as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def link_or_copy(source: Path, target: Path) -> None:
    """Give the contents of `source` a second name; a copy where the file system has no hard links."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as original:
            write(target, lambda file: shutil.copyfileobj(original, file))
        return
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # renaming one of two names of the same file onto the other leaves both


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk, as fsync does for the contents of a file."""
    if os.name == "posix":  # elsewhere a folder cannot be opened, and need not be
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
