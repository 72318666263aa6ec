"""What each record adds to the release beside its gradient: one count in a norm histogram, and its clipped loss.

A record with clipped gradient of norm at most ``u C`` leaves room ``1 - u^2`` in the unit ball, so it may report
its norm bin with weight ``w = sqrt(1 + a^2 - u^2)`` (slack encoding): small gradients are seen nearly for free and
``a^2`` pays for seeing the clipped ones. How a record's gradient is spread over groups of parameters is a unit vector,
with weight c. The joint vector (gradient / C, histogram, loss, groups) of one record has L2 norm at most
``sqrt(1 + a^2 + b^2 + c^2)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from opacus_ac._validate import not_negative
from opacus_ac.protocols.part import Part
from opacus_ac.release.values import Decoded, FloatArray, NoisyHistogram, NoisyProfile, NormWindow, StepRelease

DEFAULT_WEIGHT = math.sqrt(0.0412)
"""Weight of a statistic that leaves 98 % of the noise multiplier to the gradient."""
SMALLEST_WEIGHT = 0.02
WANTED_ERROR = 0.05
"""Std of the released clip rate of one step that is precise enough: the policies average over 10 steps and more."""


def energy_profiles(squares: FloatArray) -> FloatArray:
    """Return ``squares / |squares|`` row by row: vectors ``[B, G]`` of length 1.

    The row of a gradient that is zero or not finite is 0. Second moments of the group norms are what an allocation
    needs. Divided by the length, every record uses the whole sensitivity that is paid for. Shares
    ``squares / sum(squares)`` would be shorter, the more groups there are.

    Args:
        squares: squared norms ``[B, G]`` of the records' gradients, by group.
    """
    largest = squares.max(axis=1, initial=0.0, keepdims=True)
    known = np.isfinite(squares).all(axis=1, keepdims=True) & (largest > 0)
    relative = np.where(known, squares, 0.0) / np.where(known, largest, 1.0)  # of squares of squares, none overflows
    return np.asarray(relative / np.maximum(np.linalg.norm(relative, axis=1, keepdims=True), 1.0))


def default_histogram_weight(noise_multiplier: float, expected_batch_size: float) -> float:
    """Return ``a``, the smallest weight of clipped records in the histogram that a step needs.

    The clip rate of a batch of B is released with noise of std ``z sqrt(1 + a^2) / (a B)``, and costs a factor
    ``sqrt(1 + a^2)`` of noise on the gradient. Small batches get the largest weight, which costs 2 %. For larger ones
    ``a`` falls with B, so that the std stays at ``WANTED_ERROR`` (0.05). A function of public numbers.

    Args:
        noise_multiplier: ratio of the noise std to the joint sensitivity.
        expected_batch_size: B.

    >>> [round(default_histogram_weight(0.7, size), 3) for size in (48, 200, 10_000)]
    [0.203, 0.07, 0.02]
    """
    wanted = noise_multiplier / (WANTED_ERROR * expected_batch_size)
    return min(max(wanted / math.sqrt(max(1 - wanted**2, 0.5)), SMALLEST_WEIGHT), DEFAULT_WEIGHT)


class StepStatistics(Part):
    """Sums over the records of one logical batch of what is released beside the gradient.

    Args:
        histogram: whether the norm histogram is released.
        histogram_weight: ``a``; 0 shows unclipped records only, at no cost.
        loss_bound: ``L``, the public bound to which each record's loss is clipped, or None for no loss.
        loss_weight: ``b``; ignored without ``loss_bound``.
        bins: number ``K`` of histogram bins between the tails.
        groups: number ``G`` of groups of parameters whose energy profile is released; 0 for none.
        group_weight: ``c``; ignored without ``groups``.

    Guarantees:
        The vector (sum of clipped gradients / C, ``vector()``) moves by at most ``sensitivity`` in L2 norm when one
        record is added or removed, whatever its gradient and loss, non-finite ones included.
    """

    def __init__(
        self,
        *,
        histogram: bool = True,
        histogram_weight: float = DEFAULT_WEIGHT,
        loss_bound: float | None = None,
        loss_weight: float = DEFAULT_WEIGHT,
        bins: int = 20,
        groups: int = 0,
        group_weight: float = DEFAULT_WEIGHT,
    ) -> None:
        weights = {"histogram_weight": histogram_weight, "loss_weight": loss_weight, "group_weight": group_weight}
        for name, value in weights.items():
            not_negative(**{name: value})
        if loss_bound is not None and not (math.isfinite(loss_bound) and loss_bound > 0 and loss_weight > 0):
            raise ValueError(f"loss_bound must be a finite number > 0 with loss_weight > 0, got {loss_bound!r}")
        if bins < 2:
            raise ValueError(f"bins must be at least 2, got {bins!r}")
        if groups < 0 or (groups and group_weight == 0):
            raise ValueError(f"groups must be at least 0, with group_weight > 0, got {groups!r} and {group_weight!r}")
        self.histogram = histogram
        self.histogram_weight = histogram_weight if histogram else 0.0
        self.loss_bound = loss_bound
        self.loss_weight = loss_weight if loss_bound is not None else 0.0
        self.bins = bins
        self.groups = groups
        self.group_weight = group_weight if groups else 0.0
        self._window: NormWindow | None = None

    @property
    def sensitivity(self) -> float:
        """Joint L2 sensitivity ``sqrt(1 + a^2 + b^2 + c^2)`` in units of C, gradient included."""
        return math.sqrt(1 + self.histogram_weight**2 + self.loss_weight**2 + self.group_weight**2)

    @property
    def needs_losses(self) -> bool:
        """Whether :meth:`observe` needs the losses of the records."""
        return self.loss_bound is not None

    def begin(self, bound: float, gradient_share: Callable[[FloatArray], FloatArray]) -> None:
        """Start a logical batch at clipping norm ``bound``.

        Args:
            bound: C of this step.
            gradient_share: maps norm / C (the upper edge of a bin) to the largest norm / C that a gradient of that
                bin has after clipping.
        """
        window = NormWindow.around(bound, self.bins)
        upper = np.append(window.edges / bound, np.inf)
        self._shares = np.clip(gradient_share(upper), 0.0, 1.0)  # of somebody's policy: it may fail
        self._window = window
        self._weights = np.sqrt(np.maximum(1 + self.histogram_weight**2 - self._shares**2, 0.0))
        self._counts = np.zeros(self.bins + 2, dtype=np.int64)
        self._loss_sum = 0.0
        self._profile_sum = np.zeros(self.groups)

    @property
    def started(self) -> bool:
        """Whether a logical batch is open."""
        return self._window is not None

    def check_kept(self, norms: FloatArray, kept: FloatArray) -> None:
        """Refuse clipped gradients that use room which the histogram was given.

        Args:
            norms: gradient norms of the records ``[B]``.
            kept: their norms after clipping, in units of C.

        Raises:
            ValueError: If one keeps more than the ``gradient_share`` of its bin: histogram and gradient together would
                exceed the declared sensitivity.
        """
        assert self._window is not None
        if self.histogram and not bool((kept <= self._shares[self._window.groups(norms)] + 1e-6).all()):
            raise ValueError(
                "the clip policy leaves a gradient longer than its gradient_share declares, and the histogram was "
                "encoded to use that room: nothing was released. A policy that enlarges small gradients overrides "
                "gradient_share(ratio) with the "
                "largest norm over C that it leaves of gradients up to ratio times C (AutomaticPolicy returns 1); "
                "opacus_ac.testing.policies.check_clip_policy says where it is exceeded"
            )

    def observe(self, norms: FloatArray, losses: FloatArray | None, squares: FloatArray | None = None) -> None:
        """Add a physical batch: ``norms``, and what else is released.

        Args:
            norms: gradient norms ``[B]`` of the records, as they are clipped.
            losses: their losses ``[B]``.
            squares: their squared gradient norms by group ``[B, G]``.
        """
        assert self._window is not None
        if self.histogram:
            self._counts += np.bincount(self._window.groups(norms), minlength=self.bins + 2)
        if self.loss_bound is not None:
            if losses is None or losses.shape != norms.shape:
                got = "none" if losses is None else f"{losses.shape[0]}"
                raise ValueError(
                    f"the noisy loss needs one loss per record ({norms.shape[0]}), got {got}: "
                    "call optimizer.record_losses(per_record_losses) before step(), or pass loss_bound=None"
                )
            clipped = np.clip(np.nan_to_num(losses, nan=self.loss_bound, posinf=self.loss_bound), 0.0, self.loss_bound)
            self._loss_sum += float(clipped.sum()) / self.loss_bound
        if self.groups:
            if squares is None or squares.shape != (norms.shape[0], self.groups):
                got = "none" if squares is None else f"shape {squares.shape}"
                raise ValueError(
                    f"the profile of {self.groups} groups needs squared norms [B, G] of each record, got {got}"
                )
            self._profile_sum += energy_profiles(squares).sum(axis=0)

    def sums(self) -> tuple[Any, ...]:
        """Return the sums so far, for :meth:`restore`. Private."""
        return self._counts.copy(), self._loss_sum, self._profile_sum.copy()

    def restore(self, sums: tuple[Any, ...]) -> None:
        """Take back what was observed since :meth:`sums`."""
        counts, self._loss_sum, profile = sums
        self._counts, self._profile_sum = counts.copy(), profile.copy()

    @property
    def tally_size(self) -> int:
        """Number of integers in :meth:`tally`."""
        return self.bins + 3

    def tally(self) -> npt.NDArray[np.int64]:
        """Return the sums of this process as integers ``[bins + 3]``: counts, and the bits of the loss sum. Private."""
        if self.groups:
            raise ValueError("the energy profile of groups is not added up over processes: use one, or groups=0")
        return np.append(self._counts, np.float64(self._loss_sum).view(np.int64))

    def merge(self, tallies: npt.NDArray[np.int64]) -> None:
        """Replace the own sums by those of several processes ``[world, bins + 3]``.

        Counts are added exactly, losses in the order of the processes.
        """
        self._counts = tallies[:, :-1].sum(0)
        self._loss_sum = float(sum(tallies[:, -1].view(np.float64).tolist()))

    def vector(self) -> FloatArray:
        """Return the un-noised statistics ``[bins + 2]`` (+ 1 with a loss, + groups), in units of the release.

        They are private.
        """
        parts = [self._weights * self._counts] if self.histogram else []
        if self.loss_bound is not None:
            parts.append(np.array([self.loss_weight * self._loss_sum]))
        if self.groups:
            parts.append(np.asarray(self.group_weight * self._profile_sum))
        return np.concatenate(parts) if parts else np.zeros(0)

    def decode(self, noisy: FloatArray, std: float, expected_batch_size: float) -> Decoded:
        """Turn the noised vector (noise std ``std`` per entry) into histogram, mean loss and mean profile."""
        assert self._window is not None
        histogram = loss = profile = None
        if self.histogram:
            seen = self._weights > 1e-6
            weights = np.where(seen, self._weights, 1.0)
            variances = np.where(seen, (std / weights) ** 2, np.inf)
            counts = np.where(seen, noisy[: self.bins + 2] / weights, 0.0)
            histogram = NoisyHistogram(self._window, counts, variances, expected_batch_size)
        if self.loss_bound is not None:
            entry = float(noisy[len(noisy) - self.groups - 1])
            loss = entry / self.loss_weight * self.loss_bound / expected_batch_size
        if self.groups:
            unit = self.group_weight * expected_batch_size
            profile = NoisyProfile(noisy[-self.groups :] / unit, std / unit)
        return Decoded(histogram, loss, profile)

    def loss_std(self, release: StepRelease) -> float | None:
        """Return the std of the noise in the mean loss of a release, a public constant; None without a loss."""
        if release.loss is None or self.loss_bound is None:
            return None
        share = self.loss_weight * release.expected_batch_size
        return release.gradient_noise_multiplier * self.loss_bound / share

    def published(self, release: StepRelease) -> FloatArray:
        """Return the noised vector that a release shows, as :meth:`vector` has it: what :meth:`decode` was made from.

        In its units a record adds at most ``sqrt(a^2 + b^2 + c^2)``.
        """
        parts = [np.zeros(0)]
        if release.histogram is not None:
            parts.append(np.asarray(release.histogram.counts * release.histogram_weights))
        if release.loss is not None and self.loss_bound is not None:
            parts.append(np.array([release.loss * release.expected_batch_size / self.loss_bound * self.loss_weight]))
        if release.profile is not None:
            parts.append(np.asarray(release.profile.energies * release.expected_batch_size * self.group_weight))
        return np.concatenate(parts)

    def finish(self) -> None:
        """Forget the sums of the logical batch."""
        self._window = None

    def released(self) -> list[str]:
        """Return in words what every step releases beside the sum of gradients."""
        found = []
        if self.histogram:
            found.append(f"a histogram of gradient norms (weight a = {self.histogram_weight:.3f})")
        if self.loss_bound is not None:
            weight = f"weight b = {self.loss_weight:.3f}"
            found.append(f"the mean loss, each record's clipped to {self.loss_bound:g} ({weight})")
        if self.groups:
            weight = f"weight c = {self.group_weight:.3f}"
            found.append(f"the mean profile of gradient energy over {self.groups} groups of parameters ({weight})")
        return found

    def public_settings(self) -> dict[str, Any]:
        """Return what is released, with its weights."""
        return {"statistics": self.state_dict()}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` when ``state`` is of a run that released something else."""
        if state != self.state_dict():
            raise ValueError(
                f"the state was written with other statistics ({state}) than this optimizer's ({self.state_dict()}): "
                "build it with the same settings"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the public settings; an entry that is new stands there only where it is used."""
        return {
            "histogram": self.histogram,
            "histogram_weight": self.histogram_weight,
            "loss_bound": self.loss_bound,
            "loss_weight": self.loss_weight,
            "bins": self.bins,
            **({"groups": self.groups, "group_weight": self.group_weight} if self.groups else {}),
        }
