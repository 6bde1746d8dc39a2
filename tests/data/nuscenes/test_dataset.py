"""The nuScenes data set against calculated geometry, nuscenes-devkit, a real key frame and damaged copies."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data import PER_OBJECT, check_target, checks, nuscenes
from data.classes import balanced_weights
from data.nuscenes import RadarOptions
from data.nuscenes import dataset as dataset_module
from data.nuscenes.dataset import RADARS_OF_CAMERA, rotation_matrix
from ops.geometry import apply_affine, corners, project
from tests.small_nuscenes import (
    CAMERA_AXES,
    CAMERA_YAWS,
    CATEGORIES,
    POINT,
    SIZE,
    SmallNuScenes,
    multiply,
    pcd,
    quaternion,
)
from utils.errors import DataError
from utils.nuscenes import CAMERAS, CLASS_OF_CATEGORY, CLASSES, RADARS


def load(root, split="mini_train", **options):
    return nuscenes.load_split(root, "v1.0-mini", split, **options)


@pytest.fixture(scope="module")
def dataset(small):
    return load(small.root)


def check_3d(target):
    """Raise AssertionError where the 3D fields break their contract."""
    count = len(target["boxes"])
    shapes = {"center": (count, 3), "dims": (count, 3), "yaw": (count,), "alpha": (count,), "velocity": (count, 3)}
    shapes |= {"amodal": (count, 2), "calib": (3, 4), "affine": (2, 3), "radar": (len(target["radar"]), 5)}
    for name, shape in shapes.items():
        assert target[name].dtype == torch.float32 and target[name].shape == shape, name
    for name in ("attribute", "visibility"):
        assert target[name].dtype == torch.int64 and target[name].shape == (count,), name
    assert target["rotation"].dtype == target["translation"].dtype == torch.float64
    assert ((target["attribute"] >= -1) & (target["attribute"] < 8)).all()
    assert ((target["visibility"] >= 0) & (target["visibility"] <= 4)).all()
    pixels, depth = project(target["center"], target["calib"])
    assert (depth > 0).all() and (target["radar"][:, 2] > 0).all() and (target["radar"][:, 2] <= 60).all()
    torch.testing.assert_close(apply_affine(pixels, target["affine"]), target["amodal"], rtol=1e-4, atol=1e-2)


def test_every_sample_meets_the_contract(dataset):
    assert len(dataset) == 3 * 6 and dataset.classes == list(CLASSES)
    samples = set()
    for index in range(len(dataset)):
        image, target = dataset[index]
        check_target(image, target, 10)
        check_3d(target)
        assert image.shape == (3, *SIZE) and target["size"] == SIZE and target["image_id"] == index
        fields = [name for name in PER_OBJECT if name != "masks"]
        assert all(len(target[name]) == len(target["boxes"]) for name in fields)
        samples.add((target["sample_token"], target["camera"]))
    assert samples == {(f"scene-0061 {count}", camera) for count in range(3) for camera in CAMERAS}


def test_fields_are_those_of_the_same_object(small, dataset):
    """Each object is identified by its global center, and every field compared with the record."""
    records, checked = small.tables["sample_annotation"], 0
    for index in range(len(dataset)):
        target = dataset.annotation(index)
        places = target["center"].double() @ target["rotation"].T + target["translation"]
        own = [record for record in records if record["sample_token"] == target["sample_token"]]
        for row, place in enumerate(places.numpy()):
            record = min(own, key=lambda r, place=place: np.abs(np.array(r["translation"]) - place).max())
            np.testing.assert_allclose(place, record["translation"], atol=1e-4)
            category = CATEGORIES.index(record["instance_token"].split(" ")[1])
            assert CLASSES[target["labels"][row]] == CLASS_OF_CATEGORY[CATEGORIES[category]]
            assert target["visibility"][row] == 1 + category % 4
            assert target["attribute"][row] == (category % 8 if category % 3 else -1)
            assert bool(target["ignore"][row]) == (category % 3 == 0)
            width, length, height = record["size"]
            np.testing.assert_allclose(target["dims"][row].numpy(), [height, width, length], rtol=1e-6)
            velocity = target["rotation"] @ target["velocity"][row].double()  # in the global frame
            np.testing.assert_allclose(velocity.numpy(), [4, 2 * (category - 6), 0.2], atol=1e-4)
            checked += 1
    assert checked > 20


def test_an_object_is_in_the_image_if_one_of_its_corners_is():
    """As nuScenes' BoxVisibility.ANY: not if the camera only sees its middle."""
    rotation = np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])  # length along z, width along x, height along y
    size = np.array([[40.0, 4, 40], [4, 4, 4]])  # w, l, h; corners of the first are 20 m to each side
    intrinsic = np.array([[100.0, 0, 100], [0, 100, 50], [0, 0, 1]])
    center, image_size = np.tile([0.0, 0, 10], (2, 1)), np.tile([100, 200], (2, 1))
    many = (np.tile(each, (2, 1, 1)) for each in (rotation, intrinsic))
    boxes, inside = dataset_module._project_boxes(center, next(many), size, next(many), image_size)
    assert inside.tolist() == [False, True] and boxes[0].tolist() == [0, 0, 200, 100]


