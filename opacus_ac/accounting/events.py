"""What one step releases, as the accountants see it: a value type, and the checks of its numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

MECHANISMS = ("gaussian", "laplace")
"""What the noise of a release can be; each has accountants of its own."""

_ADD_REMOVE = "add/remove one record"
_ZERO_OUT = "zero-out (one record's contribution removed)"

#: What "neighbouring datasets" means in the guarantee of each kind of sampling; reports print it beside epsilon.
ADJACENCY: dict[str, str] = {
    "poisson": _ADD_REMOVE,
    "shuffled": _ZERO_OUT,
    "fixed_size": _ZERO_OUT,
    "truncated_poisson": _ZERO_OUT,
}

# The relations under which the bound of a kind holds, the strongest claim first. A Poisson bound also holds under
# zero-out: sums are divided by public numbers, so a record that adds nothing and a record that is not there give the
# same release. The converse fails for the others: their batches are filled up from a dataset whose size is public.
_RELATIONS: dict[str, tuple[str, ...]] = {
    kind: (_ADD_REMOVE, _ZERO_OUT) if relation == _ADD_REMOVE else (relation,) for kind, relation in ADJACENCY.items()
}


@dataclass(frozen=True)
class Event:
    """One release on a sampled batch: the unit in which privacy is spent.

    Attributes:
        noise_multiplier: for Gaussian noise, the ratio of the noise std (on the sum) to the L2 sensitivity of the whole
            release; for Laplace noise, the ratio of its scale to the L1 sensitivity. At least 0; ``inf`` is a release
            that holds no data.
        sample_rate: probability with which each record enters the batch. It is a public parameter of the sampler,
            never a realised batch size over the number of records.
        sampling: ``"poisson"`` (independent draws), ``"shuffled"`` (each record at most once a pass, not amplified:
            ``sample_rate`` must be 1), ``"fixed_size"`` (exactly B of N records without replacement, drawn afresh each
            step: ``sample_rate`` is B/N) or ``"truncated_poisson"`` (independent draws at ``sample_rate``, of which a
            uniformly random subset of ``max_batch_size`` is kept when there are more).
        dataset_size: number of records N, public; for ``"truncated_poisson"`` only.
        max_batch_size: largest batch; for ``"truncated_poisson"`` only.
        mechanism: ``"gaussian"`` or ``"laplace"``. Laplace releases exist on Poisson and shuffled batches only, and
            only the accountant "pure" knows their cost.

    Raises:
        ValueError: If a field is out of range; the message names it, its value and the remedy.

    >>> Event(1.0, 0.01)
    Event(noise_multiplier=1.0, sample_rate=0.01, sampling='poisson')
    """

    noise_multiplier: float
    sample_rate: float
    sampling: str = "poisson"
    dataset_size: int | None = None
    max_batch_size: int | None = None
    mechanism: str = "gaussian"

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", check_noise_multiplier(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", check_sample_rate(self.sample_rate))
        _check_sampling(self.sampling)
        if self.sampling == "shuffled" and self.sample_rate != 1.0:
            raise ValueError(
                f"sample_rate={self.sample_rate!r} with sampling='shuffled': shuffled batches are not amplified by "
                "sampling; charge one event at sample_rate=1.0 per pass over the data (see ShuffledEpochs)"
            )
        for name in ("dataset_size", "max_batch_size"):
            object.__setattr__(self, name, self._checked_size(name))
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism={self.mechanism!r} is unknown; use one of {sorted(MECHANISMS)}")
        if self.mechanism == "laplace" and self.sampling not in ("poisson", "shuffled"):
            raise ValueError(
                f"sampling={self.sampling!r} with mechanism='laplace' has no bound here; use 'poisson' or 'shuffled'"
            )

    @property
    def is_plain(self) -> bool:
        """Whether ``(noise_multiplier, sample_rate)`` determines the cost: Gaussian, on Poisson or shuffled batches."""
        return self.mechanism == "gaussian" and self.sampling in ("poisson", "shuffled")

    def __repr__(self) -> str:
        usual = {"dataset_size": None, "max_batch_size": None, "mechanism": "gaussian"}
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = [f"{name}={value!r}" for name, value in values.items() if name not in usual or value != usual[name]]
        return f"Event({', '.join(shown)})"

    def _checked_size(self, name: str) -> int | None:
        value = getattr(self, name)
        if self.sampling == "truncated_poisson":
            if value is None:
                raise ValueError(f"{name} is missing: the bound of sampling='truncated_poisson' depends on it; give it")
            return check_count(value, name, minimum=1)
        if value is not None:
            raise ValueError(
                f"{name}={value!r} with sampling={self.sampling!r}: that bound depends on the sample rate only; "
                "leave it out"
            )
        return None


def check_gaussian(event: Event) -> None:
    """Raise ``ValueError`` for a release whose noise is not Gaussian: bounds for Gaussian noise do not hold for it."""
    if event.mechanism != "gaussian":
        raise ValueError(
            f"{event!r} is no Gaussian release, and this bound holds for Gaussian noise only: use the "
            "accountant 'pure' (opacus_ac.accounting.PureDPAccountant)"
        )


def common_adjacency(samplings: Iterable[str]) -> str:
    """Return the adjacency under which one epsilon holds for steps of several kinds.

    Poisson bounds hold under add/remove and, because sums are divided by public numbers, also under zero-out; those of
    the other kinds hold under zero-out only.

    Args:
        samplings: kinds of sampling, as in ``Event.sampling``.

    Raises:
        ValueError: If there is no kind, an unknown one, or no relation that holds for all.

    >>> common_adjacency(["poisson", "fixed_size"])
    "zero-out (one record's contribution removed)"
    """
    kinds = sorted(set(samplings))
    if not kinds:
        raise ValueError("samplings is empty: name at least one kind of sampling")
    for kind in kinds:
        _check_sampling(kind)
    for relation in _RELATIONS[kinds[0]]:
        if all(relation in _RELATIONS[kind] for kind in kinds):
            return relation
    raise ValueError(f"samplings={kinds}: no adjacency holds for all of them; account them apart")


def _check_sampling(sampling: str) -> None:
    if sampling not in ADJACENCY:
        raise ValueError(f"sampling={sampling!r} is unknown; use one of {sorted(ADJACENCY)}")


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
