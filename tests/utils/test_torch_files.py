import math
import os
import pickle
import random
import re
import zipfile
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


def checkpoint(path):
    """The smallest checkpoint of ours, with a checksum; returns its contents."""
    contents = {"format_version": 1, "step": 3, "model": {"a": torch.arange(8.0)}, "classes": ["x"]}
    contents["checksum"] = torch_files.checksum(contents)
    torch.save(contents, path)
    return contents


def rewrite(path, change):
    """Write the zip file at `path` again, each record as change(name, bytes), with checksums that fit."""
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records:
            archive.writestr(name, change(name, content))


def test_a_tensor_altered_in_a_whole_zip_file_is_noticed(tmp_path):
    path = tmp_path / "x.pt"
    checkpoint(path)
    rewrite(path, lambda name, content: content)
    assert torch_files.read(path)["step"] == 3
    rewrite(path, lambda name, content: b"\xff\xff\xff\x00" + content[4:] if name.endswith("data/0") else content)
    with pytest.raises(WeightsError, match=r"x.pt: damaged: its contents do not match its checksum; use another copy"):
        torch_files.read(path)


@pytest.mark.parametrize("change", [{"step": 4}, {"classes": ["y"]}, {"classes": ("x",)}, {"new": None}])
def test_the_checksum_covers_plain_values(tmp_path, change):
    torch.save({**checkpoint(tmp_path / "x.pt"), **change}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="do not match its checksum"):
        torch_files.read(tmp_path / "x.pt")


def test_the_checksum_depends_on_bits_shapes_and_types_not_on_the_layout():
    square = torch.rand(2, 3, 4, 4)
    of = {torch_files.checksum({"a": value}) for value in (square, square.view(6, 4, 4), square.half(), -square, None)}
    assert len(of) == 5
    channels_last = square.to(memory_format=torch.channels_last)
    assert torch_files.checksum({"a": square}) == torch_files.checksum({"a": channels_last, "checksum": "x"})


def test_checkpoints_of_earlier_versions_have_no_checksum(tmp_path):
    contents = checkpoint(tmp_path / "x.pt")
    del contents["checksum"]
    torch.save(contents, tmp_path / "x.pt")
    assert torch_files.read(tmp_path / "x.pt")["classes"] == ["x"]


def add_record(archive, name, compression=zipfile.ZIP_STORED):
    archive.writestr(name, bytes(100), compression)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda archive: add_record(archive, archive.namelist()[0].upper()), id="same name"),
        pytest.param(lambda archive: add_record(archive, "x/data/9", zipfile.ZIP_DEFLATED), id="compressed"),
        pytest.param(lambda archive: setattr(archive, "comment", b"comment"), id="comment"),
    ],
)
def test_records_that_two_readers_could_take_differently_are_refused(tmp_path, change):
    checkpoint(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        change(archive)
    with pytest.raises(WeightsError, match="truncated or damaged at"):
        torch_files.read(tmp_path / "x.pt")


@pytest.mark.parametrize("join", [lambda data: b"PK__" + data, lambda data: data + b"x"], ids=["before", "after"])
def test_bytes_around_a_zip_file_are_refused(tmp_path, join):
    checkpoint(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(join((tmp_path / "x.pt").read_bytes()))
    with pytest.raises(WeightsError, match=r"truncated or damaged at the (end|list)"):
        torch_files.read(tmp_path / "x.pt")


def test_the_name_of_a_damaged_record_stays_in_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("two\nlines", b"content")
    path = tmp_path / "x.pt"
    path.write_bytes(path.read_bytes().replace(b"content", b"CONTENT", 1))
    with pytest.raises(WeightsError, match=r"^.*damaged at two\\nlines, .*$"):
        torch_files.read(path)


def many():
    """10**30 values in a few bytes of pickle."""
    values = [1]
    for _ in range(30):
        values = [values] * 10
    return values


def deep():
    values = []
    for _ in range(100):
        values = [values]
    return values


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (many(), "more values than a file of weights has"),
        (deep(), "more values than a file of weights has"),
        (torch.zeros(()).expand(10**12), "a.b is larger than its data"),
        (torch.zeros(2, device="meta"), "a.b is not a dense tensor"),
        (torch.eye(2).to_sparse(), "a.b is not a dense tensor"),
        ({"x" * 1000: 1}, "is no name"),
        ({"two\nlines": 1}, "is no name"),
    ],
)
def test_values_larger_than_their_file_are_refused(tmp_path, value, reason):
    torch.save({"format_version": 1, "a": {"b": value}}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=f"x.pt: .*{reason}"):
        torch_files.read(tmp_path / "x.pt")
    assert isinstance(torch_files.peek(tmp_path / "x.pt"), dict)


