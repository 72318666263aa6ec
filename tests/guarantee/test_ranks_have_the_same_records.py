"""Several processes: the same records in the same order on all of them, and no process that takes itself for the only one."""

import collections
import dataclasses
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.distributed import reducers
from opacus_ac.distributed.same_records import PARTS, check_same_records, digests, plain_bytes
from opacus_ac.errors import SamplingWarning

SAME = "have other records, or in another order"


class Ranks:
    """Several ranks as threads of this process, with the two exchanges that the check needs."""

    def __init__(self, world):
        self.world, self.barrier, self.rows, self.gathered = world, threading.Barrier(world), [None] * world, 0

    def of(self, rank):
        def gather(row):
            self.rows[rank] = row
            self.barrier.wait()
            found = np.stack(self.rows)
            self.gathered += rank == 0
            self.barrier.wait()
            return found

        def on_first(work):
            return gather(np.array([work() if rank == 0 else 0]))[0, 0]

        return type("Rank", (), {"gather": staticmethod(gather), "on_first": staticmethod(on_first)})


def outcomes(datasets, **options):
    """Return, for each rank, the error or the warning that it ended with."""
    ranks, found = Ranks(len(datasets)), [""] * len(datasets)

    def run(rank):
        try:
            check_same_records(ranks.of(rank), datasets[rank], **options)
        except ValueError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(datasets))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    return found, [str(w.message) for w in caught if issubclass(w.category, SamplingWarning)], ranks.gathered


class Image:
    """An object that gives itself as an array, as images do, with state that has nothing to do with its content."""

    def __init__(self, values):
        self.handle, self.values = object(), values

    @property
    def __array_interface__(self):
        return self.values.__array_interface__


class Plain:
    def __init__(self, text):
        self.text = text


@dataclasses.dataclass
class Row:
    ids: list
    label: int


def batch_encoding(i):
    from transformers import BatchEncoding

    return BatchEncoding({"input_ids": [i, i + 1], "labels": [i]})


def arrow(i):
    return pytest.importorskip("pyarrow").table({"ids": [i, i + 1]})


KINDS = {
    "tensors": lambda i: (torch.full((2,), float(i)), torch.tensor(0)),
    "bfloat16": lambda i: torch.full((2,), float(i), dtype=torch.bfloat16),
    "arrays": lambda i: np.full(3, i),
    "dicts": lambda i: {"a": [i], "b": "x"},
    "user dicts": lambda i: collections.UserDict(ids=[i]),
    "batch encodings": batch_encoding,
    "nested": lambda i: {"chat": [{"role": "user", "content": str(i)}], "n": (1, (2, {3, 4}))},
    "texts": lambda i: f"text {i}",
    "named tuples": lambda i: collections.namedtuple("Pair", "x y")(i, 0),
    "dataclasses": lambda i: Row([i], 0),
    "objects": lambda i: Plain(str(i)),
    "images": lambda i: {"image": Image(np.full((2, 2), i % 256)), "label": 0},
    "object arrays": lambda i: np.array([str(i), None], dtype=object),
    "arrow tables": arrow,
    "many parts": lambda i: [0] * (PARTS + 5) + [i],
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_order_is_refused_on_every_rank_whatever_a_record_is(kind):
    rows = [KINDS[kind](i) for i in range(40)]
    shuffled = random.Random(1).sample(rows, 40)
    assert outcomes([rows, [KINDS[kind](i) for i in range(40)]]) == ([""] * 2, [], outcomes([rows, rows])[2])
    assert all(SAME in error for error in outcomes([rows, shuffled])[0])
    assert all("ranks 0 and 2" in error for error in outcomes([rows, rows, shuffled])[0])


@pytest.mark.parametrize("swapped", [(1, 2), (3, 998), (400, 401)])
def test_two_records_in_each_others_place_are_found_between_the_ends_and_the_middle(swapped):
    rows = [{"x": torch.tensor([float(i), 1.0])} for i in range(1000)]
    other = list(rows)
    other[swapped[0]], other[swapped[1]] = rows[swapped[1]], rows[swapped[0]]
    assert all(SAME in error for error in outcomes([rows, other])[0])


class Augmented:
    """Records with a part that is made at random whenever it is read, of a generator of the rank."""

    def __init__(self, rank, labels, choices):
        self.random, self.labels, self.choices = random.Random(rank), labels, choices

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"flipped": self.random.randrange(self.choices), "label": self.labels[i]}


