"""Devices and processes: the one place that knows CUDA, DataParallel and torch.distributed.

One process uses the CPU, one GPU, or several by `--gpus 0,1` (DataParallel). Under torchrun each process has its own
GPU (NCCL), or they share the CPUs (gloo). With one process every collective below is the identity, so a loop has no
branch.
"""

import os
import platform
import random
import resource
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from training.flags import UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_NORM = nn.modules.batchnorm._BatchNorm
MB, GIB = 2**20, 2**30
WORKER_BYTES = 256 * MB  # what a loader's worker takes of its own beside its batches: interpreter, torch, decoder
PREFETCH = 2  # batches that torch's loader keeps ready for each worker


@dataclass(frozen=True)
class Run:
    """Where this process computes, and its part among the others."""

    device: torch.device
    rank: int
    world: int
    gpus: tuple[int, ...]  # GPUs of this process; more than one means DataParallel
    precision: torch.dtype  # of the network under autocast: float32, bfloat16 or float16
    scaler: torch.amp.GradScaler  # does nothing but for float16
    seed: int

    @property
    def is_main(self):
        return self.rank == 0

    def say(self, line):
        """Print a line, in the main process alone."""
        if self.is_main:
            print(line, flush=True)

    def autocast(self):
        """A fresh context that computes in `precision`; a no-op for float32."""
        if self.precision == torch.float32:
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=self.precision)

    def seed_step(self, step):
        """Make what is random inside the network (dropout) a function of seed, step and process, so resume is exact."""
        torch.manual_seed(int(np.random.SeedSequence((self.seed, step, self.rank)).generate_state(1, np.uint64)[0]))

    def wrap(self, net, sync_bn=False, compile=False):
        """The callable for the training forward pass: takes and returns batch-first tensors only.

        The network itself stays what it was (its parameters are shared with the wrapper): save, evaluate and average
        that one. Call after freezing: processes share batch norm statistics only where they are being updated.
        """
        if len(self.gpus) > 1:
            if compile or sync_bn:
                flag = "--compile" if compile else "--sync-bn"
                raise UsageError(f"{flag} does not go with several --gpus; run torchrun --nproc-per-node instead")
            return nn.DataParallel(net, device_ids=list(self.gpus))
        if sync_bn and self.device.type != "cuda":
            raise UsageError(f"--sync-bn needs GPUs and this run is on {self.device}; use --freeze-bn, or neither")
        if self.world > 1:
            if sync_bn:
                net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # in place; parameters stay the same objects
            # Rank 0's running statistics go to all before each forward: rank 0 writes the checkpoint, so a resumed run
            # sees what the uninterrupted one saw. Frozen statistics are equal already; writing to them again would
            # break a second forward before the backward.
            net = nn.parallel.DistributedDataParallel(
                net, device_ids=list(self.gpus) or None, broadcast_buffers=_updates_statistics(net)
            )
        return torch.compile(net) if compile else net

    def mean(self, value):
        """Mean of a number or tensor (any shape) over the processes -> float tensor without gradient, same shape."""
        tensor = torch.as_tensor(value, device=None if torch.is_tensor(value) else self.device).detach()
        if not tensor.is_floating_point():
            tensor = tensor.float()
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def any(self, flag):
        """Whether `flag` is true in any process: how all agree to stop at the same step. Never waits for a GPU."""
        if self.world == 1:
            return bool(flag)
        count = torch.tensor(int(flag))
        dist.all_reduce(count)
        return bool(count)

    def gather(self, value):
        """The `value` (any picklable object) of every process, in rank order -> list."""
        return gather(value)

    def share_statistics(self, net):
        """Give every process rank 0's batch norm statistics: before an evaluation that is split among them."""
        if self.world > 1:
            norms = [module for module in unwrap(net).modules() if isinstance(module, BATCH_NORM)]
            for buffer in (buffer for norm in norms for buffer in norm.buffers()):
                dist.broadcast(buffer, src=0)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def close(self):
        """Leave the process group; the last call of a script."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def setup(device="auto", gpus="", precision="auto", seed=0):
    """Choose device, processes and precision, seed everything, ask for deterministic kernels -> Run.

    device: auto, cpu, cuda, cuda:N. gpus: "" or GPU numbers by commas. precision: auto, fp32, bf16, fp16.
    UsageError where the machine or another flag does not allow it.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ["RANK"]) if world > 1 else 0
    if gpus and world > 1:
        raise UsageError(
            f"--gpus {gpus} under torchrun: each process has its own GPU; use --gpus or torchrun, not both"
        )
    chosen, numbers = _choose(device, gpus, world)
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once by cuBLAS; its only exact setting
        torch.cuda.set_device(chosen)
    dtype = _choose_precision(precision, chosen)
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))  # one process may score while the rest wait
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False  # it picks kernels by the clock: another run may pick others
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and changes no result of ours
    scaler = torch.amp.GradScaler(chosen.type, enabled=dtype == torch.float16)
    return Run(chosen, rank, world, numbers, dtype, scaler, seed)


