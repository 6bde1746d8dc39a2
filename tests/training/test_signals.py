import os
import signal
import types

import pytest

from training import distributed, signals
from training.signals import StopSignals


class SignalDuringCollective:
    """A run in which a signal arrives while the processes exchange theirs."""

    def __init__(self):
        self.signals = [signal.SIGTERM]

    def max(self, value):
        if self.signals:
            signal.raise_signal(self.signals.pop())
        return value


@pytest.fixture(scope="module")
def run():
    return distributed.init_device("cpu")


@pytest.fixture
def quits(monkeypatch):
    """The signals that would have ended this process."""
    numbers = []
    monkeypatch.setattr(signals.interrupts, "quit", numbers.append)
    return numbers


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_asks_to_stop_and_the_second_quits(run, number, code, quits, monkeypatch):
    monkeypatch.setattr(signals, "SAME_SECONDS", 0)
    handler = signal.getsignal(signal.SIGTERM)
    with StopSignals(run) as stop:
        assert (stop.requested(), stop.exit_code) == (False, 0)
        signal.raise_signal(number)
        assert (stop.requested(), stop.exit_code, quits) == (True, code, [])
        signal.raise_signal(signal.SIGTERM)
        assert quits == [signal.SIGTERM]
    assert stop.exit_code == code
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_signal_that_arrives_twice_is_one(run, quits):
    """torchrun and `timeout` signal the process group and the process."""
    with StopSignals(run) as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested() and quits == []


def test_the_first_signal_to_a_process_that_already_stops_is_not_a_second_one(quits, monkeypatch):
    monkeypatch.setattr(signals, "SAME_SECONDS", 0)
    with StopSignals(types.SimpleNamespace(max=lambda number: signal.SIGTERM)) as stop:
        assert stop.requested()  # another process has received it
        signal.raise_signal(signal.SIGINT)
        assert (quits, stop.exit_code) == ([], 143)


def test_a_signal_during_the_exchange_between_processes_is_not_lost():
    with StopSignals(SignalDuringCollective()) as stop:
        assert [stop.requested(), stop.requested()] == [False, True]
    assert stop.exit_code == 143


def test_a_forked_worker_leaves_signals_to_its_parent(run):
    with StopSignals(run) as stop:
        worker = os.fork()
        if worker == 0:
            signal.raise_signal(signal.SIGINT)
            os._exit(int(stop.requested()))
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
        assert not stop.requested()
