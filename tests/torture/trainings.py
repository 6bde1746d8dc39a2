"""Small trainings for the parts that start whole programs: how to start one, stop it at a moment, and compare it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import synthetic
from training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS = 48
FLAGS = "--arch squeezenet1_1 --resolution 32 --batch-size 4 --lr 0.01 --workers 0 --device cpu --precision fp32 "
FLAGS += f"--max-steps {STEPS} --log-every 1 --save-every-steps 5 --keep 1"
SECONDS = 240  # for any of these programs; longer is a hang


class Program:
    """A program of ours; its output goes to the file `log`.

    words       script and flags
    processes   under torchrun; 0: without
    """

    def __init__(self, log, *words, processes=0, **environment):
        command = [sys.executable]
        if processes:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        self.log, self.words = log, [str(word) for word in words]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [*command, *self.words],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self):
        return self.log.read_text(errors="replace")

    def send(self, number):
        """A signal to it and all of its descendants: torchrun gives each worker a session of its own."""
        for process in [self.process.pid, *descendants(self.process.pid)]:
            os.kill(process, number)

    def wait(self):
        """Its exit code; AssertionError, and all of its processes killed, if it hangs."""
        try:
            return self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            raise AssertionError(f"hangs: {' '.join(self.words)}\n{self.text[-2000:]}") from None

    def succeeds(self):
        code = self.wait()
        assert code == 0, f"exit {code}: {' '.join(self.words)}\n{self.text[-3000:]}"

    def fails_with(self, *parts, code=2):
        """It ends with this code and one line `error: ...` that contains `parts`; returns that line."""
        ended = self.wait()
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        message = f"exit {ended}: {' '.join(self.words)}\n{self.text[-3000:]}"
        assert ended == code and len(lines) == 1 and "Traceback" not in self.text, message
        assert all(part in lines[0] for part in parts), f"{parts} expected\n{message}"
        return lines[0]


def descendants(process):
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def prepare(folder):
    """The data, and the uninterrupted run."""
    synthetic.draw_imagefolder(folder / "data", 30)
    train(folder, folder / "reference", folder / "reference.log").succeeds()


def train(shared, out, log, *more, **options):
    words = ["train_backbone.py", *FLAGS.split(), "--data", shared / "data", "--model-dir", out, *more]
    return Program(log, *words, **options)


def stop_after(program, out, lines):
    """Stop the program by SIGSTOP when metrics.jsonl in `out` has this many lines."""
    deadline = time.monotonic() + SECONDS
    while not (out / "metrics.jsonl").is_file() or (out / "metrics.jsonl").read_bytes().count(b"\n") < lines:
        assert program.process.poll() is None and time.monotonic() < deadline, program.text[-3000:]
        time.sleep(0.01)
    program.send(signal.SIGSTOP)


def check_equal(out, reference):
    """The same weights, optimizer and training losses."""
    assert fingerprint(out) == fingerprint(reference), "other weights"
    assert losses(out) == losses(reference), "other losses in metrics.jsonl"


def fingerprint(out):
    return checkpoint.fingerprint(checkpoint.read(out / "last.pt"))


def losses(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def files(out):
    """What would show that anything in a folder was written: size, time and inode of every file."""
    stats = {path.relative_to(out): path.stat() for path in out.rglob("*")}
    return {str(path): (stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats.items()}
