"""The accountant "vpld": its bound against other implementations and finer grids, its state, and its limits."""

import json
import math

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from opacus.accountants import create_accountant, registry
from scipy import optimize, stats

from opacus_ac.accounting import (
    DEFAULT_ORDERS,
    Event,
    VariableRatePLDAccountant,
    VariableRateRDPAccountant,
    calibrate_noise_multiplier,
    composition,
    epsilon_from_rdp,
    plan_epsilon,
    pld,
    pld_epsilon,
    rdp_event,
    register,
)
from opacus_ac.accounting import (
    dominating_pairs as pairs,
)
from opacus_ac.accounting.composition import Composition, Grid
from opacus_ac.accounting.dominating_pairs import Component, Pair, dominating_pairs

DELTA = 1e-5
ZERO_OUT = dp.NeighboringRelation.REPLACE_SPECIAL
POISSON = [
    (1.0, 0.01, 1000),
    (1.0, 0.0064, 156),
    (0.6, 0.001, 5000),
    (2.0, 0.1, 300),
    (5.0, 0.5, 100),
    (4.0, 0.01, 1000),
    (0.8, 0.05, 1),
]
EVENTS = {
    "poisson": Event(1.0, 0.01),
    "shuffled": Event(2.0, 1.0, "shuffled"),
    "fixed_size": Event(1.5, 0.01, "fixed_size"),
    "truncated_poisson": Event(1.0, 0.0075, "truncated_poisson", 10_000, 90),
}


def theirs(event, steps, relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE, interval=1e-4):
    accountant = PLDAccountant(relation, interval)
    accountant.compose(event, steps)
    return accountant.get_epsilon(DELTA)


def check_against_dp_accounting(noise, rate, steps):
    """Theirs is an upper bound too, with an error of its own below 0.1 % on these cases (interval 1e-4)."""
    expected = theirs(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), steps)
    assert (1 - 1e-3) * expected <= pld_epsilon({Event(noise, rate): steps}, DELTA) <= (1 + 1e-3) * expected


@pytest.mark.parametrize(("noise", "rate", "steps"), POISSON)
def test_poisson_agrees_with_dp_accounting(noise, rate, steps):
    check_against_dp_accounting(noise, rate, steps)


@pytest.mark.parametrize("defect", ["one direction only", "rate rounded down", "optimistic dots"])
def test_planted_defects_are_caught(defect, monkeypatch):
    discretise = composition.discretise
    if defect == "one direction only":
        monkeypatch.setattr(composition, "discretise", lambda *args: (discretise(*args)[1],) * 2)
    elif defect == "rate rounded down":
        monkeypatch.setattr(pairs, "rate_above", lambda rate, step: rate / (1 + step))
        monkeypatch.setattr(pld, "MAX_EXACT", 0)
    else:
        monkeypatch.setattr(composition, "discretise", lambda *args: [shifted(atoms) for atoms in discretise(*args)])
    with pytest.raises(AssertionError):
        check_against_dp_accounting(1.0, 0.01, 1000)


def shifted(atoms):
    return type(atoms)(atoms.start - 1, atoms.masses, atoms.infinite, atoms.error)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (2.0, 10), (0.5, 3), (10.0, 400), (30.0, 1)])
def test_full_batches_agree_with_the_analytic_gaussian(noise, steps):
    mu = math.sqrt(steps) / noise

    def delta_of(epsilon):
        low = math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu) if epsilon < 500 else 0.0
        return stats.norm.cdf(mu / 2 - epsilon / mu) - low

    exact = optimize.brentq(lambda e: delta_of(e) - DELTA, 0.0, 100.0, xtol=1e-12)
    assert exact * (1 - 1e-9) <= pld_epsilon({Event(noise, 1.0, "shuffled"): steps}, DELTA) <= exact * 1.002


class Unallowed(Composition):
    """Without the allowance for rounding errors, which grows with the number of points."""

    def _rounding(self, transform):
        return -self._error


