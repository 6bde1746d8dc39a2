"""Memory of the GPU, of the machine and of /dev/shm: what a run uses, and what to change if it does not fit."""

import argparse
import os
import platform
import re
import resource
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_sharer
from pathlib import Path

import torch

from training.distributed import Run, computes_bf16, local_processes
from utils.errors import UsageError

MB, GIB = 2**20, 2**30
WORKER_BYTES = 256 * MB  # of a data loading process besides its batches: interpreter, torch, decoder
PREFETCH = 2  # batches that torch's DataLoader keeps ready per worker
# How torch's DataLoader names the signal that killed a worker -> what to change
KILLED_WORKER = {
    "Killed": "probably by the system because memory is full; use fewer --workers or a smaller --batch-size",
    "Bus error": "/dev/shm or memory is full; use fewer --workers (0 needs no /dev/shm), a smaller --batch-size, or a "
    "larger /dev/shm (docker run --shm-size)",
    "Segmentation fault": "probably in a library that reads images; --check-data --workers 0 ends at the file",
}


def peak_gpu() -> int:
    """Maximum number of bytes of tensors on the current GPU since `reset_peak`; 0 if no GPU is in use."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def reset_peak() -> None:
    """Start `peak_gpu` again from the memory in use now."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_ram() -> int:
    """Maximum number of bytes of RAM that this process has used so far."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peaks() -> str:
    """One line for --preflight: the peaks of GPU memory and RAM so far."""
    return f"peak GPU memory {peak_gpu() / MB:.0f} MB, RAM {peak_ram() / MB:.0f} MB"


@contextmanager
def advice(run: Run, args: argparse.Namespace, image_size: tuple[int, int]) -> Iterator[None]:
    """Around training: print what to change if the DataLoader's workers do not fit into RAM or /dev/shm, and turn a
    GPU's out-of-memory error into a UsageError that names the next flag to change.

    image_size: (h, w) of the largest images in a batch, as uint8 RGB
    """
    batch_bytes = 3 * image_size[0] * image_size[1] * args.batch_size // run.world_size
    shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None
    for warning in loader_warnings(args.workers, batch_bytes, shm, free_ram(), local_processes()):
        run.print(f"WARNING: {warning}")
    if args.preflight:
        batches = args.workers * PREFETCH * batch_bytes / MB
        run.print(f"{args.workers} workers keep up to {batches:.0f} MB of batches in shared memory")
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(out_of_memory_hint(run, image_size, args.batch_size, args.accumulate)) from error


def loader_warnings(
    workers: int, batch_bytes: int, shm_free: int | None, ram_free: int | None, processes: int = 1
) -> list[str]:
    """What does not fit, and the flag to change, for given numbers of bytes; None for an unknown number.

    workers: of each of the `processes` on this machine
    """
    total, warnings = workers * processes, []
    of_batches = PREFETCH * batch_bytes  # bytes per worker in /dev/shm
    of_worker = WORKER_BYTES + of_batches  # bytes per worker in RAM
    if workers and shm_free is not None and total * of_batches > 0.9 * shm_free:
        fit = int(0.9 * shm_free // (processes * of_batches))
        warnings.append(
            f"/dev/shm has {shm_free / MB:.0f} MB free and {total} workers keep {total * of_batches / MB:.0f} MB of "
            f"batches there: use --workers {fit}, a smaller --batch-size, or a larger /dev/shm (docker run --shm-size)"
        )
    if workers and ram_free is not None and total * of_worker > 0.9 * ram_free:
        fit = int(0.9 * ram_free // (processes * of_worker))
        warnings.append(
            f"{ram_free / GIB:.1f} GiB of RAM are free and {total} workers take about "
            f"{total * of_worker / GIB:.1f} GiB: use --workers {fit} or a smaller --batch-size"
        )
    return warnings


@contextmanager
def explain_killed_worker() -> Iterator[None]:
    """Around a program: a UsageError in place of torch's error if a data loading worker was killed. It names the
    signal, if that is known, and what to change."""
    try:
        with _explain_broken_batch():
            yield
    except RuntimeError as error:
        text = f"{error} {error.__cause__}"  # the cause names the signal, if the error does not
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed|exited unexpectedly)", text)
        if not found:
            raise
        name = re.search(r"is killed by signal: ([^.]+)\.", text)
        remedy = KILLED_WORKER.get(name and name[1], "see the messages above; --workers 0 uses none")
        by = f" by {name[1]!r}" if name else ""
        raise UsageError(f"a data loading worker, process {found[1]}, was ended{by}: {remedy}") from error


@contextmanager
def _explain_broken_batch():
    """A worker killed while it sends a batch: torch asks whether it lives a moment too early, and raises the error of
    the connection again. Meanwhile the signal that it has ended may come, for which torch raises its RuntimeError."""
    try:
        yield
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if not any(frame.filename == resource_sharer.__file__ for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise UsageError(f"a data loading worker was ended while it sent a batch: {KILLED_WORKER['Killed']}") from error


def free_ram() -> int | None:
    """Bytes of RAM that are available on the machine, or in its container if that is less; None if unknown."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        limits.append(max(0, int(limit.read_text()) - int(used.read_text())))
    return min(limits, default=None)


def out_of_memory_hint(run: Run, image_size: tuple[int, int], batch_size: int, accumulate: int = 1) -> str:
    """The message for a full GPU: peak, image size (h, w), and the next flag to change.

    batch_size: images per step over all processes, computed in `accumulate` micro-batches
    """
    devices = run.world_size * max(1, len(run.gpus))
    micro_batch = -(-batch_size // (devices * accumulate))
    images = batch_size // devices
    divisors = [number for number in range(accumulate + 1, images + 1) if images % number == 0]
    if divisors:
        flag = f"--accumulate {divisors[0]} (the same batch in smaller micro-batches)"
    elif run.precision == torch.float32:
        flag = f"--precision {'bf16' if computes_bf16(run.device) else 'fp16'}"
    elif batch_size > devices:
        flag = f"--batch-size {devices}"
    else:
        flag = "smaller images, or a smaller --arch"
    total = torch.cuda.get_device_properties(run.device).total_memory / GIB if run.device.type == "cuda" else 0
    return (
        f"{run.device} is out of memory: peak {peak_gpu() / GIB:.1f} of {total:.1f} GiB "
        f"with {micro_batch} images of {image_size[0]} x {image_size[1]} at a time; next, try {flag}"
    )
