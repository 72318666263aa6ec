"""Per-sample gradients of a stack of matrices, of which every row of a batch uses one: the experts of a mixture.

Row s uses matrix ``e_s`` and belongs to record ``r_s``. For every expert, the gradient of a record is a sum of outer
products::

    G_i[e] = sum_{s: r_s = i, e_s = e} left_s (x) right_s

The rows of one record in one expert are a group. Groups take the place of records in what is known of sums of outer
products (:mod:`norm_sums`). The squared norm of a record is the sum over its groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward import written_down
from opacus_ac.grad_sample.one_backward.bounds import Certificate, squared_norms, unit
from opacus_ac.grad_sample.one_backward.experts import expert_of_rows, stretches
from opacus_ac.grad_sample.one_backward.gram import GramCache
from opacus_ac.grad_sample.one_backward.norm_sums import NormSums, dense_sizes, dense_sums
from opacus_ac.grad_sample.one_backward.outer_products import Dense
from opacus_ac.grad_sample.one_backward.reach import Reach, reaches
from opacus_ac.grad_sample.one_backward.weighted_sums import Weights, add_product
from opacus_ac.grad_sample.unchanged import Unchanged

_NUMBERS = 1 << 24
"""Numbers of gradients of groups that are written down at a time, for their norms."""


@dataclass
class Routed:
    """What one use of a stack of matrices ``[E, I, J]`` adds to gradients of records; rows are in the order of experts.

    Attributes:
        left: ``[S, I]``.
        right: ``[S, J]``.
        records: which record a row belongs to, ``[S]`` integers.
        counts: number of rows of each expert, in order.
        batch: number of records.
    """

    left: Tensor
    right: Tensor
    records: Tensor
    counts: list[int]
    batch: int

    def groups(self) -> Tensor:
        """Return the group of each row, ``expert * B + record``, ``[S]``."""
        return expert_of_rows(self.counts, self.records.device) * self.batch + self.records

    def of_expert(self, rows: slice, record: int) -> Dense:
        """Return the outer products of one record in a stretch, as a batch of one."""
        chosen = (self.records[rows] == record).nonzero().reshape(-1)
        return Dense(self.left[rows][chosen].unsqueeze(0), self.right[rows][chosen].unsqueeze(0))


@dataclass
class RoutedBook:
    """What the records of one backward pass contribute to the gradient of one stack of matrices ``[E, I, J]``."""

    shape: torch.Size
    uses: list[Routed] = field(default_factory=list)
    apart: list[int] = field(default_factory=list)
    _used: Unchanged = field(default_factory=Unchanged)
    rows = only_rows = None

    def add(self, term: Routed, cache: GramCache, path: str = "") -> None:
        """Add one use of the stack, by the module ``path``."""
        self.uses.append(term)
        self._used.note(f"rows of {path}", term.left, term.right, term.records)

    def certificate(self, squares: Tensor | None = None) -> Certificate:
        """What is known of each record's norm.

        Raises:
            ValueError: what it was computed from was written to since.
        """
        self._used.check()
        use = self._together()
        found, held = _found(use), use.left
        assert found.squares is not None
        return found.certify(found.squares, held, self.shape.numel())

    def _together(self) -> Routed:
        """Return all uses as one: rows of a second use are more rows of the same groups."""
        if len(self.uses) > 1:
            first, *others = self.uses
            for other in others:
                first = _joined(first, other)
            self.uses = [first]
            self._used = Unchanged()
            self._used.note("the rows of experts", first.left, first.right, first.records)
        return self.uses[0]

    def write_down(self, record: int) -> Tensor:
        """Compute a record's gradient in float64 from now on; return a bound of its norm, and the squared norm."""
        self.apart.append(record)
        use = self._together()
        own = unit(use.left.dtype, use.left.device)
        used = [use.of_expert(rows, record) for _, rows in stretches(use.counts)]
        parts = [torch.zeros(2, dtype=torch.float64, device=use.left.device)]
        parts += [written_down.bound(self.shape[1:], [one], [], 0, own) for one in used if one.left.numel()]
        bounds, squares = torch.stack(parts).unbind(1)
        return torch.stack([torch.linalg.vector_norm(bounds), squares.sum()])

    def are_zero(self, records: Sequence[int]) -> Tensor:
        """Return for each of some records whether all of its contributions are zero. The result is on the device."""
        used = [(use, use.left.any(1) & use.right.any(1)) for use in self.uses]
        found = [
            torch.stack([(any_row & (use.records == record)).any() for use, any_row in used]) for record in records
        ]
        return ~torch.stack(found).any(1)

    def weighted_sum(self, weights: Weights, out: Tensor) -> None:
        """Write ``sum_i weights[i] G_i`` into ``out``, of the stack's shape, in its type.

        Raises:
            ValueError: what the norms were computed from was written to since.
        """
        self._used.check()
        use = self._together()
        together = weights.without(self.apart)
        factors = together.every_like(out)[use.records]
        left, right = use.left, use.right
        if together.any_zero:  # a record of weight 0 may have values that are not finite
            gone = (factors == 0).unsqueeze(1)
            left, right = left.masked_fill(gone, 0), right.masked_fill(gone, 0)
        parts = zip(*(x.unsqueeze(1).split(use.counts) for x in (left, right, factors.view(-1, 1))), strict=True)
        for expert, (own_left, own_right, own) in enumerate(parts):
            if len(own):  # each row is like a record of one position
                add_product(out[expert], own_left, own_right, own, first=True)
            else:
                out[expert].zero_()
        for record in self.apart:
            if weights.of(record) != 0:
                self._add_apart(use, record, weights.of(record), out)

    def _add_apart(self, use: Routed, record: int, weight: float, out: Tensor) -> None:
        for expert, rows in stretches(use.counts):
            for part, block in written_down.blocks(self.shape[1:], [use.of_expert(rows, record)], [], 0):
                out[expert][part] += block.mul_(weight).to(out)

    @property
    def routes(self) -> str:
        """How the norm is computed, for tests and reports."""
        return "routed"


