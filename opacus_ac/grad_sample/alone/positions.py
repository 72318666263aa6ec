"""Arguments of a call that name positions of the padded batch. A record that runs without its padding has others.

These are arguments of transformers' models: ``logits_to_keep``, a number of last positions or their numbers, and
``position_ids`` and the like, which may be of all records together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opacus_ac.grad_sample.alone.single import Cut

_NAMES = ("logits_to_keep", "num_logits_to_keep")
_BY_POSITION = ("position_ids", "cache_position", "token_type_ids")
"""Names of tensors ``[B, T, ...]``, of ``[T]`` or ``[1, T]`` for all records, and of ``[3, B, T]`` or ``[4, B, T]``."""
_AXES = (3, 4)
"""Numbers of positions that a token has in models of text and pictures: time, height and width, and one in the text."""

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


def take_call(cut: Cut, arguments: Arguments) -> Any:
    """Return the arguments of a call for a part of its batch.

    >>> mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    >>> take_call(Cut(2, 0, 1, positions=(2, 4, 4)), ((mask,), {"logits_to_keep": 3}))
    ((tensor([[1, 1]]),), {'logits_to_keep': 2})
    """
    args, kwargs = arguments
    taken, own = cut.take((args, {name: value for name, value in kwargs.items() if name not in _NAMES}))
    own |= {name: _own_kept(kwargs[name], cut) for name in _NAMES if name in kwargs}
    own |= {name: _by_position(kwargs[name], cut) for name in _BY_POSITION if isinstance(kwargs.get(name), Tensor)}
    return taken, own


def _by_position(value: Tensor, cut: Cut) -> Tensor:
    own = value.detach()
    if own.dim() == 3 and own.shape[0] in _AXES and own.shape[1] == cut.rows:
        own = own.narrow(1, cut.first, cut.count)
    elif own.dim() > 1 and own.shape[0] == cut.rows:
        return cut.of(value)
    if cut.positions is not None and own.shape[-1] == cut.positions[2]:
        own = own.narrow(-1, cut.positions[0], cut.positions[1] - cut.positions[0])
    return own.clone()


def _own_kept(asked: Any, cut: Cut) -> Any:
    kept = None if cut.positions is None else _positions(asked, cut.positions[2])
    if kept is None:
        return asked
    own = kept[_is_own(kept, cut)]
    # transformers reads 0 as "all positions", so one output is computed even if none is asked for
    return own - cut.positions[0] if isinstance(asked, Tensor) else max(len(own), 1)  # type: ignore[index]


def part_of_output(cut: Cut, output: Tensor, arguments: Arguments) -> Tensor:
    """Return a copy of a part of an output ``[B, ...]``, or of its gradient, without the outputs of padding."""
    for name in _NAMES:
        kept = None if cut.positions is None else _positions(arguments[1].get(name), cut.positions[2])
        if kept is not None and output.dim() > 1 and output.shape[:2] == (cut.rows, len(kept)):
            return cut.padded().of(output)[:, _is_own(kept, cut).to(output.device)]
    return cut.of(output)


def _positions(asked: Any, length: int) -> Tensor | None:
    """Return the positions ``[K]`` whose outputs are asked for; None if these are all, or it is not known which."""
    if isinstance(asked, Tensor):
        return asked.detach().cpu() if asked.dim() == 1 and asked.dtype in (torch.int32, torch.int64) else None
    if not isinstance(asked, int) or isinstance(asked, bool) or asked <= 0:
        return None
    return torch.arange(max(length - asked, 0), length)


def _is_own(kept: Tensor, cut: Cut) -> Tensor:
    assert cut.positions is not None
    first, end, _ = cut.positions
    return (kept >= first) & (kept < end)
