"""Pixels on the device."""

import functools

import torch


def normalize(images, mean, std, shapes=None):
    """uint8 [B,3,H,W] (0..255, RGB) -> float32 [B,3,H,W] in channels_last, (pixel - mean) / std per channel.

    Images are copied to the device as uint8, a quarter of the bytes of float32, and converted there.

    mean, std  three numbers each, in 0..255
    shapes     (h, w) of each image in a padded batch: the padding right of and below it becomes exactly 0
    """
    mean, std = (_per_channel(tuple(values), images.device) for values in (mean, std))
    result = images.contiguous(memory_format=torch.channels_last).float().sub_(mean).div_(std)
    for image, (height, width) in zip(result, shapes or (), strict=shapes is not None):
        image[:, height:] = 0  # slices: a mask would be as large as the batch
        image[:, :height, width:] = 0
    return result


@functools.lru_cache(maxsize=16)
def _per_channel(values, device):
    """float32 [3,1,1] on `device`. Kept, because a GPU has finished all its work before such a copy is made."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
