"""Which rule computes the per-sample gradients of which module type.

Opacus's own table, looked up by exact type, is the only store: a rule registered here serves Opacus's modes "hooks"
and "ghost" too, and whatever was registered through Opacus is seen here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from opacus.grad_sample import conv as _conv
from opacus.grad_sample import dp_multihead_attention as _attention
from opacus.grad_sample import dp_rnn as _rnn
from opacus.grad_sample import embedding as _embedding
from opacus.grad_sample import group_norm as _group_norm
from opacus.grad_sample import instance_norm as _instance_norm
from opacus.grad_sample import layer_norm as _layer_norm
from opacus.grad_sample import linear as _linear
from opacus.grad_sample import rms_norm as _rms_norm
from opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN
from torch import Tensor, nn

from opacus_ac.grad_sample.module_replay import written_type
from opacus_ac.grad_sample.rules.bitlinear import auto_bitlinear, ste_linear
from opacus_ac.grad_sample.rules.embedding import embedding, is_scaled_lookup
from opacus_ac.grad_sample.rules.linear import conv1d
from opacus_ac.grad_sample.rules.normalization import layer_norm, offset_rms_norm, rms_norm, rms_norm_offset

GradSampler = Callable[[Any, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]
ClassT = TypeVar("ClassT", bound=type[nn.Module])

_DP_RNN = (DPRNN, DPLSTM, DPGRU)

# What Opacus itself registers. A pair outside of this table has to prove itself by a probe.
STOCK: dict[type[nn.Module], GradSampler] = {
    nn.Linear: _linear.compute_linear_grad_sample,
    nn.Embedding: _embedding.compute_embedding_grad_sample,
    nn.EmbeddingBag: _embedding.compute_embeddingbag_gradsampler,
    nn.Conv1d: _conv.compute_conv_grad_sample,
    nn.Conv2d: _conv.compute_conv_grad_sample,
    nn.Conv3d: _conv.compute_conv_grad_sample,
    nn.LayerNorm: _layer_norm.compute_layer_norm_grad_sample,
    nn.GroupNorm: _group_norm.compute_group_norm_grad_sample,
    nn.InstanceNorm1d: _instance_norm.compute_instance_norm_grad_sample,
    nn.InstanceNorm2d: _instance_norm.compute_instance_norm_grad_sample,
    nn.InstanceNorm3d: _instance_norm.compute_instance_norm_grad_sample,
    nn.RMSNorm: _rms_norm.compute_rms_norm_grad_sample,
    _rnn.RNNLinear: _rnn.compute_rnn_linear_grad_sample,
    _attention.SequenceBias: _attention.compute_sequence_bias_grad_sample,
}

OWN_RULES: tuple[GradSampler, ...] = (
    auto_bitlinear,
    conv1d,
    embedding,
    layer_norm,
    offset_rms_norm,
    rms_norm,
    ste_linear,
)


@dataclass(frozen=True)
class UserRule:
    """A rule that the user wrote, with what the check needs to know about it. Callable as a grad sampler."""

    rule: GradSampler
    probe_input: Callable[[nn.Module], Tensor] | None = None
    constant_buffers: bool = False

    def __call__(self, module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        """Apply the rule."""
        return self.rule(module, activations, backprops)


def sampler_of(module: nn.Module) -> GradSampler | None:
    """The sampler registered for exactly the class of ``module``; None means that Opacus falls back to functorch."""
    sampler: GradSampler | None = GradSampleHooks.GRAD_SAMPLERS.get(written_type(module))
    return sampler


def has_own_trainable(module: nn.Module) -> bool:
    """Whether the module itself, not a child, holds a parameter that requires a gradient."""
    return any(p.requires_grad for p in module.parameters(recurse=False))


def hooked_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that Opacus hangs its hooks on, in its order, with their paths.

    Below a module with trainable parameters of its own and without a sampler nothing is hooked: functorch replays it
    as a whole.
    """
    own = has_own_trainable(module)
    if own:
        yield path, module
        if sampler_of(module) is None and type(module) not in _DP_RNN:
            return
    for name, child in module.named_children():
        yield from hooked_modules(child, f"{path}.{name}" if path else name)


def is_dp_rnn(module: nn.Module) -> bool:
    """Whether Opacus treats the module through its recurrent cells and not by hooks of its own."""
    return type(module) in _DP_RNN


