"""A small data set in the official layout of nuScenes: tilted sensors, moving objects, random images and radar."""

import json

import numpy as np
from PIL import Image

from data.nuscenes import tables
from utils.nuscenes import ATTRIBUTES, CAMERAS, CLASS_OF_CATEGORY, RADARS

SIZE = (90, 160)  # (h, w) of the images
INTRINSIC = [[126.0, 0, 81.5], [0, 126.0, 49.0], [0, 0, 1]]
CAMERA_YAWS = dict(zip(CAMERAS, (0, -55, -110, 180, 110, 55)))  # degrees to the left of the vehicle's front
CATEGORIES = [*CLASS_OF_CATEGORY, "animal"]
PCD_FIELDS = ("x", "y", "z", "dyn_prop", "id", "rcs", "vx", "vy", "vx_comp", "vy_comp", "is_quality_valid")
PCD_FIELDS += ("ambig_state", "x_rms", "y_rms", "invalid_state", "pdh0", "vx_rms", "vy_rms")
PCD_SIZE = "4 4 4 1 2 4 4 4 4 4 1 1 1 1 1 1 1 1"
PCD_TYPE = "F F F I I F F F F F I I I I I I I I"
POINT = [8.5, -2.25, 0, 3, 300, 4.5, -1.5, 0.5, -7, 0.25, 1, 3, 19, -4, 0, 1, 16, 3]


def pcd(points, padding=0, **changed):
    """The bytes of a radar file with `points`, rows of 18 numbers. Header lines can be `changed`; None removes one."""
    layout = [(n, f"<{t.lower()}{s}") for n, s, t in zip(PCD_FIELDS, PCD_SIZE.split(), PCD_TYPE.split())]
    body = np.array([tuple(point) for point in points], dtype=layout).tobytes()
    header = {"VERSION": "0.7", "FIELDS": " ".join(PCD_FIELDS), "SIZE": PCD_SIZE, "TYPE": PCD_TYPE}
    header |= {"COUNT": " ".join("1" * 18), "WIDTH": len(points), "HEIGHT": 1, "VIEWPOINT": "0 0 0 1 0 0 0"}
    header |= {"POINTS": len(points), "DATA": "binary"} | changed
    lines = "".join(f"{name} {value}\n" for name, value in header.items() if value is not None)
    return f"# .PCD v0.7 - Point Cloud Data file format\n{lines}".encode() + body + bytes(padding)


def quaternion(degrees, axis=(0, 0, 1)):
    """w, x, y, z of a rotation about an axis."""
    half = np.radians(degrees) / 2
    return np.array([np.cos(half), *(np.sin(half) * np.array(axis, dtype=float) / np.linalg.norm(axis))])


def multiply(a, b):
    """Product of two quaternions."""
    w, v, u, s = a[0], a[1:], b[1:], b[0]
    return np.array([w * s - v @ u, *(w * u + s * v + np.cross(v, u))])


CAMERA_AXES = multiply(quaternion(-90), quaternion(-90, (1, 0, 0)))  # from x right, y down, z forward


def ego_pose(time):
    """(quaternion, translation) of the vehicle at `time` in seconds: on a curve, slightly tilted."""
    tilted = multiply(quaternion(20 + 30 * time), quaternion(1 + time, (1, 2, 0)))
    return tilted, np.array([400 + 8 * time, 1100 + 3 * time, 0.1])


