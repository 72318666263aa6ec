"""Calibration, shuffled passes, the event type, and what importing the accounting room does."""

import math
import subprocess
import sys

import numpy as np
import pytest
from accounting_benchmark import distinct_rates, time_distinct_rates, time_loading, time_step_and_epsilon

from opacus_ac import accounting
from opacus_ac.accounting import (
    ADJACENCY,
    Event,
    ShuffledEpochs,
    VariableRateRDPAccountant,
    calibrate_noise_multiplier,
    plan_epsilon,
)

DELTA = 1e-5
SCHEDULE = np.linspace(0.002, 0.02, 300).tolist()


@pytest.mark.parametrize(
    ("target", "rate", "steps"),
    [(8.0, 0.01, 1000), (0.1, 0.001, 5000), (50.0, 0.1, 100), (2000.0, 0.5, 20), (4.0, 1.0, 3), (6.0, SCHEDULE, None)],
)
def test_calibration_is_tight_and_never_above(target, rate, steps):
    sigma = calibrate_noise_multiplier(target_epsilon=target, target_delta=DELTA, sample_rate=rate, steps=steps)
    accountant = VariableRateRDPAccountant()

    def reported(noise):
        accountant.history = [(noise, r, 1) for r in rate] if steps is None else [(noise, rate, steps)]
        return accountant.get_epsilon(DELTA)

    assert reported(sigma) <= target < reported(sigma * (1 - 1e-3))
    assert plan_epsilon(sigma, rate, steps, DELTA) == pytest.approx(reported(sigma), rel=1e-12)


def test_a_constant_schedule_is_a_constant_rate():
    budget = {"target_epsilon": 3.0, "target_delta": DELTA}
    as_schedule = calibrate_noise_multiplier(**budget, sample_rate=[0.01] * 200, steps=200)
    assert as_schedule == calibrate_noise_multiplier(**budget, sample_rate=0.01, steps=200)


