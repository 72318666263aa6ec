"""The first forward passes are watched, function by function, for what does not go through the layers of the model.

A trained parameter that is used outside of its own module is found in this way. So is a value that does not come from
the batch, such as a table that is looked up at constant ids.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from opacus_ac.grad_sample.one_backward.shared import TRANSPOSED, Shared
from opacus_ac.grad_sample.one_backward.use import Tracked

_PASSES_TO_WATCH = 2


class _Watch(TorchFunctionMode):
    """Shares trained parameters that are used outside of their own modules, and notes what comes from the batch.

    Args:
        share: returns the shared value of a parameter, or None if it stays as it is.

    Attributes:
        used: whether there was such a use.
        of_batch: the tensors that come from the batch.
    """

    def __init__(self, share: Callable[[nn.Parameter], Shared | None]) -> None:
        super().__init__()
        self._share = share
        self.used = False
        self.of_batch: Any = WeakIdKeyDictionary()

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors that come from the batch."""
        for tensor in tensors:
            self.of_batch[tensor] = True

    def _replaced(self, value: Any) -> Any:
        # In its own module, a parameter requires no gradient while the module runs.
        if isinstance(value, nn.Parameter) and value.requires_grad:
            shared = self._share(value)
            self.used = self.used or shared is not None
            return value if shared is None else shared
        if type(value) in (list, tuple):
            return type(value)(self._replaced(v) for v in value)
        return value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function with shared values in the place of such parameters."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").split(".")[0]
        attribute = name in ("__get__", "__set__") and func not in TRANSPOSED
        given = args, tuple(kwargs.values())
        if not attribute and torch.is_grad_enabled():
            args, kwargs = tuple(map(self._replaced, args)), {k: self._replaced(v) for k, v in kwargs.items()}
        result = func(*args, **kwargs)
        if any(tensor in self.of_batch for tensor in _tensors(given)):
            self.note(_tensors(result))
            if args and isinstance(args[0], Tensor) and (name == "__setitem__" or name[-1:] == "_"):
                self.note(args[:1])
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class WatchedPasses:
    """Watches the first forward passes, and shares the parameters that are used outside of their modules.

    If there is no such use in them, later passes are not watched.

    Args:
        tracked: the modules whose parameters have rules.
        share: returns a parameter with a copy per record, from its module and its name there; None if it cannot.

    Attributes:
        paused: whether functions that run now are those of something else.
    """

    def __init__(
        self, tracked: Iterable[Tracked], share: Callable[[Tracked, str, nn.Parameter], Shared | None]
    ) -> None:
        self._homes: dict[int, tuple[Tracked, str]] = {}
        for item in tracked:
            trained = {id(p) for p in item.parameters}
            for name, parameter in item.module.named_parameters():
                if id(parameter) in trained:
                    self._homes.setdefault(id(parameter), (item, name))
        self._share = share
        self._passes: list[tuple[_Watch, FrameType]] = []
        self._values: dict[int, Shared] = {}
        self._left, self._found = _PASSES_TO_WATCH, False
        self.paused = False

    def start(self, caller: FrameType, batch: Iterable[Tensor]) -> None:
        """A forward pass of the model starts.

        Args:
            caller: the frame that runs the forward pass. Interrupted passes are known by it.
            batch: the tensors that the model is called with.
        """
        while self._passes and not _is_running(self._passes[-1][1]):
            self._leave()
        if self._left or self._found:
            watch = _Watch(self._shared)
            watch.note(batch)
            watch.__enter__()
            self._passes.append((watch, caller))

    def end(self, undecided: bool) -> None:
        """A forward pass of the model has ended, or failed.

        Args:
            undecided: whether the next pass must be watched, too.
        """
        if self._passes:
            self._found = self._found or self._passes[-1][0].used
            self._left = max(int(undecided), self._left - 1)
            self._leave()

    def note(self, output: Any) -> None:
        """Note the output of a layer that comes from the batch."""
        if self._passes:
            self._passes[-1][0].note(_tensors(output))

    def is_constant(self, output: Tensor) -> bool | None:
        """Say whether an output does not come from the batch; None if the pass is not watched."""
        if not self._passes or self.paused or not _is_running(self._passes[-1][1]):
            return None
        return output not in self._passes[-1][0].of_batch and not output.requires_grad

    def _leave(self) -> None:
        watch, _ = self._passes.pop()
        if torch.overrides._get_current_function_mode() is watch:
            watch.__exit__(None, None, None)
        if not self._passes:
            self._values = {}

    def _shared(self, parameter: nn.Parameter) -> Shared | None:
        """Return the shared value of a parameter; None where it is used by its module, or has no rule."""
        home = self._homes.get(id(parameter))
        if self.paused or home is None or not home[0].module.training or not _is_running(self._passes[-1][1]):
            return None
        key = id(parameter)
        if key not in self._values and (shared := self._share(*home, parameter)) is not None:
            self._values[key] = shared
        return self._values.get(key)


def _is_running(frame: FrameType) -> bool:
    """Say whether a frame is among the callers."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None
