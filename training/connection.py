"""The connection between the processes of a run: made within a minute, and when it is lost, one line that says so."""

import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from utils.errors import UserError

CONNECT_TIMEOUT = timedelta(seconds=60)  # for all processes to start and to reach each other
STEP_TIMEOUT = timedelta(minutes=30)  # for the other processes to join a collective of the training step
WAIT_TIMEOUT = timedelta(hours=24)  # the same for `Run.gather`: one process may read or score a whole data set before
# In a RuntimeError of torch about gloo's sockets, or of NCCL
LOST = re.compile(r"gloo/transport/|ncclRemoteError|communicator was aborted|collective timeout")


def connect(backend: str, rank: int, world_size: int) -> dist.ProcessGroup:
    """Join the other processes; returns a second group, of gloo with WAIT_TIMEOUT.

    UserError if they do not reach each other within about CONNECT_TIMEOUT.
    """
    try:
        if not dist.is_initialized():
            dist.init_process_group(
                backend, store=_store(rank), rank=rank, world_size=world_size, timeout=CONNECT_TIMEOUT
            )
        waiting = dist.new_group(backend="gloo", timeout=CONNECT_TIMEOUT)
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise UserError(
            f"process {rank} on {socket.gethostname()} did not reach all {world_size} processes at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {_reason(error)}; start all of them within "
            f"{CONNECT_TIMEOUT.seconds} seconds, with the same address and a free port"
        ) from error
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # its name in torch 2.11
    set_timeout(STEP_TIMEOUT, dist.group.WORLD)
    set_timeout(WAIT_TIMEOUT, waiting)
    return waiting


def _store(rank):
    """The store in which the processes publish their addresses."""
    # Without torchrun it is in rank 0; the others try twice to reach it, with a pause between
    timeout = CONNECT_TIMEOUT if rank == 0 else CONNECT_TIMEOUT / 2.5
    store = next(dist.rendezvous("env://", timeout=timeout))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    # torchrun keeps this store over a restart, with the addresses of dead processes in it
    # (https://github.com/pytorch/pytorch/issues/135712), so each start uses keys of its own
    if os.environ["GROUP_WORLD_SIZE"] == "1":  # several machines count their starts separately
        return dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    restarts = int(os.environ["TORCHELASTIC_MAX_RESTARTS"])
    if rank == 0 and restarts:
        warnings.warn(
            f"torchrun --max-restarts {restarts} on several machines may fail to restart; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment and use --rdzv-backend c10d",
            stacklevel=4,
        )
    return store


@contextmanager
def explain_loss() -> Iterator[None]:
    """Around a program: a UserError in place of torch's RuntimeError if another process of the run has ended, or has
    not answered in time."""
    try:
        yield
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise UserError(
            f"process {os.environ.get('RANK', 0)} on {socket.gethostname()} lost its connection to another process, "
            f"which was killed or ended with an error of its own: {_reason(error)}; --resume auto continues from the "
            "newest checkpoint"
        ) from error


def end(code: int) -> NoReturn:
    """Exit with `code`; at once if processes are connected. At Python's own end a thread of gloo may still ask for its
    lock and abort the process (exit code -6), and NCCL may wait for one that has ended."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _is_lost(error):
    """Whether a RuntimeError says that another process does not answer; any other one is a bug."""
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    return bool(LOST.search(str(error))) and "enforce fail" not in str(error)  # of gloo: collectives that do not match


def _reason(error):
    """The cause in an error of torch.distributed, without the place in its source."""
    line = str(error).partition("\n")[0]
    return re.sub(r"^.*?\[\S*/gloo/\S*\] ", "", line).partition(". ")[0].removesuffix(".")