@pytest.mark.parametrize(("target", "rate", "steps"), [(1e9, 1.0, 1), (1.0, 0.0, 100), (1.0, 0.5, 0), (1.0, [], None)])
def test_budgets_that_need_no_noise_give_the_least(target, rate, steps):
    sigma = calibrate_noise_multiplier(target_epsilon=target, target_delta=DELTA, sample_rate=rate, steps=steps)
    assert sigma == pytest.approx(1e-3, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"target_epsilon": 0.0}, "target_epsilon"),
        ({"target_epsilon": -1.0}, "target_epsilon"),
        ({"target_epsilon": math.nan}, "target_epsilon"),
        ({"target_epsilon": 1e-9, "sample_rate": 1.0}, "too low"),
        ({"target_delta": 0.0}, "target_delta"),
        ({"target_delta": 1.0}, "target_delta"),
        ({"target_delta": -1.0}, "delta"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"sample_rate": [0.1, math.nan], "steps": None}, "sample_rate"),
        ({"sample_rate": [0.1, 0.2], "steps": 3}, "2 entries"),
        ({"sample_rate": None}, "sample_rate"),
        ({"steps": -1}, "steps"),
        ({"steps": None}, "steps is missing"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_bad_plans_are_refused(change, match):
    plan = {"target_epsilon": 1.0, "target_delta": DELTA, "sample_rate": 0.01, "steps": 100}
    with pytest.raises(ValueError, match=match):
        calibrate_noise_multiplier(**{**plan, **change})


def test_events_are_values():
    assert Event(1, np.float32(0.25)) == Event(1.0, 0.25, "poisson")
    assert type(Event(1, 0).sample_rate) is float
    assert set(ADJACENCY) == {"poisson", "shuffled", "fixed_size", "truncated_poisson"}
    with pytest.raises(ValueError, match="sampling"):
        Event(1.0, 0.1, "fixed")
    with pytest.raises(ValueError, match="not amplified"):
        Event(1.0, 0.1, "shuffled")


@pytest.mark.parametrize(
    ("steps", "charged"),
    [
        # each step: (pass, step in pass, steps per pass, noise multiplier)
        ([(0, 0, 3, 1.0), (0, 1, 3, 1.0), (0, 2, 3, 1.0)], [1.0, None, None]),
        ([(0, 0, 1, 1.0), (1, 0, 1, 1.0), (2, 0, 1, 2.0)], [1.0, 1.0, 2.0]),
        ([(0, 0, 2, 1.0), (0, 1, 2, 1.0), (0, 2, 2, 1.0), (0, 3, 2, 1.0), (0, 4, 2, 1.0)], [1.0, None, 1.0, None, 1.0]),
        ([(0, 0, 4, 1.0), (0, 1, 4, 0.5), (0, 2, 4, 0.7), (0, 3, 4, 0.4)], [1.0, 0.5, None, 0.4]),
        ([(0, 0, 4, 1.0), (0, 1, 4, 2.0), (0, 2, 4, 1.0)], [1.0, None, None]),
        ([(0, 2, 4, 1.0), (0, 3, 4, 1.0)], [1.0, None]),  # a pass entered in the middle is still a pass
        ([(0, 0, 4, 1.0), (0, 0, 4, 1.0)], [1.0, 1.0]),  # the loader began again
        ([(0, 0, 4, 1.0), (0, 1, 4, 1.0), (0, 1, 4, 1.0), (0, 2, 4, 1.0)], [1.0, None, 1.0, None]),
        ([(1, 0, 4, 1.0), (0, 1, 4, 1.0), (1, 2, 4, 1.0)], [1.0, 1.0, 1.0]),
    ],
)
def test_shuffled_charges(steps, charged):
    epochs = ShuffledEpochs()
    expected = [None if noise is None else Event(noise, 1.0, "shuffled") for noise in charged]
    assert [epochs.charge(*step) for step in steps] == expected


@pytest.mark.parametrize(("same_order", "charged"), [(True, False), (False, True)])
def test_resuming_a_shuffled_pass(same_order, charged):
    epochs, resumed = ShuffledEpochs(), ShuffledEpochs()
    epochs.charge(3, 0, 10, 1.0)
    epochs.charge(3, 1, 10, 1.0)
    resumed.load_state_dict(epochs.state_dict(), same_order=same_order)
    assert (resumed.charge(3, 2, 10, 1.0) is not None) == charged
    assert resumed.charge(3, 3, 10, 1.0) is None
    assert resumed.charge(4, 0, 10, 1.0) is not None
    fresh = ShuffledEpochs()
    fresh.load_state_dict(ShuffledEpochs().state_dict(), same_order=True)
    assert fresh.charge(0, 0, 10, 1.0) is not None


@pytest.mark.parametrize(
    "arguments", [(-1, 0, 1, 1.0), (0, -1, 1, 1.0), (0, 0, 0, 1.0), (0, 0, 1, -1.0), (0.5, 0, 1, 1.0), (0, 0, 1, None)]
)
def test_bad_charges_are_refused_and_change_nothing(arguments):
    epochs = ShuffledEpochs()
    epochs.charge(0, 0, 2, 1.0)
    before = epochs.state_dict()
    with pytest.raises(ValueError, match=r"pass|step|noise_multiplier"):
        epochs.charge(*arguments)
    assert epochs.state_dict() == before
    with pytest.raises(ValueError, match="state_dict"):
        epochs.load_state_dict({"open": [1]})
    assert epochs.state_dict() == before


def test_shuffled_passes_cost_what_full_batches_cost():
    epochs, accountant = ShuffledEpochs(), VariableRateRDPAccountant()
    for index in range(3):
        for step in range(50):
            if event := epochs.charge(index, step, 50, 2.0):
                accountant.step_event(event)
    assert accountant.history == [(2.0, 1.0, 3)]
    assert accountant.get_epsilon(DELTA) == plan_epsilon(2.0, 1.0, 3, DELTA)


def test_importing_the_room_is_light_and_registers_nothing():
    code = (
        "import sys, opacus_ac.accounting as a; a.plan_epsilon(1.0, 0.1, 10, 1e-5); "
        "assert not {'torch', 'opacus', 'scipy'} & set(sys.modules); a.VariableRateRDPAccountant; "
        "from opacus.accountants import registry; assert 'vrdp' not in registry._ACCOUNTANTS"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(accounting.__all__) <= set(dir(accounting))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = accounting.nonsense


def test_speed_is_of_the_right_order():
    """Bounds some ten times what one core needs; Opacus takes hours. Run accounting_benchmark.py for the figures."""
    rates = distinct_rates(100_000)
    assert time_distinct_rates(rates) < 5.0
    assert time_loading(rates) < 5.0
    assert time_step_and_epsilon(rates[:2000]) < 5e-3