def test_boxes_enclose_the_corners_of_level_objects(tmp_path):
    """With a level vehicle and level cameras, yaw alone describes the rotation of an object."""
    level = SmallNuScenes(tmp_path, scenes=("scene-0061",))
    for record in level.tables["ego_pose"]:
        record["rotation"] = quaternion(25).tolist()
    for record in level.tables["calibrated_sensor"]:
        channel = record["token"][2:]
        if channel in CAMERAS:
            record["rotation"] = multiply(quaternion(CAMERA_YAWS[channel]), CAMERA_AXES).tolist()
    level.write()
    dataset, count = load(level.root), 0
    for index in range(len(dataset)):
        target = dataset.annotation(index)
        pixels, _ = project(corners(target["center"], target["dims"], target["yaw"]), target["calib"])
        expected = torch.cat([pixels.amin(1), pixels.amax(1)], dim=1)
        edge = torch.tensor([SIZE[1], SIZE[0]] * 2, dtype=torch.float32)
        expected = expected.clamp(min=0).minimum(edge)
        torch.testing.assert_close(torch.Tensor(target["boxes"]), expected, rtol=0, atol=0.02)
        count += len(expected)
    assert count > 10


def test_an_object_in_front_of_the_front_camera(tmp_path):
    """The vehicle is at the origin, the camera at (1.5, 0.1, 1.5) and looks ahead, a car is 20 m ahead, 2 m left."""
    small = SmallNuScenes(tmp_path, scenes=("scene-0061",), frames=1)
    for record in small.tables["ego_pose"]:
        record |= {"rotation": [1, 0, 0, 0], "translation": [0, 0, 0]}
    small.tables["calibrated_sensor"][0] |= {"rotation": CAMERA_AXES.tolist(), "translation": [1.5, 0.1, 1.5]}
    car = small.tables["sample_annotation"][0]
    car |= {"translation": [21.5, 2.1, 0.5], "size": [2, 4, 1], "rotation": quaternion(30).tolist()}
    car |= {"attribute_tokens": [], "visibility_token": ""}
    small.tables["sample_annotation"] = [car]
    small.write()
    target = load(small.root).annotation(0)
    torch.testing.assert_close(target["center"], torch.tensor([[-2.0, 1, 20]]))
    torch.testing.assert_close(target["yaw"], torch.tensor([np.radians(-90 - 30)], dtype=torch.float32))
    torch.testing.assert_close(target["alpha"], target["yaw"] + float(np.arctan2(2, 20)))
    torch.testing.assert_close(target["amodal"], torch.tensor([[81.5 - 12.6, 49 + 6.3]]))
    assert target["velocity"].isnan().all() and target["labels"].tolist() == [0]
    assert target["attribute"].tolist() == [-1] and target["visibility"].tolist() == [0]


def test_radar_points_of_an_object_keep_their_place(tmp_path):
    """An object without motion, seen by every sweep from another pose of the vehicle, is one point for the camera."""
    small = SmallNuScenes(tmp_path, scenes=("scene-0061",))
    place, motion = np.array([425.0, 1115, 1.5]), np.array([3.0, -2, 0])
    poses = {record["token"]: record for record in small.tables["ego_pose"]}
    sensors = {record["token"]: record for record in small.tables["calibrated_sensor"]}
    for frame in small.tables["sample_data"]:
        channel = frame["filename"].split("/")[1]
        if channel not in RADARS:
            continue
        pose, sensor = poses[frame["ego_pose_token"]], sensors[f"k {channel}"]
        vehicle, own = (rotation_matrix(np.array(record["rotation"])) for record in (pose, sensor))
        point, local = np.array(POINT), vehicle.T @ (place - pose["translation"]) - sensor["translation"]
        point[:3], point[8:10] = own.T @ local, (own.T @ vehicle.T @ motion)[:2]
        (tmp_path / frame["filename"]).write_bytes(pcd([point]))
    dataset, count = load(small.root, radar=RadarOptions(6)), 0
    for index in range(len(dataset)):
        _, target = dataset.load(index)
        expected = (place - target["translation"].numpy()) @ target["rotation"].numpy()
        velocity = (motion @ target["rotation"].numpy())[[0, 2]]
        for point in target["radar"].numpy():
            np.testing.assert_allclose(point[:3], expected, atol=1e-4)
            # the component along the tilted z axis of the radar is not measured
            np.testing.assert_allclose(point[3:], velocity, atol=0.5)
            count += 1
    assert count > 20


