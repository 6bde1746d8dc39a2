"""Camera geometry and rotation bins: round trips, known values, and nuscenes-devkit's own boxes."""

import math

import pytest
import torch

from ops import geometry, rotation

CALIB = torch.tensor([[1266.0, 0, 816, 40], [0, 1260, 491, -3], [0, 0, 1, 0.002]])


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def random_centers(*shape):
    return torch.rand(*shape, 3) * torch.tensor([40.0, 4, 50]) + torch.tensor([-20.0, -1, 5])


def angles(count=1001):
    """Angles over the whole circle, -pi not among them."""
    return torch.linspace(-math.pi, math.pi, count)[1:]


def test_project_is_the_pinhole():
    calib = torch.tensor([[1000.0, 0, 800, 0], [0, 1000, 450, 0], [0, 0, 1, 0]])
    pixels, depth = geometry.project(torch.tensor([[0.0, 0, 10], [2, -1, 20]]), calib)
    torch.testing.assert_close(pixels, torch.tensor([[800.0, 450], [900, 400]]))
    torch.testing.assert_close(depth, torch.tensor([10.0, 20]))


def test_project_round_trip_and_batches():
    calib = torch.stack([CALIB, CALIB * torch.tensor([[0.5], [0.5], [1]])])
    points = random_centers(2, 30)
    pixels, depth = geometry.project(points, calib)
    torch.testing.assert_close(geometry.unproject(pixels, depth, calib), points, rtol=1e-4, atol=1e-4)
    for i in range(2):
        torch.testing.assert_close(geometry.project(points[i], calib[i]), (pixels[i], depth[i]))
    expected = torch.cat([points, torch.ones(2, 30, 1)], -1) @ calib.mT
    torch.testing.assert_close(pixels, expected[..., :2] / expected[..., 2:])
    assert geometry.unproject(pixels[:, :0], depth[:, :0], calib).shape == (2, 0, 3)


def test_corners_know_front_up_and_sides():
    dims = torch.tensor([1.5, 2.0, 4.0])  # h, w, l
    found = geometry.corners(torch.zeros(2, 3), dims.expand(2, 3), torch.tensor([0.0, -math.pi / 2]))
    along_x, along_z = found
    torch.testing.assert_close(along_x.amax(0), torch.tensor([2.0, 0.75, 1.0]))
    torch.testing.assert_close(along_x.amin(0), -torch.tensor([2.0, 0.75, 1.0]))
    torch.testing.assert_close(along_x[:4, 0], torch.full((4,), 2.0))  # the front, where it looks
    torch.testing.assert_close(along_z[:4, 2], torch.full((4,), 2.0))
    torch.testing.assert_close(along_x[[0, 1, 4, 5], 1], torch.full((4,), -0.75))  # up is -y
    torch.testing.assert_close(along_z[[0, 3, 4, 7], 0], torch.full((4,), -1.0))  # left of one that drives off


def test_corners_keep_centre_and_sizes():
    center, dims, yaw = random_centers(3, 20), torch.rand(3, 20, 3) + 0.5, torch.rand(3, 20) * 6 - 3
    found = geometry.corners(center, dims, yaw)
    torch.testing.assert_close(found.mean(-2), center)
    length, width = (
        (found[..., 0, :] - found[..., 4, :]).norm(dim=-1),
        (found[..., 0, :] - found[..., 1, :]).norm(dim=-1),
    )
    height = (found[..., 0, :] - found[..., 3, :]).norm(dim=-1)
    torch.testing.assert_close(torch.stack([height, width, length], -1), dims, rtol=1e-4, atol=1e-4)


def test_corners_are_the_devkits():
    """In its order, for a box turned about the camera's y axis: its own frame is x forward, y left, z up."""
    data_classes = pytest.importorskip("nuscenes.utils.data_classes")
    quaternion = pytest.importorskip("pyquaternion").Quaternion
    upright = quaternion(matrix=torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64).numpy())
    for yaw in (0.0, 0.7, -2.1, 3.0):
        center, dims = random_centers(), torch.rand(3) + 1
        turned = quaternion(axis=[0, 1, 0], angle=yaw) * upright
        box = data_classes.Box(center.tolist(), dims[[1, 2, 0]].tolist(), turned)
        expected = torch.from_numpy(box.corners().T).float()
        torch.testing.assert_close(geometry.corners(center, dims, torch.tensor(yaw)), expected, rtol=0, atol=1e-4)


def test_wrap():
    turns = torch.tensor([-4, -2, 0, 2, 4]).double() * math.pi
    inside = angles(97).double()
    torch.testing.assert_close(
        geometry.wrap(inside[:, None] + turns)[:-1], inside[:-1, None].expand(-1, 5), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(geometry.wrap(angles()), angles(), rtol=0, atol=0)
    edges = torch.tensor([-math.pi, math.pi, 3 * math.pi, 0.0])
    torch.testing.assert_close(geometry.wrap(edges), torch.tensor([math.pi, math.pi, math.pi, 0]))


def test_alpha_and_yaw_round_trip():
    """Through the column of the box's own centre; with a camera whose last column is 0, as nuScenes' are."""
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


def test_rotation_bins():
    """Where each bin begins and ends: both hold the angles within pi/6 of 0 and of pi."""
    degrees = torch.tensor([-179.0, -151, -149, -90, -31, -29, 0, 29, 31, 90, 149, 151, 180])
    bins, residuals = rotation.encode(degrees.deg2rad())
    assert bins[:, 0].tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]
    assert bins[:, 1].tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    expected = torch.stack([degrees + 90, degrees - 90], -1).deg2rad() * bins
    torch.testing.assert_close(residuals, expected)
    assert bins.dtype == torch.int64


@pytest.mark.parametrize("side", [0, 1])
def test_rotation_round_trip(side):
    """Every angle comes back, by either bin that holds it, however far from unit length sine and cosine are."""
    alpha = angles()
    bins, residuals = rotation.encode(alpha)
    assert bins.any(-1).all()
    held = bins[:, side] > 0
    rot = torch.zeros(len(alpha), 2, 4)
    rot[:, side, 1] = 1
    rot[..., 2], rot[..., 3] = 3 * residuals.sin(), 3 * residuals.cos()
    found = rotation.decode(rot.flatten(1))
    assert found.abs().max() <= math.pi + 1e-6
    torch.testing.assert_close(geometry.wrap(found - alpha)[held], torch.zeros(int(held.sum())), rtol=0, atol=1e-5)


def test_rotation_decode_of_a_batch():
    rot = torch.randn(2, 5, 8)
    found = rotation.decode(rot)
    assert found.shape == (2, 5)
    first = rot[..., 1] > rot[..., 5]
    assert first.any() and not first.all()
    expected = torch.where(
        first,
        torch.atan2(rot[..., 2], rot[..., 3]) - math.pi / 2,
        torch.atan2(rot[..., 6], rot[..., 7]) + math.pi / 2,
    )
    torch.testing.assert_close(found.cos(), expected.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sin(), expected.sin(), rtol=0, atol=1e-5)
