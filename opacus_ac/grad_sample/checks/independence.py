"""Checks that the records of a batch are independent: the gradient of a record is the same in a batch and alone.

Gradients of records alone are from a loop over single records with plain autograd, which is slow and simple.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.checks.chosen_records import fresh
from opacus_ac.grad_sample.oracle import LossFn, _batch_size, _gradient, _trainable, select_records, trim_padding


def _scaled_gradient(
    model: nn.Module, batch: Any, loss_fn: LossFn, params: Mapping[str, nn.Parameter], reduction: str
) -> dict[str, Tensor]:
    """Return the gradient of the sum of the records' losses."""
    factor = _batch_size(batch) if reduction == "mean" else 1
    return {n: factor * g for n, g in _gradient(loss_fn(model, fresh(batch)), params).items()}


def _share_of(
    model: nn.Module, batch: Any, loss_fn: LossFn, params: Mapping[str, nn.Parameter], reduction: str, record: int
) -> dict[str, Tensor]:
    """Return the part of the gradient of the batch that is from ``record``."""
    losses = loss_fn(model, fresh(batch))
    if losses.dim() == 1:
        return _gradient(losses[record], params)
    size = _batch_size(batch)
    others = select_records(batch, torch.tensor([j for j in range(size) if j != record]))
    whole = _scaled_gradient(model, batch, loss_fn, params, reduction)
    without = _scaled_gradient(model, others, loss_fn, params, reduction)
    return {n: whole[n] - without[n] for n in params}


def _alone(
    model: nn.Module, batch: Any, loss_fn: LossFn, params: Mapping[str, nn.Parameter], record: int
) -> dict[str, Tensor]:
    """Return the gradient of ``record`` in a batch of its own.

    Raises:
        AssertionError: If the model or the loss does not accept a batch of one record.
    """
    try:
        loss = loss_fn(model, trim_padding(select_records(batch, torch.tensor([record])))).sum()
    except (ValueError, RuntimeError) as error:
        raise AssertionError(
            f"record {record} cannot be computed without the other records of the batch, as with batch normalisation: "
            f"{error}"
        ) from error
    return _gradient(loss, params)


def _compare_share(share: dict[str, Tensor], alone: dict[str, Tensor], record: int, rtol: float | None) -> None:
    overall = max((float(g.abs().max()) for g in alone.values() if g.numel()), default=0.0)
    for name, want in alone.items():
        if not want.numel():
            continue
        tolerance = rtol if rtol is not None else (1e-6 if want.dtype == torch.float64 else 1e-3)
        difference = (share[name] - want).abs().max()
        # A gradient that is zero but for rounding has no relative error, so it is compared with the whole gradient.
        if difference <= 1e-2 * tolerance * overall:
            continue
        error = float(difference / torch.maximum(want.abs().max(), share[name].abs().max()).clamp_min(1e-30))
        if not error <= tolerance:
            raise AssertionError(
                f"{name}: the gradient of record {record} depends on the other records of the batch "
                f"(relative error {error:.1e}); the loss must be a mean over records of per-record losses"
            )


def check_records_independent(
    model: nn.Module, batch: Any, loss_fn: LossFn, *, loss_reduction: str = "mean", rtol: float | None = None
) -> None:
    """Check that a record's gradient does not change when the other records of its batch change.

    Clipping bounds the influence of a record only if no gradient depends on other records. This is not so for a loss
    that is divided by the number of tokens in the batch, for batch normalisation, and for a quantiser with one scale
    per batch.

    Args:
        model: a model without Opacus's hooks, and without dropout or in eval mode.
        batch: at least two records, as for :func:`per_sample_gradients`, with different lengths if the data have them.
        loss_fn: ``loss_fn(model, batch)`` returns one loss per record ``[B]``, for the stricter check, or a scalar.
        loss_reduction: how a scalar loss combines the records, "mean" or "sum".
        rtol: tolerance relative to the parameter's largest entry; by default 1e-6 in float64 and 1e-3 otherwise.

    Raises:
        AssertionError: If a gradient changes. The message names the parameter, the record and the relative error.
        ValueError: If there are fewer than two records, or the reduction is unknown.

    Example:
        >>> import torch
        >>> model, x = torch.nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> check_records_independent(model, x, lambda m, rows: m(rows).mean())
        >>> check_records_independent(model, x, lambda m, rows: m(rows).mean() / rows.sum())
        Traceback (most recent call last):
        AssertionError: weight: the gradient of record 0 depends on the other records of the batch ...
    """
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction must be 'mean' or 'sum', not {loss_reduction!r}")
    size = _batch_size(batch)
    if size < 2:
        raise ValueError(f"independence needs at least two records, not {size}")
    params = _trainable(model)
    with torch.enable_grad():
        for record in range(size):
            share = _share_of(model, batch, loss_fn, params, loss_reduction, record)
            _compare_share(share, _alone(model, batch, loss_fn, params, record), record, rtol)


