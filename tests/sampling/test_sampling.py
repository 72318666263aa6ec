"""Draws and their price: the rate that is accounted is the rate that was drawn, whatever the loop does."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers import classifier, dataset, loader, loss_of, train
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchMemoryManager
from scipy import stats
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler

from opacus_ac import PrivacyEngine
from opacus_ac.accounting import ADJACENCY, Event
from opacus_ac.budget import PrivacyLedger
from opacus_ac.errors import SamplingWarning
from opacus_ac.noise import SecretStream, SeededStream
from opacus_ac.sampling import BatchSizes, private_loader
from opacus_ac.sampling.delivery import tensors_of
from opacus_ac.sampling.plan import SAMPLING

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")


def seeded(seed=0):
    return SeededStream(torch.Generator().manual_seed(seed))


def private(**kwargs):
    model = classifier()
    engine = kwargs.pop("engine", None) or PrivacyEngine()
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
    private_batches = private_loader(data, sampling="poisson", stream=make())
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


def drawn_by(sampling, passes=500, batch_size=12, **kwargs):
    """0/1 matrix of who was in which batch: ``4 * passes`` batches of 48 records."""
    batches = private_loader(
        DataLoader(list(range(48)), batch_size=batch_size), sampling=sampling, stream=SecretStream(), **kwargs
    )
    drawn = np.zeros((passes * len(batches), 48))
    for row, batch in enumerate(b for _ in range(passes) for b in batches):
        if batches.plan.current().records:
            assert len(set(batch.tolist())) == len(batch)
            drawn[row, batch.numpy()] = 1
    return drawn


@pytest.mark.statistical
def test_fixed_size_batches_are_uniform_subsets():
    """2,000 batches of 12 of 48: every record (z < 4.8) and every pair (z < 5.5) as often as in a random subset."""
    drawn = drawn_by("fixed_size")
    assert (drawn.sum(1) == 12).all()
    assert np.abs(drawn.mean(0) - 0.25).max() < 4.8 * math.sqrt(0.25 * 0.75 / 2000)
    pairs = (drawn.T @ drawn / 2000)[np.triu_indices(48, 1)]
    both = 12 * 11 / (48 * 47)
    assert np.abs(pairs - both).max() < 5.5 * math.sqrt(both * (1 - both) / 2000)


@pytest.mark.statistical
def test_truncated_poisson_batches_are_poisson_batches_cut_at_random():
    """2,000 batches of rate 1/4 of 48, at most 13: sizes as min(Binomial, 13) (chi-square at 1e-6), records exchangeable."""
    drawn = drawn_by("truncated_poisson", max_batch_size=13)
    sizes = drawn.sum(1).astype(int)
    probabilities = stats.binom.pmf(np.arange(13), 48, 0.25)
    expected = np.append(probabilities, 1 - probabilities.sum()) * 2000
    observed = np.bincount(sizes, minlength=14)
    assert observed.size == 14
    usual = expected > 5
    statistic = ((observed - expected)[usual] ** 2 / expected[usual]).sum()
    assert stats.chi2.sf(statistic, usual.sum() - 1) > 1e-6
    full = drawn[sizes == 13]
    share = 13 / 48
    assert np.abs(full.mean(0) - share).max() < 4.8 * math.sqrt(share * (1 - share) / len(full))


@pytest.mark.parametrize("rate", [0.3, 1 / 3, 1e-6, 0.7, 1.0])
def test_a_record_is_never_drawn_more_often_than_is_accounted(rate):
    """A uniform draw is k / 2^53: the largest k below the rate must stay out unless k + 1 of 2^53 are accounted."""

    class Just:
        def uniform(self, size):
            return torch.full((size,), math.floor(rate * 2.0**53) / 2.0**53, dtype=torch.float64)

    data = DataLoader(list(range(4)), batch_size=4)
    batches = private_loader(data, sampling="poisson", stream=Just(), schedule=[4 * rate])
    assert batches.plan.sizes.rate(0) == rate
    assert next(batches.plan.current().records for _ in batches) == 0


@pytest.mark.parametrize("accountant", ["vrdp", "vpld"])
@pytest.mark.parametrize(
    ("arguments", "event"),
    [
        ({"sampling": "poisson"}, Event(1.0, 0.25)),
        ({"sampling": "fixed_size"}, Event(1.0, 0.25, "fixed_size")),
        (
            {"sampling": "truncated_poisson", "max_batch_size": 20},
            Event(1.0, 0.25, "truncated_poisson", dataset_size=64, max_batch_size=20),
        ),
        ({"sampling": "shuffled"}, Event(1.0, 1.0, "shuffled")),
    ],
)
def test_every_kind_is_charged_for_what_it_is(arguments, event, accountant, tmp_path):
    """Through the engine: the ledger has the event itself, replay gives the same epsilon, the report names the kind."""
    ledger = tmp_path / "ledger.jsonl"
    engine, model, optimizer, batches = private(engine=PrivacyEngine(accountant=accountant, ledger=ledger), **arguments)
    train(model, optimizer, batches)
    assert set(PrivacyLedger(ledger).charges) == {event}
    report = engine.privacy_report(1e-3)
    assert report.sampling == arguments["sampling"]
    assert report.adjacency == ADJACENCY[event.sampling]
    assert PrivacyEngine(accountant=accountant, ledger=ledger).get_epsilon(1e-3) == engine.get_epsilon(1e-3) > 0
    bounds = {kind: engine.accountant.__class__() for kind in ("own", "poisson")}
    bounds["own"].step_event(event)
    bounds["poisson"].step_event(Event(1.0, event.sample_rate))
    assert bounds["own"].get_epsilon(1e-3) >= bounds["poisson"].get_epsilon(1e-3) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling": "weighted"}, "sampling='weighted'"),
        ({"sampling": "poisson", "poisson_sampling": False}, "Give one"),
        ({"sampling": "truncated_poisson"}, "max_batch_size"),
        ({"sampling": "poisson", "max_batch_size": 20}, "max_batch_size"),
        ({"sampling": "truncated_poisson", "max_batch_size": 0}, "whole number >= 1"),
        ({"sampling": "fixed_size", "batch_size_schedule": [8.5]}, "whole number"),
        ({"sampling": "shuffled", "batch_size_schedule": [8]}, "batch_size_schedule"),
        ({"sampling": "fixed_size", "engine": "rdp"}, "vrdp"),
        ({"sampling": "truncated_poisson", "max_batch_size": 20, "engine": "prv"}, "vrdp"),
    ],
)
def test_samplings_that_cannot_be_accounted_are_refused(arguments, message):
    if "engine" in arguments:
        arguments = {**arguments, "engine": PrivacyEngine(accountant=arguments["engine"])}
    with pytest.raises(ValueError, match=message):
        private(**arguments)


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
    batches = private_loader(data, sampling="poisson", stream=seeded(), max_physical_batch_size=split)
    logical, records = set(), 0
    for batch in batches:
        draw = batches.plan.current()
        assert draw.records in (0, len(batch)) if draw.records != len(batch) else True
        assert split is None or len(batch) <= split
        logical.add(draw.batch)
        records += draw.records
        batches.plan.in_hand.used = True
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
    again = private_loader(batches, sampling="poisson", stream=seeded())
    assert (again.sample_rate, len(again)) == (0.25, 4)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


class Odd(RandomSampler):
    pass


@pytest.mark.parametrize("sampling", SAMPLING)
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
def test_samplers_without_a_bound_are_refused(sampling, make, message):
    with pytest.raises(ValueError, match=message):
        private_loader(
            make(dataset(64)),
            sampling=sampling,
            stream=seeded(),
            max_batch_size=32 if sampling == "truncated_poisson" else None,
        )


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


class Texts(list):
    """A dataset of texts, which the loop turns into tensors."""


def two_rows(rows):
    if len(rows) < 2:
        raise ValueError("planted: a contrastive batch needs two rows")
    return torch.stack(rows)


STAND_INS = {
    "tensors": (torch.randn(4, 3), None),
    "texts that the loop tokenizes": (Texts(["a b", "c", "d", "e"]), list),
    "a default dictionary": ([{"x": torch.ones(2)}] * 4, lambda rows: defaultdict(list, x=torch.stack([r["x"] for r in rows]))),
    "two rows at least": (torch.randn(4, 3), two_rows),
    "a first row that is left out": ([None, torch.ones(2), torch.ones(2), torch.ones(2)],
                                     lambda rows: torch.stack([r for r in rows if r is not None])),
    "lengths for packing": ([(torch.randn(5, 3), 5)] * 4, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", STAND_INS)
def test_a_stand_in_is_a_batch_as_any_other_and_a_fresh_one(kind):
    data, collate = STAND_INS[kind]
    batches = private_loader(DataLoader(data, batch_size=2, collate_fn=collate), sampling="poisson", stream=seeded())
    first, second = batches.collate_fn([]), batches.collate_fn([])
    assert type(first) is type(batches.collate_fn([data[1], data[2]]))
    for mine, other in zip(tensors_of(first), tensors_of(second), strict=True):
        assert len(mine) >= 1
        assert torch.equal(mine, other)
        assert mine.data_ptr() != other.data_ptr()
    if isinstance(first, dict):
        first.clear()
        assert batches.collate_fn([])


def test_a_collate_that_makes_nothing_of_the_first_rows_is_refused():
    def never(rows):
        raise ValueError("planted: not enough rows")

    with pytest.raises(ValueError, match=r"collate_fn makes no batch of the first 8 rows .*planted"):
        private_loader(DataLoader(list(range(20)), batch_size=2, collate_fn=never), sampling="poisson", stream=seeded())


def test_a_forked_child_draws_its_own_noise():
    stream = SecretStream()
    before = stream.normal(4)
    stream._pid -= 1  # as after a fork
    assert not torch.equal(before, stream.normal(4))
    assert stream.state_dict() == {}
