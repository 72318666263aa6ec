"""Dominating pairs of every kind of sampling: against attained mechanisms, dp-accounting, and as properties."""

import itertools
import math

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from opacus_ac.accounting import (
    ADJACENCY,
    DEFAULT_ORDERS,
    Event,
    RDPTable,
    common_adjacency,
    rdp_event,
    rdp_poisson_gaussian,
)
from opacus_ac.accounting import (
    dominating_pairs as pairs,
)
from opacus_ac.accounting.binomial import log_tail
from opacus_ac.accounting.divergence import rdp_pair
from opacus_ac.accounting.dominating_pairs import Component, Pair, PairRounding, dominating_pairs

DELTA = 1e-5
ORDERS = np.array([1.01, 1.5, 2.0, 3.7, 8.0, 32.0, 64.0])
FIXED = [(1.0, 0.0064), (0.6, 0.05), (2.0, 0.3), (4.0, 1e-3), (1.0, 0.9)]


def truncated(noise, rate, records=10_000, limit=80):
    return Event(noise, rate, "truncated_poisson", records, limit)


def laws(noise, first, second):
    """Densities of two mixtures [(weight, mean)] on a fine grid, and its spacing."""
    means = [mean for _, mean in first + second]
    x = np.linspace(min(means) - 12 * noise - 3, max(means) + 12 * noise + 3, 40_001)
    return (
        sum(w * stats.norm.pdf(x, m, noise) for w, m in first),
        sum(w * stats.norm.pdf(x, m, noise) for w, m in second),
        x[1] - x[0],
    )


def hockey_stick(noise, first, second, c):
    u, v, h = laws(noise, first, second)
    return float(np.maximum(u - c * v, 0.0).sum() * h)


def pair_hockey_stick(pair, c, swap=False):
    total = 0.0
    for part in pair.components:
        first, second = [(1 - part.rate, 0.0), (part.rate, part.up)], [(1 - part.rate, 0.0), (part.rate, -part.down)]
        if swap:
            first, second = second, first
        total += math.exp(part.log_weight) * hockey_stick(pair.noise_multiplier, first, second, c)
    return total


def attained(rate, of_y):
    """One step on real data: everybody else adds ``of_y``, the record adds 1 or is zeroed; sums relative to others'."""
    return [(1 - rate, 0.0), (rate, 1.0 - of_y)], [(1 - rate, 0.0), (rate, -of_y)]


def renyi(noise, first, second, order):
    u, v, h = laws(noise, first, second)
    inside = v > 1e-290
    return math.log((u[inside] ** order * v[inside] ** (1 - order)).sum() * h) / (order - 1)


@pytest.mark.parametrize(("noise", "rate"), FIXED)
@pytest.mark.parametrize("of_y", [-1.0, 0.0, 0.5, 1.0])
def test_fixed_size_rows_are_above_what_real_data_attains(noise, rate, of_y):
    row = rdp_event(Event(noise, rate, "fixed_size"), [1.5, 2.0, 3.0])
    first, second = attained(rate, of_y)
    for order, bound in zip([1.5, 2.0, 3.0], row, strict=True):
        assert renyi(noise, first, second, order) <= bound * (1 + 1e-9)
        assert renyi(noise, second, first, order) <= bound * (1 + 1e-9)


def test_the_poisson_bound_would_be_below_what_fixed_size_data_attains():
    """The planted defect that the test above is for."""
    assert renyi(1.0, *attained(0.0064, -1.0), 2.0) > 5 * rdp_poisson_gaussian(1.0, 0.0064, [2.0])[0]


