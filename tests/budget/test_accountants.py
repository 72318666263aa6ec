"""One face for all accountants: what each can account for, and that what it foresees is what it then says."""

import math

import pytest
from opacus.accountants import create_accountant

from opacus_ac.accounting import Event, VariableRateRDPAccountant, attack_bounds, register
from opacus_ac.accounting.opacus_accountants import checked
from opacus_ac.budget.accountants import adapt

DELTA = 1e-5
POISSON = {"poisson", "shuffled"}
ALL = {"poisson", "shuffled", "fixed_size", "truncated_poisson"}

#: By name: noise, kinds of sampling with a bound, whether it is a filter, whether its figure is a bound.
ACCOUNTANTS = {
    "vrdp": ("gaussian", ALL, True, True),
    "vpld": ("gaussian", ALL, False, True),
    "rdp": ("gaussian", POISSON, False, True),
    "prv": ("gaussian", POISSON, False, True),
    "gdp": ("gaussian", POISSON, False, False),
    "pure": ("laplace", POISSON, False, True),
}
EVENTS = {
    "poisson": {},
    "shuffled": {"sample_rate": 1.0, "sampling": "shuffled"},
    "fixed_size": {"sampling": "fixed_size"},
    "truncated_poisson": {"sampling": "truncated_poisson", "dataset_size": 100, "max_batch_size": 20},
}

pytestmark = pytest.mark.filterwarnings("ignore:GDP accounting is experimental")


def made(name):
    register()
    return adapt(checked(create_accountant(name)))


def event(name, sampling="poisson"):
    return Event(**{"noise_multiplier": 2.0, "sample_rate": 0.1, "mechanism": ACCOUNTANTS[name][0], **EVENTS[sampling]})


@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_what_an_accountant_is(name):
    accountant = made(name)
    noise, samplings, is_filter, is_bound = ACCOUNTANTS[name]
    assert accountant.name == name
    assert (accountant.noise, set(accountant.samplings), accountant.is_filter) == (noise, samplings, is_filter)
    assert (accountant.approximation is None) == is_bound
    assert (accountant.notes(DELTA) == []) == is_bound


def test_a_subclass_whose_rule_nobody_knows_is_no_filter():
    class Another(VariableRateRDPAccountant):
        def get_epsilon(self, delta, *args, **kwargs):
            return 0.0

    assert not adapt(Another()).is_filter


@pytest.mark.parametrize("sampling", EVENTS)
@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_a_charge_is_as_foreseen_or_refused(name, sampling):
    accountant = made(name)
    if sampling not in accountant.samplings:
        with pytest.raises(ValueError, match=r"has no bound|is no Laplace release"):
            accountant.charge(Event(2.0, 0.1, **EVENTS[sampling]))
        assert accountant.steps == 0
        return
    accountant.charge(event(name))
    before = accountant.counts()
    foreseen = accountant.epsilon_after(event(name, sampling), DELTA, 2)
    assert accountant.counts() == before
    for _ in range(2):
        accountant.charge(event(name, sampling))
    assert accountant.epsilon(DELTA) == pytest.approx(foreseen, rel=1e-9)
    assert accountant.steps == sum(accountant.counts().values()) == 3
    assert (foreseen < math.inf) == (accountant.approximation is None)


@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_accountants_of_one_kind_add_up(name):
    accountant, other = made(name), made(name)
    accountant.charge(event(name))
    for _ in range(3):
        other.charge(event(name))
    saved = accountant.restored(other.state_dict())
    assert accountant.steps == 1
    accountant.join(saved)
    assert accountant.counts() == {event(name): 4}


@pytest.mark.parametrize("name", [name for name, row in ACCOUNTANTS.items() if row[0] == "gaussian"])
def test_the_renyi_divergence_is_that_of_the_events(name):
    accountant, vrdp = made(name), made("vrdp")
    for sampling in ACCOUNTANTS[name][1]:
        accountant.charge(event(name, sampling))
        vrdp.charge(event("vrdp", sampling))
    assert accountant.spent_rdp(8.0) == pytest.approx(vrdp.spent_rdp(8.0), rel=1e-12)
    assert vrdp.spent_rdp(8.0) > 0
    assert accountant.renyi_epsilon(DELTA) == pytest.approx(vrdp.epsilon(DELTA), rel=1e-12)


def test_laplace_noise_has_no_renyi_bound_here():
    accountant = made("pure")
    accountant.charge(event("pure"))
    assert accountant.renyi_epsilon(DELTA) == 0.0
    with pytest.raises(ValueError, match="is no Gaussian release"):
        accountant.spent_rdp(8.0)


@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_no_noise_costs_infinity(name):
    accountant = made(name)
    accountant.charge(Event(0.0, 0.1, mechanism=accountant.noise))
    assert accountant.epsilon(DELTA) == math.inf
    with pytest.raises(ValueError, match="delta=-1"):
        accountant.epsilon(-1)


@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_attack_rates_follow_from_what_an_accountant_knows(name):
    """Gaussian releases have privacy losses, whoever counts them; an epsilon of a limit theorem bounds nobody."""
    accountant = made(name)
    for _ in range(5):
        accountant.charge(event(name))
    found = accountant.attacks()
    if name == "gdp":
        assert (found.advantage, set(found.true_positive_rates.values())) == (1.0, {1.0})
        return
    assert 0 < found.advantage < 1
    assert all(rate < caught < 1 for rate, caught in found.true_positive_rates.items())
    if name == "pure":
        epsilon = accountant.epsilon(0.0)
        assert found.true_positive_rates[0.01] == pytest.approx(0.01 * math.exp(epsilon), rel=0.01)
    else:
        assert found == attack_bounds({event(name): 5})
