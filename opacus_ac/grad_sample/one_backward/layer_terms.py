"""Terms of the parameters' gradients, from one use of a module and the gradient at its output.

Rules are registered in one place only, the table of grad samplers. If the rule of a module is of a family whose
gradients are sums of outer products, the terms of the family are used instead of it. Any other rule is called for its
rows. A module without a rule is run again record by record, and its output is compared with that of the first run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves

from opacus_ac.grad_sample.module_replay import bare_twin, written_type
from opacus_ac.grad_sample.one_backward.bounds import wide
from opacus_ac.grad_sample.one_backward.experts import expert_of_rows, is_experts, mixtures
from opacus_ac.grad_sample.one_backward.outer_products import Rows, Term
from opacus_ac.grad_sample.one_backward.routed import Routed
from opacus_ac.grad_sample.one_backward.use import Tracked, Use
from opacus_ac.grad_sample.precision import less_was_asked
from opacus_ac.grad_sample.registry import STOCK, GradSampler, has_own_trainable, sampler_of
from opacus_ac.grad_sample.rules.bitlinear import (
    QuantizedInputs,
    auto_bitlinear,
    auto_bitlinear_factors,
    ste_linear,
    ste_linear_factors,
)
from opacus_ac.grad_sample.rules.embedding import embedding, lookup_terms, replayed_ids
from opacus_ac.grad_sample.rules.embedding_bag import bag_terms, bags_of, embedding_bag
from opacus_ac.grad_sample.rules.linear import conv1d, dense_terms
from opacus_ac.grad_sample.rules.normalization import offset_rms_norm, rms_norm, rms_norm_rows

Terms = Sequence[tuple[nn.Parameter, Term | Routed]]
TermRule = Callable[[Use, tuple[Tensor, ...], Tensor], Terms]

_REPLAY_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_LOW_TOLERANCE = 5e-2


def _linear(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    return dense_terms(use.module, tensors[0], backprops)


def _conv1d(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    return dense_terms(use.module, tensors[0], backprops, transposed=True)


def _lookup(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    return lookup_terms(use.module, _ids_by_record(tensors[0], backprops), backprops)


def _bag(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    args, kwargs = use.call.arguments(tensors)
    assert isinstance(use.module, nn.EmbeddingBag)
    kwargs = {name.replace("input", "ids"): value for name, value in kwargs.items()}
    return bag_terms(use.module, bags_of(use.module, *args, **kwargs), backprops)


def _ste_linear(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    factors = ste_linear_factors(use.module, tensors[0], backprops)
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


def _replayed_lookup(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    """Return the terms of an embedding that computes its ids itself (OPT's positions), from a second run."""
    assert isinstance(use.module, nn.Embedding)
    args, kwargs = use.call.arguments(tensors[:-1])
    ids = replayed_ids(use.module, args, kwargs, tensors[-1])
    return lookup_terms(use.module, _ids_by_record(ids, backprops), backprops)


def _ids_by_record(ids: Tensor, backprops: Tensor) -> Tensor:
    """Return ids ``[B, ...]``, if they came as ``[1, ...]`` or as positions ``[T]`` for all records."""
    if ids.dim() + 1 < backprops.dim():
        ids = ids.unsqueeze(0)
    return ids.expand(backprops.shape[:-1])


def replayed_rows(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    """Run the module again on each record, with ``torch.func``, and differentiate it.

    Arguments whose first dimension is the batch are split into records. All others are passed as they are. The output
    must be the same as in the forward pass. This shows that the split was right, and that the module is not random.

    Raises:
        ValueError: If the output differs.
    """
    gradients = (backprops,) if use.gradients is None else use.gradients
    module, inputs, outputs = use.module, tensors[: -len(gradients)], tensors[-len(gradients) :]
    batch = backprops.shape[0]
    backs = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, gradients, strict=True))
    dims = tuple(0 if t.dim() > 0 and t.shape[0] == batch else None for t in inputs)
    twin = bare_twin(module)
    parameters = {name: p.detach() for name, p in twin.named_parameters() if p.requires_grad}

    def record(
        weights: dict[str, Tensor], arguments: tuple[Tensor, ...], backs: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        # A module that was handed [B T, d] takes the rows of one record; any other takes a batch of one.
        whole = [t if d is None or use.is_split else t.unsqueeze(0) for t, d in zip(arguments, dims, strict=True)]
        args, kwargs = use.call.without(_is_cache).arguments(whole)
        with use.autocast:
            results = _floats(functional_call(twin, weights, args, kwargs))
        alone = results if use.is_split else [r.squeeze(0) for r in results]
        total = torch.stack([(r * b).sum() for r, b in zip(alone, backs, strict=True)]).sum()
        return total, tuple(r.detach() for r in alone)

    with torch.enable_grad():
        per_record = vmap(grad(record, has_aux=True), in_dims=(None, dims, 0), randomness="different")
        try:
            rows, again = per_record(parameters, inputs, backs)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{use.path or 'the model'} ({type(module).__name__}) has no rule, and cannot be run again on single "
                f"records: {error}. Register a rule with register_rule, or freeze it with requires_grad_(False)"
            ) from error
    for got, want in zip(again, outputs, strict=True):
        _check_replay(use, inputs, got, want)
    owned = dict(module.named_parameters())
    return [(owned[name], Rows(values.detach())) for name, values in rows.items()]


def _is_cache(value: Any) -> bool:
    """Say whether a value is a cache of keys and values, to which a second run would add."""
    caches = sys.modules.get("transformers.cache_utils")
    return caches is not None and isinstance(value, caches.Cache)


