"""Embeddings with a forward of their own: ids that they compute, and what they do to the rows that they look up.

The forward is run a second time, and each lookup in the table is noted. The gradient at the rows of a lookup follows
from the gradient at the output by autograd, through what the forward does to the rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from opacus_ac.grad_sample.module_replay import bare_twin, written_type
from opacus_ac.grad_sample.one_backward.outer_products import Term
from opacus_ac.grad_sample.one_backward.replay import check_again
from opacus_ac.grad_sample.one_backward.states import StatesOfTwin
from opacus_ac.grad_sample.one_backward.use import Use
from opacus_ac.grad_sample.rules.embedding import ids_by_record, table_terms

_SIGNATURE = inspect.signature(F.embedding)


@dataclass
class _Found:
    """One lookup in the table of a module.

    Attributes:
        ids: ``[...]`` integers.
        rows: what the lookup returned, ``[..., D]``, without a graph behind it.
        padding_idx: the row that gets no gradient, or None.
    """

    ids: Tensor
    rows: Tensor
    padding_idx: int | None


class _NoteLookups(TorchFunctionMode):
    """Notes every lookup in a table that runs under it, and cuts its rows off from the table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.found: list[_Found] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.embedding:
            given = _SIGNATURE.bind(*args, **kwargs).arguments
            plain = given.get("max_norm") is None and not given.get("scale_grad_by_freq")
            if given["weight"] is self.table and plain:
                return self._note(given["input"], output, given.get("padding_idx"))
        elif func is Tensor.__getitem__ and args[0] is self.table:
            ids = torch.arange(len(self.table), device=self.table.device)[args[1]]
            if output.shape == (*ids.shape, *self.table.shape[1:]):
                return self._note(ids, output, None)
        return output

    def _note(self, ids: Tensor, output: Tensor, padding_idx: int | None) -> Tensor:
        if not torch.is_grad_enabled():  # of such a lookup the table gets no gradient
            return output
        rows = output.detach().requires_grad_()
        self.found.append(_Found(ids, rows, padding_idx))
        return rows


def replayed_lookup(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> list[tuple[nn.Parameter, Term]]:
    """Return the terms of an embedding with a forward of its own, from a second run.

    OPT's positions compute their ids, and the embedding of Inkling normalises the rows that it looks up.

    Args:
        use: the call.
        tensors: its arguments and its output in the first run, ``[B, ..., D]``.
        backprops: gradient at the output.

    Raises:
        ValueError: If the table is used otherwise than by lookups, if the second run returns something else, or if a
            record's output is not known to come from the record's rows.
    """
    module, output = use.module, tensors[-1]
    assert isinstance(module, nn.Embedding)
    weight = module._parameters["weight"]
    if weight is None or not weight.requires_grad:
        return []
    if use.gradients is not None and len(use.gradients) > 1:
        raise _refusal(use, f"its forward returns {len(use.gradients)} tensors that gradients come back to")
    twin = bare_twin(module)
    args, kwargs = use.call.arguments(StatesOfTwin(twin, use.states).restore(tensors[:-1]))
    with torch.enable_grad(), use.autocast, _NoteLookups(twin.weight) as notes:
        returned = tree_leaves(written_type(module).forward(twin, *args, **kwargs))
    # ProphetNet's positions return their ids beside the rows.
    again = next(value for value in returned if isinstance(value, Tensor) and value.is_floating_point())
    if not notes.found:
        raise _refusal(use, "its forward does not look up rows of its weight")
    if len(notes.found) == 1 and again is notes.found[0].rows and again.shape == output.shape:
        check_again(use.late, again.detach(), output, _is_random(use))
        gradients = [backprops]
    else:
        gradients = _through_the_forward(use, twin, again, output, notes.found, backprops)
    terms = []
    for found, gradient in zip(notes.found, gradients, strict=True):
        terms += table_terms(weight, ids_by_record(found.ids, gradient), gradient, found.padding_idx)
    return terms


def _through_the_forward(
    use: Use, twin: nn.Embedding, again: Tensor, output: Tensor, found: list[_Found], backprops: Tensor
) -> list[Tensor]:
    """Return the gradient at the rows of each lookup, ``[B, ..., D]``."""
    copies = backprops.numel() // max(again.numel(), 1)  # of a lookup that was for all records at once
    want = output if output.numel() == again.numel() else output[0]
    if want.numel() != again.numel():
        raise _is_random(use)()
    check_again(use.late, again.detach(), want.reshape(again.shape), _is_random(use))
    if any(one.rows.shape[:-1] != again.shape[:-1] for one in found):
        raise _refusal(use, "its output does not have a place for each row that is looked up")
    wanted = (twin.weight, *(one.rows for one in found))
    several = copies > 1
    back = backprops.to(again.dtype).reshape(*([copies] if several else []), *again.shape)
    at_weight, *gradients = torch.autograd.grad(again, wanted, back, is_grads_batched=several, allow_unused=True)
    if at_weight is not None:
        raise _refusal(use, "its forward uses its weight otherwise than by lookups")
    shapes = [(copies, *one.rows.shape) if several else one.rows.shape for one in found]
    return [
        torch.zeros(shape, dtype=one.rows.dtype, device=one.rows.device) if g is None else g.reshape(shape)
        for one, g, shape in zip(found, gradients, shapes, strict=True)
    ]


def _is_random(use: Use) -> Callable[[], ValueError]:
    error = _refusal(use, "run again it does not return what it returned in the forward pass: it is random")
    return lambda: error


def _refusal(use: Use, reason: str) -> ValueError:
    name = type(use.module).__name__
    return ValueError(
        f"{use.path or 'the model'} ({name}) is an embedding that no rule fits: {reason}. Write a rule for it and pass "
        f"it to register_rule({name}, rule), or freeze it with requires_grad_(False)"
    )
