"""Chooses the route of a dense gradient: written down for each record, or by Gram matrices.

Below the limit of memory (:mod:`outer_products`) a gradient that is written down takes at most as many multiplications
as Gram matrices and the weighted sum do. It also is written to memory and read twice, which a device with fast products
may have to wait for. So for devices other than the CPU, both are tried once, on sides at the limit. If Gram
matrices are clearly faster there, they are used from half of the limit on. The bounds of norms are the same for both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward import trial, written_down
from opacus_ac.grad_sample.one_backward.bounds import squared_norms
from opacus_ac.grad_sample.one_backward.gram import GramCache
from opacus_ac.grad_sample.one_backward.norm_sums import dense_sums
from opacus_ac.grad_sample.one_backward.outer_products import Dense
from opacus_ac.grad_sample.one_backward.weighted_sums import add_product, add_rows

_TRIED = (8, 256, 512)
"""Records, positions, and the size of both sides of the trial. A gradient has as many entries as its factors."""


def is_written_down(term: Dense) -> bool:
    """Say whether the gradients of a dense layer's first use are written down."""
    if not term.worth_keeping or term.left.device.type == "cpu":
        return term.worth_keeping
    positions, height, width = *term.left.shape[1:], term.right.shape[2]
    near = 2 * height * width > positions * (height + width)
    return not (near and grams_are_faster(term.left))


def grams_are_faster(like: Tensor) -> bool:
    """Say whether Gram matrices were clearly faster in a trial with the type and the device of ``like``."""
    return trial.is_faster(("routes", like.device.type, like.dtype), partial(_candidates, like))


def _candidates(like: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    batch, positions, size = _TRIED
    term = Dense(like.new_ones(batch, positions, size), like.new_ones(batch, positions, size))
    factors = torch.ones(batch, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    out = torch.empty(size, size, dtype=factors.dtype, device=like.device)

    def write_down() -> None:
        rows = written_down.gradients(term.left, term.right)
        squared_norms(rows)
        add_rows(rows, factors, out, first=True)

    def by_grams() -> None:
        dense_sums(term, GramCache())
        add_product(out, term.left, term.right, factors.view(-1, 1, 1), first=True)

    return write_down, by_grams
