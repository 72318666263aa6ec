"""Dense layers whose weight is stored ``[in, out]``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def outer_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum over positions of left_t (x) right_t, per record: ``[B, ..., i]`` and ``[B, ..., j]`` to ``[B, i, j]``."""
    return torch.einsum("n...i,n...j->nij", left, right)


def sum_positions(values: Tensor, last: int = 1) -> Tensor:
    """Sum over all but the first and the ``last`` trailing dimensions: ``[B, ..., d]`` to ``[B, d]``."""
    positions = tuple(range(1, values.dim() - last))
    return values.sum(dim=positions) if positions else values


def conv1d(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-sample gradients of ``transformers.pytorch_utils.Conv1D`` (y = x W + b, W is ``[in, out]``).

    Args:
        module: the layer.
        activations: one tensor ``[B, ..., in]``.
        backprops: ``[B, ..., out]``.

    Returns:
        ``[B, in, out]`` for the weight and ``[B, out]`` for the bias, trainable ones only.
    """
    grads: dict[nn.Parameter, Tensor] = {}
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    if weight is not None and weight.requires_grad:
        grads[weight] = outer_products(activations[0].to(backprops.dtype), backprops)
    if bias is not None and bias.requires_grad:
        grads[bias] = sum_positions(backprops)
    return grads
