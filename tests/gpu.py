"""A GPU that isn't there: what a script moves to cuda stays in the CPU's memory and is marked.

Within `believed()` torch says that it sees a GPU. `.to(cuda)` and device=cuda mark what they return,
results of marked tensors are marked, their .device and .is_cuda say so, and an operation that mixes
marked and unmarked ones is refused as a GPU would refuse it. So the scripts' choice of device and
their branches for CUDA run; kernels, streams and nccl do not (gloo carries the bytes).
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
DEVICE = torch._C.TensorBase.device
MARKED = {}  # a storage's identity: the storage, kept, so that no other gets its place
PINNED = []  # shapes of what was made with pin_memory=True
# A GPU takes these with tensors of both places; the result is where the first one is.
MIXING = {"aten::copy_", "aten::index", "aten::index_put_", "aten::index_put"}


def is_marked(tensor) -> bool:
    return tensor.untyped_storage()._cdata in MARKED


def mark(value):
    if isinstance(value, torch.Tensor):
        MARKED[value.untyped_storage()._cdata] = value.untyped_storage()
    return value


def device_of(value):
    """torch.device of what names one, else None."""
    if isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda"):
        return torch.device(value)
    return value if isinstance(value, torch.device) else None


class Operations(TorchDispatchMode):
    """What torch computes, forward and backward."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        marks = {is_marked(x) for x in tensors if x.dim()}
        name = function._schema.name
        if len(marks) > 1 and name not in MIXING:
            shapes = [f"{tuple(x.shape)} on {'cuda' if is_marked(x) else 'cpu'}" for x in tensors]
            raise RuntimeError(f"tensors on two devices in {name}: {', '.join(shapes)}")
        result = function(*args, **kwargs)
        if any(map(is_marked, tensors[:1] if name in MIXING else tensors)):
            tree_map(mark, result)
        return result


class Places(TorchFunctionMode):
    """Where tensors are made and moved to."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name == "numpy" and is_marked(args[0]):
            raise TypeError("can't convert a tensor on cuda to numpy")
        if name == "backward":  # our own backward functions run in it, and make tensors too
            loss = args[0]
            with self:  # (torch.autograd.backward would come back here)
                return torch.autograd.Variable._execution_engine.run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, (), True, True)
        if kwargs.pop("pin_memory", False):
            PINNED.append(args)
        to = next((d for d in map(device_of, [*args[1:], *kwargs.values()]) if d), None)
        if name == "cpu":
            function, to = torch.Tensor.to, torch.device("cpu")
            args = (args[0], to)
        if to is None:
            return function(*args, **kwargs)
        args, kwargs = tree_map(lambda x: torch.device("cpu") if device_of(x) else x, (args, kwargs))
        if function is torch.Tensor.to:
            if (to.type == "cuda") == is_marked(args[0]):
                return function(*args, **kwargs)
            with _disable_current_modes():  # a copy, in the other place
                moved = function(*args, **kwargs)
                moved = moved.clone() if moved is args[0] else moved
                if to.type == "cuda":
                    mark(moved)
                return moved
        result = function(*args, **kwargs)
        return mark(result) if to.type == "cuda" else result


def on_gpu_only(name, called):
    """The collective, which notes its name and refuses the CPU's tensors, as nccl does."""
    plain = getattr(dist, name)

    def call(*args, **kwargs):
        if not all(is_marked(x) for x in args if isinstance(x, torch.Tensor)):
            raise RuntimeError(f"{name}: nccl has no backend for tensors on cpu")
        called.append(name)
        return plain(*args, **kwargs)
    return call


@contextlib.contextmanager
def believed():
    """Yields the names of the collectives that are called."""
    called = []
    device = property(lambda x: CUDA if is_marked(x) else DEVICE.__get__(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "device", device, raising=False)
        patch.setattr(torch.Tensor, "is_cuda", property(is_marked), raising=False)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1_500_000_000)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        for name in ("all_reduce", "broadcast", "all_to_all_single", "reduce_scatter_single", "all_gather_single"):
            patch.setattr(dist, name, on_gpu_only(name, called))
        try:
            with Places(), Operations():
                yield called
        finally:
            MARKED.clear()
            PINNED.clear()
