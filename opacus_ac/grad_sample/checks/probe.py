"""Tests a rule for per-sample gradients: compares it with autograd, record by record.

The test runs on a float64 copy of the module (a smaller one if the module is large). Its three records have very
different sizes, so that a scale that is shared by the batch, or a quantiser on the input, is found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.module_replay import bare_twin, is_quantised, map_tensors, to_double
from opacus_ac.grad_sample.registry import GradSampler

#: Number of parameters above which the test runs on a smaller copy of the module.
LARGE = 4_000_000
_SMALL_DIMENSION = 64
_SIZES = ("in_features", "out_features", "nx", "nf", "num_embeddings")
# A float64 copy may still quantise or normalise in float32, so the tolerance is not 1e-12.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_LOW_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Verdict:
    """Result of a test. ``unknown`` means that no input could be made, or that the forward did not accept it."""

    status: Literal["exact", "wrong", "unknown"]
    reason: str = ""


def required_inputs(module: nn.Module) -> int | None:
    """Return the number of inputs that the forward requires; 0 if it takes none, None if that is unknown."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not needed and any(p.kind is not p.KEYWORD_ONLY for p in parameters):
        return 1
    return len(needed)


def _width(module: nn.Module) -> int | None:
    for name in ("in_features", "nx"):
        size = getattr(module, name, None)
        if isinstance(size, int):
            return size
    own = [p for p in module._parameters.values() if p is not None]
    if own and not module._modules and all(p.dim() == 1 for p in own):
        return int(own[0].shape[0])
    return None


def guess_input(module: nn.Module) -> Tensor | None:
    """Return three records for a layer like a linear layer, an embedding or a normalisation; None for others."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Embedding):
        ids = torch.randint(module.num_embeddings, (3, 4), generator=generator)
        ids[:, 1] = ids[:, 0]
        if module.padding_idx is not None:
            ids[:, 2] = module.padding_idx
        return ids
    width = _width(module)
    if width is None:
        return None
    x = torch.randn(3, 3, width, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([1.0, 0.3, 5.0], dtype=torch.float64).view(3, 1, 1)
    x[..., 0] *= 8
    return x


def _shrink(module: nn.Module) -> nn.Module:
    """Return a float64 copy of a large layer with smaller feature sizes."""
    sizes = {n: s for n in _SIZES if isinstance(s := getattr(module, n, None), int) and s > _SMALL_DIMENSION}
    cut = set(sizes.values())

    def corner(tensor: Tensor) -> Tensor:
        for dim, size in enumerate(tensor.shape):
            if size in cut:
                tensor = tensor.narrow(dim, 0, _SMALL_DIMENSION)
        return to_double(tensor)

    twin = bare_twin(module)
    map_tensors(twin, corner)
    for name in sizes:
        setattr(twin, name, _SMALL_DIMENSION)
    if isinstance(twin, nn.Embedding) and twin.padding_idx is not None:
        twin.padding_idx = min(twin.padding_idx, twin.num_embeddings - 1)
    return twin


def _double(module: nn.Module) -> nn.Module:
    twin = bare_twin(module)
    map_tensors(twin, to_double)
    return twin


def _twins(module: nn.Module) -> Iterator[nn.Module]:
    """Yield copies to test, the most exact one first. The last one shares the module's tensors."""
    large = sum(p.numel() for p in module.parameters()) > LARGE
    # A forward that was set on the instance is bound to the module, and would not use the copy's tensors. Weights of 4
    # or 8 bits keep their scales beside them, which a copy in float64 would lack.
    if "forward" not in module.__dict__ and not is_quantised(module):
        yield _shrink(module) if large else _double(module)
    yield bare_twin(module)


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    difference = (got.to(want.dtype) - want).abs().max()
    return float(difference / want.abs().max().clamp_min(1e-30))


