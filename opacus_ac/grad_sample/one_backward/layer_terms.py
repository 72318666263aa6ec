"""Terms of the parameters' gradients, from one use of a module and the gradient at its output.

Rules are registered in one place only, the table of grad samplers. If the rule of a module is of a family whose
gradients are sums of outer products, the terms of the family are used instead of it. Any other rule is called for its
rows. A module without a rule is run again record by record, and its output is compared with that of the first run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.module_replay import written_type
from opacus_ac.grad_sample.one_backward.bounds import wide
from opacus_ac.grad_sample.one_backward.experts import expert_of_rows, holds_own_experts, is_experts, mixtures
from opacus_ac.grad_sample.one_backward.outer_products import Rows, Term
from opacus_ac.grad_sample.one_backward.replay import replayed_rows
from opacus_ac.grad_sample.one_backward.replayed_lookup import replayed_lookup
from opacus_ac.grad_sample.one_backward.routed import Routed
from opacus_ac.grad_sample.one_backward.use import Tracked, Use
from opacus_ac.grad_sample.registry import STOCK, GradSampler, sampler_of
from opacus_ac.grad_sample.rules.bitlinear import (
    QuantizedInputs,
    auto_bitlinear,
    auto_bitlinear_factors,
    ste_linear,
    ste_linear_factors,
)
from opacus_ac.grad_sample.rules.embedding import embedding, ids_by_record, lookup_terms
from opacus_ac.grad_sample.rules.embedding_bag import bag_terms, bags_of, embedding_bag
from opacus_ac.grad_sample.rules.linear import conv1d, dense_terms
from opacus_ac.grad_sample.rules.normalization import offset_rms_norm, rms_norm, rms_norm_rows

Terms = Sequence[tuple[nn.Parameter, Term | Routed]]
TermRule = Callable[[Use, tuple[Tensor, ...], Tensor], Terms]


def _linear(shared: QuantizedInputs, *, transposed: bool = False) -> TermRule:
    def rule(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
        inputs = shared.rounded(tensors[0], backprops.dtype)
        return dense_terms(use.module, inputs, backprops, transposed=transposed)

    return rule


def _lookup(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    return lookup_terms(use.module, ids_by_record(tensors[0], backprops), backprops)


def _bag(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    args, kwargs = use.call.arguments(tensors)
    assert isinstance(use.module, nn.EmbeddingBag)
    kwargs = {name.replace("input", "ids"): value for name, value in kwargs.items()}
    return bag_terms(use.module, bags_of(use.module, *args, **kwargs), backprops)


def _ste_linear(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    factors = ste_linear_factors(use.module, tensors[0], backprops, use.late)
    return dense_terms(use.module, factors.inputs, factors.backprops)


def _rms_norm(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    weight = use.module._parameters["weight"]
    rows = rms_norm_rows(use.module, tensors[0], backprops)
    if weight is None or rows is None:
        return _rows_of(sampler_of(use.module) or rms_norm)(use, tensors, backprops)
    return [(weight, Rows(rows))]


def _auto_bitlinear(shared: QuantizedInputs) -> TermRule:
    def rule(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
        factors = auto_bitlinear_factors(use.module, tensors[0], backprops, shared)
        return dense_terms(use.module, factors.inputs, factors.backprops)

    return rule


def _rows_of(sampler: GradSampler) -> TermRule:
    def rule(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
        rows = sampler(use.module, list(tensors), wide(backprops))
        return [(parameter, Rows(values)) for parameter, values in rows.items()]

    return rule


def _routed(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    """Return the terms of a product with the stacked weights of experts. Its rows ``[S, ...]`` are sorted by expert."""
    product, (inputs, tokens) = use.product, tensors
    assert product is not None
    assert use.flattened is not None
    batch, records = use.flattened[0], tokens // use.flattened[1]
    terms: list[tuple[nn.Parameter, Term | Routed]] = []
    weight = use.module._parameters[product.weight]
    if weight is not None and weight.requires_grad:
        inputs = inputs.to(backprops.dtype)  # as the product under autocast rounded it
        sides = (inputs, backprops) if use.module.is_transposed else (backprops, inputs)
        terms.append((weight, Routed(*sides, records, product.counts, batch)))
    bias = None if product.bias is None else use.module._parameters[product.bias]
    if bias is not None and bias.requires_grad:
        experts, count = expert_of_rows(product.counts, records.device), len(product.counts)
        rows = torch.zeros(batch * count, bias.shape[1], dtype=wide(backprops).dtype, device=records.device)
        rows.index_add_(0, records * count + experts, wide(backprops))
        terms.append((bias, Rows(rows.view(batch, *bias.shape))))
    return terms


def replays_lookup(module: nn.Module) -> bool:
    """Say whether the module is an embedding with a forward of its own and without a registered rule."""
    return isinstance(module, nn.Embedding) and sampler_of(module) is None


def _containers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the containers in a module whose parameters only its own forward can use, because they are never called."""
    for child in module.children():
        if isinstance(child, nn.ParameterDict | nn.ParameterList):
            yield child
        elif type(child) in (nn.ModuleDict, nn.ModuleList):
            yield from _containers(child)


def own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that a module's own forward uses: its own, and those in its containers of parameters."""
    yield from module.parameters(recurse=False)
    for container in _containers(module):
        yield from container.parameters()


def _owns_trainable(module: nn.Module) -> bool:
    return any(p.requires_grad for p in own_parameters(module))


