"""Files that are whole at every moment."""

import pytest

from training import files


class Killed(Exception):
    """Stands for a kill in the middle of a write."""


def test_files_keep_the_old_contents_when_writing_fails(tmp_path):
    files.write_text(tmp_path / "a", "old")

    def fail(file):
        file.write(b"half")
        raise Killed

    with pytest.raises(Killed):
        files.write(tmp_path / "a", fail)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
