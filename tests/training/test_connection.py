import os
import re
import signal
import socket
import subprocess
import sys
import warnings
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.script_helpers import ROOT
from training import connection
from training.connection import explain_loss
from utils.errors import UserError

# Two processes that run forever; process 1 is killed, or raises an error, in the third step.
FAILING = """
import os, signal, sys
from training import cli, distributed
from utils.errors import DataError

def main():
    run = distributed.init_device("cpu")
    for step in range(10**9):
        if run.rank == 1 and step == 2:
            if sys.argv[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise DataError("a.jpg", reason="cut off")
        run.mean(1.0)

cli.run(main)
"""
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] "


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def torchrun(monkeypatch):
    """A function that sets the environment of torchrun's process 0, whose agent keeps a store."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def set_environment(start, machines=1, kept=True):
        values = {
            "RANK": 0,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": agent.port if kept else free_port(),
        }
        values |= {"TORCHELASTIC_USE_AGENT_STORE": kept, "TORCHELASTIC_RESTART_COUNT": start}
        for name, value in {**values, "TORCHELASTIC_MAX_RESTARTS": 3, "GROUP_WORLD_SIZE": machines}.items():
            monkeypatch.setenv(name, str(value))

    return set_environment


def test_a_restart_by_torchrun_does_not_see_the_addresses_of_dead_processes(torchrun):
    torchrun(start=0)
    connection._store(0).set("address", "of a dead process")
    assert connection._store(1).check(["address"])
    torchrun(start=1)
    assert not connection._store(0).check(["address"])


def test_a_warning_if_several_machines_would_restart_with_the_old_store(torchrun, recwarn):
    warnings.simplefilter("always")
    torchrun(start=0, machines=2)
    connection._store(1)
    assert not recwarn
    connection._store(0)
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in str(recwarn.pop(UserWarning).message)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_alone_gives_up_with_one_line(rank, monkeypatch):
    port = str(free_port())
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", timedelta(seconds=1))
    line = (
        rf"^process {rank} on .* did not reach all 2 processes at 127\.0\.0\.1:{port}: .*imed out .*start all of them"
    )
    with pytest.raises(UserError, match=line) as raised:
        connection.connect("gloo", rank, 2)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError(f"{GLOO}Connection closed by peer [10.0.0.1]:9. Check the logs"),
            "Connection closed by peer [10.0.0.1]:9",
        ),
        (
            RuntimeError(f"{GLOO}Timed out waiting 9000ms for recv operation to complete"),
            "Timed out waiting 9000ms for",
        ),
        (
            dist.DistStoreError("wait timeout after 60000ms, keys: /0//cpu//0/1\nframe #0"),
            "wait timeout after 60000ms, keys",
        ),
        (dist.DistBackendError("NCCL error in: x.cpp:9\nncclRemoteError: A call failed"), "NCCL error in: x.cpp:9"),
    ],
)
def test_a_lost_connection_is_one_line(error, reason):
    with pytest.raises(UserError, match=r"^process 0 on .* lost its connection to another") as raised, explain_loss():
        raise error
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("message", ["shapes differ", f"[enforce fail at {GLOO[1:]} 8 vs 4", "NCCL error in: x.cpp:9"])
def test_other_errors_of_torch_keep_their_traceback(message):
    with pytest.raises(RuntimeError, match=re.escape(message)), explain_loss():
        raise RuntimeError(message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "code", "last"), [("killed", -signal.SIGKILL, ""), ("fails", 2, "error: a.jpg: cut off\n")]
)
def test_without_torchrun_the_end_of_one_process_ends_the_other(way, code, last):
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING, way],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        (_, first), (_, second) = (process.communicate(timeout=120) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, code]
    assert second == last
    assert first.startswith("error: process 0 on ")
    assert first.count("\n") == 1
