"""Compares the gradients of a record in its batch with those of the record alone, up to rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.alone.call import Call
from opacus_ac.grad_sample.alone.own_length import OwnLengths
from opacus_ac.grad_sample.alone.runner import Runner
from opacus_ac.grad_sample.alone.trace import explain_difference, sees_the_record
from opacus_ac.grad_sample.source import GradientSource
from opacus_ac.grad_sample.transfers import on_host

_TOLERANCE = (1e-3, 1e-2)
"""Tolerances in float32: largest relative difference, and smallest norm of a gradient relative to the whole gradient.

Correct models in float32 stay below 1e-5, and faults begin at 0.08. The second number is for gradients that are zero in
exact arithmetic (key biases of attention, biases before norms). They consist of rounding, which is small compared with
the whole gradient.
"""
_COARSE = (6e-2, 0.1)
"""Tolerances under bfloat16 autocast. Rounding may exceed them, as with many frozen layers in bfloat16."""
_OWN_ROUNDING = 3.0
"""Largest ratio of two distances from float64: of the gradient in the batch, and of the gradient alone, both rounded to
bfloat16."""
_MOST_ROUNDING = 0.15
"""Largest difference from float64, relative to the norm, that can be rounding."""

_CANNOT_RUN = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
"""Errors of a record that cannot be run again."""

Gradients = Mapping[int, Tensor | None]
"""A record's gradients, by the ``id`` of the parameter."""


