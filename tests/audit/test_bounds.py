"""The bounds of the audits hold as often as they say, and say something."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from opacus_ac.audit.bounds import (
    count_p_value,
    gaussian_delta,
    gaussian_epsilon,
    guess_epsilon,
    guess_p_value,
    largest_rate,
    mu_from_errors,
    mu_from_means,
    std_interval,
)
from opacus_ac.audit.result import AuditResult, Finding, check_confidence


@pytest.mark.parametrize(
    ("mu", "epsilon"), [(1.0, 4.377), (2.0, 9.97), (0.925, 4.0), (math.sqrt(10), 17.9), (0.0, 0.0), (-1.0, 0.0)]
)
def test_gaussian_curve(mu, epsilon):
    assert gaussian_epsilon(mu, 1e-5) == pytest.approx(epsilon, abs=0.06)


@pytest.mark.parametrize("mu", [1e-6, 0.1, 1.0, 5.0, 30.0, 100.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9])
def test_gaussian_curve_is_inverted(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    assert gaussian_delta(mu, epsilon) <= delta * (1 + 1e-6)
    assert epsilon == 0 or gaussian_delta(mu, epsilon * (1 - 1e-6)) > delta * (1 - 1e-4)
    assert gaussian_epsilon(2e4, delta) == math.inf


@pytest.mark.statistical
@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_bounds_of_mu_hold_and_say_something(mu):
    """4000 audits of 400 observations at alpha = 0.05. More than 260 wrong bounds would be 4.3 sigma above alpha."""
    rng = np.random.default_rng(5)
    wrong, sizes = {"errors": 0, "means": 0}, {"errors": [], "means": []}
    for _ in range(4000):
        inside = rng.random(400) < 0.5
        values = rng.normal(size=400) / mu + inside
        ins, outs = values[inside], values[~inside]
        found = {
            "errors": mu_from_errors(int((outs > 0.5).sum()), outs.size, int((ins <= 0.5).sum()), ins.size, alpha=0.05),
            "means": mu_from_means(ins, outs, alpha=0.05),
        }
        for name, bound in found.items():
            wrong[name] += bound > mu
            sizes[name].append(bound)
    assert max(wrong.values()) <= 260
    assert wrong["means"] >= 100  # nearly exact: a bound that is never wrong would be a weaker one
    assert np.mean(sizes["means"]) > mu - 2.2 * math.sqrt(4 / 400 + mu**2 / 800)
    assert np.mean(sizes["errors"]) > mu - 4 * math.sqrt(4 / 400 + mu**2 / 800) - 0.1 * mu**2


@pytest.mark.parametrize(
    ("ins", "outs", "bound"),
    [([1.0, 1.0], [0.0, 0.0], "large"), ([0.0, 0.1], [1.0, 1.1], 0.0), ([1.0], [0.0, 0.0], 0.0), ([], [], 0.0)],
)
def test_means_at_the_edges(ins, outs, bound):
    found = mu_from_means(np.array(ins), np.array(outs), 0.05)
    assert found > 100 if bound == "large" else found == bound


@pytest.mark.parametrize(("counts", "bound"), [((0, 0, 0, 0), 0.0), ((50, 50, 0, 50), 0.0), ((25, 50, 25, 50), 0.0)])
def test_errors_at_the_edges(counts, bound):
    assert mu_from_errors(*counts, alpha=0.05) == bound


@pytest.mark.statistical
def test_clopper_pearson_and_chi_square_cover():
    """Exact coverage by enumeration; 2000 intervals at alpha = 0.1: 265 misses would be 4.8 sigma."""
    for rate in (0.01, 0.3, 0.9):
        hits = np.arange(41)
        bounds = np.array([largest_rate(int(h), 40, 0.05) for h in hits])
        assert stats.binom.pmf(hits, 40, rate)[bounds < rate].sum() <= 0.05
    rng = np.random.default_rng(1)
    squares = (rng.normal(size=(2000, 50)) ** 2).sum(1)
    intervals = [std_interval(s, 50, 0.1) for s in squares]
    assert 135 <= sum(not low <= 1 <= high for low, high in intervals) <= 265


def test_counts():
    assert count_p_value(500, 1000, 0.5) == 1.0
    assert count_p_value(600, 1000, 0.5) < 1e-9
    assert count_p_value(0, 10, 0.5) == pytest.approx(2 / 1024)


# ---- one run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "r", "v", "epsilon", "delta"), [(50, 20, 18, 1.0, 1e-3), (100, 100, 70, 0.5, 1e-5), (9, 4, 0, 1.0, 1e-2)]
)
def test_guess_p_value_is_the_theorem(m, r, v, epsilon, delta):
    """Term by term: P[W >= v] + 2 m delta max_i P[v - i <= W < v] / i, with W binomial."""
    rate = 1 / (1 + math.exp(-epsilon))

    def at_least(k):
        return sum(math.comb(r, j) * rate**j * (1 - rate) ** (r - j) for j in range(max(k, 0), r + 1))

    extra = max((at_least(v - i) - at_least(v)) / i for i in range(1, m + 1))
    assert guess_p_value(m, r, v, epsilon, delta) == pytest.approx(
        min(1, at_least(v) + 2 * m * delta * extra), rel=1e-9
    )


def test_guesses_show_what_they_can():
    epsilons = [guess_epsilon(1000, 200, correct, 1e-6, 0.05) for correct in (100, 130, 160, 190, 200)]
    assert epsilons[0] == 0
    assert all(a < b for a, b in itertools.pairwise(epsilons))
    assert guess_epsilon(1000, 200, 190, 1e-5, 0.05) < guess_epsilon(1000, 200, 190, 0.0, 0.05)
    assert guess_p_value(1000, 200, 190, epsilons[3], 1e-6) <= 0.05


@pytest.mark.statistical
def test_randomised_response_is_refuted_as_rarely_as_stated():
    """Exact: the worst pure epsilon-DP mechanism answers 200 coins; its bound exceeds epsilon with probability < 0.05."""
    rate = 1 / (1 + math.exp(-1.0))
    correct = np.arange(201)
    above = np.array([guess_epsilon(200, 200, int(c), 0.0, 0.05) > 1.0 for c in correct])
    assert 0.02 < stats.binom.pmf(correct, 200, rate)[above].sum() <= 0.05


# ---- results -------------------------------------------------------------------------------------------------------


def test_result_for_people_and_for_files():
    fine = Finding("a check", "epsilon <= inf", "epsilon >= 0", False, math.inf, 0.5)
    bad = Finding("another", "std 1", "std 0.5", True)
    result = AuditResult("audit", "subject", 7, 0.999, 1e-5, (fine, bad), ("a note",))
    assert result.refuted
    assert result.epsilon == 0.5
    text = str(result)
    assert "REFUTED" in text
    assert "note: a note" in text
    assert result.to_dict()["findings"][0]["claimed_epsilon"] == "infinity"
    assert result.to_dict()["refuted"] is True
    assert result.finding("anoth") is bad
    with pytest.raises(KeyError, match="a check, another"):
        result.finding("none")
    assert not AuditResult("audit", "subject", 7, 0.999, 1e-5, (fine,)).refuted


@pytest.mark.parametrize("confidence", [0.5, 1.0, 2.0, -1.0, float("nan")])
def test_confidence_that_decides_nothing_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        check_confidence(confidence)
