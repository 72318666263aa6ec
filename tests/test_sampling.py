"""Draws and their price: the rate that is accounted is the rate that was drawn, whatever the loop does."""

import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from helpers import classifier, dataset, loader, loss_of, train
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler

from opacus_ac import PrivacyEngine
from opacus_ac.data import constant_like, private_loader
from opacus_ac.errors import SamplingWarning
from opacus_ac.randomness import SecretStream, SeededStream
from opacus_ac.sampling import BatchSizes

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")


def seeded(seed=0):
    return SeededStream(torch.Generator().manual_seed(seed))


def private(**kwargs):
    model = classifier()
    engine = PrivacyEngine()
    data_loader = kwargs.pop("data_loader", None) or loader(64, 16)
    arguments = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **kwargs}
    made = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=data_loader, **arguments
    )
    return (engine, *made)


@pytest.mark.statistical
@pytest.mark.parametrize("make", [SecretStream, seeded])
def test_every_record_is_drawn_independently_with_the_stated_rate(make):
    """400 passes x 4 batches, N = 64, q = 0.24: per-record counts and pair covariance within 4.5 sigma."""
    data = DataLoader(list(range(64)), batch_size=15)
    private_batches = private_loader(data, poisson=True, stream=make())
    drawn = np.zeros((2000, 64))
    for row, batch in enumerate(b for _ in range(400) for b in private_batches):
        if private_batches.plan.current().records:
            drawn[row, batch.numpy()] = 1
    rate = 15 / 64
    assert abs(drawn.mean() - rate) < 4.5 * math.sqrt(rate * (1 - rate) / drawn.size)
    assert np.all(np.abs(drawn.mean(0) - rate) < 4.8 * math.sqrt(rate * (1 - rate) / 2000))
    correlation = np.corrcoef(drawn.T)[np.triu_indices(64, 1)]
    assert np.abs(correlation).max() < 5.5 / math.sqrt(2000)
    sizes = drawn.sum(1)
    assert sizes.var() == pytest.approx(64 * rate * (1 - rate), rel=0.15)


@pytest.mark.parametrize(
    ("records", "batch_size", "drop_last"), [(50, 30, False), (50, 30, True), (64, 16, False), (10, 10, False)]
)
def test_the_rate_is_batch_size_over_records(records, batch_size, drop_last):
    """Opacus uses 1 / len(loader): 0.5 (or 1.0 with drop_last) for 30 of 50 records."""
    engine, model, optimizer, batches = private(data_loader=loader(records, batch_size, drop_last=drop_last))
    assert batches.sample_rate == batch_size / records
    train(model, optimizer, batches)
    assert engine.accountant.history == [(1.0, batch_size / records, len(batches))]
    assert optimizer.released.expected_batch_size == batch_size


def test_schedule_changes_rate_denominator_and_account():
    engine, model, optimizer, batches = private(batch_size_schedule=[8, 8, 16, 32])
    seen = []
    for _ in range(2):
        for batch in batches:
            train(model, optimizer, [batch])
            seen.append((optimizer.released.sample_rate, optimizer.released.expected_batch_size))
    sizes = [8, 8, 16, 32, 32, 32, 32, 32]
    assert seen == [(b / 64, b) for b in sizes]
    assert engine.accountant.history == [(1.0, 8 / 64, 2), (1.0, 16 / 64, 1), (1.0, 0.5, 5)]


def test_a_batch_that_is_skipped_is_not_charged_and_does_not_shift_the_rates():
    engine, model, optimizer, batches = private(batch_size_schedule=lambda step: 8 * (step + 1))
    for i, batch in enumerate(batches):
        if i != 1:
            train(model, optimizer, [batch])
    assert [q for _, q, _ in engine.accountant.history] == [8 / 64, 24 / 64, 32 / 64]


def test_two_steps_on_one_batch_lose_the_amplification():
    engine, model, optimizer, batches = private()
    batch = next(iter(batches))
    train(model, optimizer, [batch])
    with pytest.warns(SamplingWarning, match="sample\\s+rate 1"):
        train(model, optimizer, [batch])
    assert engine.accountant.history == [(1.0, 0.25, 1), (1.0, 1.0, 1)]
    assert any("unknown origin" in w for w in engine.privacy_report(1e-3).warnings)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", [None, 4])
