"""
Two devices where there is none: CPU tensors that say they are on cpu:1 or cpu:2, and refuse to be mixed as GPUs' would.

Only the dispatcher is fooled: accelerate, transformers and TransformerLens run their own code for a model whose layers
are spread over devices, and a tensor that nobody moved ends in a RuntimeError.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

CPU = torch.device("cpu")


class Placed(torch.Tensor):
    """A CPU tensor, `inner`, that says it is on another device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device):
        placed = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device,
        )  # fmt: skip
        placed.inner = inner
        return placed

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"{self.inner!r} on {self.device}"

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


class Builders(TorchFunctionMode):
    """torch.tensor writes into memory, which Dispatch does not see: the CPU's first."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func in (torch.tensor, torch.as_tensor) else None
        out = func(*args, **kwargs)
        return out if device is None else out.to(device)


@contextmanager
def two_devices():
    # else a module that moves would keep its tensors and only look for other memory, which a Placed has not
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with torch.no_grad(), Dispatch(), Builders():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
