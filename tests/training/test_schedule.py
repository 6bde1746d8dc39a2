import math

import pytest
import torch

from training import schedule


def test_cosine_falls_from_one_to_zero_and_stays():
    assert schedule.cosine(0, 100) == 1.0
    assert schedule.cosine(50, 100) == pytest.approx(0.5)
    assert schedule.cosine(25, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.cosine(100, 100) == schedule.cosine(150, 100) == pytest.approx(0)
    assert schedule.cosine(0, 0.5) == 1.0 and schedule.cosine(1, 0.5) == pytest.approx(0)  # half an epoch of one step
    with pytest.raises(ValueError, match="at least one step"):
        schedule.cosine(0, 0)


def test_multi_step_falls_at_the_milestone_itself():
    factors = [schedule.multi_step(step, (4, 2), 0.1) for step in range(6)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert schedule.multi_step(10**6, (), 0.1) == 1.0


def test_warmup_is_never_zero_and_ends_at_one():
    assert [schedule.warmup(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule.warmup(0, 0) == schedule.warmup(0, 1, 0.001) == 1.0


@pytest.mark.parametrize("steps", [2, 60, 1001])
def test_warmup_from_a_factor_is_that_of_torchvision_s_references(steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.001, total_iters=min(1000, steps - 1))
    for step in range(steps + 2):
        assert schedule.warmup(step, steps, 0.001) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_plateau_lowers_the_rate_as_torch_does():
    losses = [3.0, 2.0, 2.0, 2.1, 2.0, 2.0, 1.9999, 1.5, 1.6, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3)
    ours = schedule.Plateau(patience=3)
    for loss in losses:
        optimizer.step()
        theirs.step(loss)
        ours.add(loss + 0.5, 2)  # an epoch's loss is logged in parts
        ours.add(loss - 0.5, 2, ends_epoch=True)
        assert ours.factor == pytest.approx(optimizer.param_groups[0]["lr"])
    assert ours.factor == pytest.approx(0.001)


def test_plateau_continues_from_its_state_and_is_empty_when_off():
    first, second = schedule.Plateau(patience=1), schedule.Plateau(patience=1)
    for loss in (1.0, 1.0):
        first.add(loss, 5, ends_epoch=True)
    first.add(1.0, 3)
    second.load_state_dict(first.state_dict())
    for plateau in (first, second):
        plateau.add(1.0, 2, ends_epoch=True)
    assert first.factor == second.factor == pytest.approx(0.1)
    off = schedule.Plateau(patience=0)
    for _ in range(9):
        off.add(1.0, 1, ends_epoch=True)
    assert (off.factor, off.state_dict()) == (1.0, {})