def test_workers_and_splits_keep_draws_and_batches_together(workers, split):
    data = DataLoader(list(range(64)), batch_size=8, num_workers=workers)
    batches = private_loader(data, poisson=True, stream=seeded(), max_physical_batch_size=split)
    logical, records = set(), 0
    for batch in batches:
        draw = batches.plan.current()
        assert draw.records in (0, len(batch)) if draw.records != len(batch) else True
        assert split is None or len(batch) <= split
        logical.add(draw.batch)
        records += draw.records
        batches.plan.consume()
    assert len(logical) == len(batches) == 8
    assert 30 < records < 100


def test_opacus_batch_memory_manager_keeps_working():
    """Same draws, split by Opacus: same weights and the same account as without it."""
    results = []
    for manage in (False, True):
        engine, model, optimizer, batches = private(
            noise_multiplier=0.5, noise_generator=torch.Generator().manual_seed(3)
        )
        if manage:
            with BatchMemoryManager(data_loader=batches, max_physical_batch_size=3, optimizer=optimizer) as managed:
                for batch in managed:
                    loss_of(model, batch).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        else:
            train(model, optimizer, batches)
        assert optimizer.steps_taken == 4
        assert engine.accountant.history == [(0.5, 0.25, 4)]
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_opacus_batch_memory_manager_gives_an_empty_batch_no_weight():
    _, model, optimizer, batches = private(
        data_loader=loader(200, 1), noise_multiplier=0.0, noise_generator=torch.Generator().manual_seed(3)
    )
    zero = 0
    with BatchMemoryManager(data_loader=batches, max_physical_batch_size=3, optimizer=optimizer) as managed:
        for batch in managed:
            draw = optimizer.plan.current()
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            if draw.records == 0:
                zero += 1
                assert all(float(p.grad.abs().max()) == 0 for p in model.parameters())
    assert zero > 20


@pytest.mark.parametrize("arguments", [{"max_physical_batch_size": 4}, {"batch_size_schedule": [8, 16]}])
def test_batch_memory_manager_over_a_loader_that_splits_already_is_refused(arguments):
    _, _, optimizer, batches = private(**arguments)
    with (
        BatchMemoryManager(data_loader=batches, max_physical_batch_size=3, optimizer=optimizer) as managed,
        pytest.raises(ValueError, match="max_physical_batch_size in make_private"),
    ):
        next(iter(managed))


def test_a_physical_batch_that_is_skipped_is_an_error():
    _, _, _, batches = private(max_physical_batch_size=2)
    with pytest.raises(RuntimeError, match="physical batch"):
        for _ in batches:
            pass


def test_an_interrupted_logical_batch_is_dropped_and_not_added_to_the_next():
    """Its records may be drawn again: counted twice they would move the release by twice the sensitivity."""

    def step_of(interrupt):
        _, model, optimizer, batches = private(
            data_loader=loader(64, 64), max_physical_batch_size=16, noise_multiplier=0.0, clip_policy="fixed"
        )
        if interrupt:
            for batch in batches:
                train(model, optimizer, [batch])
                break
        for batch in batches:
            train(model, optimizer, [batch])
        return torch.cat([p.grad.reshape(-1) for p in model.parameters()]), optimizer.released.histogram.counts.sum()

    (plain, records), (interrupted, records_after) = step_of(False), step_of(True)
    torch.testing.assert_close(plain, interrupted)
    assert records == pytest.approx(records_after) == pytest.approx(64)


@pytest.mark.parametrize("how", ["halves in one backward", "first half only"])
def test_a_batch_that_is_taken_apart_is_refused(how):
    """Opacus adds up record i of both halves as if they were one record: clipped once, they are two people."""
    _, model, optimizer, batches = private(data_loader=loader(64, 64))
    inputs, targets = next(iter(batches))
    first, second = (inputs[:32], targets[:32]), (inputs[32:], targets[32:])
    loss = loss_of(model, first) + (loss_of(model, second) if how.startswith("halves") else 0)
    loss.backward()
    with pytest.raises(ValueError, match="Pass each batch through the model whole"):
        optimizer.step()


