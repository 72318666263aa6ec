"""What right guesses of one run refute: true claims almost never, wrong ones at the sizes that audits have."""

import math

import numpy as np
import pytest
from scipy import special

from opacus_ac.accounting import Event, attack_bounds, attack_bounds_of_pair
from opacus_ac.audit.bounds import guess_epsilon
from opacus_ac.audit.guesses import (
    CURVE_RATES,
    ClaimedCurve,
    mu_from_guesses,
    number_of_guesses,
    refutes,
    right_guesses,
)


def gaussian(mu):
    return lambda rate: float(special.ndtr(special.ndtri(rate) - mu))


def guessed(mu, canaries, guesses, generator):
    """Right guesses where each canary is seen through Gaussian noise of its own: the best that mu allows."""
    inside = generator.random(canaries) < 0.5
    return right_guesses(mu * inside + generator.normal(size=canaries), inside, guesses)


@pytest.mark.parametrize(("mu", "guesses"), [(0.5, 200), (1.6, 200), (1.6, 60), (3.0, 200)])
def test_a_true_claim_is_refuted_no_more_often_than_stated(mu, guesses):
    """1000 runs: at alpha = 0.05 more than 75 refutations have a probability below 1e-3, if the test is exact."""
    generator = np.random.default_rng(0)
    counts = np.bincount([guessed(mu, 200, guesses, generator) for _ in range(1000)], minlength=guesses + 1)
    refuted = sum(n for correct, n in enumerate(counts) if n and refutes(gaussian(mu), 200, guesses, correct, 0.05))
    assert refuted <= 75


@pytest.mark.parametrize(("mu", "claim"), [(3.0, 0.5), (5.0, 1.2), (12.0, 1.4)])
def test_a_false_claim_is_refuted(mu, claim):
    """Half of the canaries are guessed: a claim allows much in rare cases, so that errors cost more than guesses."""
    generator = np.random.default_rng(1)
    assert all(refutes(gaussian(claim), 400, 200, guessed(mu, 400, 200, generator), 0.025) for _ in range(20))


def test_perfect_guesses_refute_a_large_epsilon_by_its_curve_and_not_by_itself():
    """At epsilon 8 the curve allows no perfect guesses; the bound for every curve stops at 3.5."""
    claim = attack_bounds({Event(0.7, 0.05): 60}, CURVE_RATES)
    curve = ClaimedCurve(claim)
    assert refutes(curve.least_false_positives, 200, 200, 200, 0.005)
    assert not refutes(curve.least_false_positives, 200, 200, 140, 0.005)
    assert guess_epsilon(200, 200, 200, 1e-5, 0.005) < 4


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_the_curve_is_below_what_the_claim_allows_and_close(mu):
    curve = ClaimedCurve(attack_bounds({Event(1 / mu, 1.0): 1}, CURVE_RATES))
    for rate in (0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999):
        least = gaussian(mu)(rate)
        assert least * 0.75 - 1e-6 <= curve.least_false_positives(rate) <= least + 1e-12
    assert curve.least_false_positives(0.0) == 0.0
    assert curve.least_false_positives(1.0) <= 1.0


def test_the_curve_answers_for_both_directions():
    """One step at rate 0.1: insiders stay hidden nine times of ten, so that few can be found with certainty."""
    curve = ClaimedCurve(attack_bounds({Event(0.1, 0.1): 1}, CURVE_RATES))
    # Without mistakes one in ten is found; the other way round, a batch without the record clears nobody.
    assert curve.least_false_positives(0.09) < 1e-3
    assert curve.least_false_positives(0.5) < 0.5


def test_mu_grows_with_right_guesses_and_nothing_follows_from_half():
    found = [mu_from_guesses(200, 200, correct, 0.01) for correct in (100, 120, 150, 180, 200)]
    assert found == sorted(found)
    assert found[0] == 0.0
    assert 0.3 < found[2] < 2 * special.ndtri(0.75)
    assert refutes(gaussian(0.0), 100, 100, 0, 0.01) is False


def test_pairs_serve_where_there_are_no_privacy_losses():
    curve = ClaimedCurve(attack_bounds_of_pair(math.log(3), 0.0, CURVE_RATES))
    assert curve.least_false_positives(0.75) == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("guesses", [0, 3, 12])
def test_impossible_numbers_of_guesses_are_refused(guesses):
    with pytest.raises(ValueError, match="even number from 2 to the number of canaries 10"):
        number_of_guesses(guesses, 10)
