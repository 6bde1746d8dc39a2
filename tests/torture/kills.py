"""A run that SIGKILL ends up to three times, each time continued by `--resume auto`, equals the uninterrupted one.

Twelve cases a script. A third of the kills hit a call that writes: a part of a checkpoint, an fsync, a rename, a log
line. A third hit an evaluation: one of its batches, its record, its log, its files. A third come at a random time, from
reading the data to the end; these alone also depend on the speed of the machine.

Each attempt is a process forked from this one, which has imported the script: imports would take most of the time.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from data import loader
from tests.script_helpers import DRAW, FLAGS, Script
from training.checkpoint import Progress
from training.logger import Logger
from training.run_folder import RunFolder

CASES = 60
SCRIPTS, AIMS = tuple(FLAGS), ("writing", "evaluation", "anywhere")
RUN = "--max-steps 10 --validation-steps 4 --save-every-steps 3 --keep 2 --log-every 2 --ema 0.9 --scheduler plateau"
MORE = {  # --patience stops RetinaNet after step 9; the two largest networks are not averaged, which saves time
    "backbone": "--precision fp16",
    "retinanet": "--validation-steps 3 --patience 2 --max-steps 12 --ema 0",
    "ssd": "--validation-mean-ap",
    "centerfusion": "",
    "maskrcnn": "--monitor loss --ema 0",
}
SECONDS = 240  # for an attempt; it takes about three
DIFFERENT = ("flags.json", "versions.json")  # --resume and the command line


def prepare(folder):
    """Draw each script's data, and train its uninterrupted run, counting the moments at which the others are killed."""
    for name, (draw, images) in DRAW.items():
        script = Script(name, draw(folder / "data" / name, images=images, seed=1))
        start = time.monotonic()
        code = attempt(script, folder / "whole" / name, counts=folder / f"{name}.json")
        assert code == 0, (folder / "whole" / f"{name}.txt").read_text()
        counts = json.loads((folder / f"{name}.json").read_text())
        counts["anywhere"] = time.monotonic() - start
        (folder / f"{name}.json").write_text(json.dumps(counts))


