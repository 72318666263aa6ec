"""The source of per-sample gradients for Opacus's modes "hooks" and "functorch".

A source answers two questions of the optimizer about the last physical batch: the norm of each record's gradient and,
for one factor per record, the weighted sum of the gradients. It knows nothing about clipping rules, noise or
accounting. The source in this file reads the ``grad_sample`` tensors of Opacus. The source of mode "bk" is in
:mod:`opacus_ac.grad_sample.one_backward.source`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.folded_rows import FoldedRows
from opacus_ac.grad_sample.one_backward.bounds import of_rows, stacked
from opacus_ac.grad_sample.one_backward.weighted_sums import add_rows
from opacus_ac.grad_sample.precision import exact
from opacus_ac.grad_sample.source import Place, squares_by_parameter
from opacus_ac.grad_sample.unchanged import Unchanged
from opacus_ac.grad_sample.user_rows import CountUsers, sum_rows

_SUM_TOLERANCE = 0.01
"""Relative error of sums above which a parameter is refused. bfloat16 autocast stays well below, a missed use above."""


_SMALL = 1e-3
"""Share of the norm of all gradients below which the gradient of one parameter may be rounding only."""


class PerSampleSource:
    """Reads the ``grad_sample`` tensors that Opacus's hooks leave on the parameters.

    Args:
        parameters: trainable parameters of the optimizer.
        names: their names, for messages.
        loss_reduction: "mean" or "sum": how the loss combines the records.
        users: counts the users of a batch, if a record is a user with several rows; None if a record is a row.
        exact_sums: whether sums are computed and kept in float64, so that one more record does not change how the
            gradients of the others are rounded.

    Guarantees:
        The first time that a parameter gets a gradient, its per-sample gradients must add up to the gradient of
        autograd. So a weight that is also used where the hooks do not see it is found, and refused.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        names: Sequence[str] | None = None,
        loss_reduction: str = "mean",
        users: CountUsers | None = None,
        exact_sums: bool = False,
    ) -> None:
        self._parameters = list(parameters)
        self._exact_sums = exact_sums
        self._names = list(names) if names is not None else [f"parameter {i}" for i in range(len(self._parameters))]
        self._mean = loss_reduction == "mean"
        self._users = users
        self._verified: set[int] = set()
        self._squares: dict[int, Tensor] = {}
        self._deviations: list[tuple[str, int, float, float]] = []
        self._before: list[Tensor | None] = []
        self._used = Unchanged()
        self._hooked: list[nn.Module] = []
        self._others: list[nn.Parameter] = []
        self._marked: dict[nn.Module, int] = {}

    def attach(self, module: nn.Module, folded: FoldedRows | None = None) -> None:
        """Note the model. Opacus's hooks keep inputs of layers on its modules.

        Args:
            module: the model.
            folded: parts of the model that run each record as several rows.
        """
        self._hooked = list(module.modules())
        own = {id(p) for p in self._parameters}
        self._others = [p for p in module.parameters() if id(p) not in own]
        if folded:
            users = self._users
            self._users = folded.records if users is None else lambda rows: users(folded.records(rows))

    def mark(self) -> None:
        """Note which inputs of layers Opacus's hooks keep at this moment."""
        self._marked = {module: len(getattr(module, "activations", None) or ()) for module in self._hooked}

    def forget_interrupted(self) -> None:
        """Remove inputs that Opacus's hooks keep of passes before :meth:`mark` that had no complete backward pass.

        A complete backward pass leaves nothing behind. After an interrupted one, the next gradients would get rows of
        the batch before.
        """
        for module, inputs in self._marked.items():
            if inputs:
                del module.activations[:inputs]  # type: ignore[operator, union-attr]
            if hasattr(module, "max_batch_len"):
                del module.max_batch_len
            for parameter in module.parameters(recurse=False):
                kept = getattr(parameter, "_forward_counter", 0)
                if kept:
                    parameter._forward_counter = max(kept - inputs, 0)  # type: ignore[attr-defined]
        for parameter in self._parameters:
            if getattr(parameter, "_current_grad_sample", None) is not None:
                del parameter._current_grad_sample  # type: ignore[attr-defined]
        self._marked = {}

    def _rows(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the per-sample gradients ``[B, *shape]`` of ``parameter``; None if it was not used."""
        sample: Any = getattr(parameter, "grad_sample", None)
        if self._users is None or sample is None:
            return torch.cat(sample) if isinstance(sample, list) else sample
        if isinstance(sample, list):
            raise ValueError(
                "several backward passes went through one batch, so it is unknown which rows are of one user: call "
                "backward() once per batch of the private loader"
            )
        users = self._users(sample.shape[0])
        summed = sum_rows(sample, users)
        # Opacus has multiplied by the number of rows, although the loss is a mean over users.
        return summed * (users / sample.shape[0]) if self._mean else summed

    def finish_batch(self, weights: Sequence[float] | None = None) -> Tensor:
        """Return the norm by which each record is clipped, ``[B]`` float64 (see :class:`GradientSource`).

        Raises:
            ValueError: If no parameter has per-sample gradients, if a parameter has an ordinary gradient only, if batch
                sizes differ between parameters, or if gradients were not cleared after the last step.
        """
        total: Tensor | None = None
        self._squares, self._deviations, self._used = {}, [], Unchanged()
        for index, (name, parameter) in enumerate(zip(self._names, self._parameters, strict=True)):
            self._check(name, parameter)
            rows = self._rows(parameter)
            if rows is None:
                continue
            known = stacked([of_rows(rows)])
            squares, bound = known.squares[0], known.bounds()[0].square()
            for record in (squares == 0).nonzero().reshape(-1).tolist():
                if not bool(rows[record].any()):  # all entries are zero, so nothing was lost to underflow
                    bound[record] = 0.0
            self._verify(name, parameter, rows, squares)
            sample: Any = parameter.grad_sample  # type: ignore[attr-defined]
            self._used.note(f"the per-sample gradient of {name}", *(sample if isinstance(sample, list) else [sample]))
            if total is not None and squares.shape != total.shape:
                raise ValueError(
                    f"{name} has per-sample gradients of {squares.shape[0]} records, other parameters of "
                    f"{total.shape[0]}: the batch must be the first dimension of every layer's input"
                )
            self._squares[index] = squares
            bound = bound if weights is None else bound * weights[index] ** 2
            total = bound if total is None else total + bound
        if total is None:
            raise ValueError(
                "Per sample gradient is not initialized: no parameter has grad_sample. Run forward and backward "
                "through the model that make_private returned, in training mode, before optimizer.step()"
            )
        self._judge()
        return total.sqrt()

    def parameter_squares(self) -> Tensor:
        """Return the squared gradient norms ``[B, P]`` of the batch that was finished."""
        return squares_by_parameter(self._squares, len(self._parameters))

    @property
    def records(self) -> int:
        """Number of records that the last backward pass went through."""
        return next((len(rows) for p in self._parameters if (rows := self._last(p)) is not None), 0)

    def _last(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the rows of the last backward pass."""
        sample: Any = getattr(parameter, "grad_sample", None)
        return sample[-1] if isinstance(sample, list) else self._rows(parameter)

    def record_gradients(self, record: int) -> Iterator[Tensor | None]:
        """Yield the part of each parameter's ordinary gradient that is from one record of the last backward pass."""
        for parameter in self._parameters:
            rows = self._last(parameter)
            yield None if rows is None else rows[record] / (len(rows) if self._mean else 1)

    @staticmethod
    def _check(name: str, parameter: nn.Parameter) -> None:
        sample = getattr(parameter, "grad_sample", None)
        if sample is None and parameter.grad is not None:
            raise ValueError(
                f"{name} has a gradient but no per-sample gradient, so it cannot be clipped: it is used outside the "
                "modules that Opacus's hooks see. Freeze it, or use it through its own module"
            )
        if any(hasattr(rows, "_processed") for rows in (sample if isinstance(sample, list) else [sample])):
            raise ValueError(
                "Gradients haven't been cleared since the last optimizer step. In order to obtain privacy "
                "guarantees you must call optimizer.zero_grad() on each step"
            )

    def _verify(self, name: str, parameter: nn.Parameter, rows: Tensor, squares: Tensor) -> None:
        """Compare the per-sample gradients with autograd's own gradient, once per parameter."""
        unknown = parameter.grad is None or isinstance(parameter.grad_sample, list)  # type: ignore[attr-defined]
        if unknown or id(parameter) in self._verified or not bool(torch.isfinite(squares).all()):
            return
        assert parameter.grad is not None
        total = rows.sum(0) / (rows.shape[0] if self._mean else 1)
        scale = float(squares.sqrt().sum()) / (rows.shape[0] if self._mean else 1)
        wrong = float(torch.linalg.vector_norm(total.double() - parameter.grad.double()))
        scale = max(scale, float(torch.linalg.vector_norm(parameter.grad.double())))
        self._deviations.append((name, id(parameter), wrong, scale))

    def _judge(self) -> None:
        """Refuse a deviation of :meth:`_verify` that is larger than rounding.

        A gradient that is zero in exact arithmetic (key biases of attention, biases before norms) consists of rounding
        only, and is small compared with the gradients of the other parameters.

        Raises:
            ValueError: If the deviation of a parameter is too large.
        """
        deviations, self._deviations = self._deviations, []
        if not deviations:
            return
        records = torch.stack(list(self._squares.values())).sum(0).sqrt()
        whole = float(records.sum()) / (len(records) if self._mean else 1)
        for name, parameter, wrong, scale in deviations:
            if wrong > _SUM_TOLERANCE * max(scale, _SMALL * whole):
                raise ValueError(
                    f"the per-sample gradients of {name} do not add up to its gradient (off by {wrong / scale:.0%}): "
                    "it is used outside its own module, or its module takes inputs that the hooks do not see. Use it "
                    "through its module, freeze it, or register a rule (opacus_ac.grad_sample.register_rule)"
                )
            if scale > _SMALL * whole:
                self._verified.add(parameter)

    def accumulate(self, factors: Tensor) -> None:
        """Add the weighted sum of the per-sample gradients to each parameter's ``summed_grad``.

        Raises:
            ValueError: If per-sample gradients were written after their norms were computed.
        """
        self._used.check()
        kept = factors.nonzero().reshape(-1)
        everything = kept.numel() == factors.numel()
        self._before = [getattr(parameter, "summed_grad", None) for parameter in self._parameters]
        for parameter in self._parameters:
            rows = self._rows(parameter)
            if rows is None:
                continue
            # Left out, not multiplied by zero, because a record's gradient may have entries that are not finite.
            chosen = rows if everything else rows[kept.to(rows.device)]
            dtype = torch.float64 if self._exact_sums else parameter.dtype
            added = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
            with exact():
                add_rows(chosen if self._exact_sums else chosen.to(dtype), factors[kept], added, first=True)
            summed = getattr(parameter, "summed_grad", None)
            # Not in place, because the sum before is needed again if the step fails.
            parameter.summed_grad = added if summed is None else summed + added  # type: ignore[attr-defined]
            sample: Any = parameter.grad_sample  # type: ignore[attr-defined]
            for part in sample if isinstance(sample, list) else [sample]:
                part._processed = True  # Opacus's mark against using gradients twice

    def withdraw(self) -> None:
        """Undo :meth:`accumulate`."""
        for parameter, before in zip(self._parameters, self._before, strict=False):
            parameter.summed_grad = before  # type: ignore[attr-defined]
        self._before = []

    def settle(self) -> None:
        """Forget the sums from before :meth:`accumulate`, which can no longer be undone."""
        self._before = []

    @property
    def backward_passes(self) -> int:
        """Number of backward passes since the last step, at least 1."""
        samples = [getattr(p, "grad_sample", None) for p in self._parameters]
        return max((len(s) if isinstance(s, list) else 1 for s in samples), default=1)

    @property
    def merged_passes(self) -> bool:
        """False, because Opacus's hooks do not show it."""
        return False

    def sums(self, place: Place | None = None) -> list[Tensor | None]:
        """Return the summed clipped gradients of the logical batch."""
        return [getattr(parameter, "summed_grad", None) for parameter in self._parameters]

    def clear(self, *, sums: bool) -> None:
        """Forget per-sample gradients and ordinary gradients; with ``sums`` also the clipped sums."""
        self._squares, self._before, self._used = {}, [], Unchanged()
        if any(hasattr(parameter, "_current_grad_sample") for parameter in self._parameters):
            self._forget_broken_pass()
        for parameter in self._others:  # of another optimizer, whose zero_grad() knows no per-sample gradients
            if getattr(parameter, "grad_sample", None) is not None:
                parameter.grad_sample = None  # type: ignore[attr-defined]
        for parameter in self._parameters:
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
            if sums:
                parameter.summed_grad = None  # type: ignore[attr-defined]

    def _forget_broken_pass(self) -> None:
        """Remove remains of an interrupted backward pass, to which Opacus would add the next gradients."""
        for parameter in self._parameters:
            if hasattr(parameter, "_current_grad_sample"):
                del parameter._current_grad_sample
            if hasattr(parameter, "_forward_counter"):
                parameter._forward_counter = 0
