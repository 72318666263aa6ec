"""Dense layers: ``nn.Linear`` (weight ``[out, in]``) and ``Conv1D`` (weight ``[in, out]``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.module_replay import bare_twin, call_forward, map_tensors, to_double, written_type
from opacus_ac.grad_sample.one_backward.bounds import wide
from opacus_ac.grad_sample.one_backward.outer_products import Dense, Rows, Term

# The source of these subclasses of nn.Linear was read: they compute what their base does. A probe alone would not do,
# because a layer may begin to round its weights, or to cut its inputs, in the middle of a run.
_PLAIN = {("transformers.models.falcon.modeling_falcon", "FalconLinear")}


def is_plain_linear(module: nn.Module) -> bool:
    """Say whether a module is of a subclass of ``nn.Linear`` that is known to compute what its base does.

    A probe in float64 confirms it, since another version of the library may differ.
    """
    cls = written_type(module)
    if (cls.__module__, cls.__qualname__) not in _PLAIN or not isinstance(module, nn.Linear) or module.weight.is_meta:
        return False
    if module._buffers or module._modules:
        return False
    twin = bare_twin(module)
    map_tensors(twin, to_double)
    x = torch.randn(2, 3, twin.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(twin.weight.device)
    try:
        with torch.no_grad():
            output = call_forward(twin, x)
            expected = nn.functional.linear(x, twin.weight, twin.bias)
    except Exception:  # a forward that wants something else is not this family
        return False
    return isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-9)


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
