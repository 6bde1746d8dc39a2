"""The list of an image folder's files, cached between runs.

Listing the 1.28 million files of ImageNet takes minutes on a slow disk. The list is cached beside the data, or in
another folder if that cannot be written, and used until a folder in it changes. It is a dict of arrays:

    content uint8, first int64 [N+1]    paths relative to the folder, see data.packed
    labels int32 [N]                    positions in classes, str [K]
    folders str [F], mtimes int64 [F]   relative, with their modification times in nanoseconds
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.cache import load_arrays, save_arrays
from data.files import are_inside
from data.images import SUFFIXES
from data.packed import PackedPaths
from utils.errors import DataError

THREADS = 16  # that list folders: a network disk has a high latency, but answers many requests at a time
FORMAT = 2  # of a cached list; one of another format is not used
ARRAYS = ("content", "first", "labels", "classes", "folders", "mtimes")


def list_files(
    folder: Path, split: str, cache: Path | None = None, print: Callable[[str], object] = print
) -> dict[str, np.ndarray]:
    """The list of files of one split, cached or read from the disk. Raises DataError."""
    if not folder.is_dir():
        raise DataError(folder, "", f"no such folder; give the one that contains train and val, or --{split} DIR")
    name = f".sightline_files_{folder.name}_{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]}"
    places = [Path(place) / name for place in (folder.parent, cache) if place is not None]
    for place in places:
        files = _load(place, folder, print)
        if files is not None:
            return files
    files = _read(folder)
    if not any(save_arrays(place, {"format": np.array(FORMAT), **files}) for place in places):
        print(f"{folder}: its list of files could not be cached in {' or '.join(map(str, places))}")
    return files


def _load(place, folder, print):
    """The list cached in `place`; None if there is none or it is out of date."""
    if not place.is_dir():
        return None
    try:
        files = load_arrays(place)
        if int(files.pop("format")) != FORMAT:
            return None
        files = {name: files[name] for name in ARRAYS}
        if not are_inside(PackedPaths.from_arrays(files["content"], files["first"])):
            raise ValueError("a path leads out of the folder of the data")
    except PermissionError:
        print(f"{place}: no permission to read it, listing the files of {folder} again; fix its permissions")
        return None
    except (OSError, ValueError, LookupError, EOFError):
        print(f"{place}: damaged, listing the files of {folder} again")
        return None
    try:
        mtimes = [os.stat(folder / name).st_mtime_ns for name in files["folders"].tolist()]
    except FileNotFoundError:
        return None
    return files if files["mtimes"].tolist() == mtimes else None


def _read(folder):
    """The list of files of `folder`, read from the disk. Raises DataError."""
    try:
        mtime = os.stat(folder).st_mtime_ns  # before listing: a file added after it changes the folder's time again
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        if not classes:
            raise DataError(folder, "", "contains no class folder; put the images of each class into a folder")
        with ThreadPoolExecutor(THREADS) as threads:
            parts = threads.map(_read_class, [folder] * len(classes), classes)
            bar = tqdm(parts, desc=f"listing {folder}", total=len(classes), unit="class", disable=None)
            contents, lengths, folders, mtimes = zip(*bar)
    except OSError as error:
        raise DataError(error.filename or folder, "", f"cannot be listed: {error.strerror}") from None
    return {
        "content": np.frombuffer(b"".join(contents), dtype=np.uint8),
        "first": np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
        "labels": np.repeat(np.arange(len(classes), dtype=np.int32), [len(length) for length in lengths]),
        "classes": np.array(classes),
        "folders": np.array(["", *(name for names in folders for name in names)]),
        "mtimes": np.array([mtime, *(mtime for times in mtimes for mtime in times)], dtype=np.int64),
    }


def _read_class(folder, name):
    """(joined paths as bytes, their lengths, folders, their mtimes) of the class folder `name`, paths sorted."""
    images, folders, mtimes, pending = [], [], [], [name]
    while pending:
        current = pending.pop()
        folders.append(current)
        mtimes.append(os.stat(folder / current).st_mtime_ns)
        with os.scandir(folder / current) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(SUFFIXES):  # before is_dir, which may ask the disk
                    images.append(f"{current}/{entry.name}")
                elif entry.is_dir():
                    pending.append(f"{current}/{entry.name}")
    encoded = [os.fsencode(path) for path in sorted(images)]
    return b"".join(encoded), np.array([len(path) for path in encoded], dtype=np.int64), folders, mtimes
