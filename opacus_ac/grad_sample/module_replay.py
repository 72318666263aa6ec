"""Calls a module again without its hooks, with its own parameters or with others.

A rule runs inside a backward hook. A call of the module there would run the hooks that called the rule, and those of
every child. A bare twin shares the tensors of the module and has no hooks.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def written_type(module: ModuleT) -> type[ModuleT]:
    """Return the class of a module as it was written. ``fully_shard`` puts a subclass in its place."""
    cls = type(module)
    if cls.__bases__[0] is FSDPModule:
        original: type[ModuleT] = cls.__bases__[1]
        return original
    return cls


def names_in_methods(module: nn.Module) -> set[str]:
    """Return the names of attributes and functions that the methods of a module's class use, but for ``__init__``."""
    classes = written_type(module).__mro__
    methods = [item for cls in classes[: classes.index(nn.Module)] for item in vars(cls).items()]
    return {word for name, f in methods if name != "__init__" for word in _names_in(getattr(f, "__code__", None))}


def _names_in(code: Any) -> Iterator[str]:
    """Yield the names in some code, with the functions inside of it."""
    if code is not None:
        yield from code.co_names
        for inner in code.co_consts:
            yield from _names_in(inner if inspect.iscode(inner) else None)


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded parameter gathered from all ranks, or any other tensor as it is. All ranks must call this."""
    gather = getattr(tensor, "full_tensor", None)
    if gather is None:
        return tensor
    value: Tensor = gather().detach()
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value


def bare_twin(module: ModuleT, _seen: dict[int, nn.Module] | None = None) -> ModuleT:
    """Return a shallow copy of ``module`` and its children, with the same parameters and buffers and without hooks.

    Sharded parameters are gathered.

    Guarantees:
        Replacing a parameter, a buffer or an attribute of the twin leaves ``module`` as it was.
    """
    seen: dict[int, nn.Module] = {} if _seen is None else _seen
    known = seen.get(id(module))
    if known is not None:
        return known  # type: ignore[return-value]
    cls = written_type(module)
    twin = cls.__new__(cls)
    seen[id(module)] = twin
    state = dict(module.__dict__)
    for key in state:
        if key.startswith("_") and "_hooks" in key and isinstance(state[key], dict):
            state[key] = OrderedDict()
    state["_parameters"] = {k: None if p is None else whole(p) for k, p in module._parameters.items()}
    state["_buffers"] = dict(module._buffers)
    state["_modules"] = {k: None if m is None else bare_twin(m, seen) for k, m in module._modules.items()}
    twin.__dict__.update(state)
    return twin


def map_tensors(twin: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer of a bare twin by the result of ``change``. Tied tensors stay tied."""
    new: dict[int, Tensor] = {}

    def changed(tensor: Tensor) -> Tensor:
        if id(tensor) not in new:
            value = change(tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            new[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
        return new[id(tensor)]

    for module in twin.modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in list(store.items()):
                if tensor is not None:
                    store[key] = changed(tensor)  # type: ignore[assignment]


def is_quantised(module: nn.Module) -> bool:
    """Say whether a module has weights of 4 or 8 bits, for which it has kernels of its own."""
    return any(not (p.is_floating_point() or p.is_complex()) for p in module.parameters())


def call_forward(module: nn.Module, *inputs: Any) -> Any:
    """Call the ``forward`` of the class on a twin without hooks, which shares its tensors with ``module``."""
    return written_type(module).forward(bare_twin(module), *inputs)


def call_with(module: nn.Module, parameters: dict[str, Tensor], *inputs: Any) -> Any:
    """Do the same as :func:`call_forward`, with some of the module's own parameters replaced for this call."""
    twin = bare_twin(module)
    # A plain tensor is enough for forward, and may require a gradient or not.
    twin._parameters.update(parameters)  # type: ignore[arg-type]
    return written_type(module).forward(twin, *inputs)


def to_double(tensor: Tensor) -> Tensor:
    """Return a copy in float64 (integers keep their type), on the CPU if the device has no float64."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    return tensor.to(device, torch.float64, copy=True) if tensor.is_floating_point() else tensor.to(device, copy=True)
