import pytest
import torch
from torch import nn

from tests.training import small_run
from training import optim


def network():
    return nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "head": nn.Linear(4, 2)})


def build(net, words="", body=0.1):
    parts = {name: part.parameters() for name, part in net.items()}
    return optim.build(small_run.flags(words), parts, {"body": body, "head": 0.2})


def groups_of(net, words="", body=0.1):
    return {group["name"]: group for group in build(net, words, body).param_groups}


@pytest.mark.parametrize(("optimizer", "state"), [("sgd", "momentum_buffer"), ("adamw", "exp_avg_sq")])
def test_preflight_allocates_the_state_and_changes_no_weight(optimizer, state):
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    built = build(net, f"--preflight --optimizer {optimizer} --weight-decay 0.5")
    assert all(built.state[p][state].shape == p.shape and p.grad is None for p in net.parameters())
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_every_trained_parameter_is_in_one_group_with_its_rate_and_decay():
    net = network()
    groups = groups_of(net, "--weight-decay 0.05 --norm-weight-decay 0")
    assert {name: (g["base_lr"], g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "body weights": (0.1, 0.1, 0.05),
        "body norms": (0.1, 0.1, 0.0),
        "head weights": (0.2, 0.2, 0.05),
        "head norms": (0.2, 0.2, 0.0),
    }
    grouped = [p for group in groups.values() for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, net.parameters()))
    assert groups_of(net, "--weight-decay 0.05")["head norms"]["weight_decay"] == 0.05
    assert groups_of(net, "--lr 0.3", body=None)["body norms"]["base_lr"] == 0.3


@pytest.mark.parametrize(
    ("words", "kind"),
    [("--momentum 0.8", torch.optim.SGD), ("--optimizer adam", torch.optim.Adam)]
    + [("--optimizer adamw", torch.optim.AdamW)],
)
def test_the_flag_chooses_the_optimizer(words, kind):
    optimizer = build(network(), words)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0].get("momentum", 0.8) == 0.8


def test_frozen_parameters_are_in_no_group():
    net = network()
    optim.set_train_mode(net, frozen=[net["body"]])
    assert set(groups_of(net)) == {"head weights", "head norms"}
    assert not net["body"].training
    assert net["head"].training


def test_frozen_batch_norm_keeps_statistics_and_affine_parameters():
    net = network()
    optim.set_train_mode(net, freeze_bn=True)
    before = {name: value.clone() for name, value in net["body"][1].state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    net["body"](torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(dict(net["body"][1].state_dict()), before, rtol=0, atol=0)
    assert net["body"][0].weight.grad is not None


def test_frozen_statistics_alone_leave_the_affine_parameters_trained():
    net = network()
    optim.set_train_mode(net, frozen=[net["head"]], freeze_bn="stats")
    assert set(groups_of(net)) == {"body weights", "body norms"}
    norm = net["body"][1]
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    optimizer = torch.optim.SGD(net["body"].parameters(), lr=1.0)
    net["body"](torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    changed = {name for name, value in norm.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"weight", "bias"}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("clip_norm", "change"), [(0.0, 5.0), (1.0, 1.0)])
def test_a_step_clips_the_unscaled_gradient_and_zeroes_it(scaled, clip_norm, change):
    net = nn.Linear(2, 1, bias=False)
    before = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    scaler.scale(net(torch.tensor([[3.0, 4.0]])).sum()).backward()
    optim.step(optimizer, scaler, net, clip_norm)
    assert float((net.weight.detach() - before).norm()) == pytest.approx(change)
    assert net.weight.grad is None
