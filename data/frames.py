"""Pictures by name: the files that a person means, and what is in one, a photograph or the frames of a video."""

import glob
import importlib.util
from pathlib import Path

import numpy as np
import torch

from data.errors import DataError
from data.images import SUFFIXES, opened, read_image

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
ANIMATIONS = (".gif", ".webp")


def is_shown(path):
    """Does the name of `path` end as those of pictures and videos do?"""
    return Path(path).suffix.lower() in (*SUFFIXES, *VIDEOS)


def find(inputs, out):
    """Paths: files as they are; of folders the pictures and videos directly in them or, without any, below; patterns
    filled in. Each file once, those of a folder in order of name; nothing of the folder `out`. Raises DataError."""
    found = []
    for text in inputs:
        path = Path(text)
        if path.is_file():
            found.append(path)
            continue
        if path.is_dir():
            inside = [file for file in path.iterdir() if is_shown(file)] or path.rglob("*")
        elif glob.has_magic(text):
            inside = map(Path, glob.glob(text, recursive=True))
        else:
            raise DataError(text, "", "no such file or folder")
        inside = sorted(file for file in inside if is_shown(file) and file.is_file())
        inside = [file for file in inside if Path(out).resolve() not in file.resolve().parents]
        if not inside:
            where = "in it" if path.is_dir() else "is called so"
            raise DataError(text, "", f"no picture ({' '.join(SUFFIXES)}) and no video {where}")
        found += inside
    return list(dict.fromkeys(found))


def numbers_of(files):
    """path -> the number that the file is called, as COCO's pictures are; {} unless it is another one of each file."""
    stems = [file.stem for file in files if file.suffix.lower() not in (*VIDEOS, *ANIMATIONS)]
    whole = len(stems) == len(files) and all(stem.isdecimal() and len(stem) < 16 for stem in stems)
    numbers = {file: int(stem) for file, stem in zip(files, stems)} if whole else {}
    return numbers if len(set(numbers.values())) == len(files) else {}


def read_frames(path, every=1):
    """Yields (number, uint8 [3,H,W] RGB, upright) for every `every`-th frame of a video or an animated picture,
    numbered from 0, and once, with None for a number, for any other picture.

    Videos are decoded by PyAV, where that is installed. Raises DataError of kind "image", at any frame.
    """
    suffix = Path(path).suffix.lower()
    if suffix in VIDEOS:
        yield from _video(path, every)
        return
    count = 1
    if suffix in ANIMATIONS:
        with opened(path) as file:
            count = getattr(file, "n_frames", 1)
    if count == 1:
        yield None, read_image(path)
        return
    with opened(path) as file:
        for number in range(0, count, every):
            file.seek(number)
            yield number, torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)


def _video(path, every):
    if importlib.util.find_spec("av") is None:
        stem = Path(path).stem
        reason = "a video, for which PyAV is needed (pip install av); or make pictures of it and give their folder: "
        command = f"mkdir {stem} && ffmpeg -i {path} {stem}/%06d.jpg"
        raise DataError(path, "", reason + command, kind="image")
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(path, "", "holds no video; give another file", kind="image")
            for number, frame in enumerate(container.decode(video=0)):
                if number % every == 0:
                    image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                    quarters = round(getattr(frame, "rotation", 0) / 90)  # counter-clockwise, as phones note it
                    yield number, torch.rot90(image, quarters, (1, 2))
    except av.error.FFmpegError as error:
        raise DataError(path, "", f"cannot be read as a video: {error.strerror}; mend it", kind="image") from None