def _joined(one: Routed, other: Routed) -> Routed:
    if one.batch != other.batch or len(one.counts) != len(other.counts):
        raise ValueError("two uses of one stack of experts have different records: use it once for every record")
    groups = torch.cat([one.groups(), other.groups()])
    order = groups.argsort(stable=True)
    return Routed(
        torch.cat([one.left, other.left])[order],
        torch.cat([one.right, other.right])[order],
        torch.cat([one.records, other.records])[order],
        [a + b for a, b in zip(one.counts, other.counts, strict=True)],
        one.batch,
    )


def _found(use: Routed) -> NormSums:
    """Return what is known of the norms of records, from that of their groups."""
    batch, device = use.batch, use.left.device
    zeros = torch.zeros(batch, dtype=torch.float64, device=device)
    total = NormSums(zeros, Reach(zeros, zeros), (), 0, 1, 0.0)
    for ids, groups in _filled_up(use):
        total = replace(total.plus(_of_records(_groups_found(groups), ids % batch, batch)), uses=1)
    return total


def _filled_up(use: Routed) -> Iterator[tuple[Tensor, Dense]]:
    """Yield groups of one length after filling up with zeros: their numbers ``[G]``, and their outer products."""
    of_rows = use.groups()
    ids, sizes = of_rows.unique(return_counts=True)
    order = of_rows.argsort(stable=True)  # rows of a group need not be next to each other
    starts = sizes.cumsum(0) - sizes
    chosen, places, outside = [], [], []
    for length, groups in _by_length(sizes):
        place = starts[groups].unsqueeze(1) + torch.arange(length, device=order.device)
        chosen.append(groups)
        places.append(place)
        outside.append(place >= (starts + sizes)[groups].unsqueeze(1))
    if not chosen:
        return
    rows = order[torch.cat([place.reshape(-1) for place in places]).clamp_(max=len(order) - 1)]
    filling = torch.cat([out.reshape(-1) for out in outside]).nonzero().reshape(-1)
    # All at once: there are many lengths, and few groups of each.
    left, right = (side.index_select(0, rows).index_fill_(0, filling, 0) for side in (use.left, use.right))
    numbers = [place.numel() for place in places]
    sides = zip(left.split(numbers), right.split(numbers), strict=True)
    for groups, place, (one, other) in zip(chosen, places, sides, strict=True):
        yield ids[groups], Dense(one.unflatten(0, place.shape), other.unflatten(0, place.shape))


def _by_length(sizes: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield groups ``[G]`` by the length that they are filled up to; it does not depend on other groups.

    There are two lengths for each power of two, so that at most half of a group is filling.
    """
    steps = (sizes.clamp(min=1).double().log2().floor() - 1).clamp(min=0).exp2().long()
    lengths = (sizes + steps - 1) // steps * steps
    for length in lengths.unique().tolist():
        yield length, (lengths == length).nonzero().reshape(-1)


def _groups_found(groups: Dense) -> NormSums:
    """Return what is known of the norms of groups: by Gram matrices, or by their gradients where that is less work."""
    length, height, width = groups.left.shape[1], groups.left.shape[2], groups.right.shape[2]
    if length * (height + width) <= height * width:
        return dense_sums(groups, GramCache())
    found = dense_sizes(groups, GramCache())
    step = max(1, _NUMBERS // (height * width))
    parts = []
    for first in range(0, len(groups.left), step):
        some = slice(first, first + step)
        parts.append(squared_norms(written_down.gradients(groups.left[some], groups.right[some])))
    return replace(found, squares=torch.cat(parts))


def _of_records(groups: NormSums, records: Tensor, batch: int) -> NormSums:
    """Return what is known of records, from their groups; records ``[G]``."""
    zeros = torch.zeros(batch, dtype=torch.float64, device=records.device)
    (reach,) = reaches(groups.sides)  # of groups, so it cannot wait for those of other layers
    assert groups.squares is not None
    largest = None if reach.largest is None else zeros.scatter_reduce(0, records, reach.largest, "amax")
    return replace(
        groups,
        squares=zeros.index_add(0, records, groups.squares.to(records.device)),
        reach=Reach(zeros.index_add(0, records, reach.total), largest),
        sides=(),
    )
