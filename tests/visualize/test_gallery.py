"""The output folder of predict.py."""

import os

import pytest
import torch
from PIL import Image

from utils.errors import DataError, UsageError
from visualize import gallery
from visualize.gallery import Gallery

IMAGE = torch.zeros(3, 20, 30, dtype=torch.uint8)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_images_of_the_same_name_do_not_replace_each_other(tmp_path, capsys):
    for _ in range(2):  # a second run replaces the files of the first
        output = Gallery(tmp_path / "out")
        for stem in ("a", "a", "sheet"):
            with output.timed(1):
                output.add(IMAGE, stem)
        output.close("3 boxes")
        assert names(tmp_path / "out") == {"a.jpg", "a_2.jpg", "sheet_2.jpg", "sheet.jpg"}
    printed = capsys.readouterr().out
    assert "3 images, " in printed and "3 boxes; annotated images, sheet.jpg and JSON are in " in printed


def test_the_sheet_has_the_first_images_only(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "MAX_THUMBNAILS", 2)
    output = Gallery(tmp_path)
    with output.timed(5):
        for number in range(5):
            output.add(IMAGE, str(number))
    output.close("")
    assert len(names(tmp_path)) == 6
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.size == (2 * (gallery.THUMBNAIL_SIDE + 4) + 4, gallery.THUMBNAIL_SIDE + 18 + 2 * 4)


def test_unreadable_files_are_reported_at_once_and_fail_at_the_end(tmp_path, capsys):
    output = Gallery(tmp_path)
    output.report(DataError("a.jpg", "", "is damaged"))
    assert "a.jpg: is damaged" in capsys.readouterr().err
    with pytest.raises(UsageError, match="1 file could not be read"):
        output.close("")
    assert not names(tmp_path)


def test_an_output_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--out .*file: .*; name another folder"):
        Gallery(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UsageError, match=r"--out .*: no permission to write; name another folder"):
        Gallery(tmp_path)