def test_a_dict_that_contains_itself_is_refused(tmp_path):
    contents = {"format_version": 1}
    contents["a"] = contents
    torch.save(contents, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="more values than a file of weights has"):
        torch_files.read(tmp_path / "x.pt")
    assert torch_files.peek(tmp_path / "x.pt") == {}


def test_a_tensor_of_a_terabyte_is_not_allocated(tmp_path):
    """Its size is in the pickle alone."""
    checkpoint(tmp_path / "x.pt")
    eight, huge = b"K\x08", b"\x8a\x06" + (10**12).to_bytes(6, "little")
    rewrite(tmp_path / "x.pt", lambda name, content: content.replace(eight, huge) if "data.pkl" in name else content)
    with pytest.raises(WeightsError, match=r"x.pt: damaged: .*; use another copy"):
        torch_files.read(tmp_path / "x.pt")


def mutate(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, length = rng.randrange(len(data)), rng.randrange(1, 20)
        changed = (bytes([data[place] ^ 1 << rng.randrange(8)]), b"", rng.randbytes(length), data[:length])
        data[place : place + rng.choice((1, length))] = rng.choice(changed)
    return bytes(data)


@pytest.mark.parametrize("in_pickle", [False, True])
def test_whatever_is_damaged_is_one_line(written, tmp_path, in_pickle):
    path, rng = tmp_path / "x.pt", random.Random(0)
    contents = checkpoint(path)
    data = written(contents).read_bytes()
    accepted, refusals = [], []
    for _ in range(200):
        path.write_bytes(data if in_pickle and data[:2] == b"PK" else mutate(data, rng))
        if in_pickle and data[:2] == b"PK":
            rewrite(path, lambda name, content: mutate(content, rng) if "data.pkl" in name else content)
        try:
            accepted.append(torch_files.read(path))
        except WeightsError as error:
            refusals.append(str(error))
        assert isinstance(torch_files.peek(path), dict)
    assert len(refusals) > 150
    assert all(str(path) in refusal and len(refusal.splitlines()) == 1 for refusal in refusals)
    for actual in accepted:
        if {"checksum", "format_version"} <= actual.keys():
            torch.testing.assert_close(actual["model"], contents["model"], rtol=0, atol=0)


def test_peek_has_the_fields_without_the_data(tmp_path):
    contents = checkpoint(tmp_path / "x.pt")
    peeked = torch_files.peek(tmp_path / "x.pt")
    assert (peeked["step"], peeked["model"]["a"].device.type) == (3, "meta")
    for other in ({"a": torch.zeros(2)}, {**contents, "step": -1}, [1]):
        torch.save(other, tmp_path / "x.pt")
        assert torch_files.peek(tmp_path / "x.pt") == {}
    (tmp_path / "x.pt").write_bytes(b"PK")
    assert torch_files.peek(tmp_path / "x.pt") == torch_files.peek(tmp_path) == torch_files.peek("nowhere.pt") == {}


def test_tensors_that_are_not_finite_are_named():
    fine = {"a": torch.ones(2), "b": torch.zeros(0), "c": torch.tensor(3), "d": torch.ones(2).bfloat16()}
    torch_files.check_finite("x.pt", fine)
    for value in (torch.tensor([1, math.inf]), torch.tensor(math.nan).bfloat16(), torch.tensor(1e300).double()):
        with pytest.raises(WeightsError, match=r"^x.pt: e contains NaN or infinity"):
            torch_files.check_finite("x.pt", {**fine, "e": value, "f": value})


def test_mismatches_name_each_tensor():
    own = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(())}
    state = {"b": torch.zeros(4), "c": torch.ones(()), "d": torch.zeros(1)}
    assert torch_files.mismatches(state, own) == ["a is missing", "d is not in this network", "b is (4,), here (3,)"]
    assert torch_files.mismatches(own, own) == []
    assert torch_files.mismatches({**own, "a": torch.zeros(2).long()}, own) == ["a is torch.int64, here torch.float32"]
    assert torch_files.mismatches({**own, "a": torch.zeros(2).half()}, own) == []
