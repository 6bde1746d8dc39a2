import math

import pytest
import torch

from training.meter import Meter, NonFiniteLoss
from utils.errors import UserError


def terms(box, cls=1.0):
    return {"box": torch.tensor(float(box), requires_grad=True), "cls": torch.tensor(cls)}


def test_steps_are_averaged_and_their_micro_batches_summed():
    meter = Meter()
    assert meter.read() == {}
    meter.add(1, terms(1), [0])
    meter.add(2, terms(3), [1])
    assert meter.read() == {"box": 2.0, "cls": 1.0}
    for step, box in ((3, 1), (3, 2), (4, 5)):
        meter.add(step, terms(box), [2])
    assert meter.read() == {"box": 4.0, "cls": 1.5}
    assert meter.read() == {}


def test_other_terms_need_a_read_in_between():
    meter = Meter()
    meter.add(1, {"other": torch.tensor(1.0)}, [0])
    with pytest.raises(ValueError, match="read the meter in between"):
        meter.add(2, terms(1), [0])
    meter.read()
    meter.add(2, terms(1), [0])
    assert meter.read() == {"box": 1.0, "cls": 1.0}


def test_a_non_finite_loss_names_step_images_and_terms():
    meter = Meter()
    meter.add(4, terms(1), [10, 11])
    meter.add(5, terms(2), [12, 13])
    meter.add(5, terms(math.nan, cls=math.inf), [12, 13])
    meter.add(6, terms(math.nan), [16])
    with pytest.raises(NonFiniteLoss, match="non-finite loss at step 5: box nan, cls inf; images 12, 13") as caught:
        meter.read()
    assert isinstance(caught.value, UserError)
    assert (caught.value.step, caught.value.images) == (5, [12, 13])


def test_some_non_finite_steps_in_a_row_are_tolerated():
    meter = Meter(max_nonfinite=2)
    for step, box in enumerate([1, math.nan, math.inf, 3, math.nan]):
        meter.add(step, terms(box), [0])
    assert meter.read()["box"] == 2.0
    meter.add(5, terms(math.nan), [0])
    assert math.isnan(meter.read()["box"])
    meter.add(6, terms(math.nan), [1])
    with pytest.raises(NonFiniteLoss, match="step 6"):
        meter.read()
