"""One run a folder: a lock that ends with the process that has it, however that ends.

It is a POSIX lock of RUN/run.lock, which NFS passes on to other machines. The file says who has the lock; after a kill
it stays and is taken over.
"""

import contextlib
import errno
import json
import os
import socket
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from utils import files
from utils.errors import UsageError, WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FILE = "run.lock"
WAIT_SECONDS = 3  # for a killed process to end
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # a file system without them


class RunLock:
    """The lock of a run folder, from the start until `release()`, the end of the process, or of this object.

    folder    created if there is none
    seconds   to wait for another process to end
    print     gets a line where the file system has no locks and the owner in the file is of another machine

    UsageError if another process has the lock, WriteError if the folder cannot be written. Windows has no such locks:
    nothing is checked there.
    """

    def __init__(self, folder: Path, seconds: float = WAIT_SECONDS, print: Callable[[str], object] = print):
        self.folder, self.release = folder, lambda: None
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._folder_stat = os.stat(folder)
        if not fcntl:
            return
        path, deadline = folder / FILE, time.monotonic() + seconds
        with files.writing(path):
            while (file := _open_locked(path, print)) is None:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"{folder}: {_described(_owner(path))} trains there; wait for its end or stop it, or give "
                        "another --model-dir"
                    )
                time.sleep(0.1)
            self.release = weakref.finalize(self, _release, file, path, os.getpid())
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            file.truncate(0)
            file.write(json.dumps(owner).encode())

    def check(self) -> None:
        """WriteError if the folder is not the one that was locked: files would go into another one of its name."""
        try:
            if os.path.samestat(os.stat(self.folder), self._folder_stat):
                return
        except OSError:
            pass  # there is none
        gone = OSError(errno.ENOENT, "the folder was removed or its disk unmounted during the run")
        raise WriteError(self.folder, gone, "continue with --resume auto")


def _open_locked(path, print):
    """The file, locked by this process; None if another one has the lock, or has removed the file meanwhile."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115, see _release
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, PermissionError, FileNotFoundError):  # which of the first two depends on the system
        locked = False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            raise
        locked = not _runs(_owner(path), print)
    if locked:
        return file
    file.close()
    return None


def _owner(path):
    """What the lock file says, None where it says nothing."""
    try:
        owner = json.loads(path.read_bytes())
        return {"host": str(owner["host"]), "pid": int(owner["pid"]), "since": str(owner["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _described(owner):
    return f"process {owner['pid']} on {owner['host']}, since {owner['since']}," if owner else "another process"


def _runs(owner, print):
    """Whether the owner is a process of this machine that still runs; of another machine that is not known."""
    if owner is None or owner["pid"] == os.getpid():
        return False
    if owner["host"] != socket.gethostname():
        print(f"no locks on this file system; make sure that {_described(owner)} no longer trains there")
        return False
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # a process of another user
    return True


def _release(file, path, process):
    """Remove the file while it is locked, so that no other process has it open and believes it to be the lock."""
    if os.getpid() != process:
        return  # a forked worker
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            path.unlink()
    file.close()
