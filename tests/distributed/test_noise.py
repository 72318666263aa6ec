"""Noise and draws of several processes: each coordinate is noised once, by its own rank, and each record is drawn once."""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import os
import pickle
from typing import Any

import distributed_noise
import numpy as np
import pytest
import torch
from distributed_launch import run

from opacus_ac.noise import SecretStream, SharedStream
from opacus_ac.noise.keys import SEED, KeyStream

NOISE = ["2:noise_ddp", "2:noise_fsdp", "3:noise_ddp", "3:noise_fsdp", "3:noise_seeded", "4:noise_hybrid"]
EVERYWHERE = ["2:noise_everywhere_ddp", "4:noise_everywhere_hybrid"]
STD = distributed_noise.MULTIPLIER * distributed_noise.BOUND
# n = 121505 weights; under the null the statistics below are standard normal. 6.1 is exceeded with probability 1e-9.
LIMIT = 6.1


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[Any]]:
    cases = [*NOISE, *EVERYWHERE, "3:noise_same_stream", "2:drawn", "3:drawn"]
    return run(sorted(cases, key=lambda case: case.split(":")[0]), tmp_path_factory.mktemp("ranks"))


def std_score(noise: torch.Tensor) -> float:
    """Return how many standard errors the variance of ``noise`` is from what it has to be (n > 1e5: normal)."""
    return (float(noise.square().mean()) / STD**2 - 1) * math.sqrt(noise.numel() / 2)


def correlations(parts: list[torch.Tensor]) -> list[float]:
    """Return the correlation of every two parts, in standard errors."""
    size = min(part.numel() for part in parts)
    pairs = itertools.combinations([part[:size] for part in parts], 2)
    return [float(torch.corrcoef(torch.stack(pair))[0, 1]) * math.sqrt(size) for pair in pairs]


def parts_of(case: str, ranks: list[Any]) -> list[torch.Tensor]:
    """Return what the ranks noised: their shards, or their stretches of the whole."""
    if "ddp" in case:
        return list(ranks[0]["whole"].chunk(len(ranks)))
    if "hybrid" in case:  # ranks 0 and 2 have one shard, 1 and 3 the other, and each noised half of it
        return [half for rank in ranks[:2] for half in rank["shard"].chunk(2)]
    return [rank["shard"] for rank in ranks]


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("case", NOISE)
def test_noise_is_added_once_and_not_shared(results, case):
    ranks = results[case]
    assert all(torch.equal(rank["whole"], ranks[0]["whole"]) for rank in ranks)
    assert ranks[0]["whole"].numel() == 121505
    assert abs(std_score(ranks[0]["whole"])) < LIMIT
    for part in parts_of(case, ranks):
        assert abs(std_score(part)) < LIMIT
    assert max(map(abs, correlations(parts_of(case, ranks)))) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERYWHERE)
def test_noise_of_every_rank_is_seen_in_the_std(results, case):
    """The planted bug adds W times the variance: 100 standard errors and more."""
    assert std_score(results[case][0]["whole"]) > 100


@pytest.mark.slow
def test_the_same_stream_on_all_ranks_is_seen_in_the_correlations(results):
    """Uneven shards put the streams out of step after the first layer, where the correlation is 1."""
    assert max(correlations(parts_of("fsdp", results["3:noise_same_stream"]))) > 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["secret", "seeded"])
def test_ranks_divide_one_draw(results, kind):
    """No record is on two ranks, and sizes differ by one at most."""
    for case in ("2:drawn", "3:drawn"):
        for batches in zip(*(rank[kind] for rank in results[case]), strict=True):
            records = [record for batch in batches for record in batch]
            assert len(set(records)) == len(records)
            sizes = [len(batch) for batch in batches]
            assert max(sizes) - min(sizes) <= 1


def union(ranks: list[Any], kind: str) -> list[list[int]]:
    return [sorted(r for batch in batches for r in batch) for batches in zip(*(x[kind] for x in ranks), strict=True)]


@pytest.mark.slow
def test_batches_are_the_same_whatever_the_number_of_ranks(results):
    alone = union([distributed_noise.drawn(0, 1)], "seeded")
    assert union(results["2:drawn"], "seeded") == union(results["3:drawn"], "seeded") == alone
    assert 0 < sum(map(len, alone)) < 37 * len(alone)


@pytest.mark.slow
@pytest.mark.statistical
def test_secret_draws_have_the_rate_and_differ_between_runs(results):
    """Two passes of 8 batches of 37 records at rate 5/37: n = 592 draws, mean 80, std 8.3; 6.1 std: 1e-9."""
    for case in ("2:drawn", "3:drawn"):
        total = sum(map(len, union(results[case], "secret")))
        assert abs(total - 592 * 5 / 37) < LIMIT * math.sqrt(592 * 5 / 37 * 32 / 37)
    # That two runs draw the same 16 batches has a probability far below 1e-100.
    assert union(results["2:drawn"], "secret") != union(results["3:drawn"], "secret")


# ---------------------------------------------------------------- the stream that ranks share


def test_shared_streams_of_one_seed_draw_alike_and_others_do_not():
    seed = os.urandom(SEED)
    one, same, other = SharedStream(seed), SharedStream(seed), SharedStream(os.urandom(SEED))
    for size in (1000, 7):
        drawn = one.uniform(size)
        assert torch.equal(drawn, same.uniform(size))
        assert not torch.equal(drawn, other.uniform(size))
    assert one.state_dict() == {}


def test_key_streams_stay_alike_when_they_take_a_new_key(monkeypatch):
    monkeypatch.setattr("opacus_ac.noise.keys._LIMIT", 1 << 20)
    seed = os.urandom(SEED)
    words = [np.empty(3 << 17, np.uint64) for _ in range(2)]
    for array in words:
        KeyStream(seed).fill(array)  # 3 MiB: two new keys
    assert (words[0] == words[1]).all()
    blocks = words[0].reshape(3, -1)
    assert not (blocks[0] == blocks[1]).any()


def test_key_streams_take_seeds_of_one_length():
    with pytest.raises(ValueError, match="has 48 bytes, got 3"):
        KeyStream(b"abc")


def test_a_shared_stream_makes_no_noise_and_no_copies():
    stream = SharedStream(os.urandom(SEED))
    for draw in (lambda: stream.normal(3), lambda: stream.add_normal([torch.zeros(3)], 1.0)):
        with pytest.raises(RuntimeError, match="the same on all of them"):
            draw()
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(stream)
    with pytest.raises(TypeError, match="cannot be copied"):
        pickle.dumps(stream)
    assert type(stream.fork(1)) is SecretStream


def test_a_forked_process_does_not_draw_what_the_ranks_share():
    stream = SharedStream(os.urandom(SEED))

    def draw(queue: Any) -> None:
        try:
            stream.uniform(1)
        except RuntimeError as error:
            queue.put(str(error))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=draw, args=(queue,))
    process.start()
    assert "draw in the process of the rank" in queue.get(timeout=30)
    process.join()
