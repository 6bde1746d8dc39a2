import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training import small_run
from training import distributed, run_lock
from training.run_folder import RunFolder
from training.run_lock import RunLock
from utils.errors import UsageError, WriteError

HOLDER = """
import sys, time
from pathlib import Path
from training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A folder, and the process that has its lock."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield tmp_path, process
        process.kill()


def test_a_second_run_is_refused_before_it_writes_and_takes_over_after_a_kill(held):
    folder, process = held
    (folder / "last.pt").touch()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run, args = distributed.init_device("cpu"), small_run.flags(f"--model-dir {folder} --overwrite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.run_folder.WAIT_SECONDS", 0.2)
        line = rf"{folder}: process {process.pid} on {socket.gethostname()}, since 20.*, trains there; wait for its end"
        with pytest.raises(UsageError, match=line):
            RunFolder(args, run)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for words in ("--eval-only --weights x.pt", "--check-data", "--preflight"):
        assert RunFolder(small_run.flags(f"--model-dir {folder} {words}"), run).lock is None, "writes no checkpoint"

    process.send_signal(signal.SIGKILL)
    lock = RunLock(folder)  # without waiting for the process
    assert json.loads((folder / run_lock.FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert not (folder / run_lock.FILE).exists()


def test_a_lock_ends_with_the_process_and_then_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", HOLDER.replace("time.sleep(60)", "raise KeyError"), str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_its_owner_removes_meanwhile_is_not_the_lock(tmp_path, monkeypatch):
    """Locked a moment after it was removed: another process would lock a new file of the name."""
    real, calls = fcntl.lockf, []

    def lockf(file, operation):
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / run_lock.FILE).unlink()
        return real(file, operation)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock = RunLock(tmp_path)
    assert len(calls) == 2
    assert json.loads((tmp_path / run_lock.FILE).read_text())["host"] == socket.gethostname()
    lock.release()


def test_a_folder_that_was_removed_or_replaced(tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.check()
    (tmp_path / "run").rename(tmp_path / "moved")
    for _ in range(2):
        with pytest.raises(WriteError, match=r"run: not written: the folder was removed .*; mount the disk or restore"):
            lock.check()
        (tmp_path / "run").mkdir(exist_ok=True)
    other = tmp_path / "run" / run_lock.FILE
    other.touch()
    lock.release()
    assert other.exists(), "another run's"


@pytest.mark.parametrize(
    ("owner", "refused", "printed"),
    [
        ({"host": socket.gethostname(), "pid": os.getppid(), "since": "noon"}, True, False),
        ({"host": socket.gethostname(), "pid": 2**22 + 1, "since": "noon"}, False, False),  # above the largest of Linux
        ({"host": "elsewhere", "pid": 7, "since": "noon"}, False, True),
        ([], False, False),
    ],
)
def test_a_file_system_without_locks(tmp_path, monkeypatch, owner, refused, printed):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    (tmp_path / run_lock.FILE).write_text(json.dumps(owner))
    lines = []
    if refused:
        with pytest.raises(UsageError, match=rf"process {os.getppid()} on .*, since noon, trains there"):
            RunLock(tmp_path, 0, lines.append)
    else:
        RunLock(tmp_path, 0, lines.append).release()
    expected = [
        "no locks on this file system; make sure that process 7 on elsewhere, since noon, no longer trains there"
    ]
    assert lines == expected * printed


def test_without_posix_locks_nothing_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "fcntl", None)
    lock = RunLock(tmp_path)
    lock.check()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file.run: not written: Not a directory; .*, or choose another folder"):
        RunLock(tmp_path / "file" / "run")
    (tmp_path / "run" / run_lock.FILE).mkdir(parents=True)
    with pytest.raises(WriteError, match=r"run\.lock: not written: Is a directory"):
        RunLock(tmp_path / "run")


def test_waiting_for_a_process_that_ends(held):
    folder, process = held
    start = time.monotonic()
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"])
    RunLock(folder, seconds=20).release()
    assert time.monotonic() - start > 0.4
