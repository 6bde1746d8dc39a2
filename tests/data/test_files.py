import numpy as np
import pytest

from data import DataError
from data.files import are_inside, is_inside, is_true, missing_files, missing_images, read_lines, shortened
from data.packed import PackedPaths


def test_lines_of_a_text_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert list(read_lines(file)) == ["one\r\n", "two"]
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 text; save it as UTF-8"):
        list(read_lines(file))
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read: No such file"):
        list(read_lines(tmp_path / "gone.txt"))


def test_flags():
    assert [is_true(text) for text in ("1", " 1.0", "True")] == [True] * 3
    assert [is_true(text) for text in (None, "", "0", "false", "2")] == [False] * 5


def test_long_lists_are_shortened(tmp_path):
    assert shortened(["a", "b", "c"]) == "a, b, c"
    assert shortened(["a", "b", "c", "d"], limit=2) == "a, b and 2 more"
    error = missing_images(tmp_path / "a.csv", "line 2", tmp_path / "images", list("abcde"))
    assert str(error) == f"{tmp_path}/a.csv: line 2: no image in {tmp_path}/images for a, b, c and 2 more"
    assert error.kind == "image"


def test_missing_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.jpg").touch()
    (tmp_path / "b.jpg").touch()
    missing = missing_files(str(tmp_path), ["sub/a.jpg", "sub/c.jpg", "b.jpg", "none/d.jpg", "e.jpg"], [0, 1, 2, 3])
    assert missing.dtype == np.int32 and missing.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        *(("a.jpg", True), ("b/../a.jpg", True), ("./a..b/c", True), ("..a", True), ("", True)),
        *(("..", False), ("../a.jpg", False), ("b/../../a.jpg", False), ("/etc/passwd", False), ("a\0b", False)),
    ],
)
def test_files_that_annotations_name_are_in_the_folder(name, inside):
    assert is_inside(name) == inside
    assert are_inside(PackedPaths(["x.jpg", name, "y.jpg"])) == inside
