"""Tensors that say they are on a GPU, for tests of what must not run there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

LOOKUPS = (torch.nn.functional.embedding, torch.embedding, Tensor.__getitem__, Tensor.index_select)


class Far(Tensor):
    """Values of the processor under the name of a GPU. A lookup of rows by ids is the assertion of a device.

    ``cpu`` and ``to`` another device bring the values back; whatever else is computed stays there.
    """

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ids = [a for a in args if type(a) is Tensor and not a.is_floating_point()]
        if func in LOOKUPS and ids:
            raise AssertionError("device-side assert: rows were looked up on the GPU")
        if func is Tensor.to:  # where it is already
            args = tuple(a for a in args if not (isinstance(a, torch.device) and a.type == "cuda"))
        found = super().__torch_function__(func, types, args, kwargs)
        if func is Tensor.cpu or (func is Tensor.to and "cpu" in str((args[1:], kwargs))):
            return tree_map(lambda t: t.as_subclass(Tensor) if isinstance(t, Tensor) else t, found)
        return found


def far(module: nn.Module) -> nn.Module:
    """Return the module with its parameters there."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = nn.Parameter(parameter.detach().as_subclass(Far), parameter.requires_grad)
    return module
