"""Book-keeping for one parameter: its uses, from which norms and weighted sums of per-sample gradients are computed.

Norms are computed from ``[T, T]`` Gram matrices (:mod:`norm_sums`). Where it is cheaper, the per-sample gradients are
written down, and kept. Rounding is bounded in both cases (:mod:`bounds`). If the bound is too far above the norm of a
record, the gradient of the record is computed in float64 (:mod:`written_down`).

References:
    Bu et al., arXiv 2210.00038 (book-keeping).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward import written_down
from opacus_ac.grad_sample.one_backward.bounds import Certificate, of_rows, unit, wide
from opacus_ac.grad_sample.one_backward.gram import GramCache
from opacus_ac.grad_sample.one_backward.norm_sums import (
    NormSums,
    dense_cross,
    dense_lookup_cross,
    dense_sizes,
    dense_sums,
    lookup_cross,
    lookup_sums,
)
from opacus_ac.grad_sample.one_backward.outer_products import Dense, Lookup, Rows, Term
from opacus_ac.grad_sample.one_backward.routes import is_written_down
from opacus_ac.grad_sample.one_backward.weighted_sums import Weights, add_lookups, add_product, add_rows
from opacus_ac.grad_sample.unchanged import Unchanged


@dataclass
class ParameterBook:
    """The contributions of the records of one backward pass to the gradient of one parameter.

    Squared norms are added up when the terms arrive, while their factors are still in the processor's cache.
    """

    shape: torch.Size
    dense: list[Dense] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    rows: Tensor | None = None
    apart: list[int] = field(default_factory=list)
    """Records whose gradients are computed in float64, for their norm and for the sum."""
    _found: NormSums | None = None
    """Not used if there are rows."""
    _used: Unchanged = field(default_factory=Unchanged)

    def add(self, term: Term, cache: GramCache, path: str = "") -> None:
        """Add one use of the parameter, by the module ``path``."""
        if isinstance(term, Rows):
            self._add_rows(term.values, path)
        elif isinstance(term, Dense) and (self.rows is not None or (not self.dense and is_written_down(term))):
            self._keep(term)
            self._count(dense_sizes(term, cache), [])
        elif isinstance(term, Dense):
            crosses = [dense_cross(term, other) for other in self.dense]
            crosses += [dense_lookup_cross(term, other) for other in self.lookups]
            self._count(dense_sums(term, cache), crosses)
            self.dense.append(term)
            self._used.note(_described(path), term.left, term.right)
        else:
            crosses = [] if self.rows is not None else [lookup_cross(term, other) for other in self.lookups]
            crosses += [] if self.rows is not None else [dense_lookup_cross(other, term) for other in self.dense]
            self._count(lookup_sums(term, written_down=self.rows is not None), crosses)
            self.lookups.append(term)
            self._used.note(_described(path), term.ids, term.right)

    def _count(self, own: NormSums, crosses: list[Tensor]) -> None:
        for cross in crosses:
            own.squares = 2 * cross if own.squares is None else own.squares + 2 * cross
        self._found = own if self._found is None else self._found.plus(own)

    def _add_rows(self, values: Tensor, path: str) -> None:
        values = wide(values)
        if self.rows is None:
            self.rows = values
            self._used.note(_described(path), values)
        else:
            # Not in place, because a rule may have returned a view of a tensor that is still needed.
            self.rows = self.rows + values

    def _keep(self, term: Dense) -> None:
        rows = written_down.gradients(term.left, term.right)
        self.rows = rows if self.rows is None else self.rows + rows.view(self.rows.shape)

    def check_unchanged(self) -> None:
        """Check that no tensor was written after a norm was computed from it.

        Raises:
            ValueError: If one was written.
        """
        self._used.check()

    @property
    def only_rows(self) -> Tensor | None:
        """The written-down gradients ``[B, ...]``, if there is nothing to add to them."""
        return None if self.dense or self.lookups else self.rows

    def certificate(self, squares: Tensor | None = None) -> Certificate:
        """Return the norm of each record, with its error.

        Args:
            squares: squared norms of :attr:`only_rows`, if they are known.

        Raises:
            ValueError: If a tensor was written after a norm was computed from it.
        """
        self.check_unchanged()
        if self.rows is not None:
            self._materialise()
            alone = of_rows(self.rows, squares)
            if self._found is None:
                return alone
            found = self._found.certify(alone.squares, self.rows, self.shape.numel())
            return replace(found, underflow=found.underflow + alone.underflow)
        assert self._found is not None
        assert self._found.squares is not None
        held = self.dense[0].left if self.dense else self.lookups[0].right
        return self._found.certify(self._found.squares, held, self.shape.numel())

    def write_down(self, record: int) -> Tensor:
        """Compute one record's gradient in float64 from now on. Returns a bound of its norm, and the squared norm."""
        self.apart.append(record)
        held = self.dense[0].left if self.dense else self.lookups[0].right
        return written_down.bound(self.shape, self.dense, self.lookups, record, unit(held.dtype, held.device))

    def are_zero(self, records: Sequence[int]) -> Tensor:
        """Return for each of some records whether all of its contributions are zero. The result is on the device."""
        return ~torch.stack([self._has_any(record) for record in records])

    def _has_any(self, record: int) -> Tensor:
        if self.rows is not None:
            return self.rows[record].any()
        found = [d.left[record].any() & d.right[record].any() for d in self.dense]
        return torch.stack(found + [entry.right[record].any() for entry in self.lookups]).any()

    def _materialise(self) -> None:
        """Add all terms to ``rows``, because a part of the gradient is written down already."""
        assert self.rows is not None
        batch = self.rows.shape[0]
        for term in self.dense:
            self._keep(term)
        for lookup in self.lookups:
            rows, width = self.shape
            first = torch.arange(batch, device=lookup.ids.device).unsqueeze(1) * rows
            flat = self.rows.reshape(batch * rows, width).clone()
            flat.index_add_(0, (lookup.ids + first).reshape(-1), wide(lookup.right).reshape(-1, width).to(flat.dtype))
            self.rows = flat.view(batch, rows, width)
        self.dense, self.lookups = [], []

    def weighted_sum(self, weights: Weights, out: Tensor) -> None:
        """Write ``sum_i weights[i] G_i`` into ``out``. It is computed in float64 if ``out`` is float64.

        Args:
            weights: one weight per record.
            out: contiguous tensor with the shape of the parameter.

        Raises:
            ValueError: If a tensor was written after a norm was computed from it.
        """
        self.check_unchanged()
        if self.rows is not None:
            add_rows(weights.pick(self.rows), weights.like(out), out, first=True)
            return
        together = weights.without(self.apart)
        self._add_terms(together, out, together.like(out).view(-1, 1, 1))
        for record in self.apart:
            if weights.of(record) != 0:
                for part, block in written_down.blocks(self.shape, self.dense, self.lookups, record):
                    out[part] += block.mul_(weights.of(record)).to(out)

    def _add_terms(self, weights: Weights, out: Tensor, factors: Tensor) -> None:
        """Write the weighted sum of all outer products into ``out``. The factors ``[kept, 1, 1]`` have its type."""
        first = True
        for d in self.dense if len(factors) else []:
            add_product(out, weights.pick(d.left), weights.pick(d.right), factors, first=first)
            first = False
        if first:
            out.zero_()
        for entry in self.lookups if len(factors) else []:
            values = weights.pick(entry.right).double() * factors.double()
            add_lookups(weights.pick(entry.ids).reshape(-1), values.flatten(0, 1), out)

    @property
    def routes(self) -> str:
        """Name of the way in which the norm is computed, for tests and reports."""
        names = ["kept"] * (self.rows is not None) + ["gram"] * bool(self.dense) + ["lookup"] * bool(self.lookups)
        return "+".join(names)


def _described(path: str) -> str:
    return f"the input of {path or 'the model'}, or the gradient at its output,"
