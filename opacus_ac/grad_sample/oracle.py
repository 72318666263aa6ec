"""Per-sample gradients from a loop over single records, with which all other ways are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.checks.chosen_records import named_rows, remade
from opacus_ac.grad_sample.one_backward.capture import is_captured

LossFn = Callable[[Any, Any], Tensor]


def _batch_size(batch: Any) -> int:
    sizes = {len(rows) for _, rows in named_rows(batch)}
    if len(sizes) != 1:
        raise ValueError(
            f"the tensors of the batch have first dimensions {sorted(sizes)}: give every tensor the records as its "
            "first dimension"
        )
    return sizes.pop()


def select_records(batch: Any, index: Tensor) -> Any:
    """Return the records ``index`` of a batch.

    Args:
        batch: a tensor, or tuples, lists and mappings of tensors, with the records as first dimension.
        index: numbers of the records, ``[n]``.
    """
    if isinstance(batch, Tensor):
        return batch[index.to(batch.device)] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return remade(batch, {key: select_records(value, index) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(select_records(value, index) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(select_records(value, index) for value in batch)
    return batch


def trim_padding(batch: Any) -> Any:
    """Return a batch without the padding that none of its records needs.

    Columns in which ``attention_mask`` ``[B, T]`` is 0 for all records are removed from every tensor ``[B, T, ...]``,
    unless one of them has a label. So the batch is as the collate function would make it of these records alone.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not mask.numel():
        return batch
    kept = (mask != 0).any(0)
    labels = batch.get("labels")
    labelled = isinstance(labels, Tensor) and labels.shape[1:2] == kept.shape and bool((labels[:, ~kept] != -100).any())
    if bool(kept.all()) or not bool(kept.any()) or labelled:
        return batch
    wide = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() > 1 and v.shape[1] == len(kept)}
    return remade(batch, {**batch, **{key: value[:, kept] for key, value in wide.items()}})


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    if any(hasattr(p, "_forward_counter") for p in model.parameters()) or is_captured(model):
        raise ValueError(
            "the model has per-sample gradient hooks, which would see these passes: use a copy.deepcopy of the model "
            "from before make_private, or call engine.detach(model)"
        )
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _gradient(loss: Tensor, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    grads: tuple[Tensor | None, ...] = (None,) * len(params)
    if loss.requires_grad and params:
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads, strict=True)}


def per_sample_gradients(model: nn.Module, batch: Any, loss_fn: LossFn) -> dict[str, Tensor]:
    """Return per-sample gradients from a loop over single records.

    Args:
        model: a model without Opacus's hooks, in the mode (train or eval) in which it will be trained.
        batch: a tensor, or tuples, lists and mappings of tensors, with the records as first dimension. Other values are
            passed on as they are.
        loss_fn: ``loss_fn(model, batch_of_one)`` returns the record's loss, a scalar.

    Returns:
        ``{name: [B, *shape]}`` for every trainable parameter. A parameter that was not used has zeros. A tied parameter
        appears once, under its first name.

    Guarantees:
        ``.grad`` and the training mode stay as they were.

    Raises:
        ValueError: If first dimensions of the batch differ, or if the model has per-sample gradient hooks.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> per_sample_gradients(model, x, lambda m, rows: m(rows).sum())["weight"].tolist()
        [[[1.0, 2.0]], [[3.0, 4.0]]]
    """
    params = _trainable(model)
    with torch.enable_grad():
        rows = [
            _gradient(loss_fn(model, select_records(batch, torch.tensor([i]))), params)
            for i in range(_batch_size(batch))
        ]
    return {n: torch.stack([row[n] for row in rows]) if rows else p.new_zeros(0, *p.shape) for n, p in params.items()}


def _norms(value: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return the norms ``[B]`` in float64; of per-sample gradients, over all parameters together."""
    if isinstance(value, Tensor):
        return value.detach().double().cpu()
    squares = [g.detach().double().cpu().unsqueeze(-1).flatten(1).pow(2).sum(1) for g in value.values()]
    return torch.stack(squares).sum(0).sqrt()


def check_norms(
    norms_or_grads: Tensor | Mapping[str, Tensor], expected: Tensor | Mapping[str, Tensor], *, rtol: float = 1e-5
) -> None:
    """Check the gradient norm of each record, over all parameters together.

    Args:
        norms_or_grads: norms ``[B]``, or per-sample gradients ``{name: [B, *shape]}``.
        expected: the expected norms or gradients, for instance from :func:`per_sample_gradients`.
        rtol: relative tolerance, per record.

    Raises:
        AssertionError: If a norm differs or is not finite. The message names the record with the largest error.

    Example:
        >>> import torch
        >>> check_norms(torch.tensor([5.0]), {"weight": torch.tensor([[3.0, 4.0]])})
        >>> check_norms(torch.tensor([5.1]), {"weight": torch.tensor([[3.0, 4.0]])})
        Traceback (most recent call last):
        AssertionError: record 0 of 1: norm 5.1, expected 5 (relative error 2.0e-02)
    """
    got, want = _norms(norms_or_grads), _norms(expected)
    if got.shape != want.shape:
        raise AssertionError(f"norms of {tuple(got.shape)} records, expected {tuple(want.shape)}")
    error = (got - want).abs() / want.abs().clamp_min(torch.finfo(torch.float64).tiny)
    error = torch.where(got == want, torch.zeros_like(error), error)
    bad = ~(error <= rtol)
    if bad.any():
        i = int(torch.where(bad, error.nan_to_num(float("inf")), -1.0).argmax())
        raise AssertionError(
            f"record {i} of {len(got)}: norm {got[i]:.6g}, expected {want[i]:.6g} (relative error {error[i]:.1e})"
        )
