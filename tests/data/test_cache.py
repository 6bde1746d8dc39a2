import os

import numpy as np
import pytest

from data.cache import load_arrays, save_arrays


def test_arrays_come_back_and_large_ones_are_mapped(tmp_path):
    folder = tmp_path / "arrays"
    arrays = {
        "format": np.array(3),
        "empty": np.zeros((0, 4), np.float32),
        "names": np.array(["scene-0061", "ä"]),
        "mask": np.array([True, False, True]),
        "columns": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "large": np.arange(100_000, dtype=np.int8).reshape(10, 100, 100),
    }
    assert save_arrays(folder, arrays)
    loaded = load_arrays(folder)
    assert sorted(loaded) == sorted(arrays)
    for name, values in arrays.items():
        assert loaded[name].dtype == values.dtype and type(loaded[name]) is np.ndarray
        np.testing.assert_array_equal(loaded[name], values)
    assert isinstance(loaded["large"].base, np.memmap) and not loaded["large"].flags.writeable
    assert save_arrays(folder, {"format": np.array(4)})  # replaced: what is in use stays as it was
    np.testing.assert_array_equal(loaded["large"], arrays["large"])
    assert [int(values) for values in load_arrays(folder).values()] == [4]
    assert [path.name for path in tmp_path.iterdir()] == ["arrays"]


def test_others_may_read_the_arrays_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        assert save_arrays(tmp_path / "arrays", {"a": np.arange(3)})
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "arrays", tmp_path / "arrays/a.npy")]
    assert modes == [0o750, 0o640]


@pytest.mark.parametrize("size", [100, 100_000])
@pytest.mark.parametrize("share", [0, 0.2, 0.99])
def test_a_truncated_file_is_an_error(tmp_path, size, share):
    save_arrays(tmp_path / "arrays", {"a": np.arange(size), "b": np.arange(3)})
    file = tmp_path / "arrays/a.npy"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises((OSError, ValueError, EOFError)):
        load_arrays(tmp_path / "arrays")


def test_arrays_of_objects_are_an_error(tmp_path):
    """Loading them would unpickle, which can run any code."""
    assert save_arrays(tmp_path / "arrays", {"a": np.array([print], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle"):
        load_arrays(tmp_path / "arrays")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert not save_arrays(tmp_path / "file" / "arrays", {"a": np.arange(3)})


@pytest.mark.parametrize("place", [20, -1])  # in the header, in the values
def test_a_changed_byte_is_an_error(tmp_path, place):
    save_arrays(tmp_path / "arrays", {"a": np.arange(20), "b": np.arange(3)})
    content = bytearray((tmp_path / "arrays/a.npy").read_bytes())
    content[place] ^= 1
    (tmp_path / "arrays/a.npy").write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        load_arrays(tmp_path / "arrays")
