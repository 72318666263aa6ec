"""A record is alone: what the records of a batch are given is what each gets when it is run by itself.

Rules for the gradients of single records take the first dimension of what a layer is given for the records, in their order, and a
layer's output for one record to depend on that record. A model that sorts its batch, that mixes it, that feeds a layer constants, or
whose layer is called in a way that its rule was not written for, breaks that silently. So on the first batch, and again when anything
changed, a few records go through the model by themselves, and their gradients are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from opacus_ac.grad_sample.alone.isolated import is_coarse, is_sharded, isolated_twin, shapes_of, without_checkpoints
from opacus_ac.grad_sample.alone.own_length import KeepsLength, OwnLengths
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
from opacus_ac.grad_sample.alone.trace import explain_difference, sees_the_record
from opacus_ac.grad_sample.module_replay import map_tensors, to_double
from opacus_ac.grad_sample.precision import less_was_asked
from opacus_ac.grad_sample.source import GradientSource
from opacus_ac.noise.forward_randomness import ForwardRandomness, RecordMasks
from opacus_ac.noise.secret_state import replace_torch_state

_TOLERANCE = (1e-3, 1e-2)
"""Largest difference of a parameter's gradients over its norm, and the smallest such norm over that of all parameters.

Clean models in float32 stay below 1e-5, faults begin at 0.08; where a gradient is zero in exact arithmetic (key biases of attention,
biases before norms), what is compared is rounding, which is small beside the whole gradient.
"""
_COARSE = (6e-2, 0.1)
"""The same under bfloat16 autocast. Rounding alone may exceed it, as with a frozen base in bfloat16 of many layers."""
_OWN_ROUNDING = 3.0
"""How much farther from float64 than the record run alone the batch's gradient may be, where both are rounded to bfloat16."""
_MOST_ROUNDING = 0.15
"""Difference from float64 over the norm beyond which nothing passes for rounding."""

_COPIED = 1 << 24
"""Elements of an output up to which it is copied, so that what the loop does to it in place does not matter."""

_PATIENCE = 3
"""Batches that may pass without a comparison that tells anything, before it is said that there was none."""


class Users(Protocol):
    """Knows which rows of a batch are of one user."""

    def count(self, rows: int) -> int:
        """Return the number of users of ``rows`` rows."""

    def suppose(self, rows_per_user: int) -> AbstractContextManager[None]:
        """Return a context in which batches have users of so many rows each."""


class Tape(Protocol):
    """Takes down the losses of records as they are computed."""

    def paused(self) -> AbstractContextManager[None]:
        """Return a context in which nothing is taken down."""


@dataclass
class Run:
    """One record that went through the model alone."""

    cut: Cut
    outputs: Paths


@dataclass
class Call:
    """One call of the model, or of a part of it, in a training forward pass."""

    path: str
    module: nn.Module
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    rows: int
    users: int
    cuts: list[Cut]
    runs: list[Run] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    gradients: Paths = field(default_factory=dict)
    outputs: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    masks: RecordMasks | None = None
    coarse: bool = False
    why: str = ""
    autocast: Any = None

    @property
    def reached(self) -> bool:
        """Whether a gradient arrived from outside."""
        return bool(self.gradients)


