"""Which files predict.py reads, and the images in them."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, video_input


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (200, 100, 50)).save(path)
    return path


# ---- files ----


def test_files_folders_and_patterns_give_each_file_once_and_sorted(tmp_path):
    first, second, deep = (write_image(tmp_path / name) for name in ("b/2.jpg", "b/10.png", "b/deep/3.jpg"))
    (tmp_path / "b" / "notes.txt").write_text("no image")
    assert video_input.find_files([str(tmp_path / "b")], tmp_path / "out") == [second, first]
    assert video_input.find_files([str(tmp_path / "b" / "*.jpg"), str(first)], tmp_path / "out") == [first]
    assert video_input.find_files([str(deep), str(tmp_path / "b" / "**" / "*.jpg")], tmp_path / "out") == [deep, first]


def test_a_folder_without_images_gives_those_of_its_subfolders_but_not_the_output(tmp_path):
    inside = write_image(tmp_path / "photos" / "ants" / "1.jpg")
    write_image(tmp_path / "photos" / "out" / "drawn.jpg")
    assert video_input.find_files([str(tmp_path / "photos")], tmp_path / "photos" / "out") == [inside]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none", "no such file"), ("empty", "no image .* in this folder"), ("*.jpg", "no image .* matches this pattern")],
)
def test_inputs_without_files(tmp_path, name, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=reason):
        video_input.find_files([str(tmp_path / name)], tmp_path / "out")


def test_a_folder_within_the_output_folder(tmp_path):
    write_image(tmp_path / "photos" / "1.jpg")
    with pytest.raises(DataError, match=r"all its images are in the output folder .*; give another --out"):
        video_input.find_files([str(tmp_path / "photos")], tmp_path)


def test_image_ids_are_the_numbers_in_the_names_if_all_differ(tmp_path):
    files = [tmp_path / name for name in ("000139.jpg", "7.png")]
    assert video_input.image_ids(files) == {files[0]: 139, files[1]: 7}
    assert video_input.image_ids([*files, tmp_path / "other" / "7.jpg"]) == {}
    assert video_input.image_ids([*files, tmp_path / "dog.jpg"]) == {}
    assert video_input.image_ids([*files, tmp_path / "12.mp4"]) == {}  # has many images


# ---- frames ----


def test_an_image_is_one_frame(tmp_path):
    for name in ("one.jpg", "one.gif"):
        ((number, image),) = video_input.read_frames(write_image(tmp_path / name))
        assert number is None and image.shape == (3, 30, 40)


def test_frames_of_an_animated_image(tmp_path):
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    images = [Image.new("RGB", (16, 12), color) for color in colors]
    images[0].save(tmp_path / "three.webp", save_all=True, append_images=images[1:], lossless=True)
    frames = list(video_input.read_frames(tmp_path / "three.webp"))
    assert [number for number, _ in frames] == [0, 1, 2]
    for (_, image), color in zip(frames, colors):
        torch.testing.assert_close(image[:, 5, 5], torch.tensor(color, dtype=torch.uint8))
    assert [number for number, _ in video_input.read_frames(tmp_path / "three.webp", every=2)] == [0, 2]


def test_a_truncated_animated_image_gives_its_whole_frames_and_then_its_error(tmp_path):
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (60, 80, 3), dtype=np.uint8)) for _ in range(4)]
    images[0].save(tmp_path / "four.gif", save_all=True, append_images=images[1:])
    whole = (tmp_path / "four.gif").read_bytes()
    (tmp_path / "four.gif").write_bytes(whole[: len(whole) * 5 // 8])
    numbers = []
    with pytest.raises(DataError, match=r"four\.gif"):
        numbers.extend(number for number, _ in video_input.read_frames(tmp_path / "four.gif"))
    assert numbers == [0, 1]


def test_a_video_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install av.*ffmpeg -i .*clip\.mp4"):
        next(video_input.read_frames(tmp_path / "clip.mp4"))


class FFmpegError(Exception):
    strerror = "Invalid data found when processing input"


class Frame:
    def __init__(self, pixels, rotation):
        self.pixels, self.rotation = pixels, rotation

    def to_ndarray(self, format):
        assert format == "rgb24"
        return self.pixels


class Container:
    """A video of three frames, of which the last one is damaged, as PyAV offers it."""

    def __init__(self, rotation=0, has_video=True):
        self.rotation, self.streams = rotation, SimpleNamespace(video=[object()] * has_video)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def decode(self, video):
        assert video == 0
        for level in (40, 120, 200):
            pixels = np.full((4, 6, 3), level, dtype=np.uint8)
            pixels[0, 0] = (1, 2, 3)
            yield Frame(pixels, self.rotation)
        raise FFmpegError


@pytest.fixture
def video(monkeypatch):
    """A function that replaces PyAV by one that opens a `Container`."""

    def replace(**options):
        av = SimpleNamespace(open=lambda path: Container(**options), error=SimpleNamespace(FFmpegError=FFmpegError))
        monkeypatch.setitem(sys.modules, "av", av)

    return replace


@pytest.mark.parametrize(("every", "expected"), [(1, [(0, 40), (1, 120), (2, 200)]), (2, [(0, 40), (2, 200)])])
def test_frames_of_a_video(video, every, expected):
    video()
    frames = []
    with pytest.raises(DataError, match=r"clip\.mp4: cannot be read as a video: Invalid data found") as error:
        frames.extend((number, int(image[0, 2, 3])) for number, image in video_input.read_frames("clip.mp4", every))
    assert error.value.kind == "image"
    assert frames == expected


@pytest.mark.parametrize(("rotation", "corner", "shape"), [(0, (0, 0), (4, 6)), (-90, (0, 3), (6, 4))])
def test_frames_of_a_rotated_video_are_upright(video, rotation, corner, shape):
    """PyAV's rotation is counterclockwise: -90 turns the upper left corner to the upper right."""
    video(rotation=rotation)
    _, image = next(video_input.read_frames("clip.mp4"))
    assert image.shape == (3, *shape)
    assert image[:, corner[0], corner[1]].tolist() == [1, 2, 3]


def test_a_file_without_video(video):
    video(has_video=False)
    with pytest.raises(DataError, match="contains no video"):
        next(video_input.read_frames("sound.mp4"))
