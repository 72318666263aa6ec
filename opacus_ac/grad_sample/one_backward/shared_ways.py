"""The ways in which a call may use a value that all records share.

Each way runs the call with copies of the value in its place. Whether it is the right one is decided elsewhere: it must
give what the call gives on the one value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from opacus_ac.grad_sample.one_backward.shared import Shared, SharedCall

Function = Callable[..., Any]
Way = Callable[["SharedCall"], Any]
Batched = Callable[..., Function]


def on_the_value(call: SharedCall) -> Any:
    """Run the call on the one value."""
    return call.run(leaf.value if i in call.shared else leaf for i, leaf in enumerate(call.leaves))


def aligned(call: SharedCall, dim: int) -> Any:
    """Give copy i the place of record i, by broadcasting."""

    def placed(leaf: Shared) -> Tensor:
        rows, missing = _for_each_row(call, leaf), dim - leaf.rows.dim() + 1
        if missing == 0:
            return rows.squeeze(1) if rows.shape[1] == 1 else _fail("the value has its own first dimension")
        return rows.reshape(rows.shape[0], *[1] * (missing - 1), *rows.shape[1:])

    return call.run(placed(leaf) if i in call.shared else leaf for i, leaf in enumerate(call.leaves))


def _for_each_row(call: SharedCall, leaf: Shared) -> Tensor:
    """Return the copies of the records, or in windows, those of their rows ``[B K, *shape]``."""
    return leaf.rows if call.each == 1 else leaf.rows.repeat_interleave(call.each, 0)


def _fail(reason: str) -> NoReturn:
    raise ValueError(reason)


def with_records(call: SharedCall) -> Any:
    """Run the call on each record, as a batch of one (in windows, of K rows), with its copy."""
    return _run_with_records(call, torch.vmap)


def with_records_by_loop(call: SharedCall) -> Any:
    """Do the same for functions that vmap does not run as they are, such as a linear layer under autocast."""
    return _run_with_records(call, _looped)


def with_own_rows(call: SharedCall) -> Any:
    """Run the call on each record with its own row of a value that has a row for each of them."""
    dim = max(tensor.dim() for tensor in call.others.values())
    own = {i for i in call.shared if call.leaves[i].rows.shape[1:2] == (call.size,) and call.leaves[i].rows.dim() > dim}
    if not own:
        _fail("no value has a row for each record")
    return _run_with_records(call, torch.vmap, own)


def on_copies(call: SharedCall) -> Any:
    """Do to each copy what is done to the value."""
    return _run_on_copies(call, torch.vmap)


def on_copies_by_loop(call: SharedCall) -> Any:
    """Do the same for functions that vmap does not run as they are."""
    return _run_on_copies(call, _looped)


def _run_with_records(call: SharedCall, batched: Batched, own: Collection[int] = ()) -> Any:
    """Run the call on each record; copy i of the values at ``own`` places counts with its row i only."""

    def splits(i: int, leaf: Any) -> bool:
        return i in call.others and leaf.shape[0] == call.rows

    def joined(result: Tensor) -> Tensor:
        return result.squeeze(1) if call.each == 1 else result.flatten(0, 1)

    places = [i for i, leaf in enumerate(call.leaves) if i in call.shared or splits(i, leaf)]
    parts = (call.size, call.each)
    copies = {i: call.leaves[i].rows if i in call.shared else call.leaves[i].unflatten(0, parts) for i in places}
    copies |= {i: copies[i].diagonal().movedim(-1, 0).unsqueeze(1) for i in own}
    return _run_batched(call, batched, places, list(copies.values()), joined)


def _run_on_copies(call: SharedCall, batched: Batched) -> Any:
    places = sorted(call.shared)
    values = [call.leaves[i].rows for i in places]
    return _run_batched(call, batched, places, values, call.keep)


def _looped(single: Function, randomness: str) -> Function:
    """Return what ``torch.vmap`` returns, without its rules: a loop over the first dimension."""

    def run(*values: Tensor) -> list[Tensor]:
        results = [single(*parts) for parts in zip(*(v.unbind(0) for v in values), strict=True)]
        return [torch.stack(parts) for parts in zip(*results, strict=True)]

    return run


def _run_batched(
    call: SharedCall, batched: Batched, places: list[int], values: list[Tensor], wrap: Callable[[Tensor], Tensor]
) -> Any:
    """Run the call on single copies, and return its output with each tensor wrapped."""
    seen: list[TreeSpec] = []

    def single(*parts: Tensor) -> list[Tensor]:
        leaves = list(call.leaves)
        for place, part in zip(places, parts, strict=True):
            leaves[place] = part
        outputs, spec = tree_flatten(call.run(leaves))
        seen.append(spec)
        if not all(isinstance(o, Tensor) and o.is_floating_point() for o in outputs):
            raise ValueError(f"{call.name} returns other things than floating-point tensors")
        return outputs

    results = batched(single, randomness="same")(*values)
    return tree_unflatten([wrap(result) for result in results], seen[0])


def repeated(call: SharedCall) -> Any:
    """Repeat the value once per record along its first dimension: the records' copies one after the other."""
    args, kwargs = call.spec.unflatten(call.leaves)
    counts = [*args[1:], *kwargs.values()]
    counts = list(counts[0]) if isinstance(counts[0], tuple | list | torch.Size) else counts
    rows = call.leaves[0].rows
    if counts[0] != call.size:
        raise ValueError("the value is not repeated once per record")
    missing = len(counts) - rows.dim() + 1
    rows = rows.reshape(rows.shape[0], *[1] * missing, *rows.shape[1:])
    return rows.repeat(1, 1, *counts[1:]).flatten(0, 1)
