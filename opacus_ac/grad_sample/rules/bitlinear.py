"""Linear layers with quantised weights (ternary, say) and a straight-through gradient.

With a straight-through estimator, the weight gradient is an outer product of the *quantised* inputs with the gradient
at the output of the matrix product. The rule of ``nn.Linear`` uses the layer's own input and output, and is wrong for
such a layer, without an error.

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

from opacus_ac.grad_sample.late_checks import LateChecks
from opacus_ac.grad_sample.module_replay import call_forward
from opacus_ac.grad_sample.rules.linear import outer_products, sum_positions


class Factors(NamedTuple):
    """The two factors of a dense layer's weight gradient, sum_t backprop_t (x) input_t."""

    inputs: Tensor
    """Input of the matrix product ``[B, ..., in]``, in the type of ``backprops``."""
    backprops: Tensor
    """Gradient at the output of the matrix product, ``[B, ..., out]``."""


def _dense_grads(module: nn.Module, factors: Factors) -> dict[nn.Parameter, Tensor]:
    grads: dict[nn.Parameter, Tensor] = {}
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is not None and weight.requires_grad:
        grads[weight] = outer_products(factors.backprops, factors.inputs)
    if bias is not None and bias.requires_grad:
        grads[bias] = sum_positions(factors.backprops)
    return grads


