"""Errors that a user can fix: each is one line that names the file or flag, the reason and the remedy.

The scripts print it as `error: ...` and exit with code 2. Any other exception is a bug and gets a traceback.
"""

from pathlib import Path


class UserError(Exception):
    """Base class of the errors below."""

    is_printed = True  # False where another process of the machine prints the same error


class UsageError(UserError):
    """A flag that does not fit the other flags, the folder or the machine."""


class WeightsError(UserError):
    """A weights file, or an argument of a network, that does not fit."""


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
