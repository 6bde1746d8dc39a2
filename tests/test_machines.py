"""Several processes: a resume of two is exact; two machines, two torchrun agents with working directories of their own,
meet on one port."""

import os
import re
import socket
import subprocess
import sys

import pytest
import torch

from tests import two_processes
from tests.script_helpers import ROOT, Script, fingerprint, last, log_lines

# The script, whose process 1 is killed in step 3 of the first start.
KILLED_ONCE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train_backbone
from training import cli
step, steps = train_backbone.optim.step, []
def killed_in_third_step(*args):
    steps.append(step(*args))
    if len(steps) == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
train_backbone.optim.step = killed_in_third_step
cli.run(train_backbone.main)
"""


def launch_on_two_machines(folders, file, *words, restarts=0):
    """Start a script in each of two folders, one process each; returns [(exit code, output and messages)]."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test", f"--max-restarts={restarts}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [subprocess.Popen([*start, file, *words], cwd=folder, env=environment, **streams) for folder in folders]
    try:
        outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [(agent.returncode, output) for agent, output in zip(agents, outputs)]


@pytest.fixture
def working_directories(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.fixture
def script(drawn):
    return Script("backbone", drawn("backbone"))


@pytest.mark.slow
def test_two_processes_resume_exactly(script, tmp_path):
    """A signal to process 1 stops both after the same step."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = ["--max-steps", 14, "--ema", 0.9, "--scheduler", "plateau", "--resume", "auto"]
    job = {"name": script.name, "out": tmp_path, "differ": False}
    jobs = [{**job, "words": script.words(whole, *more)}]
    jobs += [{**job, "words": script.words(stopped, *more), "stop": stop} for stop in (9, 0)]
    two_processes.run(jobs)
    assert last(stopped)["step"] == last(whole)["step"] == 14
    assert [line["step"] for line in log_lines(stopped) if "val/loss" in line] == [7, 13, 14]
    assert fingerprint(stopped) == fingerprint(whole)
    for part in ("ema", "plateau"):
        torch.testing.assert_close(last(stopped)[part], last(whole)[part], rtol=0, atol=0)


@pytest.mark.slow
def test_two_machines_share_a_run_and_continue_it_after_a_crash(script, working_directories, tmp_path):
    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    words = script.words(tmp_path / "run", "--max-steps", 4, "--save-every-steps", 1, "--resume", "auto")
    first, second = launch_on_two_machines(working_directories, tmp_path / "killed_once.py", *words, restarts=1)
    for code, output in (first, second):
        assert code == 0, output
    assert len(re.findall(r"resumed epoch 0 step 2 ", first[1] + second[1])) == 1
    assert last(tmp_path / "run")["step"] == 4
    assert [line["step"] for line in log_lines(tmp_path / "run") if "val/loss" in line] == [4]
    assert [list(folder.iterdir()) for folder in working_directories] == [[], []]


@pytest.mark.slow
def test_a_run_folder_that_machines_do_not_share_is_refused_at_the_first_start(script, working_directories):
    words = script.words("runs/x", "--max-steps", 2)
    first, second = launch_on_two_machines(working_directories, ROOT / script.file, *words)
    for code, output in (first, second):
        (error,) = re.findall(r"^error: .*", output, re.MULTILINE)
        assert "runs/x is not the folder of process 0, " in error
        assert error.endswith("give a --model-dir on a disk that all machines share")
        assert "run_folder.py" not in output, "a traceback of the script"
        # the other machine's torchrun may have stopped it first, by SIGTERM
        assert re.findall(r"^ *exitcode +: (-?\d+)", output, re.MULTILINE) in (["2"], ["-15"])
        assert code == 1  # of torchrun
    files = [path for folder in working_directories for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} <= {"run.lock"}, "a process that is ended leaves its lock file"
