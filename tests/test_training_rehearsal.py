import numpy as np
import pytest
import torch
from torch import nn

from training import rehearsal


@pytest.mark.parametrize(("optimizer", "kept"), [("SGD", "momentum_buffer"), ("AdamW", "exp_avg_sq")])
def test_the_optimizer_takes_its_memory_and_changes_no_weight(optimizer, kept):
    net, more = nn.Linear(3, 2), {"momentum": 0.9} if optimizer == "SGD" else {}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    made = getattr(torch.optim, optimizer)(net.parameters(), lr=0.1, weight_decay=0.5, **more)
    rehearsal.allocate(made)
    assert [made.state[p][kept].shape for p in net.parameters()] == [p.shape for p in net.parameters()]
    assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


class Pictures:
    """0 is square, 1 wide, 2 high, 3 a strip; 0 and 3 hold the most objects."""

    def aspects(self):
        return np.array([1.0, 0.6, 1.6, 0.1])

    def fullest(self, count):
        return np.array([0, 3, 1, 2])[:count]


def test_the_largest_batch_is_as_wide_and_as_high_as_any_picture_makes_it():
    assert rehearsal.largest(Pictures(), 4, 600, 1000) == [2, 3, 0, 3]
    assert rehearsal.largest(Pictures(), 1, 600, 1000) == [1]  # 600 x 1000; the strip is 100 x 1000
