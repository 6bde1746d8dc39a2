import os
import zipfile

import numpy as np
import pytest

from data.files import keep_arrays, kept_arrays


def test_kept_arrays_are_the_same_and_stay_in_the_file(tmp_path):
    file = tmp_path / "some.npz"
    given = {
        "format": np.array(3),
        "empty": np.zeros((0, 4), np.float32),
        "names": np.array(["scene-0061", "ä"]),
        "mask": np.array([True, False, True]),
        "columns": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "long": np.arange(10000, dtype=np.int8).reshape(10, 10, 100),
    }
    assert keep_arrays(file, given)
    kept = kept_arrays(file)
    assert list(kept) == list(given) and int(kept["format"]) == 3
    for name, values in given.items():
        assert kept[name].dtype == values.dtype and type(kept[name]) is np.ndarray
        np.testing.assert_array_equal(kept[name], values)
    assert isinstance(kept["long"].base, np.memmap) and not kept["long"].flags.writeable
    assert keep_arrays(file, {"format": np.array(4)})  # another file in its place: what is held stays as it was
    np.testing.assert_array_equal(kept["long"], given["long"])


def test_others_may_read_kept_arrays_as_far_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        assert keep_arrays(tmp_path / "some.npz", {"a": np.arange(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "some.npz").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz"]


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_cut_file_is_refused(tmp_path, share):
    file = tmp_path / "some.npz"
    keep_arrays(file, {"a": np.arange(1000), "b": np.arange(1000)})
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises((OSError, ValueError, zipfile.BadZipFile)):
        kept_arrays(file)


def test_compressed_arrays_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "some.npz", a=np.arange(1000))
    with pytest.raises(ValueError, match="not an array as it was kept"):
        kept_arrays(tmp_path / "some.npz")
