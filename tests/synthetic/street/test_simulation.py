"""The street in motion: objects that keep apart and move as they say, and radar returns that obey physics."""

import dataclasses

import numpy as np
import pytest

from synthetic.street import simulation
from synthetic.street.simulation import rotation_2d
from tests.synthetic.street.helpers import build_scene, one_object, valid_returns

MAX_ERROR = 0.6  # meters: five sigma of a radar's range; its angle adds 0.015 of the distance


def test_objects_move_with_their_velocity_and_keep_apart():
    scene = build_scene(1, 2, 8)
    before, now, after = (scene.objects(time)[0] for time in (0.999, 1.0, 1.001))
    velocity = scene.objects(1.0)[2]
    np.testing.assert_allclose((after - before)[:, :2] / 0.002, velocity, atol=1e-3)
    moving = np.array([attribute.endswith(".moving") for attribute in scene.attributes])
    assert (np.linalg.norm(velocity[moving], axis=1) > 0.4).all() and moving.sum() > 5
    still = [attribute.rpartition(".")[2] in ("parked", "stopped", "standing", "") for attribute in scene.attributes]
    np.testing.assert_array_equal(velocity[still], 0)
    ego_before, ego_after = (scene.ego(time)[0] for time in (0.999, 1.001))
    assert np.linalg.norm(ego_after - ego_before) / 0.002 == pytest.approx(scene.ego(1.0)[2], rel=1e-4)
    gaps = np.linalg.norm(now[:, None, :2] - now[:, :2], axis=-1) + 1e3 * np.eye(len(now))
    assert (gaps > (scene.sizes[:, :2].min(axis=1) / 2)[:, None]).all()


def test_every_scene_has_objects_of_every_class():
    for index in range(3):
        assert set(range(10)) <= set(build_scene(4, index, 2).labels.tolist())


def test_scenes_are_those_of_version_2():
    """If they change on purpose, raise simulation.VERSION, so that folders drawn before are not reused."""
    scene = build_scene(2, 0, 3)
    assert simulation.VERSION == 2 and len(scene.labels) == 52
    np.testing.assert_allclose(scene.starts[:2], [[2.25, -27.396], [2.25, 3.242]], atol=1e-3)
    points, _ = simulation.radar_returns(scene, "RADAR_FRONT", 0.0, np.random.default_rng(0))
    assert len(points) == 26
    np.testing.assert_allclose(
        [points["x"][-1], points["y"][-1], points["vx"][-1]], [24.498, -40.738, -0.42], atol=1e-3
    )


def sensor_pose(scene, radar, time):
    """Global place [2] and direction of a radar."""
    xy, yaw, *_ = scene.ego(time)
    return xy + rotation_2d(yaw) @ np.array(radar.position[:2]), yaw + np.radians(radar.yaw)


@pytest.mark.parametrize("name", list(simulation.RADARS))
def test_radar_returns_obey_physics(name):
    radar, time, checked = simulation.RADARS[name], 1.3, 0
    for scene in (build_scene(5, index, 10) for index in (1, 2, 3)):
        sweeps = [simulation.radar_returns(scene, name, time, np.random.default_rng(seed)) for seed in range(3)]
        points, source = (np.concatenate(parts) for parts in zip(*sweeps))
        valid = (points["invalid_state"] == 0) & (points["ambig_state"] == 3)
        for index in range(len(scene.labels)):
            own = points[valid & (source == index)]
            check_returns(scene, radar, time, index, own)
            checked += len(own)
    assert checked > 50


def check_returns(scene, radar, time, index, points, step=1e-4):
    """Place, speed over ground and relative speed of returns of one object, against the scene around that moment."""
    center, yaw, velocity = (state[index] for state in scene.objects(time))
    (place, direction), still = sensor_pose(scene, radar, time), np.linalg.norm(velocity) < 0.2
    later, earlier = (sensor_pose(scene, radar, moment)[0] for moment in (time + step, time - step))
    measured = np.stack([points["x"], points["y"]], axis=1) @ rotation_2d(direction).T + place
    distance = np.linalg.norm(measured - place, axis=1, keepdims=True)
    local = (measured - center[:2]) @ rotation_2d(yaw)
    outside = np.maximum(np.abs(local) - scene.sizes[index, 1::-1] / 2, 0)
    assert (np.linalg.norm(outside, axis=1) < MAX_ERROR + 0.015 * distance[:, 0]).all()
    ray = (measured - place) / distance
    over_ground, relative = (
        np.stack([points["vx" + kind], points["vy" + kind]], axis=1) @ rotation_2d(direction).T
        for kind in ("_comp", "")
    )
    for vector in (over_ground, relative):  # along the ray: a radar measures nothing else
        np.testing.assert_allclose(vector[:, 0] * ray[:, 1], vector[:, 1] * ray[:, 0], atol=1e-4)
    np.testing.assert_allclose((over_ground * ray).sum(axis=1), ray @ velocity, atol=0.6)
    # the relative speed is the change of the distance between radar and object
    after, before = measured + velocity * step - later, measured - velocity * step - earlier
    change = (np.linalg.norm(after, axis=1) - np.linalg.norm(before, axis=1)) / (2 * step)
    np.testing.assert_allclose((relative * ray).sum(axis=1), change, atol=0.6)
    assert np.isin(points["dyn_prop"], (1, 3) if still else (0, 2, 6)).all()


def test_a_radar_in_a_curve_moves_sideways():
    scene = dataclasses.replace(one_object(0, s=11.0, d=8.0), curvature=0.02, ego_path=(0.0, -1.75, 10.0))
    step, (centers, *_) = 1e-4, scene.objects(0.0)
    points = np.concatenate([valid_returns(scene, "RADAR_FRONT", 0.0, seed) for seed in range(60)])
    place, direction = sensor_pose(scene, simulation.RADARS["RADAR_FRONT"], 0.0)
    later, _ = sensor_pose(scene, simulation.RADARS["RADAR_FRONT"], step)
    measured = np.stack([points["x"], points["y"]], axis=1) @ rotation_2d(direction).T + place
    change = (np.linalg.norm(measured - later, axis=1) - np.linalg.norm(measured - place, axis=1)) / step
    relative = (points["vx"] * points["x"] + points["vy"] * points["y"]) / np.hypot(points["x"], points["y"])
    assert len(points) > 30 and np.linalg.norm(centers[0, :2] - place) < 14
    assert abs(np.median(relative - change)) < 0.05
