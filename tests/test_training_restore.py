"""Restoring a run or its weights alone; the bit-exact resume is tested with the checkpoints."""

import pytest
import torch
from torch import nn

from training import checkpoints, devices
from training.flags import UsageError


class Small(nn.Linear):
    def __init__(self, **arguments):
        super().__init__(2, 2)
        self.arguments = arguments


def parts(optimizer="SGD", ema=0.0, **arguments):
    net = Small(**arguments)
    made = getattr(torch.optim, optimizer)(net.parameters(), lr=0.1)
    scaler = devices.setup(device="cpu").scaler
    return {"model": net, "optimizer": made, "scaler": scaler, "ema": checkpoints.Ema(net, ema)}


def saved_run(folder, ema=0.0, **arguments):
    """A run of one step whose averages are all 7 -> its checkpoint."""
    state = parts(ema=ema, **arguments)
    for average in state["ema"].tensors.values():
        average.fill_(7)
    checkpoints.save(folder, {**state, "progress": checkpoints.Progress(step=1), "arguments": arguments})
    return checkpoints.read(folder / "last.pt")


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_an_evaluation_needs_no_flag_of_the_run_and_takes_its_averages(tmp_path, decay):
    saved, state = saved_run(tmp_path, ema=0.9), parts("AdamW", ema=decay)
    checkpoints.restore(saved, state, checkpoints.Progress(), evaluate_only=True)
    with state["ema"].applied(state["model"]):
        for value in state["model"].state_dict().values():
            torch.testing.assert_close(value, torch.full_like(value, 7))


def test_an_evaluation_of_a_run_without_averages_takes_its_weights(tmp_path):
    saved, state = saved_run(tmp_path), parts("AdamW", ema=0.5)
    checkpoints.restore(saved, state, checkpoints.Progress(), evaluate_only=True)
    with state["ema"].applied(state["model"]):
        torch.testing.assert_close(dict(state["model"].state_dict()), dict(saved["model"]))


def test_averages_are_not_dropped_without_a_word(tmp_path):
    with pytest.raises(UsageError, match=r"last.pt: ema was on in that run and is off now; resume with its --ema"):
        checkpoints.restore(saved_run(tmp_path, ema=0.9), parts(), checkpoints.Progress())


@pytest.mark.parametrize("evaluate_only", [False, True])
def test_a_network_of_other_arguments_is_refused(tmp_path, evaluate_only):
    saved = saved_run(tmp_path, anchor_scale=2.0, radar=True)
    with pytest.raises(UsageError, match=r"anchor_scale 2.0, this run's 4.0; give --anchor-scale as in that run"):
        checkpoints.restore(saved, parts(anchor_scale=4.0, radar=True), checkpoints.Progress(), evaluate_only)
    with pytest.raises(UsageError, match=r"radar True, this run's False; give --pointcloud"):
        checkpoints.restore(saved, parts(anchor_scale=2.0, radar=False), checkpoints.Progress(), evaluate_only)
    state, progress = parts(anchor_scale=2.0, radar=True, new=1), checkpoints.Progress()
    checkpoints.restore(saved, state, progress, evaluate_only)
    assert progress.step == 1


def test_how_many_proposals_are_looked_at_may_change(tmp_path):
    saved = saved_run(tmp_path, proposals=100)
    progress = checkpoints.Progress()
    checkpoints.restore(saved, parts(proposals=300), progress, True)
    assert progress.step == 1


def test_bare_weights_of_ours_are_no_run(tmp_path):
    checkpoints.export(tmp_path / "backbone.pt", {"model": nn.Linear(2, 2)})
    with pytest.raises(UsageError, match=r"bare weights of ours.* use --weights .*backbone.pt; to go on .* last.pt"):
        checkpoints.open_run(tmp_path / "run", str(tmp_path / "backbone.pt"), weights_flag="--weights")


def test_overwrite_takes_the_bare_weights_of_the_old_run_too(tmp_path):
    saved_run(tmp_path)
    checkpoints.export(tmp_path / "backbone.pt", {"model": nn.Linear(2, 2)})
    assert checkpoints.open_run(tmp_path, overwrite=True) is None
    assert not list(tmp_path.iterdir())
