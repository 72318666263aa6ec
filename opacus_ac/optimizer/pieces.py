"""Sums over tensors for ``AutoAdam``: a piece at a time, and of whole parameters where ranks share them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def products(parameter: Tensor, state: dict[str, Any]) -> list[Tensor]:
    """Add the release to the sum; return ``<g, Delta>, <anchor, Delta>, |Delta|^2, |g|^2, |sum g|^2``."""
    found: list[Tensor] = []
    for g, path, anchor, total in pieces(parameter.grad, state["path"], state["anchor"], state["total"]):
        total.add_(g)
        pairs = ((g, path), (anchor, path), (path, path), (g, g), (total, total))
        found.append(torch.stack([torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in pairs]).double())
    return list(torch.stack(found).sum(0))


def squares_and_zeros(parameter: Tensor) -> list[Tensor]:
    """Return the sum of squares of a parameter, and how many of its entries are zero."""
    found = [
        torch.stack([torch.dot(x.reshape(-1), x.reshape(-1)).double(), (x == 0).sum().double()])
        for (x,) in pieces(parameter)
    ]
    return list(torch.stack(found).sum(0))


_PIECE = 1 << 18
"""Number of entries that are worked on at a time. They stay in the processor's cache from one operation to the next."""


def pieces(*tensors: Any) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of the same entries of all tensors, a piece at a time on the processor."""
    shards = [local(x) for x in tensors]
    size = shards[0].numel()
    # On another device, a piece would cost as many launches as a tensor.
    if size <= _PIECE or shards[0].device.type != "cpu" or not all(x.is_contiguous() for x in shards):
        yield tuple(shards)
        return
    flat = [x.view(-1) for x in shards]
    for start in range(0, size, _PIECE):
        yield tuple(x[start : start + _PIECE] for x in flat)


def over_shards(rows: Sequence[Sequence[Tensor]], parameters: Sequence[Tensor]) -> Tensor:
    """Return the scalars of whole parameters ``[P, K]``: those of shards are added up over the ranks that have them."""
    values = torch.stack([torch.stack(list(row)).to(rows[0][0].device) for row in rows])
    sharded = [number for number, parameter in enumerate(parameters) if hasattr(parameter, "device_mesh")]
    if sharded:
        mesh: Any = parameters[sharded[0]].device_mesh  # type: ignore[attr-defined]  # all have one mesh
        total = values[sharded]
        torch.distributed.all_reduce(total, group=mesh.get_group(mesh.ndim - 1))
        values[sharded] = total
    return values


def local(x: Any) -> Tensor:
    """Return the tensor itself, or this rank's part of it where ranks share it (FSDP2)."""
    shard: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return shard
