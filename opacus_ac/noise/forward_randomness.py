"""Random masks of a forward pass: secret, and a record's own.

In an ordinary forward pass, dropout, stochastic depth and noise are drawn for the whole batch, from a generator whose
seed is public. If one record joins, every other record gets another mask: to whoever knows the seed, the released sum
moves by many times C. With this module, a forward pass in training mode draws from a secret state. What it draws for a
record depends on that record, the number of the step and a key that never leaves the process, and on nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.noise.record_masks import RecordMasks, tensors_in
from opacus_ac.noise.secret_state import Undo, replace_other_states, replace_torch_state, seed_states


class ForwardRandomness:
    """Hooks on a model by which its forward passes in training mode draw their random numbers in secret.

    Args:
        model: the model.
        step: tells the number of the logical step in hand.
        key: 1 to 64 bytes from which everything is drawn instead, so that a run can be repeated. Not private.

    Attributes:
        last: what drew in the last pass; None where nothing draws.

    Guarantees:
        During a forward pass in training mode the global generators of torch, numpy and Python have secret states.
        Afterwards, also after an exception, they have their earlier states again, so that neither a known seed nor a
        saved state tells anything about masks or batches. Draws whose first dimension is the records are, for each
        record, a function of its content, of the numbers of step, pass and call, and of a key of the process: removing
        a record changes nothing for the others. All other draws are made for the batch together, from the secret state
        (see :class:`RecordMasks`).
    """

    def __init__(self, model: nn.Module, step: Callable[[], int], key: bytes | None = None) -> None:
        self._model_id, self._step, self._key = id(model), step, key
        self._passes = 0
        self._depth = 0
        self._idle: set[int] = set()  # modules whose last pass drew nothing
        self._running = 0
        self._mode: RecordMasks | None = None
        self.last: RecordMasks | None = None
        self._undo: list[Undo] = []
        self._fresh: Tensor | None = None
        self._handles = [
            model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off; doing so twice is harmless."""
        while self._handles:
            self._handles.pop().remove()
        self._close()

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardRandomness:
        # A copy of the model carries the hooks, which do not know it and leave it alone.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()

    def expect(self) -> None:
        """Note what the next pass draws, so that a record can be run again by itself."""
        self._idle.clear()

    def next_batch(self) -> None:
        """Count passes anew: how many came before tells how many physical batches a step had."""
        if self._depth:
            self._close()  # an interrupt went past the hook that ends a pass
        self._passes = 0

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if id(module) == self._model_id and module.training and torch._C._current_graph_task_id() == -1:
            self.begin(module, (args, kwargs))

    def begin(self, module: nn.Module, arguments: Any) -> None:
        """Start a pass of the model, or of a part that the loop calls by itself; one within another is part of that."""
        self._depth += 1
        if self._depth > 1:
            return
        self._undo = [replace_torch_state(), replace_other_states()]
        self._running, moment = id(module), (self._step(), self._passes)
        if self._key is not None:
            seed_states(hashlib.blake2b(repr(moment).encode(), key=self._key, digest_size=4).digest())
        if self._running not in self._idle:
            self._mode = RecordMasks(list(tensors_in(arguments)), moment, key=self._key)
            self._mode.__enter__()
        else:
            self._fresh = torch.get_rng_state()
        self._passes += 1

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if id(module) == self._model_id and torch._C._current_graph_task_id() == -1:
            self.end()

    def end(self) -> None:
        """End a pass that was begun; without one nothing happens."""
        if not self._depth:
            return
        self._depth -= 1
        if not self._depth:
            self._close()

    def _close(self) -> None:
        self._depth = 0
        self.last = self._mode
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            if not self._mode.used:
                self._idle.add(self._running)
            self._mode = None
        elif self._fresh is not None and not torch.equal(self._fresh, torch.get_rng_state()):
            self._idle.discard(self._running)
        self._fresh = None
        while self._undo:
            self._undo.pop()()


def _inert() -> Any:
    """What a hook becomes in a pickled model; see ``ForwardRandomness.__reduce__``."""
    return _Inert()


class _Inert:
    def _enter(self, *_: Any) -> None: ...

    def _leave(self, *_: Any) -> None: ...