class SmallNuScenes:
    """The records of the tables as lists, and the folder they are in; `write` writes changed records again."""

    def __init__(self, root, scenes=("scene-0061", "scene-0103"), frames=3):
        self.root, self.random = root, np.random.default_rng(5)
        names = (*tables.TABLES, *tables.ANNOTATION_TABLES, "visibility", "log", "map")
        self.tables = {name: [] for name in names}
        self.tables["log"] = [{"token": "log", "logfile": "", "vehicle": "n", "date_captured": "", "location": "x"}]
        self.tables["map"] = [{"token": "map", "log_tokens": ["log"], "category": "", "filename": "map.png"}]
        self.tables["visibility"] = [{"token": str(level), "level": "", "description": ""} for level in range(1, 5)]
        self.tables["category"] = [{"token": f"c {name}", "name": name, "description": ""} for name in CATEGORIES]
        self.tables["attribute"] = [{"token": f"a {name}", "name": name, "description": ""} for name in ATTRIBUTES]
        for channel in (*CAMERAS, *RADARS, "LIDAR_TOP"):
            self.add_sensor(channel)
        for name in scenes:
            self.add_scene(name, frames)
        self.write()

    def add_sensor(self, channel):
        is_camera, number = channel in CAMERAS, len(self.tables["sensor"]) + 1
        modality = {"C": "camera", "R": "radar", "L": "lidar"}[channel[0]]
        self.tables["sensor"].append({"token": f"s {channel}", "channel": channel, "modality": modality})
        yaw = quaternion(CAMERA_YAWS[channel] if is_camera else 70 * number)
        axes = CAMERA_AXES if is_camera else quaternion(2, (1, 1, 0))
        calibration = {"token": f"k {channel}", "sensor_token": f"s {channel}", "translation": [1.5, 0.1 * number, 1.5]}
        calibration |= {"rotation": multiply(multiply(yaw, quaternion(1.5, (1, 2, 3))), axes).tolist()}
        self.tables["calibrated_sensor"].append(calibration | {"camera_intrinsic": INTRINSIC if is_camera else []})

    def add_scene(self, name, frames):
        tokens = [f"{name} {count}" for count in range(frames)]
        scene = {"token": name, "name": name, "log_token": "log", "nbr_samples": frames, "description": ""}
        self.tables["scene"].append(scene | {"first_sample_token": tokens[0], "last_sample_token": tokens[-1]})
        for count, token in enumerate(tokens):
            link = {"prev": tokens[count - 1] if count else "", "next": [*tokens, ""][count + 1]}
            self.tables["sample"].append({"token": token, "timestamp": count * 500000, "scene_token": name} | link)
        for channel in (*CAMERAS, *RADARS, "LIDAR_TOP"):
            self.add_frames(channel, tokens)
        for count, category in enumerate(CATEGORIES):
            self.add_object(f"{name} {category}", category, tokens, count)

    def add_frames(self, channel, tokens):
        """Three files per key frame; the third is the key frame's own."""
        names = [f"{tokens[0]} {channel} {count}".replace(" ", "_") for count in range(3 * len(tokens))]
        for count, name in enumerate(names):
            key, time = count % 3 == 2, int(1e6 * (count - 2) / 6) + 7000 * len(channel)
            suffix = "jpg" if channel in CAMERAS else "pcd"
            link = {"prev": names[count - 1] if count else "", "next": [*names, ""][count + 1]}
            size = {"height": SIZE[0], "width": SIZE[1]} if channel in CAMERAS else {"height": 0, "width": 0}
            file = f"{'samples' if key else 'sweeps'}/{channel}/{name}.{suffix}"
            rotation, translation = ego_pose(1e-6 * time)
            pose = {"token": f"p {name}", "timestamp": time}
            self.tables["ego_pose"].append(pose | {"rotation": rotation.tolist(), "translation": translation.tolist()})
            frame = {"token": name, "sample_token": tokens[count // 3], "ego_pose_token": f"p {name}", "filename": file}
            frame |= {"calibrated_sensor_token": f"k {channel}", "timestamp": time, "is_key_frame": key}
            self.tables["sample_data"].append(frame | {"fileformat": suffix} | size | link)

    def add_object(self, name, category, tokens, count):
        """A moving object in every key frame, every other object without the first, two of three with an attribute."""
        tokens = tokens[count % 2 :] or tokens
        names = [f"{name} {token}" for token in tokens]
        instance = {"token": name, "category_token": f"c {category}", "nbr_annotations": len(names)}
        instance |= {"first_annotation_token": names[0], "last_annotation_token": names[-1]}
        self.tables["instance"].append(instance)
        start = self.random.uniform([370, 1070, 0], [440, 1130, 2])
        for step, (annotation, token) in enumerate(zip(names, tokens)):
            link = {"prev": names[step - 1] if step else "", "next": [*names, ""][step + 1]}
            record = {"token": annotation, "sample_token": token, "instance_token": name} | link
            record |= {"visibility_token": str(1 + count % 4), "num_lidar_pts": count % 3, "num_radar_pts": 0}
            record |= {"attribute_tokens": [f"a {ATTRIBUTES[count % 8]}"] if count % 3 else []}
            record |= {"translation": (start + step * np.array([2, count - 6, 0.1])).tolist()}
            rotation = quaternion(40 * count + 9 * step).tolist()
            record |= {"size": self.random.uniform(1, 5, 3).tolist(), "rotation": rotation}
            self.tables["sample_annotation"].append(record)

    def write(self):
        folder = self.root / "v1.0-mini"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(self.root / "map.png")
        for name, records in self.tables.items():
            (folder / f"{name}.json").write_text(json.dumps(records, indent=1))
        for frame in self.tables["sample_data"]:
            file = self.root / frame["filename"]
            file.parent.mkdir(parents=True, exist_ok=True)
            if frame["fileformat"] == "jpg" and frame["is_key_frame"]:
                Image.fromarray(self.random.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(file)
            elif frame["fileformat"] == "pcd" and "RADAR" in frame["filename"]:
                file.write_bytes(pcd(self.random_points(), padding=4096))

    def random_points(self):
        """Forty returns, some from the vehicle itself, some invalid."""
        points = np.tile(np.array(POINT), (40, 1))
        points[:, :2] = self.random.uniform(-50, 50, (40, 2))
        points[:6, :2] = self.random.uniform(-1.3, 1.3, (6, 2))
        points[:, 8:10] = self.random.normal(0, 5, (40, 2))
        points[:, 3] = self.random.integers(0, 8, 40)
        points[:, 11] = self.random.choice([3, 3, 3, 1], 40)
        points[:, 14] = self.random.choice([0, 0, 0, 4], 40)
        return points.tolist()
