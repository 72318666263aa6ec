"""The registry: which rule computes the per-sample gradients of which type of module.

Opacus's own table, which is looked up by exact type, is the only store. So a rule that is registered here also serves
Opacus's modes "hooks" and "ghost", and a rule that was registered through Opacus is found here.
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
from opacus_ac.grad_sample.rules.convolution import convolution
from opacus_ac.grad_sample.rules.embedding import embedding, is_scaled_lookup
from opacus_ac.grad_sample.rules.embedding_bag import embedding_bag
from opacus_ac.grad_sample.rules.linear import conv1d, is_plain_linear
from opacus_ac.grad_sample.rules.normalization import layer_norm, offset_rms_norm, rms_norm, rms_norm_offset

GradSampler = Callable[[Any, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]
ClassT = TypeVar("ClassT", bound=type[nn.Module])

_DP_RNN = (DPRNN, DPLSTM, DPGRU)

# The rules that Opacus registers itself. A rule for any other type is compared with autograd before it is used.
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
    convolution,
    embedding,
    embedding_bag,
    layer_norm,
    offset_rms_norm,
    rms_norm,
    ste_linear,
)


@dataclass(frozen=True)
class UserRule:
    """A rule of the user, with the settings for its check. It can be called like a grad sampler of Opacus."""

    rule: GradSampler
    probe_input: Callable[[nn.Module], Tensor] | None = None
    constant_buffers: bool = False

    def __call__(self, module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        """Apply the rule."""
        return self.rule(module, activations, backprops)


def sampler_of(module: nn.Module) -> GradSampler | None:
    """Return the sampler for exactly the class of ``module``. With None, Opacus falls back to functorch."""
    sampler: GradSampler | None = GradSampleHooks.GRAD_SAMPLERS.get(written_type(module))
    return sampler


def has_own_trainable(module: nn.Module) -> bool:
    """Say whether the module itself, not a child, has a parameter that requires a gradient."""
    return any(p.requires_grad for p in module.parameters(recurse=False))


def hooked_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules to which Opacus adds its hooks, in its order, with their paths.

    Modules inside a module with trainable parameters of its own and without a sampler get no hooks, because functorch
    runs that module again as a whole.
    """
    own = has_own_trainable(module)
    if own:
        yield path, module
        if sampler_of(module) is None and type(module) not in _DP_RNN:
            return
    for name, child in module.named_children():
        yield from hooked_modules(child, f"{path}.{name}" if path else name)


def is_dp_rnn(module: nn.Module) -> bool:
    """Say whether Opacus hooks the recurrent cells of the module, and not the module itself."""
    return type(module) in _DP_RNN


def _replace(cls: type[nn.Module], rule: GradSampler) -> None:
    """Register a rule of this package. It replaces any rule but one of :func:`register_rule`."""
    present = GradSampleHooks.GRAD_SAMPLERS.get(cls)
    if present is rule or present is ste_linear or isinstance(present, UserRule):
        return
    if present is not None and present is not STOCK.get(cls):
        warnings.warn(
            f"the grad sampler {getattr(present, '__name__', present)!r} registered for {cls.__name__} is replaced "
            f"by {rule.__name__!r}: to keep a rule of your own, pass it to register_rule",
            stacklevel=4,
        )
    register_grad_sampler(cls)(rule)


def _register_fixed_types() -> None:
    _replace(nn.Embedding, embedding)
    _replace(nn.EmbeddingBag, embedding_bag)
    _replace(nn.LayerNorm, layer_norm)
    for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        _replace(cls, convolution)
    # If a model has layers of transformers, their modules are imported already. So they need no import here.
    for source, name, rule in (
        ("transformers.integrations.bitnet", "AutoBitLinear", auto_bitlinear),
        ("transformers.pytorch_utils", "Conv1D", conv1d),
    ):
        found = getattr(sys.modules.get(source), name, None)
        if found is not None:
            _replace(found, rule)


def _recognised(modules: list[nn.Module]) -> GradSampler | None:
    """Return the rule that fits all of these modules of one type, found by tests of their behaviour; else None."""
    if all(is_scaled_lookup(m) for m in modules):
        return embedding
    if all(is_plain_linear(m) for m in modules):
        return STOCK[nn.Linear]
    offsets = {rms_norm_offset(m) for m in modules}
    if offsets == {0.0}:
        return rms_norm
    return offset_rms_norm if offsets == {1.0} else None


def register_rules(model: nn.Module | None = None) -> None:
    """Add the rules of this package to Opacus's table. A second call changes nothing.

    Without a model, these are rules for ``nn.Embedding`` (correct for ``padding_idx``), ``nn.LayerNorm`` (also with
    ``bias=False``), convolutions (any memory format and padding mode) and, if transformers is imported,
    ``AutoBitLinear`` and ``Conv1D``. With a model, rules for the types of RMSNorm and scaled embedding in it are added.
    They are recognised by a numerical test, not by name. Apart from the types above, a type that has a rule keeps it.

    Args:
        model: the model that will be made private.

    Guarantees:
        A type that no rule fits uses Opacus's functorch path, which is exact, or is refused by ``check_model``.
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
    """Register your own linear layer with quantised weights and a straight-through gradient, such as a BitLinear.

    The rule runs the layer's forward again and finds its one call of ``F.linear``, so it needs to know nothing about
    the quantisation. The layer must pass the gradient of the quantised weight to the weight unchanged, which is checked
    in the backward pass. The function can also be used as a decorator.

    Args:
        cls: a module class with ``weight`` and optionally ``bias``, whose forward takes one tensor.

    Returns:
        ``cls``.

    Raises:
        TypeError: If ``cls`` is not a module class.

    Example:
        >>> import torch
        >>> class HalfPrecisionLinear(torch.nn.Linear):
        ...     def forward(self, x):
        ...         w = self.weight
        ...         return torch.nn.functional.linear(x, w + (w.half().to(w) - w).detach(), self.bias)
        >>> register_ste_linear(HalfPrecisionLinear).__name__
        'HalfPrecisionLinear'
    """
    require_module_class(cls)
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

    ``check_model`` compares the rule with autograd on every model that has such a module, if it can make an input.

    Args:
        cls: the module class.
        rule: ``(module, [input], backprops) -> {parameter: [B, *parameter.shape]}``, for the module's own trainable
            parameters only.
        probe_input: returns three different records ``[3, ...]`` for a module. It is needed if the class is not like a
            linear layer, an embedding or a normalisation layer.
        constant_buffers: whether, by your word, the module's buffers are constants and not statistics of the data.

    Raises:
        TypeError: If ``cls`` is not a module class, or ``rule`` is not callable.
    """
    require_module_class(cls)
    if not callable(rule):
        raise TypeError(f"rule must be callable, not {type(rule).__name__}")
    register_grad_sampler(cls)(UserRule(rule, probe_input, constant_buffers))


def require_module_class(cls: object) -> None:
    """Raise TypeError unless ``cls`` is a class of modules."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"expected a subclass of torch.nn.Module, not {cls!r}")
