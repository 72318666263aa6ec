"""Weights from the per-record gradients of public data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from opacus_ac.allocation.rule import group_of, optimal_weights
from opacus_ac.grad_sample.oracle import LossFn, _batch_size, per_sample_gradients, select_records


def public_weights(
    model: nn.Module, batch: Any, loss_fn: LossFn, groups: str | Callable[[str], str], clamp: float
) -> dict[str, float]:
    """Return the optimal weight of each group for the per-record gradients of a PUBLIC batch, run one by one.

    Args:
        model: the model before ``make_private``; it is left as it was.
        batch: public records.
        loss_fn: ``loss_fn(model, batch_of_one)`` gives the record's loss.
        groups: "parameter", "layer", or a function of the parameter's name.
        clamp: largest factor away from 1.

    Raises:
        ValueError: If the gradients of the batch are zero or not finite.
    """
    records = _batch_size(batch)
    sizes: dict[str, int] = {}
    energies: dict[str, float] = {}
    for record in range(records):
        rows = per_sample_gradients(model, select_records(batch, torch.tensor([record])), loss_fn)
        for name, row in rows.items():
            group = group_of(groups, name)
            sizes[group] = sizes.get(group, 0) + (row.numel() if record == 0 else 0)
            energies[group] = energies.get(group, 0.0) + float(row.double().square().sum()) / records
    largest = max(energies.values())
    if not (math.isfinite(largest) and largest > 0):
        raise ValueError(f"the gradients of the public batch have squared norm {largest!r}: they show no weights")
    norms = [math.sqrt(max(e, 1e-12 * largest)) for e in energies.values()]
    found = optimal_weights(list(sizes.values()), norms, clamp=clamp)
    return dict(zip(sizes, found, strict=True))
