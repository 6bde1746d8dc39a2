"""Disks that are full, read-only or gone, and files in the way: one line, exit code 2, and later the same weights.

The disks are tmpfs mounts of a few MB, so this part needs root on Linux. All are unmounted at the end of a case.
"""

import os
import random
import shutil
import signal
import subprocess
from fractions import Fraction

import av
import torch
from PIL import Image

from tests.torture import trainings
from tests.torture.trainings import Program, check_equal, losses, stop_after, train
from visualize.video import VideoWriter

CASES = 10
LARGE = 64  # MB: all files of the run


class Disk:
    """A file system of `size` MB at `path`; its files are also at `all`, from where `back` brings them."""

    def __init__(self, folder, size=LARGE):
        assert os.geteuid() == 0, "needs root, to mount small disks"
        self.all, self.path, self._filler = folder / "all", folder / "disk", folder / "all" / "filler"
        self.all.mkdir()
        self.path.mkdir()
        mount("-t", "tmpfs", "-o", f"size={int(size * 1024)}k", "disk", self.all)
        mount("--bind", self.all, self.path)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for path in (self.path, self.all):
            subprocess.run(["umount", "--lazy", path], check=False, stderr=subprocess.DEVNULL)

    def fill(self):
        with open(self._filler, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass  # full

    def empty(self):
        self._filler.unlink()

    def grow(self):
        mount("-o", f"remount,size={LARGE}m", self.all)

    def vanish(self):
        subprocess.run(["umount", "--lazy", self.path], check=True)

    def back(self, *, read_only=False):
        mount("--bind", self.all, self.path)
        if read_only:
            mount("-o", "remount,bind,ro", self.path)


def mount(*words):
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"mount is not permitted here: {done.stderr}"


def prepare(folder):
    trainings.prepare(folder)
    train(folder, folder / "reference_2", folder / "reference_2.log", processes=2).succeeds()
    writer = VideoWriter(folder / "clip.mp4", Fraction(10))
    for number in range(80):
        writer.add(torch.randint(256, (3, 96, 128), dtype=torch.uint8), number / 10)
    writer.close()


def case(number, seed, folder):
    shared, chance = folder.parent / "shared", random.Random(f"{seed} {number}")
    cases = (too_small, filled, read_only, unmounted, removed, in_the_way, without_tensorboard)
    cases += (predictions, other_programs, two_processes)
    cases[number](shared, folder, chance)


def resumed(shared, folder, out, reference="reference", **options):
    """The run goes on when the disk can be written again, as if nothing had been."""
    train(shared, out, folder / "resumed.log", "--resume", "auto", **options).succeeds()
    check_equal(out, shared / reference)


def stopped_run(shared, folder, out, chance, **options):
    """A training that SIGSTOP holds after a random number of its lines in metrics.jsonl."""
    run = train(shared, out, folder / "run.log", **options)
    stop_after(run, out, chance.randint(1, 40))
    return run


def too_small(shared, folder, chance):
    with Disk(folder, chance.uniform(1, 22)) as disk:
        out = disk.path / "run"
        train(shared, out, folder / "run.log").fails_with(f"{out}/", "No space left on device; free some disk space")
        disk.grow()
        resumed(shared, folder, out)


def filled(shared, folder, chance):
    with Disk(folder) as disk:
        out = disk.path / "run"
        run = stopped_run(shared, folder, out, chance)
        disk.fill()
        run.send(signal.SIGCONT)
        run.fails_with(f"{out}/", "No space left on device; free some disk space, then continue with --resume auto")
        train(shared, out, folder / "still.log", "--resume", "auto").fails_with("No space left on device; free some")
        disk.empty()
        resumed(shared, folder, out)


def read_only(shared, folder, chance):
    with Disk(folder) as disk:
        out = disk.path / "run"
        run = stopped_run(shared, folder, out, chance)
        disk.vanish()
        disk.back(read_only=True)
        run.send(signal.SIGCONT)
        line = run.fails_with(f"{out}/last.pt: not written: Read-only file system; mount the disk for writing")
        assert "free some" not in line
        train(shared, out, folder / "still.log", "--resume", "auto").fails_with("Read-only file system; mount")
        disk.vanish()
        disk.back()
        resumed(shared, folder, out)


def unmounted(shared, folder, chance):
    with Disk(folder) as disk:
        out = disk.path / "run"
        run = stopped_run(shared, folder, out, chance)
        disk.vanish()
        run.send(signal.SIGCONT)
        run.fails_with(f"{out}: not written: the folder was removed or its disk unmounted during the run; mount the")
        assert not list(disk.path.iterdir()), "something was written where the disk had been"
        disk.back()
        resumed(shared, folder, out)


def removed(shared, folder, chance):
    out = folder / "run"
    run = stopped_run(shared, folder, out, chance)
    shutil.rmtree(out)
    run.send(signal.SIGCONT)
    run.fails_with(f"{out}: not written: the folder was removed or its disk unmounted during the run")
    assert not out.exists()


def in_the_way(shared, folder, chance):
    """Files and folders in place of each other, a name too long, disks that are read-only or full from the start."""
    (folder / "file").touch()
    for number, name in enumerate(("flags.json", "metrics.jsonl", "new.pt", "run.lock")):
        (folder / f"{number}" / name).mkdir(parents=True)
        program = train(shared, folder / f"{number}", folder / f"{number}.log")
        program.fails_with(f"{folder / str(number)}/", "not written", "move away the file or folder that is in the way")
    for out in (folder / "file", folder / "file" / "run"):
        program = train(shared, out, folder / "a_file.log")
        program.fails_with(f"{out}: not written", "move away the file or folder that is in the way")
    train(shared, folder / ("é" * 200), folder / "long.log").fails_with("choose a shorter name")
    with Disk(folder) as disk:
        disk.fill()
        train(shared, disk.path / "run", folder / "full.log").fails_with("No space left on device; free some")
        disk.vanish()
        disk.back(read_only=True)
        train(shared, disk.path / "run", folder / "only.log").fails_with("Read-only file system; mount the disk for")


def without_tensorboard(shared, folder, chance):
    out = folder / "run"
    run = stopped_run(shared, folder, out, chance)
    (events,) = out.glob("events.*")
    events.unlink()
    events.mkdir()
    run.send(signal.SIGCONT)
    run.succeeds()
    assert run.text.count("TensorBoard shows no more of this run") == 1 and "Traceback" not in run.text, run.text
    check_equal(out, shared / "reference")


def predictions(shared, folder, chance):
    """No part of a file remains under its name."""
    images = sorted((shared / "data" / "val").rglob("*.jpg"))
    for number, size in enumerate((0.004, 0.02, chance.uniform(0.03, 0.2), chance.uniform(0.2, 0.6))):
        own = folder / f"{number}"
        own.mkdir()
        with Disk(own, size) as disk:
            words = ["predict.py", shared / "reference" / "best.pt", *images, shared / "clip.mp4", "--save-frames"]
            program = Program(own / "log", *words, "--out", disk.path / "out", "--device", "cpu")
            program.fails_with(f"{disk.path}/out", "not written: No space left on device; free some disk space")
            check_whole(disk.path / "out")


def check_whole(out):
    names = [path.name for path in out.rglob("*") if path.suffix in (".tmp", ".json")]
    assert not names, names
    for path in out.glob("*.jpg"):
        Image.open(path).load()
    for path in out.glob("*.mp4"):
        with av.open(str(path)) as container:
            assert len(list(container.decode(container.streams.video[0]))) == 80


def other_programs(shared, folder, chance):
    """Evaluation, data check, export; a cache that cannot be written is no error."""
    best, kinds = shared / "reference" / "best.pt", {"full": "No space left on device", "only": "Read-only file system"}
    for kind, reason in kinds.items():
        own = folder / kind
        own.mkdir()
        with Disk(own) as disk:
            shutil.copytree(shared / "data", disk.path / "data")
            disk.fill()
            if kind == "only":
                disk.vanish()
                disk.back(read_only=True)
            to = disk.path / "x"
            words = [shared, to, own / "evaluation.log", "--eval-only", "--weights", best]
            train(*words).fails_with(f"{to}/evaluation/", reason)
            train(shared, to, own / "check.log", "--check-data").fails_with(f"{to}/data_errors.json", reason)
            for flag, name in (("--state-dict", "x.pth"), ("--out", "x.onnx")):
                words = ["export.py", best, flag, disk.path / name]
                Program(own / f"{name}.log", *words).fails_with(f"{disk.path / name}: not written: {reason}")
            cached = train(shared, to, own / "cache.log", "--data", disk.path / "data", "--preflight")
            cached.succeeds()
            assert cached.text.count("could not be cached") == 2, cached.text


def two_processes(shared, folder, chance):
    with Disk(folder) as disk:
        out = disk.path / "run"
        run = stopped_run(shared, folder, out, chance, processes=2)
        disk.fill()
        run.send(signal.SIGCONT)
        assert run.wait() == 1, "torchrun's own exit code"
        assert run.text.count("error: ") == 1 and "No space left on device; free some disk space" in run.text, run.text
        assert f'File "{trainings.ROOT / "train"}' not in run.text, f"a traceback of ours\n{run.text}"
        disk.empty()
        resumed(shared, folder, out, "reference_2", processes=2)
        assert len(losses(out)) == trainings.STEPS
