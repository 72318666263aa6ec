"""Checks before a model is made private: per-sample gradients of all its layers are exact, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from opacus_ac.grad_sample.checks.probe import Verdict, probe, required_inputs
from opacus_ac.grad_sample.checks.random_parts import random_part
from opacus_ac.grad_sample.module_replay import written_type
from opacus_ac.grad_sample.one_backward.experts import is_experts
from opacus_ac.grad_sample.one_backward.layer_terms import replays_lookup, watched_modules
from opacus_ac.grad_sample.one_backward.replay import replay_sampler
from opacus_ac.grad_sample.registry import (
    STOCK,
    GradSampler,
    UserRule,
    has_own_trainable,
    hooked_modules,
    is_dp_rnn,
    sampler_of,
)
from opacus_ac.grad_sample.rules.bitlinear import auto_bitlinear, ste_linear
from opacus_ac.grad_sample.rules.embedding import embedding, unsupported

_BUFFER_RULES: tuple[GradSampler, ...] = (auto_bitlinear, embedding, ste_linear)
_FREEZE = "or freeze it with requires_grad_(False)"


def constant_buffers_ok(module: nn.Module) -> bool:
    """Say whether the module's buffers, if any, are constants that its rule takes into account.

    Opacus refuses every trainable layer with buffers, unless it gets ``strict=False``. That is safe if this function
    returns True for all of them. Examples are ``weight_scale`` of an offline ``AutoBitLinear`` and ``embed_scale`` of
    Gemma.
    """
    if next(module.buffers(), None) is None:
        return True
    sampler = sampler_of(module)
    return sampler in _BUFFER_RULES or (isinstance(sampler, UserRule) and sampler.constant_buffers)


def _signature(module: nn.Module, sampler: GradSampler | None) -> Hashable:
    """Return a key. Modules with the same key behave alike, so one of them is tested for all."""
    tensors = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in module.named_parameters())
    return (sampler, tensors, tuple((n, written_type(m), _settings(m)) for n, m in module.named_modules()))


def _settings(module: nn.Module) -> Hashable:
    """Return the attributes of a module: plain ones by value, objects such as a configuration by identity."""
    state = ((k, v) for k, v in sorted(vars(module).items()) if not (k.startswith("_") or isinstance(v, torch.Tensor)))
    return tuple((k, v if isinstance(v, bool | int | float | str | type(None)) else id(v)) for k, v in state)


class _Examiner:
    """Checks hooked modules one by one. Each distinct kind of module is tested once."""

    def __init__(self, mode: str) -> None:
        self._mode, self._force_functorch = mode, mode == "functorch"
        self._verdicts: dict[Hashable, Verdict] = {}

    def problem(self, module: nn.Module) -> str | None:
        """Return why the per-sample gradients of ``module`` would not be exact, with the remedy; None if they are."""
        if isinstance(module, nn.ParameterList | nn.ParameterDict):
            way = (
                "the layer that holds it has a rule, which does not know its parameters: "
                if self._mode == "bk"
                else 'no hook sees its parameters: use grad_sample_mode="bk", which asks the module around it, '
            )
            return (
                f"it is a container whose forward is never called, and {way}put them on a module that is called (LoRA: "
                f"leave embedding layers out of target_modules), {_FREEZE}"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (reason := unsupported(module)) is not None:
            return f"{reason}. Switch it off, {_FREEZE}"
        if not constant_buffers_ok(module) and not self._is_watched_in_bk(module):
            return (
                "it is a trainable layer with buffers, which Opacus does not support because they may hold "
                "statistics of the data. Call opacus_ac.grad_sample.register_rules(model), which knows some such "
                f"layers, or register_rule(..., constant_buffers=True) with an exact rule, {_FREEZE}"
            )
        sampler = sampler_of(module)
        if self._mode == "bk" and replays_lookup(module):
            return None  # each use is run a second time and compared with the first run
        if self._mode == "bk" and sampler is None and is_experts(module):
            return None  # each product with the stacked weights is recorded separately
        if sampler is None or self._force_functorch:
            return self._functorch_problem(module)
        return self._sampler_problem(module, sampler)

    def _is_watched_in_bk(self, module: nn.Module) -> bool:
        """Say whether the module is run again for its gradients. Then a change of its buffers is seen at each use."""
        return (
            self._mode == "bk"
            and sampler_of(module) is None
            and not any(isinstance(m, _NormBase) for m in module.modules())
        )

    def _probe(
        self, module: nn.Module, sampler: GradSampler, recurse: bool, make_input: Callable[..., object] | None = None
    ) -> Verdict:
        key = _signature(module, sampler)
        if "forward" in module.__dict__ or key not in self._verdicts:
            verdict = probe(module, sampler, recurse=recurse, make_input=make_input)  # type: ignore[arg-type]
            self._verdicts[key] = verdict
        return self._verdicts[key]

    def _sampler_problem(self, module: nn.Module, sampler: GradSampler) -> str | None:
        plain = "forward" not in module.__dict__
        padded = isinstance(module, nn.Embedding) and module.padding_idx is not None
        stock = STOCK.get(written_type(module))
        if sampler is stock and plain and not padded:
            return _stock_problem(module)
        make_input = sampler.probe_input if isinstance(sampler, UserRule) else None
        verdict = self._probe(module, sampler, False, make_input)
        name = getattr(sampler, "__name__", None) or getattr(getattr(sampler, "rule", None), "__name__", "rule")
        if verdict.status == "wrong":
            return f"its registered sampler {name!r} is wrong for it: {verdict.reason}. {_remedy(module)}"
        if verdict.status == "unknown" and (sampler in STOCK.values() or not plain):
            return (
                f"its registered sampler {name!r} was written for another class and cannot be verified "
                f"({verdict.reason}). {_remedy(module)}"
            )
        return None

    def _functorch_problem(self, module: nn.Module) -> str | None:
        if self._force_functorch and next(module.buffers(), None) is not None:
            return f'it has buffers, which mode "functorch" does not support. Use mode "hooks", {_FREEZE}'
        if self._force_functorch and sampler_of(module) is not None and _has_trainable_child(module):
            return f'in mode "functorch" its children\'s gradients would count twice. Use mode "hooks", {_FREEZE}'
        # Mode "bk" takes any arguments apart, and compares the output.
        inputs = 1 if self._mode == "bk" else required_inputs(module)
        if inputs is not None and inputs != 1:
            return (
                f"it has no rule, and the functorch fallback replays modules with exactly one input; its forward "
                f"requires {inputs}. Register a rule with register_rule({type(module).__name__}, rule), {_FREEZE}"
            )
        if self._mode == "bk" and (problem := random_part(module)) is not None:
            return problem
        for inner in module.modules():
            if (problem := self._replay_problem(inner, module)) is not None:
                return problem
        return None

    def _replay_problem(self, inner: nn.Module, root: nn.Module) -> str | None:
        if type(inner).__module__.startswith("torch.nn") and "forward" not in inner.__dict__:
            return None
        if not any(p.requires_grad for p in inner.parameters()):
            return None
        # Mode "bk" has a way of its own, which takes buffers and operations that torch.func does not know.
        again = replay_sampler if self._mode == "bk" else ft_compute_per_sample_gradient
        verdict = self._probe(inner, again, True)
        # In mode "bk" what a module returned is compared with what it returns for single records, at every use.
        known_family = inner is root and isinstance(inner, nn.Linear | nn.Embedding) and self._mode != "bk"
        if verdict.status == "exact" or (verdict.status == "unknown" and not known_family):
            return None
        where = "" if inner is root else f" (inside it: {type(inner).__name__})"
        way = "the second run on single records" if self._mode == "bk" else "the functorch fallback"
        what = "does not work on it" if verdict.status == "wrong" else "cannot be verified on it"
        return f"it has no rule, and {way} {what}{where}: {_short(verdict.reason)}. {_remedy(inner)}"


def _short(reason: str) -> str:
    return reason if len(reason) <= 200 else f"{reason[:200]}..."


def _stock_problem(module: nn.Module) -> str | None:
    """Return why Opacus's own rule does not fit a layer of its own type, such as other parameter names; else None."""
    if is_dp_rnn(module):
        return None
    extra = [n for n, p in module._parameters.items() if p is not None and p.requires_grad and n not in _STOCK_NAMES]
    if extra:
        return (
            f"its trainable parameters {', '.join(extra)} are not those of a plain {type(module).__name__}. Remove the "
            f"reparametrisation (weight_norm, say), {_FREEZE}"
        )
    if isinstance(module, nn.LayerNorm) and module.elementwise_affine and module.bias is None:
        return f"Opacus's own rule for LayerNorm fails without a bias. Call register_rules(model), {_FREEZE}"
    return None


