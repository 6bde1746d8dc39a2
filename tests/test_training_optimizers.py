import pytest
import torch
from torch import nn

from training import modes, optimizers
from training.flags import UsageError


def network():
    return nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "head": nn.Linear(4, 2)})


def groups_of(net, **more):
    parts = {name: list(part.parameters()) for name, part in net.items()}
    optimizer = optimizers.build("adamw", parts, {"body": 0.1, "head": 0.2}, 0.05, **more)
    return {group["name"]: group for group in optimizer.param_groups}, optimizer


def test_every_learning_parameter_is_in_one_group_with_its_rate_and_decay():
    net = network()
    groups, optimizer = groups_of(net, norm_weight_decay=0.0)
    assert {name: (g["base_lr"], g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "body weights": (0.1, 0.1, 0.05),
        "body norms": (0.1, 0.1, 0.0),
        "head weights": (0.2, 0.2, 0.05),
        "head norms": (0.2, 0.2, 0.0),
    }
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, net.parameters()))
    assert groups_of(net)[0]["head norms"]["weight_decay"] == 0.05


def test_frozen_parameters_are_in_no_group():
    net = network()
    modes.train_mode(net, frozen=[net["body"]])
    assert set(groups_of(net)[0]) == {"head weights", "head norms"}
    assert not net["body"].training
    assert net["head"].training


def test_frozen_batch_norm_keeps_statistics_and_affine():
    net = network()
    modes.train_mode(net, freeze_bn=True)
    before = {name: value.clone() for name, value in net["body"][1].state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    net["body"](torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(dict(net["body"][1].state_dict()), before, rtol=0, atol=0)
    assert net["body"][0].weight.grad is not None


@pytest.mark.parametrize(("chosen", "scale", "factor", "lines"), [(0, False, 1, 0), (8, True, 2, 0), (8, False, 1, 1)])
def test_batch_scale(chosen, scale, factor, lines):
    said = []
    assert optimizers.batch_scale(16, chosen, scale, said.append) == factor
    assert len(said) == lines
    assert not lines or "--scale-lr" in said[0]


def test_rates_for_no_known_batch_are_not_scaled():
    with pytest.raises(UsageError, match=r"--scale-lr: .* give --lr-batch-size"):
        optimizers.batch_scale(16, 0, True)
