"""Transforms of camera images with 3D boxes and radar: afterwards all fields still agree with each other."""

import math

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from data import PER_OBJECT, check_target, loader, nuscenes
from data.nuscenes import collate, transforms
from data.nuscenes.transforms import HorizontalFlip, ShiftAndScale, flip_target
from data.transforms import filter_objects
from evaluation.nuscenes import to_submission, true_detections
from losses import centerfusion
from ops import geometry, radar, rotation
from ops.geometry import apply_affine, corners, project, wrap, yaw_to_alpha
from utils.nuscenes import CAMERAS

GROUND = 40  # gray value of a uniform image
FIELDS = [name for name in PER_OBJECT if name != "masks"]  # nuScenes has none
CALIB = torch.tensor([[700.0, 3, 410, 5], [0, 690, 230, -2], [0, 0, 1, 0.01]])  # every entry that a camera may have
PINHOLE = torch.tensor([[700.0, 0, 410, 0], [0, 690, 230, 0], [0, 0, 1, 0]])
# the corners of a mirrored box in the order of the original's: left and right are exchanged
MIRRORED_CORNERS = [1, 0, 3, 2, 5, 4, 7, 6]


def scene(height=450, width=800, objects=30, seed=0, calib=CALIB):
    """A random image and target: the boxes enclose the projected corners, clipped; radar points are anywhere ahead."""
    random = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=random)

    depth = uniform(8, 55, objects)
    center = torch.stack([uniform(-0.5, 0.5, objects) * depth, uniform(-1, 1.5, objects), depth], dim=1)
    dims, yaw = uniform(1, 4, objects, 3), uniform(-math.pi, math.pi, objects)
    pixels = project(corners(center, dims, yaw), calib)[0]
    boxes = torch.cat([pixels.amin(1), pixels.amax(1)], dim=1).clamp(min=0)
    boxes = boxes.minimum(torch.tensor([width, height, width, height]))
    velocity = uniform(-9, 9, objects, 3)
    velocity[::5] = math.nan
    points = torch.cat([uniform(-20, 20, 50, 2), uniform(2, 60, 50, 1), uniform(-5, 5, 50, 2)], dim=1)
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(objects) % 10,
        "ignore": torch.arange(objects) % 7 == 0,
        "image_id": 3,
        "size": (height, width),
        "center": center,
        "dims": dims,
        "yaw": yaw,
        "alpha": yaw_to_alpha(yaw, center),
        "velocity": velocity,
        "attribute": torch.arange(objects) % 9 - 1,
        "visibility": torch.arange(objects) % 5,
        "amodal": project(center, calib)[0],
        "calib": calib,
        "affine": torch.eye(2, 3),
        "radar": points,
        "rotation": torch.linalg.qr(torch.randn(3, 3, generator=random, dtype=torch.float64))[0],
        "translation": torch.tensor([400.0, 1100, 1.5], dtype=torch.float64),
        "sample_token": "t",
        "camera": "CAM_FRONT",
    }
    image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8, generator=random)
    return tv_tensors.Image(image), target


def pixels_of(points, target):
    """Points [...,3] in the camera's frame -> (pixels of the transformed image [...,2], depth [...])."""
    pixels, depth = project(points, target["calib"])
    return apply_affine(pixels, target["affine"]), depth


