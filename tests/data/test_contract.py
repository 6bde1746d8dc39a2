import pytest
import torch

from data import check_target

IMAGE = torch.zeros(3, 10, 20, dtype=torch.uint8)
TARGET = {
    "boxes": torch.tensor([[0.0, 0, 20, 10]]),
    "labels": torch.tensor([1]),
    "ignore": torch.tensor([False]),
    "image_id": 0,
    "size": (10, 20),
}


def test_a_target_that_meets_the_contract():
    check_target(IMAGE, TARGET, 2)
    check_target(IMAGE, TARGET | {"masks": torch.ones(1, 10, 20, dtype=torch.uint8)}, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"boxes": torch.tensor([[0.0, 0, 20.5, 10]])},
        {"boxes": torch.tensor([[-0.5, 0, 20, 10]])},
        {"boxes": torch.tensor([[5.0, 0, 5, 10]])},
        {"boxes": torch.tensor([[0, 0, 20, 10]])},
        {"boxes": torch.zeros(0)},
        {"labels": torch.tensor([2])},
        {"labels": torch.tensor([-1])},
        {"ignore": torch.tensor([0])},
        {"ignore": torch.zeros(2, dtype=torch.bool)},
        {"image_id": torch.tensor(0)},
        {"masks": torch.full((1, 10, 20), 2, dtype=torch.uint8)},
        {"masks": torch.ones(1, 20, 10, dtype=torch.uint8)},
    ],
)
def test_a_target_that_breaks_the_contract(wrong):
    with pytest.raises(AssertionError):
        check_target(IMAGE, TARGET | wrong, 2)


def test_an_image_that_breaks_the_contract():
    with pytest.raises(AssertionError):
        check_target(IMAGE.float(), TARGET, 2)