@pytest.mark.parametrize("choices", [2, 50, 10**9])
def test_random_parts_are_left_aside_and_the_others_compared(choices):
    labels = list(range(300))
    same = [Augmented(rank, labels, choices) for rank in range(2)]
    assert outcomes(same)[:2] == (["", ""], [])
    other = [Augmented(0, labels, choices), Augmented(1, labels[::-1], choices)]
    assert all(SAME in error for error in outcomes(other)[0])


def test_records_of_which_nothing_can_be_compared_are_warned_of():
    class Random:
        def __len__(self):
            return 64

        def __getitem__(self, i):
            return object() if i % 2 else torch.rand(3)

    errors, warned, _ = outcomes([Random(), Random()])
    assert errors == ["", ""]
    assert len(warned) in (1, 2)  # python shows a line once
    assert "cannot be compared between the ranks" in warned[0]


def test_slow_datasets_are_read_for_a_while_and_large_ones_whole_where_they_are_quick():
    class Slow(list):
        def __getitem__(self, i):
            threading.Event().wait(0.002)
            return list.__getitem__(self, i)

    assert outcomes([Slow(range(10**5))] * 2, seconds=0.05)[2] < 8
    last = [0] * 30_000
    assert all(SAME in e for e in outcomes([last, [*last[:777], 1, *last[778:]]], seconds=60)[0])


def test_digests_tell_records_apart_and_not_processes():
    assert list(digests([object()], 0)) == [0] * PARTS
    assert plain_bytes({"a": [1, object()]}) is None
    assert plain_bytes(lambda: 0) is None
    loop: list = []
    loop.append(loop)
    assert plain_bytes(loop) is None
    assert plain_bytes({"a": 1, "b": 2}) == plain_bytes({"b": 2, "a": 1})
    assert plain_bytes({"x", "y", "z"}) == plain_bytes({"z", "y", "x"})
    different = [
        [1, [2]],
        [[1], 2],
        [12],
        ["1", 2],
        torch.ones(2),
        torch.ones(2, 1),
        torch.ones(2).int(),
        None,
        "None",
        b"x",
        "x",
    ]
    assert len({plain_bytes(value) for value in different}) == len(different)


def private(**options):
    model = nn.Linear(4, 2)
    engine = PrivacyEngine()
    data = DataLoader(TensorDataset(torch.randn(16, 4), torch.zeros(16, dtype=torch.long)), batch_size=4)
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )
    return engine, *made


def train(model, optimizer, loader):
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y, reduction="none")
        if hasattr(optimizer, "coordinates"):
            optimizer.step(lambda: nn.functional.cross_entropy(model(x), y, reduction="none"))  # noqa: B023
        else:
            loss.mean().backward()
            optimizer.step()


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize("options", [{}, {"zeroth_order": "aggzo"}, {"grad_sample_mode": "hooks"}])
def test_one_of_several_processes_does_not_take_itself_for_the_only_one(variable, options, monkeypatch):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(
        ValueError, match=f"{variable}=2: this is one of several.*init_process_group before make_private"
    ):
        private(**options)
    engine, *rest = private(reducer="local", **options)
    train(*rest)
    assert len(engine.accountant.history) > 0
    monkeypatch.setenv(variable, "1")
    private(**options)


@pytest.mark.parametrize(
    "options", [{}, {"zeroth_order": "aggzo"}, {"grad_sample_mode": "hooks"}, {"reducer": "local"}]
)
def test_processes_that_are_joined_after_make_private_stop_before_the_first_charge(options, monkeypatch):
    engine, model, optimizer, loader = private(**options)
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(reducers, "initialized", lambda: True)
    if options.get("reducer") == "local":
        train(model, optimizer, loader)
        return
    with pytest.raises(ValueError, match="has joined this process with others since make_private"):
        train(model, optimizer, loader)
    assert not engine.accountant.history
    assert all(torch.allclose(a, p, atol=1e-6) for a, p in zip(before, model.parameters(), strict=True))