def check_consistent(image, target):
    """Raise AssertionError where the fields of a transformed target do not agree with each other."""
    check_target(image, target, 10)
    pixels, depth = pixels_of(target["center"], target)
    torch.testing.assert_close(pixels, target["amodal"], rtol=1e-4, atol=1e-2)
    assert (depth > 0).all()
    difference = wrap(target["alpha"] - yaw_to_alpha(target["yaw"], target["center"]))
    torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-5)
    assert (target["alpha"].abs() <= math.pi + 1e-6).all() and (target["yaw"].abs() <= math.pi + 1e-6).all()
    pixels = pixels_of(corners(target["center"], target["dims"], target["yaw"]).flatten(0, 1), target)[0].unflatten(
        0, (-1, 8)
    )
    height, width = image.shape[-2:]
    expected = torch.cat([pixels.amin(1), pixels.amax(1)], dim=1).clamp(min=0)
    # the box ends at the edge of the file even where the corner is farther out
    edges = apply_affine(torch.tensor([[0.0, 0], target["size"][::-1]]), target["affine"])
    low, high = edges.amin(0).clamp(min=0), edges.amax(0).minimum(torch.tensor([width, height]))
    expected = torch.cat([expected[:, :2].maximum(low), expected[:, 2:].minimum(high)], dim=1)
    torch.testing.assert_close(torch.Tensor(target["boxes"]), expected, rtol=1e-4, atol=2e-2)


def assert_same(target, other, **tolerance):
    assert target.keys() == other.keys()
    for name, value in target.items():
        if isinstance(value, torch.Tensor):
            one, two = (v.as_subclass(torch.Tensor) for v in (value, other[name]))
            message = f"{name}: {{}}".format
            torch.testing.assert_close(one, two, equal_nan=True, msg=message, **tolerance)
        else:
            assert value == other[name], name


def test_the_random_scene_is_consistent():
    check_consistent(*scene())


# ---- horizontal flip


def resized_and_flipped(seed, calib=CALIB):
    """(image, target, flipped image, flipped target), shifted and scaled before the flip, so that `affine` matters."""
    torch.manual_seed(seed)
    image, target = ShiftAndScale((112, 200), 0.05, 0.2)(*scene(seed=seed, calib=calib))
    return image, target, *HorizontalFlip(1.0)(image, target)


@pytest.fixture(params=range(3))
def pair(request):
    """(target, flipped target) with a width of 200 pixels."""
    _, target, _, flipped = resized_and_flipped(request.param)
    return target, flipped


def test_flipped_pixels_are_mirrored():
    image, _, flipped, _ = resized_and_flipped(0)
    assert torch.equal(flipped, image.flip(-1)) and not torch.equal(flipped, image)


def assert_mirrored(points, flipped_points, target, flipped):
    """The flipped camera sees the flipped points at the same depth, at the mirrored pixels."""
    pixels, depth = pixels_of(points, target)
    flipped_pixels, flipped_depth = pixels_of(flipped_points, flipped)
    torch.testing.assert_close(flipped_depth, depth, equal_nan=True)
    expected = torch.stack([200 - pixels[..., 0], pixels[..., 1]], dim=-1)
    torch.testing.assert_close(flipped_pixels, expected, rtol=1e-4, atol=1e-2, equal_nan=True)


def test_flipped_boxes_project_to_mirrored_pixels(pair):
    target, flipped = pair
    assert_mirrored(target["center"], flipped["center"], target, flipped)
    solid, flipped_solid = (corners(t["center"], t["dims"], t["yaw"]) for t in pair)
    assert_mirrored(solid.flatten(0, 1), flipped_solid[:, MIRRORED_CORNERS].flatten(0, 1), target, flipped)
    x1, y1, x2, y2 = target["boxes"].as_subclass(torch.Tensor).unbind(1)
    torch.testing.assert_close(flipped["boxes"].as_subclass(torch.Tensor), torch.stack([200 - x2, y1, 200 - x1, y2], 1))


def test_flipped_motion_and_radar_project_to_mirrored_pixels(pair):
    """Where objects and radar points are after half a second at their velocity."""
    target, flipped = pair
    assert_mirrored(*(t["center"] + 0.5 * t["velocity"] for t in pair), target, flipped)
    points, flipped_points = (t["radar"] for t in pair)
    assert_mirrored(points[:, :3], flipped_points[:, :3], target, flipped)
    moved, flipped_moved = (
        p[:, :3] + 0.5 * torch.stack([p[:, 3], 0 * p[:, 3], p[:, 4]], 1) for p in (points, flipped_points)
    )
    assert_mirrored(moved, flipped_moved, target, flipped)


