"""Ternary linear layers: straight-through estimators around one matrix product.

With a straight-through estimator the weight gradient is an outer product of *quantised* inputs with the gradient at
the output of the matrix product. ``nn.Linear``'s rule, which takes the layer's own input and output, is therefore
silently wrong for such a layer.

References:
    arXiv 2402.17764 (BitNet b1.58); arXiv 1308.3432 (straight-through estimators).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opacus_ac.grad_sample.module_replay import call_forward
from opacus_ac.grad_sample.rules.linear import outer_products, sum_positions


class Factors(NamedTuple):
    """The two sides of a dense layer's weight gradient, sum_t backprop_t (x) input_t."""

    inputs: Tensor
    """``[B, ..., in]``: what the matrix product was fed, in the type of ``backprops``."""
    backprops: Tensor
    """``[B, ..., out]``: the gradient at the output of the matrix product."""


def _dense_grads(module: nn.Module, factors: Factors) -> dict[nn.Parameter, Tensor]:
    grads: dict[nn.Parameter, Tensor] = {}
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is not None and weight.requires_grad:
        grads[weight] = outer_products(factors.backprops, factors.inputs)
    if bias is not None and bias.requires_grad:
        grads[bias] = sum_positions(factors.backprops)
    return grads


class QuantizedInputs:
    """The quantised form of the last input: the projections of one input share it, and its memory."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Let go of the tensors."""
        self._key: tuple[Any, ...] | None = None
        self._held: tuple[Tensor, Tensor] | None = None

    def get(self, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        """``quantize(x)``, computed once for tensors that share memory, shape and version."""
        key = (x.data_ptr(), x._version, tuple(x.shape), x.stride(), x.dtype)
        if self._held is None or self._key != key:
            self._key, self._held = key, (x, quantize(x))
        return self._held[1]


@torch.no_grad()
def auto_bitlinear_factors(module: Any, x: Tensor, backprops: Tensor, shared: QuantizedInputs | None = None) -> Factors:
    """Factors of ``transformers``' ``AutoBitLinear``, online or offline, with or without its inner norm.

    Args:
        module: the layer.
        x: its input ``[B, ..., in]``.
        backprops: the gradient at its output ``[B, ..., out]``.
        shared: quantised inputs of the layers before, for layers that share an input.

    Returns:
        The dequantised activations (codes over their per-token scale) and the gradient before ``weight_scale``.
    """
    from transformers.integrations.bitnet import ActQuant

    z = x if module.rms_norm is None else call_forward(module.rms_norm, x)
    quantize: Callable[[Tensor], Tensor] = ActQuant.apply
    inputs = quantize(z) if shared is None else shared.get(z, quantize)
    if not module.online_quant:
        backprops = backprops * module.weight_scale
    return Factors(inputs.to(backprops.dtype), backprops)


def auto_bitlinear(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-sample gradients of ``transformers.integrations.bitnet.AutoBitLinear``.

    The inner norm, where there is one, is a module of its own with its own rule and is not returned here.

    Args:
        module: the layer.
        activations: one tensor ``[B, ..., in]``.
        backprops: ``[B, ..., out]``.

    Returns:
        ``[B, out, in]`` for the weight, ``[B, out]`` for the bias, trainable ones only.
    """
    return _dense_grads(module, auto_bitlinear_factors(module, activations[0], backprops))


class _Product(NamedTuple):
    """One recorded call of ``F.linear``."""

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    output: Tensor


class _RecordLinear(TorchFunctionMode):
    """Notes every ``F.linear`` that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[_Product] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.linear:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            self.products.append(_Product(named["input"], named["weight"], named.get("bias"), output))
        return output


class _Replay(NamedTuple):
    product: _Product
    output: Tensor


def _refuse(module: nn.Module, reason: str) -> ValueError:
    name = type(module).__name__
    return ValueError(
        f"{name} is not a straight-through linear layer: {reason}. "
        f"Write a rule for it and pass it to register_rule({name}, rule), or freeze the layer"
    )


def _replay(module: nn.Module, x: Tensor, dtype: torch.dtype) -> _Replay:
    """Run the layer's forward again with a graph, and find its one matrix product."""
    for attempt in (False, True):
        # Under autocast the output was in the low type; outside of it, as in a backward pass, it has to be asked for.
        autocast: AbstractContextManager[Any] = torch.autocast(x.device.type, dtype=dtype) if attempt else nullcontext()
        with torch.enable_grad(), autocast, _RecordLinear() as recorder:
            output = call_forward(module, x)
        if output.dtype == dtype or dtype not in (torch.bfloat16, torch.float16):
            break
    if len(recorder.products) != 1:
        raise _refuse(module, f"its forward calls F.linear {len(recorder.products)} times, not once")
    return _Replay(recorder.products[0], output)


_DENSE = ("weight", "bias")

# Layers whose structure has been looked at; what may change from step to step is checked at every call.
_STRUCTURE_CHECKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _check_parameters(module: nn.Module, product: _Product) -> None:
    extra = [n for n, p in module._parameters.items() if p is not None and p.requires_grad and n not in _DENSE]
    if extra:
        raise _refuse(module, f"it has trainable parameters besides weight and bias ({', '.join(extra)})")
    bias = module._parameters.get("bias")
    if bias is not None and bias.requires_grad and product.bias is not bias:
        raise _refuse(module, "its bias is not the bias argument of F.linear")


def _same(got: Tensor, want: Tensor) -> bool:
    """Equal entry by entry up to a cast, so that one masked entry among millions is seen."""
    return bool(((got - want).abs() <= 4 * torch.finfo(got.dtype).eps * want.abs()).all())


def _close(got: Tensor, want: Tensor) -> bool:
    """Equal up to the order of a long sum."""
    slack = min(max(1e3 * torch.finfo(want.dtype).eps, 1e-9), 0.05)
    return bool((got - want).abs().max() <= slack * want.abs().max())


def _check_identity(module: nn.Module, product: _Product, cotangent: Tensor) -> None:
    """The weight path must hand a gradient back unchanged."""
    weight = module._parameters["weight"]
    assert weight is not None
    same: tuple[Tensor | None, ...] = (cotangent,)
    if product.weight is not weight:
        if not product.weight.requires_grad:
            raise _refuse(module, "its weight does not reach F.linear differentiably")
        cotangent = cotangent.to(product.weight.dtype)
        same = torch.autograd.grad(product.weight, weight, cotangent, retain_graph=True, allow_unused=True)
    if same[0] is None or not _same(same[0], cotangent.to(same[0].dtype)):
        raise _refuse(module, "the gradient does not pass unchanged from the quantised weight to the weight")


def _check_structure(module: nn.Module, replay: _Replay, backprops: Tensor, total: Tensor) -> None:
    """Once per layer: the weight acts through the one product only."""
    weight = module._parameters["weight"]
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    _check_identity(module, replay.product, torch.randn(weight.shape, generator=generator).to(total))
    whole = torch.autograd.grad(replay.output, weight, backprops, retain_graph=True)[0]
    if not _close(total.to(whole.dtype), whole):
        raise _refuse(module, "its weight acts on the output by another way than the one F.linear")


def ste_linear_factors(module: nn.Module, x: Tensor, backprops: Tensor) -> Factors:
    """Factors of a hand-written straight-through linear layer, found by running its forward again.

    Args:
        module: the layer; its forward takes one tensor and calls ``F.linear`` exactly once.
        x: its input ``[B, ..., in]``.
        backprops: the gradient at its output ``[B, ..., out]``.

    Raises:
        ValueError: where the layer is no straight-through linear layer. The weight path is checked at every call
            against the gradient at hand, because a clipping mask may set in only after some steps.
    """
    replay = _replay(module, x.detach(), backprops.dtype)
    _check_parameters(module, replay.product)
    factors, backprops = _factors_of(replay, backprops)
    weight = module._parameters.get("weight")
    if weight is not None and weight.requires_grad:
        _check_weight_path(module, replay, factors, x.detach(), backprops)
    return factors


def _factors_of(replay: _Replay, backprops: Tensor) -> tuple[Factors, Tensor]:
    """Factors of a layer that was run again, and ``backprops`` in the type of its output."""
    backprops = backprops.to(replay.output.dtype)
    # retain_graph: the checks walk the same graph once more; it dies with their caller.
    at_product = torch.autograd.grad(replay.output, replay.product.output, backprops, retain_graph=True)[0]
    return Factors(replay.product.inputs.detach().to(at_product.dtype), at_product), backprops


_ORDINARY = 1e15
"""Products of inputs and gradients beyond this say nothing about a layer: sums of them overflow, or drown all
others."""


def _ordinary_records(factors: Factors) -> Tensor:
    """Which records the layer can be judged by ``[B]``: what one record holds must not stop the run of all others."""
    if factors.inputs.shape[0] == 0:
        return torch.zeros(0, dtype=torch.bool, device=factors.inputs.device)
    inputs, backprops = (part.detach().abs().flatten(1).amax(1).double() for part in factors)
    return inputs * backprops < _ORDINARY  # False for NaN, and for what became infinite


def _check_weight_path(module: nn.Module, replay: _Replay, factors: Factors, x: Tensor, backprops: Tensor) -> None:
    """Compare what the factors say with autograd, on the records that are not poisonous."""
    ordinary = _ordinary_records(factors)
    if not bool(ordinary.any()):
        return
    if not bool(ordinary.all()):
        x, backprops = x[ordinary], backprops[ordinary]
        replay = _replay(module, x, backprops.dtype)
        factors, backprops = _factors_of(replay, backprops)
    flat_b, flat_a = (part.reshape(-1, part.shape[-1]) for part in (factors.backprops, factors.inputs))
    total = flat_b.T @ flat_a
    if module not in _STRUCTURE_CHECKED:
        _check_structure(module, replay, backprops, total)
        _STRUCTURE_CHECKED.add(module)
    _check_identity(module, replay.product, total)


def ste_linear(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-sample gradients of a hand-written straight-through linear layer.

    Args:
        module: a layer with parameters ``weight`` (and ``bias``) whose forward calls ``F.linear`` once.
        activations: one tensor ``[B, ..., in]``.
        backprops: ``[B, ..., out]``.

    Returns:
        ``[B, out, in]`` for the weight, ``[B, out]`` for the bias, trainable ones only.

    Raises:
        ValueError: as :func:`ste_linear_factors`.
    """
    return _dense_grads(module, ste_linear_factors(module, activations[0], backprops))
