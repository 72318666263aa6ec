"""The accountant "vrdp": epsilon, history, state, hook; and that Opacus can use it."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant, create_accountant
from opacus.accountants.utils import get_noise_multiplier

from opacus_ac.accounting import Event, VariableRateRDPAccountant, calibrate_noise_multiplier, register

DELTA = 1e-5


def accountant_of(*runs):
    accountant = VariableRateRDPAccountant()
    accountant.history = list(runs)
    return accountant


def test_agrees_with_opacus_on_the_same_alphas():
    runs = [(1.0, 0.01, 500), (1.0, 0.02, 10), (0.8, 0.01, 100), (2.0, 1.0, 1)]
    opacus = RDPAccountant()
    opacus.history = list(runs)
    ours, alphas = accountant_of(*runs), RDPAccountant.DEFAULT_ALPHAS
    expected = opacus.get_privacy_spent(delta=DELTA, alphas=alphas)
    assert ours.get_privacy_spent(delta=DELTA, alphas=alphas) == pytest.approx(expected, rel=1e-9)
    assert ours.get_epsilon(DELTA) <= expected[0] * (1 + 1e-9)  # more orders can only help
    assert ours.get_epsilon(DELTA, alphas=ours.DEFAULT_ALPHAS) == pytest.approx(ours.get_epsilon(DELTA), rel=1e-12)


def test_no_floor_where_opacus_runs_out_of_orders():
    assert accountant_of((20.0, 0.01, 1000)).get_epsilon(DELTA) == pytest.approx(0.0517, abs=1e-4)
    assert accountant_of((50.0, 0.01, 1000)).get_epsilon(DELTA) == pytest.approx(0.0186, abs=1e-4)


@pytest.mark.parametrize(
    ("run", "delta", "expected"),
    [
        ((1.0, 0.0, 1000), DELTA, 0.0),
        ((5.0, 1e-4, 1), 0.1, 0.0),
        ((math.inf, 0.5, 10), DELTA, 0.0),
        ((0.0, 0.5, 1), DELTA, math.inf),
        ((0.0, 0.0, 1), DELTA, 0.0),
        ((0.0, 0.5, 0), DELTA, 0.0),
        ((1.0, 0.01, 10), 0.0, math.inf),
        ((1.0, 0.01, 10), 1.0, 0.0),
    ],
)
def test_edges(run, delta, expected):
    assert accountant_of(run).get_epsilon(delta) == expected


def test_one_full_batch_is_the_gaussian_mechanism():
    alphas = np.arange(2, 64)
    expected = min(a / 8 + math.log1p(-1 / a) - (math.log(DELTA) + math.log(a)) / (a - 1) for a in alphas)
    assert accountant_of((2.0, 1.0, 1)).get_epsilon(DELTA, alphas=alphas) == pytest.approx(expected, rel=1e-12)


def test_empty_history():
    accountant = VariableRateRDPAccountant()
    epsilon = accountant.get_epsilon(DELTA, some_engine_option=1)
    assert (type(epsilon), epsilon, len(accountant), accountant.history) == (float, 0.0, 0, [])
    assert accountant.get_privacy_spent(delta=DELTA) == (0.0, 0.0)
    with pytest.raises(ValueError, match="delta"):
        accountant.get_epsilon(-1.0)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.floats(0.5, 20.0), st.floats(-5, 0).map(lambda x: min(1.0, 10**x)), st.integers(1, 5000), st.floats(1.001, 3.0)
)
def test_epsilon_is_monotone(noise, rate, steps, factor):
    base = accountant_of((noise, rate, steps)).get_epsilon(DELTA) * (1 - 1e-10)
    assert base >= 0.0
    assert accountant_of((noise, min(1.0, rate * factor), steps)).get_epsilon(DELTA) >= base
    assert accountant_of((noise / factor, rate, steps)).get_epsilon(DELTA) >= base
    assert accountant_of((noise, rate, math.ceil(steps * factor))).get_epsilon(DELTA) >= base


def test_stepping_equals_assigning_and_joins_equal_steps():
    stepped = VariableRateRDPAccountant()
    for rate in [0.01] * 3 + [0.02, 0.01, 0.02] + [0.02] * 2:
        stepped.step(noise_multiplier=1.0, sample_rate=rate)
    assert stepped.history == [(1.0, 0.01, 3), (1.0, 0.02, 1), (1.0, 0.01, 1), (1.0, 0.02, 3)]
    assert len(stepped) == 4
    joined = accountant_of((1.0, 0.01, 1), (1.0, 0.01, 2), (1.0, 0.02, 0), (1.0, 0.02, 1), *stepped.history[2:])
    assert joined.history == stepped.history
    assert joined.get_epsilon(DELTA) == pytest.approx(stepped.get_epsilon(DELTA), rel=1e-12)
    joined.history = []
    assert joined.get_epsilon(DELTA) == 0.0


@pytest.mark.parametrize("vary_noise", [False, True])
def test_many_distinct_rates_never_under_report_and_keep_true_values(vary_noise):
    rng = np.random.default_rng(3)
    rates = np.exp(rng.uniform(math.log(0.0032), math.log(0.0256), 600)).tolist()
    noises = np.exp(rng.uniform(math.log(0.9), math.log(1.1), 600)).tolist() if vary_noise else [1.0] * 600
    accountant = VariableRateRDPAccountant()
    for noise, rate in zip(noises, rates, strict=True):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    exact = accountant.get_epsilon(DELTA, alphas=accountant.DEFAULT_ALPHAS)  # recomputed from the true values
    assert exact < accountant.get_epsilon(DELTA) <= 1.012 * exact
    assert [(n, q) for n, q, _ in accountant.history] == list(zip(noises, rates, strict=True))
    reloaded = VariableRateRDPAccountant()
    reloaded.load_state_dict(accountant.state_dict())
    assert reloaded.get_epsilon(DELTA) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-12)


@pytest.mark.parametrize("before", [0, 300])
def test_epsilon_after_equals_stepping_and_changes_nothing(before):
    accountant = accountant_of(*[(1.0, 0.01 + 1e-5 * i, 1) for i in range(before)])
    event = Event(0.9, 0.0123)
    now = accountant.get_epsilon(DELTA)
    foreseen = accountant.epsilon_after(event, DELTA, steps=5)
    assert accountant.get_epsilon(DELTA) == now == accountant.epsilon_after(event, DELTA, steps=0)
    assert sum(steps for _, _, steps in accountant.history) == before
    for _ in range(5):
        accountant.step_event(event)
    assert foreseen == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-12)
    assert foreseen > now


def test_exact_places_are_neither_spent_by_questions_nor_kept_after_an_assignment():
    fresh = accountant_of((1.0, 0.0123, 7)).get_epsilon(DELTA)
    asked = VariableRateRDPAccountant()
    for i in range(300):
        asked.epsilon_after(Event(5.0, 0.01 + 1e-5 * i), DELTA)
    for _ in range(7):
        asked.step(noise_multiplier=1.0, sample_rate=0.0123)
    assert asked.get_epsilon(DELTA) == pytest.approx(fresh, rel=1e-12)
    assigned = accountant_of(*[(5.0, 0.01 + 1e-5 * i, 1) for i in range(300)])
    assigned.history = [(1.0, 0.0123, 7)]
    assert assigned.get_epsilon(DELTA) == fresh


def test_history_cannot_be_changed_in_place():
    accountant = accountant_of((1.0, 0.01, 3))
    for change in (
        lambda h: h.append((1.0, 0.01, 1)),
        lambda h: h.pop(),
        lambda h: h.clear(),
        lambda h: h.__setitem__(0, (9.0, 0.0, 1)),
        lambda h: h.__iadd__([(1.0, 0.01, 1)]),
    ):
        with pytest.raises(TypeError, match="not be accounted"):
            change(accountant.history)
    assert accountant.history == [(1.0, 0.01, 3)]
    given_list = [(1.0, 0.02, 1)]
    accountant.history = given_list
    given_list.append((1.0, 0.5, 1))
    assert accountant.history == [(1.0, 0.02, 1)]


def test_state_round_trips_through_torch_and_json(tmp_path):
    accountant = accountant_of((np.float64(1.0), np.float32(0.25), np.int64(3)), (math.inf, 0.01, 2))
    state = accountant.state_dict()
    assert type(state["history"]) is list
    assert [tuple(map(type, run)) for run in state["history"]] == [(float, float, int)] * 2
    torch.save(state, tmp_path / "state.pt")
    for loaded in (torch.load(tmp_path / "state.pt", weights_only=True), json.loads(json.dumps(state))):
        other = VariableRateRDPAccountant()
        other.load_state_dict(loaded)
        assert other.history == accountant.history
        assert other.get_epsilon(DELTA) == accountant.get_epsilon(DELTA)
        loaded["history"].clear()  # no aliasing: neither with what was loaded ...
        assert len(other) == 2
    state["history"].clear()  # ... nor with what was saved
    assert len(accountant) == 2


def test_copies_are_independent():
    accountant = accountant_of((1.0, 0.01, 3))
    twin = copy.deepcopy(accountant)
    twin.step(noise_multiplier=1.0, sample_rate=0.5)
    assert accountant.history == [(1.0, 0.01, 3)]
    assert twin.get_epsilon(DELTA) > accountant.get_epsilon(DELTA)


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (None, "empty"),
        ({}, "empty"),
        ({"mechanism": "vrdp"}, "history"),
        ({"history": []}, "mechanism"),
        ({"history": [], "mechanism": "prv"}, "prv"),
        ({"history": [(1.0, 0.01, 1)], "mechanism": "rdp"}, r"accountant\.history ="),
        ({"history": [(1.0, 2.0, 1)], "mechanism": "vrdp"}, "sample_rate"),
        ({"history": [(1.0, 0.5)], "mechanism": "vrdp"}, r"history\[0\]"),
        ({"history": [7], "mechanism": "vrdp"}, r"history\[0\]"),
    ],
)
def test_bad_states_are_refused_and_change_nothing(state, match):
    accountant = accountant_of((1.0, 0.01, 3))
    before = accountant.get_epsilon(DELTA)
    with pytest.raises(ValueError, match=match):
        accountant.load_state_dict(state)
    assert (accountant.history, accountant.get_epsilon(DELTA)) == ([(1.0, 0.01, 3)], before)


@pytest.mark.parametrize("rate", [-0.1, 1.0001, math.nan, math.inf, "0.1", None, True, 1j])
def test_bad_sample_rates_are_refused_and_change_nothing(rate):
    check_refused({"noise_multiplier": 1.0, "sample_rate": rate}, "sample_rate")


@pytest.mark.parametrize("noise", [-1.0, math.nan, -math.inf, "1", None, True, torch.tensor(1.0)])
def test_bad_noise_multipliers_are_refused_and_change_nothing(noise):
    check_refused({"noise_multiplier": noise, "sample_rate": 0.1}, "noise_multiplier")


def check_refused(values, match):
    accountant = accountant_of((1.0, 0.01, 3))
    before = accountant.get_epsilon(DELTA)
    with pytest.raises(ValueError, match=match):
        accountant.step(**values)
    with pytest.raises(ValueError, match=match):
        Event(**values)
    with pytest.raises(ValueError, match=match):
        accountant.history = [(1.0, 0.5, 1), (*values.values(), 1)]
    assert (accountant.history, accountant.get_epsilon(DELTA)) == ([(1.0, 0.01, 3)], before)


@pytest.mark.parametrize("steps", [-1, 1.5, math.nan, math.inf, "3", None, True])
def test_bad_step_counts_are_refused(steps):
    accountant = VariableRateRDPAccountant()
    with pytest.raises(ValueError, match="steps"):
        accountant.history = [(1.0, 0.01, steps)]
    with pytest.raises(ValueError, match="steps"):
        accountant.epsilon_after(Event(1.0, 0.01), DELTA, steps=steps)


def test_only_events_are_events():
    accountant = VariableRateRDPAccountant()
    with pytest.raises(ValueError, match="Event"):
        accountant.step_event((1.0, 0.01))
    with pytest.raises(ValueError, match="Event"):
        accountant.epsilon_after((1.0, 0.01), DELTA)


def test_hook_accounts_the_optimizer_or_its_event():
    accountant = VariableRateRDPAccountant()
    hook = accountant.get_optimizer_hook_fn(sample_rate=0.01)
    hook(SimpleNamespace(noise_multiplier=1.5, accumulated_iterations=1))
    hook(SimpleNamespace(noise_multiplier=1.5, accumulated_iterations=1, current_event=None))
    hook(SimpleNamespace(noise_multiplier=1.5, accumulated_iterations=1, current_event=Event(1.2, 0.03)))
    hook(SimpleNamespace(current_event=Event(2.0, 1.0, "shuffled")))
    assert accountant.history == [(1.5, 0.01, 2), (1.2, 0.03, 1), (2.0, 1.0, 1)]


def test_hook_refuses_accumulated_batches():
    accountant = VariableRateRDPAccountant()
    hook = accountant.get_optimizer_hook_fn(sample_rate=0.01)
    with pytest.raises(ValueError, match="max_physical_batch_size"):
        hook(SimpleNamespace(noise_multiplier=1.0, accumulated_iterations=4))
    assert len(accountant) == 0
    with pytest.raises(ValueError, match="sample_rate"):
        accountant.get_optimizer_hook_fn(sample_rate=1.5)


@pytest.fixture
def registered(monkeypatch):
    from opacus.accountants import registry

    monkeypatch.setattr(registry, "_ACCOUNTANTS", dict(registry._ACCOUNTANTS))
    registry._ACCOUNTANTS.pop("vrdp", None)
    register()
    return registry


def test_registration_is_explicit_and_idempotent(registered):
    register()
    assert type(create_accountant("vrdp")) is VariableRateRDPAccountant
    registered._ACCOUNTANTS["vrdp"] = RDPAccountant
    with pytest.raises(ValueError, match="already registered"):
        register()


@pytest.mark.parametrize(("target", "rate", "steps"), [(3.0, 0.01, 1000), (0.5, 0.004, 300), (20.0, 1.0, 10)])
def test_opacus_calibration_works_with_it(registered, target, rate, steps):
    sigma = get_noise_multiplier(
        target_epsilon=target, target_delta=DELTA, sample_rate=rate, steps=steps, accountant="vrdp"
    )
    assert target - 0.01 <= accountant_of((sigma, rate, steps)).get_epsilon(DELTA) <= target
    ours = calibrate_noise_multiplier(target_epsilon=target, target_delta=DELTA, sample_rate=rate, steps=steps)
    assert ours <= sigma * 1.0001