def _loop(outputs: list[Tensor], backprops: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    rows = [torch.autograd.grad(y, params, backprops[i : i + 1], allow_unused=True) for i, y in enumerate(outputs)]
    return [
        torch.stack([torch.zeros_like(p) if row[k] is None else row[k] for row in rows]) for k, p in enumerate(params)
    ]


def _forward_problem(twin: nn.Module, x: Tensor, whole: Tensor, alone: list[Tensor], before: list[Tensor]) -> str:
    tolerance = _TOLERANCE.get(whole.dtype, _LOW_TOLERANCE)
    if _error(whole.detach(), torch.cat(alone).detach()) > tolerance:
        return (
            "its output for one record depends on the other records of the batch, or is random (set its dropout to 0)"
        )
    if any(not torch.equal(a, b) for a, b in zip(before, twin.buffers(), strict=True)):
        return "its forward changes its buffers, which would publish statistics of the data"
    return ""


def _compare(twin: nn.Module, sampler: GradSampler, x: Tensor, recurse: bool) -> Verdict:
    named = {n: p for n, p in twin.named_parameters(recurse=recurse) if p.requires_grad}
    before = [b.clone() for b in twin.buffers()]
    try:
        with torch.enable_grad():
            whole = twin.forward(x)
            alone = [twin.forward(x[i : i + 1]) for i in range(x.shape[0])]
        usable = isinstance(whole, Tensor) and whole.shape[:1] == x.shape[:1] and whole.requires_grad
    except Exception as error:
        return Verdict("unknown", f"{type(error).__name__}: {error}")
    if not usable:
        return Verdict("unknown", "its output is not one tensor with the records first")
    problem = _forward_problem(twin, x, whole, alone, before)
    if problem:
        return Verdict("wrong", problem)
    backprops = torch.randn_like(whole)
    want = _loop(alone, backprops, list(named.values()))
    try:
        with torch.no_grad():
            got = sampler(twin, [x], backprops)
    except Exception as error:
        return Verdict("wrong", f"its rule raised {type(error).__name__}: {' '.join(str(error).split())}")
    return _judge(named, got, want)


def _judge(named: dict[str, nn.Parameter], got: dict[nn.Parameter, Tensor], want: list[Tensor]) -> Verdict:
    for (name, parameter), expected in zip(named.items(), want, strict=True):
        if parameter not in got:
            return Verdict("wrong", f"its rule returns nothing for the trainable parameter {name!r}")
        error = _error(got[parameter], expected)
        if not error <= _TOLERANCE.get(parameter.dtype, _LOW_TOLERANCE):
            return Verdict("wrong", f"its rule is off by {error:.1e} (relative) for {name!r}")
    known = {id(p) for p in named.values()}
    if any(p.requires_grad and id(p) not in known for p in got):
        return Verdict("wrong", "its rule also returns gradients of a child's parameters, which would count twice")
    return Verdict("exact")


def probe(
    module: nn.Module,
    sampler: GradSampler,
    *,
    recurse: bool = False,
    make_input: Callable[[nn.Module], Tensor] | None = None,
) -> Verdict:
    """Compare ``sampler`` with a loop of autograd over single records. ``module`` is not changed.

    Args:
        module: the module.
        sampler: a grad sampler with Opacus's signature.
        recurse: whether the sampler returns gradients for parameters of children, too, as functorch does.
        make_input: returns a batch ``[3, ...]`` of records for a module; by default the input is guessed.
    """
    verdict = Verdict("unknown", "no input is known for it")
    if any(p.is_meta for p in module.parameters()):
        return Verdict("unknown", "its parameters are on the meta device")
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        for twin in _twins(module):
            x = (make_input or guess_input)(twin)
            if x is None:
                return verdict
            reference = next(p for p in twin.parameters() if p.requires_grad)
            if x.is_floating_point():
                x = x.to(reference.dtype)
            elif reference.device.type != "cpu":
                # Rows that are not there are an exception on the processor; a GPU would fail at every later call.
                map_tensors(twin, lambda t: t.cpu())
                reference = next(p for p in twin.parameters() if p.requires_grad)
            if sum(p.numel() for p in twin.parameters()) > LARGE:
                x = x[:2, :1] if x.dim() > 2 else x[:2]
            verdict = _compare(twin, sampler, x.to(reference.device), recurse)
            if verdict.status != "unknown":
                return verdict
    return verdict


__all__ = ["LARGE", "Verdict", "guess_input", "probe", "required_inputs"]
