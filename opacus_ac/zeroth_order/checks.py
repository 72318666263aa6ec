"""What a model must be like so that a record's two losses differ by the weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD, Optimizer

from opacus_ac.grad_sample.checks.coupled import check_records_apart
from opacus_ac.zeroth_order.settings import ZerothOrderSettings

_RANDOM = ("drop", "jitter")


def check_model(module: nn.Module) -> None:
    """Raise ``ValueError`` for a model whose losses depend on other records of the batch, or on past batches."""
    for name, inner in module.named_modules():
        if isinstance(inner, _NormBase) and (inner.track_running_stats or type(inner).__name__.startswith("Batch")):
            raise ValueError(
                f"{name or 'the model'} is a {type(inner).__name__}: it mixes the records of a batch, or keeps their "
                "statistics. Replace it by GroupNorm or LayerNorm (opacus.validators.ModuleValidator.fix)"
            )
    check_records_apart(module)


def check_not_random(module: nn.Module) -> None:
    """Raise ``ValueError`` when a module draws at random (dropout in training mode).

    The two losses of a direction would differ by other dropout masks, divided by twice the smoothing: noise a thousand
    times as large as the signal.
    """
    for name, inner in module.named_modules():
        if not inner.training:
            continue
        found = [
            *_random_fields(inner),
            *(f"config.{field}" for field in _random_fields(getattr(inner, "config", None))),
        ]
        if found:
            raise ValueError(
                f"{name or 'the model'} ({type(inner).__name__}) is in training mode with {found[0]} > 0, so that its "
                "losses are random: call model.eval() before the step, or set it to 0"
            )


def _random_fields(holder: Any) -> list[str]:
    """Return the names of positive probabilities of dropping or shaking something."""
    if holder is None:
        return []
    fields = vars(holder)
    found = [
        name
        for name, value in fields.items()
        if any(part in name for part in _RANDOM)
        and isinstance(value, float | int)
        and not isinstance(value, bool)
        and value > 0
    ]
    if isinstance(holder, nn.modules.dropout._DropoutNd) and holder.p > 0:
        found.append("p")
    if isinstance(holder, nn.RReLU):
        found.append("upper")
    return found


def check_parameters(parameters: Sequence[nn.Parameter]) -> None:
    """Raise ``ValueError`` for weights that cannot be moved in place one by one."""
    seen: dict[tuple[Any, int], int] = {}
    for i, parameter in enumerate(parameters):
        if not parameter.is_contiguous():
            raise ValueError(
                f"trainable parameter {i}, of shape {tuple(parameter.shape)}, is not contiguous: set parameter.data = "
                "parameter.data.contiguous() before"
            )
        place = (parameter.device, parameter.data_ptr())
        if parameter.numel() and seen.setdefault(place, i) != i:
            raise ValueError(
                f"trainable parameters {seen[place]} and {i} share their memory, and would be moved twice: tie them "
                "as one nn.Parameter"
            )


def moves_in_place(optimizer: Optimizer) -> bool:
    """Say whether the optimizer is plain SGD, whose update needs no gradient in memory."""
    plain = {"momentum": 0, "nesterov": False, "maximize": False}
    return type(optimizer) is SGD and all(
        group.get(name, value) == value for group in optimizer.param_groups for name, value in plain.items()
    )


def check_inner_optimizer(optimizer: Optimizer, settings: ZerothOrderSettings) -> None:
    """Raise ``ValueError`` for an inner optimizer that would move coordinates outside the mask."""
    if settings.pruning is not None and not moves_in_place(optimizer):
        raise ValueError(
            f"pruning with {type(optimizer).__name__}: its momentum or weight decay would move coordinates that are "
            "not trained. Use torch.optim.SGD(parameters, lr=...) without momentum, or pruning=None"
        )
