"""The key frames of a nuScenes folder that somebody wants to look at, whatever parts of the set are there."""

from pathlib import Path

import numpy as np

from data import nuscenes_radar
from data.errors import DataError

SPLITS = {"v1.0-mini": ("mini_val", "mini_train"), "v1.0-trainval": ("val", "train"), "v1.0-test": ("test",)}


def load(root, version="", split="", **settings):
    """data.nuscenes_radar.load of what is there: of the first version there is, the first split of which there is
    anything, validation before training. Raises DataError."""
    versions = [version] if version else list(SPLITS)
    there = [name for name in versions if (Path(root) / name).is_dir()]
    if not there:
        raise DataError(root, "", f"no folder of nuScenes: has no {' and no '.join(versions)} in it")
    faults = []
    for name in [split] if split else SPLITS.get(there[0], ("val", "train")):
        try:
            return nuscenes_radar.load(root, there[0], name, **settings)
        except DataError as fault:
            faults.append(fault)
    raise faults[0]


def choose(dataset, count):
    """`count` key frames (0: all) from all over a RadarDataset -> [(SCENE_NUMBER, list of its pictures' indices)]."""
    tables = dataset.tables
    sample_of = tables.frame_sample[dataset.frames]
    samples = np.unique(sample_of)
    if count and count < len(samples):
        samples = samples[np.linspace(0, len(samples) - 1, count).round().astype(int)]
    found = []
    for sample in samples:
        scene = tables.sample_scene[sample]
        earlier = (tables.sample_scene == scene) & (tables.sample_time < tables.sample_time[sample])
        name = f"{tables.scene_names[scene]}_{int(earlier.sum()):03d}"
        found.append((name, np.flatnonzero(sample_of == sample).tolist()))
    return found