def is_main():
    """Whether this is the process that prints and writes, for code that is handed no Run."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(value):
    """`Run.gather`, for code that is handed no Run."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def unwrap(net):
    """The network inside DistributedDataParallel, DataParallel and torch.compile, in any nesting."""
    while True:
        if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            net = net.module
        elif isinstance(net, nn.Module) and "_orig_mod" in net._modules:
            net = net._orig_mod
        else:
            return net


def synchronize(device):
    """Wait for the GPU to finish what it was given, so that a clock read next is true; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device=None):
    """Greatest number of bytes that tensors took on the GPU since `reset_peak`; 0 without a GPU in use."""
    if not torch.cuda.is_initialized() or torch.device(device or "cuda").type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device)


def reset_peak(device=None):
    if torch.cuda.is_initialized() and torch.device(device or "cuda").type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_ram():
    """Greatest number of bytes of RAM that this process held so far."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gpu_names():
    """The GPUs of this machine by name, in order; [] without."""
    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )


def describe(run):
    """One line about the run's device, precision and processes, to print at its start."""
    if run.device.type == "cuda":
        parts = torch.cuda.get_device_properties(run.device)
        place = f"{run.device} {parts.name} ({parts.total_memory / GIB:.0f} GiB)"
        if len(run.gpus) > 1:
            place += f", DataParallel on GPUs {', '.join(map(str, run.gpus))}"
    else:
        place = f"cpu, {torch.get_num_threads()} threads"
    name = next(name for name, dtype in DTYPES.items() if dtype == run.precision)
    processes = f", process {run.rank + 1} of {run.world}" if run.world > 1 else ""
    return f"{place}, {name}{processes}"


def check_machine(workers, batch_bytes):
    """Warnings, each naming the flag to change, where `workers` loader processes do not fit RAM or /dev/shm -> list.

    batch_bytes: one process's batch as the loader hands it over.
    """
    shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None
    return memory_warnings(workers, batch_bytes, shm, free_ram())


