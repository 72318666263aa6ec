"""Mode "bk": gradient norms of records and clipped sums from one ordinary backward pass.

Per-sample gradients are not written down.

References:
    Bu et al., arXiv 2210.00038 (book-keeping: one backward pass); arXiv 2110.05679 (ghost norms for language models).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.folded_rows import FoldedRows
from opacus_ac.grad_sample.late_checks import LateChecks
from opacus_ac.grad_sample.one_backward.capture import Capture
from opacus_ac.grad_sample.one_backward.certified import certified
from opacus_ac.grad_sample.one_backward.gram import GramCache
from opacus_ac.grad_sample.one_backward.layer_terms import Terms, flattening_modules, tracked
from opacus_ac.grad_sample.one_backward.outer_products import Rows, Term
from opacus_ac.grad_sample.one_backward.parameter_book import ParameterBook
from opacus_ac.grad_sample.one_backward.routed import Routed, RoutedBook
from opacus_ac.grad_sample.one_backward.use import Use, by_record, records_in
from opacus_ac.grad_sample.one_backward.weighted_sums import Weights
from opacus_ac.grad_sample.precision import exact
from opacus_ac.grad_sample.sharded_parameters import places_of
from opacus_ac.grad_sample.source import Place, squares_by_parameter
from opacus_ac.grad_sample.user_rows import CountUsers, regroup

Book = ParameterBook | RoutedBook


_CALL_THE_MODEL = (
    ". If the loop calls a part of the model that make_private got, as training_step of Lightning does, pass the part "
    "that it calls to make_private"
)


@dataclass
class _Chunk:
    """The results of one backward pass: a book for each parameter, by its number, and the forward passes it used."""

    books: dict[int, Book] = field(default_factory=dict)
    squares: dict[int, Tensor] = field(default_factory=dict)
    model_passes: set[int] = field(default_factory=set)
    late: LateChecks = field(default_factory=LateChecks)
    rows: int = 0
    records: int = 0


class BookKeepingSource:
    """Computes norms and weighted sums of per-sample gradients from one backward pass.

    Hooks keep the input of each trained layer in the forward pass, and get the gradient at its output in the backward
    pass. The norms are computed from both. After clipping, one weighted product per layer is the sum. A weight that is
    tied, or used several times, is one parameter with one norm.

    Args:
        model: the model; it is not changed before :meth:`attach`.
        parameters: the trained parameters. Norms are over all of them.
        names: their names, for messages.
        loss_reduction: "mean" or "sum": how the loss of the training loop combines the records.
        users: counts the users of a batch, if a record is a user with several rows; None if a record is a row.
        exact_sums: whether sums are computed and kept in float64, so that one more record does not change how the
            gradients of the others are rounded.

    Guarantees:
        Norms are computed in float32 or float64, whatever the type of the activations. They are upper bounds of the
        contribution of each record, rounding included. Tensors that change between norm and sum are refused. If a
        trained parameter is also used where no rule sees it, it gets an ordinary gradient, and the step is refused.
        Records of two backward passes before a step are different records.

    References:
        arXiv 2210.00038.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        names: Sequence[str],
        loss_reduction: str = "mean",
        users: CountUsers | None = None,
        exact_sums: bool = False,
    ) -> None:
        self._model = model
        self._exact_sums = exact_sums
        self._parameters, self._names = list(parameters), list(names)
        self._index = {id(p): i for i, p in enumerate(self._parameters)}
        self._mean = loss_reduction == "mean"
        self._users = users
        self._capture: Capture | None = None
        self._shared: Callable[[], None] = lambda: None
        self._reset()

    def _reset(self) -> None:
        self._chunks: list[_Chunk] = [_Chunk()]
        self._grams = GramCache()
        self._weights: list[Weights] | None = None
        self._failed = False
        self._released = False

    def attach(self, folded: FoldedRows | None = None) -> Callable[[], None]:
        """Add the hooks to the model, and return a function that removes them.

        Args:
            folded: parts of the model that run each record as several rows.
        """
        items, self._rules, quantized = tracked(self._model)
        self._places = places_of(self._model, self._index)
        self._shared = quantized.clear
        outer = flattening_modules(self._model)
        self._capture = Capture(self._model, items, self._deliver, self._on_forward, outer, folded)
        return self._capture.remove

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context in which the hooks keep nothing of forward passes."""
        capture = self._capture
        if capture is not None:
            capture.paused = True
        try:
            yield
        finally:
            if capture is not None:
                capture.paused = False

    # ---------------------------------------------------------------- in forward and backward passes

    def _on_forward(self) -> None:
        """Note a forward pass. After a backward pass, it is of other records."""
        if self._chunks[-1].books:
            self._chunks.append(_Chunk())

    def _deliver(self, use: Use, gradient: Tensor) -> None:
        """Take the gradient at the output of one use of a module."""
        try:
            tensors, gradient = by_record(use, use.tensors(), gradient)
            chunk = self._chunks[-1]
            use.late = chunk.late
            self._check_batch(chunk, use, records_in(use, gradient))
            for parameter, term in self._terms(use, tensors, gradient):
                index = self._index.get(id(parameter), self._places(parameter, use.module))
                if index is not None and self._parameters[index].requires_grad:
                    if self._users is not None or use.folded is not None:
                        term = regroup(term, chunk.records)
                    self._add_term(chunk.books, index, parameter, term, use.path)
            chunk.model_passes.add(use.model_pass)
        except BaseException:
            self._failed = True
            raise

    def _terms(self, use: Use, tensors: tuple[Tensor, ...], gradient: Tensor) -> Terms:
        return (
            [(use.parameter, Rows(gradient))]
            if use.parameter is not None
            else self._rules[use.path](use, tensors, gradient)
        )

    def _add_term(
        self, books: dict[int, Book], index: int, parameter: nn.Parameter, term: Term | Routed, path: str
    ) -> None:
        """Add one use of a parameter to its book."""
        if isinstance(term, Routed):
            routed = books.setdefault(index, RoutedBook(parameter.shape))
            if isinstance(routed, RoutedBook):
                return routed.add(term, self._grams, path)
        else:
            plain = books.setdefault(index, ParameterBook(parameter.shape))
            if isinstance(plain, ParameterBook):
                return plain.add(term, self._grams, path)
        raise ValueError(f"{path}: a stack of experts is also used otherwise than by its experts. Freeze it")

    def _check_batch(self, chunk: _Chunk, use: Use, rows: int) -> None:
        if not chunk.books:
            chunk.rows = rows
        if rows != chunk.rows and chunk.model_passes - {use.model_pass}:
            raise ValueError(
                f"forward passes of {chunk.rows} and of {rows} rows went into one backward pass, and a row of the one "
                "would be added to a record of the other. Let exactly the records of a batch go through the model, and "
                "call backward() and optimizer.step() for each batch. Public rows that are trained on are records, "
                "too: add them to the dataset"
            )
        if rows != chunk.rows or rows == 0:
            remedy = "" if use.model_pass else _CALL_THE_MODEL
            raise ValueError(
                f"{use.path or 'the model'} ({type(use.module).__name__}) has an output of {rows} records, others "
                f"have {chunk.rows}: the batch must be the first dimension of every layer's input and output. A layer "
                f"that cuts records into windows is named with register_windows{remedy}"
            )
        if not chunk.books:
            chunk.records = rows if self._users is None else self._users(rows)

    # ---------------------------------------------------------------- GradientSource

    def finish_batch(self, weights: Sequence[float] | None = None) -> Tensor:
        """Return the norm by which each record is clipped, ``[B]`` float64 (see ``GradientSource``).

        Raises:
            ValueError: If there was no backward pass or an interrupted one, if a parameter was used where no rule sees
                it, if gradients of the last step were not cleared, if inputs or gradients were written in between, or
                if a check of a layer's rule failed.
        """
        if self._capture is not None:
            self._capture.restore()
        self._check()
        self._chunks = [c for c in self._chunks if c.books]
        self._shared()
        self._grams = GramCache()
        try:
            for chunk in self._chunks:
                chunk.late.verify()
        except BaseException:
            self._failed = True
            raise
        with exact():
            norms = [self._norms(chunk, weights) for chunk in self._chunks]
        return torch.cat(norms)

    def _check(self) -> None:
        if self._released or self._weights is not None:
            raise ValueError(
                "Gradients haven't been cleared since the last optimizer step. In order to obtain privacy "
                "guarantees you must call optimizer.zero_grad() on each step"
            )
        if self._failed:
            raise ValueError(
                "the last backward pass or step failed half-way: call optimizer.zero_grad() and run forward and "
                "backward again"
            )
        for name, parameter in zip(self._names, self._parameters, strict=True):
            if parameter.grad is not None:
                raise ValueError(
                    f"{name} has an ordinary gradient, which was not clipped: it is used outside of its own module, or "
                    "its module ran in evaluation mode. Use it through its module in training mode, or freeze it. If a "
                    "term of the loss penalizes the parameters themselves (L2, a proximal term), leave it out and pass "
                    "weight_decay to the optimizer"
                )
        if not any(chunk.books for chunk in self._chunks):
            raise ValueError(
                "Per sample gradient is not initialized: no gradient has reached a trained layer. Run forward and "
                "backward through the model that make_private returned, in training mode, before optimizer.step()"
            )

    def _norms(self, chunk: _Chunk, weights: Sequence[float] | None) -> Tensor:
        places = sorted(chunk.books)
        chosen = [1.0 if weights is None else weights[index] for index in places]
        norms, squares = certified([chunk.books[index] for index in places], chosen)
        chunk.squares = dict(zip(places, squares, strict=True))
        return norms * (chunk.records if self._mean else 1)

    def parameter_squares(self) -> Tensor:
        """Return the squared gradient norms of the finished batch, ``[B, P]``."""
        scales = [chunk.records**2 if self._mean else 1 for chunk in self._chunks]
        parts = [squares_by_parameter(chunk.squares, len(self._parameters)) for chunk in self._chunks]
        return torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)])

    @property
    def records(self) -> int:
        """Number of records of the last backward pass."""
        return self._chunks[-1].records

    def record_gradients(self, record: int) -> Iterator[Tensor | None]:
        """Yield the part of each parameter's ordinary gradient that is from one record of the last backward pass."""
        chunk = self._chunks[-1]
        chosen = torch.zeros(chunk.records, dtype=torch.float64)
        chosen[record] = 1.0
        weights = Weights(chosen)
        for index, parameter in enumerate(self._parameters):
            book = chunk.books.get(index)
            yield None if book is None else self._add(parameter, book, weights, None, None)

    def accumulate(self, factors: Tensor) -> None:
        """Note the factors. The sums are computed later, parameter by parameter."""
        sizes = [chunk.records for chunk in self._chunks]
        scales = [size if self._mean else 1 for size in sizes]
        self._weights = [Weights(f * scale) for f, scale in zip(factors.cpu().split(sizes), scales, strict=True)]

    def withdraw(self) -> None:
        """Undo :meth:`accumulate`."""
        self._weights = None
        self._failed = True  # the records stay until they are cleared, and no step may use them

    def settle(self) -> None:
        """Compute the sums now and forget the records, because another physical batch follows."""
        if self._weights is None:
            return
        for parameter, total in zip(self._parameters, self.sums(), strict=True):
            parameter.summed_grad = total  # type: ignore[attr-defined]

    def sums(self, place: Place | None = None) -> Iterator[Tensor | None]:
        """Yield the summed clipped gradient of each parameter (None for zero), and forget its records.

        Args:
            place: returns the memory for a parameter's sum, or None for new memory.
        """
        weights = self._weights or []
        for index, parameter in enumerate(self._parameters):
            total: Tensor | None = getattr(parameter, "summed_grad", None)
            parameter.summed_grad = None  # type: ignore[attr-defined]
            for chunk, chunk_weights in zip(self._chunks, weights, strict=False):
                book = chunk.books.pop(index, None)
                if book is not None:
                    total = self._add(parameter, book, chunk_weights, total, place)
            yield total
        self._released = True

    def _add(
        self, parameter: nn.Parameter, book: Book, weights: Weights, total: Tensor | None, place: Place | None
    ) -> Tensor:
        """Return ``total`` plus the weighted sum of a book."""
        out = place(parameter) if total is None and place is not None and not self._exact_sums else None
        if out is None:
            # The sum has the shape of the whole parameter, even if this rank holds a shard of it.
            dtype = torch.float64 if self._exact_sums else parameter.dtype
            out = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
        with exact():
            book.weighted_sum(weights, out)
            return out if total is None else total.add_(out)

    def clear(self, *, sums: bool) -> None:
        """Forget the records and the ordinary gradients; with ``sums`` also the clipped sums."""
        if self._capture is not None:
            self._capture.restore()
        self._reset()
        self._shared()
        for parameter in self._parameters:
            parameter.grad = None
            if sums:
                parameter.summed_grad = None  # type: ignore[attr-defined]

    @property
    def backward_passes(self) -> int:
        """Number of backward passes since the last step."""
        return len(self._chunks)

    @property
    def merged_passes(self) -> bool:
        """Whether one backward pass used several forward passes of the model.

        Record i of each forward pass then counts as one record. Only the number of drawn records shows whether that is
        right.
        """
        return any(len(chunk.model_passes) > 1 for chunk in self._chunks)
