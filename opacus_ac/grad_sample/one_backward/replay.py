"""Modules without a rule: they are run again on each record, and what they return is compared with the first run."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves

from opacus_ac.grad_sample.folded_rows import Fold
from opacus_ac.grad_sample.late_checks import LateChecks
from opacus_ac.grad_sample.module_replay import bare_twin, is_quantised
from opacus_ac.grad_sample.one_backward.outer_products import Rows
from opacus_ac.grad_sample.one_backward.states import StatesOfTwin
from opacus_ac.grad_sample.one_backward.use import Call, Use
from opacus_ac.grad_sample.precision import less_was_asked

_REPLAY_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_LOW_TOLERANCE = 5e-2
_TOGETHER = 1 << 28
"""Number of values above which fewer records are run together: those of the module, for each record."""

_NOT_TOGETHER: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that ``torch.vmap`` has not been able to run."""

Weights = dict[str, Tensor]
Record = Callable[[Weights, tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]]
"""From weights, arguments of one record and gradients at its outputs: what to differentiate, and the outputs."""


def replayed_rows(use: Use, tensors: tuple[Tensor, ...], backprops: Tensor) -> list[tuple[nn.Parameter, Rows]]:
    """Run the module again on each record, and differentiate it.

    Arguments whose first dimension is the batch are split into records. All others are passed as they are. The output
    must be the same as in the forward pass. This shows that the split was right, and that the module is not random.
    Records are run together by ``torch.vmap``, or one after the other where it does not know an operation.

    Raises:
        ValueError: If the output differs. That is looked at later (``use.late``), unless there is another way to split.
    """
    gradients = (backprops,) if use.gradients is None else use.gradients
    inputs, outputs = tensors[: -len(gradients)], tensors[-len(gradients) :]
    windows = use.folded if use.folded is not None and use.folded.windows and not use.is_shared else None
    use.is_split = use.is_split or windows is not None  # K windows are a batch, and need no dimension more

    def apart(tensor: Tensor) -> Tensor:
        return _by_records(tensor, len(backprops)) if windows is None else _by_windows(tensor, windows)

    # An output without a gradient does not matter, whatever its shape is.
    backs = tuple(None if g is None else apart(g) for g in gradients)
    wanted = [apart(o) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    first: ValueError | None = None
    splits = [_split_windows(use, inputs, windows)] if windows else list(_splits(inputs, outputs, len(backprops)))
    error = partial(_refusal, use.path, type(use.module).__name__)
    for split in splits:
        late = use.late if len(splits) == 1 else LateChecks()
        try:
            rows, again = _run_again(use, split, backs)
            for got, want in zip(again, wanted, strict=True):
                check_again(late, got, want, error, inputs)
            if late is not use.late:
                late.verify()
        except ValueError as found:
            first = first or found
            continue
        owned = dict(use.module.named_parameters())
        return [(owned[name], Rows(values.detach())) for name, values in rows.items()]
    assert first is not None
    raise first


@dataclass(frozen=True)
class _Split:
    """The tensors of a call, and what a record gets of each.

    Attributes:
        tensors: the tensors. Those of which a record gets a part have the records first.
        dims: 0 for those, None for tensors that every record gets as they are.
        rows: places of tensors that came as ``[B T, ...]``. A record gets ``[T, ...]`` of them, not a batch of one.
    """

    tensors: tuple[Tensor, ...]
    dims: tuple[int | None, ...]
    rows: frozenset[int] = frozenset()


def _splits(inputs: Sequence[Tensor], outputs: Sequence[Tensor], records: int) -> Iterator[_Split]:
    """Yield the ways to take the tensors of a call apart. The first one that returns what was returned is right."""
    of_records = [t for t in (*inputs, *outputs) if t.dim() > 1 and t.shape[0] == records]
    lengths = {t.shape[1] for t in of_records if t.shape[1] > 1}
    # Scores of a router come as [B T, E] beside states [B, T, d].
    rows = frozenset(i for i, t in enumerate(inputs) if t.dim() and t.shape[0] in {records * n for n in lengths})
    # A mask of a sequence may be as long as there are records.
    squares = {i for i, t in enumerate(inputs) if t.shape == (records, records)}
    for split_rows in (rows, frozenset[int]()) if rows else (rows,):
        tensors = tuple(_by_records(t, records) if i in split_rows else t for i, t in enumerate(inputs))
        for whole in (set[int](), squares) if squares else (squares,):
            dims = tuple(0 if t.dim() and len(t) == records and i not in whole else None for i, t in enumerate(tensors))
            yield _Split(tensors, dims, split_rows)


def _by_records(tensor: Tensor, records: int) -> Tensor:
    """Return ``[B, k, ...]`` for ``[B k, ...]``. Whether its rows are those of record after record is checked later."""
    if tensor.dim() == 0 or len(tensor) == records or len(tensor) % records:
        return tensor
    return tensor.unflatten(0, (records, -1))


def _split_windows(use: Use, inputs: Sequence[Tensor], windows: Fold) -> _Split:
    """Return what a record gets inside of windows: its K rows, and whatever does not have a row for each window."""
    tensors = tuple(t if i in use.bare else _by_windows(t, windows) for i, t in enumerate(inputs))
    parts = [
        i in use.bare or after is not before for i, (before, after) in enumerate(zip(inputs, tensors, strict=True))
    ]
    return _Split(tensors, tuple(0 if part else None for part in parts))


def _by_windows(tensor: Tensor, windows: Fold) -> Tensor:
    """Return ``[B, K, ...]`` for ``[B K, ...]``, and any other tensor as it is."""
    if windows.records == 1:  # to which everything belongs
        return tensor.unsqueeze(0)
    if tensor.dim() == 0 or len(tensor) != windows.records * windows.rows:
        return tensor
    return tensor.unflatten(0, (windows.records, windows.rows))


def replay_sampler(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the same for a module with one input, in the form of a grad sampler of Opacus, for tests of modules."""
    use = Use("", module, Call.of(tuple(activations), {})[0], None, nullcontext(), 0)
    rows, _ = _run_again(use, next(_splits(activations, (backprops,), len(backprops))), (backprops,))
    owned = dict(module.named_parameters())
    return {owned[name]: values.detach() for name, values in rows.items()}


def _run_again(use: Use, split: _Split, gradients: tuple[Tensor | None, ...]) -> tuple[Weights, tuple[Tensor, ...]]:
    """Return the gradients ``[B, ...]`` of the trained weights, and the outputs that have gradients."""
    backs = tuple(g for g in gradients if g is not None)
    inputs, dims = split.tensors, split.dims
    twin = bare_twin(use.module)
    weights = {name: p.detach() for name, p in twin.named_parameters() if p.requires_grad}
    record = _record_of(use, twin, split, [i for i, g in enumerate(gradients) if g is not None])
    with torch.enable_grad():
        if use.module not in _NOT_TOGETHER and not is_quantised(twin):
            try:
                return _together(record, weights, inputs, dims, backs, _count(twin))
            except (RuntimeError, ValueError, TypeError, KeyError):  # it may use what torch.func does not know
                pass
        try:
            results = _one_by_one(record, weights, inputs, dims, backs)
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{use.path or 'the model'} ({type(use.module).__name__}) has no rule, and cannot be run again on "
                f"single records: {error}. Register a rule with register_rule, or freeze it with requires_grad_(False)"
            ) from error
    _NOT_TOGETHER.add(use.module)
    return results


def _record_of(use: Use, twin: nn.Module, split: _Split, places: list[int]) -> Record:
    dims = split.dims
    states = StatesOfTwin(twin, use.states)

    def record(
        weights: Weights, arguments: tuple[Tensor, ...], backs: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        # A module that was handed [B T, d] takes the rows of one record; any other takes a batch of one.
        # A value that all records share has no place for the batch.
        whole = [
            t if d is None or use.is_split or i in use.bare or i in split.rows else t.unsqueeze(int(i in use.second))
            for i, (t, d) in enumerate(zip(arguments, dims, strict=True))
        ]
        args, kwargs = use.call.without(_is_cache).arguments(states.restore(whole))
        with use.autocast:
            results = _computed(functional_call(twin, weights, args, kwargs), weights)
        bare = [use.is_split or len(dims) + i in use.bare for i in places]
        dim = [int(len(dims) + i in use.second) for i in places]
        alone = [results[i] if b else results[i].squeeze(d) for i, b, d in zip(places, bare, dim, strict=True)]
        total = torch.stack([(r * b).sum() for r, b in zip(alone, backs, strict=True)]).sum()
        return total, tuple(r.detach() for r in alone)

    return record


def _count(twin: nn.Module) -> int:
    return sum(t.numel() for t in (*twin.parameters(), *twin.buffers()))


def _together(
    record: Record,
    weights: Weights,
    inputs: tuple[Tensor, ...],
    dims: tuple[int | None, ...],
    backs: tuple[Tensor, ...],
    size: int,
) -> tuple[Weights, tuple[Tensor, ...]]:
    # A gradient at a frozen weight (of a weight that adapters change) may be held for each record for a moment.
    at_once = max(1, _TOGETHER // max(1, size))
    per_record = vmap(grad(record, has_aux=True), in_dims=(None, dims, 0), randomness="different", chunk_size=at_once)
    rows, again = per_record(weights, inputs, backs)
    return rows, again


def _one_by_one(
    record: Record,
    weights: Weights,
    inputs: tuple[Tensor, ...],
    dims: tuple[int | None, ...],
    backs: tuple[Tensor, ...],
) -> tuple[Weights, tuple[Tensor, ...]]:
    found: list[tuple[Tensor, ...]] = []
    outputs: list[tuple[Tensor, ...]] = []
    for i in range(len(backs[0])):
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        arguments = tuple(t if d is None else t[i] for t, d in zip(inputs, dims, strict=True))
        total, alone = record(leaves, arguments, tuple(b[i] for b in backs))
        found.append(torch.autograd.grad(total, tuple(leaves.values()), allow_unused=True, materialize_grads=True))
        outputs.append(alone)
    rows = {name: torch.stack(values) for name, values in zip(weights, zip(*found, strict=True), strict=True)}
    return rows, tuple(torch.stack(values) for values in zip(*outputs, strict=True))


def _is_cache(value: Any) -> bool:
    """Say whether a value is a cache of keys and values, to which a second run would add."""
    caches = sys.modules.get("transformers.cache_utils")
    return caches is not None and isinstance(value, caches.Cache)


def _floats(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in an output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _computed(output: Any, weights: Weights) -> list[Tensor]:
    """Return the same without parameters, which a module may return for others to use."""
    given = {id(weight) for weight in weights.values()}
    return [t for t in _floats(output) if id(t) not in given and not isinstance(t, nn.Parameter)]


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


def _is_replay(got: Tensor, want: Tensor, ordinary: Tensor) -> Tensor:
    """Return whether a second run returned the same, for each record without extreme values: one truth value."""
    got, want = (t.flatten(1) if t.dim() > 1 else t.unsqueeze(1) for t in (got, want))
    finite = torch.isfinite(want)
    difference = torch.where(finite, (got - want).abs(), 0).amax(1)
    size = torch.where(finite, want.abs(), 0).amax(1)
    tolerance = _REPLAY_TOLERANCE.get(want.dtype, _LOW_TOLERANCE)
    if want.dtype == torch.float32 and less_was_asked():  # in the first run only
        tolerance = _LOW_TOLERANCE
    # A record with small outputs gets the tolerance of a median one, and one with large outputs its own. The lower of
    # two medians is taken, as torch.median does; torch.nanmedian would wait for the device.
    middle = ((ordinary.sum() - 1) // 2).clamp(min=0).view(1)
    median = torch.where(ordinary, size, math.inf).sort().values.gather(0, middle)
    same = difference <= tolerance * torch.maximum(size, median)
    return (same | ~ordinary).all()


def check_again(
    late: LateChecks, got: Tensor, want: Tensor, error: Callable[[], Exception], inputs: Sequence[Tensor] = ()
) -> None:
    """Have ``late`` check that a second run returned the same, but for rounding; the records are the first dimension.

    Args:
        late: takes the check.
        got: what the second run returned.
        want: what the first run returned.
        error: returns what is raised otherwise, at once if the shapes differ.
        inputs: records with extreme values in one of these are left out.
    """
    if got.shape != want.shape:
        raise error()
    if want.dim() > 0 and want.numel():
        late.note(_is_replay(got, want, _ordinary_records(inputs, want)), error)


def _refusal(path: str, name: str) -> ValueError:
    return ValueError(
        f"{path or 'the model'} ({name}) has no rule, and run again on single records it does not return what it "
        "returned on the batch: it is random (dropout inside it?), or its arguments do not have the records as first "
        "dimension. Set its dropout to 0, register a rule with register_rule, or freeze it"
    )
