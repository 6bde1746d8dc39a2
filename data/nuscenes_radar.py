"""nuScenes for camera and radar: a sample of the data set is one camera's picture of one key frame.

    ROOT/v1.0-mini/*.json          tables (or v1.0-trainval, v1.0-test)
    ROOT/samples/CAM_FRONT/*.jpg   and five more cameras
    ROOT/samples/RADAR_FRONT/*.pcd and four more radars; sweeps between the key frames in ROOT/sweeps/

Everything is given in the camera's frame (x right, y down, z forward, metres) at the time of its picture. Parts of the
set work: what the tables lack is not there, and what only the disk lacks is listed once and may be skipped.
"""

import copy
import functools
import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from tqdm import tqdm

from data import pcd, tables
from data.boxes import seeded
from data.classes import balanced
from data.errors import DataError
from data.files import NAMED, lines_of, without_file
from data.images import read_image
from data.tables import CAMERAS, CLASSES, RADARS
from ops.geometry import yaw_to_alpha

SPLITS = {
    "mini_train": tuple(f"scene-{number:04}" for number in (61, 553, 655, 757, 796, 1077, 1094, 1100)),
    "mini_val": ("scene-0103", "scene-0916"),
}
SEEN_BY = {  # the radars whose points a camera may show, in the order they are read
    "CAM_FRONT": ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT"),
    "CAM_FRONT_LEFT": ("RADAR_FRONT_LEFT", "RADAR_FRONT"),
    "CAM_FRONT_RIGHT": ("RADAR_FRONT_RIGHT", "RADAR_FRONT"),
    "CAM_BACK_LEFT": ("RADAR_BACK_LEFT", "RADAR_FRONT_LEFT"),
    "CAM_BACK_RIGHT": ("RADAR_BACK_RIGHT", "RADAR_FRONT_RIGHT"),
    "CAM_BACK": ("RADAR_BACK_LEFT", "RADAR_BACK_RIGHT"),
}
NEAR, SHOWN_FROM = 0.1, 1.0  # metres: all corners beyond the one, a shown corner beyond the other, as in the devkit
CHUNK = 1000  # pictures looked at together
SIGNS = np.array(  # of a box's corners along its length, width and height
    [(x, y, z) for x in (0.5, -0.5) for y, z in ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5))]
)


def load(
    root,
    version="v1.0-trainval",
    split="train",
    cameras=6,
    sweeps=3,
    max_distance=60.0,
    z_offset=0.0,
    skip_missing=False,
    cache=None,
    transform=None,
    seed=0,
    say=print,
):
    """The pictures of one split as a RadarDataset.

    split         mini_train, mini_val; train, val, test and others of nuscenes-devkit where that is installed; or else
                  the name of a text file in ROOT/{version} or of any such file, with the name of a scene in each line
    cameras       the first so many of tables.CAMERAS, or their names
    sweeps        radar sweeps a key frame, the newest first, 0 to 6; 0 reads no radar
    max_distance  metres: points deeper in the picture are left out
    z_offset      metres that radar points are lifted by
    skip_missing  leave out pictures, and radar sweeps, whose file lacks; False raises the DataError that lists them
    cache         folder for the kept tables; None keeps them in `root`

    Raises DataError where the tables lack or are damaged, and where no picture is left.
    """
    if not 0 <= sweeps <= 6:
        raise ValueError(f"0 to 6 radar sweeps, not {sweeps}")
    content = tables.load(root, version, cache, say)
    wanted = scenes_of(split, Path(root) / version)
    scenes = np.flatnonzero(np.isin(content.scene_names, wanted))
    if not len(scenes):
        have = ", ".join(content.scene_names[:NAMED].tolist())
        raise DataError(Path(root) / version, "", f"has no scene of the split {split}; it has {have} ...")
    names = CAMERAS[:cameras] if isinstance(cameras, int) else tuple(cameras)
    samples = np.flatnonzero(np.isin(content.sample_scene, scenes))
    pictures, radar = _frames(content, samples, names, sweeps)
    dataset = RadarDataset(root, content, samples, pictures, radar, max_distance, z_offset, transform, seed)
    dataset.version, dataset.split = version, split
    dataset.leave_out_missing(skip_missing, say)
    if not len(dataset):
        raise DataError(root, "", f"no picture left of the split {split}; unpack its samples folder")
    return dataset


