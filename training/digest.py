"""What two checkpoints have in common, bit for bit."""

from collections.abc import Mapping

import torch


def feed(digest, name, value):
    """Feed every tensor in `value`, nested dicts and lists of tensors, to the hash `digest`, in order of name."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            feed(digest, f"{name}.{key}", value[key])
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            feed(digest, f"{name}.{index}", item)
