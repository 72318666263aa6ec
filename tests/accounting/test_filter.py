"""The Renyi filter: what fits a budget at one preset order."""

import math

import numpy as np
import pytest

from opacus_ac.accounting import (
    DEFAULT_ORDERS,
    Event,
    RenyiFilter,
    VariableRateRDPAccountant,
    best_order,
    epsilon_from_rdp,
    rdp_event,
    roomiest_order,
)

DELTA = 1e-5
PLAN = {Event(1.0, 0.01): 1000}
EVENTS = [
    Event(1.0, 0.01),
    Event(2.0, 1.0, "shuffled"),
    Event(2.0, 0.01, "fixed_size"),
    Event(1.0, 0.0075, "truncated_poisson", 10_000, 90),
]


def test_the_order_of_a_plan_is_that_of_its_epsilon():
    accountant = VariableRateRDPAccountant()
    accountant.step_event(Event(1.0, 0.01), 1000)
    epsilon, order = accountant.get_privacy_spent(delta=DELTA)
    assert best_order(PLAN, DELTA) == order
    limit = RenyiFilter(order, epsilon, DELTA)
    assert limit.budget == pytest.approx(accountant.spent_rdp(order), rel=1e-12)
    assert limit.remaining(0.0, Event(1.0, 0.01)) == 1000
    assert limit.remaining(accountant.spent_rdp(order), Event(1.0, 0.01)) == 0


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("order", [3.0, 7.77, 20.0])
def test_it_accepts_up_to_the_budget_and_not_one_more(event, order):
    limit, accountant, taken = RenyiFilter(order, 8.0, DELTA), VariableRateRDPAccountant(), 0
    expected = limit.remaining(0.0, event)
    while limit.fits(accountant.spent_rdp(order), event) and taken < 40:
        accountant.step_event(event)
        taken += 1
    assert taken == min(expected, 40)
    assert limit.fits(0.0, event, expected)
    assert not limit.fits(0.0, event, expected + 1)
    row = rdp_event(event, [order])
    assert epsilon_from_rdp(expected * row, [order], DELTA)[0] <= 8.0 * (1 + 1e-9)
    assert epsilon_from_rdp((expected + 1) * row, [order], DELTA)[0] > 8.0


def test_it_is_stricter_than_the_smallest_epsilon_over_orders():
    """That minimum, taken after the events were chosen, would go on accepting; it is no filter."""
    event, accountant = Event(0.8, 0.01), VariableRateRDPAccountant()
    limit = RenyiFilter(20.0, 3.0, DELTA)
    accountant.step_event(event, limit.remaining(0.0, event) + 1)
    assert not limit.fits(accountant.spent_rdp(20.0), event, 0)
    assert accountant.get_epsilon(DELTA) < 3.0


def test_spent_rdp_at_any_order():
    accountant = VariableRateRDPAccountant()
    for event in EVENTS:
        accountant.step_event(event, 3)
    for order in (2.0, 2.345, 63.0):
        expected = sum(3 * rdp_event(event, [order])[0] for event in EVENTS)
        assert accountant.spent_rdp(order) == pytest.approx(expected, rel=1e-9)
    assert VariableRateRDPAccountant().spent_rdp(5.0) == 0.0
    with pytest.raises(ValueError, match="orders"):
        accountant.spent_rdp(1.0)


@pytest.mark.parametrize(
    ("event", "expected"), [(Event(1.0, 0.0), math.inf), (Event(math.inf, 0.5), math.inf), (Event(0.0, 0.5), 0)]
)
def test_edges(event, expected):
    limit = RenyiFilter(8.0, 4.0, DELTA)
    assert limit.remaining(0.0, event) == expected
    assert limit.fits(0.0, event, 0)
    assert not limit.fits(2 * limit.budget, event, 0)
    assert limit.remaining(2 * limit.budget, event) == 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((1.0, 4.0, DELTA), "orders"),
        ((8.0, 0.0, DELTA), "epsilon"),
        ((8.0, math.inf, DELTA), "epsilon"),
        ((8.0, 4.0, 0.0), "delta"),
        ((8.0, 4.0, 1.0), "delta"),
        ((2.0, 1.0, DELTA), "larger order"),
    ],
)
def test_bad_filters_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        RenyiFilter(*arguments)


def test_bad_questions_are_refused():
    limit = RenyiFilter(8.0, 4.0, DELTA)
    for spent in (-1.0, math.nan):
        with pytest.raises(ValueError, match="spent"):
            limit.fits(spent, Event(1.0, 0.01))
    with pytest.raises(ValueError, match="steps"):
        limit.fits(0.0, Event(1.0, 0.01), -1)
    with pytest.raises(ValueError, match="costs nothing"):
        best_order({Event(1.0, 0.0): 5}, DELTA)
    assert best_order(PLAN, DELTA) in np.asarray(DEFAULT_ORDERS)


@pytest.mark.parametrize("before", [{}, {Event(0.7, 0.02): 20}, {Event(2.0, 0.3): 5}])
def test_roomiest_order_fits_the_most_further_steps(before):
    """Against trying every order, with and without an earlier run in the account."""
    accountant = VariableRateRDPAccountant()
    for event, steps in before.items():
        accountant.step_event(event, steps)
    event = Event(1.0, 0.01)
    spent = [accountant.spent_rdp(order) for order in DEFAULT_ORDERS]
    chosen = roomiest_order({event: 100}, 4.0, DELTA, spent)

    def fitting(order):
        try:
            return RenyiFilter(float(order), 4.0, DELTA).remaining(accountant.spent_rdp(order), event)
        except ValueError:  # this order's conversion spends everything
            return -1

    assert fitting(chosen) == max(fitting(order) for order in DEFAULT_ORDERS) > 0


def test_roomiest_order_refuses_a_budget_that_holds_nothing():
    with pytest.raises(ValueError, match="costs nothing"):
        roomiest_order({Event(1.0, 0.0): 5}, 4.0, DELTA)
    with pytest.raises(ValueError, match="conversion"):
        roomiest_order({Event(1.0, 0.1): 5}, 1e-4, DELTA)