def scenes_of(split, folder):
    """Names of the scenes of `split`; see `load`. Raises DataError."""
    if split in SPLITS:
        return SPLITS[split]
    for file in (folder / f"{split}.txt", Path(split)):
        if file.is_file():
            return [line.strip() for line in lines_of(file) if line.strip()]
    devkit = importlib.util.find_spec("nuscenes")
    if devkit is None or devkit.origin is None:  # a folder of that name has no origin
        remedy = f"install nuscenes-devkit, or write the names of its scenes to {folder / f'{split}.txt'}, one a line"
        raise DataError(f"split {split}", "", f"only {' and '.join(SPLITS)} are known without more; {remedy}")
    from nuscenes.utils import splits

    official = splits.create_splits_scenes()
    if split not in official:
        raise DataError(f"split {split}", "", f"no such split; there are {', '.join(official)}")
    return official[split]


def _frames(content, samples, names, sweeps):
    """(frames int32 [N] of the pictures of `samples`, sample after sample; frames int32 [S,5,sweeps] of the radars of
    all samples, the newest first, -1 where there is none)."""
    channels = len(tables.CHANNELS)
    key = np.full((len(content.sample_time), channels), -1, dtype=np.int32)
    rows = np.flatnonzero(content.frame_key)
    key[content.frame_sample[rows], content.frame_channel[rows]] = rows
    pictures = key[samples][:, [CAMERAS.index(name) for name in names]].ravel()
    radar = np.full((len(key), len(RADARS), sweeps), -1, dtype=np.int32)
    frame = key[:, len(CAMERAS) :]
    for back in range(sweeps):
        radar[:, :, back] = frame
        frame = np.where(frame >= 0, content.frame_previous[frame], -1) if len(rows) else frame
    return pictures[pictures >= 0], radar


