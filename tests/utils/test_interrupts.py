"""The end of a program by SIGINT and SIGTERM, in programs that import nothing slow."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.script_helpers import ROOT
from utils import interrupts

PROGRAM = """
import multiprocessing, signal, time
from utils import interrupts

def work():
    interrupts.follow_parent()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(60)

if __name__ == "__main__":
    interrupts.install()
    print("a line")
    with interrupts.blocked():
        multiprocessing.get_context("fork").Process(target=work, daemon=True).start()
    {end}
"""


def start(end="time.sleep(60)"):
    """(process, process id of its child)"""
    words = [sys.executable, "-c", PROGRAM.format(end=end)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, **pipes, start_new_session=True)
    assert process.stdout.readline() == "a line\n"  # though stdout is no terminal
    return process, int(process.stdout.readline())


def wait_for_end_of(child):
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "\nState:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, "the child is alive"
        time.sleep(0.01)


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


@linux
@pytest.mark.parametrize("number", interrupts.STOP)
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_ends_the_program_and_its_children_without_a_traceback(number, group):
    process, child = start()
    (os.killpg if group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert errors == f"\ninterrupted by {number.name}\n"
    wait_for_end_of(child)


@linux
def test_children_end_with_a_killed_parent():
    process, child = start()
    process.kill()
    process.communicate(timeout=10)
    wait_for_end_of(child)


@linux
def test_a_child_survives_signals_to_the_whole_group():
    process, child = start("[signal.signal(number, signal.SIG_IGN) for number in interrupts.STOP]; time.sleep(60)")
    time.sleep(0.2)
    for number in interrupts.STOP:
        os.killpg(process.pid, number)
    time.sleep(0.1)
    assert process.poll() is None and "\nState:\tZ" not in Path(f"/proc/{child}/status").read_text()
    process.kill()
    process.communicate(timeout=10)


@linux
def test_end_children_ends_children_that_ignore_sigterm():
    process, child = start("input(); interrupts.end_children()")  # else multiprocessing would wait at the exit
    _, errors = process.communicate("\n", timeout=10)
    assert (process.returncode, errors) == (0, "")
    wait_for_end_of(child)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows")
def test_processes_started_in_a_block_never_get_signals():
    command = ["sh", "-c", "kill -TERM $$; kill -INT $$; echo alive"]
    with interrupts.blocked():
        assert subprocess.run(command, capture_output=True).stdout == b"alive\n"
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGTERM


@pytest.mark.parametrize("program", [path.name for path in ROOT.glob("*.py")])
def test_programs_handle_signals_before_they_import_torch(program):
    _docstring, first, *_ = ast.parse((ROOT / program).read_text()).body
    assert "interrupts.install()" in ast.unparse(first)


@linux
def test_ctrl_c_during_the_imports_of_a_program():
    process = subprocess.Popen([sys.executable, "train_ssd.py"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    handled = 0
    while not handled >> (signal.SIGTERM - 1) & 1:
        assert process.poll() is None
        handled = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "\ninterrupted by SIGINT\n")
