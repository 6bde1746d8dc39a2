"""Reading annotation files, and finding image files that are missing."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.packed import PackedPaths
from utils.errors import DataError
from utils.files import open_regular as open_regular
from utils.files import read_lines as read_lines

MAX_NAMED = 3  # missing files named in a message


def is_inside(name: str) -> bool:
    """Whether the file `name`, which an annotation gives relative to a folder of the data, is in that folder, going by
    the name alone: a symbolic link in the folder may lead out of it, since its owner has put it there."""
    path = os.path.normpath(name)
    is_relative = not (os.path.isabs(path) or os.path.splitdrive(path)[0])
    return is_relative and path.split(os.sep, 1)[0] != os.pardir and "\0" not in path


def are_inside(paths: PackedPaths) -> bool:
    """`is_inside` of all `paths`, for caches of millions of them: names are looked at only if a byte is suspicious."""
    starts = paths.content[paths.first[:-1][np.diff(paths.first) > 0]]
    content = paths.content.tobytes()
    suspicious = b".." in content or b"\0" in content or np.isin(starts, list(b"/\\")).any() or os.name == "nt"
    return not suspicious or all(is_inside(paths[row]) for row in range(len(paths)))


def is_true(text: str | None) -> bool:
    """Whether a flag in an annotation, such as VOC's `difficult`, is set; a missing or empty one is not."""
    return (text or "").strip().lower() in ("1", "1.0", "true")


def shortened(names: Sequence[str], limit: int = MAX_NAMED) -> str:
    """The first `limit` names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def missing_images(file: Path, place: str, folder: Path, names: Sequence[str]) -> DataError:
    """One error for all images that `file` names and that are not in `folder`. People often have the annotations of a
    whole data set and a part of its images: a line for each image would bury all other errors."""
    return DataError(file, place, f"no image in {folder} for {shortened(names)}", kind="image")


def missing_files(root: str, paths: Sequence[str], rows: Iterable[int]) -> np.ndarray:
    """int32, those of `rows` whose file, `paths[row]` relative to `root`, is missing. Each folder is listed once:
    checking a million files one by one takes minutes on a network disk."""
    listings, missing = {}, []
    for row in rows:
        folder, name = os.path.split(os.path.join(root, paths[row]))
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listings[folder]:
            missing.append(row)
    return np.array(missing, dtype=np.int32)