class RecordsAlone:
    """Compares gradients of single records with those of the batch, and keeps what is random in them apart.

    Args:
        model: the model that is trained; every part of it may be called.
        parameters: the trained parameters.
        names: their names.
        step: tells the number of the logical step in hand.
        tape: where losses of records are noted; those of single runs are not.
        mean: whether the loss is a mean over records.
        batch_first: whether the records come first in the inputs.
        users: counts the users of a batch, where a record is a user of several rows.
        pause: a context in which what takes gradients of records apart looks away.
        keeps_length: whether what goes into the model comes from a loader that gives every record one length, padding included.

    Attributes:
        compared: number of records that were compared so far, with gradients that tell.
        as_before: a context in which the model has the plain attributes that it had before the forward pass.

    Guarantees:
        On the first physical batch with a gradient, and again after training flags or the trained set changed, or when a batch has
        as many records as some layer has features, positions or constants, up to three records are compared, without the padding
        that other records may bring. The model, its buffers, the tape and the random states are what they were.
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
    ) -> None:
        self._own_lengths = OwnLengths(keeps_length)
        self._pause, self._model = pause, model
        self.as_before: Callable[[], AbstractContextManager[None]] = nullcontext
        self._parameters, self._names = list(parameters), list(names)
        self._tape, self._mean, self._dim, self._users = tape, mean, 0 if batch_first else 1, users
        self._modules = {id(m): (name, m) for name, m in model.named_modules()}
        self._off = is_sharded(self._parameters)
        self._verified: object = None
        self._sizes: set[int] = set()
        self._checked: set[int] = set()
        self._attempts = 0
        self.compared = 0
        self._calls: list[Call] = []
        self._open: tuple[int, Call | None] | None = None
        self._depth = 0
        self._whole_calls = 0
        self.randomness = ForwardRandomness(model, step)
        self._handles: list[Any] = []
        self._part_handles: list[Any] = []
        if not self._off:
            self._handles = self._watch(model)
            self._watch_parts()

    def _watch(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def _watch_parts(self) -> None:
        """Watch calls of parts of the model, which matter where the loop calls these and not the model."""
        for _, module in self._modules.values():
            if module is not self._model:
                self._part_handles += self._watch(module)

    def remove(self) -> None:
        """Take all hooks off; doing so twice is harmless."""
        self._handles += self._part_handles
        self._part_handles = []
        while self._handles:
            self._handles.pop().remove()
        self._calls, self._open = [], None
        self.randomness.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordsAlone:
        # A copy of the model carries the hooks, which do not know its modules and leave them alone.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()

    # ---------------------------------------------------------------- when

    def _state(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Return what decides how gradients are computed, and may change while training."""
        modes = tuple(module.training for _, module in self._modules.values())
        return modes, tuple(p.requires_grad for p in self._parameters)

    def _is_due(self, arguments: Any, rows: int) -> bool:
        if rows == 0 or self._verified != self._state():
            return True
        if rows in self._checked:
            return False
        alone = max(self._checked, default=0) <= 1  # what couples records shows where there are several
        return alone or rows in self._sizes or any(rows in t.shape[1:] for t in inputs_in(arguments))

    # ---------------------------------------------------------------- in the forward pass

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open is not None:
            self._depth += self._open[0] == id(module)
            return
        known = self._modules.get(id(module))
        if known is None or not torch.is_grad_enabled() or not module.training or _is_traced():
            return
        self._whole_calls += module is self._model
        self._open, self._depth = (id(module), None), 1  # what is called inside is not looked at
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
                rows = 0  # not a batch of the loader: nothing tells whose the rows are
        each = rows // max(users, 1)
        call = Call(path, module, arguments, rows, users, [])
        if rows:
            mask = mask_in(module, args, kwargs, rows) if each == 1 and self._dim == 0 else None
            before = self._calls[0] if self._calls and not any(c.reached for c in self._calls) else None
            chosen = choose_records(arguments, users, self._dim, mask)
            if before is not None and before.rows == rows:  # their gradients will be added up
                chosen = [cut.first // cut.count for cut in before.cuts]
            for record in chosen:
                positions = None if mask is None else own_positions(mask, record)
                call.cuts.append(Cut(rows, record * each, each, self._dim, positions))
        if not call.cuts:
            call.why = "its inputs cannot be taken apart into records"
        # Copied now: the model may write to its inputs.
        call.runs = [Run(cut, {}) for cut in call.cuts]
        call.inputs = [cut.take(arguments) for cut in call.cuts]
        self._whole = [Cut(c.rows, c.first, c.count, c.dim).take(arguments) for c in call.cuts if c.positions]
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
        self._run_alone(call)
        if any(c.reached for c in self._calls):
            self._calls = []  # a forward pass after a backward pass: other records
        self._calls.append(call)
        return replace_floats(output, lambda path, tensor: self._outside(call, path, tensor, floats))

    def _outside(self, call: Call, path: tuple[Any, ...], tensor: Tensor, floats: Paths) -> Tensor:
        """Return a stand-in for an output, whose gradient is what comes from outside of the model alone."""
        if path not in floats:
            return tensor
        stand_in = tensor.clone() if tensor.numel() <= _COPIED else tensor.view_as(tensor)
        for name in vars(tensor):  # marks that others have left
            setattr(stand_in, name, getattr(tensor, name))

        def arrive(gradient: Tensor) -> None:
            before = call.gradients.get(path)
            call.gradients[path] = gradient.detach() if before is None else before + gradient.detach()

        stand_in.register_hook(arrive)
        return stand_in

    def _run_alone(self, call: Call) -> None:
        """Run the chosen records through the model as it is now, after the batch."""
        inputs, call.inputs = call.inputs, []
        if call.masks is not None and call.masks.used:
            if call.masks.joint or self._dim:
                call.cuts, call.runs = [], []
                call.why = "it draws at random (dropout) in a checkpointed part, or in a kernel of its own, for all records together"
                return
            # Padding belongs to what masks are made from.
            whole = iter(self._whole)
            inputs = [next(whole) if cut.positions else given for cut, given in zip(call.cuts, inputs, strict=True)]
            call.cuts = [Cut(c.rows, c.first, c.count, c.dim) for c in call.cuts]
        try:
            outputs = [self._outputs_of(call, cut, given) for cut, given in zip(call.cuts, inputs, strict=True)]
        except (RuntimeError, ValueError, TypeError, IndexError):
            if not any(cut.positions for cut in call.cuts):
                raise
            # A model that is made for one length: it is held to it.
            self._own_lengths.hold(call.runs)
            whole = iter(self._whole)
            inputs = [next(whole) if cut.positions else given for cut, given in zip(call.cuts, inputs, strict=True)]
            call.cuts = [Cut(c.rows, c.first, c.count, c.dim) for c in call.cuts]
            outputs = [self._outputs_of(call, cut, given) for cut, given in zip(call.cuts, inputs, strict=True)]
        call.runs = [Run(cut, found) for cut, found in zip(call.cuts, outputs, strict=True)]

    def _outputs_of(self, call: Call, cut: Cut, arguments: Any) -> Paths:
        with self.as_before():
            twin = isolated_twin(call.module)
        seen = shapes_of(twin)
        masks = nullcontext() if call.masks is None else call.masks.of(cut.first, cut.count)
        with self.undisturbed(cut.count), masks, torch.enable_grad():
            torch.clear_autocast_cache()
            try:
                output = twin(*arguments[0], **arguments[1])
            finally:
                torch.clear_autocast_cache()
        self._sizes |= seen
        return {path: tensor for path, tensor in floats_in(output) if tensor.requires_grad}

    def undisturbed(self, rows: int) -> ExitStack:
        """Return a context in which a run leaves no trace in random states and records of losses."""
        stack = ExitStack()
        stack.callback(replace_torch_state())
        stack.enter_context(self._pause())
        stack.enter_context(self._tape.paused())
        stack.enter_context(without_checkpoints())
        if self._users is not None:
            stack.enter_context(self._users.suppose(rows))
        return stack

    # ---------------------------------------------------------------- after the backward pass

    def check(self, source: GradientSource) -> None:
        """Compare the records of the physical batch that was finished with what they get alone, if that is due.

        Args:
            source: has the gradients of the batch, not yet summed.

        Raises:
            ValueError: a record's gradients in the batch are others; the first layer that does not see the records is named.
        """
        self.randomness.next_batch()
        self._own_lengths.check()
        calls, self._calls = [c for c in self._calls if c.reached], []
        whole, self._whole_calls = self._whole_calls, 0
        self._open = None
        if not whole and not self._off and not self._part_handles:  # the loop calls parts of the model from now on
            self._verified = None
            self._watch_parts()
        why = self._obstacle(calls, source)
        if why is not None:
            self._could_not(why)
        if why is not None or not calls:
            return
        with self._pause():
            told = [
                self._compare(calls, place, cut.first // cut.count, source) for place, cut in enumerate(calls[0].cuts)
            ]
        self.compared += sum(told)
        if not any(told):
            self._could_not("the gradients of the records are zero or not finite")
            return
        self._checked.add(calls[0].rows)
        self._verified, self._attempts = self._state(), 0
        if all(c.module is self._model for c in calls):
            while self._part_handles:
                self._part_handles.pop().remove()

    def _obstacle(self, calls: list[Call], source: GradientSource) -> str | None:
        """Return why the records cannot be compared; None where they can, or need not."""
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
            f"it cannot be checked that a record's gradient is what it gets alone: {why}. Pass tensors with the records in their "
            "first dimension to the model, and check with opacus_ac.testing.check_records_independent",
            stacklevel=4,
        )

    def _compare(self, calls: list[Call], place: int, record: int, source: GradientSource) -> bool:
        """Compare one record; whether that told anything."""
        total: Any = 0.0
        for call in calls:
            total = total + self._weighted(call, call.runs[place])
        trained = [p for p in self._parameters if p.requires_grad]
        alone: list[Tensor | None] = [None] * len(trained)
        if isinstance(total, Tensor) and total.requires_grad:
            alone = list(torch.autograd.grad(total, trained, allow_unused=True))
        got = {id(p): g for p, g in zip(trained, alone, strict=True)}
        coarse = any(c.coarse for c in calls)
        tolerance, floor = _COARSE if coarse else _TOLERANCE
        errors, norms, whole = [], [], [0.0, 0.0]
        for parameter, given in zip(self._parameters, source.record_gradients(record), strict=True):
            if not parameter.requires_grad:  # frozen since: it is left out of the release
                given = None
            own = got.get(id(parameter))
            mine, theirs = _norm(own), _norm(given)
            errors.append(_norm(_difference(own, given)))
            norms.append(max(mine, theirs))
            whole = [whole[0] + mine**2, whole[1] + theirs**2]
        size = max(whole) ** 0.5
        if not size < float("inf"):  # a record that is not finite is left out
            return False
        wrong = [
            name
            for name, error, norm in zip(self._names, errors, norms, strict=True)
            if not error <= tolerance * max(norm, floor * size)
        ]
        if wrong and not (
            self._agrees(calls, place, record, source, size, rounded=got if coarse else None)
            or self._agrees_padded(calls, place, record, source, size)
        ):
            raise ValueError(explain_difference(calls[0], place, wrong, tolerance, self))
        return size > 0

    def _agrees_padded(self, calls: list[Call], place: int, record: int, source: GradientSource, size: float) -> bool:
        """Whether a record has its gradient with its padding, which it has by itself, and no layer mixes it with others."""
        padded = [call for call in calls if call.runs[place].cut.positions is not None]
        if not padded or not all(self._own_lengths.accept(call) for call in padded):
            return False
        coarse = any(call.coarse for call in calls)
        try:
            return self._agrees(calls, place, record, source, size, padded=True, wide=not coarse) and all(
                sees_the_record(call, place, (_COARSE if coarse else _TOLERANCE)[0], self) for call in calls
            )
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
            return False  # it cannot be run again

    def _agrees(
        self,
        calls: list[Call],
        place: int,
        record: int,
        source: GradientSource,
        size: float,
        *,
        padded: bool = False,
        wide: bool = True,
        rounded: Mapping[int, Tensor | None] | None = None,
    ) -> bool:
        """Whether a record run once more, with its padding or in float64, has the gradients that the source gave.

        Args:
            calls: the calls of the model.
            place: which of the chosen records.
            record: its number in the batch.
            source: has the gradients of the batch.
            size: norm of the whole gradient.
            padded: run the record with its padding.
            wide: run it in float64, so that a difference was but the rounding of terms that cancel each other.
            rounded: what the record alone gave in bfloat16, by the ``id`` of the parameter. Its distance from float64 tells how
                much rounding there is.
        """
        total: Any = 0.0
        found: dict[str, nn.Parameter] = {}
        for call in calls:
            with self.as_before():
                twin = isolated_twin(call.module)
            if wide:
                map_tensors(twin, to_double)
            prefix = f"{call.path}." if call.path else ""
            found.update({prefix + name: p for name, p in twin.named_parameters(remove_duplicate=False)})
            cut = call.cuts[place]
            if padded:
                cut = Cut(cut.rows, cut.first, cut.count, cut.dim)
            args, kwargs = cut.take(call.arguments)
            if wide:
                args, kwargs = tree_map(_widened, (args, kwargs))
            device = next(iter(call.outputs.values())).device.type
            autocast = nullcontext() if wide or call.autocast is None else torch.autocast(device, dtype=call.autocast)
            masks = nullcontext() if call.masks is None else call.masks.of(cut.first, cut.count)
            with self.undisturbed(cut.count), masks, autocast, torch.enable_grad():
                try:
                    output = twin(*args, **kwargs)
                except RuntimeError:  # something in it is of one type
                    return False
            total = total + self._weighted(call, Run(cut, {p: t for p, t in floats_in(output) if t.requires_grad}))
        if not (isinstance(total, Tensor) and total.requires_grad):
            return False
        wanted = [found.get(name) for name in self._names]
        known = [p for p in wanted if p is not None and p.requires_grad]
        alone = {id(p): g for p, g in zip(known, torch.autograd.grad(total, known, allow_unused=True), strict=True)}
        tolerance, floor = _TOLERANCE if wide else _COARSE
        gradients = zip(self._parameters, wanted, source.record_gradients(record), strict=True)
        for parameter, own, given in gradients:
            exact = None if own is None else alone.get(id(own))
            norm = max(_norm(exact), floor * size)
            allowed = tolerance * norm
            if rounded is not None:
                own_rounding = _norm(_difference(exact, rounded.get(id(parameter))))
                allowed = min(_COARSE[0] / 2 * norm + _OWN_ROUNDING * own_rounding, _MOST_ROUNDING * norm)
            if not _norm(_difference(exact, given)) <= allowed:
                return False
        return True

    def _weighted(self, call: Call, run: Run) -> Any:
        """Return the sum of what a record alone returned times the gradient that came from outside for it."""
        total: Any = 0.0
        for path, gradient in call.gradients.items():
            own = run.outputs.get(path)
            if own is None:
                continue
            if own.dim() == 0 or own.numel() == 1 == gradient.numel():
                share = 1 / call.users if self._mean else 1.0
                total = total + (own * gradient.to(own.dtype)).sum() * share
                continue
            part = _part_of(gradient, run.cut, call.rows)
            if part is None or part.shape != own.shape:
                continue
            total = total + (own * part.to(own.dtype)).sum()
        return total


def _part_of(gradient: Tensor, cut: Cut, rows: int) -> Tensor | None:
    """Return a record's part of the gradient of an output ``[B, ...]`` or ``[B T, ...]``; None where it has none."""
    if gradient.dim() <= cut.dim or gradient.shape[cut.dim] % rows:
        return None
    if gradient.shape[cut.dim] == rows:
        return cut.of(gradient)
    each = gradient.shape[cut.dim] // rows
    part = gradient.narrow(cut.dim, cut.first * each, cut.count * each)
    if cut.positions is None or cut.positions[2] != each:
        return part
    return part.narrow(cut.dim, cut.positions[0], cut.positions[1] - cut.positions[0])


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _norm(value: Tensor | None) -> float:
    return 0.0 if value is None else float(torch.linalg.vector_norm(value.detach(), dtype=torch.float64))


def _difference(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one.detach() - other.detach()


def _is_traced() -> bool:
    """Whether what runs is a recomputation, or runs under torch.func, which takes the batch apart itself."""
    return torch._C._current_graph_task_id() != -1 or torch._C._functorch.peek_interpreter_stack() is not None


def _autocast_now(device: str) -> Any:
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _inert() -> Any:
    """What a hook becomes in a pickled model; see ``RecordsAlone.__reduce__``."""
    return _Inert()


class _Inert:
    def _enter(self, *_: Any) -> None: ...

    def _leave(self, *_: Any) -> None: ...
