"""Which files predict.py looks at, what it reads of them, and the folder it leaves."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, frames
from training.album import Album
from training.flags import UsageError


def picture(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 100, 50)).save(path)
    return path


def test_folders_patterns_and_files_are_found_once_and_in_order(tmp_path):
    first, second, deep = (picture(tmp_path / name) for name in ("b/2.jpg", "b/10.png", "b/deep/3.jpg"))
    (tmp_path / "b" / "notes.txt").write_text("no picture")
    assert frames.find([str(tmp_path / "b")], tmp_path / "out") == [second, first]
    assert frames.find([str(tmp_path / "b" / "*.jpg"), str(first)], tmp_path / "out") == [first]
    assert frames.find([str(deep), str(tmp_path / "b" / "**" / "*.jpg")], tmp_path / "out") == [deep, first]


def test_below_a_folder_without_pictures_but_never_its_own_output(tmp_path):
    inside = picture(tmp_path / "photos" / "ants" / "1.jpg")
    picture(tmp_path / "photos" / "out" / "drawn.jpg")
    assert frames.find([str(tmp_path / "photos")], tmp_path / "photos" / "out") == [inside]


@pytest.mark.parametrize(
    ("name", "reason"), [("none", "no such file"), ("empty", "no picture"), ("*.jpg", "is called so")]
)
def test_nothing_to_look_at_is_told(tmp_path, name, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=reason):
        frames.find([str(tmp_path / name)], tmp_path / "out")


def test_ids_are_the_files_numbers_where_these_differ(tmp_path):
    files = [tmp_path / name for name in ("000139.jpg", "7.png")]
    assert frames.numbers_of(files) == {files[0]: 139, files[1]: 7}
    assert frames.numbers_of([*files, tmp_path / "other" / "7.jpg"]) == {}
    assert frames.numbers_of([*files, tmp_path / "dog.jpg"]) == {}
    assert frames.numbers_of([*files, tmp_path / "12.mp4"]) == {}  # many pictures


def test_a_photograph_is_one_frame_and_an_animation_many(tmp_path):
    ((number, image),) = frames.read_frames(picture(tmp_path / "one.gif"))
    assert number is None and image.shape == (3, 30, 40)
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    images = [Image.new("RGB", (16, 12), colour) for colour in colours]
    images[0].save(tmp_path / "three.webp", save_all=True, append_images=images[1:], lossless=True)
    read = list(frames.read_frames(tmp_path / "three.webp"))
    assert [number for number, _ in read] == [0, 1, 2]
    for (_, image), colour in zip(read, colours):
        torch.testing.assert_close(image[:, 5, 5], torch.tensor(colour, dtype=torch.uint8))
    assert [number for number, _ in frames.read_frames(tmp_path / "three.webp", every=2)] == [0, 2]


def test_a_cut_off_animation_gives_its_whole_frames_and_then_its_fault(tmp_path):
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (60, 80, 3), dtype=np.uint8)) for _ in range(4)]
    images[0].save(tmp_path / "four.gif", save_all=True, append_images=images[1:])
    whole = (tmp_path / "four.gif").read_bytes()
    (tmp_path / "four.gif").write_bytes(whole[: len(whole) * 5 // 8])
    with pytest.raises(DataError, match=r"four\.gif"):
        list(frames.read_frames(tmp_path / "four.gif"))


@pytest.mark.skipif(importlib.util.find_spec("av") is not None, reason="PyAV is installed")
def test_without_a_decoder_a_video_is_told_what_to_do(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match=r"pip install av.*ffmpeg -i .*clip\.mp4"):
        next(frames.read_frames(tmp_path / "clip.mp4"))


def test_frames_of_a_video(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in (40, 120, 200):
            pixels = np.full((48, 64, 3), level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    read = list(frames.read_frames(tmp_path / "clip.mp4"))
    assert [number for number, _ in read] == [0, 1, 2]
    assert [image.shape for _, image in read] == [(3, 48, 64)] * 3
    levels = torch.tensor([image.float().mean() for _, image in read])
    torch.testing.assert_close(levels, torch.tensor([40.0, 120, 200]), atol=6, rtol=0)
    (tmp_path / "clip.mp4").write_bytes(b"\0" * 1000)
    with pytest.raises(DataError, match="cannot be read as a video"):
        next(frames.read_frames(tmp_path / "clip.mp4"))


def test_pictures_of_one_name_are_kept_apart(tmp_path):
    album, image = Album(tmp_path / "out"), torch.zeros(3, 20, 30, dtype=torch.uint8)
    for stem in ("a", "a", "sheet"):
        with album.clock(1):
            album.add(image, stem, stem)
    album.close("")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.jpg", "a_2.jpg", "sheet_2.jpg", "sheet.jpg"}


def test_an_album_ends_in_an_error_where_something_was_damaged(tmp_path, capsys):
    album = Album(tmp_path)
    album.tell(DataError("a.jpg", "", "is broken"))
    assert "a.jpg: is broken" in capsys.readouterr().err
    with pytest.raises(UsageError, match="1 could not be read"):
        album.close("")


def test_an_album_cannot_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--out .*file"):
        Album(tmp_path / "file")
