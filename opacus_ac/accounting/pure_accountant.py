"""The accountant "pure": epsilon without delta, for Laplace noise on Poisson batches, by basic composition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from opacus.accountants import IAccountant

from opacus_ac.accounting.events import Event, check_count, check_delta, check_noise_multiplier, check_sample_rate
from opacus_ac.accounting.history import HistorySnapshot, Run, append_run, checked_runs


def laplace_epsilon(noise_multiplier: float, sample_rate: float) -> float:
    """Return the epsilon of one Laplace release on a Poisson batch, ``ln(1 + q (exp(1 / z) - 1))``.

    Args:
        noise_multiplier: z, the ratio of the scale b of the noise to the L1 sensitivity.
        sample_rate: q, the probability with which each record enters the batch.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Dwork et al. 2006 (Laplace mechanism); Balle et al. 2018 (arXiv 1807.01647, theorem 8: Poisson sampling under
        adding or removing a record).

    >>> round(laplace_epsilon(1.0, 1.0), 6), round(laplace_epsilon(1.0, 0.01), 6)
    (1.0, 0.017037)
    """
    noise, rate = check_noise_multiplier(noise_multiplier), check_sample_rate(sample_rate)
    if rate == 0.0 or math.isinf(noise):
        return 0.0
    if noise == 0.0:
        return math.inf
    whole = 1.0 / noise
    if whole > 700.0:  # exp would overflow; what is dropped is below 1e-300
        return whole + math.log(rate) if rate < 1.0 else whole
    return math.log1p(rate * math.expm1(whole))


def laplace_noise_multiplier(epsilon: float, sample_rate: float, steps: int) -> float:
    """Return the noise multiplier with which ``steps`` Laplace releases cost ``epsilon`` in total.

    It is ``1 / ln(1 + (exp(epsilon / T) - 1) / q)``.

    Args:
        epsilon: total epsilon, positive.
        sample_rate: q, in (0, 1].
        steps: T, number of releases.

    Raises:
        ValueError: If an argument is out of range.

    >>> round(laplace_noise_multiplier(4.0, 0.0416, 1000), 2)
    10.87
    """
    rate = check_sample_rate(sample_rate)
    if not (0.0 < epsilon < math.inf and rate > 0.0 and steps >= 1):
        raise ValueError(f"epsilon={epsilon!r}, sample_rate={sample_rate!r} and steps={steps!r} must be positive")
    return 1.0 / math.log1p(math.expm1(epsilon / steps) / rate)


class PureDPAccountant(IAccountant):  # type: ignore[misc, unused-ignore]
    """Accountant of Laplace releases ("pure"): epsilon at delta 0, the sum of the steps' epsilons.

    Its noise multiplier is the ratio of the scale of Laplace noise to the L1 sensitivity. It refuses Gaussian noise,
    which has no finite epsilon at delta 0; the other accountants refuse Laplace noise.

    Guarantees:
        Basic composition is a filter: rates, noise and the time of stopping may depend on earlier releases. Epsilon
        holds at every delta. Smaller values exist at delta > 0, and are not computed.

    >>> accountant = PureDPAccountant()
    >>> for _ in range(100):
    ...     accountant.step(noise_multiplier=2.0, sample_rate=0.01)
    >>> round(accountant.get_epsilon(delta=0.0), 4)
    0.6466
    """

    def __init__(self) -> None:
        self._runs: list[Run] = []

    @classmethod
    def mechanism(cls) -> str:
        """Name under which ``register`` makes this accountant known to Opacus."""
        return "pure"

    def __len__(self) -> int:
        """Number of runs of equal consecutive steps; 0 at first."""
        return len(self._runs)

    @property
    def history(self) -> list[Run]:
        """Runs of equal consecutive steps: ``[(noise_multiplier, sample_rate, steps), ...]``; a snapshot.

        Raises:
            ValueError: If anything but triples of valid values is assigned.
        """
        return HistorySnapshot(self._runs)

    @history.setter
    def history(self, runs: Iterable[Sequence[Any]]) -> None:
        self._runs = checked_runs(runs)

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Account one Laplace release.

        Args:
            noise_multiplier: ratio of the scale of the noise to the L1 sensitivity.
            sample_rate: probability with which each record entered the batch.

        Raises:
            ValueError: If a value is out of range; nothing is accounted then.
        """
        append_run(self._runs, check_noise_multiplier(noise_multiplier), check_sample_rate(sample_rate), 1)

    def step_event(self, event: Event, steps: int = 1) -> None:
        """Account Laplace releases; a shuffled pass counts as one at rate 1.

        Args:
            event: what was released.
            steps: how many such events.

        Raises:
            ValueError: If ``event`` is of another mechanism, or ``steps`` is no count; nothing is accounted then.
        """
        if event.mechanism != "laplace":
            raise ValueError(
                f"{event!r} is no Laplace release, and the accountant 'pure' knows no other: "
                "use 'vrdp' for Gaussian noise"
            )
        if count := check_count(steps, "steps"):
            append_run(self._runs, event.noise_multiplier, event.sample_rate, count)

    def get_epsilon(self, delta: float = 0.0, **kwargs: Any) -> float:
        """Return the epsilon spent so far.

        Args:
            delta: any value of at least 0; an epsilon that holds at delta 0 holds at every delta.
            **kwargs: arguments meant for other accountants; ignored.

        Raises:
            ValueError: If ``delta`` is negative.
        """
        check_delta(delta)
        return math.fsum(steps * laplace_epsilon(noise, rate) for noise, rate, steps in self._runs)

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[Any], None]:
        """Return a hook for ``attach_step_hook`` that accounts each step of an optimizer with Laplace noise.

        Raises:
            ValueError: If the optimizer's noise is not known to be Laplace; the hook raises it.
        """
        rate = check_sample_rate(sample_rate)

        def hook_fn(optimizer: Any) -> None:
            if getattr(getattr(optimizer, "settings", None), "mechanism", "gaussian") != "laplace":
                raise ValueError(
                    "the accountant 'pure' accounts for Laplace noise only, and Gaussian noise has no epsilon at "
                    "delta 0: use 'vrdp' for this optimizer"
                )
            self.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=rate)

        hook_fn.accountant = "pure"  # type: ignore[attr-defined]
        return hook_fn
