"""Random boxes and targets."""

import torch


def random_boxes(count, random, side=100.0):
    """Boxes [count,4] xyxy of at least 4 x 4 pixels in a square of `side` pixels."""
    corners = torch.rand(count, 2, 2, generator=random) * side
    low, high = corners.amin(1), corners.amax(1)
    return torch.cat([low, torch.maximum(high, low + 4)], dim=1)


def random_target(count, random, num_classes=3, ignored=0.0):
    """A target of `count` boxes; `ignored` is the probability that a box is to be ignored."""
    return {
        "boxes": random_boxes(count, random),
        "labels": torch.randint(num_classes, (count,), generator=random),
        "ignore": torch.rand(count, generator=random) < ignored,
    }
