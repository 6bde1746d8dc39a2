"""The training scripts in two processes on the CPU (gloo), each from weights, buffers and seeds of its own."""

import contextlib
import importlib
import os
import random
import signal
import socket
from unittest import mock

import numpy as np
import torch
import torch.multiprocessing

import models

PROCESSES = 2


def run(jobs):
    """Run the jobs one after the other, each a dict:

    name    of the script
    words   its command line
    out     folder that gets rank_0.pt and rank_1.pt: parameters and buffers of each process at the end
    differ  False: process 1 starts like process 0, as far as the script itself sees to that
    stop    step in which process 1 gets SIGTERM
    """
    for job in jobs:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            job["port"] = free.getsockname()[1]
    torch.multiprocessing.spawn(_run_all, (jobs,), nprocs=PROCESSES)


def _run_all(rank, jobs):
    torch.set_num_threads(1)
    build = models.build
    for job in jobs:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(job["port"])}
        networks = []

        def build_own(*args, job=job, networks=networks, **arguments):
            networks.append(build(*args, **arguments))
            if rank and job.get("differ", True):
                _change(networks[-1], rank)
            return networks[-1]

        models.build = build_own
        script, stop = importlib.import_module(f"train_{job['name']}"), job.get("stop", 0)
        step = mock.patch.object(script.optim, "step", _stop_in(script.optim.step, stop * rank))
        with step, contextlib.suppress(SystemExit):  # with code 143, after SIGTERM
            script.main(job["words"])
        state = {name: dict(getattr(networks[-1], f"named_{name}")()) for name in ("parameters", "buffers")}
        torch.save(state, job["out"] / f"rank_{rank}.pt")


def _stop_in(step, number):
    """The function `step`, and in its call `number` SIGTERM to this process."""
    calls = []

    def stopping(*args):
        calls.append(step(*args))
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)

    return stopping


def _change(net, seed):
    """Other values for all parameters and buffers of `net`, and other random numbers from now on."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data.add_(torch.rand_like(tensor) if tensor.is_floating_point() else seed)
