"""Guessing which canaries a single run saw: the coins, the guesses, and what right guesses say about a claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import special

from opacus_ac.accounting import AttackBounds
from opacus_ac.noise.streams import RandomStream, SecretStream, SeededStream
from opacus_ac.release.values import FloatArray

Coins = np.ndarray[Any, np.dtype[np.bool_]]
"""``[m]``, whether a canary is in the dataset."""

_LARGEST_MU = 100.0
_TAILS = np.logspace(-7, math.log10(0.5), 200)

CURVE_RATES: tuple[float, ...] = tuple(float(rate) for rate in np.unique(np.concatenate([_TAILS, 1.0 - _TAILS])))
"""False-positive rates at which :class:`ClaimedCurve` needs the largest true-positive rates of a claim."""


def number_of_guesses(guesses: int, canaries: int) -> int:
    """Return the number of canaries to guess, half of them "in".

    Raises:
        ValueError: If it is odd, below 2 or above the number of canaries.
    """
    if not 2 <= guesses <= canaries or guesses % 2:
        raise ValueError(f"guesses must be an even number from 2 to the number of canaries {canaries}, got {guesses!r}")
    return guesses


def tossed(canaries: int, seed: int | None) -> Coins:
    """Return a fair coin for each canary, from the operating system's entropy where there is no seed."""
    coins: RandomStream = SecretStream() if seed is None else SeededStream(torch.Generator().manual_seed(seed + 1))
    tosses: Coins = coins.uniform(canaries).numpy() < 0.5
    return tosses


def right_guesses(scores: FloatArray, inside: Coins, guesses: int) -> int:
    """Guess canaries of the highest scores in and of the lowest out, and return how many guesses are right."""
    order = np.argsort(scores)
    half = guesses // 2
    return int(inside[order[-half:]].sum() + (~inside[order[:half]]).sum())


def refutes(
    least_false_positives: Callable[[float], float], canaries: int, guesses: int, correct: int, alpha: float
) -> bool:
    """Return whether right guesses contradict a claim about every attacker, with confidence ``1 - alpha``.

    Args:
        least_false_positives: the claim: the least false-positive rate with which a true-positive rate can be had,
            whichever of two neighbouring datasets is to be found.
        canaries: records that were each included with probability 1/2, independently.
        guesses: how many of them were guessed in or out; fixed beforehand.
        correct: right guesses.
        alpha: the probability with which a true claim is refuted is at most this.

    References:
        Mahloujifar, Melis and Chaudhuri 2024 (arXiv 2410.22235): the recursion over numbers of right guesses, for two
        choices.
    """
    if correct == 0:
        return False
    right, wrong = alpha * correct / canaries, alpha * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        more = max(wrong, least_false_positives(min(right, 1.0)))
        right += i / (guesses - i) * (more - wrong)
        wrong = more
    return right + wrong > guesses / canaries


def mu_from_guesses(canaries: int, guesses: int, correct: int, alpha: float) -> float:
    """Return the largest mu of Gaussian DP that right guesses contradict, with confidence ``1 - alpha``; 0 for none.

    Arguments are those of :func:`refutes`.
    """

    def refuted(mu: float) -> bool:
        return refutes(lambda rate: float(special.ndtr(special.ndtri(rate) - mu)), canaries, guesses, correct, alpha)

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high) and high < _LARGEST_MU:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


class ClaimedCurve:
    """What a claim says about every attacker, as :func:`refutes` asks for it.

    Args:
        claim: largest true-positive rates at :data:`CURVE_RATES`.
    """

    def __init__(self, claim: AttackBounds) -> None:
        points: Sequence[tuple[float, float]] = sorted(claim.true_positive_rates.items())
        self._rates = np.array([0.0, *(rate for rate, _ in points), 1.0])
        caught = [share for _, share in points]
        # At rate 0 the value at the first rate is an upper bound, since more can be caught with more mistakes.
        self._caught = np.maximum.accumulate(np.array([caught[0], *caught, 1.0]))

    def least_false_positives(self, rate: float) -> float:
        """Return a lower bound of the false-positive rate with which a true-positive rate can be had.

        Finding those who are in, a rule with rates (f, t) finds those who are out with rates (1 - t, 1 - f): so the
        one curve answers for both.
        """
        below = int(np.searchsorted(self._caught, rate, side="left")) - 1
        finding_in = float(self._rates[below]) if below >= 0 else 0.0
        above = int(np.searchsorted(self._rates, 1.0 - rate, side="left"))
        finding_out = 1.0 - float(self._caught[min(above, len(self._caught) - 1)])
        return max(0.0, min(finding_in, finding_out))