def test_flipped_fields_are_consistent():
    for seed in range(3):
        _, _, image, target = resized_and_flipped(seed)
        check_consistent(image, target)


def test_flipped_angles_decode_to_the_flipped_yaw():
    """As a network's prediction is decoded: yaw from the observation angle and the pixel of the center."""
    for seed in range(3):
        _, target, _, flipped = resized_and_flipped(seed, PINHOLE)
        for t in (target, flipped):
            columns = project(t["center"], t["calib"])[0][:, 0]
            yaw = geometry.alpha_to_yaw(t["alpha"], columns, t["calib"])
            torch.testing.assert_close(wrap(yaw - t["yaw"]), torch.zeros_like(yaw), rtol=0, atol=1e-5)
        (bins, residuals), (flipped_bins, flipped_residuals) = (rotation.encode(t["alpha"]) for t in (target, flipped))
        inside = bins > 0
        assert torch.equal(bins, flipped_bins) and inside.any()
        sums = wrap(flipped_residuals + residuals)[inside]  # 0: on opposite sides of the middle of the bin
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-5)


def test_flipping_twice_is_the_identity(pair):
    target, flipped = pair
    assert_same(flip_target(flipped, 200), target, rtol=0, atol=2e-4)
    changed = {name for name, value in target.items() if isinstance(value, torch.Tensor)}
    changed = {name for name in changed if not torch.equal(flipped[name].nan_to_num(9), target[name].nan_to_num(9))}
    fields = {"boxes", "amodal", "center", "velocity", "yaw", "alpha", "radar", "calib", "affine", "rotation"}
    assert changed == fields


def test_flipped_boxes_are_at_the_same_global_place(pair):
    """As detections of the submission file: place, size, yaw and velocity in the global frame."""
    submissions = (to_submission([target], [true_detections(target)], radar=True) for target in pair)
    boxes, flipped_boxes = (submission["results"]["t"] for submission in submissions)
    assert len(boxes) == len(flipped_boxes) > 10
    for box, flipped_box in zip(boxes, flipped_boxes):
        for name in ("translation", "size", "velocity"):
            assert flipped_box[name] == pytest.approx(box[name], abs=1e-4), name
        # a quaternion and its negative are the same rotation
        assert abs(np.dot(flipped_box["rotation"], box["rotation"])) == pytest.approx(1, abs=1e-6)
        assert flipped_box["detection_name"] == box["detection_name"]
    target, flipped = pair
    assert torch.equal(flipped["translation"], target["translation"])
    assert flipped["rotation"].det() * target["rotation"].det() < 0
    velocity, flipped_velocity = (t["velocity"].double() @ t["rotation"].T for t in pair)
    torch.testing.assert_close(flipped_velocity, velocity, equal_nan=True)


