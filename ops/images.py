"""Pixels on the device."""

import torch


def normalize(images, mean, std, shapes=None):
    """uint8 [B,3,H,W] (0..255, RGB) -> float32 [B,3,H,W] in channels_last, (pixel - mean) / std per channel.

    Pictures cross to the device as uint8, a quarter of the bytes of float32, and become numbers there.

    shapes   (h, w) of each picture in a padded batch: what lies right of and below it becomes exactly 0, the mean
    """
    mean, std = (torch.tensor(v, dtype=torch.float32, device=images.device).view(3, 1, 1) for v in (mean, std))
    result = images.contiguous(memory_format=torch.channels_last).float().sub_(mean).div_(std)
    for picture, (height, width) in zip(result, shapes or (), strict=shapes is not None):
        picture[:, height:] = 0  # slices: a mask would be as large as the batch
        picture[:, :height, width:] = 0
    return result
