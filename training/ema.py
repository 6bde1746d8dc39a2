"""An exponential moving average of a network's weights."""

from contextlib import contextmanager

import torch


class Ema:
    """Averaged weights of `net`, updated on its device; with decay 0 every method does nothing and the state is empty.

    Floating parameters and persistent buffers are averaged in float32; whole numbers (batch counters) are copied.
    The decay warms up as min(decay, (1 + n) / (10 + n)) with n updates done: early averages forget the first weights.
    """

    def __init__(self, net, decay):
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay {decay} is not in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.tensors = {}  # name in net.state_dict() -> average
        if decay:
            self.tensors = {name: _average_of(value) for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net):
        """Take one step towards the weights of `net` as they are now."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages, values = [], []
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                averages.append(self.tensors[name])
                values.append(value.float())
            else:
                self.tensors[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    @contextmanager
    def applied(self, net):
        """`with ema.applied(net):` the network holds the averages, and after it exactly what it held before."""
        live = net.state_dict() if self.decay else {}
        kept = {name: value.clone() for name, value in live.items()}
        _copy(self.tensors, live)
        try:
            yield
        finally:
            _copy(kept, live)

    def state_dict(self):
        """{"updates": int, "model": {name: tensor}}; the model part loads into the network. {} with decay 0."""
        return {"updates": self.updates, "model": dict(self.tensors)} if self.decay else {}

    def load_state_dict(self, state):
        """Continue from `state_dict()`. KeyError or RuntimeError if it is of another network."""
        if not self.decay:
            return
        if state["model"].keys() != self.tensors.keys():
            raise KeyError(f"averages of {len(state['model'])} tensors, the network has {len(self.tensors)}")
        _copy(state["model"], self.tensors)
        self.updates = state["updates"]


def _average_of(value):
    value = value.detach()
    return value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()


@torch.no_grad()
def _copy(source, target):
    for name, value in target.items():
        value.copy_(source[name])
