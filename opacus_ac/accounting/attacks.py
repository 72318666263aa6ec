r"""What any attacker can do against a run: true-positive rates at small false-positive rates, never below the truth.

An attacker sees everything that a run released, knows all other records, and decides whether one record was in the
data. Let H_c(P || Q) = sup_S P(S) - c Q(S) be the hockey-stick divergence of the releases with the record (P) against
those without it (Q). For every rule of decision and every c >= 0,

    true-positive rate <= H_c(P || Q) + c * false-positive rate,

so the least right side over all c bounds every attacker, and the rule of Neyman and Pearson attains it. The advantage
(true-positive rate less false-positive rate) is at most H_1. The composed privacy loss gives H_c for all c; where an
account has no more than pairs (epsilon, delta) that hold in both directions, each of them gives

    H_c(P || Q) <= delta for c = e^epsilon,  and  H_c(P || Q) <= 1 - c (1 - delta) for c = e^-epsilon.

References:
    Kairouz, Oh, Viswanath 2015, arXiv 1311.0776 (operating characteristics of (epsilon, delta)).
    Dong, Roth, Su 2019, arXiv 1905.02383, proposition 2.12 and corollary 2.13 (trade-off functions, Gaussian DP).
    Gomez, Kulynych, Kaissis and others 2025, arXiv 2503.10945 (what to report beside epsilon).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

from opacus_ac.accounting.dominating_pairs import Pair, dominating_pairs
from opacus_ac.accounting.events import Event, check_count, check_delta
from opacus_ac.accounting.pld import PrivacyLosses
from opacus_ac.accounting.rdp import DEFAULT_ORDERS, epsilon_from_rdp
from opacus_ac.accounting.rdp_table import RDPTable

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
"""False-positive rates at which reports state the largest true-positive rate."""

BY_GAUSSIAN, BY_LOSSES, BY_CURVE = "Gaussian DP", "privacy loss distribution", "(epsilon, delta) pairs of the account"

_DELTAS = (0.0, *(10.0 ** (-0.5 * k) for k in range(30, 0, -1)))
_ROUNDING = 1e-12  # more than the normal distribution of the standard library errs by


@dataclass(frozen=True)
class AttackBounds:
    """Upper bounds of what any attacker can tell about one record of a run.

    Attributes:
        advantage: largest true-positive rate less false-positive rate, in [0, 1].
        true_positive_rates: by false-positive rate, the largest true-positive rate.
        mu: the run is mu-Gaussian DP, and no smaller mu will do; None where no tight mu is known.
        method: where the figures come from.
    """

    advantage: float
    true_positive_rates: dict[float, float]
    mu: float | None
    method: str


def attack_bounds(counts: Mapping[Event, int], rates: Sequence[float] = FALSE_POSITIVE_RATES) -> AttackBounds:
    """Return what any attacker can do against a run, from its events.

    Args:
        counts: how often each event happened. All are Gaussian, or all are Laplace.
        rates: false-positive rates, each in [0, 1].

    Guarantees:
        Never below the truth, if rates and noise were fixed in advance (not chosen from releases). For up to some
        thousand steps of few kinds the figures from privacy losses are within 1e-6 of those of the dominating pairs.

    Raises:
        ValueError: If a rate is not in [0, 1], a count is not a whole number, or the mechanisms are mixed.

    References:
        arXiv 2503.10945; arXiv 1905.02383, corollary 2.13 (where batches are not sampled).

    >>> found = attack_bounds({Event(1.0, 0.01): 1000})
    >>> [round(found.true_positive_rates[rate], 3) for rate in (0.001, 0.01, 0.1)]
    [0.004, 0.029, 0.194]
    """
    chosen = _checked_rates(rates)
    live = {event: check_count(steps, f"counts[{event}]") for event, steps in counts.items()}
    key = tuple(sorted(((event, steps) for event, steps in live.items() if steps), key=repr))
    return _attack_bounds(key, chosen)


def attack_bounds_from_curve(
    epsilon_of: Callable[[float], float], rates: Sequence[float] = FALSE_POSITIVE_RATES
) -> AttackBounds:
    """Return what any attacker can do, from an account that knows an epsilon for every delta and no more.

    Args:
        epsilon_of: returns an epsilon that holds at a delta, for both orders of neighbouring datasets; infinity for
            none.
        rates: false-positive rates, each in [0, 1].

    Guarantees:
        Never below the truth where the pairs hold. Some 30 deltas are asked for.

    Raises:
        ValueError: If a rate is not in [0, 1].

    References:
        arXiv 1311.0776, theorem 2.1; arXiv 1905.02383, proposition 2.12.

    >>> found = attack_bounds_from_curve(lambda delta: 1.0)
    >>> round(found.true_positive_rates[0.01], 4), round(found.advantage, 4)
    (0.0272, 0.4621)
    """
    return _of_pairs([(float(epsilon_of(delta)), delta) for delta in _DELTAS], _checked_rates(rates))


def attack_bounds_of_pair(epsilon: float, delta: float, rates: Sequence[float] = FALSE_POSITIVE_RATES) -> AttackBounds:
    """Return what any attacker can do where a single (epsilon, delta) is known.

    Raises:
        ValueError: If ``delta`` is negative or a rate is not in [0, 1].
    """
    return _of_pairs([(float(epsilon), check_delta(delta))], _checked_rates(rates))


def attack_sentences(facts: AttackBounds | Mapping[str, Any]) -> list[str]:
    r"""Say in words what any attacker can do.

    Args:
        facts: the bounds; or a privacy report as JSON has it, with ``attacks`` or at least ``epsilon`` and ``delta``,
            from which weaker bounds follow.

    Returns:
        Whole sentences. Percentages are rounded up.

    Raises:
        ValueError: If the mapping has none of these.

    >>> print(*attack_sentences(attack_bounds({Event(1.0, 0.01): 1000}))[1:3], sep="\n")
    Someone who flags 0.1 % of outsiders by mistake catches at most 0.41 % of insiders.
    Someone who flags 1 % of outsiders by mistake catches at most 3 % of insiders.
    """
    found = facts if isinstance(facts, AttackBounds) else _of_report(facts)
    if found.advantage >= 1.0 and all(caught >= 1.0 for caught in found.true_positive_rates.values()):
        return ["No bound on what an attacker can tell holds: every insider may be found without a mistake."]
    sentences = [
        "Insiders are those whose data was used, outsiders those whose data was not; an attacker sees every release "
        "and knows the data of all others."
    ]
    for flagged, caught in found.true_positive_rates.items():
        most = f"catches at most {percent(caught)} of insiders" if caught < 1.0 else "may catch every insider"
        sentences.append(f"Someone who flags {100.0 * flagged:g} % of outsiders by mistake {most}.")
    sentences.append(
        f"The largest advantage, the share of insiders caught less the share of outsiders flagged, is at most "
        f"{percent(found.advantage)}."
    )
    if found.mu is not None:
        sentences.append(f"The run is mu-Gaussian DP with mu = {found.mu:.4g}, and with no smaller mu.")
    if found.method == BY_CURVE:
        sentences.append(f"These shares follow from {BY_CURVE} alone, and may be far from what is possible.")
    return sentences


def _of_report(facts: Mapping[str, Any]) -> AttackBounds:
    """Return the bounds in a report, or those that its epsilon and delta give."""
    kept = facts.get("attacks", facts if "true_positive_rates" in facts else None)
    try:
        if kept is not None:
            caught = {float(flagged): float(share) for flagged, share in kept["true_positive_rates"].items()}
            mu = None if kept["mu"] is None else float(kept["mu"])
            return AttackBounds(float(kept["advantage"]), caught, mu, str(kept["method"]))
        return attack_bounds_of_pair(float(facts["epsilon"]), float(facts["delta"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "no attacks and no epsilon with delta: give a privacy report as PrivacyReport.to_dict returns it "
            f"({error!r})"
        ) from error


def percent(share: float) -> str:
    """Return a share as a percentage, rounded up to two digits, or to one decimal place above 90 %.

    >>> percent(0.0601), percent(0.9931), percent(0.00072)
    ('6.1 %', '99.4 %', '0.072 %')
    """
    percent = 100.0 * share
    if percent <= 0.0:
        return "0 %"
    step = 0.1 if percent >= 90.0 else 10.0 ** (math.floor(math.log10(percent)) - 1)
    up = math.ceil(percent / step * (1.0 - 1e-12)) * step
    return f"{min(up, 100.0):.3g} %"


def _checked_rates(rates: Sequence[float]) -> tuple[float, ...]:
    for rate in rates:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rates={list(rates)!r}: {rate!r} is no false-positive rate, which is in [0, 1]")
    return tuple(float(rate) for rate in rates)


@lru_cache(maxsize=64)
def _attack_bounds(counts: tuple[tuple[Event, int], ...], rates: tuple[float, ...]) -> AttackBounds:
    mechanisms = {event.mechanism for event, _ in counts}
    if len(mechanisms) > 1:
        raise ValueError(f"the events have {sorted(mechanisms)} noise, which no bound here adds up: count them apart")
    if mechanisms == {"laplace"}:
        return _of_laplace(counts, rates)
    mu = _exact_mu(counts)
    if mu is not None:
        return _of_mu(mu, rates)
    losses, table = PrivacyLosses(), RDPTable(DEFAULT_ORDERS)
    rdp = 0.0 * table.orders
    for event, steps in counts:
        losses.add(event, steps)
        rdp = rdp + steps * table.event_row(event)
    found = losses.attacks(rates, rdp, table.orders)
    if found is None:
        return attack_bounds_from_curve(lambda delta: epsilon_from_rdp(rdp, table.orders, delta)[0], rates)
    advantage, caught = found
    return AttackBounds(min(advantage, 1.0), dict(zip(rates, caught, strict=True)), None, BY_LOSSES)


def _of_laplace(counts: tuple[tuple[Event, int], ...], rates: tuple[float, ...]) -> AttackBounds:
    from opacus_ac.accounting.pure_accountant import laplace_epsilon

    spent = (steps * laplace_epsilon(event.noise_multiplier, event.sample_rate) for event, steps in counts)
    return attack_bounds_of_pair(math.fsum(spent), 0.0, rates)


def _exact_mu(counts: tuple[tuple[Event, int], ...]) -> float | None:
    """Return the mu of events that are all Gaussians without sampling; infinity without noise, None for others."""
    precision = 0.0
    for event, steps in counts:
        shifts = {_shift(pair) for pair in dominating_pairs(event)}
        if event.noise_multiplier == 0.0 and event.sample_rate > 0.0:
            return math.inf
        if len(shifts) != 1 or None in shifts:
            return None
        shift = shifts.pop()
        assert shift is not None
        precision += steps * shift**2
    return math.sqrt(precision)


def _shift(pair: Pair) -> float | None:
    """Return the shift of a pair over its noise; None where it is no plain Gaussian."""
    if pair.is_nothing:
        return 0.0
    if len(pair.components) != 1 or pair.components[0].rate != 1.0 or pair.noise_multiplier == 0.0:
        return None
    return (pair.components[0].up + pair.components[0].down) / pair.noise_multiplier


def _of_mu(mu: float, rates: tuple[float, ...]) -> AttackBounds:
    """Return the bounds of mu-Gaussian DP, in closed form."""
    normal = NormalDist()

    def caught(rate: float) -> float:
        if math.isinf(mu):
            return 1.0
        if mu == 0.0 or rate in (0.0, 1.0):
            return rate
        return min(1.0, normal.cdf(normal.inv_cdf(rate) + mu) + _ROUNDING)

    advantage = 1.0 if math.isinf(mu) else math.erf(mu / math.sqrt(8.0))
    return AttackBounds(advantage, {rate: caught(rate) for rate in rates}, None if math.isinf(mu) else mu, BY_GAUSSIAN)


def _of_pairs(pairs: Sequence[tuple[float, float]], rates: tuple[float, ...]) -> AttackBounds:
    """Return the best bounds that follow from pairs (epsilon, delta), each of which holds in both directions."""
    useful = [(max(epsilon, 0.0), delta) for epsilon, delta in pairs if epsilon < 700.0 and delta < 1.0]

    def caught(rate: float) -> float:
        found = [delta + math.exp(epsilon) * rate for epsilon, delta in useful]
        found += [1.0 - math.exp(-epsilon) * (1.0 - delta - rate) for epsilon, delta in useful]
        return min([1.0, *found])

    advantage = min([1.0, *(1.0 - 2.0 * (1.0 - delta) / (1.0 + math.exp(epsilon)) for epsilon, delta in useful)])
    return AttackBounds(advantage, {rate: caught(rate) for rate in rates}, None, BY_CURVE)
