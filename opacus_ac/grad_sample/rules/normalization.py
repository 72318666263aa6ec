"""Normalisation layers: RMSNorm with weight or 1 + weight, and LayerNorm with or without a bias."""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_ac.grad_sample.module_replay import bare_twin, call_with, map_tensors, to_double
from opacus_ac.grad_sample.one_backward.bounds import wide
from opacus_ac.grad_sample.rules.linear import sum_positions

# Module -> (its epsilon attribute, whether it computes with this epsilon).
_CHECKED: weakref.WeakKeyDictionary[nn.Module, tuple[float, bool]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def rms_epsilon(module: nn.Module) -> float | None:
    """Return the epsilon of an RMSNorm that computes x_hat = x / sqrt(mean(x^2) + epsilon); None for another formula.

    Epsilon is read from the module. It is then checked in float64 against the module's output, for inputs so small
    that epsilon matters.
    """
    named = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
    epsilon = next((value for value in named if isinstance(value, float) and value > 0), None)
    if epsilon is None:
        return None
    if _CHECKED.get(module, (0.0, False))[0] != epsilon:
        _CHECKED[module] = (epsilon, _computes_with(module, epsilon))
    return epsilon if _CHECKED[module][1] else None


def _computes_with(module: nn.Module, epsilon: float) -> bool:
    weight = module._parameters["weight"]
    if weight is None or weight.is_meta:
        return False
    twin = bare_twin(module)
    map_tensors(twin, to_double)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[0], generator=generator, dtype=torch.float64)
    x = x.to(weight.device) * torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64, device=weight.device)[:, None]
    x = x * epsilon**0.5
    weights = [torch.full_like(weight, value, dtype=torch.float64, device=x.device) for value in (0.0, 1.0)]
    x_hat = call_with(twin, {"weight": weights[1]}, x) - call_with(twin, {"weight": weights[0]}, x)
    expected = x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return torch.allclose(x_hat.double(), expected, rtol=1e-5, atol=1e-5)


def rms_norm_rows(module: nn.Module, x: Tensor, backprops: Tensor) -> Tensor | None:
    """Return the per-sample gradient ``[B, d]`` of an RMSNorm's weight, in three passes over the input.

    Returns:
        None if the type is not float32, because rounding inside the module would not be repeated exactly, or if the
        module computes another formula.
    """
    epsilon = rms_epsilon(module) if x.dtype == backprops.dtype == torch.float32 else None
    if epsilon is None:
        return None
    scale = torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    batch, width = x.shape[0], x.shape[-1]
    return torch.bmm(scale.reshape(batch, 1, -1), (x * backprops).reshape(batch, -1, width))[:, 0]


@torch.no_grad()
def normalized(module: nn.Module, x: Tensor, offset: float) -> Tensor:
    """Return x_hat of a layer that computes ``(offset + weight) * x_hat``, from its own forward at weight = 1 - offset.

    The module's own forward has the right epsilon and the right internal casts.
    """
    weight = module._parameters["weight"]
    assert weight is not None
    x_hat: Tensor = call_with(module, {"weight": torch.full_like(weight, 1.0 - offset)}, x)
    return x_hat


def _scale_gradient(module: nn.Module, x: Tensor, backprops: Tensor, offset: float) -> dict[nn.Parameter, Tensor]:
    weight = module._parameters["weight"]
    if weight is None or not weight.requires_grad:
        return {}
    return {weight: sum_positions(backprops * normalized(module, x, offset), weight.dim())}


def rms_norm(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the per-sample gradient of an RMSNorm that computes ``weight * x_hat`` (Llama, Qwen, Mistral, BitNet, T5).

    Args:
        module: the layer.
        activations: one tensor ``[B, ..., d]``.
        backprops: ``[B, ..., d]``.

    Returns:
        ``[B, d]`` for the weight.
    """
    return _scale_gradient(module, activations[0], backprops, offset=0.0)


def offset_rms_norm(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the same as :func:`rms_norm`, for a layer that computes ``(1 + weight) * x_hat`` (Gemma)."""
    return _scale_gradient(module, activations[0], backprops, offset=1.0)


def layer_norm(module: nn.LayerNorm, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return per-sample gradients of ``nn.LayerNorm``. Unlike Opacus's sampler, this rule allows ``bias=False``.

    Args:
        module: the layer.
        activations: one tensor ``[B, ..., *normalized_shape]``.
        backprops: the same shape.

    Returns:
        ``[B, *normalized_shape]`` for weight and bias, if they are trainable.
    """
    grads: dict[nn.Parameter, Tensor] = {}
    last = len(module.normalized_shape)
    if module.weight is not None and module.weight.requires_grad:
        x_hat = F.layer_norm(wide(activations[0]), module.normalized_shape, eps=module.eps)
        grads[module.weight] = sum_positions(backprops * x_hat, last)
    if module.bias is not None and module.bias.requires_grad:
        grads[module.bias] = sum_positions(backprops, last)
    return grads


def _shape_fits(module: nn.Module) -> bool:
    own = {name: p for name, p in module._parameters.items() if p is not None}
    leaf = not module._modules and not any(b is not None for b in module._buffers.values())
    return leaf and set(own) == {"weight"} and own["weight"].dim() == 1 and not own["weight"].is_meta


@torch.no_grad()
def rms_norm_offset(module: nn.Module) -> float | None:
    """Find out whether a module is an RMSNorm, by its behaviour and not by its name.

    On a float64 copy, the output must be affine in the weight for each position, x_hat must be a positive multiple of
    the input with mean square one, and the output for a record must not depend on other records.

    Returns:
        0.0 if the module computes ``weight * x_hat``, 1.0 for ``(1 + weight) * x_hat``, None if it is not an RMSNorm.
    """
    if not _shape_fits(module):
        return None
    twin = bare_twin(module)
    map_tensors(twin, to_double)
    weight = twin._parameters["weight"]
    assert weight is not None
    width = weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, width, generator=generator, dtype=torch.float64)
    x = (x * torch.tensor([1.0, 30.0, 1000.0], dtype=torch.float64).view(3, 1, 1)).to(weight.device)
    trial = torch.randn(width, generator=generator, dtype=torch.float64).to(weight.device)
    try:
        at_zero, at_one, at_trial, alone = (
            call_with(twin, {"weight": w}, v)
            for w, v in ((0 * trial, x), (0 * trial + 1, x), (trial, x), (trial, x[1:2]))
        )
        x_hat = at_one - at_zero
        expected = x * x.pow(2).mean(-1, keepdim=True).rsqrt()
        checks = (
            (at_trial, at_zero + trial * x_hat, 1e-5),
            (at_trial[1:2], alone, 1e-5),
            # This tolerance allows for any usual epsilon, which matters only at the scale of the first record.
            (x_hat, expected, 1e-3),
        )
        if not all(torch.allclose(a.double(), b.double(), rtol=tol, atol=tol) for a, b, tol in checks):
            return None
    except Exception:  # a forward with other arguments is not of this family
        return None
    for offset in (0.0, 1.0):
        if torch.allclose(at_zero, offset * x_hat, rtol=1e-5, atol=1e-5):
            return offset
    return None


__all__ = ["layer_norm", "normalized", "offset_rms_norm", "rms_norm", "rms_norm_offset", "rms_norm_rows"]
