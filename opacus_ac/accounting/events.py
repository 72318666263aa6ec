"""What one step releases, as the accountants see it: a value type, and the checks of its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

#: What "neighbouring datasets" means in the guarantee of each kind of sampling; reports print it beside epsilon.
ADJACENCY: dict[str, str] = {
    "poisson": "add/remove one record",
    "shuffled": "zero-out (one record's contribution removed)",
}


@dataclass(frozen=True)
class Event:
    """One Gaussian release on a sampled batch: the unit in which privacy is spent.

    Attributes:
        noise_multiplier: std of the noise on the sum, over the L2 sensitivity of the whole release. At least 0; ``inf``
            is a release that holds no data.
        sample_rate: probability with which each record enters the batch. It is a public parameter of the sampler,
            never a realised batch size over the number of records.
        sampling: ``"poisson"`` (independent draws, amplified by sampling) or ``"shuffled"`` (each record at most once a
            pass, not amplified: ``sample_rate`` must be 1).

    Raises:
        ValueError: If a field is out of range; the message names it, its value and the remedy.

    >>> Event(1.0, 0.01)
    Event(noise_multiplier=1.0, sample_rate=0.01, sampling='poisson')
    """

    noise_multiplier: float
    sample_rate: float
    sampling: str = "poisson"

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", check_noise_multiplier(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", check_sample_rate(self.sample_rate))
        if self.sampling not in ADJACENCY:
            raise ValueError(f"sampling={self.sampling!r} is unknown; use one of {sorted(ADJACENCY)}")
        if self.sampling == "shuffled" and self.sample_rate != 1.0:
            raise ValueError(
                f"sample_rate={self.sample_rate!r} with sampling='shuffled': shuffled batches are not amplified by "
                "sampling; charge one event at sample_rate=1.0 per pass over the data (see ShuffledEpochs)"
            )


def check_noise_multiplier(value: Any) -> float:
    """Return the noise multiplier as a float.

    Args:
        value: a real number, at least 0; ``inf`` is allowed.

    Raises:
        ValueError: If it is no number, NaN or negative.
    """
    number = _real(value, "noise_multiplier")
    if not number >= 0.0:
        raise ValueError(f"noise_multiplier={value!r} must be >= 0: it is the noise std over the L2 sensitivity")
    return number


def check_sample_rate(value: Any) -> float:
    """Return the sample rate as a float.

    Args:
        value: a real number in [0, 1].

    Raises:
        ValueError: If it is no number, NaN or outside [0, 1].
    """
    number = _real(value, "sample_rate")
    if not 0.0 <= number <= 1.0:
        raise ValueError(
            f"sample_rate={value!r} must be in [0, 1]: pass expected batch size / number of records, a probability"
        )
    return number


def check_count(value: Any, name: str, minimum: int = 0) -> int:
    """Return a count as an int.

    Args:
        value: an integer, or a float with an integer value (as JSON may return it).
        name: what to call it in the error.
        minimum: the smallest value allowed.

    Raises:
        ValueError: If it is no whole number or below ``minimum``.
    """
    if type(value) is int and value >= minimum:  # the accountant's hot path
        return value
    whole = isinstance(value, Integral) or (isinstance(value, Real) and float(value).is_integer())
    if isinstance(value, bool) or not whole or value < minimum:
        raise ValueError(f"{name}={value!r} must be a whole number >= {minimum}")
    return int(value)


def check_delta(value: Any) -> float:
    """Return delta as a float; values of 1 or more are allowed, and cost nothing.

    Raises:
        ValueError: If it is no number, NaN or negative.
    """
    number = _real(value, "delta")
    if not number >= 0.0:
        raise ValueError(f"delta={value!r} must be >= 0: it is a probability, usually below 1 / number of records")
    return number


def _real(value: Any, name: str) -> float:
    if type(value) is float:  # the accountant's hot path
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={value!r} must be a real number, not {type(value).__name__}; convert it with float()")
    return float(value)
