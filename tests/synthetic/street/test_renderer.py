"""Camera images of a street: objects where their boxes project, and what hides what."""

import dataclasses

import numpy as np
import pytest

from data.nuscenes.dataset import rotation_matrix
from synthetic.street import renderer, simulation
from synthetic.street.nuscenes_files import yaw_quaternion
from tests.synthetic.street.helpers import SIZE, one_object, valid_returns


def render(scene, name="CAM_FRONT", size=SIZE):
    """Pixels float64 [H,W,3] of the image at time 0."""
    return np.asarray(renderer.Renderer(scene, size).render(name, 0.0)[0], np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(simulation.CAMERAS))
def test_an_object_is_drawn_where_its_box_projects(name):
    camera = simulation.CAMERAS[name]
    distance, direction = 14.0, np.radians(camera.yaw + 6)
    scene = one_object(0, s=distance * np.cos(direction), d=-1.75 + distance * np.sin(direction), yaw=0.7)
    away = dataclasses.replace(scene, starts=scene.starts + [500, 0])
    changed = np.abs(render(scene, name, (800, 450)) - render(away, name, (800, 450))).max(axis=2) > 8
    (xy, ego_yaw, *_), (centers, yaws, _) = scene.ego(0.0), scene.objects(0.0)
    width, length, height = scene.sizes[0]
    corners = np.stack(np.meshgrid([-length / 2, length / 2], [-width / 2, width / 2], [-height / 2, height / 2]), -1)
    corners = corners.reshape(-1, 3) @ rotation_matrix(np.array(yaw_quaternion(yaws[0]))).T + centers[0]
    in_vehicle = (corners - [*xy, 0]) @ rotation_matrix(np.array(yaw_quaternion(ego_yaw)))
    pixels = (in_vehicle - camera.position) @ camera.rotation @ camera.intrinsic(800, 450).T
    x, y = (pixels[:, :2] / pixels[:, 2:]).T
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    tolerance = 0.1 * np.ptp(x)  # the roof is narrower than the box, the shadow wider
    np.testing.assert_allclose([columns[0], columns[-1]], [x.min(), x.max()], atol=tolerance)
    np.testing.assert_allclose(rows[-1], y.max(), atol=tolerance)
    np.testing.assert_allclose(rows[0], y.min(), atol=0.15 * np.ptp(y))


def test_classes_look_different_and_have_a_front():
    images = []
    for label, name in enumerate(simulation.CLASSES):
        scenes = [one_object(label, s=9.0, yaw=yaw, attribute="cycle.with_rider") for yaw in (0.0, np.pi)]
        back, front = (render(scene, size=(160, 90)) for scene in scenes)
        if name != "traffic_cone":
            assert (np.abs(back - front).max(axis=2) > 40).sum() > 8, name
        images.append(front)
    for a, image in enumerate(images):
        for b, other in enumerate(images[:a]):
            assert (np.abs(image - other).max(axis=2) > 40).sum() > 60, (a, b)


def test_only_radar_shows_the_speed():
    slow, fast = one_object(0, rate=(2.0, 0.0)), one_object(0, rate=(12.0, 0.0))
    np.testing.assert_array_equal(render(slow), render(fast))
    for scene, speed in ((slow, 2.0), (fast, 12.0)):
        speeds = np.concatenate([valid_returns(scene, "RADAR_FRONT", 0.0, seed)["vx_comp"] for seed in range(10)])
        assert len(speeds) > 3 and abs(np.median(speeds) - speed) < 0.15


def test_near_objects_hide_far_ones():
    bus, pedestrian = one_object(2, s=30.0, yaw=np.pi / 2), one_object(5, s=24.0)
    arrays = ("labels", "sizes", "starts", "rates", "yaws", "reflectors")
    both = {name: np.concatenate([getattr(bus, name), getattr(pedestrian, name)]) for name in arrays}

    def pixel_counts(pedestrian_s):
        both["starts"] = np.array([[30.0, -1.75], [pedestrian_s, -1.75]])
        scene = dataclasses.replace(bus, attributes=["", ""], categories=["", ""], **both)
        return renderer.Renderer(scene, SIZE).render("CAM_FRONT", 0.0)[1:]

    visible, own = pixel_counts(24.0)
    assert visible[1] == own[1] > 0 and 0 < visible[0] < own[0]
    visible, own = pixel_counts(36.0)
    assert visible[1] == 0 < own[1] and visible[0] == own[0]


def test_drawing_order_of_long_objects_follows_their_sides():
    long = np.array([(30, 2), (-30, 2), (-30, 1), (30, 1)])  # its center is nearer to the camera than the small one's
    small = np.array([(20.5, 0.8), (19.5, 0.8), (19.5, 0.2), (20.5, 0.2)])
    assert renderer.far_to_near(np.array([small, long]), np.array([0.0, 0.0])) == [1, 0]
    assert renderer.far_to_near(np.array([small, long]), np.array([0.0, 9.0])) == [0, 1]
    assert renderer.far_to_near(np.empty((0, 4, 2)), np.zeros(2)) == []