def rotation_matrix(quaternion):
    """Quaternions w, x, y, z [...,4] of any length -> rotation matrices float64 [...,3,3]."""
    w, x, y, z = np.moveaxis(quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
    rows = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack(rows, axis=-1).reshape(*quaternion.shape[:-1], 3, 3)


class Files:
    """The pictures' files of a RadarDataset by their index."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        return self.dataset.path(self.dataset.frames[index])


class RadarDataset(Dataset):
    """Pictures of cameras with 3D boxes and radar; `dataset[i]` and `dataset[epoch, i]` meet the contract in
    data/__init__.py. Beside its fields a target holds

    center, dims   float32 [M,3] geometric centre in the camera's frame; h, w, l; metres
    yaw, alpha     float32 [M] angle about the camera's y axis; the angle the camera observes it at; (-pi, pi]
    velocity       float32 [M,3] m/s in the camera's frame, NaN where unknown
    attribute      int64 [M] position in tables.ATTRIBUTES, -1 without
    visibility     int64 [M] 1 (least) to 4, 0 where the tables do not say
    amodal         float32 [M,2] projected centre in pixels of this image, not clipped
    calib          float32 [3,4] projection to pixels of the file;  affine float32 [2,3] from those to this image's
    radar          float32 [P,5] x, y, z and vx, vz, made good for the vehicle's own motion, in the camera's frame
    rotation       float64 [3,3], translation float64 [3] from the camera's frame to the global one
    sample_token   of the key frame;  camera its channel, such as CAM_FRONT

    An object is in the picture by the devkit's rule: a corner shown and all before the camera. `boxes` hold the
    corners, clipped; `ignore` are objects that neither lidar nor radar hit, which the official score leaves out too.

    root, version, split   what was loaded;  tables    the arrays, see data.tables.Tables
    samples int32 [S']     samples of the split, rows of the tables;  frames int32 [N] the pictures'
    """

    def __init__(self, root, content, samples, frames, radar, max_distance, z_offset, transform=None, seed=0):
        self.root, self.tables, self.samples, self.frames, self.sweeps = str(root), content, samples, frames, radar
        self.max_distance, self.z_offset = max_distance, z_offset
        self.classes, self.transform, self.seed = list(CLASSES), transform, seed
        self.version = self.split = ""
        self.lacking = np.zeros(0, np.int32)

    def __len__(self):
        return len(self.frames)

    def path(self, frame):
        return os.path.join(self.root, self.tables.frame_paths[frame])

    @property
    def paths(self):
        """paths[i] is the file of picture `i`."""
        return Files(self)

    def pose(self, frame):
        """(rotation [3,3], translation [3]) from the sensor of `frame` to the global frame, float64; [F,3,3] and [F,3]
        of frames [F]."""
        content, row, calibration = self.tables, self.tables.frame_pose[frame], self.tables.frame_calibration[frame]
        vehicle = rotation_matrix(content.pose_rotation[row])
        sensor = rotation_matrix(content.calibration_rotation[calibration])
        translation = (vehicle @ content.calibration_translation[calibration][..., None])[..., 0]
        return vehicle @ sensor, translation + content.pose_translation[row]

    def annotation(self, index):
        """The target of picture `index` in file pixels, less the radar, without reading a file."""
        content, frame = self.tables, self.frames[index]
        sample, size = content.frame_sample[frame], tuple(int(side) for side in content.frame_size[frame])
        rotation, translation = self.pose(frame)
        calib = np.zeros((3, 4))
        calib[:, :3] = content.intrinsic[content.frame_calibration[frame]]
        rows = np.arange(content.annotation_first[sample], content.annotation_first[sample + 1])
        center = (content.annotation_center[rows] - translation) @ rotation
        turned = rotation.T @ rotation_matrix(content.annotation_rotation[rows])  # [M,3,3] object -> camera
        boxes, shown = _boxes(center, turned, content.annotation_size[rows], calib[:, :3], size)
        rows, center, heading = rows[shown], center[shown], turned[shown, :, 0]
        pixels = center @ calib[:, :3].T
        fields = {
            "boxes": tv_tensors.BoundingBoxes(_float(boxes[shown]), format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(content.annotation_label[rows].astype(np.int64)),
            "ignore": torch.from_numpy(content.annotation_points[rows] == 0),
            "center": _float(center),
            "dims": _float(content.annotation_size[rows][:, [2, 0, 1]]),
            "yaw": _float(-np.arctan2(heading[:, 2], heading[:, 0])),
            "velocity": _float(content.annotation_velocity[rows] @ rotation),
            "attribute": torch.from_numpy(content.annotation_attribute[rows].astype(np.int64)),
            "visibility": torch.from_numpy(content.annotation_visibility[rows].astype(np.int64)),
            "amodal": _float(pixels[:, :2] / pixels[:, 2:]),
            "calib": _float(calib),
            "affine": torch.eye(2, 3),
            "rotation": torch.from_numpy(rotation),
            "translation": torch.from_numpy(translation),
        }
        fields["alpha"] = yaw_to_alpha(fields["yaw"], fields["center"])
        names = {"sample_token": content.sample_tokens[sample], "camera": CAMERAS[content.frame_channel[frame]]}
        return fields | names | {"image_id": int(index), "size": size}

    def sweeps_of(self, index):
        """int32 [R], the frames of the radar sweeps of picture `index`: radar after radar, each one's newest first."""
        frame = self.frames[index]
        names = SEEN_BY[CAMERAS[self.tables.frame_channel[frame]]]
        sweeps = self.sweeps[self.tables.frame_sample[frame], [RADARS.index(name) for name in names]].ravel()
        return sweeps[sweeps >= 0]

    def radar(self, index):
        """float32 [P,5], the radar points of picture `index`, newest sweep first. Reads files; raises DataError."""
        frame = self.frames[index]
        rotation, translation = self.pose(frame)
        found = [self.sweep(sweep, rotation, translation) for sweep in self.sweeps_of(index)]
        points = np.concatenate([np.zeros((0, 5)), *found])
        points[:, 1] -= self.z_offset
        deep = points[:, 2]
        return _float(points[(deep > 0) & (deep <= self.max_distance)])

    def sweep(self, frame, rotation, translation):
        """float64 [P,5] x, y, z, vx, vz of one sweep in the camera that stands at the pose (rotation, translation)."""
        points, names = pcd.read(self.path(frame))
        at = {name: column for column, name in enumerate(names)}
        lack = [name for name in pcd.USED if name not in at]
        if lack:
            raise DataError(self.path(frame), "", f"no radar of nuScenes: lacks {', '.join(lack)}", kind="image")
        points = points[pcd.trusted(points, at)].astype(np.float64)
        own_rotation, own_translation = self.pose(frame)
        place = points[:, [at["x"], at["y"], at["z"]]] @ own_rotation.T + own_translation
        motion = np.zeros((len(points), 3))
        motion[:, :2] = points[:, [at["vx_comp"], at["vy_comp"]]]
        motion = motion @ own_rotation.T @ rotation
        return np.concatenate([(place - translation) @ rotation, motion[:, [0, 2]]], axis=1)

    def picture(self, index):
        """Picture `index` alone, uint8 [3,H,W]. Raises DataError."""
        path, told = self.path(self.frames[index]), tuple(self.tables.frame_size[self.frames[index]].tolist())
        image = read_image(path)
        height, width = image.shape[-2:]
        if (height, width) != told:
            reason = f"the tables say {told[1]} x {told[0]}, the file {width} x {height}; fetch one of them anew"
            raise DataError(path, "", reason, kind="image")
        return tv_tensors.Image(image)

    def load(self, index):
        """Picture `index` and its target before any transform."""
        return self.picture(index), self.annotation(index) | {"radar": self.radar(index)}

    def parts(self, index):
        """What reads the files of picture `index`, one each: functions without arguments that raise DataError."""
        pose = self.pose(self.frames[index])
        sweeps = [functools.partial(self.sweep, frame, *pose) for frame in self.sweeps_of(index)]
        return [functools.partial(self.picture, index), *sweeps]

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, target = self.load(index)
        if self.transform is None:
            return image, target
        with seeded(self.seed, epoch, index):
            return self.transform(image, target)

    def without(self, indices):
        """This data set less the pictures in `indices`."""
        less = copy.copy(self)
        less.frames = np.delete(self.frames, list(indices))
        return less

    def leave_out_missing(self, skip, say):
        """Look for the files of all pictures and their radar sweeps; those that lack are listed in one line and left
        out, or raised as a DataError unless `skip`."""
        mine = np.unique(self.tables.frame_sample[self.frames])
        wanted = np.concatenate([self.frames, self.sweeps[mine].ravel()])
        wanted = np.unique(wanted[wanted >= 0])
        self.lacking = lacking = without_file(self.root, self.tables.frame_paths, wanted)
        if not len(lacking):
            return
        paths = [self.tables.frame_paths[frame] for frame in lacking[:NAMED]]
        pictures = int(np.isin(self.frames, lacking).sum())
        more = f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else ""
        reason = f"lacks {pictures} pictures and {len(lacking) - pictures} radar sweeps: {', '.join(paths)}{more}"
        if not skip:
            raise DataError(self.root, "", f"{reason}; --skip-missing goes on without them", kind="image")
        say(f"{self.root}: {reason} (skipped)")
        self.frames = self.frames[~np.isin(self.frames, lacking)]
        self.sweeps = np.where(np.isin(self.sweeps, lacking), -1, self.sweeps)

    def faults(self):
        """A DataError for every picture and sweep that was left out because its file lacks, and for every annotation
        of the split's key frames that no box can be, of kind "box"."""
        lacking = [DataError(self.path(frame), "", "no such file; unpack it", kind="image") for frame in self.lacking]
        file = os.path.join(self.root, self.version, "sample_annotation.json")
        rows = np.flatnonzero(np.isin(self.tables.impossible_sample, self.samples))
        said = [(f"record {self.tables.impossible_record[row]}", self.tables.impossible_reason[row]) for row in rows]
        return lacking + [DataError(file, place, reason, kind="box") for place, reason in said]

    def balance_weights(self):
        """See data.classes.balanced. Looks at the boxes of every picture: a minute for v1.0-trainval."""
        rows = tqdm(range(len(self)), desc="counting classes", unit="image", disable=None)
        targets = [self.annotation(index) for index in rows]
        labels = [target["labels"][~target["ignore"]].numpy() for target in targets]
        picture = np.repeat(np.arange(len(self)), [len(each) for each in labels])
        return balanced(picture, np.concatenate(labels), len(self), len(self.classes))

    def fullest(self, count):
        """int64 [count], pictures of the key frames with the most objects; from the first again if they are fewer."""
        objects = np.diff(self.tables.annotation_first)[self.tables.frame_sample[self.frames]]
        return np.resize(np.argsort(-objects, kind="stable"), count)

    def class_counts(self):
        """Annotations of each class that count, int64 [10]; one that two cameras show counts once."""
        content, kept = self.tables, np.unique(self.tables.frame_sample[self.frames])
        of = np.isin(np.repeat(np.arange(len(content.sample_time)), np.diff(content.annotation_first)), kept)
        return np.bincount(content.annotation_label[of & (content.annotation_points > 0)], minlength=len(CLASSES))

    def shown(self):
        """int64 [N], objects that each picture shows. Looks at all boxes: seconds for v1.0-trainval."""
        content, counts = self.tables, [np.zeros(0, np.int64)]
        for frames in np.array_split(self.frames, max(1, len(self) // CHUNK)):
            sample = content.frame_sample[frames]
            first, end = content.annotation_first[sample], content.annotation_first[sample + 1]
            picture = np.repeat(np.arange(len(frames)), end - first)
            rows = np.arange(len(picture)) + np.repeat(end - (end - first).cumsum(), end - first)
            rotation, translation = (value[picture] for value in self.pose(frames))
            center = (content.annotation_center[rows] - translation)[:, None] @ rotation
            turned = rotation.transpose(0, 2, 1) @ rotation_matrix(content.annotation_rotation[rows])
            intrinsic = content.intrinsic[content.frame_calibration[frames]][picture]
            size = content.annotation_size[rows], intrinsic, content.frame_size[frames][picture]
            counts.append(np.bincount(picture[_boxes(center[:, 0], turned, *size)[1]], minlength=len(frames)))
        return np.concatenate(counts)

    def summary(self):
        """Two lines for the console: pictures, background, key frames and radar; objects of each class."""
        samples = np.unique(self.tables.frame_sample[self.frames])
        sweeps = (self.sweeps[samples] >= 0).sum(axis=(0, 2))
        bare = [name for name, count in zip(RADARS, sweeps) if not count] if self.sweeps.shape[2] else []
        lack = f", nothing of {', '.join(bare)}" if bare else ""
        partial = f" of {len(self.samples)}" if len(samples) < len(self.samples) else ""
        empty = int((self.shown() == 0).sum())
        pictures = f"images {len(self)}, background {empty} ({100 * empty / max(1, len(self)):.0f} %)"
        bad = int(np.isin(self.tables.impossible_sample, self.samples).sum())
        dropped = f", impossible boxes {bad}" if bad else ""
        counts = ", ".join(f"{name} {count}" for name, count in zip(CLASSES, self.class_counts()))
        frames = f"key frames {len(samples)}{partial}, radar sweeps {int(sweeps.sum())}{lack}{dropped}"
        return f"{pictures}, {frames}\n  {counts}"


def _float(array):
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _boxes(center, rotation, size, intrinsic, image_size):
    """(xyxy [M,4] of the projected corners, clipped to `image_size` (h, w); bool [M], is it in the picture?).

    center [M,3] and rotation [M,3,3] of the objects in the camera's frame, size [M,3] w, l, h. `intrinsic` [3,3] and
    `image_size` of the picture, or [M,3,3] and [M,2] of each object's.
    """
    half = SIGNS * size[:, None, [1, 0, 2]]  # [M,8,3] along length, width, height
    corners = center[:, None] + half @ rotation.transpose(0, 2, 1)
    deep = corners[..., 2]
    pixels = corners @ intrinsic.swapaxes(-1, -2)
    pixels = pixels[..., :2] / np.maximum(pixels[..., 2:], NEAR)
    edge = np.asarray(image_size, dtype=np.float64)[..., ::-1]
    seen = ((pixels > 0) & (pixels < edge[..., None, :])).all(axis=-1) & (deep > SHOWN_FROM)  # [M,8]
    boxes = np.concatenate([pixels.min(axis=1), pixels.max(axis=1)], axis=-1).clip(0, np.concatenate([edge] * 2, -1))
    boxes = boxes.astype(np.float32)
    return boxes, seen.any(axis=1) & (deep > NEAR).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
