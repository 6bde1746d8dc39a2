"""Batches for CenterFusion: what a step needs of the targets is made here, by the data loading workers.

inputs_of  list of targets -> inputs of the network beside the images, see ops.radar.network_inputs
assign     list of targets -> the values to predict, see losses.centerfusion.assign
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from data import loader
from data.nuscenes.transforms import flip_target

Tensors = Mapping[str, torch.Tensor]


def train(samples: Sequence[tuple], inputs_of: Callable[..., Tensors], assign: Callable[..., Tensors]) -> tuple:
    """A batch with the values to predict, and radar associated with the true boxes."""
    return loader.collate(samples, lambda targets: assign(targets, **inputs_of(targets)))


def val(
    samples: Sequence[tuple], inputs_of: Callable[..., Tensors], assign: Callable[..., Tensors], flip_test: bool = False
) -> tuple:
    """A batch with the values to predict and the inputs of the network, which associates radar with its own peaks.

    flip_test: the inputs of the mirror images follow those of the images
    """
    width = samples[0][0].shape[-1]

    def pack(targets):
        mirrored = [flip_target(target, width) for target in targets] if flip_test else []
        return {**assign(targets), **inputs_of(targets + mirrored)}

    return loader.collate(samples, pack)
