"""Sequences of what people do, held against what was really released: the test that finds the next fault.

Four hundred seeded sequences here (``OPACUS_AC_SEQUENCES``; 2,000 in CI); more of them by ``python tests/guarantee/explore.py``.
"""

import os
import random
from functools import partial

import pytest
import test_targets as targets
import test_transaction as battery
from actions import ACTIONS, SITES, World, draw_config, draw_sequence, play
from explore import examine
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from neighbour import check_without
from planted import FAULTS, first_found
from reference import RECORDS, NoiseTally

SEQUENCES = int(os.environ.get("OPACUS_AC_SEQUENCES", 400))
CHUNKS = 8
# Shortening what is found takes minutes, so it is for those who look at a failure; explore.py --shrink is quicker.
PHASES = tuple(Phase) if os.environ.get("OPACUS_AC_SHRINK") else (Phase.generate,)
PLAIN = {
    "mode": "bk", "sampling": "poisson", "schedule": "none", "physical": None, "loop": "own", "policy": "percentile",
    "ledger": False, "target": None, "noise": 1.0, "C": 1.0, "batch_size": 3, "reduction": "mean", "lr_control": True,
    "inner": "sgd", "accountant": "vpld", "adapter": "trained", "left_out": frozenset(),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_sequences_hold(chunk):
    tally, outcomes = NoiseTally(), {}
    for seed in range(chunk * SEQUENCES // CHUNKS, (chunk + 1) * SEQUENCES // CHUNKS):
        for outcome, count in examine(seed, tally).items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
    tally.check()
    if SEQUENCES >= 2000:  # sequences that do nothing would hold too
        for outcome in (
            "cycle:done",
            "again:done",
            "old:done",
            "cycle:Injected",
            "again:ValueError",
            "load:done",
            "replay:moved",
        ):
            assert outcomes.get(outcome, 0) >= 5, f"{outcome}: {outcomes}"


WITHIN = min(SEQUENCES, 400)
BATTERY = {
    "a pass is marked as paid before its charge (A1)": battery.test_a_refused_first_step_does_not_pay_for_its_pass,
    "a batch is taken for the one in hand whatever it is (A5)": partial(
        battery.test_a_kept_batch_is_known_although_all_batches_have_one_size, {"sampling": "fixed_size"}, False
    ),
    "records of a failed step stay in the sums (B5)": partial(
        battery.test_a_retry_of_a_step_that_failed_before_its_release_counts_nobody_twice, "hook", 3, "hooks"
    ),
    "a target is held by the accountant's figure alone": partial(
        targets.test_what_one_engine_spent_before, "vpld", "other noise"
    ),
}
"""Faults that few random sequences meet (the first are numbers 268, 563 and 667), and the tests of the battery that find them."""


def test_every_fault_can_be_planted():
    """What a fault changes is where it was: this is seen at once, not only in the long runs."""
    for fault in FAULTS:
        with fault.planted():
            pass


@pytest.mark.slow
@pytest.mark.parametrize("planted", [f for f in FAULTS if f.name not in BATTERY], ids=lambda fault: fault.name)
def test_every_planted_fault_is_found_within_the_sequences(planted):
    """And is noticed as what it is: the charge that is missing, the record that is there twice, ..."""
    found = first_found(planted, WITHIN, examine)
    assert found is not None, f"not found in {WITHIN} sequences"
    assert found[1].kind in planted.kinds, found


@pytest.mark.parametrize("name", BATTERY)
def test_every_other_planted_fault_is_found_by_the_battery(name):
    (planted,) = [f for f in FAULTS if f.name == name]
    BATTERY[name]()
    with planted.planted(), pytest.raises((AssertionError, ValueError, RuntimeError)):
        BATTERY[name]()


@pytest.mark.parametrize("mode", ["bk", "hooks", "functorch"])
@pytest.mark.parametrize("policy", ["flat", "percentile", "geometric", "automatic"])
@pytest.mark.parametrize("sampling", ["poisson", "truncated_poisson", "fixed_size", "shuffled"])
@pytest.mark.parametrize(("physical", "inner"), [(None, "sgd"), (2, "sgd"), (None, "auto")])
def test_the_ordinary_loop_is_done_and_holds(mode, policy, sampling, physical, inner):
    """What everybody does is neither refused nor flagged, and a record moves releases by no more than it may."""
    config = {**PLAIN, "mode": mode, "policy": policy, "sampling": sampling, "physical": physical, "inner": inner}
    actions = [("cycle", 0)] * 5 + [("save",), ("cycle", 0), ("load", True), ("cycle", 0), ("report", True)]
    world = play(config, actions, seed=3)
    assert {outcome.split(":")[1] for outcome in world.outcomes} == {"done"}
    assert len(world.reference.releases) >= 6
    assert any(release.records for release in world.reference.releases)
    moved = [check_without(world, actions, 3, record) for record in range(RECORDS)]
    if physical is None:  # else the loop itself has other parts without some records
        assert max(moved) > 0.9


def test_a_sequence_can_be_played_again():
    """Draws and actions follow from the seed alone, so that what is found can be looked at."""
    config, actions = draw_sequence(7)
    first, second = (play(config, actions, 7) for _ in range(2))
    assert first.outcomes == second.outcomes
    assert [d.order for d in first.reference.draws] == [d.order for d in second.reference.draws]


@pytest.mark.parametrize("site", SITES)
def test_every_point_of_failure_is_reached(site):
    """An exception that is asked for comes, and the step after it goes well."""
    config = {**PLAIN, "ledger": True, "policy": "geometric"}
    world = play(config, [("cycle", 0), ("fail_at", site), ("cycle", 0), ("cycle", 0)])
    wanted = "OSError" if site == "fsync" else "Injected"
    assert world.outcomes[2] == f"cycle:{wanted}"
    assert world.outcomes[3] == "cycle:done"


class Machine(RuleBasedStateMachine):
    """The same actions, chosen by hypothesis, which shortens what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.world = None

    @initialize(seed=st.integers(0, 2**32 - 1))
    def build(self, seed):
        self.world = World(draw_config(random.Random(seed)), seed=seed)
        self.opened = self.world.open()
        self.opened.__enter__()

    def teardown(self):
        if self.world is not None:
            self.opened.__exit__(None, None, None)


def _rule(name):
    def act(self, seed):
        self.world.do(name, *ACTIONS[name][1](random.Random(seed)))

    act.__name__ = name
    return rule(seed=st.integers(0, 2**16))(act)


for _name in ACTIONS:
    setattr(Machine, f"rule_{_name}", _rule(_name))


def test_the_state_machine_holds():
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60, stateful_step_count=12, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=PHASES,
        ),
    )  # fmt: skip
