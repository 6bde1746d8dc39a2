import csv
import errno
import os
import signal
from pathlib import Path

import pytest

from utils import files
from utils.errors import DataError, WriteError


class KilledError(Exception):
    """Represents a kill in the middle of a write."""


def test_files_keep_the_old_contents_when_writing_fails(tmp_path):
    files.write_text(tmp_path / "a", "old")

    def fail(file):
        file.write(b"half")
        raise KilledError

    with pytest.raises(KilledError):
        files.write(tmp_path / "a", fail)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_what_cannot_be_written_is_one_error_that_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file.a: not written: (Not a directory|File exists); move away") as raised:
        files.write_text(tmp_path / "file" / "a", "text")
    assert isinstance(raised.value, OSError)
    with pytest.raises(WriteError, match=r"^b/c: not written"), files.writing("b"):  # the file, not its folder
        raise WriteError("b/c", OSError(errno.ENOSPC, "full"))

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("open", "replace", "unlink"):  # of such a disk nothing can be removed either
        monkeypatch.setattr("builtins.open" if name == "open" else f"os.{name}", refuse)
    with pytest.raises(WriteError, match=r"^b: not written: Read-only file system; mount the disk for writing"):
        files.write_text(Path("b"), "text")


def test_contents_are_on_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, function=function: calls.append(name) or function(*a))
    files.write_text(tmp_path / "new" / "a", "text")
    assert calls == ["fsync", "replace"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
    files.sync_folder(tmp_path)
    assert calls == ["fsync", "replace", "fsync"]


def test_json_and_csv(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [1, None]})
    assert (tmp_path / "a.json").read_text() == '{"a": [1, null]}'
    rows = [["name", "AP"], ["a, b", "0.5"]]
    files.write_csv(tmp_path / "a.csv", rows)
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.reader(file)) == rows


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_replaces_what_had_it(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise PermissionError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("new")
    target.write_text("old")
    for _ in range(2):  # the second time both are names of one file
        files.link_or_copy(source, target)
    assert target.read_text() == source.read_text() == "new"
    assert target.samefile(source) == links
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.skipif(os.name == "nt", reason="no pipes in folders")
def test_pipes_and_devices_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    signal.alarm(20)  # opening a pipe waits for its other end
    try:
        for path in (tmp_path / "pipe", "/dev/zero"):
            with pytest.raises(OSError, match="not a regular file"):
                files.open_regular(path)
            with pytest.raises(DataError, match="cannot be read: not a regular file but a pipe or a device"):
                list(files.read_lines(path))
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_no_file_has(name):
    with pytest.raises(DataError, match="cannot be read: not the name of a file"):
        list(files.read_lines(name))