@dataclass(frozen=True)
class Comparison:
    """Compares the gradients of one record.

    Attributes:
        calls: the calls of the model in the forward pass, whose gradients are added up.
        place: number of the record among those that were run alone.
        source: has the gradients of the batch, not yet summed.
        parameters: the trained parameters.
        names: their names.
        mean: whether the loss is a mean over records.
        runner: runs the record again.
        own_lengths: knows the lengths to which the loader pads every record.
    """

    calls: list[Call]
    place: int
    source: GradientSource
    parameters: list[nn.Parameter]
    names: list[str]
    mean: bool
    runner: Runner
    own_lengths: OwnLengths

    @property
    def _record(self) -> int:
        """Number of the record in the batch."""
        cut = self.calls[0].cuts[self.place]
        return cut.first // cut.count

    @property
    def _coarse(self) -> bool:
        return any(call.coarse for call in self.calls)

    def told(self) -> bool:
        """Compare the gradients, and return whether that was conclusive (finite gradients that are not zero).

        Raises:
            ValueError: If the gradients differ. The message names the first layer that does not see the records.
        """
        alone = self._gradients_alone()
        tolerance, floor = _COARSE if self._coarse else _TOLERANCE
        found = []
        for parameter, given in zip(self.parameters, self.source.record_gradients(self._record), strict=True):
            if not parameter.requires_grad:  # a parameter that was frozen since is not released
                given = None
            own = alone.get(id(parameter))
            found.append(_norms(own, given, _difference(own, given)))
        norms = on_host(found).tolist() if found else []
        size = max(sum(mine**2 for mine, _, _ in norms), sum(theirs**2 for _, theirs, _ in norms)) ** 0.5
        if not size < float("inf"):  # a record that is not finite is left out
            return False
        wrong = [
            name
            for name, (mine, theirs, error) in zip(self.names, norms, strict=True)
            if not error <= tolerance * max(mine, theirs, floor * size)
        ]
        if wrong and not (
            self._agrees(size, rounded=alone if self._coarse else None) or self._agrees_with_padding(size)
        ):
            by_padding = self._agrees_if_padded(size)
            raise ValueError(explain_difference(self.calls[0], self.place, wrong, tolerance, self.runner, by_padding))
        return size > 0

    def _gradients_alone(self) -> Gradients:
        """Return the gradients of the record alone, for the trained parameters."""
        total: Any = 0.0
        for call in self.calls:
            run = call.runs[self.place]
            total = total + call.loss_of(run.cut, run.outputs, self.mean)
        trained = [p for p in self.parameters if p.requires_grad]
        if not (isinstance(total, Tensor) and total.requires_grad):
            return dict.fromkeys(map(id, trained))
        return dict(zip(map(id, trained), _gradients(total, trained), strict=True))

    def _agrees_with_padding(self, size: float) -> bool:
        """Say whether the gradients agree with the record's own padding, while no layer mixes it with other records."""
        padded = [call for call in self.calls if call.runs[self.place].cut.positions is not None]
        if not padded or not all(self.own_lengths.accept(call) for call in padded):
            return False
        tolerance = (_COARSE if self._coarse else _TOLERANCE)[0]
        try:
            return self._agrees_if_padded(size) and all(
                sees_the_record(call, self.place, tolerance, self.runner) for call in self.calls
            )
        except _CANNOT_RUN:
            return False

    def _agrees_if_padded(self, size: float) -> bool:
        """Say whether the gradients agree with those of the record alone with its padding."""
        # In float64 some models are not finite: they multiply masks, in float32, by the least number of float64.
        widths = (False,) if self._coarse else (True, False)
        try:
            return any(self._agrees(size, padded=True, wide=wide) for wide in widths)
        except _CANNOT_RUN:
            return False

    def _agrees(
        self, size: float, *, padded: bool = False, wide: bool = True, rounded: Gradients | None = None
    ) -> bool:
        """Run the record again, and say whether its gradients agree with those of the source.

        Args:
            size: norm of the whole gradient.
            padded: run the record with its padding.
            wide: run it in float64. If the gradients then agree, the difference was rounding of terms that cancel.
            rounded: gradients of the record alone in bfloat16. Their distance from float64 is the size of rounding.
        """
        alone = self._gradients_again(padded, wide)
        if alone is None:
            return False
        tolerance, floor = _COARSE if self._coarse and not wide else _TOLERANCE
        found = []
        for parameter, given in zip(self.parameters, self.source.record_gradients(self._record), strict=True):
            exact = alone.get(id(parameter))
            coarse = exact if rounded is None else rounded.get(id(parameter))
            found.append(_norms(exact, _difference(exact, coarse), _difference(exact, given)))
        for exact_norm, own_rounding, off in on_host(found).tolist() if found else []:
            norm = max(exact_norm, floor * size)
            allowed = tolerance * norm
            if rounded is not None:
                allowed = min(_COARSE[0] / 2 * norm + _OWN_ROUNDING * own_rounding, _MOST_ROUNDING * norm)
            if not off <= allowed:
                return False
        return True

    def _gradients_again(self, padded: bool, wide: bool) -> Gradients | None:
        """Run the record again and return its gradients; None if it cannot be run or has none."""
        total: Any = 0.0
        found: dict[str, nn.Parameter] = {}
        for call in self.calls:
            cut = call.cuts[self.place]
            cut = cut.padded() if padded else cut
            again = self.runner.run_again(call, cut, wide)
            if again is None:
                return None
            twin, outputs = again
            prefix = f"{call.path}." if call.path else ""
            found.update({prefix + name: p for name, p in twin.named_parameters(remove_duplicate=False)})
            total = total + call.loss_of(cut, outputs, self.mean)
        if not (isinstance(total, Tensor) and total.requires_grad):
            return None
        own = {id(p): found[name] for p, name in zip(self.parameters, self.names, strict=True) if name in found}
        known = {key: p for key, p in own.items() if p.requires_grad}
        return dict(zip(known, _gradients(total, list(known.values())), strict=True))


def _gradients(total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """Return gradients of a scalar, those of a backward pass within the backward pass (reversible layers) included."""
    before = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        left = [p.grad for p in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
    return [one if two is None else two if one is None else one + two for one, two in zip(found, left, strict=True)]


def _norms(*gradients: Tensor | None) -> Tensor:
    """Return the norms of gradients, ``[n]`` in float64 on their device; 0 for None."""
    device = next((g.device for g in gradients if g is not None), None)
    none = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(
        [none if g is None else torch.linalg.vector_norm(g.detach(), dtype=torch.float64) for g in gradients]
    )


def _difference(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one.detach() - other.detach()
