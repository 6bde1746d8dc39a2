"""Errors that a user can fix: each is one line that names the file or flag, the reason and the remedy.

The scripts print it as `error: ...` and exit with code 2. Any other exception is a bug and gets a traceback.
"""

import errno
import re
from pathlib import Path

FOLDER = "choose another folder"
ROOM = "free some disk space"
IN_THE_WAY = f"move away the file or folder that is in the way, or {FOLDER}"
REMEDIES = {  # of an OSError while writing
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: f"raise the limit of the size of files (ulimit -f), or {FOLDER}",
    errno.EROFS: f"mount the disk for writing, or {FOLDER}",
    errno.EACCES: f"change the permissions, or {FOLDER}",
    errno.EPERM: f"change the permissions, or {FOLDER}",
    errno.ENOENT: f"mount the disk or restore the folder, or {FOLDER}",
    errno.ENOTDIR: IN_THE_WAY,
    errno.EEXIST: IN_THE_WAY,
    errno.EISDIR: IN_THE_WAY,
    errno.ENAMETOOLONG: "choose a shorter name",
}
# control characters, marks that reverse the direction of text, and halves of surrogate pairs, which cannot be encoded
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_LENGTH = 4000  # characters of a message


def printable(text: str) -> str:
    """`text` as one line that any terminal shows as it is: what a file contains may stand in a message."""
    if len(text) > MAX_LENGTH:
        text = f"{text[: MAX_LENGTH // 2]} ... {text[-MAX_LENGTH // 2 :]}"
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class UserError(Exception):
    """Base class of the errors below."""

    is_printed = True  # False where another process of the machine prints the same error

    def __str__(self):
        return printable(super().__str__())


class UsageError(UserError):
    """A flag that does not fit the other flags, the folder or the machine."""


class WeightsError(UserError):
    """A weights file, or an argument of a network, that does not fit."""


class WriteError(UserError, OSError):
    """`path: not written: reason; remedy`, from the OSError `error`. then: what to do after the remedy."""

    def __init__(self, path: str | Path, error: OSError, then: str = ""):
        super().__init__(error.errno, error.strerror or str(error))
        remedy = REMEDIES.get(error.errno, f"check the disk, or {FOLDER}")
        self.line = f"{path}: not written: {self.strerror}; {remedy}" + (f", then {then}" if then else "")

    def __str__(self):
        return printable(self.line)


class DataError(UserError):
    """`path: place: reason`, for example `image_7.xml: object 3: xmax 12 < xmin 40`.

    kind: "box" errors affect one object and are subject to --bad-boxes, "image" errors affect one image and are subject
    to --bad-images, "file" errors stop the run

    torch raises an error of a DataLoader worker again as DataError(text), with the worker's traceback in front of the
    message. Only the message is used.
    """

    def __init__(self, path: str | Path, place: str = "", reason: str = "", kind: str = "file"):
        path = str(path).rsplit("DataError: ", 1)[-1].strip()
        reason = " ".join(str(reason).split())  # one line, even if it quotes several lines of a file
        self.path, self.place, self.reason, self.kind = path, str(place), reason, kind
        super().__init__(": ".join(part for part in (self.path, self.place, self.reason) if part))
