"""Two GPUs compute what one does, and a run survives the death of one of its processes."""

import os
import subprocess
import sys

import pytest
import torch

from tests.gpu.conftest import DEVICE
from tests.script_helpers import FLAGS, ROOT, Script, finish, last, log_lines
from tests.test_machines import KILLED_ONCE

pytestmark = pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="fewer than two GPUs")


def assert_same_run(out, expected):
    """Weights and logged losses are the same but for rounding."""
    torch.testing.assert_close(last(out)["model"], last(expected)["model"], rtol=1e-3, atol=1e-4)
    for line, expected_line in zip(log_lines(out), log_lines(expected), strict=True):
        losses = {tag: value for tag, value in expected_line.items() if "loss" in tag}
        assert {tag: line[tag] for tag in losses} == pytest.approx(losses, rel=1e-2, abs=1e-3)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", [name for name in FLAGS if name != "maskrcnn"])  # one GPU per process
def test_data_parallel(name, drawn, comparable, tmp_path):
    one, words = comparable(name)
    Script(name, drawn(name)).main(tmp_path, *words, "--device", "auto", "--gpus", "0,1")
    assert_same_run(tmp_path, one.out)


@pytest.mark.parametrize("name", FLAGS)
def test_two_processes(name, drawn, comparable, tmp_path):
    one, words = comparable(name)
    finish(Script(name, drawn(name)).launch(tmp_path, *words, "--device", DEVICE, processes=2))
    assert_same_run(tmp_path, one.out)


def test_a_killed_process_comes_back(drawn, tmp_path):
    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    words = ["--max-steps", 4, "--save-every-steps", 1, "--resume", "auto", "--device", DEVICE]
    words = Script("backbone", drawn("backbone")).words(tmp_path / "run", *words)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [*start, tmp_path / "killed_once.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed epoch 0 step 2 ") == 1
    assert last(tmp_path / "run")["step"] == 4
