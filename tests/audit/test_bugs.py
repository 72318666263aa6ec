"""Bugs planted into the real step, each caught by the audit that is named. Seeds are fixed.

Found elsewhere: the rule of ``nn.Linear`` on a ternary layer, a rule that forgets a tied weight or padding, by parity
with the loop of batch size one (``test_rules_layers.py``, ``test_book_keeping.py``).
"""

import pytest
import torch
from torch import nn

from opacus_ac.audit import canary_audit, scalar_audit
from opacus_ac.clipping import ClipPolicy, PercentilePolicy
from opacus_ac.grad_sample import register_rules
from opacus_ac.grad_sample.checks.exactness import check_model
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.grad_sample.opacus_hooks import PerSampleSource
from opacus_ac.optimizer.private_side import PrivateSide
from opacus_ac.optimizer.records import RecordSums
from opacus_ac.optimizer.sum_release import SumRelease
from opacus_ac.release import GaussianMechanism
from opacus_ac.sampling import PoissonBatchSampler
from opacus_ac.testing import check_norms, per_sample_gradients

pytestmark = pytest.mark.statistical
NOISE_IN_PLACE = GaussianMechanism.noise_in_place
CHUNKS = {"max_physical_batch_size": 20}


def canary(steps=400, **settings):
    return canary_audit(steps=steps, seed=1, **settings)


def scalars(**settings):
    """At z = 2 a step claims mu = 0.5; 60 runs can show up to 0.75."""
    return scalar_audit(noise_multiplier=2.0, runs=60, steps=2, seed=1, **settings)


def caught(result, *checks):
    """The result is refuted by each of ``checks``, and says so."""
    assert result.refuted, str(result)
    for check in checks:
        assert result.finding(check).refuted, str(result)


def patch_noise(monkeypatch, change):
    """Let ``change(self, totals, std, scale)`` take the place of the noise of the gradient."""
    monkeypatch.setattr(GaussianMechanism, "noise_in_place", change)


# ---- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"grad_sample_mode": "hooks", "clipping": "flat"}, {"fused_step": True}])
def test_half_the_noise(monkeypatch, settings):
    patch_noise(monkeypatch, lambda self, totals, std, scale=1.0: NOISE_IN_PLACE(self, totals, std / 2, scale))
    caught(canary(**settings), "canary, threshold", "canary, Gaussian", "noise")


def test_half_the_noise_on_everything_and_a_step_that_says_so(monkeypatch):
    """The release itself states the smaller noise: the audit measures against the claim."""
    whole = GaussianMechanism.gradient_multiplier
    monkeypatch.setattr(GaussianMechanism, "gradient_multiplier", lambda self, s: whole(self, s) / 2)
    caught(canary(), "canary, threshold", "canary, Gaussian", "noise")


def test_histogram_that_is_not_paid_for(monkeypatch):
    """The gradient gets z instead of z sqrt(1 + a^2), with a heavy histogram: mu = 1.41 instead of 1."""
    monkeypatch.setattr(GaussianMechanism, "gradient_multiplier", lambda self, s: self.noise_multiplier)
    caught(canary(steps=1000, histogram_weight=1.0), "canary, Gaussian", "noise")


def test_noise_missing_on_one_shard(monkeypatch):
    """Two shards, of which one adds its half of the variance."""
    patch_noise(monkeypatch, lambda self, totals, std, scale=1.0: NOISE_IN_PLACE(self, totals, std / 2**0.5, scale))
    caught(canary(steps=1000), "canary, Gaussian", "noise")


@pytest.mark.parametrize("tensor", range(4))
def test_noise_missing_on_one_tensor(monkeypatch, tensor):
    """The canary lies in the first tensor; that the others are noised is seen by the noise check alone."""

    def all_but_one(self, totals, std, scale=1.0):
        NOISE_IN_PLACE(self, [t for i, t in enumerate(totals) if i != tensor], std, scale)
        totals[tensor].mul_(scale)

    patch_noise(monkeypatch, all_but_one)
    caught(canary(), "noise")


def test_noise_missing_on_one_physical_batch(monkeypatch):
    """The first chunk of a logical batch reaches the weights in clear as well, behind the release."""
    settle = PrivateSide._settle

    def leaking(self):
        settle(self)
        with torch.no_grad():
            for parameter in self.params:
                parameter.sub_(parameter.summed_grad / self.expected_batch_size)

    monkeypatch.setattr(PrivateSide, "_settle", leaking)
    caught(canary(**CHUNKS), "noise")


def test_the_same_noise_at_every_step(monkeypatch):
    """Reused noise cancels between steps. The mean of the observations gives it away, or their lack of spread."""

    def repeated(self, totals, std, scale=1.0):
        generator = torch.Generator().manual_seed(3)
        for total in totals:
            total.add_(torch.randn(total.shape, generator=generator), alpha=std).mul_(scale)

    patch_noise(monkeypatch, repeated)
    caught(canary(), "canary, threshold", "canary, Gaussian")


# ---- records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [BookKeepingSource, PerSampleSource])
def test_batch_summed_twice(monkeypatch, source):
    once = source.accumulate
    monkeypatch.setattr(source, "accumulate", lambda self, factors: once(self, factors + factors))
    mode = "bk" if source is BookKeepingSource else "hooks"
    caught(canary(grad_sample_mode=mode), "canary, threshold", "canary, Gaussian", "noise")