@pytest.mark.parametrize("sweeps", [0, 1, 3, 6])
def test_number_of_sweeps(small, sweeps):
    dataset = load(small.root, radar=RadarOptions(sweeps))
    assert dataset.sweeps.shape == (6, 5, sweeps)
    newest = dataset.sweeps[2]  # the third key frame has eight files before it
    assert (newest >= 0).sum() == 5 * sweeps
    for number in range(sweeps):
        names = [dataset.tables.frame_paths[frame] for frame in newest[:, number]]
        assert all(name.endswith(f"_{8 - number}.pcd") and radar in name for name, radar in zip(names, RADARS))


def test_number_of_sweeps_has_limits():
    for sweeps in (-1, 7):
        with pytest.raises(ValueError, match="0 to 6 radar sweeps"):
            RadarOptions(sweeps)


def test_each_camera_reads_its_own_radars(dataset, monkeypatch):
    paths = []
    monkeypatch.setattr(dataset, "sweep", lambda frame, *_: paths.append(dataset.path(frame)) or np.zeros((0, 5)))
    for index in range(6):
        paths.clear()
        assert dataset.radar(index).shape == (0, 5)
        radars = RADARS_OF_CAMERA[dataset.annotation(index)["camera"]]
        assert {path.split("/")[-2] for path in paths} == set(radars) and len(paths) == 3 * len(radars)


def test_max_distance_and_z_offset(small):
    points = load(small.root, radar=RadarOptions(max_distance=60.0)).radar(0)
    near = load(small.root, radar=RadarOptions(max_distance=20.0, z_offset=0.5)).radar(0)
    expected = points[points[:, 2] <= 20] - torch.tensor([0, 0.5, 0, 0, 0])
    assert 0 < len(expected) < len(points)
    torch.testing.assert_close(near, expected)


# ---- the devkit


def test_boxes_equal_the_devkits(small, dataset):
    devkit = pytest.importorskip("nuscenes.nuscenes")
    from nuscenes.utils.geometry_utils import BoxVisibility

    nusc, count = devkit.NuScenes("v1.0-mini", str(small.root), verbose=False), 0
    for index in range(len(dataset)):
        target = dataset.annotation(index)
        token = nusc.get("sample", target["sample_token"])["data"][target["camera"]]
        _, boxes, intrinsic = nusc.get_sample_data(token, box_vis_level=BoxVisibility.ANY)
        boxes = [box for box in boxes if box.name in CLASS_OF_CATEGORY]
        assert len(boxes) == len(target["center"])
        np.testing.assert_allclose(target["calib"][:, :3], intrinsic, rtol=1e-6)
        for row, box in enumerate(boxes):
            np.testing.assert_allclose(target["center"][row], box.center, atol=1e-4)
            heading = box.rotation_matrix[:, 0]
            assert abs(float(target["yaw"][row]) + np.arctan2(heading[2], heading[0])) < 1e-4
            pixels = intrinsic @ box.corners()
            pixels = (pixels[:2] / pixels[2]).clip(0, np.array(SIZE[::-1])[:, None])
            np.testing.assert_allclose(target["boxes"][row], [*pixels.min(1), *pixels.max(1)], atol=1e-3)
            velocity = target["rotation"].numpy().T @ nusc.box_velocity(box.token)
            np.testing.assert_allclose(target["velocity"][row], velocity, atol=1e-4)
            count += 1
    assert count > 20


