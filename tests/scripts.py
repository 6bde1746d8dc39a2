"""How tests run a script in processes of its own, and what they read from its run folder."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from training import checkpoints

ROOT = Path(__file__).resolve().parents[1]


def launch(script, *words, processes=0):
    """`script` in a process of its own, or in several under torchrun."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*start, script, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(path, process):
    """Return when there is a file at `path` that is not empty; AssertionError where the process ends before."""
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def tensors(folder):
    return checkpoints.read(Path(folder) / "last.pt")["model"]


def fingerprint(folder):
    return checkpoints.fingerprint(checkpoints.read(Path(folder) / "last.pt"))


def last_line(folder):
    return json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])
