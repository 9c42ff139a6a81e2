"""An accelerator that has no float64, pretended on the CPU, as Apple's GPUs are.

Inside `float32_device()`, tensors on the device `meta` hold numbers, and one in float64 raises TypeError as it is made
there. `on_device` moves a module. A tensor on the device and one on the CPU do not meet, as on a real one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")


class Placed(torch.Tensor):
    """A tensor that says that it is on the device; `numbers` is on the CPU."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "Placed":
        if numbers.dtype == torch.float64:
            raise TypeError("Cannot make a float64 tensor: the device has none.")
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), dtype=numbers.dtype, device=DEVICE, requires_grad=False
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU, whose outputs are on the device where it was asked for there or has an input there."""
    inputs: list[torch.Tensor] = []
    tree_map(lambda each: inputs.append(each) if isinstance(each, torch.Tensor) else None, (args, kwargs))
    here = any(isinstance(each, Placed) for each in inputs)
    asked = kwargs.get("device")
    device = DEVICE if here else torch.device("cpu")
    if asked is not None:
        device = torch.device(asked)
        kwargs = {**kwargs, "device": torch.device("cpu")}
    copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    # As on a real device, where numbers and indices may stay on the CPU.
    indices = "index" in str(func) or "embedding" in str(func)
    if here and not copies and not indices:
        assert all(isinstance(each, Placed) or each.ndim == 0 for each in inputs), f"{func} meets two devices"
    plain = tree_map(lambda each: each.numbers if isinstance(each, Placed) else each, (args, kwargs))
    found = func(*plain[0], **plain[1])
    if func is torch.ops.aten.copy_.default or str(func).endswith("_.default"):
        return args[0]
    if device != DEVICE:
        return found
    return tree_map(lambda each: Placed(each) if isinstance(each, torch.Tensor) else each, found)


class _Made(TorchFunctionMode):
    """What is no operation that the other mode could catch: `torch.tensor`, and reading numbers out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], Placed):
            return args[0].numbers.tolist()
        if func is not torch.tensor or kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        return func(*args, **kwargs).to(device)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def float32_device() -> Iterator[torch.device]:
    """While open, there is such a device; gives it."""
    with torch.no_grad(), _Made(), _Mode():
        yield DEVICE


def on_device(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its weights and buffers on the device."""
    for each in module.modules():
        for name, weight in each._parameters.items():
            if weight is not None:
                each._parameters[name] = torch.nn.Parameter(Placed(weight.detach().clone()), requires_grad=False)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = Placed(buffer.detach().clone())
    return module
