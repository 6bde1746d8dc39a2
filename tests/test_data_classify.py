"""Augmentation of a classifier: sizes, the share of the picture seen, colour and erasing."""

import pickle

import pytest
import torch
from torchvision import tv_tensors

from data import transforms
from data.transforms import ColourJitter


def coordinates(height, width):
    """A picture whose red tells the column and green the row, both 0..250; blue is 30."""
    image = torch.full((3, height, width), 30, dtype=torch.uint8)
    image[0] = torch.linspace(0, 250, width).to(torch.uint8)
    image[1] = torch.linspace(0, 250, height).to(torch.uint8)[:, None]
    return tv_tensors.Image(image)


@pytest.mark.parametrize("size", [(50, 90), (90, 50), (20, 20), (300, 200)])
def test_sizes(size):
    image = coordinates(*size)
    for change, side in ((transforms.classify_train(32), 32), (transforms.classify_evaluate(40, 36), 36)):
        result = change(image)
        assert result.shape == (3, side, side) and result.dtype == torch.uint8


def test_a_crop_shows_at_least_its_share_of_the_picture():
    shares, flipped = [], 0
    for seed in range(100):
        torch.manual_seed(seed)
        result = transforms.classify_train(40, crop_scale=(0.53, 1.0), jitter=0)(coordinates(200, 200)).int()
        across = (result[0, 20, -1] - result[0, 20, 0]) / 250
        shares.append(float(abs(across) * (result[1, -1, 20] - result[1, 0, 20]) / 250))
        flipped += bool(across < 0)
    assert min(shares) > 0.45 and max(shares) > 0.8  # the outermost of 40 pixels show a fortieth less
    assert 30 < flipped < 70


def test_evaluation_shows_the_centre():
    result = transforms.classify_evaluate(100, 80)(coordinates(200, 400)).int()
    assert abs(result[1, 0, 40] - 25) <= 3 and abs(result[1, -1, 40] - 225) <= 3  # a tenth of the rows lost each side
    assert abs(result[0, 40, 0] - 75) <= 3 and abs(result[0, 40, -1] - 175) <= 3  # and three tenths of the columns
    assert torch.equal(transforms.classify_evaluate(100, 80)(coordinates(200, 400)).int(), result)


def test_erased_parts_have_the_mean_colour():
    change = transforms.classify_train(60, jitter=0, erase=1.0)
    image = tv_tensors.Image(torch.full((3, 60, 60), 10, dtype=torch.uint8))
    torch.manual_seed(0)
    result = change(image)
    erased = (result == torch.tensor([124, 116, 104]).view(3, 1, 1)).all(0)
    assert 0.01 < erased.float().mean() < 0.4
    assert (result[:, ~erased] == 10).all()


def test_jitter_is_slight_and_varied():
    image = tv_tensors.Image(
        torch.full((3, 4, 4), 100, dtype=torch.uint8)
    )  # grey, which hue and saturation leave alone
    levels = []
    for seed in range(100):
        torch.manual_seed(seed)
        changed = ColourJitter(0.03)(image)
        assert changed.dtype == torch.uint8 and changed.shape == image.shape
        levels.append(changed[0, 0, 0].item())
    assert set(levels) == set(range(97, 104))  # and contrast leaves a plain picture alone too
    assert torch.equal(ColourJitter(0.0)(image), image)


def test_jitter_turns_hue_and_changes_contrast_and_saturation():
    image = coordinates(40, 40)
    changes = []
    for seed in range(50):
        torch.manual_seed(seed)
        changes.append((ColourJitter(0.05)(image).int() - image.int()).float().flatten(1))
    spread = torch.stack([change.mean(1) for change in changes])
    assert (spread[:, 0] - spread[:, 2]).std() > 1  # brightness alone would move channels in proportion
    assert 30 < torch.stack(changes).abs().amax() < 110  # a full colour turned by a twentieth changes by 0.3 * 250


def test_everything_can_be_pickled():
    image = coordinates(50, 60)
    for change in (transforms.classify_train(32, erase=0.5), transforms.classify_evaluate(40, 32)):
        results = []
        for one in (change, pickle.loads(pickle.dumps(change))):
            torch.manual_seed(3)
            results.append(one(image))
        assert torch.equal(*results)
