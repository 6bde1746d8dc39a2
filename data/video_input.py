"""Inputs of predict.py: which images, videos and streams are meant, and the images in them.

A source is the path of an image or a video, or a stream: the text of a camera's number or of a URL. Videos and streams
are decoded by PyAV, an optional dependency. torchcodec, the alternative, neither reads cameras nor contains FFmpeg.
"""

import glob
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data.images import SUFFIXES, open_image, read_image
from utils.errors import DataError, UsageError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
ANIMATED_SUFFIXES = (".gif", ".webp")
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("vfwcap", "{}")}
TIMEOUT = 15.0  # seconds to wait for a stream to open, and then for each packet
MAX_RATE, USUAL_RATE = 240, 25  # frames per second: a higher or no rate means that the container does not tell it

Source = Path | str


class Frame(NamedTuple):
    """An image of a source.

    image    uint8 [3,H,W] RGB, upright
    number   of the frame, from 0; None for the one image of a file
    seconds  since the first frame of a video or stream; None for others, animated images too
    rate     frames per second of a video or stream, of those that are read
    """

    image: torch.Tensor
    number: int | None = None
    seconds: float | None = None
    rate: Fraction | None = None


def is_stream(source: Source) -> bool:
    """Whether a source is a camera or a URL, which may have no end."""
    return isinstance(source, str)


def is_video(source: Source) -> bool:
    """Whether a source is a video or a stream."""
    return is_stream(source) or source.suffix.lower() in VIDEO_SUFFIXES


def has_frames(source: Source) -> bool:
    """Whether a source may contain several images."""
    return is_video(source) or source.suffix.lower() in ANIMATED_SUFFIXES


def find_sources(inputs: Sequence[str], out: str | Path) -> list[Source]:
    """The sources that `inputs` name, each once; no file from the output folder `out`.

    Of a folder these are the files directly in it or, if there are none, those in its subfolders; of a pattern such as
    "**/*.jpg" the files that match; both sorted. A number that is no file is a camera. Raises DataError for an input
    without such files, UsageError for a stream beside other inputs.
    """
    sources = []
    for text in map(str, inputs):
        if URL.match(text) or (text.isdecimal() and not Path(text).exists()):
            sources.append(text)
        else:
            sources += _find_files(text, out)
    sources = list(dict.fromkeys(sources))
    if len(sources) > 1 and (streams := [source for source in sources if is_stream(source)]):
        raise UsageError(f"{streams[0]}: a camera or URL may have no end; give it alone")
    return sources


def _find_files(text, out):
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates = [file for file in path.iterdir() if _is_supported(file)] or path.rglob("*")
    elif glob.has_magic(text):
        candidates = map(Path, glob.glob(text, recursive=True))
    else:
        raise DataError(text, "", "no such file or folder")
    matches = sorted(file for file in candidates if _is_supported(file) and file.is_file())
    if not matches:
        where = "in this folder" if path.is_dir() else "matches this pattern"
        raise DataError(text, "", f"no image ({' '.join(SUFFIXES)}) and no video {where}; name others")
    selected = [file for file in matches if Path(out).resolve() not in file.resolve().parents]
    if not selected:
        raise DataError(text, "", f"all its images are in the output folder {out}; give another --out")
    return selected


def _is_supported(path):
    return path.suffix.lower() in (*SUFFIXES, *VIDEO_SUFFIXES)


def count_images(sources: Iterable[Source], every: int = 1) -> int | None:
    """How many images `read_frames` will give, as their files tell it; None if one does not tell."""
    total = 0
    for source in sources:
        frames = _count_frames(source)
        if frames is None:
            return None
        total += math.ceil(frames / every)
    return total


def _count_frames(source):
    if is_stream(source):
        return None
    try:
        if is_video(source):
            with _open_video(source) as (_, video):
                seconds = float(video.duration * video.time_base) if video.duration else 0
                return video.frames or round(seconds * (_rate(video) or 0)) or None
        if has_frames(source):
            with open_image(source) as image:
                return getattr(image, "n_frames", 1)
    except DataError:
        pass  # reported when the source is read
    return 1


def read_images(
    sources: Iterable[Source], every: int, report: Callable[[DataError], object]
) -> Iterator[tuple[Source, Frame]]:
    """Yields the frames of all sources. `report` is called with the error of a file that cannot be read, and of a
    stream that breaks off; the rest follows. Raises DataError for a stream that cannot be opened."""
    for source in sources:
        frame = None
        try:
            for frame in read_frames(source, every):
                yield source, frame
        except DataError as error:
            if frame is None and is_stream(source):
                raise
            report(error)


