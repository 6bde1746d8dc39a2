"""The five training scripts as the tests run them: on synthetic data, small enough for seconds."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import synthetic
from training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
COMMON = "--workers 0 --device cpu --precision fp32 --log-level warning"
FLAGS = {
    "backbone": "--resolution 32 --batch-size 4 --lr 0.01 --mixup 0.2 --cutmix 1 --erase 0.5 --label-smoothing 0.1",
    "retinanet": "--depth 18 --weights none --backbone-weights none --min-side 64 48 --max-side 96 --batch-size 4",
    "ssd": "--dataset voc --weights none --resolution 96 --batch-size 4 --lr 0.001",
    "centerfusion": "--version v1.0-mini --train_split mini_train --val_split mini_val --arch resnet18 "
    "--input-size 64 128 --batch-size 2 --pointcloud --velocity --nuscenes_att",
    "maskrcnn": "--arch maskrcnn_resnet18 --weights none --min-side 64 --max-side 96 --proposals 30",
}
DRAW = {
    "backbone": (synthetic.draw_imagefolder, 30),
    "retinanet": (synthetic.draw_coco, 24),
    "ssd": (synthetic.draw_voc, 24),
    "centerfusion": (synthetic.draw_nuscenes, 24),
    "maskrcnn": (synthetic.draw_pennfudan, 14),
}


class Script:
    """train_NAME.py with the flags of a small run.

    module   the script
    data     its synthetic data set
    """

    def __init__(self, name, data):
        self.name, self.data, self.file = name, data, f"train_{name}.py"
        self.module = importlib.import_module(f"train_{name}")

    def words(self, out, *more, data=None):
        words = [*FLAGS[self.name].split(), *COMMON.split(), "--data", data or self.data, "--model-dir", out, *more]
        return [str(word) for word in words]

    def main(self, out, *more, data=None):
        """Run the script in this process with more flags; returns its metrics."""
        return self.module.main(self.words(out, *more, data=data))

    def launch(self, out, *more, data=None, processes=0):
        """The same in a process of its own, or in several under torchrun."""
        return launch(self.file, *self.words(out, *more, data=data), processes=processes)


def launch(script, *words, processes=0):
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*start, script, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(path, process):
    """Return when the file at `path` exists and is not empty; AssertionError if the process ends before, or hangs."""
    deadline = time.monotonic() + 120
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def finish(process):
    """Wait for the end of a process; AssertionError with its messages if it failed."""
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


def last(folder):
    """The checkpoint last.pt of a run folder."""
    return checkpoint.read(Path(folder) / "last.pt")


def fingerprint(folder):
    return checkpoint.fingerprint(last(folder))


def log_lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def copy_writable(source, target):
    """Copy a data set so that a test may change it."""
    return Path(shutil.copytree(source, target))