def test_flipped_objects_give_mirrored_matched_targets(pair):
    size = (28, 50)
    matched, flipped = (centerfusion.assign([target], size=size) for target in pair)
    torch.testing.assert_close(flipped["hm"], matched["hm"].flip(-1))
    assert torch.equal(flipped["index"] % 50, 49 - matched["index"] % 50)
    assert torch.equal(flipped["index"] // 50, matched["index"] // 50)
    mirror = {"reg": lambda v: torch.stack([1 - v[..., 0], v[..., 1]], -1)}
    mirror["amodel_offset"] = mirror["reg"]
    mirror["velocity"] = lambda v: v * torch.tensor([-1.0, 1, 1])
    mirror["residuals"] = lambda v: wrap(-v)
    for name in ("mask", "label", "reg", "wh", "dep", "dim", "amodel_offset", "bins", "velocity", "velocity_mask"):
        expected = mirror.get(name, lambda v: v)(matched[name])
        torch.testing.assert_close(flipped[name], expected, rtol=1e-4, atol=2e-3, msg=f"{name}: {{}}".format)
    assert torch.equal(centerfusion.count(flipped), centerfusion.count(matched))


def test_flipped_radar_gives_a_mirrored_radar_map(pair):
    radar_map, flipped = (radar.pillar_map(t["radar"], t["calib"], t["affine"], (112, 200), stride=1) for t in pair)
    expected = radar_map.flip(-1) * torch.tensor([1.0, -1, 1])[:, None, None]
    different = ((flipped - expected).abs() > 1e-3).any(0)
    # round() puts the edge of a pillar into another column where it lies exactly between two
    assert different.sum() <= 2 and (radar_map[0] > 0).sum() > 20


def test_mirror_images_of_a_batch_have_mirrored_targets(pair):
    (target, flipped), received = pair, []
    image = torch.zeros(3, 112, 200, dtype=torch.uint8)
    collate.val([(image, target)], lambda targets: received.extend(targets) or {}, lambda _: {}, flip_test=True)
    same, mirrored = received
    for name in ("calib", "affine", "amodal", "center"):
        torch.testing.assert_close(same[name], target[name])
        torch.testing.assert_close(mirrored[name], flipped[name])


def test_flip_happens_with_its_probability():
    image, target = scene()
    same_image, same_target = HorizontalFlip(0.0)(image, target)
    assert torch.equal(same_image, image)
    assert_same(same_target, target, rtol=0, atol=0)
    torch.manual_seed(0)
    flips = sum(not torch.equal(HorizontalFlip(0.3)(image, target)[0], image) for _ in range(100))
    assert 15 < flips < 45


# ---- shift, scale, and the recipes


@pytest.mark.parametrize("shape", [(450, 800), (225, 400), (900, 1600), (300, 500)])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_training_recipe_keeps_fields_consistent(shape, scale):
    transform, flips, counts, affines = transforms.centerfusion_train((112, 200), scale=scale), 0, set(), set()
    for seed in range(12):
        torch.manual_seed(seed)
        original = scene(*shape, seed=seed)
        image, target = transform(*original)
        assert image.shape == (3, 112, 200) and image.dtype == torch.uint8
        assert len({len(target[name]) for name in FIELDS}) == 1
        check_consistent(image, target)
        flips += bool(target["rotation"].det() * original[1]["rotation"].det() < 0)
        counts.add(len(target["boxes"]))
        affines.add(tuple(target["affine"].flatten().tolist()))
    assert 0 < flips < 12 and len(counts) > 2 and len(affines) == 12


def test_pixels_move_as_affine_says():
    """A bright rectangle is where `affine` maps its corners."""
    for seed, transform in enumerate(
        [transforms.centerfusion_eval((112, 200))] + [ShiftAndScale((112, 200), 0.05, 0.2)] * 8
    ):
        torch.manual_seed(seed)
        image, target = scene()
        image = tv_tensors.Image(torch.full_like(image, GROUND))
        image[:, 180:300, 300:500] = 255
        sample = transform(image, target)
        for (image, target), x1, x2 in ((sample, 300.0, 500.0), (HorizontalFlip(1.0)(*sample), 500.0, 300.0)):
            bright = (image[0].float() - GROUND) / (255 - GROUND) > 0.5
            rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
            box = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)
            if x1 > x2:  # `calib` of the flipped target projects to mirrored pixels of the file
                x1, x2 = 800 - x1, 800 - x2
            low, high = apply_affine(torch.tensor([[x1, 180.0], [x2, 300.0]]), target["affine"])
            torch.testing.assert_close(box, torch.cat([low, high]), rtol=0, atol=0.6)


def test_evaluation_halves_the_image():
    image, target = transforms.centerfusion_eval()(*scene(900, 1600))
    assert image.shape == (3, 448, 800)
    assert target["affine"].tolist() == [[0.5, 0, 0], [0, 0.5, -1]]
    check_consistent(image, target)


def test_outside_the_image_it_is_black():
    image, target = scene()
    image = tv_tensors.Image(torch.full_like(image, GROUND))
    torch.manual_seed(1)
    shifted, _ = ShiftAndScale((112, 200), shift=0.2)(image, target)
    black, ground = (shifted == 0).all(0), (shifted == GROUND).all(0)
    assert black.sum() > 200 and ground.sum() > 200 and (black | ground).float().mean() > 0.97


