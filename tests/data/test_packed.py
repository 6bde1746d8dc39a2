from pathlib import Path

import numpy as np

from data.packed import PackedBytes, PackedPaths


def test_bytes():
    items = [b"one", b"", b"three\x00", b"4"]
    packed = PackedBytes(items)
    assert len(packed) == 4 and [packed[index] for index in range(4)] == items
    assert packed.content.dtype == np.uint8 and packed.first.tolist() == [0, 3, 3, 9, 10]
    part = packed.select([3, 0])
    assert [part[index] for index in range(len(part))] == [b"4", b"one"]
    assert len(PackedBytes([])) == 0


def test_paths():
    packed = PackedPaths(["images/1 ü.jpg", Path("b.png")])
    assert [packed[0], packed[1]] == ["images/1 ü.jpg", "b.png"]
    again = PackedPaths.from_arrays(packed.content, packed.first)
    assert [again[0], again[1]] == ["images/1 ü.jpg", "b.png"]
    part = packed.select(np.array([1]))
    assert type(part) is PackedPaths and part[0] == "b.png"
