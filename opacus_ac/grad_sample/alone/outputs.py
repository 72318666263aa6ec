"""Compares outputs of a few records in a batch with outputs for each of them alone, for training without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.alone.call import Call, Run
from opacus_ac.grad_sample.alone.isolated import is_coarse, is_sharded, isolated_twin, shapes_of, without_checkpoints
from opacus_ac.grad_sample.alone.own_length import KeepsLength, OwnLengths
from opacus_ac.grad_sample.alone.positions import part_of_output, take_call
from opacus_ac.grad_sample.alone.single import (
    Cut,
    choose_records,
    count_rows,
    floats_in,
    inputs_in,
    mask_in,
    own_positions,
)
from opacus_ac.grad_sample.alone.trace import explain_difference, sees_the_record
from opacus_ac.grad_sample.precision import less_was_asked
from opacus_ac.noise.secret_state import replace_torch_state

_TOLERANCE, _COARSE = 1e-3, 6e-2
"""Largest difference of a record's outputs, relative to the largest output: in float32, and in lower precision.

Rotary embeddings of shifted positions differ by 1e-5.
"""

Losses = Callable[[], Tensor]


class OutputsAlone:
    """Compares the outputs of a model for a few records of a batch with its outputs for each of them alone.

    Args:
        model: the model. The loop may call it or parts of it.
        keeps_length: says whether inputs are from a loader that gives every record the same length, with padding.

    Attributes:
        compared: number of records that were compared so far.

    Guarantees:
        The first evaluation is compared. Another one is compared after a change of training flags, and if a batch has
        as many records as some layer has features, positions or constants. The model, its buffers and the random states
        stay as they were.
    """

    def __init__(self, model: nn.Module, keeps_length: KeepsLength = lambda tensors: False) -> None:
        self._own_lengths = OwnLengths(keeps_length)
        self._modules = {id(m): (name, m) for name, m in model.named_modules()}
        self._off = is_sharded(model.parameters())
        self._verified: object = None
        self._sizes: set[int] = set()
        self._checked: set[int] = set()
        self.compared = 0

    def noting(self, closure: Losses) -> Losses:
        """Return a closure whose first evaluation is compared.

        Raises:
            ValueError: In the evaluation, if the output for a record depends on the other records of its batch.
        """
        fresh = [True]

        def evaluate() -> Tensor:
            if not fresh[0] or self._off:
                return closure()
            fresh[0] = False
            calls: list[Call] = []
            with self._watching(calls):
                losses = closure()
            self._own_lengths.check()
            if isinstance(losses, Tensor) and losses.dim() == 1:
                for call in calls:
                    self._compare(call, len(losses))
            return losses

        return evaluate

    def _state(self) -> tuple[bool, ...]:
        return tuple(m.training for _, m in self._modules.values())

    def _is_due(self, arguments: Any, rows: int) -> bool:
        if self._verified != self._state():
            return True
        return rows not in self._checked and (
            rows in self._sizes or any(rows in t.shape[1:] for t in inputs_in(arguments))
        )

    @contextmanager
    def _watching(self, calls: list[Call]) -> Iterator[None]:
        """Note the calls of the model. Calls of its parts are not noted, because their inputs may not be records."""
        running: list[Call | int] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if running:
                running.append(id(module))
                return
            rows = count_rows((args, kwargs), 0)
            path = self._modules[id(module)][0]
            self._own_lengths.see(module, (args, kwargs), rows, not path)
            call = Call(path, module, (args, kwargs), rows, rows, [])
            if rows and self._is_due((args, kwargs), rows):
                mask = mask_in(module, args, kwargs, rows)
                for record in choose_records((args, kwargs), rows, 0, mask):
                    positions = None if mask is None else own_positions(mask, record)
                    call.runs.append(Run(Cut(rows, record, 1, 0, positions), {}))
                call.inputs = [take_call(run.cut, call.arguments) for run in call.runs]
            running.append(call)

        def leave(module: nn.Module, _args: Any, output: Any) -> None:
            if not running:
                return
            call = running.pop()
            if isinstance(call, Call) and call.runs and not call.path:
                call.outputs = {path: t.detach() for path, t in floats_in(output)}
                calls.append(call)

        handles: list[Any] = []
        for _, module in self._modules.values():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def undisturbed(self, _rows: int) -> ExitStack:
        """Return a context in which a run does not change random states."""
        stack = ExitStack()
        stack.callback(replace_torch_state())
        stack.enter_context(without_checkpoints())
        return stack

    @torch.no_grad()
    def _compare(self, call: Call, records: int) -> None:
        if call.rows != records:
            return
        coarse = is_coarse(call.module, call.outputs.values()) or less_was_asked()
        for place, (run, given) in enumerate(zip(call.runs, call.inputs, strict=True)):
            twin = isolated_twin(call.module)
            seen = shapes_of(twin)
            with self.undisturbed(1):
                alone = dict(floats_in(twin(*given[0], **given[1])))
            self._sizes |= seen
            for path, whole in call.outputs.items():
                own = alone.get(path)
                tolerance = _COARSE if coarse else _TOLERANCE
                if own is None or not _differs(whole, own, call, run.cut, tolerance):
                    continue
                padded = run.cut.positions is not None and self._own_lengths.accept(call)
                if padded and sees_the_record(call, place, tolerance, self):
                    continue
                name = ".".join(str(part) for part in path) or "what the model returns"
                raise ValueError(explain_difference(call, place, [name], _TOLERANCE, self))
            self.compared += 1
        self._checked.add(call.rows)
        self._verified = self._state()


def _differs(whole: Tensor, own: Tensor, call: Call, cut: Cut, tolerance: float) -> bool:
    if whole.dim() == 0 or whole.shape[0] != cut.rows:
        return False
    part = part_of_output(cut, whole, call.arguments)
    if part.shape != own.shape or not bool(torch.isfinite(part).all()):
        return False
    size = float(part.abs().amax()) if part.numel() else 0.0
    return bool(((part - own).abs() > tolerance * size).any())
