"""Whether what is about to be saved is finite: one update with too high a learning rate can spoil all of it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


def first_nonfinite(state: Mapping[str, Any]) -> str:
    """The name of the first floating-point tensor in nested dicts and lists that has a NaN or an infinity, with dots
    between the keys; "" if there is none. One value is copied from the device."""
    tensors = dict(_float_tensors("", state))
    if not tensors or math.isfinite(nn.utils.get_total_norm(tensors.values(), math.inf)):
        return ""
    return next(name for name, tensor in tensors.items() if not tensor.isfinite().all())


def _float_tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield name, value.detach()
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _float_tensors(f"{name}.{key}" if name else str(key), item)