def test_radar_points_equal_the_devkits(small, dataset):
    devkit = pytest.importorskip("nuscenes.nuscenes")
    from nuscenes.utils.data_classes import RadarPointCloud

    nusc, count = devkit.NuScenes("v1.0-mini", str(small.root), verbose=False), 0
    for index in range(len(dataset)):
        _, target = dataset.load(index)
        sample, parts = nusc.get("sample", target["sample_token"]), []
        for name in RADARS_OF_CAMERA[target["camera"]]:
            cloud, lags = RadarPointCloud.from_file_multisweep(nusc, sample, name, target["camera"], nsweeps=3)
            frame, velocities = nusc.get("sample_data", sample["data"][name]), []
            for lag in dict.fromkeys(lags[0]):
                pose = nusc.get("ego_pose", frame["ego_pose_token"])
                sensor = nusc.get("calibrated_sensor", frame["calibrated_sensor_token"])
                rotation = rotation_matrix(np.array(pose["rotation"])) @ rotation_matrix(np.array(sensor["rotation"]))
                own = cloud.points[8:10, lags[0] == lag]
                velocities.append(
                    target["rotation"].numpy().T @ rotation @ np.concatenate([own, np.zeros_like(own[:1])])
                )
                frame = nusc.get("sample_data", frame["prev"]) if frame["prev"] else None
            parts.append(np.concatenate([cloud.points[:3], np.concatenate(velocities, axis=1)[[0, 2]]]).T)
        expected = np.concatenate(parts)
        expected = expected[(expected[:, 2] > 0) & (expected[:, 2] <= 60)]
        np.testing.assert_allclose(target["radar"], expected, atol=1e-4)
        count += len(expected)
    assert count > 200


# ---- a real key frame


@pytest.mark.realdata
def test_a_real_key_frame(shared, tmp_path):
    dataset = load(shared / "data" / "nuscenes_one_sample", cache=tmp_path)
    assert len(dataset) == 6 and "none of RADAR_FRONT_LEFT, RADAR_FRONT_RIGHT" in dataset.summary()
    objects, with_radar = 0, 0
    for index in range(6):
        image, target = dataset[index]
        check_target(image, target, 10)
        check_3d(target)
        assert image.shape == (3, 900, 1600) and target["velocity"].isnan().all()
        assert (target["attribute"] == -1).all() and (target["visibility"] == 0).all()
        objects, with_radar = objects + len(target["boxes"]), with_radar + (len(target["radar"]) > 0)
        low, high = target["boxes"][:, :2], target["boxes"][:, 2:]
        whole = ((low > 0) & (high < torch.tensor([1600.0, 900]))).all(1)
        assert (((low + high) / 2 - target["amodal"])[whole].abs() < 0.2 * (high - low)[whole]).all()
    assert objects > 68 and with_radar == 3  # some objects are in two images
    front = dataset.load(0)[1]
    distance = torch.cdist(front["radar"][:, [0, 2]], front["center"][:, [0, 2]]).amin(1)
    assert (distance < 3).sum() > 3  # returns of annotated objects


# ---- missing and invalid files


def test_missing_files_are_listed_once_and_skipped(tmp_path):
    SmallNuScenes(tmp_path, scenes=("scene-0061",))
    whole, lines = load(tmp_path), []
    missing = [whole.frames[1], whole.sweeps[2, 0, 1]]
    for frame in missing:
        os.remove(whole.path(frame))
    shutil.rmtree(tmp_path / "samples" / "RADAR_BACK_LEFT")
    with pytest.raises(DataError, match=r"1 images and 4 radar sweeps are missing: .* and 2 more; --skip-missing"):
        load(tmp_path)
    less = load(tmp_path, skip_missing=True, print=lines.append)
    assert len(lines) == 1 and "(skipped)" in lines[0]
    assert len(less) == 17 and whole.frames[1] not in less.frames
    assert (less.sweeps >= 0).sum() == (whole.sweeps >= 0).sum() - 4
    assert [error.kind for error in less.errors()] == ["image"] * 5 and less.errors(missing=False) == []
    for index in range(len(less)):
        check_3d(less[index][1])
    shutil.rmtree(tmp_path / "samples")
    with pytest.raises(DataError, match="no image left"):
        load(tmp_path, skip_missing=True, print=lines.append)


def test_radars_that_are_not_in_the_tables(tmp_path):
    small = SmallNuScenes(tmp_path, scenes=("scene-0061",))
    small.tables["sample_data"] = [r for r in small.tables["sample_data"] if "RADAR_BACK" not in r["filename"]]
    small.write()
    dataset = load(small.root)
    assert "none of RADAR_BACK_LEFT, RADAR_BACK_RIGHT" in dataset.summary()
    counts = {dataset.annotation(i)["camera"]: len(dataset.radar(i)) for i in range(6)}
    assert counts["CAM_BACK"] == 0 and counts["CAM_FRONT"] > 0


