"""nuScenes' camera images with 3D boxes and radar points, as a PyTorch data set.

3D fields are in the camera's frame (x right, y down, z forward, meters) at the time of its image. In this file a frame
is a file of a sensor, that is a row of nuScenes' table sample_data.
"""

import copy
import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors

from data.classes import balanced_weights
from data.files import missing_files, shortened
from data.images import read_image
from data.nuscenes import radar_points
from data.nuscenes.tables import CHANNELS, Tables
from data.seeding import SeededDataset
from ops.geometry import yaw_to_alpha
from utils.errors import DataError, printable
from utils.nuscenes import CAMERAS, CLASSES, RADARS, is_annotated

RADARS_OF_CAMERA = {  # whose points may be in a camera's image, in the order they are read
    "CAM_FRONT": ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT"),
    "CAM_FRONT_LEFT": ("RADAR_FRONT_LEFT", "RADAR_FRONT"),
    "CAM_FRONT_RIGHT": ("RADAR_FRONT_RIGHT", "RADAR_FRONT"),
    "CAM_BACK_LEFT": ("RADAR_BACK_LEFT", "RADAR_FRONT_LEFT"),
    "CAM_BACK_RIGHT": ("RADAR_BACK_RIGHT", "RADAR_FRONT_RIGHT"),
    "CAM_BACK": ("RADAR_BACK_LEFT", "RADAR_BACK_RIGHT"),
}
MIN_DEPTH, MIN_VISIBLE_DEPTH = 0.1, 1.0  # meters, of all corners of a box and of one that is visible, as in the devkit
CHUNK = 1000  # images whose boxes are projected together
CORNER_SIGNS = np.array(  # of a box's corners along its length, width and height
    [(x, y, z) for x in (0.5, -0.5) for y, z in ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5))]
)


@dataclass(frozen=True)
class RadarOptions:
    """Which radar points a target has."""

    sweeps: int = 3  # per radar and key frame, the newest first, 0 to 6; 0: radar is not read
    max_distance: float = 60.0  # meters of depth; points beyond are left out
    z_offset: float = 0.0  # meters by which points are raised

    def __post_init__(self):
        if not 0 <= self.sweeps <= 6:
            raise ValueError(f"0 to 6 radar sweeps, not {self.sweeps}")


