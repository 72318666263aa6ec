"""Accounting for loaders that shuffle: each record at most once a pass, and no amplification by sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opacus_ac.accounting.events import Event, check_count, check_noise_multiplier


class ShuffledEpochs:
    """Decides which steps of a shuffled loader must be charged, and for which event.

    A record takes part in at most one step of a pass, so a whole pass, however many adaptive steps it has, costs what
    one un-sampled Gaussian release costs (parallel composition). It is charged at the first step of the pass; an
    unfinished pass counts as one.

    Guarantees:
        The sum of the charged events bounds the privacy loss under zero-out adjacency (one record's contribution is
        removed, the batches stay) if, within a pass, the caller's loader draws no record twice. Whatever contradicts
        that, or could, is charged again: a step number that does not grow, more steps than the pass has, a smaller
        noise multiplier than was charged, and resuming from a checkpoint unless the order is known to be the same.

    References:
        arXiv 2403.17673 and 2411.04205: the Poisson epsilon is not valid for shuffled batches.

    >>> epochs = ShuffledEpochs()
    >>> [epochs.charge(0, step, 2, noise_multiplier=1.0) is not None for step in range(2)]
    [True, False]
    >>> epochs.charge(1, 0, 2, noise_multiplier=1.0)
    Event(noise_multiplier=1.0, sample_rate=1.0, sampling='shuffled')
    """

    def __init__(self) -> None:
        self._open: tuple[int, int] | None = None  # (pass, block of steps in it) that is paid for
        self._last_step = -1
        self._noise_multiplier = 0.0  # the smallest charged in the open block

    def charge(self, pass_index: int, step_in_pass: int, steps_per_pass: int, noise_multiplier: float) -> Event | None:
        """Return the event to account before this step's release; None if the pass is already paid for.

        Args:
            pass_index: number of the pass over the data, from 0; it must change whenever the order is drawn again.
            step_in_pass: number of the step within the pass, from 0.
            steps_per_pass: steps after which every record may have been visited; each further block of so many steps
                is a new charge.
            noise_multiplier: this step's noise multiplier.

        Returns:
            ``Event(noise_multiplier, 1.0, "shuffled")`` or None.

        Raises:
            ValueError: If an argument is out of range; nothing changes then.
        """
        event = self.price(pass_index, step_in_pass, steps_per_pass, noise_multiplier)
        self.paid(pass_index, step_in_pass, steps_per_pass, noise_multiplier)
        return event

    def price(self, pass_index: int, step_in_pass: int, steps_per_pass: int, noise_multiplier: float) -> Event | None:
        """Return what :meth:`charge` would return, and note nothing, because the charge may still fail.

        Arguments and errors are those of :meth:`charge`.
        """
        block, step, noise = _place(pass_index, step_in_pass, steps_per_pass, noise_multiplier)
        covered = block == self._open and step > self._last_step and noise >= self._noise_multiplier
        return None if covered else Event(noise, 1.0, "shuffled")

    def paid(self, pass_index: int, step_in_pass: int, steps_per_pass: int, noise_multiplier: float) -> None:
        """Note that what :meth:`price` asked for has been charged; arguments and errors are those of :meth:`charge`."""
        block, step, noise = _place(pass_index, step_in_pass, steps_per_pass, noise_multiplier)
        if self.price(pass_index, step_in_pass, steps_per_pass, noise_multiplier) is not None:
            self._open, self._noise_multiplier = block, noise
        self._last_step = step

    def state_dict(self) -> dict[str, Any]:
        """Return the open pass as plain values; the accountant has the events that were charged."""
        return {
            "open": list(self._open) if self._open is not None else None,
            "last_step": self._last_step,
            "noise_multiplier": self._noise_multiplier,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *, same_order: bool = False) -> None:
        """Resume from a saved state.

        Args:
            state_dict: what ``state_dict`` returned.
            same_order: whether the loader goes on in the very order that it had when the state was saved. By default
                the next step is charged, because a loader that shuffles anew may visit a record a second time.

        Raises:
            ValueError: If the state is incomplete or invalid; nothing changes then.
        """
        try:
            saved, last, noise = state_dict["open"], state_dict["last_step"], state_dict["noise_multiplier"]
            block = None if saved is None else (check_count(saved[0], "pass"), check_count(saved[1], "block"))
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"state_dict is not one of ShuffledEpochs: {error!r}") from error
        last, noise = check_count(last, "last_step", minimum=-1), check_noise_multiplier(noise)
        self._open, self._last_step, self._noise_multiplier = (block if same_order else None), last, noise


def _place(
    pass_index: int, step_in_pass: int, steps_per_pass: int, noise_multiplier: float
) -> tuple[tuple[int, int], int, float]:
    """Return pass and block of steps in it, step, and noise multiplier, all checked."""
    pass_index, step = check_count(pass_index, "pass_index"), check_count(step_in_pass, "step_in_pass")
    block = pass_index, step // check_count(steps_per_pass, "steps_per_pass", minimum=1)
    return block, step, check_noise_multiplier(noise_multiplier)
