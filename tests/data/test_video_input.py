"""Which files predict.py reads, and the images in them."""

import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, video_input
from utils.errors import UsageError


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (200, 100, 50)).save(path)
    return path


# ---- files ----


def test_files_folders_and_patterns_give_each_file_once_and_sorted(tmp_path):
    first, second, deep = (write_image(tmp_path / name) for name in ("b/2.jpg", "b/10.png", "b/deep/3.jpg"))
    (tmp_path / "b" / "notes.txt").write_text("no image")
    assert video_input.find_sources([str(tmp_path / "b")], tmp_path / "out") == [second, first]
    assert video_input.find_sources([str(tmp_path / "b" / "*.jpg"), str(first)], tmp_path / "out") == [first]
    assert video_input.find_sources([str(deep), str(tmp_path / "b" / "**" / "*.jpg")], tmp_path / "out") == [
        deep,
        first,
    ]


def test_a_folder_without_images_gives_those_of_its_subfolders_but_not_the_output(tmp_path):
    inside = write_image(tmp_path / "photos" / "ants" / "1.jpg")
    write_image(tmp_path / "photos" / "out" / "drawn.jpg")
    assert video_input.find_sources([str(tmp_path / "photos")], tmp_path / "photos" / "out") == [inside]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none", "no such file"), ("empty", "no image .* in this folder"), ("*.jpg", "no image .* matches this pattern")],
)
def test_inputs_without_files(tmp_path, name, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=reason):
        video_input.find_sources([str(tmp_path / name)], tmp_path / "out")


def test_a_folder_within_the_output_folder(tmp_path):
    write_image(tmp_path / "photos" / "1.jpg")
    with pytest.raises(DataError, match=r"all its images are in the output folder .*; give another --out"):
        video_input.find_sources([str(tmp_path / "photos")], tmp_path)


def test_ids_are_the_numbers_in_the_names_if_all_differ(tmp_path):
    files = [tmp_path / name for name in ("000139.jpg", "7.png")]
    assert video_input.numbers_in_names(files) == {files[0]: 139, files[1]: 7}
    assert video_input.numbers_in_names([*files, tmp_path / "other" / "7.jpg"]) == {}
    assert video_input.numbers_in_names([*files, tmp_path / "dog.jpg"]) == {}
    assert video_input.numbers_in_names([*files, tmp_path / "12.mp4"]) == {}  # has many images
    longest = tmp_path / f"{'9' * 15}.jpg"  # more digits are not exact in every program that reads JSON
    assert video_input.numbers_in_names([longest]) == {longest: 10**15 - 1}
    assert video_input.numbers_in_names([tmp_path / f"{'9' * 16}.jpg"]) == {}


# ---- frames ----


def test_an_image_is_one_frame(tmp_path):
    for name in ("one.jpg", "one.gif"):
        (frame,) = video_input.read_frames(write_image(tmp_path / name))
        assert frame.number is None and frame.seconds is None and frame.image.shape == (3, 30, 40)


def test_frames_of_an_animated_image(tmp_path):
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    images = [Image.new("RGB", (16, 12), color) for color in colors]
    images[0].save(tmp_path / "three.webp", save_all=True, append_images=images[1:], lossless=True)
    frames = list(video_input.read_frames(tmp_path / "three.webp"))
    assert [frame.number for frame in frames] == [0, 1, 2]
    for frame, color in zip(frames, colors):
        torch.testing.assert_close(frame.image[:, 5, 5], torch.tensor(color, dtype=torch.uint8))
    assert [frame.number for frame in video_input.read_frames(tmp_path / "three.webp", every=2)] == [0, 2]
    assert [video_input.count_images([tmp_path / "three.webp"], every) for every in (1, 2)] == [3, 2]


