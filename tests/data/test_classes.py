import numpy as np
import pytest
import torch

from data import DataError
from data.classes import agree_on_classes, balanced_weights, choose_classes, class_weights, read_labels, read_numbered


def test_labels_file(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_bytes(b"\xef\xbb\xbfBACKGROUND\r\n\r\nteddy bear \r\ncat\r\n\r\n")
    assert read_labels(file) == ["teddy bear", "cat"]
    for content, reason in (
        (b"cat\ndog\ncat\n", "repeated: cat"),
        (b"\nBACKGROUND\n", "no class name"),
        (b"caf\xe9\n", "not UTF-8"),
        (b"a\x1b[2J\n", "class name .* has a control character; rename the class"),
        (b"x" * 300, "longer than 200 bytes"),
        (b"".join(b"%d\n" % number for number in range(100_001)), "has 100001 class names, more than 100000"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            read_labels(file)


def test_numbered_classes(tmp_path):
    file = tmp_path / "classes.csv"
    file.write_bytes(b'\xef\xbb\xbfteddy bear, 2\r\n\r\n"cat, big",0\r\ndog,1\r\n')
    assert read_numbered(file) == ["cat, big", "dog", "teddy bear"]
    for content, reason in (
        ("name,id\ncat,0\n", "line 1: 'name,id' is not name,id with an integer id; the file has no header"),
        ("cat,0\ndog\n", "line 2: 'dog' is not name,id"),
        ("cat,0\ndog,-1\n", "line 2: 'dog,-1' is not"),
        ("cat,0\n\ncat,1\n", "line 3: class 'cat' is repeated"),
        ("cat,1\ndog,2\n", "ids are 1, 2; number the 2 classes from 0 to 1, each once"),
        ("cat,0\ndog,0\n", "ids are 0, 0; "),
        ("\n", "contains no class"),
        ("x" * 200_000, "not valid csv"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=reason):
            read_numbered(file)


def test_classes_of_the_data(tmp_path):
    assert choose_classes([tmp_path], {"dog", "ant"}) == (["ant", "dog"], [])
    (tmp_path / "labels.txt").write_text("dog\ncat\n")
    names, errors = choose_classes([tmp_path], {"dog", "emu", "ant"})
    assert names == ["dog", "cat"]
    assert [error.reason for error in errors] == [
        f"class {name!r} of the annotations is missing; add it" for name in ("ant", "emu")
    ]


def test_class_names_must_agree_with_a_checkpoint():
    assert agree_on_classes(["a", "b"], ["a", "b"], False) == ["a", "b"]
    assert agree_on_classes(["a", "b"], ("a", "b"), False) == ["a", "b"]
    assert agree_on_classes(["a", "b"], ["b", "c"], False) == ["a", "b"]
    assert agree_on_classes(["a", "b"], ["b", "a"], True) == ["a", "b"]
    with pytest.raises(DataError, match=r"\(a, b\).*\(b, a\).*--remap-by-name"):
        agree_on_classes(["a", "b"], ["b", "a"], False)
    with pytest.raises(DataError, match="no class in common"):
        agree_on_classes(["a"], ["b"], True)


def test_class_weights():
    assert class_weights("", ["a", "b"]) is None
    torch.testing.assert_close(class_weights("b = 2.5", ["a", "b"]), torch.tensor([1, 2.5]))
    torch.testing.assert_close(class_weights("b=2.5,a=0", ["a", "b"], background=True), torch.tensor([1, 0, 2.5]))
    for text in ("c=1", "a", "a=x", "a=nan", "a=-1", "a=1,,"):
        with pytest.raises(DataError, match="write NAME=NUMBER; names: a, b"):
            class_weights(text, ["a", "b"])


def test_balanced_weights():
    """Class 0 is in images 0, 1 and 2, class 1 in image 2; image 3 has no object and the median weight."""
    weights = balanced_weights(np.array([0, 0, 1, 2, 2]), np.array([0, 0, 0, 0, 1]), 4, 2)
    np.testing.assert_allclose(weights, np.array([1 / 3, 1 / 3, 1, 1 / 3]) / 2)
