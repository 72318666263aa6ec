"""Zeroth-order steps on several gloo ranks: the numbers of one process, one noise, and what stops a run."""

from __future__ import annotations

import math
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import distributed_zeroth as cases
import pytest
import torch
from distributed_cost import step_cost
from distributed_launch import run
from distributed_zeroth_guards import half_frozen, narrow
from zeroth import by_hand, weights

from opacus_ac.budget import PrivacyLedger
from opacus_ac.zeroth_order import ZerothOrderSettings

pytestmark = pytest.mark.filterwarnings(
    "ignore::opacus_ac.errors.NotPrivateWarning", "ignore:torch.distributed is disabled:UserWarning"
)

PARITY = [f"{world}:zo_{kind}" for world in (2, 3) for kind in cases.SETTINGS]
NOISE = ["2:zo_noise", "3:zo_noise", "2:zo_noise_laplace", "3:zo_noise_laplace"]
EVERYWHERE = ["2:zo_noise_everywhere", "2:zo_noise_laplace_everywhere"]
SAVES = ["2:zo_save_staged", "2:zo_save_adam"]
RESUMES = ["1:zo_resume_staged", "1:zo_resume_adam", "3:zo_resume_staged", "3:zo_resume_adam"]
REFUSED = {
    "sharded": r"zeroth_order does not work with several processes \(fsdp2\).*Leave fully_shard out",
    "frozen shard": "0.weight is sharded and frozen, while nothing that is trained is sharded",
    "given seeds": "differ in direction_seed: rank 0 has 0, rank 1 1",
    "one given seed": "differ in direction_seed: rank 0 has None, rank 1 3",
    "settings": "differ in zeroth_order: ",
}
STOPPED = {
    "direction seed": "not in the same step: direction seed is 7 on rank 0 and 8 on rank {last}",
    "a bit of a weight": "not in the same step: checksum of the trained weights is ",
    "mask": "not in the same step: checksum of the trained weights is ",
    "bound": "not in the same step: max_grad_norm is ",
    "empty rank that skips": r"not in the same step: batch of the loader is \d on rank 0 and \d on rank {last}",
    "stand-in that is not measured": "not in the same step: checksum of the trained weights is ",
}
STOPS = ["2:zo_planted", "3:zo_planted"]
OTHERS = ["2:zo_own_seed", "2:zo_exchanged", "2:zo_refusals", *STOPS, "2:zo_budget", "2:zo_die_in_closure"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder) -> dict[str, list[Any]]:
    first = sorted([*PARITY, *NOISE, *EVERYWHERE, *OTHERS, *SAVES], key=lambda case: case.split(":")[0])
    return run([*first, *RESUMES], folder)


@cache
def alone(kind: str) -> dict[str, Any]:
    return cases.trained(kind)


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


# ---------------------------------------------------------------- the numbers of one process


@pytest.mark.slow
@pytest.mark.parametrize("case", PARITY)
def test_six_steps_are_those_of_one_process(results, case):
    expected = alone(case.split("_")[1])
    for got in results[case]:
        assert got["role"] == "ddp"
        assert difference(got["weights"], expected["weights"]) < 1e-12
        assert difference(got["average"], expected["average"]) < 1e-12
        assert got["history"] == expected["history"]
        assert got["stage"] == expected["stage"]
        for mine, theirs in zip(got["steps"], expected["steps"], strict=True):
            for same in ("bound", "counts", "seeds"):
                assert mine[same] == theirs[same]
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-12)


def test_the_runs_move_the_weights_and_enter_a_second_stage():
    start = dict(cases.classifier().named_parameters())
    for kind in ("plain", "staged", "adam", "laplace"):
        assert difference(alone(kind)["weights"], start) > 1e-4
    assert alone("staged")["stage"] == 1
    assert len({step["bound"] for step in alone("plain")["steps"]}) > 3


@pytest.mark.slow
def test_ranks_agree_to_the_last_bit(results):
    """C, directions, and the checksum of the weights after each step; the weights themselves at the end."""
    for case in (*PARITY, *RESUMES):
        first, *others = results[case]
        for got in others:
            assert got["steps"] == first["steps"]
            assert all(torch.equal(got["weights"][name], weight) for name, weight in first["weights"].items())


@pytest.mark.slow
def test_ranks_take_the_direction_seed_of_the_first(results):
    first, second = results["2:zo_own_seed"]
    assert first == second
    assert first[0] != first[1]


