"""Position embeddings that are looked up once for the whole batch.

GPT-2 and BERT look up positions once, with ids ``[1, T]``, and broadcast the result when they add it to the word
embeddings. The gradient at that lookup is already summed over the batch, so a rule would take the batch for one record.
Expanding the ids to ``[B, T]`` changes no value and keeps the records apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_ac.grad_sample.folded_rows import FoldedRows


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors with at least one dimension, in the order of the arguments."""
    if isinstance(value, Tensor):
        return [value] if value.dim() else []
    if isinstance(value, Mapping):
        value = tuple(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = tuple(vars(value).values())
    if isinstance(value, tuple | list):
        return [t for item in value for t in tensors_in(item)]
    return []


class BroadcastHandle:
    """Holds the hooks of :func:`expand_broadcast_embeddings`. It is also a context manager that removes them."""

    def __init__(self, model: nn.Module, folded: FoldedRows | None = None) -> None:
        self._folded = folded or FoldedRows()
        self._lengths: set[int] = set()
        self._running: list[torch.Size] = []
        self._last: torch.Size | None = None
        self._positional: dict[int, bool] = {}
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        self._known = {id(m) for m in embeddings}
        self._hooks: list[RemovableHandle] = [
            # First in, last out: the batch is noted and forgotten even if another hook of the model raises.
            model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),
            *(m.register_forward_pre_hook(self._expand) for m in embeddings),
        ]

    def remove(self) -> None:
        """Remove all hooks. A second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        self._running.clear()
        self._last = None

    def __enter__(self) -> BroadcastHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = tensors_in((args, kwargs))
        self._running.append(tensors[0].shape if tensors else torch.Size([]))
        self._lengths = {size for tensor in tensors for size in tensor.shape[1:]}

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._running:
            self._last = self._running.pop()

    def _batch(self) -> torch.Size | None:
        if self._running:
            return self._running[-1]
        # A backward pass is running and no forward pass, so this call recomputes a checkpointed block.
        return self._last if torch._C._current_graph_task_id() != -1 else None

    def _expand(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        shape = self._batch()
        # Opacus's functorch path runs copies of a module on single records, and copies have its hooks.
        if not shape or id(module) not in self._known or not module.training or not torch.is_grad_enabled():
            return None
        if not args or not isinstance(args[0], Tensor) or not any(p.requires_grad for p in module.parameters()):
            return None
        shape = self._folded.batch(module, shape)
        ids, batch = args[0], shape[0]
        if ids.dim() == 1 and self._is_positions(module, ids, shape):
            ids = ids.unsqueeze(0)
        if ids.dim() < 2 or ids.shape[0] != 1 or batch == 1:
            return None if ids is args[0] else (ids, *args[1:])
        return (ids.expand(batch, *ids.shape[1:]).contiguous(), *args[1:])

    def _is_positions(self, module: nn.Module, ids: Tensor, shape: torch.Size) -> bool:
        """Say whether one-dimensional ids are positions, which all records share. Otherwise each record has one id."""
        if ids.shape[0] != shape[0] and ids.shape[0] not in self._lengths.union(shape[1:]):
            return False  # the same rows for every batch, such as a codebook
        if ids.shape[0] != shape[0]:
            self._positional[id(module)] = True
        elif ids.shape[0] not in shape[1:]:
            self._positional[id(module)] = False
        elif id(module) not in self._positional:
            if ids.shape[0] == 1 or not bool((ids.diff() == 1).all()):
                return False
            raise ValueError(
                f"{type(module).__name__}: the batch size equals the sequence length ({ids.shape[0]}), so ids of one "
                "dimension may be positions or records: pass ids of shape [B, T]"
            )
        return self._positional[id(module)]


def expand_broadcast_embeddings(model: nn.Module, folded: FoldedRows | None = None) -> BroadcastHandle:
    """Make embeddings that a model looks up once per batch look up once per record.

    A hook on ``model`` notes the batch size B, which is the first dimension of its first tensor argument. Hooks on
    trainable embeddings expand ids ``[1, ...]`` to ``[B, ...]`` and positions ``[T]`` to ``[B, T]``. They do so only in
    training mode with gradients enabled. Ids whose first dimension is neither 1 nor B stay as they are.

    Args:
        model: the model that is called; for a wrapped model, the inner one.
        folded: parts of the model that run each record as several rows.

    Returns:
        A handle with ``remove()``.

    Guarantees:
        For ids ``[1, ...]``, values are unchanged, and the leading 1 of the output becomes B. For positions ``[T]``,
        the output ``[T, D]`` becomes ``[B, T, D]``, which gives the same sum with another ``[B, T, D]``. The batch size
        is forgotten when the forward pass ends, even by an exception. Nested calls each have their own batch size.

    Raises:
        ValueError: In the forward pass, if consecutive one-dimensional ids are as many as both the records and the
            positions of the batch, and no earlier batch has shown which of them they count.
    """
    return BroadcastHandle(model, folded)
