"""Exponential moving average of a network's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """Averaged weights of `net`, updated on its device; with decay 0 every method does nothing and the state is empty.

    Floating-point parameters and persistent buffers are averaged in float32; integers (batch counters) are copied. The
    decay warms up as min(decay, (1 + n) / (10 + n)) with n updates done: early averages forget the initial weights.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.averages = {}  # name in net.state_dict() -> tensor
        self._values = dict(net.state_dict()) if decay else {}  # the tensors of the network; made once, as it is slow
        for name, value in self._values.items():
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            self.averages[name] = value.detach().to(dtype, copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages one step toward the current weights of the network."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages, values = [], []
        for name, value in self._values.items():
            if value.is_floating_point():
                averages.append(self.averages[name])
                values.append(value.float())
            else:
                self.averages[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """`with ema.applied():` the network has the averages, and after it exactly the weights it had before."""
        saved = {name: value.clone() for name, value in self._values.items()}
        _copy(self.averages, self._values)
        try:
            yield
        finally:
            _copy(saved, self._values)

    def state_dict(self) -> dict:
        """{"updates": int, "model": {name: tensor}}; the model part loads into the network. {} with decay 0."""
        return {"updates": self.updates, "model": dict(self.averages)} if self.decay else {}

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from `state_dict()`. KeyError or RuntimeError if it is of another network."""
        if not self.decay:
            return
        if state["model"].keys() != self.averages.keys():
            raise KeyError(f"averages of {len(state['model'])} tensors, the network has {len(self.averages)}")
        _copy(state["model"], self.averages)
        self.updates = state["updates"]


@torch.no_grad()
def _copy(source, target):
    for name, value in target.items():
        value.copy_(source[name])
