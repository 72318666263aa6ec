"""What any attacker can do: against dp-accounting, closed forms and real attacks, and never below a curve's truth."""

import json
import math
from functools import lru_cache

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy import stats

from opacus_ac.accounting import (
    DEFAULT_ORDERS,
    AttackBounds,
    Event,
    attack_bounds,
    attack_bounds_from_curve,
    attack_bounds_of_pair,
    attack_sentences,
    attacks,
    composition,
    epsilon_from_rdp,
    pld_epsilon,
    rdp_event,
)
from opacus_ac.accounting.attacks import FALSE_POSITIVE_RATES, percent

RUNS = [(1.0, 0.01, 1000), (2.0, 0.05, 300), (0.8, 0.05, 20), (0.6, 0.01, 200), (4.0, 0.2, 100), (1.0, 0.3, 1)]
EVENTS = {
    "poisson": Event(1.0, 0.01),
    "shuffled": Event(2.0, 1.0, "shuffled"),
    "fixed_size": Event(1.5, 0.01, "fixed_size"),
    "truncated_poisson": Event(1.0, 0.0075, "truncated_poisson", 10_000, 90),
}


@lru_cache
def theirs(noise, rate, steps):
    """Advantage and true-positive rates from dp-accounting's privacy loss distribution, on a fine grid."""
    spread = rate * math.sqrt(min(math.expm1(1 / noise**2), 100.0))
    pld = privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=min(0.003 * spread, 1e-4), use_connect_dots=True
    ).self_compose(steps)
    # Someone who looks for insiders has the releases with the record as the first distribution.
    epsilons = np.arange(0.0, 12.0, 5e-4)
    found = np.asarray(pld._pmf_remove.get_delta_for_epsilon(epsilons))
    backward = np.asarray(pld._pmf_add.get_delta_for_epsilon(epsilons))
    rates = {
        rate: float(min((found + np.exp(epsilons) * rate).min(), (1 - np.exp(-epsilons) * (1 - backward - rate)).min()))
        for rate in FALSE_POSITIVE_RATES
    }
    return float(found[0]), rates


def check_against_dp_accounting(noise, rate, steps):
    ours = attack_bounds({Event(noise, rate): steps})
    advantage, rates = theirs(noise, rate, steps)
    assert ours.advantage == pytest.approx(advantage, abs=1e-6)
    assert ours.true_positive_rates == pytest.approx(rates, abs=1e-6)
    assert ours.mu is None


@pytest.mark.parametrize(("noise", "rate", "steps"), RUNS)
def test_poisson_agrees_with_dp_accounting(noise, rate, steps):
    check_against_dp_accounting(noise, rate, steps)


@pytest.mark.parametrize("defect", ["the other direction", "optimistic dots", "a coarse grid"])
def test_planted_defects_are_caught(defect, monkeypatch):
    discretise = composition.discretise
    if defect == "the other direction":
        monkeypatch.setattr(composition, "discretise", lambda *args: discretise(*args)[::-1])
    elif defect == "optimistic dots":
        monkeypatch.setattr(
            composition,
            "discretise",
            lambda *args: [type(a)(a.start - 1, a.masses, a.infinite, a.error) for a in discretise(*args)],
        )
    else:
        monkeypatch.setattr(composition, "_FINEST", composition._FINENESS)
    attacks._attack_bounds.cache_clear()
    with pytest.raises(AssertionError):
        check_against_dp_accounting(*RUNS[0])
    attacks._attack_bounds.cache_clear()


@pytest.mark.parametrize(("noise", "passes"), [(1.0, 1), (2.0, 10), (10.0, 400)])
def test_without_sampling_the_run_is_gaussian_dp(noise, passes):
    found = attack_bounds({Event(noise, 1.0, "shuffled"): passes - 1, Event(noise, 1.0): 1})
    mu = math.sqrt(passes) / noise
    assert found.mu == pytest.approx(mu, rel=1e-12)
    assert found.advantage == pytest.approx(2 * stats.norm.cdf(mu / 2) - 1, abs=1e-12)
    for rate, caught in found.true_positive_rates.items():
        exact = stats.norm.cdf(stats.norm.ppf(rate) + mu)
        assert exact <= caught <= exact + 1e-11


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.1), (0.5, 0.02), (3.0, 0.7)])
def test_the_best_attack_on_one_step_attains_the_bound(noise, rate):
    """The rule of Neyman and Pearson is a threshold on the one coordinate along which the record moves the sum."""
    found = attack_bounds({Event(noise, rate): 1}).true_positive_rates
    for flagged, caught in found.items():
        threshold = noise * stats.norm.isf(flagged)
        attained = (1 - rate) * flagged + rate * stats.norm.sf((threshold - 1) / noise)
        assert attained <= caught <= attained + 1e-6


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_what_follows_from_epsilons_is_never_below(event):
    exact = attack_bounds({event: 50})
    by_losses = attack_bounds_from_curve(lambda delta: pld_epsilon({event: 50}, delta))
    by_renyi = attack_bounds_from_curve(lambda delta: epsilon_from_rdp(50 * rdp_event(event), DEFAULT_ORDERS, delta)[0])
    for rate, caught in exact.true_positive_rates.items():
        assert rate < caught <= by_losses.true_positive_rates[rate] + 1e-6
        assert by_losses.true_positive_rates[rate] <= by_renyi.true_positive_rates[rate] + 1e-6
    assert 0 < exact.advantage <= by_losses.advantage + 1e-6 <= by_renyi.advantage + 2e-6


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_monotone_and_a_concave_curve(event):
    rates = [0.0, 1e-4, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0]
    fewer, more = (list(attack_bounds({event: steps}, rates).true_positive_rates.values()) for steps in (50, 100))
    assert all(a <= b + 1e-9 for a, b in zip(fewer, more, strict=True))
    slopes = np.diff(more) / np.diff(rates)
    assert (np.diff(slopes) <= 1e-4 * np.abs(slopes[:-1])).all()
    assert more[-1] == 1.0