def memory_warnings(workers, batch_bytes, shm_free, ram_free):
    """The arithmetic of `check_machine`, for numbers given; None where a number is not known."""
    waiting = workers * PREFETCH * batch_bytes
    found = []
    if workers and shm_free is not None and waiting > 0.9 * shm_free:
        fit = int(0.9 * shm_free // (PREFETCH * batch_bytes))
        found.append(
            f"/dev/shm has {shm_free / MB:.0f} MB free and {workers} workers keep {waiting / MB:.0f} MB of batches "
            f"there: use --workers {fit}, a smaller --batch-size, or a larger /dev/shm (docker run --shm-size)"
        )
    needed = workers * WORKER_BYTES + waiting
    if workers and ram_free is not None and needed > 0.9 * ram_free:
        fit = int(0.9 * ram_free // (WORKER_BYTES + PREFETCH * batch_bytes))
        found.append(
            f"{ram_free / GIB:.1f} GiB of RAM are free and {workers} workers take about {needed / GIB:.1f} GiB: "
            f"use --workers {fit} or a smaller --batch-size"
        )
    return found


def free_ram():
    """Bytes of RAM that may still be taken, of the machine or of its container, if that is less; None: unknown."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    cap, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if cap.is_file() and used.is_file() and cap.read_text().strip().isdigit():
        limits.append(max(0, int(cap.read_text()) - int(used.read_text())))
    return min(limits, default=None)


def check_batch(run, batch_size, accumulate=1):
    """UsageError where a batch does not part evenly into processes, GPUs and pieces."""
    gpus = max(1, len(run.gpus))
    parts = run.world * gpus * accumulate
    if batch_size % parts:
        raise UsageError(
            f"--batch-size {batch_size} is no multiple of {parts} ({run.world} processes x {gpus} GPUs x "
            f"--accumulate {accumulate}); use --batch-size {-(-batch_size // parts) * parts}"
        )


def memory_peaks(run, workers, batch_bytes):
    """One line for --preflight: the peaks of GPU memory and RAM so far, and what workers keep in shared memory."""
    shared = workers * PREFETCH * batch_bytes / MB
    return (
        f"peak GPU memory {peak_memory(run.device) / MB:.0f} MB, RAM {peak_ram() / MB:.0f} MB; "
        f"{workers} workers keep {shared:.0f} MB of batches in shared memory"
    )


@contextmanager
def memory_advice(run, image_size, batch_size, accumulate=1):
    """Turn a GPU's out-of-memory error into a UsageError with `out_of_memory_hint`."""
    try:
        yield
    except torch.OutOfMemoryError as fault:
        raise UsageError(out_of_memory_hint(run, image_size, batch_size, accumulate)) from fault


def out_of_memory_hint(run, image_size, batch_size, accumulate=1):
    """What to say when the GPU is full: peak, image size (h, w), and the next flag to change -> str.

    batch_size: images a step over all processes, computed in `accumulate` pieces.
    """
    devices = run.world * max(1, len(run.gpus))
    piece = -(-batch_size // (devices * accumulate))
    if piece > 1:
        flag = f"--accumulate {2 * accumulate} (the same batch in smaller pieces)"
    elif run.precision == torch.float32:
        flag = "--precision bf16"
    elif batch_size > devices:
        flag = f"--batch-size {devices}"
    else:
        flag = "smaller images (the flag for their size), or a smaller --net"
    total = torch.cuda.get_device_properties(run.device).total_memory / GIB if run.device.type == "cuda" else 0
    return (
        f"{run.device} is out of memory: peak {peak_memory(run.device) / GIB:.1f} of {total:.1f} GiB "
        f"with {piece} images of {image_size[0]} x {image_size[1]} at a time; next, try {flag}"
    )


def _choose(device, gpus, world):
    """-> (torch.device, GPU numbers of this process)"""
    if device not in ("auto", "cpu", "cuda") and not (device.startswith("cuda:") and device[5:].isdigit()):
        raise UsageError(f"--device {device}: use auto, cpu, cuda, or one GPU like cuda:1")
    if gpus and (device == "cpu" or device.startswith("cuda:")):
        raise UsageError(f"--gpus {gpus} and --device {device} contradict each other; give one of them")
    if device == "cpu" or (device == "auto" and not gpus and not torch.cuda.is_available()):
        return torch.device("cpu"), ()
    flag, remedy = f"--gpus {gpus}" if gpus else f"--device {device}", ""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "torch sees no GPU (is the driver running?)" if built else "this torch was built without CUDA"
        raise UsageError(f"{flag}: {reason}; use --device cpu, or install what is missing")
    if gpus:
        numbers = _gpu_numbers(gpus)
    elif world > 1:
        numbers = (int(os.environ.get("LOCAL_RANK", 0)),)
        flag, remedy = f"torchrun process {numbers[0]}", "; use a smaller --nproc-per-node, or --device cpu"
        if device.startswith("cuda:"):
            raise UsageError(f"--device {device} under torchrun: each process takes its own GPU; use --device cuda")
    else:
        numbers = (int(device[5:]) if device.startswith("cuda:") else 0,)
    count = torch.cuda.device_count()
    if max(numbers) >= count:
        raise UsageError(f"{flag}: there is no GPU {max(numbers)}; this machine has {count}, counted from 0{remedy}")
    return torch.device("cuda", numbers[0]), numbers


def _gpu_numbers(gpus):
    words = [word.strip() for word in gpus.split(",")]
    if not all(word.isdigit() for word in words) or len(set(words)) < len(words):
        raise UsageError(f"--gpus {gpus}: give different GPU numbers separated by commas, like 0,1")
    return tuple(int(word) for word in words)


def _choose_precision(precision, device):
    if precision not in ("auto", *DTYPES):
        raise UsageError(f"--precision {precision}: use auto, {', '.join(DTYPES)}")
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.bfloat16 if native else torch.float32
    if precision == "bf16" and device.type == "cuda" and not native:
        raise UsageError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} does not compute in it; use fp16 or fp32"
        )
    if precision == "fp16" and device.type == "cpu":
        warnings.warn("--precision fp16 on a CPU is slow; bf16 or fp32 is meant for it", stacklevel=3)
    return DTYPES[precision]


def _updates_statistics(net):
    """Whether a training forward of `net`, in its present mode, writes batch norm statistics."""
    return any(isinstance(m, BATCH_NORM) and m.training and m.track_running_stats for m in net.modules())