def check_losses_add_up(
    loss_fn: Callable[[Any], Any], batch: Any, *, rtol: float = 1e-3, rows_per_record: int = 1
) -> None:
    """Check with forward passes only that the loss of a batch is the mean of the losses of its records.

    This is cheaper than :func:`check_records_independent`, and the model may have hooks. The check finds losses that
    are averaged over the tokens of the batch, class weights, batch normalisation, in-batch negatives, and
    load-balancing terms of mixtures of experts. It also finds losses that depend on the order of records, or on the
    padded length: if the batch has an ``attention_mask``, a record alone has no padding.

    Args:
        loss_fn: ``loss_fn(batch)`` returns a scalar, without dropout. It may change the batch that it gets.
        batch: at least two records, as for :func:`per_sample_gradients`, that differ in length, class and so on.
        rtol: largest tolerance relative to the losses. In addition, a difference must not exceed 2 % of the range of
            the records' losses, unless it is below a tenth of ``rtol``.
        rows_per_record: number of rows of each record, if a record is a user. The rows of a record stand together.

    Raises:
        AssertionError: If the loss of the batch is not the mean of the losses of each record alone.
        ValueError: If there are fewer than two records, or the number of rows is not a multiple of ``rows_per_record``.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0])
        >>> check_losses_add_up(lambda rows: rows.square().mean(), x)
        >>> check_losses_add_up(lambda rows: rows.mean().square(), x)
        Traceback (most recent call last):
        AssertionError: the loss of a batch (2.25) is not the mean of the losses of its records alone (2.5): ...
    """
    rows = _batch_size(batch)
    if rows_per_record < 1 or rows % rows_per_record:
        raise ValueError(
            f"the batch has {rows} rows, which is not a multiple of rows_per_record={rows_per_record}: give every "
            "record the same number of rows"
        )
    size = rows // rows_per_record
    if size < 2:
        raise ValueError(f"independence needs at least two records, not {size}")
    parts = torch.arange(rows).split(rows_per_record)
    alone = [select_records(batch, part) for part in parts]
    # The rows of a user keep their padding, because a filler row may have nothing else.
    losses = _losses(loss_fn, alone if rows_per_record > 1 else [trim_padding(part) for part in alone])
    for order in _orders(size):
        chosen = select_records(batch, torch.cat([parts[i] for i in order]))
        expect_mean(_losses(loss_fn, [chosen])[0], [losses[i] for i in order], rtol, rtol / 10)


def _orders(size: int) -> list[list[int]]:
    """Return the batches to try: all records, all in reverse order, and every second of three or more."""
    whole = list(range(size))
    return [whole, whole[::-1], *([whole[::2]] if size > 2 else [])]


def _losses(loss_fn: Callable[[Any], Any], batches: list[Any]) -> list[float]:
    """Return the losses of batches. ``loss_fn`` gets copies."""
    with torch.no_grad():
        return [float(loss_fn(fresh(batch))) for batch in batches]


def expect_mean(together: float, alone: list[float], rtol: float, floor: float) -> None:
    """Check that the loss of a batch is the mean of the losses of its records alone.

    The tolerance is 2 % of the range of the losses, but at least ``floor`` and at most ``rtol``.

    Args:
        together: loss of the batch.
        alone: loss of each record.
        rtol: largest tolerance, relative to the losses.
        floor: smallest tolerance, relative to the losses, for rounding.

    Raises:
        AssertionError: If the losses differ by more.
    """
    mean = sum(alone) / len(alone)
    scale = max(abs(together), abs(mean))
    tolerance = min(max(0.02 * (max(alone) - min(alone)), floor * scale), rtol * scale)
    if not abs(together - mean) <= tolerance:
        raise AssertionError(
            f"the loss of a batch ({together:.6g}) is not the mean of the losses of its records alone ({mean:.6g}): "
            "the loss or the model couples records, so clipping would not bound what one of them does. Make it a mean "
            "over records"
        )
