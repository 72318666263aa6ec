"""The trained parameters of a model and of an inner optimizer."""

from __future__ import annotations

import inspect
import itertools

import torch
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.optim import Optimizer


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer to make private; one that was made private before is unwrapped, as by Opacus.

    Raises:
        ValueError: If another optimizer is wrapped, whose wrapper decides by itself when it steps; or if the optimizer
            cannot take one step for one released gradient (LBFGS, SparseAdam).
    """
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        raise ValueError(
            f"the optimizer is wrapped in {type(optimizer).__name__}, which may leave out steps that are charged: pass "
            "the optimizer inside (its attribute optimizer), and prepare what make_private returns"
        )
    inner = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
    closure = inspect.signature(type(inner).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{type(inner).__name__} calls its closure, and so computes gradients, several times in one step, of which "
            "only one is released: use an optimizer of one gradient a step, such as torch.optim.AdamW"
        )
    if isinstance(inner, torch.optim.SparseAdam):
        raise ValueError(
            "SparseAdam needs sparse gradients, and with noise no entry is zero: use torch.optim.AdamW, and "
            "nn.Embedding(sparse=False)"
        )
    return inner


def named_parameters(module: nn.Module, optimizer: Optimizer) -> tuple[list[nn.Parameter], list[str]]:
    """Return the trainable parameters that the optimizer holds, and their names in ``module``."""
    names = {p: name for name, p in module.named_parameters()}
    held = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    parameters = [p for p in held if p.requires_grad]
    return parameters, [names[p] for p in parameters]
