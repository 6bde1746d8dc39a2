"""Videos of annotated frames, read back."""

import resource
import signal
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from utils.errors import WriteError
from visualize.video import VideoWriter


def read(path):
    """(frames per second, times in seconds, frames [T,H,W,3]) of a video."""
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        frames = list(container.decode(video))
        return (
            video.average_rate,
            [frame.time for frame in frames],
            [frame.to_ndarray(format="rgb24") for frame in frames],
        )


def make(path, frames=3):
    """A writer with frames of noise."""
    writer = VideoWriter(path, Fraction(10))
    for number in range(frames):
        writer.add(torch.randint(256, (3, 48, 64), dtype=torch.uint8), number / 10)
    return writer


def image(level, height=48, width=64):
    return torch.full((3, height, width), level, dtype=torch.uint8)


def test_frames_keep_their_contents_and_the_rate(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", Fraction(30000, 1001))
    for number in range(12):
        writer.add(image(20 * number), number * 1001 / 30000)
    writer.close()
    rate, times, frames = read(tmp_path / "a.mp4")
    assert rate == Fraction(30000, 1001) and times == pytest.approx([n * 1001 / 30000 for n in range(12)], abs=1e-4)
    assert [frame.mean() for frame in frames] == pytest.approx([20 * n for n in range(12)], abs=2)
    assert frames[0].shape == (48, 64, 3)


def test_times_that_are_uneven_or_repeated(tmp_path):
    """As of a camera that leaves frames out."""
    writer = VideoWriter(tmp_path / "a.mp4", Fraction(10))
    for seconds in (0, 0.1, 0.5, 0.5, 0.4, 2):
        writer.add(image(90), seconds)
    writer.close()
    assert read(tmp_path / "a.mp4")[1] == pytest.approx([0, 0.1, 0.5, 0.5, 0.5, 2], abs=1e-3)


@pytest.mark.parametrize(("height", "width", "expected"), [(31, 45, (30, 44, 3)), (1, 1, (2, 2, 3))])
def test_odd_sides_lose_a_pixel(tmp_path, height, width, expected):
    writer = VideoWriter(tmp_path / "a.mp4", Fraction(10))
    writer.add(image(200, height, width), 0)
    writer.close()
    assert np.shape(read(tmp_path / "a.mp4")[2][0]) == expected


def test_frames_of_another_size_are_resized(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", Fraction(10))
    for number, size in enumerate([(48, 64), (96, 80)]):
        writer.add(image(200, *size), number / 10)
    writer.close()
    assert [frame.shape for frame in read(tmp_path / "a.mp4")[2]] == [(48, 64, 3)] * 2


def test_a_video_that_cannot_be_written(tmp_path):
    with pytest.raises(WriteError, match=r"none.a\.mp4: not written: No such file or directory; mount the disk"):
        make(tmp_path / "none" / "a.mp4").close()  # the encoder keeps the first frames


def test_a_file_that_a_disk_takes_in_part_is_removed(tmp_path):
    """Whether the disk is full before the end of the frames, or in `close`."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"a\.mp4: not written: File too large"):
            make(tmp_path / "a.mp4", frames=50).close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_video_has_its_name_when_it_is_whole(tmp_path):
    (tmp_path / "a.mp4").write_text("old")
    writer = make(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_text() == "old"
    writer.close()
    assert len(read(tmp_path / "a.mp4")[2]) == 3
    make(tmp_path / "b.mp4").discard()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
