"""Copies between devices keep every value, and wait for a GPU at most once."""

import torch

from ops.transfer import to_cpu, to_device
from tests.fake_cuda import GPU, FakeCuda


def test_one_wait_for_all_tensors_and_none_for_a_copy_to_the_gpu():
    tensors = torch.tensor([[2**53, -1]]), torch.rand(2, 3), torch.tensor([True, False]), torch.zeros(0, 4)
    with FakeCuda() as gpu:
        on_gpu = [to_device(tensor, GPU) for tensor in tensors]
        assert all(tensor.device == GPU for tensor in on_gpu) and not gpu.waits
        copies = to_cpu(*on_gpu)
        assert len(gpu.waits) == 1
    torch.testing.assert_close(copies, tensors, rtol=0, atol=0)


def test_tensors_of_a_cpu_are_not_copied():
    tensor = torch.rand(3)
    assert to_device(tensor, tensor.device) is tensor and to_cpu(tensor)[0] is tensor