def _floats(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in an output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


_ORDINARY = 1e15
"""Size of values beyond which two runs of a record may differ, unless they are masks (at least ``_MASK``)."""
_MASK = 1e37


def _ordinary_records(inputs: Sequence[Tensor], want: Tensor) -> Tensor:
    """Return which records ``[B]`` have no extreme values, so that a second run must return the same."""
    ordinary = torch.ones(want.shape[0], dtype=torch.bool, device=want.device)
    for tensor in (want, *(t for t in inputs if t.dim() > 0 and t.shape[0] == want.shape[0])):
        if tensor.is_floating_point() and tensor.numel():
            size = tensor.abs().flatten(1) if tensor.dim() > 1 else tensor.abs().unsqueeze(1)
            extreme = (size > _ORDINARY) & (size < _MASK) | torch.isnan(tensor).reshape(size.shape)
            ordinary &= ~extreme.any(1).to(want.device)
    return ordinary


def _is_replay(got: Tensor, want: Tensor, ordinary: Tensor) -> bool:
    """Say whether a second run returned the same, for each record without extreme values."""
    if got.shape != want.shape:
        return False
    got, want = (t[ordinary].flatten(1) if t.dim() > 1 else t[ordinary].unsqueeze(1) for t in (got, want))
    if not want.numel():
        return True
    finite = torch.isfinite(want)
    difference = torch.where(finite, (got - want).abs(), 0).amax(1)
    size = torch.where(finite, want.abs(), 0).amax(1)
    tolerance = _REPLAY_TOLERANCE.get(want.dtype, _LOW_TOLERANCE)
    if want.dtype == torch.float32 and less_was_asked():  # in the first run only
        tolerance = _LOW_TOLERANCE
    # A record with small outputs gets the tolerance of a median one, and one with large outputs its own.
    return bool((difference <= tolerance * torch.maximum(size, size.median())).all())


def _check_replay(use: Use, inputs: Sequence[Tensor], got: Tensor, want: Tensor) -> None:
    same = _is_replay(got, want, _ordinary_records(inputs, want)) if want.dim() > 0 else got.shape == want.shape
    if not same:
        raise ValueError(
            f"{use.path or 'the model'} ({type(use.module).__name__}) has no rule, and run again on single records it "
            "does not return what it returned on the batch: it is random (dropout inside it?), or its arguments do not "
            "have the records as first dimension. Set its dropout to 0, register a rule with register_rule, or freeze "
            "it"
        )


def _routed(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> Terms:
    """Return the terms of a product with the stacked weights of experts. Its rows ``[S, ...]`` are sorted by expert."""
    product, (inputs, tokens) = use.product, tensors
    assert product is not None
    assert use.flattened is not None
    batch, records = use.flattened[0], tokens // use.flattened[1]
    terms: list[tuple[nn.Parameter, Term | Routed]] = []
    weight = use.module._parameters[product.weight]
    if weight is not None and weight.requires_grad:
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


def delegates(module: nn.Module) -> bool:
    """Say whether layers inside the module hold all of its trainable parameters, such as the tied bias of a head.

    The gradients are then computed in these layers. If the module's own forward uses such a parameter, the parameter
    gets an ordinary gradient, and the step is refused.
    """
    own = [p for p in module.parameters(recurse=False) if p.requires_grad]
    inner = {id(p) for child in module.modules() if child is not module for p in child.parameters(recurse=False)}
    return bool(own) and all(id(p) in inner for p in own)


# In the source of these classes, some layers get the states [B, T, d] as [B T, d], record after record.
_FLATTENING = {("transformers.models.opt.modeling_opt", "OPTDecoderLayer")}


def _written(module: nn.Module) -> tuple[str, str]:
    cls = written_type(module)
    return cls.__module__, cls.__qualname__


def flattening_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are known to take ``[B, T, d]`` and to pass ``[B T, d]`` to layers inside them."""
    return [m for m in model.modules() if _written(m) in _FLATTENING] + mixtures(model)


def watched_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in which the gradients of trainable parameters are computed, each once, with their paths.

    Modules inside a module with trainable parameters of its own and without a rule are not yielded, because that module
    is run again as a whole.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if has_own_trainable(module) and not delegates(module):
            yield path, module
            if sampler_of(module) is None and not replays_lookup(module) and not is_experts(module):
                return
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    return walk(module, path)


_FAMILIES: dict[GradSampler, TermRule] = {
    STOCK[nn.Linear]: _linear,
    conv1d: _conv1d,
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
        return (_replayed_lookup, "lookup") if replays_lookup(module) else (replayed_rows, "replay")
    if sampler is auto_bitlinear:
        return _auto_bitlinear(shared), "dense"
    if sampler in _FAMILIES:
        return _FAMILIES[sampler], _KINDS.get(sampler, "dense")
    return _rows_of(sampler), "rows"


def tracked(model: nn.Module) -> tuple[list[Tracked], dict[str, TermRule], QuantizedInputs]:
    """Return the modules that ``Capture`` must watch, the rule for each path, and the inputs that rules share."""
    shared = QuantizedInputs()
    items, rules = [], {}
    for path, module in watched_modules(model):
        rules[path], name = rule_of(module, shared)
        replayed = name == "replay" or replays_lookup(module)
        parameters: Iterable[nn.Parameter] = module.parameters(recurse=name == "replay")
        trained = tuple(p for p in parameters if p.requires_grad)
        items.append(Tracked(path, module, trained, keep_output=replayed, is_experts=name == "routed"))
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