_STOCK_NAMES = ("weight", "bias")


def _has_trainable_child(module: nn.Module) -> bool:
    return any(has_own_trainable(child) for child in module.modules() if child is not module)


def _remedy(module: nn.Module) -> str:
    name = type(module).__name__
    steps = ["Call opacus_ac.grad_sample.register_rules(model)"]
    if isinstance(module, nn.Linear) or hasattr(module, "in_features"):
        steps.append(f"register_ste_linear({name}) if it is a straight-through quantised layer")
    steps.append(f"register_rule({name}, rule) with an exact rule")
    return f"{', '.join(steps)}, {_FREEZE}"


def _shared_modules(hooked: list[tuple[str, nn.Module]]) -> list[str]:
    places: dict[int, list[str]] = {}
    for path, module in hooked:
        places.setdefault(id(module), []).append(path)
    types = {id(module): type(module).__name__ for _, module in hooked}
    return [
        f"{' and '.join(paths)} ({types[key]}): one module object in two places is hooked twice by Opacus, which "
        "doubles its gradient. Give each place a module of its own with tied weights, or freeze it"
        for key, paths in places.items()
        if len(paths) > 1
    ]


def _trained_inside_experts(model: nn.Module) -> dict[tuple[str, str], list[str]]:
    """Return the experts modules with trained layers inside, by type and problem.

    Inside, rows are sorted by expert. So a layer there cannot tell which record a row belongs to.
    """
    found: dict[tuple[str, str], list[str]] = {}
    reason = (
        "it holds experts, and layers inside it see rows that are sorted by expert, so that nothing tells which record "
        "they belong to. Freeze what is inside it ({names}) with requires_grad_(False)"
    )
    for path, module in model.named_modules():
        if is_experts(module):
            inside = [name for name, p in module.named_parameters() if "." in name and p.requires_grad]
            if inside:
                found.setdefault((type(module).__name__, reason.format(names=", ".join(inside[:3]))), []).append(path)
    return found


