"""TensorBoard's files, without which a training can go on."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import WriteError


class Board:
    """torch's SummaryWriter for a folder. When its file cannot be written, it says so once, and writes no more.

    last_step   what earlier files of the folder have after this step is dropped; 0: all of it
    print       gets that line
    """

    def __init__(self, folder: Path, last_step: int, print: Callable[[str], object]):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and workers never need it

        self._files, self._print, self._writer = folder / "events.out.tfevents.*", print, None
        self._excepthook, threading.excepthook = threading.excepthook, self._print_trace
        try:
            for path in folder.glob(self._files.name):
                drop_later(path, last_step)
            self._writer = SummaryWriter(str(folder), purge_step=last_step + 1 if last_step else 0)
        except OSError as error:
            self._fail(error)

    def add_scalar(self, *values: Any) -> None:
        self._call("add_scalar", values)

    def add_text(self, *values: Any) -> None:
        self._call("add_text", values)

    def add_image(self, *values: Any) -> None:
        self._call("add_image", values)

    def add_pr_curve_raw(self, *values: Any) -> None:
        self._call("add_pr_curve_raw", values)

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")
        threading.excepthook = self._excepthook

    def _call(self, method, values=()):
        if self._writer:
            try:
                getattr(self._writer, method)(*values)
            except OSError as error:
                self._fail(error)

    def _fail(self, error):
        self._writer = None
        self._print(f"{WriteError(self._files, error)}; until a resume TensorBoard shows no more of this run")

    def _print_trace(self, failed):
        """The writer has a thread, whose OSError the next call raises: it needs no traceback of its own."""
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__name__ == "_AsyncWriterThread"):
            self._excepthook(failed)


def drop_later(path: Path, step: int) -> None:
    """Cut a TensorBoard file before its first event after `step`, or one cut short by a kill or damaged.

    The purge_step of a SummaryWriter does the same for a TensorBoard that has read them, but not all readers heed it.
    """
    from google.protobuf.message import DecodeError  # slow to import
    from tensorboard.compat.proto.event_pb2 import Event

    size, end = path.stat().st_size, 0
    with open(path, "r+b") as file:
        while len(head := file.read(12)) == 12:  # a record: length, checksum, event, checksum
            length = int.from_bytes(head[:8], "little")
            if end + length + 16 > size:
                break
            try:
                if Event.FromString(file.read(length)).step > step:
                    break
            except DecodeError:  # damaged
                break
            end = file.seek(4, os.SEEK_CUR)
        file.truncate(end)