def test_many_rates_are_rounded_to_the_costlier_side():
    counts = {Event(1.0, 0.004 * 1.03**number): 5 for number in range(60)}
    found = attack_bounds(counts)
    highest = attack_bounds({Event(1.0, max(event.sample_rate for event in counts)): 300})
    lowest = attack_bounds({Event(1.0, min(event.sample_rate for event in counts)): 300})
    for rate in FALSE_POSITIVE_RATES:
        assert lowest.true_positive_rates[rate] < found.true_positive_rates[rate] < highest.true_positive_rates[rate]


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 1.0, 1), (2.0, 0.1, 30)])
def test_laplace_is_randomised_response_at_worst(noise, rate, steps):
    found = attack_bounds({Event(noise, rate, mechanism="laplace"): steps})
    epsilon = steps * math.log1p(rate * math.expm1(1 / noise))
    assert found.advantage == pytest.approx(math.tanh(epsilon / 2))
    assert found.true_positive_rates[0.01] == pytest.approx(
        min(0.01 * math.exp(epsilon), 1 - 0.99 * math.exp(-epsilon))
    )


EDGES = {
    "no event": ({}, 0.0, {0.01: 0.01}, 0.0),
    "infinite noise": ({Event(math.inf, 0.5): 3}, 0.0, {0.01: 0.01}, 0.0),
    "rate zero": ({Event(1.0, 0.0): 3}, 0.0, {0.01: 0.01}, 0.0),
    "no noise": ({Event(0.0, 0.1): 1}, 1.0, {0.01: 1.0}, None),
    "no noise beside noise": ({Event(1.0, 0.1): 5, Event(0.0, 0.1): 1}, 1.0, {0.01: 1.0}, None),
    "losses beyond floating point": ({Event(0.01, 0.5): 100}, 1.0, {0.01: 1.0}, None),
}


@pytest.mark.parametrize(("counts", "advantage", "rates", "mu"), EDGES.values(), ids=EDGES)
def test_edges(counts, advantage, rates, mu):
    found = attack_bounds(counts, tuple(rates))
    assert (found.advantage, found.mu) == (pytest.approx(advantage, abs=1e-9), mu)
    assert found.true_positive_rates == pytest.approx(rates, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attack_bounds({}, [1.5]), "1.5 is no false-positive rate"),
        (lambda: attack_bounds({Event(1.0, 0.1): 1, Event(1.0, 0.1, mechanism="laplace"): 1}), "count them apart"),
        (lambda: attack_bounds_of_pair(1.0, -0.1), "delta=-0.1 must be >= 0"),
        (lambda: attack_sentences({"epsilon": 1.0}), "no attacks and no epsilon with delta"),
    ],
)
def test_refusals_name_the_thing(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sentences_survive_a_file_and_round_up():
    found = attack_bounds({Event(1.0, 0.01): 1000})
    report = json.loads(json.dumps({"epsilon": 1.8, "delta": 1e-5, "attacks": found.__dict__}))
    assert attack_sentences(report) == attack_sentences(found)
    said = " ".join(attack_sentences(found))
    for rate, caught in found.true_positive_rates.items():
        stated = float(said.split(f"flags {100 * rate:g} % of outsiders by mistake catches at most ")[1].split(" %")[0])
        assert caught <= stated / 100 <= 1.1 * caught
    assert "mu" not in said
    assert "mu-Gaussian DP with mu = 2" in " ".join(attack_sentences(attack_bounds({Event(1.0, 1.0): 4})))


def test_an_old_report_gets_what_its_epsilon_says():
    said = " ".join(attack_sentences({"epsilon": 1.0, "delta": 1e-5}))
    assert "flags 1 % of outsiders by mistake catches at most 2.8 % of insiders" in said
    assert "(epsilon, delta) pairs" in said
    (only,) = attack_sentences({"epsilon": "infinity", "delta": 1e-5})
    assert only.startswith("No bound")
    nearly = AttackBounds(0.7, {0.01: 0.4, 0.1: 1.0}, None, "privacy loss distribution")
    assert any("10 % of outsiders by mistake may catch every insider" in line for line in attack_sentences(nearly))


@pytest.mark.parametrize("share", [0.0, 1e-7, 0.0123, 0.06, 0.0601, 0.5, 0.899, 0.9, 0.99301, 0.9999, 1.0])
def test_percentages_are_never_below(share):
    assert 100 * share * (1 - 1e-9) <= float(percent(share).removesuffix(" %")) <= max(110 * share, 1e-12)
