"""Rényi rows, their conversion to epsilon, and the table: against other implementations, and as properties."""

import math
import warnings

import mpmath
import numpy as np
import pytest
from dp_accounting.rdp import rdp_privacy_accountant as dp_rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp

from opacus_ac.accounting import DEFAULT_ORDERS, RDPTable, epsilon_from_rdp, rdp_poisson_gaussian
from opacus_ac.accounting.rdp_table import noise_below, rate_above

RATES = st.floats(-6.0, 0.0).map(lambda x: min(10.0**x, 1.0))
NOISES = st.floats(-1.0, 2.0).map(lambda x: 10.0**x)
deterministic = settings(derandomize=True, deadline=None, max_examples=50)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def random_pairs(n=60):
    rng = np.random.default_rng(20250)
    return list(zip(np.exp(rng.uniform(math.log(0.3), math.log(100), n)), 10 ** rng.uniform(-6, 0, n), strict=True))


def exact(noise, rate, order):
    """The definition, integrated with 30 digits by Gauss-Legendre panels."""
    with mpmath.workdps(30):
        s, q, a = mpmath.mpf(float(noise)), mpmath.mpf(float(rate)), mpmath.mpf(float(order))

        def excess(x):
            u = q * mpmath.expm1((2 * x - 1) / (2 * s * s))
            return mpmath.npdf(x, 0, s) * ((1 + u) ** a - 1 - a * u)

        panels = mpmath.linspace(-12 * s, a + 12 * s, 2 + int((a + 24 * s) / min(s, 3 * s * s)))
        integral = mpmath.quad(excess, panels, method="gauss-legendre", maxdegree=4)
        return float(mpmath.log1p(integral) / (a - 1))


@pytest.mark.parametrize(
    ("noise", "rate", "order"),
    [
        (1.0, 0.01, 1.5),
        (1.0, 0.01, 32),
        (0.3, 0.5, 1.01),
        (0.3, 1e-6, 10.9),
        (0.5, 0.1, 1.1),
        (100.0, 1e-6, 1.1),
        (100.0, 0.9, 63),
        (1e5, 0.3, 2.5),
        (0.1, 0.01, 2.5),
    ],
)
def test_rows_equal_high_precision_integration(noise, rate, order):
    value = rdp_poisson_gaussian(noise, rate, [order])[0]
    assert value == pytest.approx(exact(noise, rate, order), rel=1e-11)
    # The row does not depend on which other orders are asked for (beyond rounding).
    among = rdp_poisson_gaussian(noise, rate)[np.argmin(abs(DEFAULT_ORDERS - order))]
    assert among == pytest.approx(value, rel=1e-11)


def test_whole_orders_agree_with_dp_accounting():
    orders = [*range(2, 64), 128, 256]
    for noise, rate in random_pairs():
        ours = rdp_poisson_gaussian(noise, rate, orders)
        theirs = np.array(dp_rdp._compute_rdp_poisson_subsampled_gaussian(rate, noise, orders))
        assert np.max(abs(ours - theirs) / np.maximum(1.0, theirs)) < 1e-6


def test_opacus_orders_agree_with_opacus():
    for noise, rate in random_pairs():
        ours = rdp_poisson_gaussian(noise, rate, RDPAccountant.DEFAULT_ALPHAS)
        theirs = compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=RDPAccountant.DEFAULT_ALPHAS)
        assert np.max(abs(ours - theirs) / np.maximum(1.0, theirs)) < 1e-6


def test_orders_contain_those_of_opacus():
    assert set(RDPAccountant.DEFAULT_ALPHAS) < set(DEFAULT_ORDERS.tolist())
    assert bool((np.diff(DEFAULT_ORDERS) > 0).all())


@pytest.mark.parametrize(
    ("noise", "rate", "expected"),
    [
        (1.0, 0.0, np.zeros_like(DEFAULT_ORDERS)),
        (0.0, 0.0, np.zeros_like(DEFAULT_ORDERS)),
        (math.inf, 0.5, np.zeros_like(DEFAULT_ORDERS)),
        (2.0, 1.0, DEFAULT_ORDERS / 8.0),
        (0.0, 0.5, np.full_like(DEFAULT_ORDERS, math.inf)),
        (0.0, 1.0, np.full_like(DEFAULT_ORDERS, math.inf)),
    ],
)
def test_edges(noise, rate, expected):
    np.testing.assert_allclose(rdp_poisson_gaussian(noise, rate), expected, rtol=1e-15)


@pytest.mark.parametrize("noise", [5e-324, 1e-200, 1e-6, 1e-3, 0.05, 0.0857, 0.0858, 1e6, 1e150, 1e300])
@pytest.mark.parametrize("rate", [5e-324, 1e-100, 1e-6, 0.5, 1 - 2**-53])
def test_extremes_stay_between_zero_and_the_full_batch(noise, rate):
    row = rdp_poisson_gaussian(noise, rate)
    assert not np.isnan(row).any()
    assert bool((row >= 0.0).all())
    assert bool((row <= rdp_poisson_gaussian(noise, 1.0)).all())


