"""What is said in words about a run: every verdict, where it begins and ends."""

import os

import pytest

from opacus_ac.release.running_mean import WINDOW
from opacus_ac.tensorboard.idle import Idle
from opacus_ac.tensorboard.verdicts import SILENT, judge

META = {"version": 1, "private": True}
STEPS = list(range(1, 61))


def constant(value, steps=STEPS):
    return [steps, [value] * len(steps)]


def curves(**changed):
    """A run of 60 steps in its band, whose C has moved and whose loss has fallen."""
    known = {
        "epsilon": [STEPS, [step / 20 for step in STEPS]],
        "epsilon_target": constant(4.0),
        "remaining_steps": [STEPS, [100 - step for step in STEPS]],
        "max_grad_norm": [STEPS, [1 / step for step in STEPS]],
        "noisy_clip_rate_mean": constant(0.88),
        "noisy_clip_rate_mean_std": [[1], [0.02]],
        "target_clip_rate": constant(0.9),
        "clip_rate_low": constant(0.8),
        "clip_rate_high": constant(1.0),
        "noisy_loss_mean": [STEPS, [3 - step / 60 for step in STEPS]],
        "noisy_loss_mean_std": [[1, 20], [0.4, 0.1]],
    }
    return {name: column for name, column in {**known, **changed}.items() if column is not None}


def said(changed=None, meta=META, idle=0.0):
    return [tuple(verdict) for verdict in judge(meta, curves(**(changed or {})), idle).verdicts]


def test_a_run_that_goes_well():
    assert said() == [
        ("good", "running, step 60"),
        ("good", "C follows the norms: clip rate 0.88 ± 0.02, target 0.9"),
        ("good", "noisy loss fell from 2.7 ± 0.1 to 2.0 ± 0.1"),
    ]


STATES = {
    "no step": ({}, [[0], [0.0]], 0.0, "waiting", "no step yet: the first release comes after the first batch"),
    "silent": ({}, None, SILENT, "silent", "no data for 3 min: the run was stopped, or a step takes this long"),
    "silent for hours": ({}, None, 7300.0, "silent", "no data for 2 h: the run was stopped, or a step takes this long"),
    "not silent yet": ({}, None, SILENT - 1, "running", "running, step 60"),
    "age unknown": ({}, None, None, "running", "running, step 60"),
    "ended": ({"ended": True}, None, 9999.0, "ended", "ended after step 60; 40 more steps fit the budget"),
    "used up": ({"ended": True}, "none left", 0.0, "used up", "the budget is used up: epsilon 3 of 4, after step 60"),
}


@pytest.mark.parametrize("case", STATES)
def test_states(case):
    meta, column, idle, state, text = STATES[case]
    if case == "no step":
        found = judge({**META, **meta}, {"epsilon": column}, idle)
    else:
        changed = {"remaining_steps": constant(0)} if column else {}
        found = judge({**META, **meta}, curves(**changed), idle)
    assert (found.state, found.verdicts[0].text) == (state, text)


def test_ended_without_a_budget():
    found = judge({**META, "ended": True}, curves(remaining_steps=None), None)
    assert found.verdicts[0].text == "ended after step 60"


@pytest.mark.parametrize(("meta", "epsilon"), [({"private": False}, 1.0), ({}, "infinity"), ({"private": "yes"}, 1.0)])
def test_a_run_that_is_not_private(meta, epsilon):
    assert ("bad", "not private: no finite epsilon holds") in said({"epsilon": constant(epsilon)}, {**META, **meta})