def composed(pairs_and_counts, delta, refine=1, kind=Composition):
    rdp = sum(n * rdp_event(event) for event, _, n in pairs_and_counts)
    grid = Grid.plan(rdp, DEFAULT_ORDERS, sum(n for *_, n in pairs_and_counts), delta)
    run = kind(Grid(grid.spacing / 2**refine, grid.log_size + refine))
    for _, pair, count in pairs_and_counts:
        run.add(pair, count)
    return run.epsilon(delta)


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-8])
def test_a_finer_grid_is_below_and_close(event, delta):
    for pair in dominating_pairs(event)[:1]:
        finest, finer, fine = (composed([(event, pair, 100)], delta, refine, Unallowed) for refine in (3, 2, 1))
        assert finest * (1 - 1e-7) <= finer <= fine * (1 + 1e-7)
        assert fine <= composed([(event, pair, 100)], delta, 0) <= finest * 1.003


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.0064, 156), (0.6, 0.0064, 100), (2.0, 0.05, 300)])
def test_fixed_size_agrees_with_dp_accounting(noise, rate, steps):
    """dp-accounting composes the replace-one pair (2, 2); ours, (2, 1), is for zero-out and below it."""
    records = 10_000
    oracle = dp.TruncatedSubsampledGaussianDpEvent(records, 1.0, round(rate * records), noise)
    expected = theirs(oracle, steps, ZERO_OUT, 1e-3)
    event = Event(noise, rate, "fixed_size")
    same = composed([(event, Pair(noise, (Component(0.0, rate, 2.0, 2.0),)), steps)], DELTA)
    assert same == pytest.approx(expected, rel=5e-3)
    assert pld_epsilon({Event(noise, rate): steps}, DELTA) < pld_epsilon({event: steps}, DELTA) <= expected * 1.001


@pytest.mark.parametrize(
    ("noise", "rate", "limit", "steps"), [(1.0, 0.0064, 80, 469), (1.0, 0.0064, 110, 469), (2.0, 0.02, 205, 300)]
)
def test_truncated_poisson_agrees_with_dp_accounting(noise, rate, limit, steps):
    expected = theirs(dp.TruncatedSubsampledGaussianDpEvent(10_000, rate, limit, noise), steps, ZERO_OUT, 1e-3)
    event = Event(noise, rate, "truncated_poisson", 10_000, limit)
    kept, displaced = dominating_pairs(event)[0].components
    both_ways = Pair(noise, (kept, Component(displaced.log_weight, displaced.rate, 2.0, 2.0)))
    assert composed([(event, both_ways, steps)], DELTA) == pytest.approx(expected, rel=5e-3)
    assert pld_epsilon({Event(noise, rate): steps}, DELTA) < pld_epsilon({event: steps}, DELTA) <= expected * 1.001


def test_a_thousand_distinct_rates():
    """Exactly 3.131 (grid 5e-4, no rounding); the Renyi bound is 3.517."""
    rates = np.random.default_rng(0).integers(32, 257, 1000) / 1e4
    counts = {}
    for rate in rates.tolist():
        counts[Event(1.0, rate)] = counts.get(Event(1.0, rate), 0) + 1
    rounded = pld_epsilon(counts, DELTA)
    exact = composed([(event, dominating_pairs(event)[0], n) for event, n in counts.items()], DELTA)
    assert exact <= rounded <= 1.006 * exact
    assert rounded <= 3.17


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_monotone_in_noise_and_steps_and_below_renyi(event):
    def at(noise, steps):
        made = Event(noise, event.sample_rate, event.sampling, event.dataset_size, event.max_batch_size)
        epsilon = pld_epsilon({made: steps}, DELTA)
        assert 0.0 <= epsilon <= epsilon_from_rdp(steps * rdp_event(made), DEFAULT_ORDERS, DELTA)[0]
        return epsilon

    assert at(3.0, 10) < at(2.0, 10) < at(1.2, 10) < at(1.2, 20) < at(1.2, 60)


