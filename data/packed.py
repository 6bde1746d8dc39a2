"""Many byte strings, or paths, in two arrays instead of one Python object each."""

import os
from collections.abc import Iterable
from typing import Self

import numpy as np


class PackedBytes:
    """A sequence of byte strings: `content` uint8, all of them joined; `first` int64 [N+1], where each begins."""

    def __init__(self, items: Iterable[bytes]):
        items = list(items)
        self.content = np.frombuffer(b"".join(items), dtype=np.uint8)
        self.first = np.cumsum([0] + [len(item) for item in items], dtype=np.int64)

    @classmethod
    def from_arrays(cls, content: np.ndarray, first: np.ndarray) -> Self:
        packed = cls([])
        packed.content, packed.first = content, first
        return packed

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.content[self.first[index] : self.first[index + 1]].tobytes()

    def select(self, indices: Iterable[int]) -> Self:
        """The items at `indices`, in that order."""
        return type(self)(self[index] for index in indices)


class PackedPaths(PackedBytes):
    """A sequence of paths, as str."""

    def __init__(self, paths: Iterable[str | os.PathLike]):
        super().__init__(os.fsencode(path) for path in paths)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(super().__getitem__(index))
