import math

import pytest
import torch

from training.finite import first_nonfinite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_tensor_that_is_not_finite_is_named(bad):
    state = {"model": {"a": torch.ones(3), "b": torch.tensor([1.0, bad])}, "other": [0, {"c": torch.tensor(bad)}]}
    assert first_nonfinite(state) == "model.b"
    state["model"]["b"].fill_(1)
    assert first_nonfinite(state) == "other.1.c"


def test_large_numbers_empty_tensors_integers_and_plain_values_are_finite():
    largest = [torch.full((9,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float32, torch.float16)]
    state = {"a": largest, "b": torch.zeros(0), "c": torch.tensor(2**62), "lr": math.inf, "none": None}
    assert first_nonfinite(state) == first_nonfinite({}) == ""