class QuantizedInputs:
    """Holds the quantised or rounded form of the last input, which the projections of that input share."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the tensors."""
        self._key: tuple[Any, ...] | None = None
        self._held: tuple[Tensor, Tensor] | None = None

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``x`` in another type, as autocast rounds the input of a product."""
        return x if x.dtype == dtype else self.get(x, lambda values: values.to(dtype), dtype)

    def get(self, x: Tensor, quantize: Callable[[Tensor], Tensor], kind: object = None) -> Tensor:
        """Return ``quantize(x)``, computed once for tensors with the same memory, shape and version, and one kind."""
        key = (x.data_ptr(), x._version, tuple(x.shape), x.stride(), x.dtype, kind)
        if self._held is None or self._key != key:
            self._key, self._held = key, (x, quantize(x))
        return self._held[1]


@torch.no_grad()
def auto_bitlinear_factors(module: Any, x: Tensor, backprops: Tensor, shared: QuantizedInputs | None = None) -> Factors:
    """Return the factors of an ``AutoBitLinear`` of transformers, online or offline, with or without its inner norm.

    Args:
        module: the layer.
        x: its input ``[B, ..., in]``.
        backprops: the gradient at its output ``[B, ..., out]``.
        shared: quantised inputs of the layers before, for layers with the same input.

    Returns:
        The quantised activations (codes divided by the scale of their token) and the gradient before ``weight_scale``.
    """
    from transformers.integrations.bitnet import ActQuant

    z = x if module.rms_norm is None else call_forward(module.rms_norm, x)
    quantize: Callable[[Tensor], Tensor] = ActQuant.apply
    inputs = quantize(z) if shared is None else shared.get(z, quantize)
    if not module.online_quant:
        backprops = backprops * module.weight_scale
    return Factors(inputs.to(backprops.dtype), backprops)


def auto_bitlinear(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return per-sample gradients of ``transformers.integrations.bitnet.AutoBitLinear``.

    An inner norm is a module with a rule of its own. Its gradients are not returned here.

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
    """Notes every call of ``F.linear`` in its context."""

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
        # Under autocast the output had the lower precision. The backward pass is outside of that context.
        autocast: AbstractContextManager[Any] = torch.autocast(x.device.type, dtype=dtype) if attempt else nullcontext()
        with torch.enable_grad(), autocast, _RecordLinear() as recorder:
            output = call_forward(module, x)
        if output.dtype == dtype or dtype not in (torch.bfloat16, torch.float16):
            break
    if len(recorder.products) != 1:
        raise _refuse(module, f"its forward calls F.linear {len(recorder.products)} times, not once")
    return _Replay(recorder.products[0], output)


_DENSE = ("weight", "bias")

# Layers whose structure has been checked. Properties that may change from step to step are checked at every call.
_STRUCTURE_CHECKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _check_parameters(module: nn.Module, product: _Product) -> None:
    extra = [n for n, p in module._parameters.items() if p is not None and p.requires_grad and n not in _DENSE]
    if extra:
        raise _refuse(module, f"it has trainable parameters besides weight and bias ({', '.join(extra)})")
    bias = module._parameters.get("bias")
    if bias is not None and bias.requires_grad and product.bias is not bias:
        raise _refuse(module, "its bias is not the bias argument of F.linear")


def _same(got: Tensor, want: Tensor) -> Tensor:
    """Return whether all entries are equal up to a cast, so that one masked entry among millions is found."""
    return ((got - want).abs() <= 4 * torch.finfo(got.dtype).eps * want.abs()).all()


def _close(got: Tensor, want: Tensor) -> bool:
    """Say whether two tensors are equal up to the rounding of a long sum."""
    slack = min(max(1e3 * torch.finfo(want.dtype).eps, 1e-9), 0.05)
    return bool((got - want).abs().max() <= slack * want.abs().max())


def _check_identity(module: nn.Module, product: _Product, cotangent: Tensor, late: LateChecks) -> None:
    """Check that the gradient of the quantised weight reaches the weight unchanged."""
    reason = "the gradient does not pass unchanged from the quantised weight to the weight"
    weight = module._parameters["weight"]
    assert weight is not None
    same: tuple[Tensor | None, ...] = (cotangent,)
    if product.weight is not weight:
        if not product.weight.requires_grad:
            raise _refuse(module, "its weight does not reach F.linear differentiably")
        cotangent = cotangent.to(product.weight.dtype)
        same = torch.autograd.grad(product.weight, weight, cotangent, retain_graph=True, allow_unused=True)
    if same[0] is None:
        raise _refuse(module, reason)
    late.note(_same(same[0], cotangent.to(same[0].dtype)), lambda: _refuse(module, reason))


def _check_structure(module: nn.Module, replay: _Replay, backprops: Tensor, total: Tensor) -> None:
    """Check, once per layer and at once, that the weight acts on the output only through the one product."""
    weight = module._parameters["weight"]
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    checks = LateChecks()
    _check_identity(module, replay.product, torch.randn(weight.shape, generator=generator).to(total), checks)
    _check_identity(module, replay.product, total, checks)
    checks.verify()
    whole = torch.autograd.grad(replay.output, weight, backprops, retain_graph=True)[0]
    if not _close(total.to(whole.dtype), whole):
        raise _refuse(module, "its weight acts on the output by another way than the one F.linear")


def ste_linear_factors(module: nn.Module, x: Tensor, backprops: Tensor, late: LateChecks | None = None) -> Factors:
    """Return the factors of a user's straight-through linear layer, from a second run of its forward.

    Args:
        module: the layer. Its forward takes one tensor and calls ``F.linear`` exactly once.
        x: its input ``[B, ..., in]``.
        backprops: the gradient at its output ``[B, ..., out]``.
        late: takes checks whose outcomes need not be known at once; None to look at all of them.

    Raises:
        ValueError: If the layer is not a straight-through linear layer. The path to the weight is checked at every
            call, because a mask that clips weights may appear only after some steps.
    """
    replay = _replay(module, x.detach(), backprops.dtype)
    _check_parameters(module, replay.product)
    factors, backprops = _factors_of(replay, backprops)
    weight = module._parameters.get("weight")
    if weight is not None and weight.requires_grad:
        checks = LateChecks() if late is None else late
        _check_weight_path(module, replay, factors, x.detach(), backprops, checks)
        if late is None:
            checks.verify()
    return factors


def _factors_of(replay: _Replay, backprops: Tensor) -> tuple[Factors, Tensor]:
    """Return the factors of a layer from its second run, and ``backprops`` in the type of its output."""
    backprops = backprops.to(replay.output.dtype)
    # The checks use the same graph again, so it is retained.
    at_product = torch.autograd.grad(replay.output, replay.product.output, backprops, retain_graph=True)[0]
    return Factors(replay.product.inputs.detach().to(at_product.dtype), at_product), backprops


_ORDINARY = 1e15
"""Size of products of inputs and gradients beyond which a record is left out of the check: their sums may overflow."""


def _ordinary_records(factors: Factors) -> Tensor:
    """Return which records the check can use, ``[B]``. Extreme values of one record must not stop the run."""
    if factors.inputs.shape[0] == 0:
        return torch.zeros(0, dtype=torch.bool, device=factors.inputs.device)
    inputs, backprops = (part.detach().abs().flatten(1).amax(1).double() for part in factors)
    return inputs * backprops < _ORDINARY  # False for NaN and infinity


def _check_weight_path(
    module: nn.Module, replay: _Replay, factors: Factors, x: Tensor, backprops: Tensor, late: LateChecks
) -> None:
    """Compare the factors with autograd, for records without extreme values."""
    ordinary = _ordinary_records(factors)
    if module in _STRUCTURE_CHECKED:
        shape = (-1,) + (1,) * (factors.inputs.dim() - 1)
        zeroed = Factors(*(part.masked_fill(~ordinary.view(shape), 0) for part in factors))
        _check_identity(module, replay.product, _total(zeroed), late)
        return
    if not bool(ordinary.any()):
        return
    if not bool(ordinary.all()):
        x, backprops = x[ordinary], backprops[ordinary]
        replay = _replay(module, x, backprops.dtype)
        factors, backprops = _factors_of(replay, backprops)
    _check_structure(module, replay, backprops, _total(factors))
    _STRUCTURE_CHECKED.add(module)


def _total(factors: Factors) -> Tensor:
    """Return the weight gradient of the batch, ``[out, in]``."""
    inputs, backprops = (part.reshape(-1, part.shape[-1]) for part in factors)
    return backprops.T @ inputs


def ste_linear(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return per-sample gradients of a user's straight-through linear layer.

    Args:
        module: a layer with parameters ``weight`` (and ``bias``) whose forward calls ``F.linear`` once.
        activations: one tensor ``[B, ..., in]``.
        backprops: ``[B, ..., out]``.

    Returns:
        ``[B, out, in]`` for the weight, ``[B, out]`` for the bias, trainable ones only.

    Raises:
        ValueError: If the layer is not a straight-through linear layer (see :func:`ste_linear_factors`).
    """
    return _dense_grads(module, ste_linear_factors(module, activations[0], backprops))
