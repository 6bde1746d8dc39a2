"""A GPU that is none: tensors that say they are on cuda:0, computed on the CPU.

    with FakeCuda() as gpu:
        ...                 # the code under test, with device="cuda"
    gpu.waits               # the operations that would have waited for a GPU

An operation on tensors of two devices raises, as on a GPU, and so does NumPy. Every operation that waits until the GPU
has finished its work is recorded: those whose result has a size that depends on values, those that read a value, copies
to the CPU, and copies to the GPU without non_blocking=True. Autograd's engine needs a real GPU, so backward() only
checks the graph: every parameter that the loss depends on gets a gradient of zeros.

It uses what torch's own FakeTensorMode does to run without a GPU; unlike there, tensors have values.
"""

import contextlib
import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda:0")
# Their results have a size that depends on values, or the host reads a value.
WAITING = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select"}
WAITING |= {"aten::bincount", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::histc"}
WAITING |= {"aten::_linalg_check_errors", "torchvision::nms"}
COPIES = {"aten::_to_copy", "aten::copy_"}
INDEXING = {"aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


class GpuTensor(torch.Tensor):
    """A tensor on the GPU that is none; `value` is the tensor on the CPU with its values."""

    @staticmethod
    def __new__(cls, value):
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, device=GPU, **layout)

    def __init__(self, value):
        self.value = value

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"GpuTensor({self.value!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a GpuTensor outside FakeCuda")

    __torch_function__ = torch._C._disabled_torch_function_impl


class FakeCuda(TorchDispatchMode):
    """See the head of this file.

    waits    list of strings, "operation at file:line", of the project's line that asked for it
    """

    def __init__(self):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # else torch would look for a driver
        self.waits = []
        self._exits = contextlib.ExitStack()

    def __enter__(self):
        torch._C._ensureCUDADeviceGuardSet()
        self._set(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors(), True)
        swap = torch.__future__.get_swap_module_params_on_conversion()
        self._set(torch.__future__.set_swap_module_params_on_conversion, swap, True)  # for Module.to
        cudnn = torch.backends.cudnn
        self._set(
            lambda value: setattr(cudnn, "enabled", value), cudnn.enabled, False
        )  # the CPU has none of its kernels
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._exits.close()

    def _set(self, setter, before, value):
        setter(value)
        self._exits.callback(setter, before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name(), dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = [isinstance(tensor, GpuTensor) for tensor in tensors]
        base, to_gpu = name.partition(".")[0], any(on_gpu)
        if kwargs.get("device") is not None:
            to_gpu = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = torch.device("cpu")
        elif name == "aten::copy_":
            to_gpu = on_gpu[0]
        if name == "aten::_pin_memory":
            return args[0].clone()
        if any(on_gpu) or to_gpu:
            self._check(name, base, args, kwargs, tensors, on_gpu, to_gpu)
        known = {id(tensor.value): tensor for tensor in tensors if isinstance(tensor, GpuTensor)}
        args, kwargs = tree_map_only(GpuTensor, lambda tensor: tensor.value, (args, kwargs))
        result = func(*args, **kwargs)
        if not to_gpu:
            return result

        # an operation in place returns its argument
        def on_the_gpu(tensor):
            return known[id(tensor)] if id(tensor) in known else GpuTensor(tensor)

        return tree_map_only(torch.Tensor, on_the_gpu, result)

    def _check(self, name, base, args, kwargs, tensors, on_gpu, to_gpu):
        """Record `name` if it waits; RuntimeError if its tensors are on two devices."""
        waits = name in WAITING or base in WAITING
        if base in COPIES and tensors:
            source = on_gpu[-1]
            non_blocking = kwargs.get("non_blocking", name == "aten::copy_" and len(args) > 2 and args[2])
            waits = source != to_gpu and (source or not non_blocking)
        elif name == "aten::repeat_interleave.Tensor":
            waits = kwargs.get("output_size") is None
        elif name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            waits = any(index.dtype in (torch.bool, torch.uint8) or index.device.type == "cpu" for index in indices)
        elif not all(on or tensor.ndim == 0 for on, tensor in zip(on_gpu, tensors)):
            raise RuntimeError(f"{name}: tensors on the CPU and on the GPU, {_place()}")
        if waits:
            self.waits.append(f"{name} {_place()}")


def _place():
    """The innermost line of the project, outside this file, that is being run."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and path != Path(__file__):
            return f"at {path.relative_to(ROOT)}:{frame.lineno}"
    return ""


def backward(loss, *args, **kwargs):
    """In place of Tensor.backward: a gradient of zeros for every leaf that the loss depends on."""
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and node.variable.grad is None:
            node.variable.grad = torch.zeros_like(node.variable)
        pending += [following for following, _ in node.next_functions]


def install(monkeypatch):
    """Let torch.cuda describe one GPU that is none."""
    properties = type("Properties", (), {"name": "fake GPU", "total_memory": 16 * 2**30, "major": 9, "minor": 0})()
    replaced = {"is_available": True, "device_count": 1, "is_bf16_supported": True, "get_device_name": "fake GPU"}
    replaced |= {"get_device_properties": properties, "set_device": None, "synchronize": None}
    replaced |= {"is_current_stream_capturing": False}
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **options: value)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
