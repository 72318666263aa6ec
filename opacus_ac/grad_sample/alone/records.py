"""Compares gradients of a few records in a batch with their gradients when the model runs them alone.

Rules for per-sample gradients assume that the first dimension of a layer's input is the records, in their order, and
that the output for a record depends on that record only. This fails without an error for a model that sorts or mixes
its batch or that gives constants to a layer, and for a layer that is called in a way for which its rule was not
written. So a few records are run alone on the first batch, and again after changes, and their gradients are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.alone.call import Call
from opacus_ac.grad_sample.alone.comparison import Comparison
from opacus_ac.grad_sample.alone.isolated import is_coarse, is_sharded
from opacus_ac.grad_sample.alone.own_length import KeepsLength, OwnLengths
from opacus_ac.grad_sample.alone.runner import Runner, Tape, Users
from opacus_ac.grad_sample.alone.single import (
    Cut,
    Paths,
    choose_records,
    count_rows,
    floats_in,
    inputs_in,
    mask_in,
    own_positions,
    replace_floats,
)
from opacus_ac.grad_sample.precision import less_was_asked
from opacus_ac.grad_sample.source import GradientSource
from opacus_ac.noise.forward_randomness import ForwardRandomness

_COPIED = 1 << 24
"""Largest number of elements of an output that is copied, so that changes in place by the loop do no harm."""

_PATIENCE = 3
"""Number of batches without a conclusive comparison after which a warning says so."""


class RecordsAlone:
    """Compares gradients of single records with those of the batch, and gives each record its own random draws.

    Args:
        model: the model that is trained. The loop may call it or parts of it.
        parameters: the trained parameters.
        names: their names.
        step: returns the number of the current logical step.
        tape: keeps losses of records. It is paused while records run alone.
        mean: whether the loss is a mean over records.
        batch_first: whether records are the first dimension of the inputs.
        users: counts the users of a batch, if a record is a user with several rows.
        pause: returns a context in which the source of per-sample gradients keeps nothing.
        keeps_length: says whether inputs are from a loader that gives every record the same length, with padding.
        key: what random draws depend on, so that the run can be repeated; without one they are secret.

    Attributes:
        compared: number of records with a conclusive comparison so far.

    Guarantees:
        Up to three records are compared, without padding that other records may have caused. This happens on the first
        physical batch with a gradient, after a change of training flags or of the trained parameters, and if a batch
        has as many records as some layer has features, positions or constants. The model, its buffers, the tape and the
        random states stay as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        names: Iterable[str],
        step: Callable[[], int],
        tape: Tape,
        *,
        mean: bool = True,
        batch_first: bool = True,
        users: Users | None = None,
        pause: Callable[[], AbstractContextManager[None]] = nullcontext,
        keeps_length: KeepsLength = lambda tensors: False,
        key: bytes | None = None,
    ) -> None:
        self._own_lengths = OwnLengths(keeps_length)
        self._runner = Runner(tape, users, pause, self._own_lengths)
        self._pause, self._model = pause, model
        self._parameters, self._names = list(parameters), list(names)
        self._mean, self._dim, self._users = mean, 0 if batch_first else 1, users
        self._modules = {id(m): (name, m) for name, m in model.named_modules()}
        self._off = is_sharded(self._parameters)
        self._verified: object = None
        self._checked: set[int] = set()
        self._attempts = 0
        self.compared = 0
        self._calls: list[Call] = []
        self._open: tuple[int, Call | None] | None = None
        self._depth = 0
        self._whole_calls = 0
        self.randomness = ForwardRandomness(model, step, key)
        self._handles: list[Any] = []
        self._part_handles: list[Any] = []
        if not self._off:
            self._handles = self._watch(model)
            self._watch_parts()

    @property
    def as_before(self) -> Callable[[], AbstractContextManager[None]]:
        """Returns a context in which the model has the plain attributes that it had before the forward pass."""
        return self._runner.as_before

    @as_before.setter
    def as_before(self, value: Callable[[], AbstractContextManager[None]]) -> None:
        self._runner.as_before = value

    def _watch(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def _watch_parts(self) -> None:
        """Watch calls of parts of the model, for loops that call these instead of the model."""
        for _, module in self._modules.values():
            if module is not self._model:
                self._part_handles += self._watch(module)

    def remove(self) -> None:
        """Remove all hooks. A second call does nothing."""
        self._handles += self._part_handles
        self._part_handles = []
        while self._handles:
            self._handles.pop().remove()
        self._calls, self._open = [], None
        self.randomness.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordsAlone:
        # A copy of the model has the hooks, too. They do not know its modules, and do nothing.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()

    # ---------------------------------------------------------------- when

    def _state(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Return the settings that change how gradients are computed, and that may change during training."""
        modes = tuple(module.training for _, module in self._modules.values())
        return modes, tuple(p.requires_grad for p in self._parameters)

    def _is_due(self, arguments: Any, rows: int) -> bool:
        if rows == 0 or self._verified != self._state():
            return True
        if rows in self._checked:
            return False
        alone = max(self._checked, default=0) <= 1  # a coupling of records shows only with several records
        return alone or rows in self._runner.sizes or any(rows in t.shape[1:] for t in inputs_in(arguments))

    # ---------------------------------------------------------------- in the forward pass

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open is not None:
            self._depth += self._open[0] == id(module)
            return
        known = self._modules.get(id(module))
        if known is None or not torch.is_grad_enabled() or not module.training or _is_traced():
            return
        self._whole_calls += module is self._model
        self._open, self._depth = (id(module), None), 1  # calls inside of this one are not watched
        arguments = (args, kwargs)
        rows = count_rows(arguments, self._dim)
        self._own_lengths.see(module, arguments, rows, module is self._model)
        if self._is_due(arguments, rows) and any(p.requires_grad for p in module.parameters()):
            self._open = (id(module), self._noted(known[0], module, arguments, rows))
            self.randomness.expect()
        if module is not self._model:
            self.randomness.begin(module, arguments)

    def _noted(self, path: str, module: nn.Module, arguments: Any, rows: int) -> Call:
        args, kwargs = arguments
        users = rows
        if self._users is not None:
            try:
                users = self._users.count(rows)
            except ValueError:
                rows = 0  # not a batch of the loader, so it is unknown whose rows they are
        each = rows // max(users, 1)
        call = Call(path, module, arguments, rows, users, [])
        if rows:
            mask = mask_in(module, args, kwargs, rows) if each == 1 and self._dim == 0 else None
            before = self._calls[0] if self._calls and not any(c.reached for c in self._calls) else None
            chosen = choose_records(arguments, users, self._dim, mask)
            if before is not None and before.rows == rows:  # gradients of both calls are added up
                chosen = [cut.first // cut.count for cut in before.cuts]
            for record in chosen:
                positions = None if mask is None else own_positions(mask, record)
                call.cuts.append(Cut(rows, record * each, each, self._dim, positions))
        if not call.cuts:
            call.why = "its inputs cannot be split into records"
        call.take_records()
        return call

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> Any:
        if self._open is None or self._open[0] != id(module):
            return None
        self._depth -= 1
        if self._depth:
            return None
        (_, call), self._open = self._open, None
        if module is not self._model:
            self.randomness.end()
        if call is None:
            return None
        floats = {path: t for path, t in floats_in(output) if t.requires_grad}
        if not floats:
            return None
        call.outputs = {path: t.detach() for path, t in floats.items()}
        call.coarse = is_coarse(module, floats.values()) or less_was_asked()
        call.masks = self.randomness.last
        call.autocast = _autocast_now(next(iter(floats.values())).device.type)
        self._runner.run(call, batch_first=self._dim == 0)
        if any(c.reached for c in self._calls):
            self._calls = []  # a forward pass after a backward pass is of other records
        self._calls.append(call)
        return replace_floats(output, lambda path, tensor: self._outside(call, path, tensor, floats))

    def _outside(self, call: Call, path: tuple[Any, ...], tensor: Tensor, floats: Paths) -> Tensor:
        """Return a copy of an output that gets the gradient from outside of the model only."""
        if path not in floats:
            return tensor
        stand_in = tensor.clone() if tensor.numel() <= _COPIED else tensor.view_as(tensor)
        for name in vars(tensor):  # attributes that other code has set
            setattr(stand_in, name, getattr(tensor, name))

        def arrive(gradient: Tensor) -> None:
            before = call.gradients.get(path)
            call.gradients[path] = gradient.detach() if before is None else before + gradient.detach()

        stand_in.register_hook(arrive)
        return stand_in

    # ---------------------------------------------------------------- after the backward pass

    def check(self, source: GradientSource) -> None:
        """Compare records of the finished physical batch with the same records alone, if a comparison is due.

        Args:
            source: has the gradients of the batch, not yet summed.

        Raises:
            ValueError: If the gradients of a record differ. The message names the first layer that does not see the
                records.
        """
        self.randomness.next_batch()
        self._own_lengths.check()
        calls, self._calls = [c for c in self._calls if c.reached], []
        whole, self._whole_calls = self._whole_calls, 0
        self._open = None
        if not whole and not self._off and not self._part_handles:  # from now on the loop calls parts of the model
            self._verified = None
            self._watch_parts()
        why = self._obstacle(calls, source)
        if why is not None:
            self._could_not(why)
        if why is not None or not calls:
            return
        with self._pause():
            told = [self._comparison(calls, place, source).told() for place in range(len(calls[0].cuts))]
        self.compared += sum(told)
        if not any(told):
            self._could_not("the gradients of the records are zero or not finite")
            return
        self._checked.add(calls[0].rows)
        self._verified, self._attempts = self._state(), 0
        if all(c.module is self._model for c in calls):
            while self._part_handles:
                self._part_handles.pop().remove()

    def _comparison(self, calls: list[Call], place: int, source: GradientSource) -> Comparison:
        return Comparison(
            calls, place, source, self._parameters, self._names, self._mean, self._runner, self._own_lengths
        )

    def _obstacle(self, calls: list[Call], source: GradientSource) -> str | None:
        """Return why the records cannot be compared; None if they can, or need not be."""
        if not calls:
            unseen = self._verified is None and not self._off
            return "no gradient came through what the model, or a part of it, returned" if unseen else None
        if any(c.users != source.records for c in calls) or len({c.rows for c in calls}) > 1:
            return calls[0].why or "its inputs do not have as many rows as the batch has records"
        return next((c.why for c in calls if c.why), None)

    def _could_not(self, why: str) -> None:
        self._attempts += 1
        if self._attempts != _PATIENCE:
            return
        warnings.warn(
            f"it cannot be checked that a record's gradient is what it gets alone: {why}. Pass tensors with the "
            "records in their first dimension to the model, and check with opacus_ac.testing.check_records_independent",
            stacklevel=4,
        )


def _is_traced() -> bool:
    """Say whether this is a recomputation, or runs under torch.func, which splits the batch itself."""
    return torch._C._current_graph_task_id() != -1 or torch._C._functorch.peek_interpreter_stack() is not None


def _autocast_now(device: str) -> Any:
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _inert() -> Any:
    """Return the object that replaces a hook in a pickled model; see ``RecordsAlone.__reduce__``."""
    return _Inert()


class _Inert:
    def _enter(self, *_: Any) -> None: ...

    def _leave(self, *_: Any) -> None: ...
