"""Input files of predict.py: which images and videos are meant, and the images in them."""

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from data.images import SUFFIXES, open_image, read_image
from utils.errors import DataError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
ANIMATED_SUFFIXES = (".gif", ".webp")


def find_files(inputs: Iterable[str], out: str | Path) -> list[Path]:
    """The image and video files that `inputs` name, each once; none from the output folder `out`.

    Of a folder these are the files directly in it or, if there are none, those in its subfolders; of a pattern such as
    "**/*.jpg" the files that match; both sorted. Raises DataError for an input without such files.
    """
    files = []
    for text in inputs:
        path = Path(text)
        if path.is_file():
            files.append(path)
            continue
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
        files += selected
    return list(dict.fromkeys(files))


def _is_supported(path):
    return path.suffix.lower() in (*SUFFIXES, *VIDEO_SUFFIXES)


def image_ids(files: Sequence[Path]) -> dict[Path, int]:
    """The number in the name of each file, as in COCO's images; {} if a name is not a number or two are equal, and if a
    file may contain several images."""
    if any(file.suffix.lower() in (*VIDEO_SUFFIXES, *ANIMATED_SUFFIXES) for file in files):
        return {}
    if not all(file.stem.isdecimal() and len(file.stem) < 16 for file in files):
        return {}
    ids = {file: int(file.stem) for file in files}
    return ids if len(set(ids.values())) == len(files) else {}


def read_frames(path: str | Path, every: int = 1) -> Iterator[tuple[int | None, torch.Tensor]]:
    """Yields (number, uint8 [3,H,W] RGB, upright) for every `every`-th frame of a video or an animated image, numbered
    from 0; (None, image) for any other image.

    Videos are decoded by PyAV, an optional dependency. Raises DataError of kind "image", at any frame.
    """
    suffix, frames = Path(path).suffix.lower(), 1
    if suffix in VIDEO_SUFFIXES:
        yield from _read_video(path, every)
        return
    if suffix in ANIMATED_SUFFIXES:
        with open_image(path) as image:
            frames = getattr(image, "n_frames", 1)
    if frames == 1:
        yield None, read_image(path)
        return
    with open_image(path) as image:
        for number in range(0, frames, every):
            image.seek(number)
            yield number, torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _read_video(path, every):
    try:
        import av
    except ImportError:
        stem = Path(path).stem
        reason = "is a video, which needs PyAV (pip install av); or extract its frames and give their folder: "
        reason += f"mkdir {stem} && ffmpeg -i {path} {stem}/%06d.jpg"
        raise DataError(path, "", reason, kind="image") from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(path, "", "contains no video; give another file", kind="image")
            for number, frame in enumerate(container.decode(video=0)):
                if number % every == 0:
                    image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                    quarter_turns = round(getattr(frame, "rotation", 0) / 90)  # counterclockwise, set by phones
                    yield number, torch.rot90(image, quarter_turns, (1, 2))
    except av.error.FFmpegError as error:
        reason = f"cannot be read as a video: {error.strerror}; convert or replace it"
        raise DataError(path, "", reason, kind="image") from None
