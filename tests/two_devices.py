"""
Devices where there are none: CPU tensors that say they are on cpu:1 or cpu:2, and refuse to be mixed as GPUs' would; or
that "mps" brings to cpu:1, which like Apple's GPUs refuses float64.

Only the dispatcher is fooled: accelerate, transformers and TransformerLens run their own code for a model whose layers
are spread over devices, and a tensor that nobody moved ends in a RuntimeError.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

CPU, MPS = torch.device("cpu"), torch.device("cpu:1")


class Placed(torch.Tensor):
    """A CPU tensor, `inner`, that says it is on another device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device):
        with torch.inference_mode(False):  # else indexing it outside that mode would fail, as with no real tensor
            placed = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=device,
            )  # fmt: skip
        placed.inner = inner
        return placed

    def tolist(self):
        return self.inner.tolist()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.inner = other.inner

    def __deepcopy__(self, memo):
        placed = Placed(self.inner.clone(), self.device)
        return torch.nn.Parameter(placed) if isinstance(self, torch.nn.Parameter) else placed

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()

    def __repr__(self):
        return f"{self.inner!r} on {self.device}"

    def __format__(self, spec):
        return format(self.inner, spec)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args: tuple, kwargs: dict):
    """func on the CPU, its result where its arguments are. Raises RuntimeError where these are on several devices."""
    name, place = func.overloadpacket.__name__, kwargs.get("device")
    if place is None:
        place = one_place(name, args, kwargs)
    else:
        kwargs, place = {**kwargs, "device": CPU}, torch.device(place)

    def inner(x):
        return x.inner if isinstance(x, Placed) else x

    out = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    if func._schema.is_mutable and name.endswith("_"):
        return args[0]
    if place in (None, CPU):
        return out
    return tree_map(lambda x: Placed(x, place) if isinstance(x, torch.Tensor) else x, out)


def one_place(name: str, args: tuple, kwargs: dict) -> torch.device | None:
    """The device of all tensors, but for what GPUs allow too: numbers, copies, indices that are on the CPU."""
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
    if name == "copy_" or not tensors:
        return tensors[0].device if tensors else None
    if name.startswith(("index", "_index_put")) and isinstance(args[1], list | tuple):
        tensors = [tensors[0], *(x for x in tensors[1:] if x.device != CPU)]
    places = {x.device for x in tensors if x.ndim}
    if len(places) > 1:
        raise RuntimeError(f"{name}: tensors on {', '.join(sorted(map(str, places)))}")
    return places.pop() if places else tensors[0].device


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class NoFloat64(Dispatch):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if any(isinstance(x, Placed) and x.dtype == torch.float64 for x in tree_iter(out)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
        return out


class Builders(TorchFunctionMode):
    """What Dispatch does not see: torch.tensor and new_tensor write into memory, the CPU's first; in inference mode a
    change of dtype and device at once stays on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, device = dict(kwargs or {}), None
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
        elif func is torch.Tensor.new_tensor and isinstance(args[0], Placed):
            args, device = (args[0].inner, *args[1:]), args[0].device
        elif func is torch.Tensor.to and len(args) > 1:
            if isinstance(args[1], torch.Tensor):
                args, device = (args[0], args[1].dtype), args[1].device
            elif len(args) > 2:
                args, device = (args[0], args[2]), args[1]
        elif func is torch.Tensor.to and kwargs.get("dtype"):
            device = kwargs.pop("device", None)
        out = func(*args, **kwargs)
        return out if device is None else out.to(device)


class CalledMPS(Builders):
    """What is sent to "mps" goes to cpu:1: this PyTorch has no such device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def place(x):
            return MPS if isinstance(x, str | torch.device) and str(x) == "mps" else x

        args, kwargs = tree_map(place, (args, kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def pretending(*modes):
    # else a module that moves would keep its tensors and only look for other memory, which a Placed has not
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def two_devices():
    return pretending(torch.no_grad(), Dispatch(), Builders())


def apple_gpu(gigabytes: int = 16):
    """One device, "mps", with so much memory."""
    memory = {"recommended_max_memory": lambda: gigabytes * 10**9, "driver_allocated_memory": lambda: 0}
    return pretending(NoFloat64(), CalledMPS(), *(patch.object(torch.mps, name, f) for name, f in memory.items()))
