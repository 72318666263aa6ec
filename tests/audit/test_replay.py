"""Replay audits: charges held against releases, the worst record, models that couple records; bugs planted, and none planted."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from opacus_ac import PrivacyEngine
from opacus_ac.accounting import VariableRateRDPAccountant
from opacus_ac.audit import AUDITS, Plan, coupling_audit, one_run_audit, poison_audit, run_audits, usage_audit
from opacus_ac.audit.cases import MODELS, POISONS
from opacus_ac.audit.scripts import SCRIPTS
from opacus_ac.audit.table import chosen_audits
from opacus_ac.audit.usage import covered, epsilon_at_least
from opacus_ac.budget import PrivacyLedger
from opacus_ac.budget.account import Account
from opacus_ac.cli.audit import NAMES
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.grad_sample.opacus_hooks import PerSampleSource
from opacus_ac.sampling import PoissonBatchSampler
from opacus_ac.zeroth_order.source import DifferenceSource

MODES = {
    "bk": {},
    "hooks, flat": {"grad_sample_mode": "hooks", "clipping": "flat"},
    "functorch, geometric, a loss": {"grad_sample_mode": "functorch", "clip_policy": "geometric", "loss_bound": 5.0},
    "automatic": {"clipping": "automatic", "normalize": False, "loss_reduction": "sum"},
    "split": {"max_physical_batch_size": 3},
    "fused": {"fused_step": True},
    "zo": {"zeroth_order": "aggzo"},
    "zo, fixed": {"zeroth_order": "aggzo", "clip_policy": "fixed"},
}
SOURCES = {"bk": BookKeepingSource, "hooks, flat": PerSampleSource, "zo": DifferenceSource}
FIRST = SCRIPTS[:3]
"""Whole passes, passes broken off, batches left out."""


@pytest.mark.parametrize("audit", [usage_audit, poison_audit, coupling_audit])
@pytest.mark.parametrize("mode", MODES)
def test_correct_code_is_not_flagged(audit, mode):
    """Nothing is left to chance: the secret streams of an unseeded run are audited as well."""
    result = audit(seed=3, **MODES[mode])
    assert not result.refuted, str(result)
    assert result.observations > 0


# ---- charges -------------------------------------------------------------------------------------------------------


def only_some(charge, keep):
    """Let ``charge`` happen at those of its calls, counted from 0, that ``keep`` names."""
    calls = Counter()

    def some(self, event, *args, **kwargs):
        calls[id(self)] += 1
        return charge(self, event, *args, **kwargs) if keep(calls[id(self)] - 1) else None

    return some


def every_fourth(call):
    return call % 4 == 0


CHARGES = {
    "three of four lost": (Account, "charge", lambda charge: only_some(charge, every_fourth)),
    "all but the first lost": (Account, "charge", lambda charge: only_some(charge, lambda call: call == 0)),
    "every second one missing on disk": (PrivacyLedger, "charge", lambda c: only_some(c, lambda call: call % 2)),
    "three of four missing in memory": (VariableRateRDPAccountant, "step_event", lambda c: only_some(c, every_fourth)),
    "half of the rate": (Account, "charge", lambda c: lambda s, e: c(s, replace(e, sample_rate=e.sample_rate / 2))),
    "twice the noise": (
        Account, "charge", lambda c: lambda s, e: c(s, replace(e, noise_multiplier=2 * e.noise_multiplier)),
    ),
    "a report that says less": (PrivacyEngine, "get_epsilon", lambda get: lambda s, delta: get(s, delta) / 2),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["bk", "hooks, flat", "zo", "split"])
@pytest.mark.parametrize("bug", CHARGES)
def test_charges_that_are_wrong(monkeypatch, bug, mode):
    owner, name, change = CHARGES[bug]
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    result = usage_audit(seed=1, scripts=FIRST[:1], **MODES[mode])
    assert result.finding("whole passes").refuted, str(result)


def test_a_batch_that_is_charged_as_fresh_each_time(monkeypatch):
    """Twelve releases and twelve charges, none of them at rate 1."""
    charge = Account.charge
    monkeypatch.setattr(Account, "charge", lambda s, e: charge(s, replace(e, sample_rate=min(e.sample_rate, 0.25))))
    result = usage_audit(seed=1)
    assert [found.refuted for found in result.findings[:3]] == [False] * 3
    for check in ("two steps on each batch", "a batch kept", "a copy of a batch"):
        assert result.finding(check).refuted, str(result)


@pytest.mark.statistical
def test_the_one_run_audit_sees_lost_charges(monkeypatch):
    """Guesses do not show them: the correct weights tell too little."""
    monkeypatch.setattr(Account, "charge", only_some(Account.charge, every_fourth))
    result = one_run_audit(target_epsilon=1.0, seed=1)
    assert not result.finding("guessing").refuted
    assert result.finding("charges of the steps seen").refuted, str(result)


@pytest.mark.parametrize(
    ("needed", "charged", "enough"),
    [
        ({(1.0, 0.1): 4}, {(1.0, 0.1): 4}, True),
        ({(1.0, 0.1): 4}, {(1.0, 0.1): 1}, False),
        ({(1.0, 0.1): 4}, {(1.0, 0.1): 3, (1.0, 1.0): 1}, True),
        ({(1.0, 0.1): 3, (1.0, 1.0): 1}, {(1.0, 0.1): 4}, False),
        ({(1.0, 0.1): 4}, {(1.0, 0.05): 4}, False),
        ({(1.0, 0.1): 4}, {(2.0, 0.1): 4}, False),
        ({(0.5, 1.0): 1}, {(1.0, 1.0): 3}, False),  # a record that counts twice costs as much as four steps
        ({(0.5, 1.0): 1}, {(1.0, 1.0): 4}, True),
        ({}, {}, True),
        ({}, {(1.0, 0.1): 1}, True),
    ],
)
def test_what_covers_what(needed, charged, enough):
    assert covered(Counter(needed), Counter(charged), 0.1) is enough


def test_the_least_epsilon_is_below_the_reported_one_and_near_it():
    accountant = VariableRateRDPAccountant()
    for _ in range(50):
        accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    least = epsilon_at_least(Counter({(1.0, 0.1): 50}), 1e-5)
    assert 0.8 * accountant.get_epsilon(1e-5) < least < accountant.get_epsilon(1e-5)
    assert epsilon_at_least(Counter(), 1e-5) == 0.0


# ---- records -------------------------------------------------------------------------------------------------------


def norms_changed(change):
    return lambda finish: lambda self, *args: change(finish(self, *args))


def unbounded(norms):
    return torch.where(torch.isfinite(norms), norms, torch.ones_like(norms))


RECORDS = {
    "norms half as large": ("finish_batch", norms_changed(lambda norms: norms / 2), "ordinary"),
    "large norms lost to cancellation": (
        "finish_batch", norms_changed(lambda norms: torch.where(norms > 1e4, norms * 1e-6, norms)), "large",
    ),
    "not a number counts as one": ("finish_batch", norms_changed(unbounded), "one value not a number"),
    "summed twice": ("accumulate", lambda once: lambda self, factors: once(self, factors + factors), "ordinary"),
    "fewer records, larger factors": (
        "accumulate", lambda once: lambda self, factors: once(self, factors * (1 + 1 / len(factors))), "ordinary",
    ),
    "the largest record weighs on the others": (
        "accumulate", lambda once: lambda self, factors: once(self, factors * float(factors.min() > 1e-4)), "large",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", SOURCES)
@pytest.mark.parametrize("bug", RECORDS)
def test_records_that_add_too_much(monkeypatch, bug, mode):
    if mode == "zo" and "large" in bug:
        pytest.skip("differences of a loss are not large where gradients are")
    name, change, poison = RECORDS[bug]
    source = SOURCES[mode]
    monkeypatch.setattr(source, name, change(getattr(source, name)))
    result = poison_audit(seed=1, **MODES[mode])
    assert result.finding(poison).refuted, str(result)


@pytest.mark.parametrize("mode", ["bk", "hooks, flat", "zo", "split"])
def test_a_record_that_is_drawn_twice(monkeypatch, mode):
    """The sum holds it twice, or the step is refused."""
    draws = PoissonBatchSampler._logical_batches

    def doubled(self, start):
        for expected, indices in draws(self, start):
            yield expected, indices + indices[:1]

    monkeypatch.setattr(PoissonBatchSampler, "_logical_batches", doubled)
    try:
        result = poison_audit(seed=1, **MODES[mode])
    except ValueError:
        return
    assert result.finding("ordinary").statistic > 1.5, str(result)
    assert result.refuted


@pytest.mark.parametrize("mode", SOURCES)
def test_a_step_that_keeps_something_for_the_next(monkeypatch, mode):
    """The record is in the factors of the step after its own."""
    source = SOURCES[mode]
    once = source.accumulate

    def keeping(self, factors):
        before, self._kept = getattr(self, "_kept", 1.0), float(factors.min())
        return once(self, factors * (0.5 + 0.5 * before))

    monkeypatch.setattr(source, "accumulate", keeping)
    result = poison_audit(seed=1, **MODES[mode])
    large = result.finding("large")
    assert large.refuted, str(result)


# ---- the table -----------------------------------------------------------------------------------------------------


def test_false_alarms_are_shared_out_over_the_tests():
    plan = Plan(steps=100, runs=20, confidence=0.99, seed=1, settings={"clipping": "flat"})
    results = run_audits(plan, ["canary", "noise", "usage"])
    assert [result.confidence for result in results] == [pytest.approx(0.995)] * 2 + [1.0]
    assert [result.audit for result in results] == [
        "white-box canary",
        "noise over steps",
        "account of what a loop does",
    ]


def test_audits_are_chosen_by_name_and_by_what_they_can_see():
    assert [audit.name for audit in chosen_audits(None, forward_only=False)] == [audit.name for audit in AUDITS]
    assert {a.name for a in AUDITS} - {a.name for a in chosen_audits(None, forward_only=True)} == {"canary", "one-run"}
    with pytest.raises(ValueError, match="there is no audit 'all'"):
        chosen_audits(["all"], forward_only=False)
    with pytest.raises(ValueError, match="without a backward pass"):
        chosen_audits(["canary"], forward_only=True)


@pytest.mark.parametrize("audit", [usage_audit, poison_audit, coupling_audit])
def test_a_setting_that_is_refused_is_no_finding(audit):
    with pytest.raises(ValueError, match="max_physical_batch_size"):
        audit(max_physical_batch_size=0)
    with pytest.raises(ValueError, match="noise_multiplier"):
        audit(noise_multiplier=-1.0)


def test_the_command_line_names_the_table():
    assert [audit.name for audit in AUDITS] == list(NAMES)


def test_every_case_is_played():
    assert [found.check for found in poison_audit(clipping="flat").findings] == list(POISONS)
    assert [found.check for found in coupling_audit(clipping="flat").findings] == list(MODELS)
    assert [found.check for found in usage_audit(clipping="flat").findings] == [script.name for script in SCRIPTS]