def _replace(cls: type[nn.Module], rule: GradSampler) -> None:
    """Register a rule of this package, over Opacus's own and over strangers, never over ``register_rule``."""
    present = GradSampleHooks.GRAD_SAMPLERS.get(cls)
    if present is rule or present is ste_linear or isinstance(present, UserRule):
        return
    if present is not None and present is not STOCK.get(cls):
        warnings.warn(
            f"the grad sampler {getattr(present, '__name__', present)!r} registered for {cls.__name__} is replaced "
            f"by {rule.__name__!r}; to keep a rule of your own, pass it to register_rule",
            stacklevel=4,
        )
    register_grad_sampler(cls)(rule)


def _register_fixed_types() -> None:
    _replace(nn.Embedding, embedding)
    _replace(nn.LayerNorm, layer_norm)
    # A model made of transformers' layers exists only once their modules are imported: no need to import them here.
    for source, name, rule in (
        ("transformers.integrations.bitnet", "AutoBitLinear", auto_bitlinear),
        ("transformers.pytorch_utils", "Conv1D", conv1d),
    ):
        cls = getattr(sys.modules.get(source), name, None)
        if cls is not None:
            _replace(cls, rule)


def _recognised(modules: list[nn.Module]) -> GradSampler | None:
    """The rule that fits every one of these modules of one type, found by probing their behaviour."""
    if all(is_scaled_lookup(m) for m in modules):
        return embedding
    offsets = {rms_norm_offset(m) for m in modules}
    if offsets == {0.0}:
        return rms_norm
    return offset_rms_norm if offsets == {1.0} else None


def register_rules(model: nn.Module | None = None) -> None:
    """Fill Opacus's table with the rules of this package. Explicit and idempotent; importing registers nothing.

    Without a model: ``nn.Embedding`` (corrected for ``padding_idx``), ``nn.LayerNorm`` (``bias=False`` allowed) and,
    if transformers is imported, ``AutoBitLinear`` and ``Conv1D``. With a model also the RMSNorm and scaled-embedding
    types found in it; these are recognised by a numerical probe, not by name. Types with a sampler are left as they
    are, apart from those four.

    Args:
        model: the model about to be made private.

    Guarantees:
        A type that no rule fits keeps Opacus's functorch path, which is exact, or is refused by ``check_model``.
    """
    _register_fixed_types()
    found: dict[type[nn.Module], list[nn.Module]] = {}
    for module in model.modules() if model is not None else ():
        if has_own_trainable(module) and sampler_of(module) is None:
            found.setdefault(written_type(module), []).append(module)
    for cls, modules in found.items():
        rule = _recognised(modules)
        if rule is not None:
            register_grad_sampler(cls)(rule)


def register_ste_linear(cls: ClassT) -> ClassT:
    """Register a hand-written straight-through linear layer (a BitLinear, say). Also usable as a decorator.

    The rule runs the layer's forward again and finds its one ``F.linear`` call; nothing about the quantisers has to
    be told. The layer must hand weight gradients through unchanged; this is verified in the backward pass.

    Args:
        cls: a module class with ``weight`` and optionally ``bias``, whose forward takes one tensor.

    Returns:
        ``cls``.

    Raises:
        TypeError: ``cls`` is no module class.

    Example:
        >>> import torch
        >>> class HalfPrecisionLinear(torch.nn.Linear):
        ...     def forward(self, x):
        ...         w = self.weight
        ...         return torch.nn.functional.linear(x, w + (w.half().to(w) - w).detach(), self.bias)
        >>> register_ste_linear(HalfPrecisionLinear).__name__
        'HalfPrecisionLinear'
    """
    _require_module_class(cls)
    register_grad_sampler(cls)(ste_linear)
    return cls


def register_rule(
    cls: type[nn.Module],
    rule: GradSampler,
    *,
    probe_input: Callable[[nn.Module], Tensor] | None = None,
    constant_buffers: bool = False,
) -> None:
    """Register a rule of your own for exactly the class ``cls``.

    ``check_model`` compares it with autograd on every model that has such a module, wherever it can make an input.

    Args:
        cls: the module class.
        rule: ``(module, [input], backprops) -> {parameter: [B, *parameter.shape]}``, trainable own parameters only.
        probe_input: makes a batch of three different records ``[3, ...]`` for a module; needed where the class is
            neither linear-like, an embedding nor a normalisation.
        constant_buffers: the rule vouches that the module's buffers are constants, not statistics of the data.

    Raises:
        TypeError: ``cls`` is no module class or ``rule`` is not callable.
    """
    _require_module_class(cls)
    if not callable(rule):
        raise TypeError(f"rule must be callable, not {type(rule).__name__}")
    register_grad_sampler(cls)(UserRule(rule, probe_input, constant_buffers))


def _require_module_class(cls: object) -> None:
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"expected a subclass of torch.nn.Module, not {cls!r}")
