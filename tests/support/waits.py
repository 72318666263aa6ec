"""Counts the operations of a program that wait for a device, with the functions that ask for them.

On a GPU, work is only put into a queue. Whatever needs a value on the host has to wait until the queue is empty: a
number, a truth value, a shape that depends on values, a copy to the host. The processor has no queue, but the same
operations are seen there, whether their tensors would be on the device or on the host.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tiny_models import DEVICE
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = Path(__file__).resolve().parents[2] / "opacus_ac"

_OPERATORS = frozenset(
    {
        *("_local_scalar_dense", "is_nonzero", "item", "equal", "allclose", "nonzero", "argwhere", "masked_select"),
        *("bincount", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    }
)
"""Operators whose result, or its shape, depends on values."""

_COPIES = (Tensor.tolist, Tensor.cpu)
"""Functions that copy to the host, and do nothing that an operator would show where the tensor is there already."""


class Waits:
    """A context that counts what waits for a device, or would.

    On a GPU these are the waits that torch reports there (``torch.cuda.set_sync_debug_mode``). The optimizers of
    ``torch.optim`` keep the number of the step on the host, and are left out.

    Attributes:
        found: number of waits by the function that asked: file and name, of the package where it is in the call stack.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def _note(self, *_: Any) -> None:
        place = _place()
        if place is not None:
            self.found[place] += 1

    def __enter__(self) -> Waits:
        self._stack = ExitStack()
        if DEVICE.type == "cuda":
            self._stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = self._shown  # put back by catch_warnings
            self._stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("warn")
        else:
            self._stack.enter_context(_Functions(self._note))
            self._stack.enter_context(_Operators(self._note))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _shown(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            self._note()


def _place() -> str | None:
    """Return the innermost function of the package in the call stack, or else of any file but torch's and this one.

    Returns:
        None for the counters of torch's own optimizers.
    """
    frame, other = sys._getframe(2), None
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/optim/" in name:
            return None
        if name.startswith(str(PACKAGE)) and not frame.f_code.co_name.startswith("<"):  # not a comprehension
            return f"{Path(name).relative_to(PACKAGE).as_posix()} {frame.f_code.co_name}"
        if other is None and name != __file__ and "/torch/" not in name and not name.endswith("/warnings.py"):
            other = f"{Path(name).name} {frame.f_code.co_name}"
        frame = frame.f_back
    return other or "?"


class _Operators(TorchDispatchMode):
    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(map(_is_mask, _indices(args)))
        by_count = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in _OPERATORS or by_mask or by_count:
            self._note()
        return func(*args, **(kwargs or {}))


def _indices(args: tuple[Any, ...]) -> Iterable[Any]:
    return tree_leaves(args[1]) if len(args) > 1 and isinstance(args[1], list | tuple) else ()


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class _Functions(TorchFunctionMode):
    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        to_the_host = func is Tensor.to and any(map(_is_the_host, (*args[1:], *(kwargs or {}).values())))
        if func in _COPIES or to_the_host:
            self._note()
        return func(*args, **(kwargs or {}))


def _is_the_host(target: Any) -> bool:
    return target == "cpu" or (isinstance(target, torch.device) and target.type == "cpu")
