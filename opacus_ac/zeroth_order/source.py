"""Per-record directional differences: what a zeroth-order step clips and sums in place of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from opacus_ac.zeroth_order.arithmetic import Evaluation
from opacus_ac.zeroth_order.coordinates import Coordinates

Closure = Callable[[], Tensor]


class DifferenceSource:
    """Measures ``(f_i(theta + lambda z_k) - f_i(theta - lambda z_k)) / (2 lambda)`` and sums the clipped vectors.

    These K differences of record i are its gradient in the coefficients of the directions at 0, up to ``O(lambda^2)``.

    Args:
        coordinates: the trained coordinates.
        coefficients: a tensor ``[K]`` float64 that stands for the coefficients; its ``summed_grad`` is the sum.
        order: norm by which records are clipped, 2 or 1.
        grid: None, or M: clipped values are cut to multiples of C / M, for noise on whole numbers.
        evaluate: returns the losses ``[B]`` float64 of a closure; by default in the types that it computes in.

    Attributes:
        largest_loss: size up to which losses count in full; differences of a record with larger ones count in
            proportion less, because rounding moves them by more (:mod:`rounding`). Infinite where nothing rounds by
            who else is in the batch.

    Guarantees:
        The weights are back after :meth:`measure`, whatever the closure does, up to a rounding that depends on weights
        and directions alone.
    """

    merged_passes = False
    backward_passes = 1

    def __init__(
        self,
        coordinates: Coordinates,
        coefficients: nn.Parameter,
        order: int = 2,
        grid: int | None = None,
        evaluate: Callable[[Closure], Tensor] | None = None,
    ) -> None:
        self.coordinates, self.coefficients = coordinates, coefficients
        self.order, self.grid = order, grid
        self._evaluate = evaluate or Evaluation(nn.Module(), wide=False)
        self.largest_loss = math.inf
        self.bound = 1.0  # C of the open logical batch, for the grid
        self._deltas: Tensor | None = None
        self._before: Tensor | None = None

    def measure(self, closure: Closure, seeds: Sequence[int], smoothing: float) -> Tensor:
        """Evaluate the records of the physical batch at both ends of every direction.

        Args:
            closure: computes the loss of every record, ``[B]``; called 2K times without gradients.
            seeds: the K directions.
            smoothing: lambda.

        Returns:
            ``[B]`` float64: each record's mean loss over all evaluations. Private.

        Raises:
            ValueError: If the closure gives another number of losses than before, or writes into the trained weights.
        """
        self._deltas = None
        columns: list[Tensor] = []
        total: Tensor | None = None
        size: Tensor | None = None
        for seed in seeds:
            up, down = self._ends(closure, seed, smoothing)
            if down.shape != up.shape or (total is not None and up.shape != total.shape):
                raise ValueError(
                    "the closure returned another number of losses than in its first call: it has to compute the "
                    "losses of the same records, in the same order, each time"
                )
            columns.append((up - down) / (2 * smoothing))
            total = up + down if total is None else total + up + down
            ends = torch.maximum(up.abs(), down.abs())
            size = ends if size is None else torch.maximum(size, ends)
        assert total is not None
        assert size is not None
        self._deltas = torch.stack(columns, 1) * (self.largest_loss / size).clamp(max=1.0)[:, None]
        return total / (2 * len(seeds))

    def _ends(self, closure: Closure, seed: int, smoothing: float) -> tuple[Tensor, Tensor]:
        """Return the losses ``[B]`` at theta + lambda z and theta - lambda z."""
        at = 0.0
        try:
            at += smoothing
            self.coordinates.move(seed, smoothing)
            up = self._losses(closure)
            at -= 2 * smoothing
            self.coordinates.move(seed, -2 * smoothing)
            down = self._losses(closure)
        finally:
            self.coordinates.move(seed, -at)
        return up, down

    def _losses(self, closure: Closure) -> Tensor:
        """Return the losses ``[B]`` of a closure that leaves the trained weights as they are."""
        versions = [p._version for p in self.coordinates.parameters]
        losses = self._evaluate(closure)
        if versions != [p._version for p in self.coordinates.parameters]:
            raise ValueError(
                "the closure changed the trained weights: it has to compute losses only. The weights are no longer "
                "those of a release: start again from a checkpoint"
            )
        return losses

    def parameter_squares(self) -> Tensor:
        """Not known here: differences are of all parameters together."""
        raise NotImplementedError("a difference of losses does not tell the parameters apart")

    def finish_batch(self, weights: Sequence[float] | None = None) -> Tensor:
        """Return the norm of each record's K differences, ``[B]`` float64; there are no ``weights`` here. Private."""
        assert weights is None
        if self._deltas is None:
            raise ValueError("nothing was measured: pass a closure to optimizer.step(closure)")
        return torch.linalg.vector_norm(self._deltas, ord=self.order, dim=1)

    @property
    def records(self) -> int:
        """Number of records that were measured."""
        return 0 if self._deltas is None else len(self._deltas)

    def record_gradients(self, record: int) -> Iterable[Tensor | None]:
        """Not known here: there are no gradients."""
        raise NotImplementedError("a difference of losses has no gradients of parameters")

    def accumulate(self, factors: Tensor) -> None:
        """Add ``sum_i factors[i] * delta_i`` to the sum of the logical batch; records with factor 0 leave no trace."""
        assert self._deltas is not None
        kept = factors != 0
        clipped = self._deltas[kept] * factors[kept, None]
        if self.grid is not None:
            # Towards zero: the norm of no record grows.
            clipped = (clipped * (self.grid / self.bound)).trunc_()
        added = clipped.sum(0)
        summed: Tensor | None = getattr(self.coefficients, "summed_grad", None)
        self._before = summed
        self.coefficients.summed_grad = added if summed is None else summed + added  # type: ignore[attr-defined]

    def withdraw(self) -> None:
        """Take back :meth:`accumulate`."""
        self.coefficients.summed_grad = self._before  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Let go of the physical batch."""
        self._deltas = None

    def sums(self, place: object = None) -> list[Tensor | None]:
        """Return the sum of the clipped vectors, ``[K]``, in units of the differences."""
        summed: Tensor | None = getattr(self.coefficients, "summed_grad", None)
        if summed is None or self.grid is None:
            return [summed]
        return [summed * (self.bound / self.grid)]

    def clear(self, *, sums: bool) -> None:
        """Forget the physical batch, and with ``sums`` the logical batch too."""
        self._deltas = None
        self.coefficients.grad = None
        if sums:
            self.coefficients.summed_grad = None  # type: ignore[attr-defined]