# ---------------------------------------------------------------- noise


def score(case: str, noise: torch.Tensor) -> float:
    """Return how many standard errors the spread of ``noise`` is from what it has to be.

    n = 4000 Gaussian values, whose mean square has a relative std of sqrt(2 / n), or 2000 Laplace values, whose mean modulus
    has one of 1 / sqrt(n). Draws are seeded. 6.1 standard errors are exceeded with probability 1e-9.
    """
    scale = cases.MULTIPLIER * cases.BOUND
    if "laplace" in case:
        return (float(noise.abs().mean()) / scale - 1) * math.sqrt(noise.numel())
    return (float(noise.square().mean()) / scale**2 - 1) * math.sqrt(noise.numel() / 2)


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("case", NOISE)
def test_noise_is_added_once_and_not_shared(results, case):
    ranks = results[case]
    assert all(torch.equal(rank, ranks[0]) for rank in ranks)
    assert abs(score(case, ranks[0])) < 6.1
    parts = ranks[0].chunk(len(ranks))
    for part in parts:
        assert abs(score(case, part)) < 6.1
    size = min(part.numel() for part in parts)
    shared = torch.corrcoef(torch.stack([part[:size] for part in parts])) - torch.eye(len(parts))
    assert float(shared.abs().max()) * math.sqrt(size) < 6.1


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERYWHERE)
def test_noise_of_every_rank_is_seen(results, case):
    """The planted bug: twice the variance, or 1.5 times the mean modulus."""
    assert score(case, results[case][0]) > 15


# ---------------------------------------------------------------- what is exchanged


