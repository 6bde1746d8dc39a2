"""Ctrl-C and SIGTERM: the end of a program and of its child processes, at once and without a traceback.

Imports nothing slow: the programs call `install` before they import torch, which takes seconds.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator

STOP = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>


def install() -> None:
    """From now on SIGINT and SIGTERM end this process by `quit`. Within a StopSignals they finish a step first."""
    process = os.getpid()

    def handle(number, frame):
        if os.getpid() == process:  # not in a child that has just been forked
            quit(number)

    sys.stdout.reconfigure(line_buffering=True)  # os._exit loses what is buffered
    for number in STOP:
        signal.signal(number, handle)


def quit(number: int) -> None:
    """End this process and its data loading workers now, with exit code 128 + `number`, that of the signal.

    It raises nothing: an exception in a destructor, a callback or another thread would be printed there and be lost.
    What was being written is under a temporary name, see utils/files.py.
    """
    for stop in STOP:
        signal.signal(stop, signal.SIG_IGN)
    end_children()
    with contextlib.suppress(OSError):  # the terminal may be closed
        os.write(2, f"\ninterrupted by {signal.Signals(number).name}\n".encode())  # print is not safe in a handler
    os._exit(128 + number)


def end_children() -> None:
    """Kill the daemonic child processes. multiprocessing would send them SIGTERM, which `follow_parent` ignores, and
    wait for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for each killed worker
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread. Processes that are started in the block inherit that and never get them,
    not even before `follow_parent`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
    """In a child process: ignore SIGINT and SIGTERM, and end with the parent, however that ends.

    A terminal's Ctrl-C, `timeout`, Slurm and systemd send them to all processes, and the parent still needs the child
    to finish its step.
    """
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere torch's workers look for their parent every 5 s
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)