class NuScenesDataset(SeededDataset):
    """Camera images with 3D boxes and radar; `dataset[i]` and `dataset[epoch, i]` meet the contract in
    data/__init__.py. A target also has

    center, dims   float32 [M,3] geometric center in the camera's frame; h, w, l; meters
    yaw, alpha     float32 [M] angle about the camera's y axis; observation angle; (-pi, pi]
    velocity       float32 [M,3] m/s in the camera's frame, NaN where unknown
    attribute      int64 [M] index into utils.nuscenes.ATTRIBUTES, -1: none
    visibility     int64 [M] 1 to 4 (most visible), 0: unknown
    amodal         float32 [M,2] projected center in pixels of this image, not clipped
    calib          float32 [3,4] projection to pixels of the file;  affine float32 [2,3] from those to this image's
    radar          float32 [P,5] x, y, z and vx, vz, compensated for the vehicle's motion, in the camera's frame
    rotation       float64 [3,3], translation float64 [3]: camera -> global
    sample_token   of the key frame;  camera the channel, such as CAM_FRONT

    As in the devkit an object is in an image if a corner is visible and all corners are in front of the camera. `boxes`
    enclose the projected corners, clipped; `ignore` marks objects without lidar and radar points, which the official
    score leaves out too.

    root, version      of the data set;  split its name, for messages
    tables, radar      its Tables; which radar points to read
    transform          (image, target) -> (image, target), or None; random numbers are seeded from (seed, epoch, i)
    scenes             indices of the scenes to use, see Tables
    samples int32 [S'] samples of the split, rows of the tables;  frames int32 [N] of the images
    sweeps             int32 [S,5,n] frames of each sample's radar sweeps, the newest first, -1 where there is none
    """

    def __init__(
        self,
        root: str | Path,
        version: str,
        split: str,
        tables: Tables,
        scenes: np.ndarray,
        radar: RadarOptions,
        seed: int = 0,
    ):
        self.root, self.version, self.split, self.tables = str(root), version, split, tables
        self.samples = np.flatnonzero(np.isin(tables.sample_scene, scenes))
        self.frames, self.sweeps = key_frames(tables, self.samples, radar.sweeps)
        self.radar_options, self.classes, self.transform, self.seed = radar, list(CLASSES), None, seed
        self.missing = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def annotated(self) -> bool:
        """Whether its objects are known, see utils.nuscenes.is_annotated."""
        return is_annotated(self.version)

    def path(self, frame: int) -> str:
        return os.path.join(self.root, self.tables.frame_paths[frame])

    def image_path(self, index: int) -> str:
        return self.path(self.frames[index])

    def pose(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rotation [3,3], translation [3]) from the sensor of `frame` to the global frame, float64; [F,3,3] and [F,3]
        for frames [F]."""
        tables, row, calibration = self.tables, self.tables.frame_pose[frame], self.tables.frame_calibration[frame]
        vehicle = rotation_matrix(tables.pose_rotation[row])
        sensor = rotation_matrix(tables.calibration_rotation[calibration])
        translation = (vehicle @ tables.calibration_translation[calibration][..., None])[..., 0]
        return vehicle @ sensor, translation + tables.pose_translation[row]

    def annotation(self, index: int) -> dict:
        """The target of image `index` in pixels of the file, without radar. Reads no file."""
        tables, frame = self.tables, self.frames[index]
        size = tuple(int(side) for side in tables.frame_size[frame])
        rotation, translation = self.pose(frame)
        calib = np.zeros((3, 4))
        calib[:, :3] = tables.intrinsic[tables.frame_calibration[frame]]
        _, rows, center, to_camera, boxes = self._visible_objects(self.frames[[index]])
        heading, pixels = to_camera[:, :, 0], center @ calib[:, :3].T
        target = {
            "boxes": tv_tensors.BoundingBoxes(_float(boxes), format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(tables.annotation_label[rows].astype(np.int64)),
            "ignore": torch.from_numpy(tables.annotation_points[rows] == 0),
            "center": _float(center),
            "dims": _float(tables.annotation_size[rows][:, [2, 0, 1]]),
            "yaw": _float(-np.arctan2(heading[:, 2], heading[:, 0])),
            "velocity": _float(tables.annotation_velocity[rows] @ rotation),
            "attribute": torch.from_numpy(tables.annotation_attribute[rows].astype(np.int64)),
            "visibility": torch.from_numpy(tables.annotation_visibility[rows].astype(np.int64)),
            "amodal": _float(pixels[:, :2] / pixels[:, 2:]),
            "calib": _float(calib),
            "affine": torch.eye(2, 3),
            "rotation": torch.from_numpy(rotation),
            "translation": torch.from_numpy(translation),
            "sample_token": tables.sample_tokens[tables.frame_sample[frame]],
            "camera": CAMERAS[tables.frame_channel[frame]],
            "image_id": int(index),
            "size": size,
        }
        return target | {"alpha": yaw_to_alpha(target["yaw"], target["center"])}

    def sweeps_of(self, index: int) -> np.ndarray:
        """int32 [R], the frames of the radar sweeps of image `index`: for each radar, the newest first."""
        frame = self.frames[index]
        names = RADARS_OF_CAMERA[CAMERAS[self.tables.frame_channel[frame]]]
        sweeps = self.sweeps[self.tables.frame_sample[frame], [RADARS.index(name) for name in names]].ravel()
        return sweeps[sweeps >= 0]

    def radar(self, index: int) -> torch.Tensor:
        """float32 [P,5], the radar points of image `index`, by radar, the newest sweep first. Raises DataError."""
        pose = self.pose(self.frames[index])
        points = np.concatenate([np.zeros((0, 5)), *(self.sweep(frame, *pose) for frame in self.sweeps_of(index))])
        points = points[(points[:, 2] > 0) & (points[:, 2] <= self.radar_options.max_distance)]
        points[:, 1] -= self.radar_options.z_offset
        return _float(points)

    def sweep(self, frame: int, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
        """float64 [P,5] x, y, z, vx, vz of one sweep in the frame of a camera; its pose is (rotation, translation)."""
        points, names = radar_points.read(self.path(frame))
        column = {name: number for number, name in enumerate(names)}
        missing = [name for name in radar_points.FIELDS if name not in column]
        if missing:
            raise DataError(self.path(frame), "", f"not a nuScenes radar: no {', '.join(missing)}", kind="image")
        points = points[radar_points.is_valid(points, column)].astype(np.float64)
        own_rotation, own_translation = self.pose(frame)
        place = points[:, [column["x"], column["y"], column["z"]]] @ own_rotation.T + own_translation
        velocity = np.zeros((len(points), 3))
        velocity[:, :2] = points[:, [column["vx_comp"], column["vy_comp"]]]
        velocity = velocity @ own_rotation.T @ rotation
        return np.concatenate([(place - translation) @ rotation, velocity[:, [0, 2]]], axis=1)

    def image(self, index: int) -> tv_tensors.Image:
        """Image `index`, uint8 [3,H,W]. Raises DataError."""
        path, annotated_size = self.image_path(index), tuple(self.tables.frame_size[self.frames[index]].tolist())
        image = read_image(path)
        size = tuple(image.shape[-2:])
        if size != annotated_size:
            tables, file = (f"{width} x {height}" for height, width in (annotated_size, size))
            raise DataError(path, "", f"{tables} in the tables, {file} in the file; download it again", kind="image")
        return tv_tensors.Image(image)

    def load(self, index: int) -> tuple[tv_tensors.Image, dict]:
        """Image `index` and its target before any transform."""
        return self.image(index), self.annotation(index) | {"radar": self.radar(index)}

    def parts(self, index: int) -> list[Callable[[], object]]:
        """One function for each file of image `index`, which reads it and raises DataError."""
        pose = self.pose(self.frames[index])
        sweeps = [functools.partial(self.sweep, frame, *pose) for frame in self.sweeps_of(index)]
        return [functools.partial(self.image, index), *sweeps]

    def without(self, indices: Iterable[int]) -> "NuScenesDataset":
        """This data set without the images at `indices`."""
        part = copy.copy(self)
        part.frames = np.delete(self.frames, list(indices))
        return part

    def leave_out_missing(self, skip: bool, print: Callable[[str], object] = print) -> None:
        """Leave out images and radar sweeps whose file is missing and print one line; DataError unless `skip`."""
        samples = np.unique(self.tables.frame_sample[self.frames])
        frames = np.unique(np.concatenate([self.frames, self.sweeps[samples].ravel()]))
        self.missing = missing_files(self.root, self.tables.frame_paths, frames[frames >= 0])
        if not len(self.missing):
            return
        images = int(np.isin(self.frames, self.missing).sum())
        paths = shortened([self.tables.frame_paths[frame] for frame in self.missing])
        reason = f"{images} images and {len(self.missing) - images} radar sweeps are missing: {paths}"
        if not skip:
            raise DataError(self.root, "", f"{reason}; --skip-missing continues without them", kind="image")
        print(printable(f"{self.root}: {reason} (skipped)"))
        self.frames = self.frames[~np.isin(self.frames, self.missing)]
        self.sweeps = np.where(np.isin(self.sweeps, self.missing), -1, self.sweeps)

    def errors(self, missing: bool = True) -> list[DataError]:
        """A DataError of kind "box" for every invalid annotation of the split and, if `missing`, one of kind "image"
        for every file that was left out because it is missing."""
        frames = self.missing if missing else ()
        errors = [DataError(self.path(frame), "", "no such file; unpack it", kind="image") for frame in frames]
        file = os.path.join(self.root, self.version, "sample_annotation.json")
        for row in np.flatnonzero(np.isin(self.tables.invalid_sample, self.samples)):
            place, reason = f"record {self.tables.invalid_record[row]}", self.tables.invalid_reason[row]
            errors.append(DataError(file, place, reason, kind="box"))
        return errors

    def balance_weights(self) -> np.ndarray:
        """See data.classes.balanced_weights. Projects the boxes of all images: seconds for v1.0-trainval."""
        image, rows = self._objects()
        counts = self.tables.annotation_points[rows] > 0
        labels = self.tables.annotation_label[rows]
        return balanced_weights(image[counts], labels[counts], len(self), len(self.classes))

    def most_objects(self, count: int) -> np.ndarray:
        """int64 [count], images of the key frames with the most objects, repeated where there are fewer images."""
        objects = np.diff(self.tables.annotation_first)[self.tables.frame_sample[self.frames]]
        return np.resize(np.argsort(-objects, kind="stable"), count)

    def class_counts(self) -> np.ndarray:
        """int64 [10], annotations of each class that are not ignored; one that two cameras show counts once."""
        tables, samples = self.tables, np.unique(self.tables.frame_sample[self.frames])
        sample = np.repeat(np.arange(len(tables.sample_time)), np.diff(tables.annotation_first))
        counts = np.isin(sample, samples) & (tables.annotation_points > 0)
        return np.bincount(tables.annotation_label[counts], minlength=len(CLASSES))

    def summary(self) -> str:
        """Two lines for the console: images, background, key frames and radar; objects of each class."""
        samples = np.unique(self.tables.frame_sample[self.frames])
        sweeps = (self.sweeps[samples] >= 0).sum(axis=(0, 2))  # of each radar
        background = len(self) - len(np.unique(self._objects()[0]))
        invalid = int(np.isin(self.tables.invalid_sample, self.samples).sum())
        partial = f" of {len(self.samples)}" if len(samples) < len(self.samples) else ""
        parts = [f"images {len(self)}", f"background {background} ({100 * background / max(1, len(self)):.0f} %)"]
        parts += [f"key frames {len(samples)}{partial}", f"radar sweeps {sweeps.sum()}"]
        if self.radar_options.sweeps and not sweeps.all():
            parts.append(f"none of {', '.join(name for name, count in zip(RADARS, sweeps) if not count)}")
        if invalid:
            parts.append(f"invalid boxes {invalid}")
        counts = (f"{name} {count}" for name, count in zip(CLASSES, self.class_counts()))
        return f"{', '.join(parts)}\n  {', '.join(counts)}"

    def _objects(self):
        """(image int64 [K], row int64 [K]) of the objects in all images: index of the image, row of the annotation."""
        parts = [np.zeros((2, 0), np.int64)]
        for start in range(0, len(self), CHUNK):
            image, rows, *_ = self._visible_objects(self.frames[start : start + CHUNK])
            parts.append(np.stack([start + image, rows]))
        return np.concatenate(parts, axis=1)

    def _visible_objects(self, frames):
        """(image int64 [K], row int64 [K], center [K,3], rotation [K,3,3] object -> camera, boxes [K,4]) of the objects
        in the images `frames` int32 [F]; image: index into `frames`, row: of the annotation."""
        tables, sample = self.tables, self.tables.frame_sample[frames]
        first, end = tables.annotation_first[sample], tables.annotation_first[sample + 1]
        image = np.repeat(np.arange(len(frames)), end - first)
        rows = np.arange(len(image)) + np.repeat(end - (end - first).cumsum(), end - first)
        rotation, translation = (value[image] for value in self.pose(frames))
        center = ((tables.annotation_center[rows] - translation)[:, None] @ rotation)[:, 0]
        to_camera = rotation.swapaxes(1, 2) @ rotation_matrix(tables.annotation_rotation[rows])
        intrinsic = tables.intrinsic[tables.frame_calibration[frames]][image]
        image_size = tables.frame_size[frames][image]
        boxes, visible = _project_boxes(center, to_camera, tables.annotation_size[rows], intrinsic, image_size)
        return tuple(values[visible] for values in (image, rows, center, to_camera, boxes))


def key_frames(tables: Tables, samples: np.ndarray, sweeps: int) -> tuple[np.ndarray, np.ndarray]:
    """(frames int32 [N] of the images of `samples`, sample after sample; frames int32 [S,5,sweeps] of the radar sweeps
    of all samples, the newest first, -1 where there is none)."""
    key = np.full((len(tables.sample_time), len(CHANNELS)), -1, dtype=np.int32)
    rows = np.flatnonzero(tables.frame_key)
    key[tables.frame_sample[rows], tables.frame_channel[rows]] = rows
    images = key[samples][:, : len(CAMERAS)].ravel()
    radar = np.full((len(key), len(RADARS), sweeps), -1, dtype=np.int32)
    frame = key[:, len(CAMERAS) :]
    for number in range(sweeps):
        radar[:, :, number] = frame
        frame = np.where(frame >= 0, tables.frame_previous[frame], -1) if len(rows) else frame
    return images[images >= 0], radar


def rotation_matrix(quaternion: np.ndarray) -> np.ndarray:
    """Quaternions w, x, y, z [...,4] of any length -> rotation matrices float64 [...,3,3]."""
    w, x, y, z = np.moveaxis(quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
    rows = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack(rows, axis=-1).reshape(*quaternion.shape[:-1], 3, 3)


def _float(array):
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _project_boxes(center, rotation, size, intrinsic, image_size):
    """(boxes [M,4] xyxy around the projected corners, clipped to the image; bool [M], whether the object is in it).

    Of each object: center [M,3] and rotation [M,3,3] in the camera's frame, size [M,3] w, l, h, intrinsic [M,3,3] and
    image_size [M,2] h, w.
    """
    half = CORNER_SIGNS * size[:, None, [1, 0, 2]]  # [M,8,3] along length, width, height
    corners = center[:, None] + half @ rotation.swapaxes(1, 2)
    depth = corners[..., 2]
    pixels = corners @ intrinsic.swapaxes(1, 2)
    pixels = pixels[..., :2] / np.maximum(pixels[..., 2:], MIN_DEPTH)
    edges = image_size[:, [1, 0]].astype(np.float64)
    visible = ((pixels > 0) & (pixels < edges[:, None])).all(axis=-1) & (depth > MIN_VISIBLE_DEPTH)  # [M,8]
    boxes = np.concatenate([pixels.min(axis=1), pixels.max(axis=1)], axis=1).clip(0, np.tile(edges, 2))
    boxes = boxes.astype(np.float32)
    return boxes, visible.any(axis=1) & (depth > MIN_DEPTH).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