def case(number, seed, folder):
    shared, name = folder.parent / "shared", SCRIPTS[number % len(SCRIPTS)]
    aim, kills = AIMS[number // len(SCRIPTS) % len(AIMS)], 1 + number // (len(SCRIPTS) * len(AIMS)) % 3
    random_choice = random.Random(f"{seed} {number}")
    script, out = Script(name, shared / "data" / name), folder / name
    counts, done = json.loads((shared / f"{name}.json").read_text()), []
    for kill in range(kills):
        # Each kill comes in its share of the run, so that there is a run left for the next.
        if aim == "anywhere":
            at = random_choice.uniform(0, 0.8 * counts["anywhere"] / kills)
            code = attempt(script, out, seconds=at)
        else:
            moment = random_choice.choice(sorted(counts[aim]))
            at = moment, random_choice.randint(1, max(1, counts[aim][moment] // kills))
            code = attempt(script, out, kill_at=at)
        print(f"kill {kill + 1}: {at}, exit code {code}")
        done.append(at)
        assert code in (0, -signal.SIGKILL), f"{done}: exit code {code}\n{out.with_suffix('.txt').read_text()[-3000:]}"
    code = attempt(script, out)
    assert code == 0, f"{done}: exit code {code}\n{out.with_suffix('.txt').read_text()[-3000:]}"
    differences = compare(shared / "whole" / name, out)
    assert not differences, f"{done}:\n" + "\n".join(differences)


def attempt(script, out, kill_at=None, seconds=None, counts=None):
    """Train or continue the run in the folder `out` in a new process; returns its exit code.

    kill_at   (moment, number): it is killed at this one of these moments
    seconds   it is killed after this time
    counts    a file for the number of each moment
    """
    time.sleep(1.1 if out.exists() else 0)  # TensorBoard orders the files of one second by their process numbers
    torch.set_num_threads(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=train, args=(script, out, kill_at, counts))
    process.start()
    process.join(SECONDS if seconds is None else seconds)
    ended = process.exitcode is not None
    process.kill()
    process.join()
    assert ended or seconds is not None, f"no end after {SECONDS} s"
    return process.exitcode


def train(script, out, kill_at, counts):
    moments = Moments(kill_at)
    moments.watch(script.module)
    with open(out.with_suffix(".txt"), "a", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            script.main(out, *RUN.split(), *MORE[script.name].split(), "--resume", "auto")
    if counts:
        counts.write_text(json.dumps(moments.counts))


class Moments:
    """Counts the moments of a run at which it can be killed, and kills this process at one of them.

    counts   aim -> moment -> how often it came
    """

    def __init__(self, kill_at=None):
        self.kill_at, self.counts = kill_at, {"writing": Counter(), "evaluation": Counter()}

    def passed(self, aim, moment):
        self.counts[aim][moment] += 1
        if self.kill_at == (moment, self.counts[aim][moment]):
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, module):
        for name in ("fsync", "replace", "link", "unlink"):
            self.around("writing", os, name)
        for name in ("add_scalar", "add_image", "flush"):
            self.around("writing", SummaryWriter, name)
        self.around("writing", Logger, "log")
        save = torch.save
        torch.save = lambda contents, file: save(contents, Watched(file, self))
        self.around("evaluation", module, "evaluate")
        self.around("evaluation", Progress, "record")
        self.around("evaluation", Logger, "log_validation")
        self.around("evaluation", Logger, "_add_pr_curve")
        self.around("evaluation", RunFolder, "save_weights")
        self.around("evaluation", RunFolder, "save")
        eval_loader = loader.eval_loader
        loader.eval_loader = lambda *args: Watched(eval_loader(*args), self)

    def around(self, aim, owner, name):
        """The moments before and after each call of a function."""
        function = getattr(owner, name)

        def watched(*args, **options):
            self.passed(aim, f"before {name}")
            result = function(*args, **options)
            self.passed(aim, f"after {name}")
            return result

        setattr(owner, name, watched)


class Watched:
    """A file or a loader: each write and each batch is a moment."""

    def __init__(self, watched, moments):
        self.watched, self.moments = watched, moments

    def __getattr__(self, name):
        return getattr(self.watched, name)

    def write(self, data):
        self.moments.passed("writing", "write")
        return self.watched.write(data)

    def __iter__(self):
        for batch in self.watched:
            self.moments.passed("evaluation", "batch")
            yield batch


def compare(whole, killed):
    """How the run folder `killed` differs from `whole`: lines, none if it does not."""
    names = [{path.name for path in folder.iterdir() if "tfevents" not in path.name} for folder in (whole, killed)]
    differences = [f"{name}: only in {'one' if name in names[0] else 'the killed run'}" for name in names[0] ^ names[1]]
    for name in sorted(names[0] & names[1]):
        if name.endswith(".pt"):
            one, two = (torch.load(folder / name, weights_only=True) for folder in (whole, killed))
            differences += different(name, of_training(one), of_training(two))
        elif name == "metrics.jsonl":
            one, two = (lines_of(folder / name) for folder in (whole, killed))
            differences += different(name, one, two)
        elif name not in DIFFERENT and (whole / name).read_bytes() != (killed / name).read_bytes():
            differences.append(f"{name} differs")
    return differences + different("TensorBoard", board_of(whole), board_of(killed))


def of_training(contents):
    """A checkpoint without the flags and the measured speeds, and the checksum over them."""
    kept = {name: value for name, value in contents.items() if name not in ("flags", "log", "checksum")}
    log = contents.get("log", {"recent": [], "losses": {}})
    return kept | {"recent": log["recent"], "losses": without_speed(log["losses"])}


def lines_of(path):
    return [without_speed(json.loads(line)) for line in Path(path).read_text().splitlines()]


def without_speed(values):
    return {tag: value for tag, value in values.items() if not tag.startswith("speed/")}


def board_of(folder):
    """tag -> [(step, value)] of scalars, images and precision-recall curves, as TensorBoard reads them."""
    board = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0}).Reload()
    tags = board.Tags()
    read = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags["scalars"]}
    read |= {tag: [(e.step, e.encoded_image_string) for e in board.Images(tag)] for tag in tags["images"]}
    tensors = [tag for tag in tags["tensors"] if tag != "flags/text_summary"]
    read |= {tag: [(e.step, e.tensor_proto.SerializeToString()) for e in board.Tensors(tag)] for tag in tensors}
    return without_speed(read)


def different(place, one, two):
    """Lines that name what differs in nested dicts and lists."""
    if isinstance(one, dict) and isinstance(two, dict):
        lines = [f"{place}.{key}: only in one" for key in one.keys() ^ two.keys()]
        return lines + [line for key in one if key in two for line in different(f"{place}.{key}", one[key], two[key])]
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        lines = [f"{place}: {len(one)} and {len(two)} entries"] * (len(one) != len(two))
        return lines + [line for n, pair in enumerate(zip(one, two)) for line in different(f"{place}[{n}]", *pair)]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        equal = one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
        return [] if equal else [f"{place}: tensors differ"]
    return [] if one == two else [f"{place}: {str(one)[:80]} and {str(two)[:80]}"]
