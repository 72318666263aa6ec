"""Per-sample gradients of a rule, in every mode, beside those of a loop of batch size one."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from torch import Tensor, nn

from opacus_ac.grad_sample import check_model, expand_broadcast_embeddings, register_rules
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.grad_sample.oracle import LossFn, check_norms, per_sample_gradients

MODES = ("hooks", "bk")


@contextlib.contextmanager
def opacus_table_restored() -> Iterator[None]:
    """Undo every registration of grad and norm samplers made inside: Opacus keeps them in global tables."""
    tables = [GradSampleHooks.GRAD_SAMPLERS, GradSampleHooksFastGradientClipping.NORM_SAMPLERS]
    saved = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, saved, strict=True):
            table.clear()
            table.update(entries)


def hooks_gradients(model: nn.Module, batch: Any, loss_fn: LossFn, *, strict: bool = True) -> dict[str, Tensor]:
    """Return per-sample gradients as Opacus's hooks leave them on a copy of the model, with positions expanded.

    Args:
        model: a model without hooks, in training mode; rules must be registered.
        batch: as ``loss_fn`` takes it, records first.
        loss_fn: ``loss_fn(model, batch)`` gives the mean of the records' losses.
        strict: refuse trained modules with buffers, as Opacus does by default.

    Returns:
        ``{name: [B, *shape]}``.
    """
    model = copy.deepcopy(model)
    with expand_broadcast_embeddings(model):
        wrapped = GradSampleModule(model, strict=strict)
        loss_fn(wrapped, batch).backward()
    return {n: p.grad_sample for n, p in model.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]


def one_backward(
    model: nn.Module, batch: Any, loss_fn: LossFn, weights: Tensor | None = None, *, reduction: str = "mean"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return norms and weighted sums of the per-sample gradients of mode "bk"; the model is left as it was.

    Args:
        model: a model without hooks, in training mode. Rules are registered for it.
        batch: as ``loss_fn`` takes it, records first.
        loss_fn: ``loss_fn(model, batch)`` gives the mean (or sum) of the records' losses.
        weights: factor of each record ``[B]``; None for 1.
        reduction: "mean" or "sum".

    Returns:
        Norms ``[B]`` over all trainable parameters (as computed; records are clipped by upper bounds of them), and
        ``{name: sum_i weights_i g_i}``.

    Raises:
        ValueError: If the model is refused in mode "bk".
    """
    register_rules(model)
    check_model(model, mode="bk")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    source = BookKeepingSource(model, list(named.values()), list(named), reduction)
    detach = source.attach()
    try:
        loss_fn(model, batch).backward()
        bounds = source.finish_batch()
        norms = source.parameter_squares().sum(1).sqrt()
        assert not bool((bounds < norms).any()), "a record is clipped by less than its norm"
        source.accumulate(torch.ones_like(norms) if weights is None else weights)
        sums = {
            n: torch.zeros_like(p) if s is None else s for (n, p), s in zip(named.items(), source.sums(), strict=True)
        }
        assert all(p.grad is None and p.requires_grad for p in named.values())
    finally:
        detach()
        source.clear(sums=True)

    return norms, sums


def worst_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor], floor: float = 0.0) -> tuple[float, str]:
    """Return the largest error relative to its parameter's largest entry, and the name of the parameter.

    ``floor``: smallest measure, as a share of the largest entry of all; a gradient that is zero but for rounding (that
    of a key bias, which softmax does not see) has no relative error.
    """
    assert got.keys() == want.keys()
    smallest = max(1e-30, floor * max(float(g.abs().max()) for g in want.values()))
    errors = []
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        scale = expected.abs().max().clamp_min(smallest)
        errors.append((float((got[name] - expected).abs().max() / scale), name))
    return max(errors)


def _cubic(model: nn.Module, batch: Tensor) -> Tensor:
    """A mean over records whose gradient at the output differs at every position and grows with the record."""
    output: Tensor = model(batch)
    return output.pow(3).flatten(1).sum(1).mean()


def _double(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _double(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list) and not hasattr(batch, "_fields"):
        return type(batch)(_double(value) for value in batch)
    return batch


def check_rule(
    module: nn.Module,
    batch: Any,
    loss_fn: LossFn | None = None,
    *,
    modes: Sequence[str] = MODES,
    rtol: float = 1e-7,
) -> dict[str, float]:
    """Check that the per-sample gradients of a layer or model are those of a loop of batch size one, in float64.

    Mode "hooks" is compared entry by entry; mode "bk" by the norm of every record and by a sum with random weights.

    Args:
        module: a layer, or a whole model, without hooks. A copy is examined, in training mode and float64.
        batch: records first, at least two and of different size: a scale shared by the batch hides in equal ones.
        loss_fn: ``loss_fn(model, batch)`` gives the mean of the records' losses; by default the sum of the cubes of the
            output.
        modes: which of "hooks" and "bk".
        rtol: relative tolerance; layers that compute in float32 inside need about 1e-5.

    Returns:
        The worst relative error of each mode.

    Guarantees:
        Neither ``module`` nor Opacus's table of samplers is changed.

    Raises:
        ValueError: If ``make_private`` would refuse the module, or a mode is unknown.
        AssertionError: If a gradient differs, or is zero (which would test nothing); names mode, parameter and error.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [30.0, 4.0]])
        >>> max(check_rule(torch.nn.Linear(2, 3), x).values()) < 1e-12
        True
    """
    if unknown := set(modes) - set(MODES):
        raise ValueError(f"modes can be {' and '.join(map(repr, MODES))}, not {', '.join(map(repr, sorted(unknown)))}")
    loss = _cubic if loss_fn is None else loss_fn
    model = nn.Sequential(copy.deepcopy(module)) if loss_fn is None else copy.deepcopy(module)
    model, batch = model.double().train(), _double(batch)
    want = per_sample_gradients(model, batch, loss)
    for name, gradient in want.items():
        if not bool(gradient.ne(0).any()):
            raise AssertionError(f"{name} has no gradient in this batch, so the comparison would say nothing about it")
    found: dict[str, float] = {}
    with opacus_table_restored():
        register_rules(model)
        for mode in modes:
            check_model(model, mode=mode)
            error, name = _compare(mode)(model, batch, loss, want)
            if not error <= rtol:
                raise AssertionError(
                    f'mode "{mode}": {name} is off by {error:.1e} (relative) from a loop of batch size 1'
                )
            found[mode] = error
            if mode == "bk":
                check_norms(one_backward(model, batch, loss)[0], want, rtol=rtol)
    return found


def _compare(mode: str) -> Callable[[nn.Module, Any, LossFn, dict[str, Tensor]], tuple[float, str]]:
    return _compare_hooks if mode == "hooks" else _compare_sums


def _compare_hooks(model: nn.Module, batch: Any, loss: LossFn, want: dict[str, Tensor]) -> tuple[float, str]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the batch needs no gradient
        # check_model has refused every buffer that is not a constant of a layer with a rule.
        got = hooks_gradients(model, batch, loss, strict=False)
    return worst_error(got, want)


def _compare_sums(model: nn.Module, batch: Any, loss: LossFn, want: dict[str, Tensor]) -> tuple[float, str]:
    records = len(next(iter(want.values())))
    weights = torch.rand(records, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, sums = one_backward(model, batch, loss, weights)
    return worst_error(sums, {n: torch.einsum("b,b...->...", weights, g) for n, g in want.items()}, floor=1e-6)