def test_a_truncated_animated_image_gives_its_whole_frames_and_then_its_error(tmp_path):
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (60, 80, 3), dtype=np.uint8)) for _ in range(4)]
    images[0].save(tmp_path / "four.gif", save_all=True, append_images=images[1:])
    whole = (tmp_path / "four.gif").read_bytes()
    (tmp_path / "four.gif").write_bytes(whole[: len(whole) * 5 // 8])
    numbers = []
    with pytest.raises(DataError, match=r"four\.gif"):
        numbers.extend(frame.number for frame in video_input.read_frames(tmp_path / "four.gif"))
    assert numbers == [0, 1]


# ---- videos and streams ----


def write_video(path, levels, rate=10):
    """Frames of 48 x 32 pixels of these gray levels, with a black upper left quarter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for level in levels:
            pixels = np.full((32, 48, 3), level, dtype=np.uint8)
            pixels[:16, :24] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("every", "numbers"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4])])
def test_frames_of_a_video_have_their_times(tmp_path, every, numbers):
    path = write_video(tmp_path / "clip.mp4", [40, 80, 120, 160, 200], rate=Fraction(30000, 1001))
    frames = list(video_input.read_frames(path, every))
    assert [frame.number for frame in frames] == numbers
    assert [frame.seconds for frame in frames] == pytest.approx([number * 1001 / 30000 for number in numbers], abs=1e-4)
    assert {frame.rate for frame in frames} == {Fraction(30000, 1001) / every}
    levels = [float(frame.image[:, 24:].float().mean()) for frame in frames]
    assert levels == pytest.approx([40 + 40 * number for number in numbers], abs=5)
    assert frames[0].image.shape == (3, 32, 48) and frames[0].image[:, :12, :20].max() < 20
    assert video_input.count_images([path, write_image(tmp_path / "a.jpg")], every) == len(numbers) + 1


def test_frames_of_a_rotated_video_are_upright(tmp_path, monkeypatch):
    """PyAV's rotation is counterclockwise: -90 turns the upper left corner to the upper right."""
    path = write_video(tmp_path / "phone.mp4", [200])
    decode = av.container.InputContainer.decode

    class Turned:
        rotation = -90

        def __init__(self, frame):
            self.time, self.to_ndarray = frame.time, frame.to_ndarray

    class Container:
        def __init__(self, container):
            self.container = container
            self.streams = container.streams

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.container.close()

        def decode(self, video):
            return map(Turned, decode(self.container, video))

    whole = av.open
    monkeypatch.setattr(av, "open", lambda **options: Container(whole(**options)))
    (frame,) = video_input.read_frames(path)
    assert frame.image.shape == (3, 48, 32)
    assert frame.image[:, :20, 20:].max() < 20 and frame.image[:, :, :12].min() > 150


def test_a_truncated_video_gives_its_whole_frames_and_then_its_error(tmp_path):
    path = write_video(tmp_path / "clip.mkv", range(0, 250, 5))
    path.write_bytes(path.read_bytes()[:-200])
    assert 0 < sum(1 for _ in video_input.read_frames(path)) < 50
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 99)
    with pytest.raises(DataError, match=r"broken\.mp4: cannot be read as a video: Invalid data found") as error:
        next(video_input.read_frames(tmp_path / "broken.mp4"))
    assert error.value.kind == "image"
    assert video_input.count_images([tmp_path / "broken.mp4"]) == 1  # whose error is reported when it is read


def test_a_file_without_video(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match="contains no video"):
        next(video_input.read_frames(tmp_path / "sound.mp4"))


@pytest.mark.parametrize(("source", "reason"), [(Path("clip.mp4"), r"ffmpeg -i clip\.mp4"), ("0", "camera or URL")])
def test_a_video_without_pyav(monkeypatch, source, reason):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=f"pip install -r requirements-video.txt.*{reason}|{reason}.*pip install"):
        next(video_input.read_frames(source))


def test_numbers_and_urls_are_streams_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert video_input.find_sources(["0"], "out") == ["0"]
    (source,) = video_input.find_sources(["rtsp://user:secret@host:554/a/front.sdp?x=1"], "out")
    assert video_input.is_stream(source) and video_input.is_video(source)
    assert video_input.name(source) == "rtsp://host:554/a/front.sdp?x=1" and video_input.stem(source) == "front"
    assert video_input.stem("0") == "camera_0" and video_input.count_images(["0"]) is None
    write_image(tmp_path / "0" / "a.jpg")
    assert video_input.find_sources(["0"], "out") == [Path("0/a.jpg")]
    with pytest.raises(UsageError, match="1: a camera or URL may have no end; give it alone"):
        video_input.find_sources(["1", "0"], "out")


def test_streams_that_are_not_there(monkeypatch):
    with pytest.raises(DataError, match=r"99: no camera 99 can be read .*connect one, or give a file"):
        list(video_input.read_images(["99"], 1, pytest.fail))
    with pytest.raises(DataError, match=r"tcp://127\.0\.0\.1:9: cannot be read: Connection refused"):
        list(video_input.read_images(["tcp://127.0.0.1:9"], 1, pytest.fail))


def test_a_stream_that_breaks_off_is_reported(monkeypatch):
    def broken(source, every):
        yield video_input.Frame(torch.zeros(3, 2, 2), 0, 0.0, Fraction(10))
        raise DataError(source, "", "ended")

    errors = []
    monkeypatch.setattr(video_input, "read_frames", broken)
    assert len(list(video_input.read_images(["0"], 1, errors.append))) == 1 and len(errors) == 1


@pytest.mark.parametrize(
    ("average", "guessed", "rate"),
    [(Fraction(25), None, 25), (None, Fraction(30), 30), (None, None, None), (Fraction(90_000), None, None)],
)
def test_a_rate_that_no_video_has_is_unknown(average, guessed, rate):
    assert video_input._rate(SimpleNamespace(average_rate=average, guessed_rate=guessed)) == rate
