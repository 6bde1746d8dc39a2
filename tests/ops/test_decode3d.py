"""Decoding of the heads of a CenterFusion: ideal heads, written from targets, must give these targets back."""

import math

import pytest
import torch
from torchvision import tv_tensors

from data.nuscenes.transforms import flip_target
from losses import centerfusion
from ops import decode3d
from ops.geometry import apply_affine, project, unproject, wrap, yaw_to_alpha
from ops.heatmaps import gather_cells

CALIB = torch.tensor([[1260.0, 0, 800, 0], [0, 1260, 450, 0], [0, 0, 1, 0]])
AFFINE = torch.tensor([[0.5, 0, 3], [0, 0.5, -2]])
SIZE = (113, 203)  # of the maps, for input images of 450 x 800 pixels


def make_target(seed, rows=3, columns=4):
    """A target of 12 objects, one in each cell of a grid over the image, all with known velocities and attributes."""
    random = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=random)

    count = rows * columns
    x, y = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")
    pixels = torch.stack([x.flatten() * 380 + 200, y.flatten() * 250 + 200], dim=-1) + uniform(-60, 60, count, 2)
    center, yaw = unproject(pixels, uniform(5, 55, count), CALIB), uniform(-math.pi, math.pi, count)
    speed = uniform(-9, 9, count, 1)
    labels = torch.arange(count) % 10
    group = torch.tensor(decode3d.GROUP_OF_CLASS)[labels]
    amodal = apply_affine(project(center, CALIB)[0], AFFINE)
    middle, half = amodal + uniform(-4, 4, count, 2), uniform(4, 20, count, 2)
    boxes = torch.cat([middle - half, middle + half], dim=1)
    return {
        "size": (900, 1600),
        "labels": labels,
        "ignore": torch.zeros(count, dtype=torch.bool),
        "center": center,
        "dims": uniform(0.5, 4, count, 3),
        "yaw": yaw,
        "alpha": yaw_to_alpha(yaw, center),
        "velocity": speed * torch.stack([yaw.cos(), torch.zeros(count), -yaw.sin()], dim=-1),
        "attribute": torch.where(group < 0, -1, torch.tensor([0, 3, 6])[group]),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(450, 800)),
        "amodal": amodal,
        "visibility": torch.full((count,), 4),
        "radar": torch.zeros(0, 5),
        "calib": CALIB,
        "affine": AFFINE,
        "rotation": torch.eye(3, dtype=torch.float64),
    }


def ideal_heads(targets, size=SIZE):
    """Heads of which `decode` makes `targets`: the matched targets of the loss written at the peaks."""
    matched = centerfusion.assign(targets, size=size)
    channels = {"reg": 2, "wh": 2, "dep": 1, "rot": 8, "dim": 3, "amodel_offset": 2, "velocity": 3, "nuscenes_att": 8}
    heads = {name: torch.zeros(len(targets), count, *size) for name, count in channels.items()}
    heads["hm"] = matched["hm"].logit(1e-6)
    for image in range(len(targets)):
        mask = matched["mask"][image]
        cells = matched["index"][image][mask]
        assert len(cells.unique()) == len(cells)
        for name in ("reg", "wh", "dim", "amodel_offset", "velocity"):
            heads[name].flatten(2)[image][:, cells] = matched[name][image][mask].T
        heads["nuscenes_att"].flatten(2)[image][:, cells] = matched["attribute"][image][mask].T
        heads["dep"].flatten(2)[image][:, cells] = -matched["dep"][image][mask].log().T
        residuals, bins = matched["residuals"][image][mask], matched["bins"][image][mask]
        rot = torch.stack([1.0 - bins, bins, residuals.sin(), residuals.cos()], dim=-1).flatten(1)
        heads["rot"].flatten(2)[image][:, cells] = rot.T
    return heads


@pytest.fixture(scope="module")
def targets():
    return [make_target(seed) for seed in range(3)]


