"""Pixels on the device."""

import torch


def normalize(images, mean, std):
    """uint8 [B,3,H,W] (0..255, RGB) -> float32 [B,3,H,W] in channels_last, (pixel - mean) / std per channel.

    Pictures cross to the device as uint8, a quarter of the bytes of float32, and become numbers there.
    """
    mean, std = (torch.tensor(v, dtype=torch.float32, device=images.device).view(3, 1, 1) for v in (mean, std))
    return images.contiguous(memory_format=torch.channels_last).float().sub_(mean).div_(std)
