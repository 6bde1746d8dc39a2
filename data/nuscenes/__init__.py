"""nuScenes with cameras and radars: a sample of the data set is one camera's image of one key frame.

    ROOT/v1.0-mini/*.json          tables (or v1.0-trainval, v1.0-test)
    ROOT/samples/CAM_FRONT/*.jpg   and five more cameras
    ROOT/samples/RADAR_FRONT/*.pcd and four more radars; sweeps between the key frames in ROOT/sweeps/

Parts of the set work too. Files that the tables name and the disk does not have are listed once and may be skipped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data import checks
from data.files import shortened
from data.nuscenes import tables
from data.nuscenes.dataset import NuScenesDataset, RadarOptions
from data.nuscenes.splits import WHOLE, available, scenes_of, version_of
from utils.errors import DataError

__all__ = ["NuScenesDataset", "RadarOptions", "load", "load_available", "load_split"]


def load(
    root: str | Path, version: str, train_split: str, val_split: str, *, check: bool = False, **options: Any
) -> tuple[NuScenesDataset, NuScenesDataset, list[DataError]]:
    """(train, val, errors) of two splits; options: see `load_split`.

    version       "": of each split the version that has it, see splits.version_of
    train_split   "": train is val, the same object, for an evaluation, which needs no other
    check         for --check-data: missing files are among the errors instead of raised

    Raises DataError as `load_split` does, and for a split to train on that has no annotations.
    """
    options["skip_missing"] = check or options.get("skip_missing", False)
    val = load_split(root, version, val_split, **options)
    train = load_split(root, version, train_split, **options) if train_split else val
    for dataset in (train, val):
        if train_split and not dataset.annotated:
            reason = f"{dataset.version} has no annotations: only --eval-only and predict.py can use it"
            raise DataError(f"split {dataset.split}", "", f"{reason}; give --train-split train --val-split val")
    return train, val, checks.unique([*train.errors(missing=check), *val.errors(missing=check)])


def load_split(
    root: str | Path,
    version: str = "",
    split: str = "train",
    radar: RadarOptions | None = None,
    *,
    skip_missing: bool = False,
    cache: str | Path | None = None,
    seed: int = 0,
    print: Callable[[str], object] = print,
) -> NuScenesDataset:
    """The images of one split.

    version        "": the one that has the split, see splits.version_of
    split          mini_train or mini_val; all scenes of v1.0-trainval or v1.0-test: trainval, test; the name of a text
                   file in ROOT/{version}, or the path of any such file, with a scene name per line; train, val and
                   others if nuscenes-devkit is installed
    radar          which points to read; None: RadarOptions()
    skip_missing   leave out images and radar sweeps whose file is missing; False: raise a DataError that lists them
    cache          folder for the parsed tables; None: `root`
    seed           of the augmentation

    Raises DataError where tables are missing or damaged, and where no image is left.
    """
    version = version or version_of(root, split)
    content = tables.load(root, version, cache, print)
    names = content.scene_names if (version, split) in WHOLE else scenes_of(split, Path(root) / version)
    scenes = np.flatnonzero(np.isin(content.scene_names, names))
    if not len(scenes):
        names = shortened(content.scene_names.tolist())
        raise DataError(Path(root) / version, "", f"has no scene of the split {split}; it has {names}")
    dataset = NuScenesDataset(root, version, split, content, scenes, radar or RadarOptions(), seed)
    dataset.leave_out_missing(skip_missing, print)
    if not len(dataset):
        raise DataError(root, "", f"no image left of the split {split}; unpack its samples folder")
    return dataset


def load_available(
    root: str | Path, version: str, split: str, radar: RadarOptions, cache: str | Path | None = None
) -> NuScenesDataset:
    """`load_split` of a folder of unknown contents: the first split of `splits.available` with any image, missing files
    left out. version, split: "" to choose any. Raises DataError."""
    version, names = available(root, version, split)
    errors = []
    for name in names:
        try:
            return load_split(root, version, name, radar, skip_missing=True, cache=cache)
        except DataError as error:
            errors.append(error)
    raise errors[0]