def test_decoded_ideal_heads_are_the_targets(targets):
    detections = decode3d.decode(ideal_heads(targets), targets, count=50)
    assert len(detections) == 3 and all(detection["scores"].shape == (50,) for detection in detections)
    for target, detection in zip(targets, detections):
        detection = {name: value[detection["scores"] > 0.99] for name, value in detection.items()}
        assert len(detection["labels"]) == len(target["labels"])
        nearest = torch.cdist(target["center"], detection["center"]).argmin(1)
        detection = {name: value[nearest] for name, value in detection.items()}
        for name in ("center", "dims", "velocity", "boxes", "labels", "attribute"):
            torch.testing.assert_close(detection[name], target[name].as_subclass(torch.Tensor), rtol=1e-3, atol=2e-3)
        difference = wrap(detection["yaw"] - target["yaw"])
        torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-4)


def test_depth_and_rotation_of_the_second_stage_replace_the_first(targets):
    heads = ideal_heads(targets)
    first_stage = decode3d.decode(heads, targets, count=5)
    heads |= {"dep_sec": torch.zeros_like(heads["dep"]), "rot_sec": heads["rot"].roll(4, dims=1)}
    second_stage = decode3d.decode(heads, targets, count=5)
    for first, second in zip(first_stage, second_stage):
        torch.testing.assert_close(second["center"][:, 2], torch.ones(5), rtol=1e-5, atol=1e-5)  # 1 / sigmoid(0) - 1
        turned = wrap(second["yaw"] - first["yaw"])[first["scores"] > 0.99].abs()
        assert len(turned) > 2
        torch.testing.assert_close(turned, torch.full_like(turned, math.pi))
    detection = decode3d.decode(heads, targets, count=5, without=("velocity", "nuscenes_att"))[0]
    assert (detection["velocity"] == 0).all() and (detection["attribute"] == -1).all()


def test_a_negative_width_or_height_counts_as_zero(targets):
    heads = ideal_heads(targets[:1])
    heads["wh"] = torch.tensor([-3.0, 0.5]).view(1, 2, 1, 1).expand(1, 2, *SIZE)
    boxes = decode3d.decode(heads, targets[:1], count=5, stride=4)[0]["boxes"]
    torch.testing.assert_close(boxes[:, 2:] - boxes[:, :2], torch.tensor([0.0, 2]).expand(5, 2), rtol=0, atol=1e-3)


def test_velocity_is_turned_along_the_heading():
    yaw = torch.tensor([0.0, 0.0, -math.pi / 2, math.pi])
    velocity = torch.tensor([[3.0, 9, 4], [-3, 0, 4], [0, 0, 2], [1, 0, 0]])
    expected = torch.tensor([[5.0, 0, 0], [-5, 0, 0], [0, 0, 2], [1, 0, 0]])
    torch.testing.assert_close(decode3d.along_heading(velocity, yaw), expected, rtol=0, atol=1e-6)


def test_attributes_come_from_the_group_of_the_class():
    logits, labels = torch.arange(8.0).repeat(1, 10, 1), torch.arange(10)[None]
    assert decode3d.best_attribute(logits, labels)[0].tolist() == [7, 7, 7, 7, 7, 4, 1, 1, -1, -1]
    assert decode3d.best_attribute(-logits, labels)[0].tolist() == [5, 5, 5, 5, 5, 2, 0, 0, -1, -1]


def test_flip_averaging_of_ideal_heads_changes_nothing(targets):
    """Ideal heads of an image and of its mirror image: their mean is the same at every object."""
    size = (113, 200)
    flipped = [flip_target(target, width=4 * size[1]) for target in targets]
    outputs = ideal_heads(targets, size)
    mirrored = ideal_heads(flipped, size)
    means = decode3d.flip_averaged({name: torch.cat([maps, mirrored[name]]) for name, maps in outputs.items()})
    outputs["hm"], means["hm"] = outputs["hm"].sigmoid(), means["hm"].sigmoid()
    matched = centerfusion.assign(targets, size=size)
    for name in outputs:
        one, both = (gather_cells(heads[name], matched["index"])[matched["mask"]] for heads in (outputs, means))
        assert (one - both).abs().max() < 1e-3, name
