"""Runs that were interrupted and resumed are one run: which are joined, which are not, and what is shown of them."""

import pytest

from opacus_ac.tensorboard.resumed import candidates, join, merge

META = {"version": 1, "target_epsilon": 8.0, "dataset_size": 64}
A = {**META, "first_step": 0, "first_bound": 1.0}
B = {**META, "first_step": 3, "first_bound": 0.4}
C = [[1, 2, 3, 4, 5], [1.0, 0.8, 0.6, 0.4, 0.3]]
LATER = [[4, 5, 6], [0.4, 0.35, 0.3]]


def test_a_resumed_run_is_joined_to_the_one_before():
    assert join({"a": A, "b": B}, ["b", "a"], {"a": C, "b": LATER}) == {"b": ["a"]}


def test_a_chain_of_three():
    third = {**META, "first_step": 6, "first_bound": 0.2}
    records = {"a": A, "b": {**B, "ended": True, "next_bound": 0.2}, "c": third}
    assert join(records, ["c", "b", "a"], {"a": C, "b": LATER}) == {"b": ["a"], "c": ["a", "b"]}


def test_of_two_runs_with_the_same_settings_c_tells_which_is_continued():
    other = [[1, 2, 3, 4], [1.0, 0.8, 0.65, 0.5]]
    records = {"a": A, "other": A, "b": B}
    assert join(records, ["b", "other", "a"], {"a": C, "other": other, "b": LATER}) == {"b": ["a"]}


def test_of_two_runs_that_fit_none_is_joined():
    fixed = [[1, 2, 3, 4], [1.0] * 4]
    records = {"a": A, "other": A, "b": {**B, "first_bound": 1.0}}
    bounds = {"a": fixed, "other": fixed, "b": [[4], [1.0]]}
    assert join(records, ["b", "other", "a"], bounds) == {}
    del records["other"]
    assert join(records, ["b", "a"], bounds) == {"b": ["a"]}


NOT_JOINED = {
    "started later": (A, B, ["a", "b"], C, LATER),
    "not resumed": (A, {**B, "first_step": 0}, ["b", "a"], C, LATER),
    "no record of it": (A, META, ["b", "a"], C, LATER),
    "other settings": ({**A, "dataset_size": 65}, B, ["b", "a"], C, LATER),
    "not so far": (A, B, ["b", "a"], [[1, 2], [1.0, 0.8]], LATER),
    "other C": (A, B, ["b", "a"], [[1, 2, 3, 4], [1.0, 0.8, 0.6, 0.5]], LATER),
    "other C at the end": ({**A, "ended": True, "next_bound": 0.5}, B, ["b", "a"], [[1, 2, 3], [1, 0.8, 0.6]], LATER),
    "resumed from the same step": ({**A, "first_step": 3}, B, ["b", "a"], LATER, LATER),
    "it has its own beginning": (A, B, ["b", "a"], C, C),
    "steps that are no numbers": (A, {**B, "first_step": "3"}, ["b", "a"], C, LATER),
}


@pytest.mark.parametrize("case", NOT_JOINED)
def test_other_runs_stay_apart(case):
    a, b, order, curve, later = NOT_JOINED[case]
    assert join({"a": a, "b": b}, order, {"a": curve, "b": later}) == {}


def test_other_folders_stay_apart_and_are_not_looked_at():
    records = {"x/a": A, "y/b": B, "y/a": A, "z": A}
    assert join(records, ["y/b", "x/a"], {"x/a": C, "y/b": LATER}) == {}
    assert candidates(records) == ["y/b", "y/a"]
    assert candidates({"x/a": A}) == []


def test_what_the_checkpoint_lacked_is_left_out():
    a = {"epsilon": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 99]], "old": [[1], [5]]}
    b = {"epsilon": [[3, 4, 5], [77, 4, 5]], "new": [[4], [6]]}
    assert merge([(0, a), (3, b)]) == {
        "epsilon": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]],
        "old": [[1], [5]],
        "new": [[4], [6]],
    }
