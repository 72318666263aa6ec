"""Records of several rows inside of a model: a model for multiple choice runs each choice as a row of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_INPUTS = ("input_ids", "inputs_embeds")


class Fold(NamedTuple):
    """How many rows there are where a record has several.

    Attributes:
        records: number of records B.
        rows: number of rows K of each record.
        windows: whether these are the windows of a layer that cuts records into windows.
    """

    records: int
    rows: int
    windows: bool = False


class FoldedRows:
    """Modules that take ids ``[B, K, T]`` and run the K parts of each record as rows ``[B K, T]``.

    Args:
        modules: the modules. Others inside of them get the rows, or still ``[B, K, ...]``.

    Guarantees:
        The rows of a record stand one after the other, because the modules join the first two dimensions of their
        inputs. Which rows these are is noted in each forward pass.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._modules = list(modules)
        self._outer = {id(inner): id(module) for module in self._modules for inner in module.modules()}
        self._shapes: dict[int, torch.Size] = {}

    def __bool__(self) -> bool:
        return bool(self._modules)

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedRows:
        return self  # a copy of the model has the hooks, too, and they know none of its modules

    def __reduce__(self) -> tuple[Any, ...]:
        return FoldedRows, ()

    def attach(self) -> Callable[[], None]:
        """Start; return a function that ends it."""
        handles = [m.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True) for m in self._modules]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in self._outer:
            return
        self._shapes.pop(id(module), None)
        try:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        except TypeError:
            return  # the call fails by itself
        for name, dims in zip(_INPUTS, (3, 4), strict=True):
            value = given.get(name)
            if isinstance(value, Tensor) and value.dim() == dims:
                self._shapes[id(module)] = value.shape

    def of(self, module: nn.Module) -> Fold | None:
        """Return B and K of the last call of what ``module`` is inside of; None where it is not inside of any."""
        shape = self._shapes.get(self._outer.get(id(module), 0))
        return None if shape is None else Fold(shape[0], shape[1])

    def batch(self, module: nn.Module, shape: torch.Size) -> torch.Size:
        """Return the shape of a batch as ``module`` sees it, where the model was called with ``shape``."""
        found = self._shapes.get(self._outer.get(id(module), 0))
        return shape if found is None else torch.Size([found[0] * found[1], *found[2:3]])

    def records(self, rows: int) -> int:
        """Return the number of records that ``rows`` rows belong to."""
        for shape in self._shapes.values():
            if rows == shape[0] * shape[1]:
                return shape[0]
        return rows
