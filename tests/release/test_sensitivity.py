"""One record, however extreme, moves the un-noised release by at most what the mechanism declares."""

import math

import numpy as np
import pytest
import torch
from helpers import release_vector
from hypothesis import given, settings
from hypothesis import strategies as st

from opacus_ac.allocation import NoiseAllocation
from opacus_ac.clipping import POLICIES, AutomaticPolicy, ClipPolicy, build_policy
from opacus_ac.release import StepStatistics
from opacus_ac.release import statistics as statistics_module

STATISTICS = {
    "flat": {"histogram": False},
    "free slack": {"histogram": True, "histogram_weight": 0.0},
    "default": {"histogram": True},
    "heavy": {"histogram": True, "histogram_weight": 1.5, "bins": 7},
    "loss": {"histogram": True, "loss_bound": 10.0},
    "loss alone": {"histogram": False, "loss_bound": 3.0, "loss_weight": 0.7},
    "groups": {"histogram": True, "groups": 2},
    "groups alone": {"histogram": False, "groups": 2, "group_weight": 1.3},
    "everything": {"histogram": True, "loss_bound": 10.0, "groups": 2},
}
CASES = [
    (policy, name)
    for policy in POLICIES
    for name, statistics in STATISTICS.items()
    if statistics["histogram"] or not POLICIES[policy].needs_histogram
]
finite = st.floats(-1e6, 1e6)
extreme = st.one_of(
    finite, st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, 1e-30, 1e-160, 1e150, 1e300])
)
record = st.lists(extreme, min_size=5, max_size=5)


def moved(policy: str, statistics: StepStatistics, bound: float, batch, losses, extra, extra_loss) -> float:
    def release(rows, row_losses):
        gradients = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
        given_losses = torch.tensor(row_losses, dtype=torch.float64) if statistics.loss_bound is not None else None
        chosen = build_policy(policy, bound, 0.5, 16)
        return release_vector(
            gradients, given_losses, clip_policy=chosen, max_grad_norm=bound, statistics=statistics, lr_control=False,
            allocation=NoiseAllocation("paid") if statistics.groups else None,
        )  # fmt: skip

    difference = release([*batch, extra], [*losses, extra_loss]) - release(batch, losses)
    return float(difference.norm())


@pytest.mark.parametrize(("policy", "name"), CASES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.lists(finite, min_size=5, max_size=5), max_size=4),
    extra=record,
    bound=st.floats(1e-4, 1e4),
    loss=st.one_of(finite, st.sampled_from([float("nan"), float("inf")])),
)
def test_one_record_moves_the_release_by_at_most_the_sensitivity(policy, name, batch, extra, bound, loss):
    statistics = StepStatistics(**STATISTICS[name])
    losses = [1.0] * len(batch)
    distance = moved(policy, statistics, bound, batch, losses, extra, loss)
    assert distance <= statistics.sensitivity * (1 + 1e-6)
    assert not math.isnan(distance)


@pytest.mark.parametrize("name", ["default", "loss", "groups", "groups alone", "everything"])
def test_the_bound_is_attained(name):
    """Were the declared sensitivity larger than needed, noise would be wasted; were it smaller, the test above fails."""
    statistics = StepStatistics(**STATISTICS[name])
    policy = "percentile" if statistics.histogram else "fixed"
    distance = moved(policy, statistics, 1.0, [], [], [1e6] * 5, 1e6)
    assert distance == pytest.approx(statistics.sensitivity, rel=1e-9)


class Liar(AutomaticPolicy):
    """AUTO-S enlarges small gradients, so the slack of plain clipping, which it declares, is not there."""

    gradient_share = ClipPolicy.gradient_share


class Hidden(ClipPolicy):
    """Enlarges the gradients of one norm, which no grid is likely to meet."""

    def _factors(self, norms):
        return torch.where((norms - 0.0441).abs() < 1e-9, self.bound / norms, super()._factors(norms))


def small_record(policy, norm=0.0441):
    statistics = StepStatistics(histogram=True)
    row = torch.full((1, 5), norm / math.sqrt(5), dtype=torch.float64)
    return float(
        release_vector(row, clip_policy=policy(1.0), statistics=statistics, lr_control=False).norm()
    ), statistics.sensitivity


def test_a_policy_that_lies_about_its_bins_gets_those_that_it_has(monkeypatch):
    moved_by, sensitivity = small_record(Liar)
    assert moved_by <= sensitivity
    monkeypatch.setattr(ClipPolicy, "true_share", ClipPolicy.gradient_share)
    with pytest.raises(ValueError, match="gradient_share"):
        small_record(Liar)
    monkeypatch.setattr(StepStatistics, "check_kept", lambda *_: None)  # and that is what does it
    assert small_record(Liar)[0] > sensitivity * 1.1


def test_a_policy_that_no_grid_sees_through_is_refused_at_the_record():
    with pytest.raises(ValueError, match="gradient_share"):
        small_record(Hidden)
    assert small_record(Hidden, 0.05)[0] <= small_record(Hidden, 0.05)[1]


def test_battery_trips_on_profiles_that_are_not_divided_by_their_length(monkeypatch):
    """Planted: energies over the largest, so that a record with equal groups counts sqrt(2) times."""
    monkeypatch.setattr(statistics_module, "energy_profiles", lambda squares: squares / squares.max(1, keepdims=True))
    statistics = StepStatistics(histogram=False, groups=2, group_weight=1.3)
    even = [3.0, 0.0, 0.0, 3.0, 0.0]
    assert moved("fixed", statistics, 1.0, [], [], even, 1.0) > statistics.sensitivity * 1.1


@pytest.mark.parametrize("policy", POLICIES)
def test_factors_bound_every_finite_norm_and_drop_the_rest(policy):
    chosen = build_policy(policy, 0.7, 0.5, 16)
    norms = torch.tensor([0.0, 1e-12, 0.1, 0.7, 0.71, 1e9, math.inf, math.nan], dtype=torch.float64)
    factors = chosen.factors(norms)
    finite_norms = torch.isfinite(norms)
    assert bool((factors[finite_norms] * norms[finite_norms] <= 0.7 * (1 + 1e-12)).all())
    assert factors[~finite_norms].tolist() == [0.0, 0.0]
    assert np.all(np.diff(chosen.gradient_share(np.array([0.0, 0.5, 1.0, 2.0, np.inf]))) >= 0)
