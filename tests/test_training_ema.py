"""What a checkpoint holds beside the network: Progress, Ema; and the signals that ask for one."""

import contextlib
import os
import signal

import pytest
import torch
from torch import nn

from training import checkpoints


def test_progress_counts_evaluations_since_the_best():
    progress = checkpoints.Progress()
    results = []
    for step, value in enumerate([float("nan"), 0.2, 0.2, 0.1, torch.tensor(0.5), float("nan")], start=1):
        progress.step = step
        results.append(progress.improved(value))
    assert results == [False, True, False, False, True, False]
    assert (progress.best, progress.best_step, progress.stale) == (0.5, 5, 1)
    assert progress.improved(0.4, lower_is_better=True)
    again = checkpoints.Progress()
    again.load_state_dict(progress.state_dict())
    assert again == progress


def test_ema_follows_its_definition():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = checkpoints.Ema(net, 0.5)
    expected = net[0].weight.detach().clone()
    for n in range(20):
        with torch.no_grad():
            net[0].weight.add_(1.0)
        net[1].num_batches_tracked += 1
        ema.update(net)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    torch.testing.assert_close(ema.state_dict()["model"]["0.weight"], expected)
    assert ema.state_dict()["model"]["1.num_batches_tracked"] == 20

    live = {name: value.clone() for name, value in net.state_dict().items()}
    with contextlib.suppress(ZeroDivisionError), ema.applied(net):
        torch.testing.assert_close(net[0].weight.detach(), expected)
        raise ZeroDivisionError  # an evaluation that fails
    torch.testing.assert_close(dict(net.state_dict()), live, rtol=0, atol=0)


def test_ema_off_does_nothing():
    net = nn.Linear(2, 2)
    ema = checkpoints.Ema(net, 0.0)
    ema.update(net)
    with ema.applied(net):
        pass
    assert ema.state_dict() == {}
    ema.load_state_dict({"updates": 3, "model": {}})
    assert ema.tensors == {}


def test_signals_ask_to_stop_and_the_second_quits():
    former = signal.getsignal(signal.SIGTERM)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with checkpoints.StopSignals() as stop:
            assert (stop.requested, stop.exit_code) == (False, 0)
            signal.raise_signal(number)
            assert (stop.requested, stop.exit_code) == (True, code)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code == code
    assert signal.getsignal(signal.SIGTERM) == former


def test_a_forked_worker_leaves_signals_to_its_parent():
    with checkpoints.StopSignals() as stop:
        worker = os.fork()
        if worker == 0:
            signal.raise_signal(signal.SIGINT)
            os._exit(int(stop.requested))
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
    assert not stop.requested


def test_fingerprint_sees_names_shapes_and_bits():
    def of(**model):
        return checkpoints.fingerprint({"model": model, "step": 3})

    one = torch.tensor([1.0, 2.0])
    assert of(a=one, b=one[0]) == of(b=one[0].clone(), a=one.clone())
    seen = {of(a=one), of(b=one), of(a=one[:, None]), of(a=one.bfloat16()), of(a=one + 1e-7), of(a=-one), of()}
    assert len(seen) == 7
    square = torch.rand(2, 3, 4, 4)
    assert of(a=square) == of(a=square.to(memory_format=torch.channels_last))