def test_an_image_of_another_size_is_named(tmp_path):
    dataset = load(SmallNuScenes(tmp_path, scenes=("scene-0061",), frames=1).root)
    Image.new("RGB", (80, 45)).save(dataset.image_path(0))
    with pytest.raises(DataError, match="160 x 90 in the tables, 80 x 45 in the file"):
        dataset[0]


def test_every_damaged_file_of_an_image_is_listed(tmp_path):
    dataset = load(SmallNuScenes(tmp_path, scenes=("scene-0061",)).root)
    damaged = [dataset.path(frame) for frame in (dataset.frames[6], *dataset.sweeps[1, 0, :2])]  # CAM_FRONT, one radar
    for path in damaged:
        with open(path, "wb") as file:
            file.write(b"damaged")
    errors = checks.unreadable(dataset, 0, progress=False)
    assert [error.path for error in errors[6]] == damaged and dataset.image_path(6) == damaged[0]
    assert {error.path for part in errors.values() for error in part} == set(damaged)


def test_invalid_boxes_are_errors(tmp_path):
    small = SmallNuScenes(tmp_path)
    small.tables["sample_annotation"][0]["size"] = [0, 1, 1]
    small.write()
    train, val = load(small.root), load(small.root, "mini_val")
    (error,) = train.errors()
    assert str(error) == f"{tmp_path}/v1.0-mini/sample_annotation.json: record 1: invalid box: size 0, 1, 1"
    assert error.kind == "box" and val.errors() == [] and "invalid boxes 1" in train.summary()


def test_train_and_val_with_the_errors_of_both(tmp_path):
    small = SmallNuScenes(tmp_path)
    small.tables["sample_annotation"][0]["size"] = [0, 1, 1]
    small.write()
    whole = load(small.root, "mini_val")
    os.remove(whole.image_path(2))
    train, val, errors = nuscenes.load(tmp_path, "v1.0-mini", "mini_train", "mini_val", check=True, print=len)
    assert (len(train), len(val)) == (18, 17) and [error.kind for error in errors] == ["box", "image"]
    with pytest.raises(DataError, match="1 images and 0 radar sweeps are missing"):
        nuscenes.load(tmp_path, "v1.0-mini", "mini_train", "mini_val")


# ---- counts


def test_images_without_objects_are_counted(dataset, monkeypatch):
    monkeypatch.setattr(dataset.tables, "annotation_center", dataset.tables.annotation_center + [0, 0, 1e4])
    assert "images 18, background 18 (100 %), key" in dataset.summary()


def test_without_and_class_counts(dataset):
    less = dataset.without([0, 3])
    assert len(less) == 16 and len(dataset) == 18 and dataset.frames[0] not in less.frames
    assert less.annotation(0)["camera"] == CAMERAS[1]
    counts = dataset.class_counts()
    assert counts.shape == (10,) and counts[CLASSES.index("car")] == 0  # without lidar and radar points
    # per category, in three key frames or the last two; every third category has no points
    assert counts.sum() == sum(3 - count % 2 for count in range(len(CATEGORIES) - 1) if count % 3)
    expected = f"images 18, background 0 (0 %), key frames 3, radar sweeps {(dataset.sweeps[:3] >= 0).sum()}\n"
    assert expected in dataset.summary()


def test_most_objects(dataset):
    sample = dataset.tables.frame_sample[dataset.frames]
    objects = np.diff(dataset.tables.annotation_first)[sample]
    most = dataset.most_objects(20)
    assert len(most) == 20 and objects[most[0]] == objects.max() and sorted(most[:18]) == list(range(18))


def test_balance_weights_are_those_of_the_annotations(dataset, monkeypatch):
    monkeypatch.setattr(dataset_module, "CHUNK", 5)
    targets = [dataset.annotation(index) for index in range(len(dataset))]
    labels = [target["labels"][~target["ignore"]].numpy() for target in targets]
    image = np.repeat(np.arange(18), [len(each) for each in labels])
    expected = balanced_weights(image, np.concatenate(labels), 18, 10)
    np.testing.assert_array_equal(dataset.balance_weights(), expected)
    assert len(set(expected.tolist())) > 1


def test_workers_can_be_spawned(dataset):
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy.radar(0), dataset.radar(0))
    arrays = [value for value in vars(dataset.tables).values() if isinstance(value, np.ndarray)]
    assert len(arrays) > 20 and all(value.dtype != object for value in arrays)
