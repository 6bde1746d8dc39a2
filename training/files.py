"""Files that are whole at every moment: written beside their name, flushed to the disk, then renamed."""

import os
import shutil
import zipfile


def write(path, put):
    """Write `path` by `put(file)`, a binary file: at any moment it has its old contents or the new. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    write(path, lambda file: file.write(text.encode()))


def duplicate(source, target):
    """Give the contents of `source` a second name; by a second copy where the file system has no hard links."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as original:
            write(target, lambda file: shutil.copyfileobj(original, file))
        return
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # a rename between two names of one file leaves both


def zip_fault(path):
    """Where the zip file at `path` ends early or fails a checksum, in words; "" if it is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() or ""
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError):
        return "the end of the file"


def sync_folder(folder):
    """Put the names in `folder` on the disk, as fsync did for the contents."""
    if os.name == "posix":  # elsewhere a folder cannot be opened, and need not be
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