@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_record_drawn_twice_into_a_batch(monkeypatch, mode):
    """Noise and sum are what they should be; only the canary sees that it counts twice."""
    draws = PoissonBatchSampler._logical_batches

    def doubled(self, start):
        for expected, indices in draws(self, start):
            yield expected, indices + indices

    monkeypatch.setattr(PoissonBatchSampler, "_logical_batches", doubled)
    result = canary(grad_sample_mode=mode, clipping="flat")
    caught(result, "canary, threshold", "canary, Gaussian")


def test_rate_above_the_one_that_is_accounted(monkeypatch):
    draws = PoissonBatchSampler._logical_batches

    def more(self, start):
        for expected, indices in draws(self, start):
            again = self.stream.uniform(self.plan.sizes.dataset_size) < 0.3
            yield expected, sorted({*indices, *again.nonzero().reshape(-1).tolist()})

    monkeypatch.setattr(PoissonBatchSampler, "_logical_batches", more)
    caught(canary(), "sampling rate")


def test_gradients_that_are_not_clipped(monkeypatch):
    def looser(self, norms):
        return (3 * self.policy.bound / norms).clamp(max=1.0)

    monkeypatch.setattr(RecordSums, "_factors", looser)
    caught(canary(), "canary, threshold", "canary, Gaussian")


# ---- released scalars ----------------------------------------------------------------------------------------------


def test_published_rule_on_raw_norms():
    caught(scalars(clip_policy="raw_percentile"), "scalars follow the noise", "record readable")


def test_clipping_norm_from_raw_norms_under_a_private_name(monkeypatch):
    """The policy says that it is private and reads norms all the same."""
    factors = ClipPolicy.factors

    def peeking(self, norms):
        self._peeked = float(norms.mean())
        return factors(self, norms)

    monkeypatch.setattr(ClipPolicy, "factors", peeking)
    monkeypatch.setattr(PercentilePolicy, "update", lambda self, release: setattr(self, "_bound", self._peeked))
    caught(scalars(), "scalars follow the noise", "record readable")


def test_statistics_without_noise(monkeypatch):
    def bare(self, statistics, size, *ranks):
        return statistics.decode(statistics.vector(), self.gradient_multiplier(statistics), size)

    monkeypatch.setattr(GaussianMechanism, "release_statistics", bare)
    caught(scalars(), "scalars follow the noise", "record readable")
    caught(canary(), "noise")


def test_statistics_with_noise_from_the_public_generator(monkeypatch):
    """It has the right spread, so only seeding torch's generator before each step shows that it is no secret."""

    class Public:
        def normal(self, size):
            return torch.randn(size, dtype=torch.float64)

        def state_dict(self):
            return {}

    made = GaussianMechanism.__init__

    def with_public_statistics(self, noise_multiplier, stream):
        made(self, noise_multiplier, stream)
        self._statistics_stream = Public()

    monkeypatch.setattr(GaussianMechanism, "__init__", with_public_statistics)
    assert not canary().refuted
    caught(scalars(), "scalars follow the noise", "record readable")


# ---- denominators --------------------------------------------------------------------------------------------------


def test_denominator_by_the_realised_batch_size(monkeypatch):
    """The release then says how many records were drawn, without noise."""
    monkeypatch.setattr(SumRelease, "_denominator", lambda self: float(self._draw.records))
    caught(scalars(), "scalars follow the noise", "record readable")


def test_hidden_denominator_by_the_realised_batch_size(monkeypatch):
    """Only the gradient is scaled by it: its noise has no longer the spread that public constants say."""
    scale = SumRelease._gradient_scale
    monkeypatch.setattr(
        SumRelease,
        "_gradient_scale",
        lambda self: scale(self) * self._draw.expected_batch_size / max(self._draw.records, 1),
    )
    caught(canary(), "noise")


# ---- rules ---------------------------------------------------------------------------------------------------------


def test_linears_rule_on_a_ternary_layer():
    """Caught by parity with the loop of batch size one; and ``make_private`` refuses such a model beforehand."""
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.linear import compute_linear_grad_sample
    from transformers.integrations.bitnet import AutoBitLinear

    layer = AutoBitLinear(6, 4, bias=False, online_quant=True)
    register_rules(layer)
    x = torch.randn(5, 6)

    def norms():
        wrapped = GradSampleModule(nn.Sequential(layer), strict=False)
        wrapped(x).pow(2).sum(1).mean().backward()
        grads = {"0.weight": layer.weight.grad_sample.clone()}
        wrapped.to_standard_module()
        return grads

    expected = per_sample_gradients(nn.Sequential(layer), x, lambda m, rows: m(rows).pow(2).sum())
    check_norms(norms(), expected, rtol=1e-5)
    GradSampleModule.GRAD_SAMPLERS[AutoBitLinear] = compute_linear_grad_sample
    with pytest.raises(AssertionError, match="relative error"):
        check_norms(norms(), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="AutoBitLinear"):
        check_model(nn.Sequential(layer).train())
