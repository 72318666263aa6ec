"""Runs records of a batch alone through the model, and leaves the model unchanged."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from opacus_ac.grad_sample.alone.call import Call, Run
from opacus_ac.grad_sample.alone.isolated import isolated_twin, shapes_of, without_checkpoints
from opacus_ac.grad_sample.alone.own_length import OwnLengths
from opacus_ac.grad_sample.alone.positions import take_call
from opacus_ac.grad_sample.alone.single import Cut, Paths, floats_in
from opacus_ac.grad_sample.module_replay import map_tensors, to_double
from opacus_ac.noise.secret_state import replace_torch_state

_JOINT_MASKS = (
    "it draws at random (dropout) in a checkpointed part, or in a kernel of its own, for all records together"
)


class Users(Protocol):
    """Counts the users of a batch."""

    def count(self, rows: int) -> int:
        """Return the number of users with ``rows`` rows in total."""

    def suppose(self, rows_per_user: int) -> AbstractContextManager[None]:
        """Return a context in which each user counts as having so many rows."""


class Tape(Protocol):
    """Keeps the losses of records as they are computed."""

    def paused(self) -> AbstractContextManager[None]:
        """Return a context in which no losses are kept."""


class Runner:
    """Runs records alone on a twin of the called module. The twin shares the parameters and nothing else.

    Args:
        tape: keeps losses of records. It is paused while records run alone.
        users: counts the users of a batch, if a record is a user with several rows.
        pause: returns a context in which the source of per-sample gradients keeps nothing.
        own_lengths: remembers the lengths that a model requires.

    Attributes:
        as_before: returns a context in which the model has the plain attributes from before the forward pass.
        sizes: dimensions of inputs and outputs of layers.
    """

    def __init__(
        self,
        tape: Tape,
        users: Users | None,
        pause: Callable[[], AbstractContextManager[None]],
        own_lengths: OwnLengths,
    ) -> None:
        self._tape, self._users, self._pause, self._own_lengths = tape, users, pause, own_lengths
        self.as_before: Callable[[], AbstractContextManager[None]] = nullcontext
        self.sizes: set[int] = set()

    def run(self, call: Call, batch_first: bool) -> None:
        """Run the chosen records of a call, right after the batch.

        Afterwards the call has the outputs in ``runs``, or no runs and the reason why.
        """
        if call.masks is not None and call.masks.used:
            if call.masks.joint or not batch_first:
                call.give_up(_JOINT_MASKS)
            else:
                call.keep_padding()  # the masks are drawn for the padded length
        try:
            outputs = self._outputs(call)
        except (RuntimeError, ValueError, TypeError, IndexError):
            if not call.is_trimmed:
                raise
            # The model accepts one length only, so all batches must have this length.
            self._own_lengths.hold(call.runs)
            call.keep_padding()
            outputs = self._outputs(call)
        call.runs = [Run(cut, found) for cut, found in zip(call.cuts, outputs, strict=True)]
        call.inputs, call.padded_inputs = [], []

    def _outputs(self, call: Call) -> list[Paths]:
        return [self._outputs_of(call, cut, given) for cut, given in zip(call.cuts, call.inputs, strict=True)]

    def _outputs_of(self, call: Call, cut: Cut, arguments: Any) -> Paths:
        with self.as_before():
            twin = isolated_twin(call.module)
        seen = shapes_of(twin)
        with self.undisturbed(cut.count), _masks_of(call, cut), torch.enable_grad():
            torch.clear_autocast_cache()
            try:
                output = twin(*arguments[0], **arguments[1])
            finally:
                torch.clear_autocast_cache()
        self.sizes |= seen
        return _trained(output)

    def run_again(self, call: Call, cut: Cut, wide: bool) -> tuple[nn.Module, Paths] | None:
        """Run a record of a call again, later.

        Args:
            call: the call.
            cut: the rows of the record.
            wide: run it in float64.

        Returns:
            The module that was run and its outputs. With ``wide`` its parameters are copies. None if it cannot run in
            float64.
        """
        with self.as_before():
            twin = isolated_twin(call.module)
        args, kwargs = take_call(cut, call.arguments)
        if wide:
            map_tensors(twin, to_double)
            args, kwargs = tree_map(_widened, (args, kwargs))
        device = next(iter(call.outputs.values())).device.type
        autocast = nullcontext() if wide or call.autocast is None else torch.autocast(device, dtype=call.autocast)
        with self.undisturbed(cut.count), _masks_of(call, cut), autocast, torch.enable_grad():
            try:
                output = twin(*args, **kwargs)
            except RuntimeError:  # a part of the module works in one type only
                return None
        return twin, _trained(output)

    def undisturbed(self, rows: int) -> ExitStack:
        """Return a context in which a run changes neither random states nor the tape of losses."""
        stack = ExitStack()
        stack.callback(replace_torch_state())
        stack.enter_context(self._pause())
        stack.enter_context(self._tape.paused())
        stack.enter_context(without_checkpoints())
        if self._users is not None:
            stack.enter_context(self._users.suppose(rows))
        return stack


def _masks_of(call: Call, cut: Cut) -> AbstractContextManager[Any]:
    """Return a context in which a record gets the dropout masks that it had in the batch."""
    return nullcontext() if call.masks is None else call.masks.of(cut.first, cut.count)


def _trained(output: Any) -> Paths:
    return {path: tensor for path, tensor in floats_in(output) if tensor.requires_grad}


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
