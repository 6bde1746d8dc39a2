"""A flipped sample is the sample of the mirrored world, field by field. The mirrored world is drawn, written and read
like any other: data.nuscenes_transforms has no part in it."""

import itertools
import math

import numpy as np
import pytest
import torch

from data import nuscenes_radar, world, world_mirror
from data.nuscenes_transforms import Flip, ShiftAndScale
from data.world_files import FEWEST_KEYFRAMES, write_nuscenes
from losses import centerfusion
from ops.geometry import apply_affine, wrap
from ops.radar import pillars

SIZE = (320, 180)
INPUT, MAPS = (112, 200), (28, 50)
MIRROR = torch.tensor([1.0, -1, 1], dtype=torch.float64)  # of the global frame
SHOWN = {
    "whole": (0, 0, 179, 320),
    "aside": (17, 105, 134, 240),
}  # top, left, height, width; aside: past the right edge
CLOSE = {"rtol": 1e-5, "atol": 5e-4, "equal_nan": True}
# fields that have no left and right, or the sample's own name
APART = {"camera", "image_id", "rotation", "translation", "radar", "yaw", "alpha"}


class Region(ShiftAndScale):
    """Shows one region of the picture, always the same."""

    def __init__(self, region):
        super().__init__(INPUT, fill=(10, 200, 90))
        self.shown = region

    def region(self, height, width):
        return self.shown


def drawn(folder, mirrored):
    """The splits of a drawn set, as read by our loader."""
    root = folder / ("mirrored" if mirrored else "plain")
    write_nuscenes(root, FEWEST_KEYFRAMES * len(world.CAMERAS), 2, SIZE, mirrored)
    splits = ("mini_train", "mini_val")
    return [nuscenes_radar.load(root, "v1.0-mini", split, cache=folder / f"{root.name}-{split}") for split in splits]


def key_of(target):
    return target["sample_token"], target["camera"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """[(sample, its sample in the mirrored world)]: of each camera the one that stands where its image is."""
    folder = tmp_path_factory.mktemp("mirror")
    plain, mirrored = ([pair for part in drawn(folder, kind) for pair in part] for kind in (False, True))
    for _, target in (*plain, *mirrored):
        target["ignore"][::5] = True  # the drawn lidar hits all that a camera sees, so none is ignored
    seen = {key_of(target): (image, target) for image, target in mirrored}
    assert len(seen) == len(plain) == 24
    return [
        ((image, target), seen[target["sample_token"], world_mirror.other_side(target["camera"])])
        for image, target in plain
    ]


@pytest.fixture(scope="module", params=SHOWN)
def pairs(request, samples):
    """[(flipped sample, sample of the mirrored world)], which shows what the mirror makes of the region."""
    top, left, height, width = SHOWN[request.param]
    mine, theirs = Region((top, left, height, width)), Region((top, SIZE[0] - width - left, height, width))
    return [(Flip(1.0)(*mine(*sample)), theirs(*other)) for sample, other in samples]


def test_the_samples_have_all_that_a_flip_may_spoil(samples):
    targets = [target for (_, target), _ in samples]
    joined = {name: torch.cat([target[name] for target in targets]) for name in ("labels", "visibility", "attribute")}
    assert len(joined["labels"]) > 100 and len(joined["labels"].unique()) == 10
    assert set(joined["visibility"].tolist()) == {1, 2, 3, 4} and len(joined["attribute"].unique()) >= 8
    assert {target["camera"] for target in targets} == set(world.CAMERAS)
    velocity = torch.cat([target["velocity"] for target in targets])
    assert velocity.isnan().any() and velocity[:, 0].abs().nan_to_num(0).max() > 3
    assert sum(len(target["radar"]) for target in targets) > 1000
    assert any(target["ignore"].any() for target in targets)
    assert len({target["rotation"].det().sign().item() for target in targets}) == 1


def test_every_field_of_a_flipped_sample_is_the_mirrored_worlds(pairs):
    for (_, flipped), (_, expected) in pairs:
        assert flipped.keys() == expected.keys()
        for name in flipped.keys() - APART:
            mine, theirs = flipped[name], expected[name]
            if isinstance(mine, torch.Tensor):
                mine, theirs = (value.as_subclass(torch.Tensor) for value in (mine, theirs))
                torch.testing.assert_close(mine, theirs, msg=lambda text, n=name: f"{n}: {text}", **CLOSE)
            else:
                assert mine == theirs, name
        for name in ("yaw", "alpha"):
            apart = wrap(flipped[name] - expected[name])
            torch.testing.assert_close(apart, torch.zeros_like(apart), **CLOSE)
            assert (flipped[name].abs() <= math.pi + 1e-6).all()


def test_radar_of_a_flipped_sample_is_the_mirrored_worlds(pairs):
    for (_, flipped), (_, expected) in pairs:
        mine, theirs = flipped["radar"], expected["radar"]  # sets: the two read their radars in another order
        gaps = (mine[:, None] - theirs).abs().amax(-1)
        assert len(mine) == len(theirs) > 20
        assert gaps.amin(0).max() < 1e-3 and gaps.amin(1).max() < 1e-3


def test_a_flipped_sample_leads_to_global_places(pairs):
    """Those of the world as it was: the mirrored world's with y turned round. So its rotation is a reflection."""
    for (_, flipped), (_, expected) in pairs:
        torch.testing.assert_close(MIRROR[:, None] * flipped["rotation"], expected["rotation"], rtol=0, atol=1e-9)
        torch.testing.assert_close(MIRROR * flipped["translation"], expected["translation"], rtol=0, atol=1e-6)
        for name in ("center", "velocity"):
            mine, theirs = (target[name].double() @ target["rotation"].T for target in (flipped, expected))
            torch.testing.assert_close(mine * MIRROR, theirs, **CLOSE)
        assert torch.linalg.det(expected["rotation"]) > 0 > torch.linalg.det(flipped["rotation"])


def test_the_flipped_picture_is_the_mirrored_worlds(pairs):
    for (image, _), (expected, _) in pairs:
        apart, turned = ((picture.float() - expected.float()).abs() for picture in (image, image.flip(-1)))
        assert image.shape == expected.shape == (3, *INPUT)
        assert apart.mean() < 1 and apart.max() < 40 < turned.max() and turned.mean() > 10  # JPEG is not quite even


def test_goals_of_a_flipped_batch_are_the_mirrored_worlds(pairs):
    mine, theirs = ([pair[side][1] for pair in pairs] for side in (0, 1))
    goals, expected = (centerfusion.assign(targets, "cpu", size=MAPS) for targets in (mine, theirs))
    assert goals.keys() == expected.keys() and goals["mask"].sum() > 50 and goals["velocity_mask"].any()
    for name, value in goals.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, n=name: f"{n}: {text}", **CLOSE)
    torch.testing.assert_close(centerfusion.count(goals), centerfusion.count(expected), rtol=0, atol=0)


