"""Finds out why a record has another gradient alone than in its batch: the first layer that does not see the record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.alone.isolated import isolated_twin
from opacus_ac.grad_sample.alone.positions import take_call
from opacus_ac.grad_sample.alone.single import Cut, floats_in

_INTRO = "per-sample gradients would not be exact: a record's gradient in the batch is not the one that it gets alone: "
_INPUT = (
    "{name} ({kind}) is the first layer whose input does not have the records in its first dimension, in the order of "
    "the batch. Sort, pack, permute or flatten the batch before it is passed to the model (in collate_fn), hand each "
    "layer [B, ...], give constants a layer of their own that is frozen, or freeze {name}"
)
_OUTPUT = (
    "{name} ({kind}) is the first layer whose output for a record depends on the others of the batch, or on batches "
    "before. Replace it by one that treats each record for itself, keeping nothing (GroupNorm or LayerNorm for "
    "BatchNorm, say)"
)
_PADDING = (
    "it depends on the length to which the longest record of the batch pads it, first in {where}. Use rotary "
    'embeddings of type "default", pass position_ids and attention_mask, or pad every record to one length in the '
    "dataset, with the default collate_fn, and pass the batch to the model as it comes"
)
_RULE = (
    "that of {name} is off though every layer sees the record as it is. It is used in a way that its rule does not "
    "cover (its memory layout, arguments, or uses that the hooks do not see): make its input contiguous, use it "
    "through its own module, register a rule "
    '(opacus_ac.grad_sample.register_rule), try grad_sample_mode="functorch", or freeze it'
)
_CARRIED = (
    "run again on the same batch the model returns something else. It carries something over from one forward pass to "
    "the next (a state, a cache, statistics), so that records of one step are in the next one: pass that to the model "
    "as an input, or reset it"
)


@dataclass
class _Seen:
    """Inputs and outputs of a layer."""

    name: str
    kind: str
    inputs: list[Tensor]
    outputs: list[Tensor]


def explain_difference(
    call: Any, place: int, wrong: list[str], tolerance: float, runner: Any, by_padding: bool = False
) -> str:
    """Return the message of a refusal. It names the first layer that does not see the record, or the parameters.

    Args:
        call: the call of the model.
        place: number of the record among those that were run alone.
        wrong: names of the parameters whose gradients differ.
        tolerance: largest relative difference that is rounding.
        runner: runs the record again.
        by_padding: whether the gradients are those of the record alone with its padding.
    """
    cut: Cut = call.runs[place].cut
    loose = max(tolerance, 1e-3)
    try:
        whole = take_call(Cut(cut.rows, 0, cut.rows, cut.dim), call.arguments)
        batch, again = _trace(call, whole, 0, call.rows, runner)
        full = cut.padded()
        alone, _ = _trace(call, take_call(full, call.arguments), cut.first, cut.count, runner)
        if not _same_outputs(call, again, loose):
            return _INTRO + _CARRIED
        found = _first(batch, alone, full, loose, constants=by_padding)
        if found is None and cut.positions is not None:
            trimmed, _ = _trace(call, take_call(cut, call.arguments), cut.first, cut.count, runner)
            found = _first(batch, trimmed, cut, loose)
            where = "the loss" if found is None else f"{found[0].name} ({found[0].kind})"
            return _INTRO + _PADDING.format(where=where)
        if found is not None:
            return _INTRO + found[1].format(name=found[0].name, kind=found[0].kind)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        pass  # the second run is for the message only
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return _INTRO + _RULE.format(name=f"{wrong[0]}{more}")


def sees_the_record(call: Any, place: int, tolerance: float, runner: Any) -> bool:
    """Say whether every layer has the same inputs and outputs for a padded record alone as in the batch."""
    cut: Cut = call.runs[place].cut
    full = cut.padded()
    batch, _ = _trace(call, take_call(Cut(cut.rows, 0, cut.rows, cut.dim), call.arguments), 0, call.rows, runner)
    alone, _ = _trace(call, take_call(full, call.arguments), cut.first, cut.count, runner)
    return len(batch) == len(alone) and _first(batch, alone, full, max(tolerance, 1e-3), constants=True) is None


def _trace(call: Any, arguments: Any, first: int, count: int, runner: Any) -> tuple[list[_Seen], Any]:
    """Run records, and note inputs and outputs of each layer, in the order in which layers finish."""
    with getattr(runner, "as_before", nullcontext)():
        twin = isolated_twin(call.module)
    seen: list[_Seen] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [t.detach() for t in _tensors((*args, *kwargs.values()))]
            path = f"{call.path}.{name}" if call.path and name else call.path or name
            seen.append(
                _Seen(path or "the model", type(module).__name__, given, [t.detach() for t in _tensors(output)])
            )

        return hook

    for name, inner in twin.named_modules():
        inner.register_forward_hook(note(name), with_kwargs=True)
    masks = nullcontext() if call.masks is None else call.masks.of(first, count)
    dtype = call.autocast
    device = next(iter(call.outputs.values())).device.type
    autocast = nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)
    with runner.undisturbed(call.rows // call.users), masks, autocast, torch.enable_grad():
        output = twin(*arguments[0], **arguments[1])
    return seen, output


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _same_outputs(call: Any, output: Any, tolerance: float) -> bool:
    again = dict(floats_in(output))
    return all(path in again and _close(again[path].detach(), t, tolerance) for path, t in call.outputs.items())


def _first(
    batch: list[_Seen], alone: list[_Seen], cut: Cut, tolerance: float, constants: bool = False
) -> tuple[_Seen, str] | None:
    """Return the first layer with another input or output for the record than in the batch, and the message for it.

    Args:
        batch: the layers of the batch.
        alone: the layers of the record alone.
        cut: the rows of the record.
        tolerance: largest relative difference that is rounding.
        constants: whether a layer may get a value that has no dimension of records, and is the same for all of them.
    """
    for one, other in zip(batch, alone, strict=False):
        if one.name != other.name:
            return one, _INPUT
        for wholes, owns, message in ((one.inputs, other.inputs, _INPUT), (one.outputs, other.outputs, _OUTPUT)):
            for whole, own in zip(wholes, owns, strict=False):
                if constants and _close(whole, own, tolerance):
                    continue
                if not _is_record(whole, own, cut, tolerance):
                    return one, message
    return None


def _is_record(whole: Tensor, own: Tensor, cut: Cut, tolerance: float) -> bool:
    """Say whether ``own`` is the record's part of ``whole``, or the same constant for all records."""
    if whole.dim() == 0 or whole.shape == own.shape:
        return whole.dim() == 0 or (_close(whole, own, tolerance) and whole.shape[0] in (1, cut.count))
    if whole.dim() <= cut.dim or whole.shape[cut.dim] % cut.rows:
        return False
    each = whole.shape[cut.dim] // cut.rows
    part = cut.trimmed(whole.narrow(cut.dim, cut.first * each, cut.count * each))
    return part.shape != own.shape or _close(part, own, tolerance)


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    if not one.numel():
        return True
    size = float(torch.nan_to_num(one.double().abs().amax()))
    return bool(((one.double() - other.double()).abs().nan_to_num() <= tolerance * size).all())
