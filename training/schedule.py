"""Learning rate and cadence as pure functions of the step; one schedule, `Plateau`, looks at the loss too.

A factor multiplies each parameter group's own base rate. Steps count from 0 here: the first update of a run uses the
factor of step 0. Nothing is remembered between calls, so a resumed run continues with the rate it would have had.
"""

import math
from bisect import bisect_right

NAMES = ("constant", "cosine", "multi-step")


def constant(step):
    return 1.0


def cosine(step, total, floor=0.0):
    """Half a cosine from 1 at step 0 to `floor` at `total`, and `floor` from there on: it never rises again."""
    if total <= 0:
        raise ValueError(f"cosine needs a length of at least one step, not {total}")
    progress = min(max(step / total, 0.0), 1.0)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def multi_step(step, milestones, gamma):
    """`gamma` to the power of the milestones reached; a milestone (in steps) counts from its own step on."""
    return gamma ** bisect_right(sorted(milestones), step)


def warmup(step, steps):
    """Straight line from 1 / steps at step 0 to 1 at step `steps - 1`; 1 after that, and always 1 where steps is 0."""
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0


def lr_factor(name, step, *, total=0, floor=0.0, milestones=(), gamma=0.1, warmup_steps=0):
    """The schedule `name` (one of NAMES) at `step`, times its warm-up. ValueError for another name."""
    if name == "constant":
        factor = constant(step)
    elif name == "cosine":
        factor = cosine(step, total, floor)
    elif name == "multi-step":
        factor = multi_step(step, milestones, gamma)
    else:
        raise ValueError(f"no schedule {name!r}: use one of {', '.join(NAMES)}")
    return factor * warmup(step, warmup_steps)


class Plateau:
    """A factor on the learning rate that falls where the loss of the epochs no longer does.

    After more than `patience` epochs in a row whose mean loss is not below the best one by a ten-thousandth of it, the
    factor is multiplied by `gamma` (as torch's ReduceLROnPlateau does by default). With patience 0 the factor stays 1
    and the state is empty. The one schedule that remembers: it goes into the checkpoint.
    """

    def __init__(self, patience, gamma=0.1):
        self.patience, self.gamma = patience, gamma
        self.factor, self.best, self.stale = 1.0, math.inf, 0
        self.loss, self.steps = 0.0, 0  # of the present epoch: sum over its steps, and how many

    def add(self, loss, steps, ends_epoch=False):
        """Note the mean loss over the last `steps` steps; at an epoch's end compare it with the best one."""
        self.loss += loss * steps
        self.steps += steps
        if not ends_epoch:
            return
        mean = self.loss / max(1, self.steps)
        self.loss, self.steps = 0.0, 0
        if mean < self.best * (1 - 1e-4):
            self.best, self.stale = mean, 0
            return
        self.stale += 1
        if self.patience and self.stale > self.patience:
            self.factor, self.stale = self.factor * self.gamma, 0

    def state_dict(self):
        names = ("factor", "best", "stale", "loss", "steps")
        return {name: getattr(self, name) for name in names} if self.patience else {}

    def load_state_dict(self, state):
        """Continue from `state_dict()`. KeyError names what is missing."""
        for name in self.state_dict():
            setattr(self, name, state[name])


def due(step, every, total):
    """Whether something done every `every` steps is done after `step` (from 1): always after the last; never if 0."""
    return every > 0 and (step % every == 0 or step == total)


def copies(epoch, step, every_epochs, every_steps):
    """Which numbered copies of a checkpoint are due -> {"epoch_copy": number or None, "step_copy": number or None}.

    epoch: epochs done if `step` completed one, else 0. 0 in place of an `every` is off.
    """
    pairs = {"epoch_copy": (epoch, every_epochs), "step_copy": (step, every_steps)}
    return {name: n if n > 0 and every > 0 and n % every == 0 else None for name, (n, every) in pairs.items()}