def test_the_lemma_holds_for_vectors():
    """Random shifts in the plane, by integration: no direction pair is further apart than the opposite one."""
    rng = np.random.default_rng(5)
    grid = np.linspace(-9.0, 9.0, 361)
    x, y = np.meshgrid(grid, grid)
    cell = (grid[1] - grid[0]) ** 2

    def density(mean):
        return np.exp(-0.5 * ((x - mean[0]) ** 2 + (y - mean[1]) ** 2)) / (2 * math.pi) * cell

    for _ in range(20):
        p, angles = rng.uniform(0.05, 0.95), rng.uniform(0, 2 * math.pi, 2)
        a, b = (r * np.array([math.cos(t), math.sin(t)]) for r, t in zip([2.0, 1.0], angles, strict=True))
        u, v = ((1 - p) * density((0.0, 0.0)) + p * density(mean) for mean in (a, b))
        for c in (0.2, 0.8, 1.0, 1.5, 4.0):
            bound = pair_hockey_stick(Pair(1.0, (Component(0.0, p, 2.0, 1.0),)), c)
            assert np.maximum(u - c * v, 0.0).sum() <= bound + 2e-5  # the grid's error
            swapped = pair_hockey_stick(Pair(1.0, (Component(0.0, p, 2.0, 1.0),)), c, swap=True)
            assert np.maximum(v - c * u, 0.0).sum() <= swapped + 2e-5


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.01), (0.7, 0.3), (5.0, 1e-4), (2.0, 0.9)])
def test_mixture_rows_equal_direct_integration(noise, rate):
    pair = Pair(noise, (Component(math.log(0.75), rate), Component(math.log(0.25), rate / 2, 2.0, 1.0)))
    for order in (1.5, 2.0, 3.0):
        per_part = []
        for part in pair.components:
            first = [(1 - part.rate, 0.0), (part.rate, part.up)]
            second = [(1 - part.rate, 0.0), (part.rate, -part.down)]
            logs = [(order - 1) * renyi(noise, *both, order) for both in ((first, second), (second, first))]
            per_part.append(math.exp(part.log_weight + max(logs)))
        assert rdp_pair(pair, [order])[0] == pytest.approx(math.log(sum(per_part)) / (order - 1), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize(("noise", "rate"), FIXED[:4])
def test_fixed_size_is_below_the_general_bound_of_dp_accounting(noise, rate):
    """Wang, Balle, Kasiviswanathan for replace-one (noise over 2C), which covers zero-out."""
    orders, records = [2.0, 3.0, 8.0, 32.0], 10_000
    accountant = RdpAccountant(orders, dp.NeighboringRelation.REPLACE_ONE)
    inner = dp.GaussianDpEvent(noise / 2)
    accountant.compose(dp.SampledWithoutReplacementDpEvent(records, round(rate * records), inner))
    assert bool((rdp_event(Event(noise, rate, "fixed_size"), orders) <= accountant._rdp * (1 + 1e-9)).all())


@pytest.mark.parametrize(
    ("n", "q", "k"),
    [
        (100, 0.1, 15),
        (9999, 0.0064, 80),
        (9999, 0.0064, 30),
        (10**6, 1e-4, 180),
        (50, 0.9, 50),
        (10**7, 0.5, 5_010_000),
    ],
)
def test_binomial_tails(n, q, k):
    assert log_tail(n, q, k) == pytest.approx(stats.binom.logsf(k - 1, n, q), rel=1e-7)


@pytest.mark.parametrize(
    ("n", "q", "k", "expected"), [(5, 0.5, 0, 0.0), (5, 0.5, 6, -math.inf), (5, 0.0, 1, -math.inf), (5, 1.0, 5, 0.0)]
)
def test_binomial_tails_at_the_edges(n, q, k, expected):
    assert log_tail(n, q, k) == expected


def test_far_binomial_tails_are_above():
    assert stats.binom.logsf(1999, 10_000, 1e-3) < log_tail(10_000, 1e-3, 2000) < -3000


def test_truncation_has_the_rate_and_weight_of_its_definition():
    """Recomputed term by term: E[q B / (K + 1) | K >= B] and P(K >= B)."""
    n, q, b = 500, 0.1, 55
    k = np.arange(b, n)
    weights = stats.binom.pmf(k, n - 1, q)
    kept, displaced = dominating_pairs(truncated(1.0, q, n, b))[0].components
    assert math.exp(displaced.log_weight) == pytest.approx(weights.sum(), rel=1e-9)
    assert math.exp(kept.log_weight) == pytest.approx(1 - weights.sum(), rel=1e-9)
    assert displaced.rate == pytest.approx((weights * q * b / (k + 1)).sum() / weights.sum(), rel=1e-9)
    assert (kept.rate, kept.up, kept.down, displaced.up, displaced.down) == (q, 1.0, 0.0, 2.0, 1.0)


@pytest.mark.parametrize(
    ("event", "same"),
    [
        (truncated(1.0, 0.01, 1000, 1000), Event(1.0, 0.01)),  # nothing to cut off
        (truncated(1.3, 1.0, 100, 10), Event(1.3, 0.1, "fixed_size")),  # everybody is drawn, ten are kept
        (Event(1.3, 1.0, "fixed_size"), Event(1.3, 1.0)),
        (Event(1.3, 0.0, "fixed_size"), Event(1.3, 0.0)),
        (Event(2.0, 1.0, "shuffled"), Event(2.0, 1.0)),
        (truncated(math.inf, 0.1), Event(1.0, 0.0)),
        (Event(math.inf, 0.1, "fixed_size"), Event(1.0, 0.0)),
    ],
)
def test_kinds_meet_where_they_should(event, same):
    np.testing.assert_allclose(rdp_event(event), rdp_event(same), rtol=1e-9)


@pytest.mark.parametrize("event", [Event(0.0, 0.1, "fixed_size"), truncated(0.0, 0.01)])
def test_no_noise_has_no_bound(event):
    assert bool(np.isinf(rdp_event(event)).all())


@pytest.mark.parametrize("make", [lambda s: Event(s, 0.01, "fixed_size"), lambda s: truncated(s, 0.0075)])
def test_rows_are_monotone_in_noise_and_never_above_one_whole_release(make):
    last = DEFAULT_ORDERS * math.inf
    for noise in (0.05, 0.3, 0.6, 1.0, 1.7, 3.0, 30.0):
        row = rdp_event(make(noise))
        assert not np.isnan(row).any()
        assert bool((row >= 0).all())
        assert bool((row <= last * (1 + 1e-9)).all())
        assert bool((row <= DEFAULT_ORDERS / (2 * noise**2) * (1 + 1e-9)).all())
        last = row


def test_fixed_size_is_monotone_in_the_rate_and_dearer_than_poisson():
    last = np.zeros_like(ORDERS)
    for rate in (1e-6, 1e-4, 0.01, 0.1, 0.5, 0.99):
        row = rdp_event(Event(1.0, rate, "fixed_size"), ORDERS)
        assert bool((row >= last).all())
        assert bool((row >= rdp_poisson_gaussian(1.0, rate, ORDERS) * (1 - 1e-9)).all())
        last = row


def test_truncation_costs_something_and_less_the_later_it_cuts():
    rows = [rdp_event(truncated(1.0, 0.0064, 10_000, limit), ORDERS) for limit in (70, 90, 110, 9_999)]
    for dearer, cheaper in itertools.pairwise(rows):
        assert bool((dearer >= cheaper * (1 - 1e-12)).all())
    poisson = rdp_poisson_gaussian(1.0, 0.0064, ORDERS)
    assert bool((rows[0][:4] > poisson[:4]).all())
    np.testing.assert_allclose(rows[-1][:4], poisson[:4], rtol=1e-9)


ROUNDED = [
    Event(1.0, 0.0123),
    Event(1.003, 0.0123, "fixed_size"),
    truncated(1.003, 0.0079),
    truncated(0.6, 0.02, 300, 5),
]


def check_rounding_dominates(event, **settings):
    for pair in dominating_pairs(event):
        rounded = PairRounding(0, max_noise=0, **settings).resolve(pair)
        assert rounded != pair
        for swap in (False, True):
            for c in (0.3, 0.9, 1.0, 1.2, 3.0):
                assert pair_hockey_stick(rounded, c, swap) >= pair_hockey_stick(pair, c, swap) - 1e-12


@pytest.mark.parametrize("event", ROUNDED)
def test_rounded_pairs_dominate(event):
    check_rounding_dominates(event)
    check_rounding_dominates(event, rate_step=0.1)


def test_rounding_the_rate_down_is_caught(monkeypatch):
    monkeypatch.setattr(pairs, "rate_above", lambda rate, step: rate / 1.005)
    for event in ROUNDED[:2]:
        with pytest.raises(AssertionError):
            check_rounding_dominates(event)


def test_rounding_keeps_the_first_and_is_a_pure_question_when_asked():
    rounding, (first, *_) = PairRounding(1), dominating_pairs(Event(1.0, 0.0123))
    (second,) = dominating_pairs(Event(1.0, 0.0321))
    assert rounding.resolve(second, remember=False) == second
    assert rounding.resolve(first) == first
    assert rounding.resolve(second) != second
    assert rounding.resolve(first) == first


def test_the_table_serves_every_kind_and_rounds_up():
    table = RDPTable(ORDERS, max_other=2)  # both pairs of the first event
    events = [Event(1.0, 0.012, "fixed_size"), Event(1.0, 0.0127, "fixed_size"), truncated(1.0, 0.0071)]
    np.testing.assert_array_equal(table.event_row(events[0]), rdp_event(events[0], ORDERS))
    for event in events:
        row, exact = table.event_row(event), rdp_event(event, ORDERS)
        assert bool((row >= exact * (1 - 1e-12)).all())
        assert bool((row <= exact * 1.15).all())
    np.testing.assert_array_equal(table.event_row(Event(2.0, 1.0, "shuffled")), rdp_event(Event(2.0, 1.0), ORDERS))


@pytest.mark.parametrize(
    ("samplings", "expected"),
    [
        (["poisson"], "add/remove"),
        (["shuffled"], "zero-out"),
        (["poisson", "shuffled"], "zero-out"),
        (["poisson", "fixed_size", "truncated_poisson", "shuffled"], "zero-out"),
    ],
)
def test_common_adjacency(samplings, expected):
    assert common_adjacency(samplings).startswith(expected)
    assert common_adjacency(samplings) in ADJACENCY.values()


@pytest.mark.parametrize(("samplings", "match"), [([], "empty"), (["poisson", "balls"], "balls")])
def test_adjacencies_that_do_not_exist_are_refused(samplings, match):
    with pytest.raises(ValueError, match=match):
        common_adjacency(samplings)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ((1.0, 0.1, "truncated_poisson"), "dataset_size is missing"),
        ((1.0, 0.1, "truncated_poisson", 100), "max_batch_size is missing"),
        ((1.0, 0.1, "truncated_poisson", 0, 5), "dataset_size=0"),
        ((1.0, 0.1, "truncated_poisson", 100, 2.5), r"max_batch_size=2\.5"),
        ((1.0, 0.1, "poisson", 100), "leave it out"),
        ((1.0, 0.1, "fixed_size", None, 5), "leave it out"),
        ((1.0, 1.0, "shuffled", 100, 5), "leave it out"),
        ((1.0, 0.5, "shuffled"), "not amplified"),
    ],
)
def test_bad_events_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        Event(*fields)


def test_events_print_what_they_hold():
    assert repr(Event(1.0, 0.1)) == "Event(noise_multiplier=1.0, sample_rate=0.1, sampling='poisson')"
    assert "dataset_size=10000, max_batch_size=80" in repr(truncated(1.0, 0.1))
