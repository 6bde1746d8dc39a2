"""Devices and processes: with training/memory.py, the one place that knows CUDA, DataParallel and torch.distributed.

One process uses the CPU, one GPU, or several by `--gpus 0,1` (DataParallel). Under torchrun each process has its own
GPU (NCCL), or all share the CPUs (gloo). With one process every collective below is the identity, so a training loop
has no branch.
"""

import argparse
import os
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from utils.errors import UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_NORM = nn.modules.batchnorm._BatchNorm


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
            net = nn.parallel.DistributedDataParallel(net, device_ids=list(self.gpus) or None)
            net.broadcast_buffers = any(norm.training and norm.track_running_stats for norm in norms)
        return torch.compile(net, dynamic=dynamic) if compile else net  # DDP first: the graph is split at its buckets

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
        """The `value` (any picklable object) of every process, in rank order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
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
        """`with run.main_first():` the main process runs the block, then the others, which can read what it cached."""
        if self.world_size > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.world_size > 1 and self.is_main:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
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
    """`init_device` with the flags of training.cli; UsageError also if a batch cannot be split evenly."""
    run = init_device(args.device, args.gpus, args.precision, args.seed)
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
    if world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))  # one process may score while the rest wait
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False  # it picks kernels by timing them: another run may pick others
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and changes no result of ours
    scaler = torch.amp.GradScaler(chosen.type, enabled=dtype == torch.float16)
    return Run(chosen, rank, world_size, numbers, dtype, scaler, seed)


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
        raise UsageError(f"{flag}: {reason}; use --device cpu, or install what is missing")
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
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.bfloat16 if native else torch.float32
    if precision == "bf16" and device.type == "cuda" and not native:
        raise UsageError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} does not compute in it; use fp16 or fp32"
        )
    if precision == "fp16" and device.type == "cpu":
        warnings.warn("--precision fp16 is slow on a CPU; use bf16 or fp32 there", stacklevel=3)
    return DTYPES[precision]
