"""Noise that is not drawn afresh has the right spread at every step, and the independence audit finds it. Seeds are fixed."""

import numpy as np
import pytest
import torch

from opacus_ac.audit import canary_audit, noise_audit
from opacus_ac.audit.noise import closest_steps, independence_findings, lagged, shifted
from opacus_ac.release import GaussianMechanism

pytestmark = pytest.mark.statistical
MODES = [
    {},
    {"grad_sample_mode": "hooks", "clipping": "flat"},
    {"grad_sample_mode": "functorch", "clip_policy": "geometric"},
    {"max_physical_batch_size": 20},
    {"zeroth_order": "aggzo"},
    {"zeroth_order": "aggzo", "clip_policy": "fixed"},
]
LAGS, PAIRS, WITHIN = "noise at lags", "noise of any two", "noise within"


class Planted:
    """Standard normal vectors [T, D] in the place of those of the mechanism."""

    def __init__(self, change):
        self.generator = torch.Generator().manual_seed(5)
        self.drawn, self.change = [], change

    def __call__(self, mechanism, totals, std, scale=1.0):
        size = sum(t.numel() for t in totals)
        self.drawn.append(torch.randn(size, dtype=torch.float64, generator=self.generator))
        noise, first = self.change(self.drawn), 0
        for total in totals:
            total.add_(noise[first : first + total.numel()].view_as(total), alpha=std).mul_(scale)
            first += total.numel()


def of_period(period):
    return lambda drawn: drawn[(len(drawn) - 1) % period]


def one_step_again(drawn):
    return drawn[17] if len(drawn) == 90 else drawn[-1]


def half_of_it_twice(drawn):
    half = drawn[-1][: drawn[-1].numel() // 2]
    return torch.cat([half, half, drawn[-1]])[: drawn[-1].numel()]


BUGS = {
    "cancels that of the step before": (lambda d: (d[-1] - d[-2]) / 2**0.5 if len(d) > 1 else d[-1], LAGS),
    "every second step takes back the first's": (lambda d: d[-1] if len(d) % 2 else -d[-2], LAGS),
    "period of 7 steps": (of_period(7), LAGS),
    "period of 40 steps": (of_period(40), PAIRS),
    "a third is that of five steps before": (lambda d: (2**0.5 * d[-1] + d[-6]) / 3**0.5 if len(d) > 5 else d[-1], LAGS),
    "two steps of all share theirs": (one_step_again, PAIRS),
    "entries share theirs within a step": (half_of_it_twice, WITHIN),
    "one number for all entries": (lambda d: d[-1][:1].expand(d[-1].numel()), WITHIN),
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"grad_sample_mode": "hooks", "clipping": "flat"}, {"zeroth_order": "aggzo"}])
@pytest.mark.parametrize("bug", BUGS)
def test_noise_that_is_not_fresh(monkeypatch, bug, settings):
    change, check = BUGS[bug]
    planted = Planted(change)
    monkeypatch.setattr(GaussianMechanism, "noise_in_place", lambda *a, **k: planted(*a, **k))
    result = noise_audit(steps=120, seed=1, **settings)
    assert result.finding(check).refuted, str(result)
    assert result.finding(check).p_value < 1e-4


def test_the_canary_does_not_see_it(monkeypatch):
    """Each step alone is private: this is why the audit is one of its own."""
    planted = Planted(BUGS["every second step takes back the first's"][0])
    monkeypatch.setattr(GaussianMechanism, "noise_in_place", lambda *a, **k: planted(*a, **k))
    assert not canary_audit(steps=400, seed=1, clipping="flat").refuted
    assert noise_audit(steps=60, seed=1, clipping="flat").refuted


@pytest.mark.parametrize("settings", MODES)
@pytest.mark.parametrize("seed", [None, 2, 3])
def test_fresh_noise_is_not_flagged(settings, seed):
    """18 runs at 1 - 1e-4, of which six with the secret noise: a false alarm in them has probability 0.002."""
    result = noise_audit(steps=100, confidence=0.9999, seed=seed, **settings)
    assert not result.refuted, str(result)
    assert result.observations == 100


def test_half_the_noise_without_a_backward_pass(monkeypatch):
    """The spread of what a zeroth-order step releases is seen on its empty batches."""
    whole = GaussianMechanism.noise_in_place
    monkeypatch.setattr(
        GaussianMechanism, "noise_in_place", lambda self, totals, std, scale=1.0: whole(self, totals, std / 2, scale)
    )
    assert noise_audit(steps=60, seed=1, zeroth_order="aggzo").finding("noise of every tensor").refuted


def test_false_alarms_are_as_rare_as_stated():
    """3000 runs of three checks at 1 % each: more than 62 alarms of one would be 6 sigma above, fewer than 5 a dead test."""
    rng = np.random.default_rng(1)
    alarms = np.zeros(3)
    for _ in range(3000):
        noise = {"a": rng.normal(size=(60, 3)), "b": rng.normal(size=(60, 20))}
        noise["b"][rng.random((60, 20)) < 0.1] = np.nan
        alarms += [finding.refuted for finding in independence_findings(noise, 0.01)]
    assert alarms.max() <= 62, alarms
    assert alarms.min() >= 5, alarms


def test_statistics_against_a_loop():
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(9, 4))
    for lag in (1, 3):
        pairs = [noise[t, i] * noise[t - lag, i] for t in range(lag, 9) for i in range(4)]
        assert lagged(noise, lag) == pytest.approx(sum(pairs) / len(pairs) ** 0.5)
        pairs = [noise[t, i] * noise[t, i - lag] for t in range(9) for i in range(lag, 4)]
        assert shifted(noise, lag) == pytest.approx(sum(pairs) / len(pairs) ** 0.5)
    noise[6] = -2 * noise[2]
    p_value, first, second = closest_steps(noise)
    assert (first, second) == (2, 6)
    assert p_value < 1e-9
    assert closest_steps(noise[:1]) == closest_steps(noise[:, :1]) == (1.0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"steps": 49}, "steps"), ({"noise_multiplier": 0.0}, "noise_multiplier"), ({"confidence": 2.0}, "confidence")],
)
def test_what_cannot_be_audited_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        noise_audit(**arguments)
