"""Camera geometry: round trips, known values, and nuscenes-devkit's own boxes."""

import math

import pytest
import torch

from ops import geometry

CALIB = torch.tensor([[1266.0, 0, 816, 40], [0, 1260, 491, -3], [0, 0, 1, 0.002]])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_centers(*shape):
    return torch.rand(*shape, 3) * torch.tensor([40.0, 4, 50]) + torch.tensor([-20.0, -1, 5])


def test_project_of_a_simple_camera():
    calib = torch.tensor([[1000.0, 0, 800, 0], [0, 1000, 450, 0], [0, 0, 1, 0]])
    pixels, depth = geometry.project(torch.tensor([[0.0, 0, 10], [2, -1, 20]]), calib)
    torch.testing.assert_close(pixels, torch.tensor([[800.0, 450], [900, 400]]))
    torch.testing.assert_close(depth, torch.tensor([10.0, 20]))


def test_unproject_is_the_inverse_of_project():
    calib = torch.stack([CALIB, CALIB * torch.tensor([[0.5], [0.5], [1]])])
    points = random_centers(2, 30)
    pixels, depth = geometry.project(points, calib)
    torch.testing.assert_close(geometry.unproject(pixels, depth, calib), points, rtol=1e-4, atol=1e-4)
    for i in range(2):
        torch.testing.assert_close(geometry.project(points[i], calib[i]), (pixels[i], depth[i]))
    expected = torch.cat([points, torch.ones(2, 30, 1)], -1) @ calib.mT
    torch.testing.assert_close(pixels, expected[..., :2] / expected[..., 2:])
    assert geometry.unproject(pixels[:, :0], depth[:, :0], calib).shape == (2, 0, 3)


def test_corners_at_front_top_and_left():
    dims = torch.tensor([1.5, 2.0, 4.0])  # h, w, l
    along_x, along_z = geometry.corners(torch.zeros(2, 3), dims.expand(2, 3), torch.tensor([0.0, -math.pi / 2]))
    torch.testing.assert_close(along_x.amax(0), torch.tensor([2.0, 0.75, 1.0]))
    torch.testing.assert_close(along_x.amin(0), -torch.tensor([2.0, 0.75, 1.0]))
    torch.testing.assert_close(along_x[:4, 0], torch.full((4,), 2.0))  # the front
    torch.testing.assert_close(along_z[:4, 2], torch.full((4,), 2.0))
    torch.testing.assert_close(along_x[[0, 1, 4, 5], 1], torch.full((4,), -0.75))  # up is -y
    torch.testing.assert_close(along_z[[0, 3, 4, 7], 0], torch.full((4,), -1.0))  # the left side, seen from behind


def test_corners_have_the_center_and_sizes_of_their_box():
    center, dims, yaw = random_centers(3, 20), torch.rand(3, 20, 3) + 0.5, torch.rand(3, 20) * 6 - 3
    corners = geometry.corners(center, dims, yaw)
    torch.testing.assert_close(corners.mean(-2), center)
    sizes = [(corners[..., 0, :] - corners[..., other, :]).norm(dim=-1) for other in (3, 1, 4)]  # height, width, length
    torch.testing.assert_close(torch.stack(sizes, -1), dims, rtol=1e-4, atol=1e-4)


def test_corners_equal_the_devkit():
    """In the same order. The devkit's box has x forward, y left and z up, rotated here about the camera's y axis."""
    data_classes = pytest.importorskip("nuscenes.utils.data_classes")
    quaternion = pytest.importorskip("pyquaternion").Quaternion
    upright = quaternion(matrix=torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64).numpy())
    for yaw in (0.0, 0.7, -2.1, 3.0):
        center, dims = random_centers(), torch.rand(3) + 1
        rotation = quaternion(axis=[0, 1, 0], angle=yaw) * upright
        box = data_classes.Box(center.tolist(), dims[[1, 2, 0]].tolist(), rotation)
        expected = torch.from_numpy(box.corners().T).float()
        torch.testing.assert_close(geometry.corners(center, dims, torch.tensor(yaw)), expected, rtol=0, atol=1e-4)