def read_frames(source: Source, every: int = 1) -> Iterator[Frame]:
    """Yields every `every`-th frame of a video, a stream or an animated image; the image of any other file.

    Raises DataError of kind "image", at any frame.
    """
    if is_video(source):
        yield from _read_video(source, every)
        return
    frames = 1
    if has_frames(source):
        with open_image(source) as image:
            frames = getattr(image, "n_frames", 1)
    if frames == 1:
        yield Frame(read_image(source))
        return
    with open_image(source) as image:
        for number in range(0, frames, every):
            image.seek(number)
            yield Frame(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1), number)


def _read_video(source, every):
    with _open_video(source) as (container, video):
        video.thread_type = "AUTO"
        rate = Fraction(_rate(video) or USUAL_RATE) / every
        start = None
        for number, frame in enumerate(container.decode(video)):
            if number % every:
                continue
            start = frame.time if start is None else start
            seconds = number // every / float(rate) if frame.time is None or start is None else frame.time - start
            image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            quarter_turns = round(frame.rotation / 90)  # counterclockwise, set by phones
            yield Frame(torch.rot90(image, quarter_turns, (1, 2)), number, seconds, rate)


@contextmanager
def _open_video(source: Source) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and its video stream. What goes wrong while it is open becomes a DataError of kind "image"."""
    try:
        import av
    except ImportError:
        raise DataError(source, "", _without_pyav(source), kind="image") from None
    try:
        with av.open(**_location(source)) as container:
            if not container.streams.video:
                raise DataError(source, "", "contains no video; give another file", kind="image")
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, ValueError) as error:  # ValueError: a format that this FFmpeg does not know
        raise DataError(source, "", _reason(source, getattr(error, "strerror", None) or error), kind="image") from None


def _location(source):
    """The arguments of av.open."""
    if not is_stream(source):
        return {"file": str(source)}
    if source.isdecimal():
        format, name = CAMERAS.get(sys.platform, CAMERAS["linux"])
        return {"file": name.format(source), "format": format}
    options = {"rtsp_transport": "tcp"} if source.startswith("rtsp") else {}  # UDP loses packets, which smears images
    return {"file": source, "options": options, "timeout": TIMEOUT}


def _without_pyav(source):
    if is_stream(source):
        return "is a camera or URL, which needs PyAV: pip install -r requirements-video.txt"
    stem = source.stem
    reason = "is a video, which needs PyAV (pip install -r requirements-video.txt); or extract its frames and give "
    return reason + f"their folder: mkdir {stem} && ffmpeg -i {source} {stem}/%06d.jpg"


def _reason(source, error):
    if not is_stream(source):
        return f"cannot be read as a video: {error}; convert or replace it"
    if source.isdecimal():
        device = _location(source)["file"]
        return f"no camera {source} can be read ({device}: {error}); connect one, or give a file, folder or URL"
    return f"cannot be read: {error}; is the address right, and does the camera or server answer?"


def _rate(video):
    """Frames per second as the container tells it, or None."""
    rate = video.average_rate or video.guessed_rate
    return rate if rate and 0 < rate <= MAX_RATE else None


def numbers_in_names(files: Sequence[Source]) -> dict[Source, int]:
    """The number in the name of each file, as in COCO's images; {} if a name is not a number or two are equal, and if a
    file may contain several images."""
    if any(has_frames(file) for file in files):
        return {}
    if not all(file.stem.isdecimal() and len(file.stem) < 16 for file in files):
        return {}
    ids = {file: int(file.stem) for file in files}
    return ids if len(set(ids.values())) == len(files) else {}


def name(source: Source) -> str:
    """A source's name in JSON files: its path; a stream's number or URL, without user and password."""
    return re.sub(r"//[^/@]*@", "//", source) if is_stream(source) else str(source)


def stem(source: Source) -> str:
    """The beginning of the names of files with what was predicted in a source."""
    if not is_stream(source):
        return source.stem
    if source.isdecimal():
        return f"camera_{source}"
    last = re.split(r"[?#]", name(source))[0].rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^\w.-]", "_", last).removesuffix(Path(last).suffix) or "stream"