def test_shuffled_batches_never_get_the_poisson_epsilon():
    engine, model, optimizer, batches = private(poisson_sampling=False, data_loader=loader(64, 16, shuffle=True))
    poisson_engine, poisson_model, poisson_optimizer, poisson_batches = private()
    for _ in range(3):
        train(model, optimizer, batches)
        train(poisson_model, poisson_optimizer, poisson_batches)
    assert engine.accountant.history == [(1.0, 1.0, 3)]
    assert engine.get_epsilon(1e-3) > 1.3 * poisson_engine.get_epsilon(1e-3)
    assert "zero-out" in engine.privacy_report(1e-3).adjacency


def test_a_pass_that_is_broken_off_costs_a_whole_pass():
    engine, model, optimizer, batches = private(poisson_sampling=False, data_loader=loader(64, 16, shuffle=True))
    for _ in range(3):
        train(model, optimizer, [next(iter(batches))])
    assert engine.accountant.history == [(1.0, 1.0, 3)]


def test_shuffled_batches_under_batch_memory_manager_are_charged_per_pass():
    engine, model, optimizer, batches = private(poisson_sampling=False, data_loader=loader(64, 16, shuffle=True))
    for _ in range(2):
        with BatchMemoryManager(data_loader=batches, max_physical_batch_size=5, optimizer=optimizer) as managed:
            train(model, optimizer, managed)
    assert optimizer.steps_taken == 8
    assert engine.accountant.history == [(1.0, 1.0, 2)]


def test_a_loader_that_is_poisson_already_keeps_its_rate():
    _, _, _, batches = private(data_loader=DPDataLoader.from_data_loader(loader(64, 16)))
    assert (batches.sample_rate, len(batches)) == (0.25, 4)
    again = private_loader(batches, poisson=True, stream=seeded())
    assert (again.sample_rate, len(again)) == (0.25, 4)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


class Odd(RandomSampler):
    pass


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: DataLoader(d, sampler=WeightedRandomSampler([1.0] * 64, 64), batch_size=8), "WeightedRandomSampler"),
        (lambda d: DataLoader(d, sampler=RandomSampler(d, replacement=True), batch_size=8), "RandomSampler"),
        (lambda d: DataLoader(d, sampler=RandomSampler(d, num_samples=200), batch_size=8), "RandomSampler"),
        (lambda d: DataLoader(d, sampler=Odd(d), batch_size=8), "Odd"),
        (lambda d: DataLoader(d, batch_sampler=[[0, 1], [0, 1]]), "list"),
        (lambda d: DataLoader(d, batch_size=None), "batch_size"),
        (lambda d: DataLoader(Endless()), "IterableDataset"),
    ],
)
def test_samplers_without_a_bound_are_refused(poisson, make, message):
    with pytest.raises(ValueError, match=message):
        private_loader(make(dataset(64)), poisson=poisson, stream=seeded())


@pytest.mark.parametrize(
    ("size", "schedule", "message"),
    [
        (65, None, "exceed"),
        (8, [], "empty"),
        (8, [8, 65], "step 1"),
        (8, lambda step: 0, "step 0"),
        (8, [math.nan], "nan"),
    ],
)
def test_rates_outside_zero_and_one_are_refused(size, schedule, message):
    with pytest.raises(ValueError, match=message):
        BatchSizes(64, size, schedule)


def test_stand_in_has_the_structure_without_the_content():
    Pair = namedtuple("Pair", "a b")
    batch = {"x": torch.ones(1, 3), "ids": [torch.ones(1, 2, dtype=torch.long)], "text": ["secret"], "n": 3}
    stand_in = constant_like({**batch, "pair": Pair(torch.ones(1), None)})
    assert stand_in["x"].shape == (1, 3)
    assert float(stand_in["x"].sum()) == 0
    assert stand_in["text"] == [""]
    assert (stand_in["n"], stand_in["pair"].b) == (0, None)
    with pytest.raises(ValueError, match="stand-in"):
        constant_like({"x": object()})


def test_a_forked_child_draws_its_own_noise():
    stream = SecretStream()
    before = stream.normal(4)
    stream._pid -= 1  # as after a fork
    assert not torch.equal(before, stream.normal(4))
    assert stream.state_dict() == {}
