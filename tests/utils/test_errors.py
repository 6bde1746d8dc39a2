import errno
import os
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from utils.errors import DataError, UsageError, UserError, WeightsError, WriteError


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DataError(Path("a") / "x.xml", "object 3", "xmax 12\n < xmin 40", "box")


def test_a_data_error_is_one_line_of_path_place_and_reason():
    error = DataError(Path("a") / "x.xml", "object 3", "xmax 12\n < xmin 40", "box")
    assert str(error) == "a/x.xml: object 3: xmax 12 < xmin 40"
    assert (error.path, error.place, error.reason, error.kind) == ("a/x.xml", "object 3", "xmax 12 < xmin 40", "box")
    assert str(DataError("x.csv", reason="is empty")) == "x.csv: is empty"
    assert DataError("x.csv").kind == "file"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_error_of_a_worker_keeps_its_line(workers):
    with pytest.raises(DataError) as caught:
        list(DataLoader(Broken(), num_workers=workers))
    assert str(caught.value) == "a/x.xml: object 3: xmax 12 < xmin 40"


def test_all_errors_of_users_have_one_base_class():
    assert all(issubclass(error, UserError) for error in (DataError, UsageError, WeightsError, WriteError))


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some disk space"),
        (errno.EDQUOT, "free some disk space"),
        (errno.EROFS, "mount the disk for writing"),
        (errno.EACCES, "change the permissions"),
        (errno.ENOENT, "mount the disk or restore the folder"),
        (errno.ENOTDIR, "move away the file or folder that is in the way"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.EIO, "check the disk"),
    ],
)
def test_a_file_that_cannot_be_written_has_the_remedy_of_its_reason(number, remedy):
    line = str(WriteError("a/b.pt", OSError(number, os.strerror(number)), "go on"))
    assert line.startswith(f"a/b.pt: not written: {os.strerror(number)}; {remedy}") and line.endswith(", then go on")
    assert ("disk space" in line) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert str(WriteError("a", OSError("3 requested and 2 written"))).startswith("a: not written: 3 requested and 2 ")


def test_what_a_file_contains_cannot_write_to_the_terminal():
    error = DataError("a\x1b[2J.xml", "object\n3", "class \ud800 \u202e\x9b", "box")
    assert str(error) == r"a\x1b[2J.xml: object\n3: class \ud800 \u202e\x9b"
    assert str(UsageError("--data: né 日本")) == "--data: né 日本"
    assert len(str(UsageError("x" * 10**6))) < 5000
