"""Per-sample gradients by a loop of batch size one: the oracle that everything else is compared with."""

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
        raise ValueError(f"every tensor of the batch must have the records first; found sizes {sorted(sizes)}")
    return sizes.pop()


def select_records(batch: Any, index: Tensor) -> Any:
    """The records ``index`` of a batch: a tensor, or tuples, lists and mappings of tensors, records first."""
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
    """Return a batch without the columns that no record of it attends to, as it comes without longer records.

    Columns go where ``attention_mask`` ``[B, T]`` is 0 for all, in every tensor ``[B, T, ...]``, unless there are
    labels in them.
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
            "the model carries per-sample gradient hooks, which would see these passes: use copy.deepcopy(model) of "
            "the model before make_private, or call engine.detach(model)"
        )
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _gradient(loss: Tensor, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    grads: tuple[Tensor | None, ...] = (None,) * len(params)
    if loss.requires_grad and params:
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads, strict=True)}


def per_sample_gradients(model: nn.Module, batch: Any, loss_fn: LossFn) -> dict[str, Tensor]:
    """Per-sample gradients by a loop of batch size one.

    Args:
        model: a model without Opacus's hooks, in the mode it is to be trained in.
        batch: a tensor, or tuples, lists and mappings of tensors, records first. Other values are passed on.
        loss_fn: ``loss_fn(model, batch_of_one)`` gives the record's loss, a scalar.

    Returns:
        ``{name: [B, *shape]}`` for every trainable parameter; zeros where a parameter was not used. A tied parameter
        appears once, under its first name.

    Guarantees:
        ``.grad`` and the training mode are left as they were.

    Raises:
        ValueError: batch sizes disagree, or the model carries Opacus's hooks.

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
    """``[B]`` norms in float64, over all parameters where per-sample gradients are given."""
    if isinstance(value, Tensor):
        return value.detach().double().cpu()
    squares = [g.detach().double().cpu().unsqueeze(-1).flatten(1).pow(2).sum(1) for g in value.values()]
    return torch.stack(squares).sum(0).sqrt()


def check_norms(
    norms_or_grads: Tensor | Mapping[str, Tensor], expected: Tensor | Mapping[str, Tensor], *, rtol: float = 1e-5
) -> None:
    """Compare the gradient norm of each record, over all parameters, with what it should be.

    Args:
        norms_or_grads: norms ``[B]``, or per-sample gradients ``{name: [B, *shape]}``.
        expected: the same, for instance from :func:`per_sample_gradients`.
        rtol: relative tolerance, per record.

    Raises:
        AssertionError: names the worst record; also where a value is not finite.

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
