"""Weights and buffers change by releases only: what moved otherwise, around a step, is found and named."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.transfers import on_host

_SAMPLED = 16
"""Values of a tensor that are compared at every step."""


@dataclass
class _State:
    """What the tensors of a model looked like."""

    marks: dict[str, tuple[int, ...]]
    """Per name: identity of the tensor, its version, its memory."""
    samples: list[Tensor]
    """Some values of those that must not change at all."""
    sums: list[float] | None
    """All of their values, summed up; None where that was not asked for."""


def _tensors(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (name of the module, own name, tensor) of all parameters and buffers."""
    for path, module in modules:
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    yield path, name, tensor


def _sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


class ModelWatch:
    """Compares a model before its forward pass, before the charge, and after the update.

    Tensors are compared by identity, memory and version, which every change in place counts up. Changes that do not
    count (through ``.data``) are looked for in some values of frozen weights and buffers, and in all of them around the
    first step.

    Args:
        module: the model.
        trained: the parameters that releases may move.
        moves: whether the step itself moves them before its release, as directional differences do.

    Guarantees:
        What moves is found before the charge where it moved in the forward or backward pass, and named. Tensors that a
        module keeps as plain attributes (a hidden state) are put back after every step, with a warning.
    """

    def __init__(self, module: nn.Module, trained: Sequence[nn.Parameter], *, moves: bool = False) -> None:
        self._module, self._moves = module, moves
        self._trained = {id(p) for p in trained}
        self._dtypes = [(p, p.dtype) for p in trained]
        self._has_shards = any(_sharded(p) for p in module.parameters())
        self._before: _State | None = None
        self._thorough = True
        self._carried: list[tuple[str, nn.Module, str, Tensor, int]] = []
        self._told: set[str] = set()
        self._views: tuple[list[tuple[int, int]], list[Tensor]] = ([], [])

    def name_of(self, parameter: nn.Parameter) -> str | None:
        """Return the name of a parameter in the model."""
        return next((name for name, p in self._module.named_parameters() if p is parameter), None)

    def begin(self) -> None:
        """Note the tensors, unless that was done since :meth:`end`."""
        if self._before is None:
            self._before = self._look(sums=self._thorough)
            self._carried = self._attributes()

    def check(self) -> None:
        """Put back what the model keeps for its next batch.

        Raises:
            ValueError: If anything moved since :meth:`begin`, or if the model was cast.
        """
        for parameter, dtype in self._dtypes:
            if parameter.dtype != dtype:
                raise ValueError(
                    f"{self.name_of(parameter)} was cast from {dtype} to {parameter.dtype} after make_private: cast "
                    "the model first, then build the optimizer and call make_private"
                )
        if self._before is not None:
            self._put_back()
            self._compare("in its forward or backward pass", trained=not self._moves)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Return a context in which the model has the tensors, as plain attributes, from before the forward pass."""
        now = [(module, name, vars(module).get(name)) for _, module, name, _, _ in self._carried]
        for _, module, name, value, _ in self._carried:
            setattr(module, name, value)
        try:
            yield
        finally:
            for module, name, present in now:
                setattr(module, name, present)

    def _attributes(self) -> list[tuple[str, nn.Module, str, Tensor, int]]:
        """Return (path, module, name, tensor, version) of tensors that are plain attributes, such as a hidden state."""
        return [
            (path, module, name, value, _version(value))
            for path, module in self._module.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        ]

    def _put_back(self) -> None:
        """Undo what the forward pass put into plain attributes: it would carry records over to the next batch."""
        carried, self._carried = self._carried, []
        for path, module, name, value, version in carried:
            place = f"{path}.{name}" if path else name
            if _version(value) != version:
                self._refuse(place, "was changed", "in its forward or backward pass")
            if vars(module).get(name) is value:
                continue
            setattr(module, name, value)
            if place not in self._told:
                self._told.add(place)
                warnings.warn(
                    f"the model keeps {place} from one batch for the next. A private step puts back what was there "
                    "before it, because records would otherwise be in steps that they are not charged for. Pass what "
                    "is carried over as an input",
                    stacklevel=4,
                )

    def check_applied(self) -> None:
        """Raise ``ValueError`` when anything moved that no release may move, and end."""
        if self._before is not None:
            try:
                self._compare("during optimizer.step()", trained=False)
                self._thorough = False
            finally:
                self.end()

    def end(self) -> None:
        """Forget the tensors: until the next forward pass the model is the caller's."""
        self._before, self._carried = None, []

    def _compare(self, when: str, *, trained: bool) -> None:
        before = self._before
        assert before is not None
        now = self._look(sums=before.sums is not None)
        for name in sorted(before.marks.keys() | now.marks.keys()):
            if name not in before.marks or name not in now.marks:
                self._refuse(name, "was added or removed", when)
            was, now_is = before.marks[name], now.marks[name]
            if now_is[0] in self._trained:  # where it is sharded its memory may be another one
                was, now_is = (was[1:2], now_is[1:2]) if trained else ((), ())
            if was != now_is:
                self._refuse(name, "was changed", when)
        same = len(before.samples) == len(now.samples) and all(map(torch.equal, before.samples, now.samples))
        if not same or before.sums != now.sums:
            self._refuse("a frozen weight or a buffer", "was changed", when)

    @staticmethod
    def _refuse(name: str, what: str, when: str) -> None:
        raise ValueError(
            f"{name} {what} by the model or the loop {when}: what private batches write there without noise is in no "
            "guarantee. Statistics of batches, caches and counters have no place in a private model: freeze the layer "
            "in evaluation mode (layer.eval()), replace it, or change weights between two steps only"
        )

    def _look(self, *, sums: bool) -> _State:
        marks: dict[str, tuple[int, ...]] = {}
        still: list[Tensor] = []
        modules = dict(self._module.named_modules())
        for path, name, tensor in _tensors(list(modules.items())):
            if tensor.is_meta or (self._has_shards and name in modules[path]._parameters):
                continue  # gathered and let go of around its layer
            marks[f"{path}.{name}" if path else name] = (id(tensor), _version(tensor), tensor.data_ptr())
            if id(tensor) not in self._trained:
                still.append(tensor.detach())
        return _State(marks, self._sample(still), _sums(still) if sums else None)

    def _sample(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return some values of each tensor, together by type and device."""
        key = [(t.data_ptr(), t.numel()) for t in tensors]
        if key != self._views[0]:
            self._views = key, [_spread(t) for t in tensors if t.numel() and t.layout == torch.strided]
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for view in self._views[1]:
            groups.setdefault((view.dtype, view.device), []).append(view)
        return [
            torch.cat(group).nan_to_num() if group[0].is_floating_point() else torch.cat(group)
            for group in groups.values()
        ]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _spread(tensor: Tensor) -> Tensor:
    """Return a view of some values of a tensor, from its first to its last."""
    if not tensor.is_contiguous():
        return tensor.diagonal().reshape(-1)[:_SAMPLED] if tensor.dim() == 2 else tensor.reshape(-1)[:0]
    return tensor.view(-1)[:: max(1, -(-tensor.numel() // _SAMPLED))]


def _sums(tensors: list[Tensor]) -> list[float]:
    """Return the sum over all values of each tensor."""
    found = [
        t.sum(dtype=torch.float64).nan_to_num()
        for t in tensors
        if not t.is_complex() and t.numel() and not _quantized(t)
    ]
    return on_host(found).tolist() if found else []


def _quantized(tensor: Any) -> bool:
    return bool(tensor.is_quantized)
