"""The plan of a run: how many steps it has, the learning rate of each, and what is due after each."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch

from training import schedule
from training.checkpoint import Progress
from utils.errors import UsageError

PLATEAU_PATIENCE = 3  # epochs
MAX_AUTO_WARMUP = 1001  # steps, the last of which has the whole learning rate, as in torchvision's references


@dataclass(frozen=True)
class Due:
    """What is due after a step."""

    epoch: int  # the number of complete epochs, if this step completed one; else 0
    steps: int  # since losses were last logged
    log: bool
    validate: bool
    save: bool
    stop: bool


class Plan:
    """Total steps, learning rates and what is due when, from the flags of training.cli.

    num_images    size of the training set
    print         prints a line, a warning about the learning rate

    total_steps   of the run
    plateau       the state of --scheduler plateau, which is part of the checkpoint
    """

    def __init__(self, args: argparse.Namespace, num_images: int, print: Callable[[str], object] = print):
        """UsageError if --scale-lr is given without the batch size that the learning rates are for."""
        self.args, self.num_images = args, num_images
        self.length = args.steps or self.steps_in(args.epochs)  # --max-steps does not change the schedule
        self.total_steps = 1 if args.preflight else min(self.length, args.max_steps or self.length)
        self.milestones = args.milestone_steps or [self.steps_in(epoch) for epoch in args.milestones]
        first_epoch = min(MAX_AUTO_WARMUP, int(self.steps_in(1)))
        self.warmup_steps = first_epoch if args.warmup_steps is None else args.warmup_steps
        self.lr_scale = 1.0
        if not args.eval_only:
            self.lr_scale = lr_scale(args.batch_size, args.lr_batch_size, args.scale_lr, print)
        self.plateau = schedule.Plateau(PLATEAU_PATIENCE if args.scheduler == "plateau" else 0, args.gamma)
        self._steps_to_log = 0

    def steps_in(self, epochs: float) -> float:
        """Steps after which `epochs` epochs have been seen; an int for whole epochs."""
        return -(-epochs * self.num_images // self.args.batch_size)

    def epochs_completed(self, step: int) -> int:
        """The number of complete epochs after `step`, if `step` completed one; else 0."""
        epochs = step * self.args.batch_size // self.num_images
        return epochs if epochs > (step - 1) * self.args.batch_size // self.num_images else 0

    def lr_factor(self, step: int) -> float:
        """The factor of --scheduler and warm-up for the update after `step` steps, without that of the plateau."""
        args, factor = self.args, 1.0
        if args.scheduler == "cosine":
            factor = schedule.cosine(step, self.steps_in(args.t_max) if args.t_max else self.length)
        elif args.scheduler == "multi-step":
            factor = schedule.multi_step(step, self.milestones, args.gamma)
        return factor * schedule.warmup(step, self.warmup_steps, args.warmup_factor)

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rate for the update after `step` steps: each group's `base_lr` times the schedule."""
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.lr_scale * self.lr_factor(step) * self.plateau.factor

    def start(self, progress: Progress) -> Due:
        """What is due before the first step: the validation of a run that was interrupted before its end, and to stop
        if no step is left."""
        over, preflight = progress.step >= self.total_steps, self.args.preflight
        return Due(0, 0, False, progress.validation_due and not preflight, False, over and not preflight)

    def advance(self, progress: Progress, stopping: bool = False) -> Due:
        """Count a step as completed in `progress`; returns what is due after it.

        stopping: a signal asked to stop. A validation is then left to the run that continues this one.
        """
        args = self.args
        progress.step = step = progress.step + 1
        epoch = self.epochs_completed(step)
        progress.epoch = epoch or progress.epoch
        last = step >= self.total_steps
        if args.validation_steps:
            validate = _every(step, args.validation_steps)
        else:
            validate = _every(epoch, args.validation_epochs)
        progress.validation_due = validate or last
        save = progress.validation_due or stopping or epoch > 0 or bool(self.copies(step))
        log = save or _every(step, args.log_every)
        self._steps_to_log += 1
        due = Due(epoch, self._steps_to_log, log, progress.validation_due and not stopping, save, stopping or last)
        if log:
            self._steps_to_log = 0
        return due

    def copies(self, step: int) -> list[str]:
        """Names of the numbered checkpoints to keep of `step`."""
        args, epoch, names = self.args, self.epochs_completed(step), []
        if _every(epoch, args.save_every_epochs) or (epoch and epoch in args.save_epochs):
            names.append(f"epoch_{epoch:03d}.pt")
        if _every(step, args.save_every_steps):
            names.append(f"step_{step:06d}.pt")
        return names

    def is_stale(self, progress: Progress) -> bool:
        """Whether --patience stops the run."""
        return 0 < self.args.patience <= progress.stale and not self.args.preflight

    def record_loss(self, due: Due, loss: float) -> None:
        """Pass the mean loss since losses were last logged to --scheduler plateau."""
        self.plateau.add(loss, due.steps, ends_epoch=due.epoch > 0)


def lr_scale(batch_size: int, lr_batch_size: int, scale: bool, print: Callable[[str], object] = print) -> float:
    """Factor on learning rates that are for another batch size, linear in it (Goyal et al. 2017).

    lr_batch_size   the batch size that the learning rates are for, 0 if unknown
    scale           --scale-lr; without it the factor is 1 and a warning names the one it would be
    """
    if scale and not lr_batch_size:
        raise UsageError("--scale-lr: the batch size that the learning rates are for is unknown; give --lr-batch-size")
    factor = batch_size / lr_batch_size if lr_batch_size else 1.0
    if factor != 1 and not scale:
        print(
            f"WARNING: the learning rates are for batch size {lr_batch_size}, this run has {batch_size}: "
            f"--scale-lr would multiply them by {factor:g}"
        )
        return 1.0
    return factor


def _every(number, interval):
    """Whether something done every `interval` epochs or steps is done after `number` of them; never if either is 0."""
    return number > 0 and interval > 0 and number % interval == 0