def test_radar_maps_of_a_flipped_batch_are_the_mirrored_worlds(pairs):
    cells = 0
    for (_, flipped), (_, expected) in pairs:
        mine, theirs = (pillars(t["radar"], t["calib"], t["affine"], MAPS) for t in (flipped, expected))
        unlike = ((mine - theirs).abs() > 1e-3).any(0)
        assert unlike.sum() <= 2  # a pillar's edge may lie on the border of two cells
        cells += int((mine[0] > 0).sum())
    assert cells > 500


def test_boxes_are_where_the_mirrored_cameras_see_things(samples):
    """A mirrored sample has the boxes of the plain one from the other end of the picture, as the drawing alone says."""
    for (_, target), (_, mirrored) in samples:
        boxes, seen = (t["boxes"].as_subclass(torch.Tensor) for t in (target, mirrored))
        flipped = torch.stack([SIZE[0] - boxes[:, 2], boxes[:, 1], SIZE[0] - boxes[:, 0], boxes[:, 3]], dim=1)
        torch.testing.assert_close(seen, flipped, **CLOSE)
        middle = torch.tensor([[target["calib"][0, 2], target["calib"][1, 2]]])
        torch.testing.assert_close(apply_affine(middle, torch.tensor([[-1.0, 0, SIZE[0]], [0, 1, 0]]))[0],
                                   mirrored["calib"][:2, 2])  # fmt: skip


def test_a_mirror_twice_shows_the_world():
    plain = world.build(3, 1, 5)
    again = world_mirror.mirror(world_mirror.mirror(plain))
    for name, value in vars(plain).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again, name), value)
        else:
            assert getattr(again, name) == value, name
    seen = world_mirror.mirror(plain)
    assert seen.cameras["CAM_BACK_LEFT"].place[1] == -world.CAMERAS["CAM_BACK_RIGHT"].place[1] > 0
    assert set(seen.cameras) == set(world.CAMERAS) and set(seen.radars) == set(world.RADARS)


@pytest.mark.parametrize("time", [0.0, 1.3])
def test_the_mirrored_world_moves_as_its_image(time):
    plain = world.build(5, 2, 5)
    seen = world_mirror.mirror(plain)
    (xy, yaw, *motion), (xy_seen, yaw_seen, *motion_seen) = plain.car(time), seen.car(time)
    np.testing.assert_allclose([*xy_seen, yaw_seen, *motion_seen], [xy[0], -xy[1], -yaw, motion[0], -motion[1]])
    for mine, theirs, sides in zip(plain.things(time), seen.things(time), ([1, -1, 1], -1, [1, -1])):
        np.testing.assert_allclose(theirs, mine * np.array(sides), atol=1e-9)


def test_mirrored_radars_measure_the_image():
    plain, found = world.build(5, 2, 5), 0
    seen = world_mirror.mirror(plain)
    for name, seed in itertools.product(world.RADARS, range(3)):
        facts = [(plain, name), (seen, world_mirror.other_side(name))]
        (mine, things), (theirs, same) = (
            world.radar_returns(scene, radar, 1.1, np.random.default_rng(seed)) for scene, radar in facts
        )
        np.testing.assert_array_equal(things, same)
        for field in world.RADAR_POINT.names:
            sign = -1.0 if field in ("y", "vy", "vy_comp") else 1.0
            np.testing.assert_allclose(theirs[field], mine[field] * sign, atol=1e-5, err_msg=field)
        found += (things >= 0).sum()
    assert found > 50