def test_little_noise_gives_an_upper_bound_at_fractional_orders():
    for order in (1.05, 1.5, 2.5):
        bound, value = rdp_poisson_gaussian(0.07, 0.01, [order, 10.9])[0], exact(0.07, 0.01, order)
        assert value * (1 - 1e-12) <= bound <= 0.5 * order / 0.07**2


@deterministic
@given(NOISES, RATES, st.floats(1.0001, 4.0))
def test_monotone_in_rate_noise_and_order(noise, rate, factor):
    row = rdp_poisson_gaussian(noise, rate)
    tolerance = 1e-10 * row
    assert bool((rdp_poisson_gaussian(noise, min(1.0, rate * factor)) >= row - tolerance).all())
    assert bool((rdp_poisson_gaussian(noise * factor, rate) <= row + tolerance).all())
    assert bool((np.diff(row) >= -1e-10 * row[1:]).all())
    assert bool((row >= 0.0).all())


def test_epsilon_is_never_negative_and_delta_has_its_edges():
    row = rdp_poisson_gaussian(5.0, 1e-4)
    assert epsilon_from_rdp(row, DEFAULT_ORDERS, 0.1)[0] == 0.0
    assert epsilon_from_rdp(row, DEFAULT_ORDERS, 0.0)[0] == math.inf
    assert epsilon_from_rdp(row, DEFAULT_ORDERS, 1.0)[0] == 0.0
    assert epsilon_from_rdp(np.zeros(3), [2, 3, 4], 0.0)[0] == 0.0
    assert epsilon_from_rdp([math.inf, math.inf], [2, 3], 1e-5)[0] == math.inf
    assert epsilon_from_rdp([math.inf, 1.0], [2, 3], 1e-5)[1] == 3.0


@pytest.mark.parametrize(
    ("rdp", "orders", "delta", "match"),
    [
        ([1.0], [2.0], -1e-5, "delta"),
        ([1.0], [2.0], math.nan, "delta"),
        ([1.0, 2.0], [2.0], 1e-5, "shape"),
        ([math.nan], [2.0], 1e-5, "NaN"),
        ([-1.0], [2.0], 1e-5, "negative"),
        ([1.0], [1.0], 1e-5, "orders"),
        ([1.0], [math.inf], 1e-5, "orders"),
        ([], [], 1e-5, "orders"),
    ],
)
def test_bad_conversions_are_refused(rdp, orders, delta, match):
    with pytest.raises(ValueError, match=match):
        epsilon_from_rdp(rdp, orders, delta)


@deterministic
@given(RATES, NOISES)
def test_grids_round_to_the_costlier_side_and_keep_their_points(rate, noise):
    up, down = rate_above(rate), noise_below(noise)
    assert rate <= up <= min(1.0, rate * 1.0100001)
    assert noise / 1.0050001 <= down <= noise
    assert rate_above(up) == up
    assert noise_below(down) == down


@pytest.mark.parametrize(("noise", "low", "high"), [(1.0, 0.0032, 0.0256), (0.6, 1e-3, 0.1), (4.0, 1e-4, 1.0)])
def test_the_grid_is_above_the_exact_sum_and_within_one_percent(noise, low, high):
    rates = np.exp(np.random.default_rng(1).uniform(math.log(low), math.log(high), 400))
    table = RDPTable(max_exact=0)
    pairs = [table.resolve(noise, rate) for rate in rates.tolist()]
    assert len(set(pairs)) < 400
    for pair, rate in zip(pairs[:20], rates[:20], strict=True):
        assert bool((table.row(pair) >= rdp_poisson_gaussian(noise, rate)).all())
    truth = sum(rdp_poisson_gaussian(noise, rate) for rate in rates)
    eps, eps_exact = (epsilon_from_rdp(r, DEFAULT_ORDERS, 1e-5)[0] for r in (sum(map(table.row, pairs)), truth))
    assert eps_exact < eps <= 1.01 * eps_exact


def test_the_table_is_exact_first_then_rounds_and_stays_bounded():
    table = RDPTable([2.0, 3.0], max_exact=2, max_noise=1, max_rows=5)
    assert table.resolve(1.0, 0.013, remember=False) == (1.0, 0.013)
    assert table.resolve(1.0, 0.011) == (1.0, 0.011)
    assert table.resolve(1.0, 0.012) == (1.0, 0.012)
    assert table.resolve(1.0, 0.013) == (1.0, rate_above(0.013))  # both exact places are taken
    assert table.resolve(1.0, 0.011) == (1.0, 0.011)  # and keep their owners
    assert table.resolve(1.3, 0.011) == (noise_below(1.3), rate_above(0.011))
    assert table.resolve(1.3, 0.0) == (1.3, 0.0)
    for rate in np.linspace(0.1, 0.9, 40).tolist():
        row = table.row(table.resolve(1.0, rate))
        assert len(table) <= 5
        np.testing.assert_array_equal(row, table.row(table.resolve(1.0, rate)))
    with pytest.raises(ValueError, match="read-only"):
        row[0] = 0.0
