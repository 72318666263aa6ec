"""Golden epsilons: what every accountant says of fixed histories, against the file and against dp-accounting."""

import math

import dp_accounting as dp
import golden_epsilons
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from opacus_ac.accounting import VariableRateRDPAccountant

ROWS = golden_epsilons.kept()
ZERO_OUT = dp.NeighboringRelation.REPLACE_SPECIAL
RECORDS = 10_000
WHOLE_ORDERS = [*range(2, 64), 72, 80, 96, 128, 192, 256, 512, 1024]


def label(row):
    events = {part["event"].get("sampling", "poisson") for part in row["history"]} or {"empty"}
    return f"{'+'.join(sorted(events))}-{ROWS.index(row)}"


def test_there_are_enough_of_them_of_every_kind():
    assert len(ROWS) >= 200
    assert {name for row in ROWS for name in row["epsilon"]} == {"vrdp", "vpld", "pure", "rdp", "prv", "gdp"}
    kinds = {part["event"].get("sampling", "poisson") for row in ROWS for part in row["history"]}
    assert kinds == {"poisson", "shuffled", "fixed_size", "truncated_poisson"}


def _same_to(name, delta):
    """Processors round the transforms differently, which shows where delta is hardly above what rounding adds to it."""
    if name == "prv":
        return 1e-4
    return 1e-4 if name == "vpld" and delta < 1e-6 else 1e-8


def test_the_file_holds_what_the_accountants_say():
    """A change of an epsilon must be meant, written by the command, and noted in the changelog under Privacy."""
    moved = []
    for row, fresh in zip(ROWS, golden_epsilons.histories(), strict=True):
        history, delta, expected = golden_epsilons.read(row)
        assert (history, delta) == fresh
        for name, epsilon in golden_epsilons.epsilons(history, delta).items():
            if epsilon != pytest.approx(expected.pop(name), rel=_same_to(name, delta), abs=1e-12):
                moved.append((row, name, epsilon))
        assert not expected, f"the file has accountants that are not asked any more: {expected}"
    assert not moved, f"{len(moved)} epsilons changed: {golden_epsilons.COMMAND}, and a line under Privacy: {moved[:3]}"


def test_what_holds_between_the_accountants():
    for row in ROWS:
        epsilon = golden_epsilons.read(row)[2]
        if "vpld" in epsilon:
            assert epsilon["vpld"] <= epsilon["vrdp"]
        if "rdp" in epsilon:  # fewer orders, and no end above 63
            assert epsilon["vrdp"] <= epsilon["rdp"] * (1 + 1e-9) + 1e-12


def dp_event(event):
    """The event as dp-accounting writes it."""
    gaussian = dp.GaussianDpEvent(event.noise_multiplier)
    if event.sampling == "poisson":
        return dp.PoissonSampledDpEvent(event.sample_rate, gaussian)
    if event.sampling == "shuffled":
        return gaussian
    records, rate, limit = RECORDS, 1.0, round(event.sample_rate * RECORDS)  # fixed size: all are drawn, B are kept
    if event.sampling == "truncated_poisson":
        records, rate, limit = event.dataset_size, event.sample_rate, event.max_batch_size
    return dp.TruncatedSubsampledGaussianDpEvent(records, rate, limit, event.noise_multiplier)


def computable(row):
    """Whether dp-accounting computes a history within a second: Gaussian, few kinds of steps, of a usual epsilon."""
    history, _, epsilon = golden_epsilons.read(row)
    usual = all(0 < event.noise_multiplier < math.inf and event.sample_rate > 0 for event, _ in history)
    return 0 < len(history) <= 4 and "vpld" in epsilon and usual and 0.02 < epsilon["vpld"] < 40


@pytest.mark.parametrize("row", [row for row in ROWS if computable(row)], ids=label)
def test_dp_accounting_agrees(row):
    """Never 1 % below its figure for Poisson batches, which is no lower bound itself; above it by what rounding up costs.

    All errors of the transforms are added to delta, so where delta is as small as these are, at 1e-9, less of it is left. The other
    kinds have a looser pair there.
    """
    history, delta, epsilon = golden_epsilons.read(row)
    poisson = all(event.sampling in ("poisson", "shuffled") for event, _ in history)
    interval = min(max(2e-4 * epsilon["vpld"], 1e-5), 5e-3)
    accountant = PLDAccountant(ZERO_OUT, interval)
    for event, steps in history:
        accountant.compose(dp_event(event), steps)
    theirs = accountant.get_epsilon(delta)
    rounding = 1.001 if delta >= 1e-6 else 1.2
    assert epsilon["vpld"] <= (rounding if poisson else 1.01) * theirs
    if poisson:
        assert epsilon["vpld"] >= 0.99 * theirs


@pytest.mark.parametrize("rate", [0.01, 0.5])
def test_renyi_agrees_with_dp_accounting_at_whole_orders(rate):
    """At whole orders both are exact. Its bound at others is loose, so the golden one, over more orders, is at or below."""
    for row in ROWS:
        history, delta, epsilon = golden_epsilons.read(row)
        if len(history) == 1 and history[0][0].sampling == "poisson" and history[0][0].sample_rate == rate:
            (event, steps), accountant = history[0], RdpAccountant(WHOLE_ORDERS)
            if "vrdp" in epsilon and 0 < event.noise_multiplier < math.inf:
                accountant.compose(dp_event(event), steps)
                theirs, ours = accountant.get_epsilon(delta), VariableRateRDPAccountant()
                ours.step_event(event, steps)
                assert ours.get_epsilon(delta, alphas=WHOLE_ORDERS) == pytest.approx(theirs, rel=1e-6)
                assert epsilon["vrdp"] <= theirs * (1 + 1e-9)