@pytest.mark.parametrize(
    ("event", "steps", "delta", "expected"),
    [
        (Event(0.0, 0.5), 1, DELTA, math.inf),
        (Event(0.0, 0.0), 1, DELTA, 0.0),
        (Event(math.inf, 0.5), 10, DELTA, 0.0),
        (Event(1.0, 0.0), 10, DELTA, 0.0),
        (Event(1.0, 0.01), 10, 0.0, math.inf),
        (Event(1.0, 0.01), 10, 1.0, 0.0),
        (Event(1.0, 0.01), 0, DELTA, 0.0),
        (Event(1.0, 1e-300), 5, DELTA, 0.0),
    ],
)
def test_edges(event, steps, delta, expected):
    accountant = VariableRatePLDAccountant()
    assert accountant.epsilon_after(event, delta, steps) == expected
    accountant.step_event(event, steps)
    assert accountant.get_epsilon(delta) == expected == pld_epsilon({event: steps}, delta)


@pytest.mark.parametrize(
    ("event", "steps", "delta"),
    [(Event(1.0, 0.01), 1000, 1e-15), (Event(0.05, 0.5), 50, DELTA), (Event(1.0, 1.0), 10**9, DELTA)],
)
def test_where_the_grid_cannot_say_the_renyi_bound_stands(event, steps, delta):
    bound = epsilon_from_rdp(steps * rdp_event(event), DEFAULT_ORDERS, delta)[0]
    assert pld_epsilon({event: steps}, delta) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize(("spacing", "log_size"), [(1e-3, 8), (1e-3, 10), (1e-3, 12), (0.05, 6), (0.5, 5), (2.0, 4)])
def test_grids_too_small_or_too_coarse_never_under_report(spacing, log_size):
    """What leaves the grid is added to delta: epsilon grows or becomes infinite."""
    run = Composition(Grid(spacing, log_size))
    run.add(dominating_pairs(Event(1.0, 0.01))[0], 1000)
    assert run.epsilon(DELTA) >= 1.8282


def test_the_accountant_is_both_bounds():
    both, renyi = VariableRatePLDAccountant(), VariableRateRDPAccountant()
    for index in range(60):  # past the exact places
        for accountant in (both, renyi):
            accountant.step(noise_multiplier=1.0, sample_rate=0.01 + 1e-5 * index)
    for event in EVENTS.values():
        foreseen = both.epsilon_after(event, DELTA, steps=7)
        before = both.get_epsilon(DELTA)
        assert before <= foreseen <= renyi.epsilon_after(event, DELTA, steps=7)
        for accountant in (both, renyi):
            accountant.step_event(event, 7)
        assert both.get_epsilon(DELTA) == pytest.approx(foreseen, rel=2e-3)  # the grid may have been planned anew
        assert both.get_epsilon(DELTA, alphas=[8.0]) == renyi.get_epsilon(DELTA, alphas=[8.0])
    assert both.get_epsilon(DELTA) < renyi.get_epsilon(DELTA)
    assert both.get_epsilon(DELTA) == pytest.approx(pld_epsilon(both.counts(), DELTA), rel=2e-3)


@pytest.mark.parametrize("kind", [VariableRateRDPAccountant, VariableRatePLDAccountant])
def test_other_events_are_counted_saved_and_loaded(kind):
    accountant = kind()
    for event in EVENTS.values():
        accountant.step_event(event, 3)
    accountant.step_event(EVENTS["fixed_size"])
    assert accountant.history == [(1.0, 0.01, 3), (2.0, 1.0, 3)]
    assert accountant.other_events == {EVENTS["fixed_size"]: 4, EVENTS["truncated_poisson"]: 3}
    assert len(accountant) == 4
    assert accountant.counts() == {Event(1.0, 0.01): 3, Event(2.0, 1.0): 3, **accountant.other_events}
    state = accountant.state_dict()
    loaded = kind()
    loaded.load_state_dict(json.loads(json.dumps(state)))
    assert loaded.counts() == accountant.counts()
    assert loaded.get_epsilon(DELTA) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)
    for bad in ([[1.0, 0.1]], [[1.0, 0.1, "poisson", None, None, 3]], [[1.0, 0.1, "fixed_size", None, None, -1]], [7]):
        with pytest.raises(ValueError, match=r"other_events|sampling|steps"):
            loaded.load_state_dict({**state, "other_events": bad})
    with pytest.raises(ValueError, match="sample_rate"):
        loaded.load_state_dict({**state, "history": [(1.0, 2.0, 1)]})
    assert loaded.counts() == accountant.counts()
    plain = kind()
    plain.step_event(EVENTS["poisson"])
    assert set(plain.state_dict()) == {"history", "mechanism"}
    loaded.load_state_dict(plain.state_dict())
    assert loaded.other_events == {}
    assert loaded.get_epsilon(DELTA) == pytest.approx(plain.get_epsilon(DELTA), rel=1e-6)


