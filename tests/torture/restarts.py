"""torchrun with two processes (gloo), of which one is killed by SIGKILL at a random moment, once or twice.

torchrun starts both again, with --resume auto: the run comes back each time, ends with the weights, averages and
optimizer of an uninterrupted one, bit for bit, and no process is left over.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from tests.script_helpers import COMMON, DRAW, FLAGS, ROOT, last
from training import checkpoint

CASES = 10
SCRIPTS = ("backbone", "ssd", "retinanet")
RUN = "--max-steps 12 --save-every-steps 2 --ema 0.9 --scheduler plateau --log-every 1 --resume auto"
SECONDS = {"start": 3, "training": 0.5, "validation": 0.5, "saving": 0.2}  # that a process lives at most after a call
MOMENTS = tuple(SECONDS)
RENDEZVOUS = ("--standalone", "--master-port={port}", "--rdzv-backend=c10d --rdzv-endpoint=localhost:{port}")
LIMIT = 300  # seconds for a run with its restarts


def prepare(folder):
    for name in SCRIPTS:
        draw, images = DRAW[name]
        draw(folder / name, images=images, seed=1)
        code, output = launch(name, folder, folder / f"run_{name}")
        assert code == 0, output


def case(number, seed, folder):
    rng, shared = random.Random(1000 * seed + number), folder.parent / "shared"
    name, rendezvous = rng.choice(SCRIPTS), rng.choice(RENDEZVOUS)
    moments = [MOMENTS[number % len(MOMENTS)], rng.choice(MOMENTS)][: rng.randint(1, 2)]  # of each start
    kills = [f"{number // len(MOMENTS) % 2}:{moment}:{rng.randint(1, 3)}:{rng.random():.3f}" for moment in moments]
    code, output = launch(name, shared, folder / "run", rendezvous, kills)
    story = f"{name} {rendezvous}, killed {', '.join(kills)}"
    killed = output.count("Signal 9 (SIGKILL)") + output.count("(exitcode: -9)")
    assert code == 0, f"{story}: exit code {code}\n{output[-6000:]}"
    assert killed, f"{story}: nothing was killed\n{output[-6000:]}"
    state, whole = last(folder / "run"), last(shared / f"run_{name}")
    assert state["step"] == whole["step"]
    assert checkpoint.fingerprint(state) == checkpoint.fingerprint(whole), f"{story}: other weights"
    torch.testing.assert_close(state["ema"], whole["ema"], rtol=0, atol=0)


def launch(name, shared, out, rendezvous=RENDEZVOUS[0], kills=()):
    """Run a script in two processes under torchrun; (exit code, output). AssertionError if it takes longer than LIMIT,
    or leaves a process behind."""
    words = [*rendezvous.format(port=free_port()).split(), "--nproc-per-node=2", "--max-restarts=2"]
    words += ["-m", "tests.torture.restarts", name, ",".join(kills), *FLAGS[name].split(), *COMMON.split()]
    words += [*RUN.split(), "--data", str(shared / name), "--model-dir", str(out)]
    agent = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = agent.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        for process in processes_with(out):
            os.kill(process, signal.SIGKILL)
        output = agent.communicate()[0]
        raise AssertionError(f"{name} {rendezvous} {kills}: not ended after {LIMIT} s\n{output[-6000:]}") from None
    deadline = time.monotonic() + 10
    while processes_with(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_with(out), f"{name} {rendezvous} {kills}: processes left over\n{output[-6000:]}"
    return agent.returncode, output


def processes_with(word):
    """Numbers of the processes that have `word` in their command lines."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if str(word).encode() in words and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(name, kills, *words):
    """One of the processes: the script, which is killed SECONDS or less after a call.

    kills   RANK:MOMENT:CALL:DELAY of the first start, of the second one, ... separated by commas
    """
    import importlib

    from training import cli, run_folder

    script, start = importlib.import_module(f"train_{name}"), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < len(kills):
        rank, moment, call, delay = kills[start].split(":")
        if rank == os.environ["RANK"]:
            timer = threading.Timer(float(delay) * SECONDS[moment], os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            place = {"training": (script.optim, "step"), "validation": (script, "evaluate")}
            place |= {"saving": (run_folder.RunFolder, "save"), "start": (script, "main")}
            start_at_call(timer, *place[moment], 1 if moment == "start" else int(call))
    cli.run(lambda: script.main(words))


def start_at_call(timer, owner, name, count):
    """Replace function `name` of `owner` by one that starts `timer` when it is called for the `count`-th time."""
    function, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append(None)
        if len(calls) == count:
            timer.start()
        return function(*args, **options)

    setattr(owner, name, counted)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(",") if sys.argv[2] else [], *sys.argv[3:])
