"""A training script, run by its `main`, and what happened in it."""

import contextlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from training import distributed
from training.logger import Logger

WAIT = "called a synchronizing CUDA operation"  # the warning of torch.cuda.set_sync_debug_mode


@dataclass
class Record:
    """What `record` saw; tensors are on the CPU.

    out          run folder
    run          training.distributed.Run
    metrics      what main returned
    losses       of each step: loss term -> float
    outputs      of the network in the first step: a tensor, or name -> tensor
    gradients    of the first step: name of the parameter -> tensor
    step_waits   step -> the lines that waited for the GPU, of the steps that did not log
    batch_waits  the same of each batch of all evaluations
    """

    out: Path
    run: distributed.Run | None = None
    metrics: dict | None = None
    losses: list = field(default_factory=list)
    outputs: torch.Tensor | dict | None = None
    gradients: dict = field(default_factory=dict)
    step_waits: dict = field(default_factory=dict)
    batch_waits: list = field(default_factory=list)


def record(script, out, *words):
    """Run a Script of tests.script_helpers with more flags, and return its Record. It logs where an epoch or the run
    ends, unless flags say otherwise. What is recorded makes no step wait for the GPU but the first."""
    seen = Record(Path(out))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "init", _keep_run(distributed.init, seen))
        patch.setattr(distributed.Run, "wrap", _keep_outputs(distributed.Run.wrap, seen))
        patch.setattr(script.module.optim, "step", _keep_gradients(script.module.optim.step, seen))
        patch.setattr(Logger, "add", _keep_losses(Logger.add, seen))
        patch.setattr(Logger, "steps", _count_in_steps(Logger.steps, seen))
        patch.setattr(Logger, "log_losses", _drop_logged_step(Logger.log_losses, seen))
        patch.setattr(script.module, "evaluate", _count_in_batches(script.module.evaluate, seen))
        seen.metrics = script.main(out, "--log-every", 99, "--validation-epochs", 99, *words)
    seen.losses = [{name: float(value) for name, value in losses.items()} for losses in seen.losses]
    return seen


def _keep_run(init, seen):
    def replacement(args):
        seen.run = init(args)
        return seen.run

    return replacement


def _keep_outputs(wrap, seen):
    def hook(net, inputs, outputs):
        if seen.outputs is None and net.training:
            is_dict = isinstance(outputs, dict)
            seen.outputs = {k: on_cpu(v) for k, v in outputs.items()} if is_dict else on_cpu(outputs)

    def replacement(self, net, *args, **options):
        net.register_forward_hook(hook)
        return wrap(self, net, *args, **options)

    return replacement


def _keep_gradients(step, seen):
    def replacement(optimizer, scaler, net, *args):
        if not seen.gradients:
            named = net.named_parameters()
            seen.gradients = {name: on_cpu(p.grad) for name, p in named if p.grad is not None}
        step(optimizer, scaler, net, *args)

    return replacement


def _keep_losses(add, seen):
    def replacement(self, step, losses, *args):
        seen.losses.append({name: value.detach() for name, value in losses.items()})
        add(self, step, losses, *args)

    return replacement


def _count_in_steps(steps, seen):
    def replacement(self, loader):
        for step, item in enumerate(steps(self, loader), start=1):
            seen.step_waits[step] = []
            with counted_waits(self.run.device, seen.step_waits[step]):
                yield item

    return replacement


def _drop_logged_step(log_losses, seen):
    def replacement(self, *args, **options):
        seen.step_waits.popitem()
        return log_losses(self, *args, **options)

    return replacement


def _count_in_batches(evaluate, seen):
    def counted(loader):
        for batch in loader:
            seen.batch_waits.append([])
            with counted_waits(seen.run.device, seen.batch_waits[-1]):
                yield batch

    return lambda net, loader, *args, **options: evaluate(net, counted(loader), *args, **options)


@contextlib.contextmanager
def counted_waits(device, places):
    """Append to `places` the line of every operation of the block that waits for the GPU, as far as torch notices."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            places += [f"{w.filename}:{w.lineno}" for w in caught if WAIT in str(w.message)]


def on_cpu(value):
    return value.detach().cpu().float().clone() if torch.is_tensor(value) else value