def delegates(module: nn.Module) -> bool:
    """Say whether layers inside the module hold all of its trainable parameters, such as the tied bias of a head.

    The gradients are then computed in these layers. If the module's own forward uses such a parameter, the parameter
    gets an ordinary gradient, and the step is refused.
    """
    own = [p for p in own_parameters(module) if p.requires_grad]
    outside = {id(module), *(id(container) for container in _containers(module))}
    layers = (inner for inner in module.modules() if own and id(inner) not in outside)
    inside = {id(p) for layer in layers for p in own_parameters(layer)}
    return bool(own) and all(id(p) in inside for p in own)


def computes_with_parts(module: nn.Module) -> bool:
    """Say whether a module is a layer of peft that computes with the parameters of its parts, not only by calling them.

    Plain LoRA and tuned norms call every trained part, which then has a rule of its own. Variants (DoRA), factors
    that are multiplied into a weight, and parts without a rule need the whole layer.
    """
    tuners, lora = (sys.modules.get(f"peft.tuners.{name}") for name in ("tuners_utils", "lora.layer"))
    if tuners is None or lora is None:
        return False
    tokens = getattr(sys.modules["peft.utils.other"], "TrainableTokensWrapper", ())  # younger than peft's adapters
    if not isinstance(module, (tuners.BaseTunerLayer, tokens)) or not any(p.requires_grad for p in module.parameters()):
        return False
    if isinstance(module, tokens):
        return True
    parts = [part for part in module.modules() if part is not module and _owns_trainable(part)]
    if any(sampler_of(part) is None and not replays_lookup(part) and not is_experts(part) for part in parts):
        return True
    if isinstance(module, lora.LoraLayer):
        merging = tuple(getattr(lora, name, ()) for name in ("ParamWrapper", "MultiheadAttention"))
        return bool(getattr(module, "lora_variant", None)) or isinstance(module, merging)
    return not hasattr(module, "ln_tuning_layers")


# In the source of these classes, some layers get the states [B, T, d] as [B T, d], record after record.
_FLATTENING = {("transformers.models.opt.modeling_opt", "OPTDecoderLayer")}


# In the source of these classes, all layers get the states [B, T, d] as [T, B, d].
_TIME_FIRST = {
    ("transformers.models.led.modeling_led", "LEDEncoderSelfAttention"),
    ("transformers.models.longformer.modeling_longformer", "LongformerSelfAttention"),
}


def _written(module: nn.Module) -> tuple[str, str]:
    cls = written_type(module)
    return cls.__module__, cls.__qualname__


def flattening_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are known to take ``[B, T, d]`` and to pass ``[B T, d]`` to layers inside them."""
    known = [m for m in model.modules() if _written(m) in _FLATTENING or holds_own_experts(m)]
    return known + mixtures(model)


def watched_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in which the gradients of trainable parameters are computed, each once, with their paths.

    Modules inside a module with trainable parameters of its own and without a rule are not yielded, because that module
    is run again as a whole. Parameters in a ``ParameterDict`` or ``ParameterList`` are those of the module around it.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        delegated = delegates(module)
        as_a_whole = computes_with_parts(module) or holds_own_experts(module)
        if (_owns_trainable(module) and not delegated) or as_a_whole:
            yield path, module
            if sampler_of(module) is None and not replays_lookup(module) and not is_experts(module):
                return
        if delegated:
            seen.update(id(container) for container in _containers(module))
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    return walk(module, path)


_FAMILIES: dict[GradSampler, TermRule] = {
    embedding: _lookup,
    embedding_bag: _bag,
    ste_linear: _ste_linear,
    rms_norm: _rms_norm,
    offset_rms_norm: _rms_norm,
}
_KINDS: dict[GradSampler, str] = {embedding: "lookup", rms_norm: "rows", offset_rms_norm: "rows"}


def rule_of(module: nn.Module, shared: QuantizedInputs) -> tuple[TermRule, str]:
    """Return the rule for a module, and its kind: ``dense``, ``lookup``, ``rows``, ``routed`` or ``replay``."""
    sampler = sampler_of(module)
    if sampler is None and is_experts(module):
        return _routed, "routed"
    if sampler is None:
        return (replayed_lookup, "lookup") if replays_lookup(module) else (replayed_rows, "replay")
    if sampler is auto_bitlinear:
        return _auto_bitlinear(shared), "dense"
    if sampler in (STOCK[nn.Linear], conv1d):
        return _linear(shared, transposed=sampler is conv1d), "dense"
    if sampler in _FAMILIES:
        return _FAMILIES[sampler], _KINDS.get(sampler, "dense")
    return _rows_of(sampler), "rows"


def tracked(model: nn.Module) -> tuple[list[Tracked], dict[str, TermRule], QuantizedInputs]:
    """Return the modules that ``Capture`` must watch, the rule for each path, and the inputs that rules share."""
    shared = QuantizedInputs()
    outer = [m for m in model.modules() if _written(m) in _TIME_FIRST]
    time_first = {id(inner) for module in outer for inner in module.modules() if inner is not module}
    items, rules = [], {}
    for path, module in watched_modules(model):
        rules[path], name = rule_of(module, shared)
        replayed = name == "replay" or replays_lookup(module)
        parameters: Iterable[nn.Parameter] = module.parameters(recurse=name == "replay")
        trained = tuple(p for p in parameters if p.requires_grad)
        is_experts, is_time_first = name == "routed", id(module) in time_first
        items.append(Tracked(path, module, trained, replayed, is_experts, is_time_first))
    return items, rules, shared


__all__ = [
    "TermRule",
    "Terms",
    "delegates",
    "flattening_modules",
    "replays_lookup",
    "rule_of",
    "tracked",
    "watched_modules",
]
