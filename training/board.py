"""TensorBoard's files, without which a training can go on."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import WriteError


class Board:
    """torch's SummaryWriter for a folder. When its file cannot be written, it says so once, and writes no more.

    purge_step   TensorBoard hides what earlier files of the folder have from this step on
    print        gets that line
    """

    def __init__(self, folder: Path, purge_step: int, print: Callable[[str], object]):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and workers never need it

        self._files, self._print, self._writer = folder / "events.out.tfevents.*", print, None
        self._excepthook, threading.excepthook = threading.excepthook, self._print_trace
        try:
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)
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
