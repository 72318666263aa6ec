"""Dense layers: ``nn.Linear`` (weight ``[out, in]``) and ``Conv1D`` (weight ``[in, out]``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.one_backward.bounds import wide
from opacus_ac.grad_sample.one_backward.outer_products import Dense, Rows, Term


def outer_products(left: Tensor, right: Tensor) -> Tensor:
    """Return for each record the sum over positions of outer products, ``[B, i, j]``.

    Args:
        left: ``[B, ..., i]``.
        right: ``[B, ..., j]``.
    """
    return torch.einsum("n...i,n...j->nij", left, right)


def sum_positions(values: Tensor, last: int = 1) -> Tensor:
    """Return the sum ``[B, d]`` of ``[B, ..., d]`` over all dimensions but the first and the ``last`` ones."""
    positions = tuple(range(1, values.dim() - last))
    return values.sum(dim=positions) if positions else values


def by_position(values: Tensor) -> Tensor:
    """Return ``[B, ..., d]`` as ``[B, T, d]``. ``[B, d]`` has one position."""
    if values.dim() == 3:
        return values
    return values.unsqueeze(1) if values.dim() == 2 else values.reshape(values.shape[0], -1, values.shape[-1])


def dense_terms(
    module: nn.Module, inputs: Tensor, backprops: Tensor, *, transposed: bool = False
) -> list[tuple[nn.Parameter, Term]]:
    """Return the terms that one use of a dense layer adds to the gradients of its ``weight`` and ``bias``.

    Args:
        module: the layer, for its parameters.
        inputs: input of the matrix product, ``[B, ..., in]``.
        backprops: gradient at the output of the product, ``[B, ..., out]``.
        transposed: whether the weight is stored as ``[in, out]``.
    """
    # Under autocast the input of the product was rounded to the type of the product.
    right, left = by_position(inputs.to(backprops.dtype)), by_position(backprops)
    terms: list[tuple[nn.Parameter, Term]] = []
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is not None and weight.requires_grad:
        terms.append((weight, Dense(right, left) if transposed else Dense(left, right)))
    if bias is not None and bias.requires_grad:
        terms.append((bias, Rows(sum_positions(wide(left)))))
    return terms


def conv1d(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return per-sample gradients of ``transformers.pytorch_utils.Conv1D`` (y = x W + b, W is ``[in, out]``).

    Args:
        module: the layer.
        activations: one tensor ``[B, ..., in]``.
        backprops: ``[B, ..., out]``.

    Returns:
        ``[B, in, out]`` for the weight and ``[B, out]`` for the bias, if they are trainable.
    """
    grads: dict[nn.Parameter, Tensor] = {}
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    if weight is not None and weight.requires_grad:
        grads[weight] = outer_products(activations[0].to(backprops.dtype), backprops)
    if bias is not None and bias.requires_grad:
        grads[bias] = sum_positions(backprops)
    return grads