def test_an_unreadable_record_is_not_judged():
    assert judge({"unreadable": "..."}, curves()).verdicts == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.88] * 48 + [0.75] * 12, "clip rate below its band for 12 steps: C is larger than wanted (0.75 ± 0.02, target 0.9)"),
        ([0.75] * 59 + [0.79], "clip rate below its band for 60 steps: C is larger than wanted (0.79 ± 0.02, target 0.9)"),
        ([0.75] * 59 + [0.8], "C follows the norms: clip rate 0.80 ± 0.02, target 0.9"),
        ([0.88] * 59 + [0.7], "clip rate below its band for 1 step: C is larger than wanted (0.70 ± 0.02, target 0.9)"),
    ],
)  # fmt: skip
def test_the_clip_rate_and_its_band(values, text):
    assert said({"noisy_clip_rate_mean": [STEPS, values]})[1][1] == text


def test_a_clip_rate_above_its_band_and_a_band_that_is_not_written():
    band = {"target_clip_rate": constant(0.2), "clip_rate_low": None, "clip_rate_high": None}
    assert said({**band, "noisy_clip_rate_mean": constant(0.31)})[1] == (
        "warning", "clip rate above its band for 60 steps: C is smaller than wanted (0.31 ± 0.02, target 0.2)")  # fmt: skip
    assert said({**band, "noisy_clip_rate_mean": constant(0.29)})[1][0] == "good"


def test_the_step_numbers_count_and_not_the_points_that_were_sent():
    steps = [1, 100, 200, 300]
    found = said({"noisy_clip_rate_mean": [steps, [0.9, 0.7, 0.7, 0.7]]})
    assert "for 201 steps" in found[1][1]


def test_a_fixed_c_stays_and_a_noisy_rate_is_not_judged():
    assert said({"max_grad_norm": constant(1.0)})[1][1].startswith("C stays at 1: clip rate 0.88")
    noise = {"noisy_clip_rate_mean_std": [[1], [0.2]]}
    assert said(noise)[1] == ("note", "the clip rate is too noisy to say whether C follows the norms (0.9 ± 0.2)")
    assert said({"target_clip_rate": None})[1] == ("note", "clip rate 0.88 ± 0.02")
    without = {"noisy_clip_rate_mean": None, "noisy_clip_rate_mean_std": None}
    assert [text for _, text in said(without) if "clip" in text] == []


@pytest.mark.parametrize(
    ("end", "level", "text"),
    [
        (2.0, "good", "noisy loss fell from 3.0 ± 0.1 to 2.0 ± 0.1"),
        (2.6, "note", "no change of the noisy loss beyond its noise: -0.4 ± 0.1"),
        (3.5, "warning", "noisy loss rose from 3.0 ± 0.1 to 3.5 ± 0.1"),
    ],
)
def test_the_loss_is_compared_with_its_noise(end, level, text):
    assert said({"noisy_loss_mean": [STEPS, [3.0] * 59 + [end]]})[2] == (level, text)


@pytest.mark.parametrize(("count", "judged"), [(2 * WINDOW - 1, False), (2 * WINDOW, True)])
def test_the_loss_is_compared_only_between_means_that_share_no_step(count, judged):
    steps = STEPS[:count]
    assert (len(said({"noisy_loss_mean": [steps, [3.0] * count]})) == 3) is judged


def test_values_that_are_no_numbers_are_passed_over():
    odd = {name: constant(None) for name in ("noisy_clip_rate_mean", "noisy_loss_mean")}
    assert said(odd) == [("good", "running, step 60")]


def test_files_tell_how_long_a_run_has_been_silent(tmp_path):
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "events.out.tfevents.1"
    file.write_text("")
    os.utime(file, (1000, 1000))
    idle = Idle(str(tmp_path), clock=lambda: 1200.0)
    assert idle.seconds("run", 1) == 200
    assert idle.seconds("gone", 1) == 0


@pytest.mark.parametrize("logdir", [None, "", "/nowhere"])
def test_without_files_a_run_is_silent_since_its_curves_grew(logdir):
    now = [0.0]
    idle = Idle(logdir, clock=lambda: now[0])
    found = []
    for now[0], newest in ((0, 1), (100, 1), (150, 2), (400, 2)):
        found.append(idle.seconds("run", newest))
    assert found == [0, 100, 0, 250]
