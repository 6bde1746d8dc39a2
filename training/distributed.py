"""Devices and processes: with memory.py and connection.py, the one place that knows CUDA, DataParallel and
torch.distributed.

One process uses the CPU, one GPU, or several by `--gpus 0,1` (DataParallel). Under torchrun each process has its own
GPU (NCCL), or all share the CPUs (gloo). With one process every collective below is the identity, so a training loop
has no branch.
"""

import argparse
import os
import random
import re
import socket
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from training.connection import connect
from utils.errors import UsageError, UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_WORKERS = 16  # of --workers auto: more take memory and are rarely faster
# Start of an architecture's name -> why no setting makes it deterministic on a GPU
NOT_DETERMINISTIC = {
    "maskrcnn": "the gradient of RoIAlign on a GPU is added in any order",
    "centerfusion_dla34": "the gradient of deformable convolutions on a GPU is added in any order",
}
BATCH_NORM = nn.modules.batchnorm._BatchNorm

Part = TypeVar("Part")


@dataclass(frozen=True)
class Run:
    """The device of this process, and its place among the processes."""

    device: torch.device
    rank: int
    world_size: int  # number of processes
    gpus: tuple[int, ...]  # GPUs of this process; more than one means DataParallel
    precision: torch.dtype  # of the forward pass under autocast: float32, bfloat16 or float16
    scaler: torch.amp.GradScaler  # disabled except for float16
    seed: int
    waiting: dist.ProcessGroup | None = None  # gloo with connection.WAIT_TIMEOUT; None with one process
    inexact: str = ""  # why a resumed run may differ from an uninterrupted one in the last bits; "": it does not

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def pin_memory(self) -> bool:
        return self.device.type == "cuda"

    def print(self, line: str) -> None:
        """Print a line, in the main process only."""
        if self.is_main:
            print(line, flush=True)

    def autocast(self) -> AbstractContextManager:
        """A new context that computes in `precision`; a no-op for float32."""
        if self.precision == torch.float32:
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=self.precision)

    def seed_step(self, step: int) -> None:
        """Seed what is random in a step (dropout, mixup) from seed, step and process, so that a resume is exact."""
        torch.manual_seed(int(np.random.SeedSequence((self.seed, step, self.rank)).generate_state(1, np.uint64)[0]))

    def wrap(
        self, net: nn.Module, sync_bn: bool = False, compile: bool = False, dynamic: bool | None = None
    ) -> nn.Module:
        """The callable for the training forward pass: it takes and returns batch-first tensors only.

        The network itself stays unwrapped and shares its parameters with the wrapper: save, evaluate and average the
        network. Call this after freezing: processes share batch norm statistics only if training updates them.
        dynamic is torch.compile's: True if images differ in size from batch to batch, so that all use the same code.
        """
        if len(self.gpus) > 1:
            if compile or sync_bn:
                flag = "--compile" if compile else "--sync-bn"
                raise UsageError(f"{flag} does not work with several --gpus; use torchrun --nproc-per-node instead")
            return nn.DataParallel(_Autocast(net, self), device_ids=list(self.gpus))
        if sync_bn and self.device.type != "cuda":
            raise UsageError(f"--sync-bn needs GPUs and this run is on {self.device}; use --freeze-bn, or neither")
        if self.world_size > 1:
            if sync_bn:
                net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # in place; parameters stay the same objects
            norms = [module for module in net.modules() if isinstance(module, BATCH_NORM)]
            # This copies rank 0's parameters and buffers to all processes. After that, each forward starts from rank
            # 0's running statistics: rank 0 writes the checkpoint, so a resumed run sees what the uninterrupted one
            # saw. Frozen statistics stay equal, and writing to them would break a second forward before the backward.
            gpus = list(self.gpus) or None
            net = nn.parallel.DistributedDataParallel(net, device_ids=gpus, gradient_as_bucket_view=True)
            net.broadcast_buffers = any(norm.training and norm.track_running_stats for norm in norms)
        return torch.compile(net, dynamic=dynamic) if compile else net  # DDP first: the graph is split at its buckets

    def sync_last(self, wrapped: nn.Module, parts: Iterable[Part]) -> Iterator[Part]:
        """Yield the micro-batches `parts` of a batch; processes exchange gradients in the last backward pass only.

        wrapped: of `wrap`
        """
        parts = list(parts)
        for part in parts[:-1]:
            with wrapped.no_sync() if self.world_size > 1 else nullcontext():
                yield part
        yield from parts[-1:]

    def mean(self, value: float | torch.Tensor) -> torch.Tensor:
        """Mean of a number or tensor (any shape) over the processes: a float tensor without gradient, same shape."""
        tensor = torch.as_tensor(value, device=None if torch.is_tensor(value) else self.device).detach()
        if not tensor.is_floating_point():
            tensor = tensor.float()
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def max(self, value: int) -> int:
        """The largest `value` of all processes. It never waits for a GPU: the tensor is on the CPU."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, value: Any) -> list:
        """The `value` (any picklable object) of every process, in rank order; waits up to connection.WAIT_TIMEOUT."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.waiting)
        return values

    def set_eval_mode(self, net: nn.Module) -> None:
        """Put `net` into evaluation mode, with rank 0's batch norm statistics in every process, because each evaluates
        a share of the images."""
        net.eval()
        if self.world_size > 1:
            for norm in (module for module in net.modules() if isinstance(module, BATCH_NORM)):
                for buffer in norm.buffers():
                    dist.broadcast(buffer, src=0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """`with run.main_first():` the main process runs the block, then the first one of each other machine, then the
        rest, so that they can read what it cached. Errors are raised as `raise_in_all` does."""
        turn = 0 if self.is_main else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
        for now in range(3):
            with self.raise_in_all():
                if now == turn:
                    yield

    @contextmanager
    def raise_in_all(self) -> Iterator[None]:
        """`with run.raise_in_all():` waits until every process has left the block. A UserError in one is raised in all,
        and printed once per machine; any other exception ends the others with exit code 1."""
        error = reason = None
        try:
            yield
        except Exception as raised:
            error, reason = raised, str(raised) if isinstance(raised, UserError) else ""
        hosts, reasons = zip(*self.gather((socket.gethostname(), reason)))
        rank = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
        if rank is None:
            return
        if error is None:
            if not reasons[rank]:
                raise SystemExit(1)  # the other process prints its traceback
            error = UsageError(f"process {rank} on {hosts[rank]}: {reasons[rank]}" if rank else reasons[rank])
        if isinstance(error, UserError) and self.world_size > 1:
            error.is_printed = os.environ.get("LOCAL_RANK", "0") == "0"
        raise error

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            # A thread of gloo frees the tensors of the last collective, for which it needs Python's lock. When the
            # group is freed, torch 2.11 waits for that thread while holding the lock, so let it finish before.
            time.sleep(0.1)
            dist.destroy_process_group()


class _Autocast(nn.Module):
    """A network whose forward enters autocast itself: the threads of DataParallel do not inherit its dtype."""

    def __init__(self, net, run):
        super().__init__()
        self.net, self.run = net, run

    def forward(self, *inputs, **options):
        with self.run.autocast():
            return self.net(*inputs, **options)


def init(args: argparse.Namespace) -> Run:
    """`init_device` with the flags of training.cli, of which --workers auto and --deterministic get their values.

    UsageError also if a batch cannot be split evenly.
    """
    run = init_device(args.device, args.gpus, args.precision, args.seed)
    if args.deterministic is None:
        args.deterministic = run.device.type != "cuda" or not args.arch.startswith(tuple(NOT_DETERMINISTIC))
    # where sizes of images change, kernels would be timed again and again
    set_deterministic(args.deterministic, fixed_size="min_side" not in args)
    run = replace(run, inexact=why_inexact(run, args))
    if args.workers is None:
        args.workers, reason = choose_workers(run.device)
        run.print(f"--workers {args.workers}: {reason}")
    idle = idle_gpus(args, run.world_size)
    if idle:
        run.print(idle)
    gpus = max(1, len(run.gpus))
    parts = run.world_size * gpus * args.accumulate
    if args.batch_size % parts:
        raise UsageError(
            f"--batch-size {args.batch_size} is no multiple of {parts} ({run.world_size} processes x {gpus} GPUs x "
            f"--accumulate {args.accumulate}); use --batch-size {-(-args.batch_size // parts) * parts}"
        )
    return run


def init_device(device: str = "auto", gpus: str = "", precision: str = "auto", seed: int = 0) -> Run:
    """Choose device, processes and precision, seed everything, ask for deterministic kernels.

    device: auto, cpu, cuda, cuda:N. gpus: "" or GPU numbers separated by commas. precision: auto, fp32, bf16, fp16.
    UsageError if the machine or another flag does not allow it.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ["RANK"]) if world_size > 1 else 0
    chosen, numbers = _choose_device(device, gpus, world_size)
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once by cuBLAS; its deterministic setting
        torch.cuda.set_device(chosen)
    dtype = _choose_precision(precision, chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    waiting = connect(backend, rank, world_size) if world_size > 1 else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    set_deterministic(True)
    scaler = torch.amp.GradScaler(chosen.type, enabled=dtype == torch.float16)
    return Run(chosen, rank, world_size, numbers, dtype, scaler, seed, waiting)


def set_deterministic(on: bool, fixed_size: bool = False) -> None:
    """--deterministic: kernels that give the same bits in every run. Without it a GPU may use faster ones, and TF32 for
    float32.

    fixed_size   all images have one size: cuDNN may then time its kernels and pick the fastest
    """
    torch.backends.cudnn.benchmark = fixed_size and not on
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not on
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and changes no result of ours


def why_inexact(run: Run, args: argparse.Namespace) -> str:
    """Why a resumed run may differ from an uninterrupted one in the last bits; "" if it does not."""
    if run.world_size > 2:
        return "more than two processes add gradients in another order in the first step after a resume"
    if run.device.type != "cuda":
        return ""
    for name, reason in NOT_DETERMINISTIC.items():
        if args.arch.startswith(name):
            return reason
    if args.deterministic is False:
        return "--no-deterministic lets the GPU add in any order"
    if args.arch in ("vgg16", "vgg16_bn") and args.resolution % 224:
        return "on a GPU, the gradient of adaptive pooling has a fixed order only for sizes that are multiples of 224"
    return ""


def local_processes() -> int:
    """The number of training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cores() -> int:
    """The number of CPU cores that this process may use: those of its affinity mask, within its container's limit."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, *period = limit.read_text().split() if limit.is_file() else ["max"]
    return count if quota == "max" else max(1, min(count, int(quota) // int(period[0])))


def choose_workers(device: torch.device) -> tuple[int, str]:
    """(data loading processes of this process, the reason), for --workers auto."""
    processes, count = local_processes(), cores()
    shared = f"{count} cores" + (f" for {processes} processes" if processes > 1 else "")
    if device.type == "cuda":
        return max(1, min(MAX_WORKERS, count // processes)), f"{shared}, at most {MAX_WORKERS}"
    return max(1, min(2, count // processes)), f"{shared}, which the network on the CPU needs too"


def idle_gpus(args: argparse.Namespace, world_size: int) -> str:
    """A line about GPUs that this run does not use, "" if there are none."""
    if args.device not in ("auto", "cuda") or args.gpus or world_size > 1 or not torch.cuda.is_available():
        return ""
    count, script = torch.cuda.device_count(), os.path.basename(sys.argv[0])
    if count < 2:
        return ""
    command = f"torchrun --nproc-per-node {count} {script} ..."
    return f"{count} GPUs are visible, 1 is used: {command} uses all, --device cuda:0 only this one"


def computes_bf16(device: torch.device) -> bool:
    """Whether a GPU, or the CPU (AMX, AVX512-BF16), computes in bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has finished its work, before a clock is read; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def gpu_names() -> list[str]:
    """The names of this machine's GPUs, in order; [] without any."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def describe(run: Run) -> str:
    """Device, precision and processes in one line, to print at the start of a run."""
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        place = f"{run.device} {properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
        if len(run.gpus) > 1:
            place += f", DataParallel on GPUs {', '.join(map(str, run.gpus))}"
    else:
        place = f"cpu, {torch.get_num_threads()} threads"
    name = next(name for name, dtype in DTYPES.items() if dtype == run.precision)
    processes = f", process {run.rank + 1} of {run.world_size}" if run.world_size > 1 else ""
    return f"{place}, {name}{processes}"


def _choose_device(device, gpus, world_size):
    """(torch.device, GPU numbers of this process)"""
    if gpus == "-1":  # CenterNet's word for the CPU
        device, gpus = "cpu", ""
    one_gpu = re.fullmatch(r"cuda:(\d+)", device)
    if device not in ("auto", "cpu", "cuda") and not one_gpu:
        raise UsageError(f"--device {device}: use auto, cpu, cuda, or one GPU like cuda:1")
    if gpus and world_size > 1:
        raise UsageError(f"--gpus {gpus} under torchrun: each process has its own GPU; use --gpus or torchrun")
    if gpus and (device == "cpu" or one_gpu):
        raise UsageError(f"--gpus {gpus} and --device {device} contradict each other; give one of them")
    if device == "cpu" or (device == "auto" and not gpus and not torch.cuda.is_available()):
        return torch.device("cpu"), ()
    flag, remedy = f"--gpus {gpus}" if gpus else f"--device {device}", ""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "torch sees no GPU (is the driver running?)" if built else "this torch was built without CUDA"
        raise UsageError(f"{flag}: {reason}; use --device cpu{' instead' if gpus else ''}, or install what is missing")
    if gpus:
        numbers = _gpu_numbers(gpus)
    elif world_size > 1:
        numbers = (int(os.environ.get("LOCAL_RANK", 0)),)
        flag, remedy = f"torchrun process {numbers[0]}", "; use a smaller --nproc-per-node, or --device cpu"
        if one_gpu:
            raise UsageError(f"--device {device} under torchrun: each process takes its own GPU; use --device cuda")
    else:
        numbers = (int(one_gpu[1]) if one_gpu else 0,)
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
    native = computes_bf16(device)
    if precision == "auto":
        return torch.bfloat16 if native else torch.float32
    if precision == "bf16" and device.type == "cuda" and not native:
        raise UsageError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} does not compute in it; use fp16 or fp32"
        )
    if precision == "fp16" and device.type == "cpu":
        warnings.warn("--precision fp16 is slow on a CPU; use bf16 or fp32 there", stacklevel=3)
    return DTYPES[precision]
