"""Learning rate schedules as pure functions of the step, so that a resumed run needs no state to continue exactly.

A factor multiplies each parameter group's own base learning rate. Steps count from 0: the first update of a run uses
the factor of step 0. Only `Plateau`, which looks at the loss, has a state; it is part of the checkpoint.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

MIN_IMPROVEMENT = 1e-4  # of the best loss: a smaller one does not count for Plateau


def cosine(step: int, total: float) -> float:
    """Half a cosine from 1 at step 0 to 0 at `total`, and 0 from there on: it never rises again."""
    if total <= 0:
        raise ValueError(f"cosine needs a length of at least one step, not {total}")
    return 0.5 * (1.0 + math.cos(math.pi * min(max(step / total, 0.0), 1.0)))


def multi_step(step: int, milestones: Sequence[float], gamma: float) -> float:
    """`gamma` to the power of the number of milestones (in steps) reached; at the milestone itself it is reached."""
    return gamma ** bisect_right(sorted(milestones), step)


def warmup(step: int, steps: int, start: float | None = None) -> float:
    """Linear from `start` (None: 1 / steps) at step 0 to 1 at step `steps - 1`; 1 after that, and for steps below 2."""
    if step >= steps - 1:
        return 1.0
    start = 1 / steps if start is None else start
    return start + (1 - start) * step / (steps - 1)


class Plateau:
    """A factor on the learning rate that falls when the mean loss of the epochs no longer does.

    After more than `patience` epochs in a row without a new best loss, the factor is multiplied by `gamma`, as torch's
    ReduceLROnPlateau does by default. With patience 0 the factor stays 1 and the state is empty.
    """

    def __init__(self, patience: int, gamma: float = 0.1):
        self.patience, self.gamma = patience, gamma
        self.factor, self.best, self.stale = 1.0, math.inf, 0
        self.loss, self.steps = 0.0, 0  # of the current epoch: sum over its steps, and their number

    def add(self, loss: float, steps: int, ends_epoch: bool = False) -> None:
        """Add the mean loss over the last `steps` steps; at the end of an epoch compare the epoch's with the best."""
        self.loss += loss * steps
        self.steps += steps
        if not ends_epoch:
            return
        mean = self.loss / max(1, self.steps)
        self.loss, self.steps = 0.0, 0
        if mean < self.best * (1 - MIN_IMPROVEMENT):
            self.best, self.stale = mean, 0
            return
        self.stale += 1
        if self.patience and self.stale > self.patience:
            self.factor, self.stale = self.factor * self.gamma, 0

    def state_dict(self) -> dict:
        names = ("factor", "best", "stale", "loss", "steps")
        return {name: getattr(self, name) for name in names} if self.patience else {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`. KeyError names a missing field."""
        for name in self.state_dict():
            setattr(self, name, state[name])
