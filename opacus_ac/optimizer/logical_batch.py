"""The logical batch as a transaction: drawn, clipped, charged, released, applied. One that fails leaves nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields

OPEN, CHARGED, RELEASED, APPLIED, DEAD = "open", "charged", "released", "applied", "dead"

_NEXT = {OPEN: (CHARGED,), CHARGED: (RELEASED, OPEN), RELEASED: (APPLIED,), APPLIED: (), DEAD: ()}
"""States that may follow each. A charged batch is open again when its release did not begin: a retry is charged
anew."""


@dataclass(frozen=True)
class Terms:
    """What is read once when a logical batch opens and holds until it is applied.

    Attributes:
        max_grad_norm: C.
        noise_multiplier: ratio of the noise's standard deviation to the L2 sensitivity of the release.
        weights: public weights of the parameters by a noise allocation; None for 1.
        trained: which of the private parameters are trained.
    """

    max_grad_norm: float
    noise_multiplier: float
    weights: tuple[float, ...] | None
    trained: tuple[bool, ...]


_CHANGED = {
    "max_grad_norm": (
        "max_grad_norm changed from {0:g} to {1:g} within a logical batch: step a grad clip scheduler only after "
        "optimizer.step() has taken a real step"
    ),
    "noise_multiplier": (
        "noise_multiplier changed from {0:g} to {1:g} within a logical batch, whose charge and noise must be of one: "
        "step a noise scheduler only after optimizer.step() has taken a real step"
    ),
    "weights": (
        "the weights of the noise allocation changed within a logical batch: its records were clipped by others. Load "
        "a state, or update the allocation, only after optimizer.step() has taken a real step"
    ),
    "trained": (
        "parameters were frozen or unfrozen within a logical batch, whose records were clipped by others: do so only "
        "after optimizer.step() has taken a real step"
    ),
}


class LogicalBatch:
    """One draw, or one batch of unknown origin, on its way to a release.

    Args:
        key: number of the logical batch; None for a batch of unknown origin.
        terms: what holds for it.

    Attributes:
        parts: number of physical batches whose records are in the sums.
        state: "open", "charged", "released", "applied" or "dead".

    Guarantees:
        States follow each other in one order. A dead batch stays dead.
    """

    def __init__(self, key: int | None, terms: Terms) -> None:
        self.key, self.terms = key, terms
        self.parts = 0
        self.state = OPEN

    def advance(self, state: str) -> None:
        """Go on to the next state.

        Raises:
            RuntimeError: it does not follow the present one.
        """
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"a logical batch that is {self.state} cannot become {state}")
        self.state = state

    def kill(self) -> None:
        """Note that the batch cannot be released any more."""
        if self.state != APPLIED:
            self.state = DEAD

    def check(self, terms: Terms) -> None:
        """Kill the batch and raise ``ValueError`` when what was read as it opened has changed since."""
        for field in fields(Terms):
            before, now = getattr(self.terms, field.name), getattr(terms, field.name)
            if before != now:
                self.kill()
                raise ValueError(_CHANGED[field.name].format(before, now))
