"""Losses, collected on their device and read only when they are logged, so that no step waits for the GPU."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from utils.errors import UserError


class NonFiniteLoss(UserError):
    """A loss is nan or infinite.

    step, images, losses   of that step: its number, the image ids of its batch, loss term -> float
    paths                  the files of the images, [] if unknown

    The message ends with `remedy`.
    """

    def __init__(
        self, step: int, images: Iterable[int], losses: Mapping[str, float], paths: Sequence[str] = (), remedy: str = ""
    ):
        self.step, self.images, self.losses, self.paths = step, list(images), dict(losses), list(paths)
        terms = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        shown = ", ".join(map(str, self.paths or self.images))
        super().__init__(f"non-finite loss at step {step}: {terms}; images {shown}{remedy and '; '}{remedy}")


class Meter:
    """Means of loss terms over steps.

    max_nonfinite   how many non-finite steps in a row are left out before `read` raises an error. A GradScaler skips
                    such steps, and a few are normal
    """

    def __init__(self, max_nonfinite: int = 0):
        self.max_nonfinite = max_nonfinite
        self._nonfinite = 0  # the latest steps in a row
        self._names = None
        self._steps = {}  # step -> (image ids, [terms float32 [T] on their device, one per micro-batch])

    def add(self, step: int, terms: Mapping[str, torch.Tensor], image_ids: Iterable[int]) -> None:
        """Add the terms (name -> 0-d tensor) of a batch, or of one of its micro-batches, which are summed."""
        if self._steps and self._names != tuple(terms):
            raise ValueError(f"terms {tuple(terms)} follow {self._names}: read the meter in between")
        self._names = tuple(terms)
        _, micro_batches = self._steps.setdefault(step, (image_ids, []))
        micro_batches.append(torch.stack([value.detach().float() for value in terms.values()]))

    def read(self) -> dict[str, float]:
        """Mean of each term over the finite steps since the last read; {} if there was no step.

        One copy from the device. NonFiniteLoss names the step that is one too many.
        """
        if not self._steps:
            return {}
        steps, self._steps = self._steps, {}
        values = torch.stack([terms for _, batches in steps.values() for terms in batches]).cpu().double()
        finite, sizes = [], [len(batches) for _, batches in steps.values()]
        for (step, (image_ids, _)), terms in zip(steps.items(), values.split(sizes)):
            total = terms.sum(0)
            if total.isfinite().all():
                finite.append(total)
                self._nonfinite = 0
                continue
            self._nonfinite += 1
            if self._nonfinite > self.max_nonfinite:
                raise NonFiniteLoss(step, image_ids, dict(zip(self._names, total.tolist())))
        mean = torch.stack(finite).mean(0).tolist() if finite else [math.nan] * len(self._names)
        return dict(zip(self._names, mean))