def _with_hooks(model: nn.Module) -> list[str]:
    """Return what is wrong with trained parameters whose gradients are changed by hooks."""
    names = [name for name, p in model.named_parameters() if p.requires_grad and p._backward_hooks]
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [
        f"{names[0]}{more}: Tensor.register_hook was called on it, and the clipped gradients of records do not go "
        "through such hooks. Remove the hook; to train a part of a weight, give that part a parameter of its own "
        "(of an embedding: TrainableTokensConfig of peft)"
    ]


def module_problem(mode: str) -> Callable[[nn.Module], str | None]:
    """Return a function that returns why the per-sample gradients of a module would not be exact, or None."""
    examiner = _Examiner(mode)
    return lambda module: None if is_dp_rnn(module) else examiner.problem(module)


def check_model(model: nn.Module, *, mode: str = "hooks") -> None:
    """Refuse a model whose per-sample gradients would not be exact. The model is not changed.

    Each distinct kind of layer is compared with a loop of autograd over single records, on a float64 copy. Layers
    whose rule is Opacus's own for exactly their class, and layers without trainable parameters, are left out.

    Args:
        model: the model that will be made private.
        mode: ``grad_sample_mode``: "bk", "hooks", or "functorch", which ignores all registered rules.

    Guarantees:
        A layer is refused if its rule disagrees with autograd on the test input, if its output for a record depends on
        other records, or if its forward pass changes its buffers. A user's rule is trusted if no test input is known
        for its module; ``explain`` says so.

    Raises:
        ValueError: If a layer is refused. The message names all such modules, their types and the remedies.
    """
    problem_of = module_problem(mode)
    # Mode "bk" watches each module object once, even if it is in several places.
    hooked = list(watched_modules(model) if mode == "bk" else hooked_modules(model))
    problems = [] if mode == "bk" else _shared_modules(hooked)
    problems += _with_hooks(model)
    by_problem = _trained_inside_experts(model)
    for path, module in hooked:
        problem = problem_of(module)
        if problem is not None:
            by_problem.setdefault((type(module).__name__, problem), []).append(path or "the model itself")
    for (kind, problem), paths in by_problem.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        problems.append(f"{paths[0]}{more} ({kind}): {problem}")
    if problems:
        raise ValueError("per-sample gradients would not be exact:\n  " + "\n  ".join(problems))
