import contextlib

import pytest
import torch
from torch import nn

from training.ema import Ema


def test_averages_follow_their_definition():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = Ema(net, 0.5)
    expected = net[0].weight.detach().clone()
    for n in range(20):
        with torch.no_grad():
            net[0].weight.add_(1.0)
        net[1].num_batches_tracked += 1
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    torch.testing.assert_close(ema.state_dict()["model"]["0.weight"], expected)
    assert ema.state_dict()["model"]["1.num_batches_tracked"] == 20

    weights = {name: value.clone() for name, value in net.state_dict().items()}
    with contextlib.suppress(ZeroDivisionError), ema.applied():
        torch.testing.assert_close(net[0].weight.detach(), expected)
        raise ZeroDivisionError  # a validation that fails
    torch.testing.assert_close(dict(net.state_dict()), weights, rtol=0, atol=0)


def test_averages_of_a_half_precision_network_are_float32():
    net = nn.Linear(2, 2).bfloat16()
    ema = Ema(net, 0.9)
    ema.update()
    assert {value.dtype for value in ema.averages.values()} == {torch.float32}


def test_averages_continue_from_their_state():
    net = nn.Linear(2, 2)
    first, second = Ema(net, 0.5), Ema(net, 0.5)
    first.update()
    second.load_state_dict(first.state_dict())
    for ema in (first, second):
        with torch.no_grad():
            net.weight.fill_(3)
        ema.update()
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)
    with pytest.raises(KeyError, match="averages of 1 tensors, the network has 2"):
        second.load_state_dict({"updates": 1, "model": {"weight": net.weight}})


def test_without_decay_nothing_happens():
    net = nn.Linear(2, 2)
    ema = Ema(net, 0.0)
    ema.update()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with ema.applied():
        torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert ema.state_dict() == {}
    ema.load_state_dict({"updates": 3, "model": {}})
    assert ema.averages == {}


def test_an_update_makes_no_state_dict(monkeypatch):
    """That takes as long as hundreds of small operations on a GPU."""
    net = nn.Linear(2, 2)
    ema = Ema(net, 0.5)
    monkeypatch.setattr(net, "state_dict", None)
    with torch.no_grad():
        net.weight.fill_(3)
    before = ema.averages["weight"].clone()
    ema.update()
    torch.testing.assert_close(ema.averages["weight"], 0.1 * before + 0.9 * net.weight.detach())