def test_assigning_a_part_keeps_the_other():
    accountant = VariableRatePLDAccountant()
    accountant.other_events = {EVENTS["fixed_size"]: 2}
    accountant.history = [(1.0, 0.01, 5)]
    assert accountant.counts() == {EVENTS["fixed_size"]: 2, EVENTS["poisson"]: 5}
    with pytest.raises(ValueError, match="belong to history"):
        accountant.other_events = {EVENTS["poisson"]: 1}
    with pytest.raises(ValueError, match="Event"):
        accountant.other_events = {(1.0, 0.1): 1}
    assert len(accountant) == 2


def test_states_of_the_other_accountant_are_refused():
    accountant = VariableRatePLDAccountant()
    with pytest.raises(ValueError, match=r"accountant\.history ="):
        accountant.load_state_dict({"history": [], "mechanism": "vrdp"})


def test_both_are_registered(monkeypatch):
    monkeypatch.setattr(registry, "_ACCOUNTANTS", {})
    register()
    register()
    assert type(create_accountant("vpld")) is VariableRatePLDAccountant
    assert type(create_accountant("vrdp")) is VariableRateRDPAccountant
    assert VariableRatePLDAccountant.mechanism() == "vpld"


KINDS = [
    ({"sample_rate": 0.01, "steps": 500}, "poisson"),
    ({"sample_rate": 0.0064, "steps": 200}, "fixed_size"),
    ({"sample_rate": 0.0064, "steps": 200, "dataset_size": 10_000, "max_batch_size": 90}, "truncated_poisson"),
    ({"sample_rate": 1.0, "steps": 3}, "shuffled"),
    ({"sample_rate": np.linspace(0.005, 0.02, 80).tolist()}, "poisson"),
]


@pytest.mark.parametrize(("plan", "sampling"), KINDS, ids=[kind for _, kind in KINDS])
def test_calibration_of_every_kind_by_both_methods(plan, sampling):
    budget = {"target_epsilon": 3.0, "target_delta": DELTA, "tolerance": 1e-3}
    renyi, losses = (
        calibrate_noise_multiplier(**budget, **plan, sampling=sampling, method=method) for method in ("rdp", "pld")
    )
    assert losses < renyi
    sizes = {name: plan.get(name) for name in ("dataset_size", "max_batch_size")}
    rates = plan["sample_rate"] if plan.get("steps") is None else [plan["sample_rate"]] * plan["steps"]
    for noise, method, kind in (
        (renyi, "rdp", VariableRateRDPAccountant),
        (losses, "pld", VariableRatePLDAccountant),
    ):
        accountant = kind()
        for rate in rates:
            accountant.step_event(Event(noise, rate, sampling, **sizes))
        assert 2.98 <= accountant.get_epsilon(DELTA) <= 3.0
        planned = plan_epsilon(noise, rates, None, DELTA, sampling=sampling, **sizes, method=method)
        assert planned == pytest.approx(accountant.get_epsilon(DELTA), rel=2e-3)
        assert planned <= 3.0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "prv"}, "method"),
        ({"sampling": "balls"}, "sampling"),
        ({"sampling": "truncated_poisson"}, "dataset_size"),
    ],
)
def test_bad_calibrations_are_refused(change, match):
    plan = {"target_epsilon": 3.0, "target_delta": DELTA, "sample_rate": 0.01, "steps": 10}
    with pytest.raises(ValueError, match=match):
        calibrate_noise_multiplier(**{**plan, **change})
