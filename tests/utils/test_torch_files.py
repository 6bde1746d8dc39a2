import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from utils import torch_files
from utils.errors import WeightsError


class Bomb:
    """Unpickling it creates a file."""

    def __reduce__(self):
        return Path.touch, (Path(os.environ["BOMB"]),)


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def written(request, tmp_path):
    """A function: value -> the file that torch.save makes of it, in its present or its legacy format."""

    def write(value):
        torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=request.param)
        return tmp_path / "x.pt"

    return write


def test_tensors_are_read(written):
    torch.testing.assert_close(torch_files.read(written({"a": torch.arange(3)})), {"a": torch.arange(3)})


def test_find_checkpoint(tmp_path, capsys):
    """A file is itself, existing or not; a run folder is its best.pt, else its last.pt."""
    assert torch_files.find_checkpoint(str(tmp_path / "x.pt")) == tmp_path / "x.pt"
    (tmp_path / "other.pth").touch()
    line = f"{tmp_path}: neither best.pt nor last.pt is in this folder; checkpoints nearby: {tmp_path / 'other.pth'}"
    with pytest.raises(WeightsError, match=f"^{re.escape(line)}$"):
        torch_files.find_checkpoint(tmp_path)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).touch()
        assert torch_files.find_checkpoint(tmp_path) == tmp_path / name
        assert capsys.readouterr().out == f"{tmp_path}: using {name}\n"


def test_other_contents_are_refused(written):
    with pytest.raises(WeightsError, match=r"x.pt: contains a list, not a dict"):
        torch_files.read(written([1]))


def test_pickled_objects_are_refused_and_never_executed(written, tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match=r"torch.nn.modules.linear.Linear.*refused; .*state_dict\(\)"):
        torch_files.read(written(nn.Linear(2, 2)))
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    with pytest.raises(WeightsError, match="refused"):
        torch_files.read(written({"x": Bomb()}))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("size", [1, 3, 20, 60, 200, 500, -1])
def test_a_truncated_file_is_refused(written, size):
    path = written({"a": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match=r"x.pt: .*(damaged|is not a PyTorch file|refused)"):
        torch_files.read(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"hello", "is not a PyTorch file"),
        (b"PK\x03\x04", "truncated or damaged at the end of the file, 4 bytes"),
        (pickle.dumps({"a": 1}), "is not a PyTorch file"),
    ],
)
def test_files_that_torch_did_not_write_are_refused(tmp_path, data, reason):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(WeightsError, match=f"x.pt: {reason}"):
        torch_files.read(tmp_path / "x.pt")


def test_a_missing_file_lists_those_nearby(tmp_path):
    run, empty = tmp_path / "run", tmp_path / "empty"
    run.mkdir()
    empty.mkdir()
    (run / "last.pt").touch()
    with pytest.raises(WeightsError, match=r"lost.pt: no such file; checkpoints nearby: .*last.pt"):
        torch_files.read(run / "lost.pt")
    with pytest.raises(WeightsError, match=r"no such file; checkpoints nearby: .*run.last.pt"):
        torch_files.read(tmp_path / "rnu" / "deep" / "last.pt")
    with pytest.raises(WeightsError, match=r"is a folder, not a file of weights; no checkpoint in .*empty either"):
        torch_files.read(empty)


def test_mismatches_name_each_tensor():
    own = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(())}
    state = {"b": torch.zeros(4), "c": torch.ones(()), "d": torch.zeros(1)}
    assert torch_files.mismatches(state, own) == ["a is missing", "d is not in this network", "b is (4,), here (3,)"]
    assert torch_files.mismatches(own, own) == []
