"""The audits do not flag the correct code, in any mode, and refuse what they cannot audit."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch

from opacus_ac import PrivacyEngine
from opacus_ac.audit import CanaryTask, canary_audit, one_run_audit, scalar_audit
from opacus_ac.audit.canary import _Auditor, private_parts
from opacus_ac.audit.scalars import released_scalars
from opacus_ac.audit.streams import FixedDraws, WithoutRecords
from opacus_ac.noise import SeededStream
from opacus_ac.release import StepRelease

MODES = ("bk", "hooks", "functorch")
CLIPPING = (
    {"clip_policy": "percentile"},
    {"clip_policy": "geometric"},
    {"clipping": "flat"},
    {"clipping": "automatic"},
)
STEPS = ({}, {"max_physical_batch_size": 20}, {"fused_step": True}, {"normalize": False, "loss_reduction": "sum"})
# 20 seeds: every mode with every clip rule, and every kind of step several times.
COMBINATIONS = [
    {"grad_sample_mode": mode, **clipping, **STEPS[i % 4]}
    for i, (mode, clipping) in zip(range(20), itertools.cycle(itertools.product(MODES, CLIPPING)), strict=False)
]
NOISE = (0.3, 1.0, 4.0)


@pytest.mark.statistical
@pytest.mark.parametrize("seed", range(20))
def test_correct_step_is_not_flagged(seed):
    """300 steps at confidence 0.999: a false alarm in the 20 has probability 0.02; the seeds are fixed."""
    result = canary_audit(
        noise_multiplier=NOISE[seed % 3], steps=300, seed=seed, **({"loss_bound": 5.0} if seed % 5 == 0 else {}), **COMBINATIONS[seed]
    )  # fmt: skip
    assert not result.refuted, str(result)
    assert result.observations == 300


@pytest.mark.statistical
@pytest.mark.parametrize("seed", range(20))
def test_correct_scalars_are_not_flagged(seed):
    """25 runs a side of 2 steps, confidence 0.999; the seeds are fixed."""
    result = scalar_audit(noise_multiplier=NOISE[seed % 3], runs=25, steps=2, seed=100 * seed, **COMBINATIONS[seed])
    assert not result.refuted, str(result)


@pytest.mark.statistical
def test_exact_step_is_seen_almost_as_far_as_it_claims():
    """An audit that sees nothing flags nothing: at z = 0.3 and 500 steps mu_hat is off by 4 %, the bound by 15 %."""
    result = canary_audit(noise_multiplier=0.3, steps=500, seed=3)
    means = result.finding("canary, Gaussian")
    assert 0.75 * means.claimed_epsilon < means.epsilon < means.claimed_epsilon


def test_secret_streams_are_what_is_audited_by_default():
    results = [canary_audit(steps=100, clipping="flat") for _ in range(2)]
    assert results[0].findings != results[1].findings
    again = [canary_audit(steps=100, clipping="flat", seed=1) for _ in range(2)]
    assert again[0] == again[1]


def test_canary_lies_where_no_other_record_does():
    task = CanaryTask(records=10, canaries=2)
    gradients = np.concatenate(list(task.gradients().values()), axis=1)
    for canary in task.canaries:
        others = np.delete(gradients, canary, axis=0)
        own = (others == 0).all(0)
        assert np.linalg.norm(gradients[canary, own]) > (1 - 1e-9) * np.linalg.norm(gradients[canary])


def test_ranks_of_a_distributed_run_add_up():
    """Two shards, one with the canary: the sum over the ranks serves both as if one process had all records."""
    shards = [CanaryTask(20, seed=1), CanaryTask(20, seed=2, strength=0.0)]
    answers: list[list[np.ndarray]] = [[], []]

    def auditor(rank, others):
        bare, _, optimizer, _ = private_parts(
            None, shards[rank], 10, 0, lambda m: torch.optim.SGD(m.parameters(), lr=1.0), noise_multiplier=1.0
        )

        def summed(values):
            answers[rank].append(values)
            return values + others[len(answers[rank]) - 1] if others else values

        return _Auditor(shards[rank], bare, optimizer, rank == 0, summed, 1.0)

    first = auditor(0, None)
    second = auditor(1, answers[0])
    assert second.own == -1
    assert np.array_equal(second.canary, first.canary)
    assert np.linalg.norm(second.canary) > 0


@pytest.mark.parametrize(
    ("audit", "arguments", "message"),
    [
        (canary_audit, {"steps": 99}, "steps"),
        (canary_audit, {"noise_multiplier": 0.0}, "noise_multiplier"),
        (canary_audit, {"noise_multiplier": float("nan")}, "noise_multiplier"),
        (canary_audit, {"confidence": 1.0}, "confidence"),
        (canary_audit, {"poisson_sampling": False}, "poisson_sampling"),
        (scalar_audit, {"runs": 19}, "runs"),
        (scalar_audit, {"steps": 0}, "steps"),
        (scalar_audit, {"noise_multiplier": 0.0}, "noise_multiplier"),
        (one_run_audit, {"guesses": 3}, "guesses"),
        (one_run_audit, {"guesses": 2000}, "guesses"),
        (one_run_audit, {"poisson_sampling": False}, "poisson_sampling"),
        (CanaryTask, {"records": 0}, "records"),
    ],
)
def test_what_cannot_be_audited_is_refused(audit, arguments, message):
    with pytest.raises(ValueError, match=message):
        audit(**arguments)


def test_leak_test_leaves_the_global_generators_alone():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    scalar_audit(runs=20, steps=1, clipping="flat", seed=0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_every_number_of_a_release_is_read():
    release = StepRelease(1, 2.0, 1.0, 1.0, 0.5, 4.0, None, 0.25, 1.0, None)
    names = dict(released_scalars("", release))
    assert set(names) == {field.name for field in dataclasses.fields(StepRelease)}
    assert names["loss"] == 0.25
    assert math.isnan(names["clip_rate"])
    assert dict(released_scalars("counts", np.array([1.0, 2.5]))) == {"counts[0]": 1.0, "counts[1]": 2.5}
    with pytest.raises(TypeError, match="str"):
        list(released_scalars("secret", "text"))


def test_neighbours_differ_in_one_record_only():
    inside, outside = (FixedDraws(3, {4: there}).uniform(10).numpy() < 0.5 for there in (True, False))
    assert bool(inside[4])
    assert not bool(outside[4])
    assert np.array_equal(np.delete(inside, 4), np.delete(outside, 4))
    stream = WithoutRecords(SeededStream(torch.Generator().manual_seed(0)), [1, 3])
    assert bool((stream.uniform(5)[[1, 3]] == 1).all())


# ---- one run -------------------------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("seed", range(5))
def test_correct_run_is_not_flagged(seed):
    """1000 canaries at confidence 0.999; the seeds are fixed."""
    result = one_run_audit(target_epsilon=(0.5, 1.0, 2.0)[seed % 3], seed=seed, grad_sample_mode=MODES[seed % 3])
    assert not result.refuted, str(result)
    assert result.findings[0].claimed_epsilon <= (0.5, 1.0, 2.0)[seed % 3]


@pytest.mark.statistical
def test_run_that_claims_too_little_is_flagged():
    """The engine reports a tenth of what it spent. Seed fixed."""

    class Optimist(PrivacyEngine):
        def get_epsilon(self, delta):
            return super().get_epsilon(delta) / 10

    assert one_run_audit(Optimist(), target_epsilon=4.0, seed=1).refuted
