"""Signals, killed workers and a small /dev/shm, in programs as users start them.

Whatever happens: the right exit code, one line instead of a traceback, no hang, no child process left, and a run folder
that --resume auto continues.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.script_helpers import COMMON, DRAW, FLAGS, ROOT, last
from training import checkpoint

CASES = 40
TERM, INT = signal.SIGTERM, signal.SIGINT
NAMES = tuple(DRAW)
MOMENTS = ("import", "check", "workers", "training", "logging", "writing", "validation", "end")
SENT = ((INT, INT), (TERM, TERM), (INT, TERM), (TERM, INT), (INT,), (TERM,))
STEPS = 6  # of a run that is to end
SECONDS = 90  # until something must have happened, on a busy machine
GONE_SECONDS = 8  # until the child processes are gone


def prepare(folder):
    """A data set for each script, and the checkpoints that predict.py and export.py read."""
    for name, (draw, count) in DRAW.items():
        draw(folder / name, 150 if name == "ssd" else count)
    enlarge(folder / "ssd", folder / "large")
    for name in ("ssd", "centerfusion"):
        Program(folder / f"{name}.log", *train(name, folder, folder / f"{name}_run", 0), "--max-steps", 1).must_end(0)


def enlarge(voc, target, times=40):
    """A copy of a VOC data set in which each image is there several times, so that a check takes a moment."""
    shutil.copytree(voc, target)
    for source in (*voc.glob("JPEGImages/*"), *voc.glob("Annotations/*")):
        for copy in range(1, times):
            shutil.copy(source, target / source.parent.name / f"{source.stem}_{copy}{source.suffix}")
    for file in target.glob("ImageSets/Main/*.txt"):
        names = file.read_text().split()
        file.write_text("\n".join(names + [f"{name}_{copy}" for copy in range(1, times) for name in names]))


def case(number, seed, folder):
    draw = random.Random(f"signals {seed} {number}")
    data = folder.parent / "shared"
    if number < 24:
        signals_in_training(
            NAMES[number % 5], MOMENTS[number % 8], SENT[(number + number // 8) % 6], draw, data, folder
        )
    elif number < 27:
        signals_in_check_data(SENT[draw.randrange(6)], draw, data, folder)
    elif number < 30:
        signals_in_prediction(("ssd", "ssd", "centerfusion")[number - 27], SENT[draw.randrange(6)], draw, data, folder)
    elif number < 32:
        signals_in_export(number == 30, SENT[draw.randrange(6)], draw, data, folder)
    elif number < 36:
        killed = (signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV, signal.SIGKILL)[number - 32]
        killed_worker(NAMES[draw.randrange(5)], killed, number == 35, draw, data, folder)
    elif number == 36:
        killed_parent(NAMES[draw.randrange(5)], draw, data, folder)
    elif number < 39:
        small_shm(number == 38, draw, data, folder)
    else:
        two_processes(NAMES[draw.randrange(5)], draw, data, folder)


def train(name, data, out, workers):
    """The command of a small run on the folder of its name in `data`."""
    flags = [*FLAGS[name].split(), *COMMON.split(), "--data", data / name, "--model-dir", out, "--log-level", "info"]
    return [f"train_{name}.py", *flags, "--workers", workers, "--log-every", 1]


def has_sigterm(process, mask):
    """Whether SIGTERM is in a mask of a process: SigCgt, which it handles, or SigIgn, which it ignores."""
    try:
        found = re.search(rf"{mask}:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    except OSError:  # ended meanwhile
        return False
    return int(found[1], 16) >> (TERM - 1) & 1


class Program:
    """A program in a session of its own, whose output goes to the file `log`."""

    def __init__(self, log, *words, before=()):
        self.log = log
        command = [*before, sys.executable, *map(str, words)]
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self):
        return self.log.read_text(errors="replace")

    def has_ended(self):
        return self.process.poll() is not None

    def wait(self, reached, what):
        """Return when reached(), or at the end of the process."""
        deadline = time.monotonic() + SECONDS
        while not (reached() or self.has_ended()):
            self.check(time.monotonic() < deadline, f"{what} not reached")
            time.sleep(0.002)

    def wait_for_handlers(self):
        """Return when the program has begun: SIGTERM is among the signals that it handles."""

        self.wait(lambda: has_sigterm(self.process.pid, "SigCgt"), "its first line")

    def wait_for_output(self, pattern):
        self.wait(lambda: re.search(pattern, self.output()), pattern)

    def wait_for_workers(self):
        """Return when there is a worker, whose process id is then self.worker."""

        def started():
            children = [child for child, parent in self.session().items() if parent == self.process.pid]
            self.worker = next((child for child in children if has_sigterm(child, "SigIgn")), None)  # no other program
            return self.worker

        self.wait(started, "the start of a worker")

    def session(self):
        """{process id: its parent's} of the processes of this session that have not ended."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:  # ended meanwhile
                continue
            if int(session) == self.process.pid and state != "Z":
                parents[int(stat.parent.name)] = int(parent)
        return parents

    def send(self, number, group):
        if not self.has_ended():
            (os.killpg if group else os.kill)(self.process.pid, number)

    def check(self, truth, problem):
        """AssertionError with the output of the program, which is ended."""
        if not truth:
            for process in (self.process.pid, *self.session()):
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            raise AssertionError(f"{problem}\n{self.output()[-3000:]}")

    def must_end(self, *codes, seconds=SECONDS, traceback=False):
        """Wait for the end; the exit code, as a shell shows it, is among `codes`, and nothing is left behind."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.check(False, f"still running after {seconds} s")
        code = 128 - code if code < 0 else code  # a signal in the last moments of Python, without our handlers
        deadline = time.monotonic() + GONE_SECONDS
        while self.session() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.check(not self.session(), f"processes left after the end: {self.session()}")
        self.check(code in codes, f"exit code {code}, not {codes}")
        self.check(traceback or not re.search("Traceback|Exception ignored", self.output()), "a traceback")
        return code

    def must_end_by(self, sent, group, draw, also=()):
        """Send the signals, the second one up to 3 s after the first; the exit code is that of one of them."""
        for place, number in enumerate(sent):
            if place:
                time.sleep(draw.choice((0, 0.3, 0.6, 1, 3)))
            self.send(number, group)
        return self.must_end(*(128 + number for number in sent), *also)


def signals_in_training(name, moment, sent, draw, data, folder):
    run, workers, group = folder / "run", draw.choice((0, 2)), draw.random() < 0.5
    command = train(name, data, run, 2 if moment == "workers" else workers)
    more = ["--bad-images", "skip"] if moment == "check" else []
    if moment == "writing":
        more += ["--save-every-steps", 1]
    more += ["--max-steps", STEPS] if moment == "end" else ["--epochs", 1000]
    program = Program(folder / "log", *command, *more)
    program.wait_for_handlers()
    if moment == "check":
        program.wait_for_output("checking images|train: images")
    elif moment == "workers":
        program.wait_for_workers()
    elif moment in ("training", "logging"):
        program.wait_for_output("step 1/" if moment == "logging" else "step [23]/")
    elif moment == "writing":
        program.wait(lambda: any(run.glob("*.tmp")), "a file that is being written")
    elif moment == "validation":  # the checkpoint before it is written
        program.wait((run / "last.pt").exists, "the first validation")
    elif moment == "end":
        program.wait_for_output(f"step {STEPS}/")
    time.sleep(draw.uniform(0, {"import": 3, "writing": 0.02}.get(moment, 0.3)))
    code = program.must_end_by(sent, group, draw, also=(0,) if moment == "end" else ())
    if moment in ("training", "logging") and len(sent) == 1:
        program.check((run / "last.pt").exists(), "not saved")
    must_resume(program, command, run, folder, finished=code == 0)


def must_resume(program, command, run, folder, finished=False):
    """--resume auto continues: two steps more than were saved."""
    step = last(run)["step"] if (run / "last.pt").exists() else 0
    program.check(not finished or step == STEPS, f"ended without a signal at step {step}")
    Program(folder / "log2", *command, "--resume", "auto", "--max-steps", step + 2).must_end(0)
    assert last(run)["step"] == step + 2
    left = [path.name for path in run.glob("*.tmp")] + [path.name for path in run.glob("new.pt")]
    assert not left, f"left after the resume: {left}"


def check_data(data, folder, workers):
    return Program(
        folder / "log", *train("ssd", data, folder / "run", workers), "--data", data / "large", "--check-data"
    )


def signals_in_check_data(sent, draw, data, folder):
    program = check_data(data, folder, 2)
    if draw.random() < 0.5:
        program.wait_for_workers()
    else:
        program.wait_for_handlers()
    time.sleep(draw.uniform(0, 1))
    program.must_end_by(sent, draw.random() < 0.5, draw, also=(0,))
    report = folder / "run/data_errors.json"
    assert not report.exists() or json.loads(report.read_text())["errors"] == []


def signals_in_prediction(name, sent, draw, data, folder):
    inputs = data / "ssd/JPEGImages" if name == "ssd" else data / name
    more = ["--batch-size", 1] if name == "ssd" else ["--samples", 0, "--cache-dir", folder / "cache"]
    words = [data / f"{name}_run/last.pt", inputs, "--out", folder / "out", "--device", "cpu", *more]
    program = Program(folder / "log", "predict.py", *words)
    began = draw.random() < 0.7
    if began:
        program.wait(lambda: any((folder / "out").glob("*.jpg")), "the first prediction")
    else:
        program.wait_for_handlers()
    time.sleep(draw.uniform(0, 1))
    program.must_end_by(sent, draw.random() < 0.5, draw, also=(0,))
    names = ("detections.json", "images.json") if name == "ssd" else ("submission.json",)
    written = [json.loads((folder / "out" / file).read_text()) for file in names if (folder / "out" / file).exists()]
    program.check(len(sent) == 2 or not began or len(written) == len(names), "the predictions so far are not written")
    Program(folder / "log2", "predict.py", *words, "--overwrite", *["--samples", 1][: 2 * (name != "ssd")]).must_end(0)


def signals_in_export(to_onnx, sent, draw, data, folder):
    file = folder / ("net.onnx" if to_onnx else "net.pth")
    words = ["export.py", data / "ssd_run/last.pt", "--out" if to_onnx else "--state-dict", file]
    program = Program(folder / "log", *words)
    program.wait_for_handlers()
    time.sleep(draw.uniform(0, 12 if to_onnx else 4))
    program.must_end_by(sent, draw.random() < 0.5, draw, also=(0,))
    existed = file.exists()
    content = file.read_bytes() if existed else b""
    Program(folder / "log2", *words).must_end(0)
    assert file.read_bytes() == content or not existed or not to_onnx, "half a file"
    if not to_onnx:
        torch.load(file, weights_only=True)


def killed_worker(name, number, in_check, draw, data, folder):
    """By the system or by hand: one line with what to change, and exit code 2."""
    command = train(name, data, folder / "run", 2)
    if in_check:
        program = check_data(data, folder, 2)
    else:
        program = Program(folder / "log", *command, "--epochs", 1000)
        program.wait_for_output("step 1/")
        time.sleep(draw.uniform(0, 1))
    program.wait_for_workers()
    os.kill(program.worker, number)
    must_end_with_one_line(program, "worker")
    if not in_check:
        must_resume(program, command, folder / "run", folder)


def must_end_with_one_line(program, word):
    program.must_end(2)
    errors = re.findall(r"^\W*error: (.*)", program.output(), re.MULTILINE)  # torch's lines about signals end with \0
    program.check(len(errors) == 1 and word in errors[0] and "--workers" in errors[0], f"errors {errors}")


def killed_parent(name, draw, data, folder):
    """The workers of a process that was killed end too."""
    command = train(name, data, folder / "run", 2)
    program = Program(folder / "log", *command, "--epochs", 1000)
    program.wait_for_output("step 1/")
    time.sleep(draw.uniform(0, 1))
    program.send(signal.SIGKILL, False)
    program.must_end(128 + signal.SIGKILL)
    must_resume(program, command, folder / "run", folder)


def small_shm(later, draw, data, folder):
    """A /dev/shm that is too small, or that fills up in the middle of a run."""
    mount = f"mount -t tmpfs -o size={'64m' if later else draw.choice(('4k', '200k', '3m'))} tmpfs /dev/shm"
    before = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    command = train("ssd", data, folder / "run", 2)
    sizes = ["--resolution", 160 if later else 512, "--batch-size", 16 if later else 4]
    program = Program(folder / "log", *command, "--epochs", 1000, *sizes, before=before)
    if later:
        program.wait_for_output("step 1/")
        filler = Path("/proc", str(program.process.pid), "root", "dev/shm/filler")  # of the program's own mounts
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):  # full
            while True:
                file.write(bytes(4096))
    must_end_with_one_line(program, "/dev/shm")
    resumed = Program(folder / "log2", *command, *sizes, "--workers", 0, "--resume", "auto", "--max-steps", 2)
    resumed.must_end(0)


def two_processes(name, draw, data, folder):
    """SIGTERM to torchrun and its processes, as a cluster sends it: saved. torchrun prints tracebacks of its own."""
    run = folder / "run"
    command = train(name, data, run, draw.choice((0, 2)))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = Program(folder / "log", *start, *command, "--epochs", 1000, "--validation-epochs", 1000)
    program.wait_for_output("step 2/")
    program.send(TERM, group=True)
    program.must_end(1, 143, traceback=True)
    program.check("stopped and saved at step" in program.output(), "not saved")
    assert checkpoint.read(run / "last.pt")["step"] >= 2
    must_resume(program, command, run, folder)
