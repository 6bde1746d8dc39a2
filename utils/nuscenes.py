"""The names of nuScenes: detection classes, attributes, sensors, scenes."""

import importlib.util

CLASSES = (
    "car",
    "truck",
    "bus",
    "trailer",
    "construction_vehicle",
    "pedestrian",
    "motorcycle",
    "bicycle",
    "traffic_cone",
    "barrier",
)
CLASS_OF_CATEGORY = {  # category of the tables -> class; other categories are not detected
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "vehicle.construction": "construction_vehicle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "movable_object.trafficcone": "traffic_cone",
    "movable_object.barrier": "barrier",
}
ATTRIBUTES = (
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.standing",
    "pedestrian.sitting_lying_down",
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
)
ATTRIBUTE_GROUPS = (0, 0, 1, 1, 1, 2, 2, 2)  # of each attribute: cycle, pedestrian, vehicle
GROUP_OF_CLASS = (2, 2, 2, 2, 2, 1, 0, 0, -1, -1)  # of each class; -1: it has no attributes
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
RADARS = ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT")
MINI_TRAIN = tuple(f"scene-{number:04}" for number in (61, 553, 655, 757, 796, 1077, 1094, 1100))
MINI_VAL = ("scene-0103", "scene-0916")


def is_annotated(version: str) -> bool:
    """Whether the tables of a version have annotations; those of v1.0-test have none."""
    return not version.endswith("test")


def devkit_is_installed() -> bool:
    """Whether nuscenes-devkit is installed. A folder that happens to be called nuscenes is not it."""
    spec = importlib.util.find_spec("nuscenes")
    return spec is not None and spec.origin is not None