def test_wrap():
    angles = torch.linspace(-math.pi, math.pi, 1001)[1:]
    torch.testing.assert_close(geometry.wrap(angles), angles, rtol=0, atol=0)
    angles, turns = angles[:-1].double(), torch.tensor([-4, -2, 0, 2, 4]).double() * math.pi
    torch.testing.assert_close(
        geometry.wrap(angles[:, None] + turns), angles[:, None].expand(-1, 5), rtol=0, atol=1e-12
    )
    edges = torch.tensor([-math.pi, math.pi, 3 * math.pi, 0.0])
    torch.testing.assert_close(geometry.wrap(edges), torch.tensor([math.pi, math.pi, math.pi, 0]))


def test_alpha_and_yaw_round_trip():
    """Through the column of the box's center, for a calib with a last column of 0, as in nuScenes."""
    calib = CALIB * torch.tensor([1.0, 1, 1, 0])
    center, yaw = random_centers(2, 50), torch.rand(2, 50) * 6 - 3
    alpha = geometry.yaw_to_alpha(yaw, center)
    column = geometry.project(center, calib)[0][..., 0]
    assert alpha.abs().max() <= math.pi
    torch.testing.assert_close(geometry.alpha_to_yaw(alpha, column, calib), yaw, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(geometry.alpha_to_yaw(alpha, column, calib.expand(2, 3, 4)), yaw, rtol=1e-4, atol=1e-4)
    ahead, right = torch.tensor([0.0, 0, 10]), torch.tensor([10.0, 0, 10])
    torch.testing.assert_close(geometry.yaw_to_alpha(torch.tensor(0.5), ahead), torch.tensor(0.5))
    torch.testing.assert_close(geometry.yaw_to_alpha(torch.tensor(0.5), right), torch.tensor(0.5 - math.pi / 4))


def test_apply_affine():
    affine = torch.tensor([[0.5, 0, 3], [0, -2, 1]])
    points = torch.tensor([[2.0, 4], [0, 0]])
    expected = torch.tensor([[4.0, -7], [3, 1]])
    torch.testing.assert_close(geometry.apply_affine(points, affine), expected)
    both = geometry.apply_affine(points.expand(2, 2, 2), torch.stack([affine, 2 * affine]))
    torch.testing.assert_close(both, torch.stack([expected, 2 * expected]))


def test_invert_affine():
    affine = torch.tensor([[0.5, 0.1, 3], [0, -2, 1]]) * torch.tensor([1.0, 3])[:, None, None]
    points = torch.randn(2, 5, 2)
    mapped = geometry.apply_affine(geometry.apply_affine(points, affine), geometry.invert_affine(affine))
    torch.testing.assert_close(mapped, points, rtol=1e-4, atol=1e-5)


def test_project_boxes():
    center, dims, yaw = random_centers(4), torch.rand(4, 3) + 1, torch.rand(4) * 6 - 3
    affine = torch.tensor([[0.5, 0, 3], [0, 0.5, -2]])
    points, pixels, depth = geometry.project_boxes({"center": center, "dims": dims, "yaw": yaw}, CALIB, affine)
    torch.testing.assert_close(points, geometry.corners(center, dims, yaw))
    for i in range(4):
        expected, expected_depth = geometry.project(points[i], CALIB)
        torch.testing.assert_close(pixels[i], geometry.apply_affine(expected, affine))
        torch.testing.assert_close(depth[i], expected_depth)
    none = {"center": torch.zeros(0, 3), "dims": torch.zeros(0, 3), "yaw": torch.zeros(0)}
    assert [len(part) for part in geometry.project_boxes(none, CALIB, affine)] == [0, 0, 0]


def test_decode_depth():
    depth = torch.tensor([1.0, 10, 60])
    torch.testing.assert_close(geometry.decode_depth(-depth.log()), depth, rtol=1e-3, atol=1e-3)
    assert geometry.decode_depth(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
