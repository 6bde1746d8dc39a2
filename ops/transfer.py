"""Copies between CPU and GPU that wait for the GPU as rarely as possible."""

import torch


def to_device(tensor, device):
    """A tensor of the CPU on `device`, without waiting: only from pinned memory does a copy run beside the program."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_cpu(*tensors):
    """Tensors of one device on the CPU, by one copy: a GPU is waited for once. Integers up to 2**53 stay exact."""
    if not tensors[0].is_cuda:
        return tensors
    numbers = torch.cat([tensor.flatten().double() for tensor in tensors]).cpu()
    parts = numbers.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors))
