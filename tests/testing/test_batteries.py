"""The batteries of ``opacus_ac.testing`` pass what is right and trip on each planted bug."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from opacus_ac.clipping import POLICIES, AutomaticPolicy, ClipPolicy, GeometricPolicy, PercentilePolicy
from opacus_ac.grad_sample import register_rule, register_ste_linear
from opacus_ac.testing import check_rule
from opacus_ac.testing.policies import check_clip_policy, optimizer_by_hand, released_vector

ROWS = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.2, 6.0]).view(3, 1, 1)


# ---- rules ---------------------------------------------------------------------------------------------------------


class Gain(nn.Module):
    """``x * gain``, with a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = 5
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def gain_rule(module: Gain, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    return {module.gain: (activations[0] * backprops).sum(1)}


class Rounded(nn.Linear):
    """The master weight rounded, straight through."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return F.linear(x, w + ((w * 4).round() / 4 - w).detach(), self.bias)


@pytest.mark.parametrize("layer", [nn.Linear(5, 2), Gain(), Rounded(5, 2)], ids=lambda m: type(m).__name__)
def test_exact_layers_pass_in_both_modes_and_nothing_is_changed(layer):
    register_rule(Gain, gain_rule)
    register_ste_linear(Rounded)
    table = dict(GradSampleHooks.GRAD_SAMPLERS)
    layer.eval()
    before = {n: p.clone() for n, p in layer.named_parameters()}
    found = check_rule(layer, ROWS)
    assert set(found) == {"hooks", "bk"}
    assert max(found.values()) < 1e-12
    assert dict(GradSampleHooks.GRAD_SAMPLERS) == table
    assert not layer.training
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in layer.named_parameters())


def test_a_whole_model_with_a_loss_of_its_own():
    found = check_rule(tiny_models.build("bitnet-tied"), tiny_models.token_batch(), tiny_models.mean_loss)
    assert max(found.values()) < 1e-7


@pytest.mark.parametrize("mode", ["hooks", "bk"])
def test_a_wrong_rule_that_nothing_can_probe_is_found_by_the_battery(mode):
    """``in_features`` is missing, so ``check_model`` cannot make an input and trusts the user."""

    def half(module: Gain, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        return {module.gain: 0.5 * (activations[0] * backprops).sum(1)}

    layer = Gain()
    del layer.in_features
    layer.gain = nn.Parameter(torch.rand(1, 5))  # two dimensions: not taken for a normalisation
    register_rule(Gain, lambda m, a, b: {p: rows.unsqueeze(1) for p, rows in half(m, a, b).items()})
    with pytest.raises(AssertionError, match=rf'mode "{mode}": 0.gain is off by 5.0e-01'):
        check_rule(layer, ROWS, modes=[mode])


class Stretch(nn.Module):
    """Two inputs and a scalar: nothing can be probed, and ``[B]`` is the shape of a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.stretch = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y) * self.stretch


