"""An inner optimizer's step on some of its parameters alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opacus_ac.optimizer.dp_adamw import DPAdamW

ONE_BY_ONE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, DPAdamW)
"""Inner optimizers whose update of a parameter depends on nothing but this parameter, its gradient and its state."""


def apply_some(inner: Optimizer, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    """Take the inner optimizer's own step on these parameters alone; their gradients are gone afterwards.

    Args:
        inner: the optimizer, one of :data:`ONE_BY_ONE`.
        parameters: some of its parameters.
        gradients: a released gradient for each.
    """
    groups, chosen = inner.param_groups, {id(p) for p in parameters}
    try:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # A float64 sum is rounded after the noise.
            parameter.grad = gradient.to(parameter.dtype).view_as(parameter)
        inner.param_groups = [{**group, "params": [p for p in group["params"] if id(p) in chosen]} for group in groups]
        inner.step()
    finally:
        inner.param_groups = groups
        for parameter in parameters:
            parameter.grad = None


def checked(fused_step: bool, inner: Optimizer) -> bool:
    """Return ``fused_step``, if the inner optimizer can update one parameter at a time.

    Raises:
        ValueError: If it cannot, or is not known to.
    """
    if fused_step and type(inner) not in ONE_BY_ONE:
        raise ValueError(
            f"fused_step=True updates one parameter at a time, which is known to be the same for AdamW, Adam and SGD "
            f"of torch.optim, not for {type(inner).__name__}: pass fused_step=False"
        )
    return fused_step
