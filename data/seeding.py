"""Randomness as a function of (seed, epoch, index): workers, processes and resumes change nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors


class SeededDataset(Dataset):
    """A data set of (image, target) with `load(index)`, `transform` (or None) and `seed`: `dataset[i]` and
    `dataset[epoch, i]` are the transformed sample, its random numbers a function of (seed, epoch, i)."""

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[tv_tensors.Image, dict]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, target = self.load(index)
        if self.transform is None:
            return image, target
        with seeded(self.seed, epoch, index):
            return self.transform(image, target)


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """A context in which torch's random numbers depend on these three alone; the generator is restored after it."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs' generators too, and fork_rng would not restore their state
        torch.default_generator.manual_seed(sample_seed(seed, epoch, index))
        yield


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A 64-bit seed that mixes three small numbers, the same on every machine."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0])
