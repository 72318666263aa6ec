"""The trained parameters of a model and of an inner optimizer."""

from __future__ import annotations

import itertools

from opacus.optimizers import DPOptimizer
from torch import nn
from torch.optim import Optimizer


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer to make private; one that was made private before is unwrapped, as by Opacus.

    Raises:
        ValueError: another optimizer is wrapped, whose wrapper decides by itself when it steps.
    """
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        raise ValueError(
            f"the optimizer is wrapped in {type(optimizer).__name__}, which may leave out steps that are charged: pass "
            "the optimizer inside (its attribute optimizer), and prepare what make_private returns"
        )
    return optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer


def named_parameters(module: nn.Module, optimizer: Optimizer) -> tuple[list[nn.Parameter], list[str]]:
    """Return the trainable parameters that the optimizer holds, and their names in ``module``."""
    names = {p: name for name, p in module.named_parameters()}
    held = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    parameters = [p for p in held if p.requires_grad]
    return parameters, [names[p] for p in parameters]