def stretch_rule(module: Stretch, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    return {module.stretch: ((activations[0] + activations[1]) * backprops).flatten(1).sum(1)}


def test_scalars_and_two_inputs():
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.stretch = nn.Linear(5, 5), Stretch()

        def forward(self, x: Tensor) -> Tensor:
            return self.stretch(x, self.linear(x))

    register_rule(Stretch, stretch_rule)
    assert max(check_rule(Sums(), ROWS).values()) < 1e-12
    register_rule(Stretch, lambda m, a, b: {p: rows / 2 for p, rows in stretch_rule(m, a, b).items()})
    with pytest.raises(AssertionError, match=r"stretch\.stretch is off by 5\.0e-01"):
        check_rule(Sums(), ROWS)


def test_what_make_private_refuses_is_refused_here():
    register_ste_linear(Gain)
    with pytest.raises(ValueError, match="Gain"):
        check_rule(Gain(), ROWS)


def test_a_batch_that_tests_nothing_is_an_error():
    with pytest.raises(AssertionError, match="weight has no gradient in this batch"):
        check_rule(nn.Linear(5, 2, bias=False), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="'ghost'"):
        check_rule(nn.Linear(5, 2), ROWS, modes=["ghost"])


# ---- clip policies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_of_the_package_passes(name):
    """The bound is also attained: were the declared sensitivity too large, noise would be wasted."""
    worst = check_clip_policy(POLICIES[name])
    assert worst == pytest.approx(1.0, rel=1e-6)


class TooLarge(ClipPolicy):
    def _factors(self, norms: Tensor) -> Tensor:
        return (1.01 * self.bound / norms).clamp(max=1.0)


class Negative(ClipPolicy):
    def _factors(self, norms: Tensor) -> Tensor:
        return -super()._factors(norms)


class KeepsInfinite(ClipPolicy):
    def factors(self, norms: Tensor) -> Tensor:
        return (self.bound / norms).clamp(max=1.0)  # NaN for NaN


class FalseSlack(AutomaticPolicy):
    gradient_share = ClipPolicy.gradient_share


class Escapes(ClipPolicy):
    def update(self, release: Any) -> None:
        self._bound *= 1e6


class Remembers(ClipPolicy):
    """The published rule under a private name: C follows the norms that ``factors`` was shown."""

    def _factors(self, norms: Tensor) -> Tensor:
        self.seen = float(norms.median())
        return super()._factors(norms)

    def update(self, release: Any) -> None:
        self._bound = float(np.clip(getattr(self, "seen", self._bound), self.min_norm, self.max_norm))


class Eavesdrops(GeometricPolicy):
    """C is fine; the rate that steers the learning rate is not."""

    rate_seen = 0.5

    def _factors(self, norms: Tensor) -> Tensor:
        self.rate_seen = float((norms > self.bound).double().mean())
        return super()._factors(norms)

    def clip_rate(self, release: Any) -> float:
        return self.rate_seen


class Forgets(PercentilePolicy):
    """Its checkpoint lacks the window."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "window": []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._history = deque(maxlen=self.window)


class OneForAll(ClipPolicy):
    def factors(self, norms: Tensor) -> Tensor:
        return super().factors(norms).min()


@pytest.mark.parametrize("policy", [TooLarge, KeepsInfinite, OneForAll])
def test_a_step_refuses_factors_that_break_the_bound(policy):
    gradients = torch.tensor([[3.0, 4.0], [math.nan, 0.0], [0.1, 0.1]], dtype=torch.float64)
    optimizer = optimizer_by_hand(gradients, clip_policy=policy(1.0))
    with pytest.raises(ValueError, match=f"{policy.__name__}.factors left a gradient longer than C = 1, or gave"):
        optimizer.step()
    assert all(not p.any() for p in optimizer.params)  # nothing moved


class SavesObjects(ClipPolicy):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tensor": torch.ones(1)}


BUGS = {
    TooLarge: "keeps the norm 1.01 C",
    Negative: "finite and >= 0",
    KeepsInfinite: "factor 0",
    FalseSlack: "room that is not there",
    Escapes: r"outside of \[1e-10",
    Remembers: "step 1: the same releases, without the records",
    Eavesdrops: "clip rate 0.5",
    Forgets: "state_dict at step 6",
    SavesObjects: "plain values",
}


@pytest.mark.parametrize("policy", BUGS, ids=lambda c: c.__name__)
def test_planted_bugs_trip_the_battery(policy):
    with pytest.raises(AssertionError, match=BUGS[policy]):
        check_clip_policy(policy)


def test_the_search_over_releases_finds_what_factors_alone_do_not_show(monkeypatch):
    """Were the weights of the histogram wrong, every policy would be honest and the release still move too far."""
    from opacus_ac.release import StepStatistics

    begin = StepStatistics.begin

    def generous(self, bound, gradient_share):
        begin(self, bound, gradient_share)
        self._weights = self._weights * 1.3

    monkeypatch.setattr(StepStatistics, "begin", generous)
    with pytest.raises(AssertionError, match="times the declared sensitivity"):
        check_clip_policy(ClipPolicy)


def test_released_vector_is_gradient_and_histogram():
    rows = torch.tensor([[3.0, 4.0, 0.0]], dtype=torch.float64)
    vector = released_vector(rows, clip_policy="percentile")
    assert vector[:3].tolist() == pytest.approx([0.6, 0.8, 0.0])
    assert vector[3:].norm() == pytest.approx(math.sqrt(0.0412))
