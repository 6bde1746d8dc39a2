"""The output folder of predict.py."""

import errno
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch

from utils.errors import DataError, UsageError, WriteError
from visualize import gallery
from visualize.gallery import Gallery

IMAGE = torch.zeros(3, 20, 30, dtype=torch.uint8)


def names(folder):
    return {path.name for path in folder.iterdir()} - {gallery.OWN_FILES}


def test_images_of_the_same_name_do_not_replace_each_other(tmp_path, capsys):
    for overwrite in (False, True):  # a second run replaces the files of the first
        output = Gallery(tmp_path / "out", overwrite)
        for stem in ("a", "a", "sheet"):
            with output.timed(1):
                output.add(IMAGE, stem)
        output.close("3 boxes")
        assert names(tmp_path / "out") == {"a.jpg", "a_2.jpg", "sheet_2.jpg", "sheet.jpg"}
    printed = capsys.readouterr().out
    assert "3 images, " in printed and "3 boxes; annotated images, sheet.jpg and JSON are in " in printed


def test_an_earlier_prediction_is_refused_and_overwrite_deletes_its_files_alone(tmp_path):
    output = Gallery(tmp_path)
    output.add(IMAGE, "a")
    output.claim("rows.json").write_text("[]")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UsageError, match=r"contains an earlier prediction; name another folder, or give --overwrite"):
        Gallery(tmp_path)
    assert names(tmp_path) == {"a.jpg", "rows.json", "mine.txt"}
    Gallery(tmp_path, overwrite=True)
    assert names(tmp_path) == {"mine.txt"}
    with pytest.raises(UsageError, match="contains other files"):
        Gallery(tmp_path)


def test_other_files_are_never_replaced(tmp_path):
    (tmp_path / "a.jpg").write_text("a photo")
    output = Gallery(tmp_path, overwrite=True)
    output.add(IMAGE, "a")
    assert (tmp_path / "a.jpg").read_text() == "a photo" and (tmp_path / "a_2.jpg").is_file()
    with pytest.raises(UsageError, match=r"contains a\.jpg, which is not of an earlier prediction"):
        output.claim("a.jpg")


def test_a_record_that_names_files_elsewhere_deletes_nothing_there(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / gallery.OWN_FILES).write_text("../mine.txt\n")
    Gallery(tmp_path / "out", overwrite=True)
    assert (tmp_path / "mine.txt").is_file()


def test_a_full_disk(tmp_path, monkeypatch):
    def full(path, contents):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WriteError, match=r"a\.jpg: not written: No space left on device; free some"):
        Gallery(tmp_path).add(IMAGE, "a")
    assert not names(tmp_path)


def test_an_error_leaves_no_unfinished_video(tmp_path):
    output = Gallery(tmp_path)

    def fail():
        with output:
            for number in range(70):  # the encoder keeps the first ones
                output.add(IMAGE, "clip", frame(number, number / 10), "clip.mp4")
            assert names(tmp_path) == {"clip.mp4.tmp"}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not names(tmp_path)


@pytest.mark.parametrize(("count", "numbers"), [(4, "0123"), (5, "024"), (9, "048"), (20, "0816")])
def test_the_sheet_has_images_evenly_spaced(tmp_path, monkeypatch, count, numbers):
    captions = []
    monkeypatch.setattr(gallery, "MAX_THUMBNAILS", 4)
    monkeypatch.setattr(gallery, "thumbnail", lambda image, caption, side: caption)
    monkeypatch.setattr(gallery, "contact_sheet", lambda cells: captions.extend(cells) or IMAGE)
    output = Gallery(tmp_path)
    for number in range(count):
        output.add(IMAGE, str(number))
    output.close("")
    assert "".join(captions) == numbers and len(names(tmp_path)) == count + 1


def frame(number, seconds):
    return SimpleNamespace(number=number, seconds=seconds, rate=Fraction(10))


def test_frames_with_times_become_one_video_per_source(tmp_path):
    output = Gallery(tmp_path)
    for source in ("x/clip.mp4", "y/clip.mp4"):
        for number in range(3):
            output.add(IMAGE + 50 * number, "clip", frame(5 * number, number / 10), source)
    output.add(IMAGE, "animation", frame(7, None), "animation.gif")
    output.close("")
    assert names(tmp_path) == {"clip.mp4", "clip_2.mp4", "animation_000007.jpg", "sheet.jpg"}
    with av.open(str(tmp_path / "clip_2.mp4")) as container:
        assert container.streams.video[0].frames == 3


def test_unreadable_files_are_reported_at_once_and_fail_at_the_end(tmp_path, capsys):
    output = Gallery(tmp_path)
    output.report(DataError("a.jpg", "", "is damaged"))
    assert "a.jpg: is damaged" in capsys.readouterr().err
    with pytest.raises(UsageError, match="1 file could not be read"):
        output.close("")
    assert not names(tmp_path)


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--out .*file: is a file; name a folder"):
        Gallery(tmp_path / "file")
    with pytest.raises(WriteError, match=r"--out .*file.out: not written: Not a directory; move away the file"):
        Gallery(tmp_path / "file" / "out")
    (tmp_path / "out" / gallery.OWN_FILES).mkdir(parents=True)
    with pytest.raises(WriteError, match=r"--out .*out: not written: Is a directory; move away the file or folder"):
        Gallery(tmp_path / "out")


@pytest.mark.parametrize("stem", ["../../x", "/x", "a\\..\\x", "x\n\0y", "x" * 300])
def test_names_from_annotations_stay_in_the_folder(tmp_path, stem):
    """A scene of nuScenes may have any name."""
    output = Gallery(tmp_path / "deep/out")
    output.add(IMAGE, stem)
    output.close("")
    assert len(names(tmp_path / "deep/out")) == 2 and len(list(tmp_path.rglob("*.jpg"))) == 2
