"""Which scenes a split has, and which key frames to show."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.files import read_lines
from data.nuscenes.dataset import NuScenesDataset
from utils.errors import DataError
from utils.nuscenes import MINI_TRAIN, MINI_VAL, devkit_is_installed

SPLITS = {"mini_train": MINI_TRAIN, "mini_val": MINI_VAL}
VERSIONS_OF_SPLIT = {"test": ("v1.0-test",)} | dict.fromkeys(SPLITS, ("v1.0-mini", "v1.0-trainval"))
WHOLE = {("v1.0-trainval", "trainval"), ("v1.0-test", "test")}  # (version, split) with all scenes of the tables
SPLITS_OF_VERSION = {"v1.0-mini": ("mini_val", "mini_train"), "v1.0-trainval": ("val", "train"), "v1.0-test": ("test",)}


def scenes_of(split: str, folder: Path) -> Sequence[str]:
    """Names of the scenes of `split`; see data.nuscenes.load_split. Raises DataError."""
    if split in SPLITS:
        return SPLITS[split]
    for file in (folder / f"{split}.txt", Path(split)):
        if file.is_file():
            return [line.strip() for line in read_lines(file) if line.strip()]
    if not devkit_is_installed():
        remedy = f"install nuscenes-devkit, or write the names of its scenes to {folder / f'{split}.txt'}, one per line"
        raise DataError(f"split {split}", "", f"without the devkit only {' and '.join(SPLITS)} are known; {remedy}")
    from nuscenes.utils import splits

    official = splits.create_splits_scenes()
    if split not in official:
        raise DataError(f"split {split}", "", f"no such split; choose one of {', '.join(official)}")
    return official[split]


def version_of(root: str | Path, split: str) -> str:
    """The version to read a split from: the first that exists of those that have it; v1.0-trainval for most splits."""
    versions = VERSIONS_OF_SPLIT.get(split, ("v1.0-trainval",))
    return next((version for version in versions if (Path(root) / version).is_dir()), versions[0])


def available(root: str | Path, version: str = "", split: str = "") -> tuple[str, tuple[str, ...]]:
    """(version, splits) to try in a nuScenes folder of unknown contents: the given ones, or else the first version that
    exists, and its splits, validation before training. Raises DataError."""
    versions = [version] if version else list(SPLITS_OF_VERSION)
    existing = [name for name in versions if (Path(root) / name).is_dir()]
    if not existing:
        raise DataError(root, "", f"not a nuScenes folder: it has no {' and no '.join(versions)}")
    return existing[0], (split,) if split else SPLITS_OF_VERSION.get(existing[0], ("val", "train"))


def select_key_frames(dataset: NuScenesDataset, count: int) -> list[tuple[str, list[int]]]:
    """`count` evenly spaced key frames of a data set (0: all): [("SCENE_NUMBER", indices of its images)]."""
    tables = dataset.tables
    sample_of_image = tables.frame_sample[dataset.frames]
    samples = np.unique(sample_of_image)
    if count and count < len(samples):
        samples = samples[np.linspace(0, len(samples) - 1, count).round().astype(int)]
    selected = []
    for sample in samples:
        scene = tables.sample_scene[sample]
        earlier = (tables.sample_scene == scene) & (tables.sample_time < tables.sample_time[sample])
        name = f"{tables.scene_names[scene]}_{int(earlier.sum()):03d}"
        selected.append((name, np.flatnonzero(sample_of_image == sample).tolist()))
    return selected