@pytest.mark.parametrize(
    "region", [(2, 3, 5, 6), (-2, -3, 14, 20), (4, -3, 9, 8), (-1, 7, 5, 9), (20, 3, 5, 6), (3, -9, 4, 5)]
)
def test_a_region_has_its_pixels_and_black_around(region):
    image, (top, left, height, width) = torch.randint(1, 256, (3, 9, 12), dtype=torch.uint8), region
    wide = torch.nn.functional.pad(image, (30, 30, 30, 30))
    expected = wide[:, 30 + top : 30 + top + height, 30 + left : 30 + left + width]
    assert torch.equal(ShiftAndScale((height, width)).resample(image, region), expected)


def test_distribution_of_shift_and_scale():
    transform, regions = ShiftAndScale((448, 800), shift=0.1, scale=0.1), []
    for seed in range(400):
        torch.manual_seed(seed)
        regions.append(transform.random_region(900, 1600))
    top, left, height, width = torch.tensor(regions, dtype=torch.float32).T
    for shift in (left + width / 2 - 800, top + height / 2 - 450):
        assert shift.abs().max() <= 321 and 120 < shift.std() < 175 and abs(shift.mean()) < 30
    assert 1440 <= width.min() < 1500 and 1700 < width.max() <= 1760
    assert ShiftAndScale((448, 800)).random_region(900, 1600) == (2, 0, 896, 1600)
    assert ShiftAndScale((4, 4)).random_region(1, 1) == (0, 0, 1, 1)


def test_objects_are_left_out_in_every_field():
    image, target = scene()
    keep = torch.arange(30) % 3 == 0
    filtered = filter_objects(target, keep)
    for name in FIELDS:
        assert torch.equal(filtered[name].nan_to_num(9), target[name][keep].nan_to_num(9)), name
    assert torch.equal(filtered["radar"], target["radar"]) and len(target["boxes"]) == 30
    before = {name: value.clone() for name, value in target.items() if isinstance(value, torch.Tensor)}
    torch.manual_seed(2)
    transforms.centerfusion_train((112, 200), flip=1.0, shift=0.3)(image, target)
    assert_same(before, {name: target[name] for name in before}, rtol=0, atol=0)  # the original is not changed


def test_images_without_objects():
    for seed in range(4):
        torch.manual_seed(seed)
        _, target = transforms.centerfusion_train((112, 200))(*scene(objects=0))
        assert target["boxes"].shape == (0, 4) and target["velocity"].shape == (0, 3)


# ---- in a data set


@pytest.fixture(scope="module")
def dataset(small):
    return nuscenes.load_split(small.root, "v1.0-mini", "mini_train")


def test_samples_depend_on_seed_epoch_and_index_only(dataset):
    dataset.transform = transforms.centerfusion_train((56, 100))
    sample, again, other = dataset[1, 4], dataset[1, 4], dataset[2, 4]
    assert torch.equal(sample[0], again[0]) and not torch.equal(sample[0], other[0])
    assert_same(sample[1], again[1], rtol=0, atol=0)


def test_batches_are_the_same_with_workers(dataset):
    dataset.transform = transforms.centerfusion_eval((56, 100))
    batches, from_workers = (
        list(loader.eval_loader(dataset, 5, loader.Process(workers=workers))) for workers in (0, 2)
    )
    assert len(batches) == len(from_workers) == 4 and batches[0][0].shape == (5, 3, 56, 100)
    for (images, targets), (other_images, other_targets) in zip(batches, from_workers):
        assert torch.equal(images, other_images) and len(targets) == len(images)
        for target, other in zip(targets, other_targets, strict=True):
            assert_same(target, other, rtol=0, atol=0)
    assert {target["camera"] for _, targets in from_workers for target in targets} == set(CAMERAS)
