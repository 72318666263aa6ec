"""Several processes take the same step as one: DDP, FSDP2 and hybrid sharding on two to four gloo ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import distributed_cases
import pytest
import torch
from distributed_cases import difference
from distributed_launch import run

PARITY = {
    2: ["ddp_tied", "fsdp_tied", "fsdp_frozen", "fsdp_checkpointed", "ddp_checkpointed", "fsdp_gpt2", "fsdp_bitnet", "fsdp_mamba", "leaves_tied", "ddp_mixtral", "fsdp_mixtral", "fsdp_experts", "ddp_auto", "fsdp_auto"],
    3: ["ddp_untied", "fsdp_untied", "leaves_untied"],
    4: ["ddp_tied", "fsdp_tied", "hybrid_tied", "hybrid_auto"],
}  # fmt: skip
CASES = [f"{world}:{case}" for world, cases in PARITY.items() for case in cases]
ROLES = {"ddp": "ddp", "fsdp": "fsdp2", "leaves": "fsdp2", "hybrid": "hsdp"}
# They compute in float32 whatever the type of their weights is: BitNet's quantisers, Mamba's scan, transformers' norms.
TOLERANCE = {"bitnet": 1e-6, "mamba": 1e-6, "mixtral": 1e-6, "experts": 1e-6}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return run(["2:low_precision", *CASES], folder)


@cache
def alone(kind: str) -> dict[str, Any]:
    return distributed_cases.single(kind)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_six_steps_are_those_of_one_process(results, case):
    layout, kind = case.split(":")[1].split("_")
    expected = alone(kind)
    tolerance = TOLERANCE.get(kind, 1e-12)
    for got in results[case]:
        assert got["role"] == ROLES[layout]
        assert difference(got["weights"], expected["weights"]) < tolerance
        assert difference(got["average"], expected["average"]) < tolerance
        # Before, with, and after the averaged weights.
        assert difference(got["outputs"], expected["outputs"]) < 10 * tolerance
        assert torch.equal(got["outputs"]["a"], got["outputs"]["c"])
        assert not torch.equal(got["outputs"]["a"], got["outputs"]["b"])
        assert got["history"] == expected["history"]
        for mine, theirs in zip(got["steps"], expected["steps"], strict=True):
            # Counts are added as integers, so C is that of one process to the last bit.
            assert mine["bound"] == theirs["bound"]
            assert mine["counts"] == theirs["counts"]
            assert mine["multiplier"] == theirs["multiplier"]
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=tolerance)


def test_the_draws_of_the_parity_runs_have_every_hard_case():
    """Uneven ranks, more than one physical batch, a rank without records, and no record at all."""
    sizes = [len(draw) for draw in distributed_cases.DRAWS]
    assert 0 in sizes
    assert any(0 < size < 4 for size in sizes)
    assert any(-(-size // 4) > 3 or (size > 3 and size % 4) for size in sizes)
    assert any(-(-size // world) > 3 for size in sizes for world in (2, 3))


@pytest.mark.slow
def test_ranks_agree_to_the_last_bit(results):
    for case in CASES:
        first, *others = results[case]
        for got in others:
            assert got["steps"] == first["steps"]
            assert all(torch.equal(got["weights"][name], weight) for name, weight in first["weights"].items())


@pytest.mark.slow
def test_bfloat16_shards_are_float32_and_gradients_close(results):
    """The gathered weights are rounded to 8 bits: relative error of a few percent, types of the shards kept."""
    expected = distributed_cases.first_gradient(distributed_cases.language_model(dtype=torch.float32))
    for got in results["2:low_precision"]:
        assert got["dtypes"] == {"torch.float32"}
        error = (got["gradient"] - expected["gradient"]).norm() / expected["gradient"].norm()
        assert 1e-4 < error < 0.05