@pytest.mark.slow
def test_a_step_exchanges_k_numbers_and_statistics_whatever_the_model(results):
    for got in results["2:zo_exchanged"]:
        assert got["small"] == got["large"]
        # The closures wait for nobody, so the number of their calls cannot keep a rank waiting.
        assert not any(measuring for _, _, measuring in got["small"])
        sizes = [(name, values) for name, values, _ in got["small"]]
        directions, bins = cases.BASE["num_directions"], 22
        assert sizes == [
            ("gather", 10 + bins + 1),  # whether one failed, place and constants, counts, and the bits of the loss sum
            ("on_first", 0),
            ("reduce_scatter", directions + 1),  # padded to two ranks
            ("all_gather", (directions + 1) // 2),
            ("agree", bins + 1),
            ("agree", 3),
        ]


@pytest.mark.slow
def test_the_cost_model_says_so(results):
    """A ring reduce-scatter sends (W - 1) / W of the numbers, of eight bytes each, and so does the all-gather."""
    for directions, world in ((64, 8), (5, 2)):
        cost = step_cost("zo", world=world, trained=directions)
        assert (cost.reduced, cost.returned) == (8 * directions * (world - 1) / world,) * 2
        assert cost.gathered == 0
    sizes = [name for name, _, _ in results["2:zo_exchanged"][0]["small"]]
    # What the first rank decided is sent as its length, then itself.
    assert len(sizes) - 2 + 1 == cost.messages


# ---------------------------------------------------------------- what stops a run


def test_the_checksum_sees_a_bit_a_mask_and_an_exchange():
    optimizer = by_hand(weights((3, 4), (5,), (0,), dtype=torch.float32))
    coordinates = optimizer.coordinates
    first, second, _ = coordinates.parameters
    seen = [coordinates.checksum()]
    with torch.no_grad():
        first[1, 2] = torch.nextafter(first[1, 2], first[1, 2] + 1)
        seen.append(coordinates.checksum())
        first[0, 0], first[0, 1] = first[0, 1].clone(), first[0, 0].clone()
        seen.append(coordinates.checksum())
        second[0] = -second[0]
        seen.append(coordinates.checksum())
    coordinates.indices[1] = torch.tensor([0, 3], dtype=torch.int32)
    seen.append(coordinates.checksum())
    coordinates.indices[1] = torch.tensor([0, 4], dtype=torch.int32)
    seen.append(coordinates.checksum())
    assert len(set(seen)) == len(seen)
    assert coordinates.checksum() == seen[-1]
    with torch.no_grad():  # where the weights lie in memory does not count
        second.data = torch.cat([torch.zeros(1), second])[1:]
    assert coordinates.checksum() == seen[-1]
    assert all(0 <= value < 2**63 for value in seen)


def test_ranks_with_parts_of_the_model_are_refused_by_hand_too():
    with pytest.raises(ValueError, match=r"reducer='fsdp2' with ZerothOrderDPOptimizer: it needs the whole model"):
        by_hand(reducer=SimpleNamespace(name="fsdp2", world=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_on_every_rank(results, name):
    for got in results["2:zo_refusals"]:
        assert got.keys() == REFUSED.keys()
        assert got[name].startswith("ValueError: ")
        assert re.search(REFUSED[name], got[name]), got[name]


@pytest.mark.slow
@pytest.mark.parametrize("case", STOPS)
@pytest.mark.parametrize("name", STOPPED)
def test_a_rank_that_does_something_else_stops_all(results, case, name):
    for got in results[case]:
        assert got.keys() == STOPPED.keys()
        assert got[name].startswith("ValueError: ")
        assert re.search(STOPPED[name].format(last=int(case[0]) - 1), got[name]), got[name]


@pytest.mark.slow
def test_a_budget_ends_on_all_ranks_before_weights_move(results, folder):
    first, second = results["2:zo_budget"]
    for got in (first, second):
        assert got["error"].startswith("PrivacyBudgetExceeded: the next step would reach epsilon")
        assert got["taken"] == 3
        assert got["epsilon"] == first["epsilon"] <= 4.0
        assert difference(got["weights"], first["weights"]) == 0
    assert len(PrivacyLedger(folder / "zo_budget0").charges) == 3
    assert not (folder / "zo_budget1").exists()


@pytest.mark.slow
def test_a_rank_that_dies_in_its_closure_stops_the_others(results, folder):
    left, dead = results["2:zo_die_in_closure"]
    assert dead is None
    assert left["error"].startswith("DistributedError: rank 0 could not exchange the counts of a step")
    assert left["taken"] == 3
    assert len(PrivacyLedger(folder / "zo_died0").charges) == 3


# ---------------------------------------------------------------- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMES)
def test_a_resumed_run_is_the_uninterrupted_one(results, case):
    """Two ranks saved; one and three go on, with seed, stage, mask and anchor."""
    expected = results[f"2:zo_save_{case.split('_')[-1]}"][0]
    for got in results[case]:
        assert difference(got["weights"], expected["weights"]) < 1e-12
        assert difference(got["average"], expected["average"]) < 1e-12
        assert got["history"] == expected["history"] == [(2.0, 4 / 24, 6)]
        assert got["stage"] == expected["stage"]
        for mine, theirs in zip(got["steps"], expected["steps"], strict=True):
            assert mine["seeds"] == theirs["seeds"]
            assert mine["bound"] == theirs["bound"]


def saved(folder, kind="staged", **options):
    made = engine, model, optimizer, loader = cases.prepare(kind, **options)
    cases.steps(model, optimizer, loader, cases.DRAWS[:3])
    engine.save_checkpoint(path=folder, module=model, optimizer=optimizer, folder=True)
    return made


@pytest.mark.parametrize("kind", ["plain", "staged", "laplace"])
def test_one_process_continues_from_such_a_folder_too(tmp_path, kind):
    _, model, optimizer, loader = saved(tmp_path / "run", kind)
    engine, other, again, batches = cases.prepare(kind, rank=1)
    engine.load_checkpoint(path=tmp_path / "run", module=other, optimizer=again)
    for mine, theirs in zip(again.coordinates.indices, optimizer.coordinates.indices, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    draws = cases.DRAWS[3:]
    assert cases.steps(other, again, batches, draws) == cases.steps(model, optimizer, loader, draws)
    assert again.stage == optimizer.stage


REFUSED_CHECKPOINTS = {
    "settings": ({"zeroth_order": ZerothOrderSettings(num_directions=3)}, "written with zeroth_order = "),
    "no zeroth order": ({"clipping": "flat", "zeroth_order": None}, "checkpoint was written with"),
    "other trained weights": ({"model": half_frozen()}, r"trained other parameters \(4, this one 2\)"),
    "another model": ({"model": narrow()}, "of another model: "),
}


@pytest.mark.parametrize("case", REFUSED_CHECKPOINTS)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_changes(tmp_path, case):
    options, words = REFUSED_CHECKPOINTS[case]
    saved(tmp_path / "run")
    engine, model, optimizer, _ = cases.prepare("staged", **options)
    before = cases.weights(model)
    with pytest.raises(ValueError, match=words):
        engine.load_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer)
    assert difference(cases.weights(model), before) == 0
    assert optimizer.steps_taken == 0
