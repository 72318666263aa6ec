r"""Dominating pairs: what one step of each kind of sampling can reveal, as two distributions on a line.

They are at least as far apart as the outputs of the step on any two neighbouring datasets. Rényi rows and privacy loss
distributions are both computed from them.

A *component* (rate p, shifts u and l) is the pair
    U = (1 - p) N(0, s^2) + p N(u, s^2),    L = (1 - p) N(0, s^2) + p N(-l, s^2),    u >= l >= 0,
with s the noise multiplier, everything in units of the sensitivity (the largest norm of one record's contribution). A
*pair* is a mixture of components whose index is released too: its privacy loss distribution is the mixture of theirs.
The guarantee needs both orders, U against L (the dataset with the record in the first place) and L against U.

**Lemma.** Let a, b be vectors, |a| <= u, |b| <= l. For every c >= 0 the hockey-stick divergence
H_c((1-p) N(0) + p N(a) || (1-p) N(0) + p N(b)), with covariance s^2 I throughout, is at most H_c(U || L). Proof: H_c is
the supremum over tests f of (1-p)(1-c) E_0 f + p E_a f - c p E_b f. Given E_0 f = t, Neyman and Pearson bound
E_a f <= Phi(Phi^-1(t) + u/s) and E_b f >= Phi(Phi^-1(t) - l/s); the test "x above a threshold" of level t attains both
at once for U and L, since their shifts point in opposite directions. As c runs over all of [0, inf), the pair dominates
and composes (Zhu, Dong, Wang, theorem 10), which a bound for c >= 1 alone would not (Lebeda et al.).

Below, x is the record whose contribution is removed and f(.) a record's contribution, of norm <= 1. H_c is jointly
convex, so what has the same law under both datasets (which other records are drawn) may be conditioned on.

* **Poisson**, rate q: given the other records drawn, x adds a vector of norm <= 1 with probability q: component
  (q, 1, 0). Add/remove; with public denominators zero-out is the same, because a zeroed record adds nothing.
* **Shuffled**: one pass is one release with x in it: (1, 1, 0). Zero-out.
* **Fixed size**, B of N without replacement, q = B/N: the batch is T + x with probability q and T + y otherwise, where
  T has B - 1 other records and y is one more, with the same law of (T, y) given either. Relative to T + y, x shifts the
  sum by f(x) - f(y), norm <= 2, and a zeroed x by -f(y), norm <= 1: component (q, 2, 1). (Replace-one: (q, 2, 2).)
  When the draw is told, x matters with probability q only and then by a shift of 1: [1 - q: nothing; q: (1, 1, 0)],
  the better pair where noise is low or q high. Each pair is valid alone.
* **Truncated Poisson**, rate q, at most B: let K be how many other records are drawn. With K < B (probability
  1 - w, w = P(Bin(N-1, q) >= B)) x displaces nobody: (q, 1, 0). With K >= B the batch is a uniform B-subset of the
  others, or a uniform (B-1)-subset and x, whatever K: a fixed-size draw with the rate
  p = P(x in batch | K >= B) = E[q B/(K+1) | K >= B] = (B/N) P(Bin(N, q) > B) / w, so (p, 2, 1). Zero-out; N public.

References:
    Zhu, Dong, Wang 2022, arXiv 2106.08567 (dominating pairs; composition; subsampling).
    Lebeda, Regehr, Kamath, Steinke 2024, arXiv 2405.20769 (sampling without replacement; pitfalls).
    arXiv 2508.15089 (truncated Poisson sampling).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from opacus_ac.accounting.binomial import log_tail
from opacus_ac.accounting.events import Event, check_gaussian
from opacus_ac.accounting.grid import RATE_STEP, noise_below, rate_above


@dataclass(frozen=True)
class Component:
    """One component of a dominating pair (see the module's text for U and L).

    Attributes:
        log_weight: log of the probability of this component; the weights of a pair add up to 1.
        rate: weight of the shifted Gaussian, in [0, 1]; 0 means that U and L are equal.
        up: shift of U, in units of the sensitivity.
        down: shift of L the other way, at most ``up``.
    """

    log_weight: float
    rate: float
    up: float = 1.0
    down: float = 0.0


@dataclass(frozen=True)
class Pair:
    """A dominating pair: components and the noise multiplier that they share (in [0, inf])."""

    noise_multiplier: float
    components: tuple[Component, ...]

    @property
    def is_nothing(self) -> bool:
        """Whether U and L are equal, so that no data is released."""
        return self.noise_multiplier == math.inf or all(part.rate == 0.0 for part in self.components)


@lru_cache(maxsize=1024)
def dominating_pairs(event: Event) -> tuple[Pair, ...]:
    """Return the pairs that dominate an event; each is valid alone, so the smallest bound from them is valid.

    Args:
        event: the step, of any kind.

    Returns:
        One pair or two, for zero-out adjacency (and add/remove, for Poisson events).

    Raises:
        ValueError: If the event's noise is not Gaussian.

    References:
        The derivation is in the module's text.
    """
    check_gaussian(event)
    noise, rate = event.noise_multiplier, event.sample_rate
    if event.sampling == "fixed_size":
        choices = _fixed_size(0.0, rate)
    elif event.sampling == "truncated_poisson":
        choices = _truncated(event)
    else:  # a shuffled pass has rate 1
        choices = ((Component(0.0, rate),),)
    return tuple(Pair(noise, components) for components in choices)


def _fixed_size(log_weight: float, rate: float) -> tuple[tuple[Component, ...], ...]:
    if rate in (0.0, 1.0):
        return ((Component(log_weight, rate),),)
    told = (Component(log_weight + math.log1p(-rate), 0.0), Component(log_weight + math.log(rate), 1.0))
    return (Component(log_weight, rate, 2.0, 1.0),), told


def _truncated(event: Event) -> tuple[tuple[Component, ...], ...]:
    rate, records, limit = event.sample_rate, event.dataset_size, event.max_batch_size
    assert records is not None
    assert limit is not None
    log_cut = log_tail(records - 1, rate, limit)
    if log_cut == -math.inf or rate == 0.0:
        return ((Component(0.0, rate),),)
    log_rate = math.log(limit / records) + log_tail(records, rate, limit + 1) - log_cut
    # K >= B gives p <= q B/(B+1), which rounding must not exceed.
    displaced = min(math.exp(min(log_rate, 0.0)), rate * limit / (limit + 1), 1.0)
    kept = (Component(_log_complement(log_cut), rate),) if log_cut < 0.0 else ()
    return tuple(kept + rest for rest in _fixed_size(log_cut, displaced))


def _log_complement(log_probability: float) -> float:
    """Return log(1 - p) from log p < 0."""
    if log_probability > -0.5:
        return math.log(-math.expm1(log_probability))
    return math.log1p(-math.exp(log_probability))


class PairRounding:
    """Stands in for the resolved pairs of many different events by few, each at least as costly.

    The first ``max_exact`` distinct pairs stay themselves. Later ones have rates rounded up to a grid of relative
    spacing ``rate_step`` and, after ``max_noise`` distinct noise multipliers, the noise rounded down to a 0.5 % grid.

    Guarantees:
        The result dominates the given pair. A smaller rate is a post-processing (resample the shifted part from
        N(0, s^2) with probability 1 - p'/p), and so is more noise. Where a pair has a fixed-size component beside a
        Poisson one, its rate is first raised to the other's: it then dominates that one (larger shifts), so that its
        weight may be rounded up as well.
    """

    def __init__(self, max_exact: int, max_noise: int = 4, rate_step: float = RATE_STEP) -> None:
        self._max_exact, self._max_noise, self._rate_step = max_exact, max_noise, rate_step
        self._exact: set[Pair] = set()
        self._noises: set[float] = set()

    def resolve(self, pair: Pair, *, remember: bool = True) -> Pair:
        """Return the pair that stands for this one.

        Args:
            pair: a dominating pair.
            remember: whether it takes one of the exact places; False to ask what would happen.
        """
        if pair in self._exact or pair.is_nothing or pair.noise_multiplier == 0.0:
            return pair
        if len(self._exact) < self._max_exact:
            if remember:
                self._exact.add(pair)
            return pair
        noise = pair.noise_multiplier
        if noise not in self._noises:
            if len(self._noises) < self._max_noise:
                if remember:
                    self._noises.add(noise)
            else:
                noise = noise_below(noise)
        return Pair(noise, _coarser(pair.components, self._rate_step))


def _coarser(components: tuple[Component, ...], step: float) -> tuple[Component, ...]:
    if len(components) == 1:
        (only,) = components
        return (Component(only.log_weight, rate_above(only.rate, step), only.up, only.down),)
    if any(part.rate in (0.0, 1.0) for part in components):
        return _coarser_told(components, step)
    kept, displaced = components
    rate = rate_above(max(kept.rate, displaced.rate), step)
    log_weight = math.log(rate_above(math.exp(displaced.log_weight), step)) if displaced.log_weight > -700.0 else -700.0
    raised = Component(log_weight, rate, displaced.up, displaced.down)
    return (Component(_log_complement(log_weight), rate), raised) if log_weight < 0.0 else (raised,)


def _coarser_told(components: tuple[Component, ...], step: float) -> tuple[Component, ...]:
    """Return pairs with a full shift told: [kept (q)], nothing, full shift.

    Each weight moves to a costlier component.
    """
    full = components[-1]
    log_weight = math.log(rate_above(math.exp(full.log_weight), step)) if full.log_weight > -700.0 else -700.0
    rest = max(part.rate for part in components[:-1])
    raised = Component(log_weight, 1.0, full.up, full.down)
    if log_weight >= 0.0:
        return (raised,)
    return (Component(_log_complement(log_weight), rate_above(rest, step) if rest else 0.0), raised)
