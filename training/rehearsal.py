"""What --preflight does beforehand, so that the peaks it reads are those of the worst step."""

import numpy as np


def allocate(optimizer):
    """Let the optimizer take the memory it keeps (momentum, Adam's moments), as its first step does; every rate is 0
    after it and no weight has changed."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = parameter.new_zeros(parameter.shape)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def largest(dataset, count, shortest, longest):
    """Indices of `count` pictures that make the largest padded batch; those with the most objects fill the rest.

    dataset             with aspects(), float [N] of height / width, and fullest(count), int [count]
    shortest, longest   pixels that the shortest side is resized to, and the bound on the longest

    A batch is as high as its highest picture and as wide as its widest; of one picture the area alone counts.
    """
    aspects = dataset.aspects()
    if count > 1:
        return [int(aspects.argmax()), int(aspects.argmin()), *dataset.fullest(count - 2)]
    stretch = np.maximum(aspects, 1 / aspects)
    areas = np.minimum(shortest * stretch, longest) * np.minimum(shortest, longest / stretch)
    return [int(areas.argmax())]
