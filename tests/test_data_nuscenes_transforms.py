"""Transforms of pictures with 3D boxes and radar: every field stays true to every other, and a flip is the mirrored
world."""

import math

import pytest
import torch
from torchvision import tv_tensors

from data import PER_OBJECT, check_target, nuscenes_radar, nuscenes_transforms
from data.loader import evaluation_loader
from data.nuscenes_transforms import Flip, ShiftAndScale, keep_objects, mirrored
from ops.geometry import apply_affine, corners, project, wrap, yaw_to_alpha
from tests.small_world import World

GROUND = 40  # grey of the ground
FIELDS = [name for name in PER_OBJECT if name != "masks"]  # nuScenes has none
CALIB = torch.tensor([[700.0, 3, 410, 5], [0, 690, 230, -2], [0, 0, 1, 0.01]])  # with all that a camera may have


def scene(height=450, width=800, objects=30, seed=0):
    """A made-up picture and target: boxes are the projected corners, clipped; radar anywhere ahead."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=draw)

    depth = uniform(8, 55, objects)
    center = torch.stack([uniform(-0.5, 0.5, objects) * depth, uniform(-1, 1.5, objects), depth], dim=1)
    dims, yaw = uniform(1, 4, objects, 3), uniform(-math.pi, math.pi, objects)
    pixels = project(corners(center, dims, yaw), CALIB)[0]
    boxes = torch.cat([pixels.amin(1), pixels.amax(1)], dim=1).clamp(min=0)
    boxes = boxes.minimum(torch.tensor([width, height, width, height]))
    velocity = uniform(-9, 9, objects, 3)
    velocity[::5] = math.nan
    radar = torch.cat([uniform(-20, 20, 50, 2), uniform(2, 60, 50, 1), uniform(-5, 5, 50, 2)], dim=1)
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
        "amodal": project(center, CALIB)[0],
        "calib": CALIB,
        "affine": torch.eye(2, 3),
        "radar": radar,
        "rotation": torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=torch.float64))[0],
        "translation": torch.tensor([400.0, 1100, 1.5], dtype=torch.float64),
        "sample_token": "t",
        "camera": "CAM_FRONT",
    }
    image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8, generator=draw)
    return tv_tensors.Image(image), target


def check_true(image, target):
    """Raise AssertionError where the fields of a changed target do not agree with each other."""
    check_target(image, target, 10)
    pixels, depth = project(target["center"], target["calib"])
    torch.testing.assert_close(apply_affine(pixels, target["affine"]), target["amodal"], rtol=1e-4, atol=1e-2)
    assert (depth > 0).all()
    difference = wrap(target["alpha"] - yaw_to_alpha(target["yaw"], target["center"]))
    torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-5)
    assert (target["alpha"].abs() <= math.pi + 1e-6).all() and (target["yaw"].abs() <= math.pi + 1e-6).all()
    solid = corners(target["center"], target["dims"], target["yaw"])
    pixels = apply_affine(project(solid, target["calib"])[0], target["affine"][None])
    height, width = image.shape[-2:]
    expected = torch.cat([pixels.amin(1), pixels.amax(1)], dim=1).clamp(min=0)
    # a corner that the file's own edge cut off may lie further out than the box
    region = torch.tensor([[0.0, 0], target["size"][::-1]])
    region = apply_affine(region, target["affine"])
    low, high = region.amin(0).clamp(min=0), region.amax(0).minimum(torch.tensor([width, height]))
    expected = torch.cat([expected[:, :2].maximum(low), expected[:, 2:].minimum(high)], dim=1)
    torch.testing.assert_close(torch.Tensor(target["boxes"]), expected, rtol=1e-4, atol=2e-2)


def same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            plain, twin = (v.as_subclass(torch.Tensor) for v in (value, other[name]))
            torch.testing.assert_close(
                plain, twin, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}", **tolerance
            )
        else:
            assert value == other[name], name


def test_the_made_up_scene_is_true():
    check_true(*scene())


def test_flip_twice_is_the_identity_for_every_field():
    image, target = nuscenes_transforms.train((112, 200), flip=0, colour=0)(*scene())
    once, moved = Flip(1.0)(image, target)
    again, back = Flip(1.0)(once, moved)
    assert torch.equal(again, image) and not torch.equal(once, image)
    same(back, target, rtol=0, atol=2e-4)
    changed = {name for name in target if isinstance(target[name], torch.Tensor)}
    changed = {n for n in changed if not torch.equal(moved[n].nan_to_num(9), target[n].nan_to_num(9))}
    fields = {"boxes", "amodal", "center", "velocity", "yaw", "alpha", "radar", "calib", "affine", "rotation"}
    assert changed == fields
    kept = Flip(0.0)(image, target)
    assert torch.equal(kept[0], image)
    same(kept[1], target, rtol=0, atol=0)


def test_a_flip_is_the_mirrored_world():
    """The mirrored world, made from mirrored places and headings and seen by the mirrored camera, field by field."""
    image, target = scene()
    flipped_image, flipped = Flip(1.0)(image, target)
    mirror = torch.tensor([-1.0, 1, 1])
    assert torch.equal(flipped_image, image.flip(-1))
    torch.testing.assert_close(flipped["center"], target["center"] * mirror)
    heading = torch.stack([target["yaw"].cos(), -target["yaw"].sin()], dim=1)  # along x and z
    turned = torch.stack([flipped["yaw"].cos(), -flipped["yaw"].sin()], dim=1)
    torch.testing.assert_close(turned, heading * torch.tensor([-1.0, 1]))
    torch.testing.assert_close(flipped["velocity"], target["velocity"] * mirror, equal_nan=True)
    torch.testing.assert_close(flipped["radar"][:, 0], -target["radar"][:, 0])
    torch.testing.assert_close(flipped["radar"][:, 3], -target["radar"][:, 3])
    assert torch.equal(flipped["radar"][:, [1, 2, 4]], target["radar"][:, [1, 2, 4]])
    check_true(flipped_image, flipped)
    points, depth = project(flipped["radar"][:, :3], flipped["calib"])
    before, same_depth = project(target["radar"][:, :3], target["calib"])
    torch.testing.assert_close(points, torch.stack([800 - before[:, 0], before[:, 1]], dim=1), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(depth, same_depth)
    assert CALIB[0, 2] + flipped["calib"][0, 2] == 800 and flipped["calib"][0, 0] == CALIB[0, 0]


def test_a_flipped_object_is_at_its_true_global_place():
    _, target = scene()
    flipped = mirrored(target, 800)
    for field in ("center", "velocity"):
        places, seen = (t[field].double() @ t["rotation"].T for t in (target, flipped))
        torch.testing.assert_close(seen, places, equal_nan=True)
    assert torch.equal(flipped["translation"], target["translation"])


@pytest.mark.parametrize("shape", [(450, 800), (225, 400), (900, 1600), (300, 500)])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_fields_stay_true_through_the_training_recipe(shape, scale):
    change, flipped, counts, affines = nuscenes_transforms.train((112, 200), scale=scale), 0, set(), set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = change(*scene(*shape, seed=seed))
        assert image.shape == (3, 112, 200) and image.dtype == torch.uint8
        assert len({len(target[name]) for name in FIELDS}) == 1
        check_true(image, target)
        flipped += bool(target["rotation"].det() * scene(*shape, seed=seed)[1]["rotation"].det() < 0)
        counts.add(len(target["boxes"]))
        affines.add(tuple(target["affine"].flatten().tolist()))
    assert 0 < flipped < 12 and len(counts) > 2 and len(affines) == 12


def test_pixels_move_as_the_affine_says():
    """A bright rectangle is found where `affine` sends its corners."""
    for seed, recipe in enumerate(
        [nuscenes_transforms.evaluate((112, 200))] + [ShiftAndScale((112, 200), 0.05, 0.2)] * 8
    ):
        torch.manual_seed(seed)
        image, target = scene()
        image = tv_tensors.Image(torch.full_like(image, GROUND))
        image[:, 180:300, 300:500] = 255
        corner = torch.tensor([[300.0, 180], [500, 300]])
        for change in (recipe, Flip(1.0)):
            image, target = change(image, target)
            bright = (image[0].float() - GROUND) / (255 - GROUND) > 0.5
            rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
            found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)
            seen = corner if isinstance(change, ShiftAndScale) else torch.tensor([[300.0, 180], [500, 300]])
            seen = seen if isinstance(change, ShiftAndScale) else torch.stack([800 - seen[:, 0], seen[:, 1]], dim=1)
            seen = apply_affine(seen, target["affine"])
            torch.testing.assert_close(found, torch.cat([seen.amin(0), seen.amax(0)]), rtol=0, atol=0.6)


def test_evaluation_is_half_of_the_file():
    image, target = nuscenes_transforms.evaluate()(*scene(900, 1600))
    assert image.shape == (3, 448, 800)
    assert target["affine"].tolist() == [[0.5, 0, 0], [0, 0.5, -1]]
    check_true(image, target)


def test_what_lies_beside_the_picture_has_the_fill_colour():
    image, target = scene()
    image = tv_tensors.Image(torch.full_like(image, GROUND))
    torch.manual_seed(1)
    moved, _ = ShiftAndScale((112, 200), shift=0.2, fill=(200, 10, 90))(image, target)
    filled = (moved == torch.tensor([200, 10, 90]).view(3, 1, 1)).all(0)
    ground = (moved == GROUND).all(0)
    assert filled.sum() > 200 and ground.sum() > 200 and (filled | ground).float().mean() > 0.97


def test_shifts_are_drawn_as_told():
    change, regions = ShiftAndScale((448, 800), shift=0.1, scale=0.1), []
    for seed in range(400):
        torch.manual_seed(seed)
        regions.append(change.region(900, 1600))
    top, left, height, width = torch.tensor(regions, dtype=torch.float32).T
    across, down = left + width / 2 - 800, top + height / 2 - 450
    for shift in (across, down):
        assert shift.abs().max() <= 321 and 120 < shift.std() < 175 and abs(shift.mean()) < 30
    assert 1440 <= width.min() < 1500 and 1700 < width.max() <= 1760
    assert ShiftAndScale((448, 800)).region(900, 1600) == (2, 0, 896, 1600)


def test_objects_out_of_sight_are_left_out_in_every_field():
    image, target = scene()
    keep = torch.arange(30) % 3 == 0
    kept = keep_objects(target, keep)
    for name in FIELDS:
        assert torch.equal(kept[name].nan_to_num(9), target[name][keep].nan_to_num(9)), name
    assert torch.equal(kept["radar"], target["radar"]) and len(target["boxes"]) == 30
    before = {name: value.clone() for name, value in target.items() if isinstance(value, torch.Tensor)}
    torch.manual_seed(2)
    nuscenes_transforms.train((112, 200), flip=1.0, shift=0.3)(image, target)
    same(before, {name: target[name] for name in before}, rtol=0, atol=0)


def test_pictures_without_objects():
    image, target = scene(objects=0)
    for seed in range(4):
        torch.manual_seed(seed)
        _, changed = nuscenes_transforms.train((112, 200))(image, target)
        assert changed["boxes"].shape == (0, 4) and changed["velocity"].shape == (0, 3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return nuscenes_radar.load(World(tmp_path_factory.mktemp("nuscenes")).root, "v1.0-mini", "mini_train")


def test_samples_depend_on_seed_epoch_and_index_alone(dataset):
    dataset.transform = nuscenes_transforms.train((56, 100))
    one, two, other = dataset[1, 4], dataset[1, 4], dataset[2, 4]
    assert torch.equal(one[0], two[0]) and not torch.equal(one[0], other[0])
    same(one[1], two[1], rtol=0, atol=0)


def test_batches_are_the_same_with_workers(dataset):
    dataset.transform = nuscenes_transforms.evaluate((56, 100))
    alone, helped = (list(evaluation_loader(dataset, 5, n)) for n in (0, 2))
    assert len(alone) == len(helped) == 4 and alone[0][0].shape == (5, 3, 56, 100)
    for (images, targets), (twins, others) in zip(alone, helped):
        assert torch.equal(images, twins) and len(targets) == len(images)
        for target, other in zip(targets, others):
            same(target, other, rtol=0, atol=0)
    assert {target["camera"] for _, targets in helped for target in targets} == set(nuscenes_radar.CAMERAS)
