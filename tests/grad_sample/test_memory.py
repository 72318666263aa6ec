"""How much memory norms and sums need at a time: no whole Gram matrix of a long record, and no second copy of the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opacus_ac.grad_sample import register_rules
from opacus_ac.grad_sample.one_backward import bounds, gram, norm_sums, written_down
from opacus_ac.grad_sample.one_backward.certified import certified
from opacus_ac.grad_sample.one_backward.gram import GramCache
from opacus_ac.grad_sample.one_backward.outer_products import Dense, Lookup
from opacus_ac.grad_sample.one_backward.parameter_book import ParameterBook
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.grad_sample.one_backward.weighted_sums import Weights

MIB = 1 << 20


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, in bytes, and the shape that it has."""

    def __init__(self, beside: tuple[Tensor, ...] = ()) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in beside}
        self.bytes, self.shape = 0, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                size = x.untyped_storage().nbytes()
                if size > self.bytes:
                    self.bytes, self.shape = size, (*x.shape, x.dtype, str(func))
        return result


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def terms_of(kind: str, positions: int, dtype: torch.dtype) -> tuple[torch.Size, list[Dense | Lookup]]:
    """Uses of a weight [40, 8] by one record; each alone, and a tied pair."""
    shape = torch.Size([40, 8])
    ids = torch.arange(positions).remainder(40).unsqueeze(0)
    made = {
        "dense": Dense(randn(1, positions, 40, dtype=dtype), randn(1, positions, 8, dtype=dtype, seed=1)),
        "lookup": Lookup(ids, randn(1, positions, 8, dtype=dtype, seed=2)),
    }
    return shape, [made[name] for name in kind.split(" and ")]


@pytest.mark.parametrize(
    ("kind", "positions", "dtype"),
    [
        ("dense", 4096, torch.bfloat16),
        ("lookup", 4096, torch.float32),
        ("lookup and lookup", 4096, torch.bfloat16),
        ("dense and dense", 4096, torch.float32),
        ("dense and lookup", 8192, torch.bfloat16),
    ],
    ids=str,
)
def test_norms_of_long_records_need_no_whole_gram_matrix(kind, positions, dtype, monkeypatch):
    monkeypatch.setattr(norm_sums, "_GRAM_BYTES", 16 * MIB)  # so that 4,096 positions are beyond it, too
    shape, terms = terms_of(kind, positions, dtype)
    book, cache = ParameterBook(shape), GramCache()
    monkeypatch.setattr(Dense, "worth_keeping", False)
    with Largest() as largest:
        for term in terms:
            book.add(term, cache)
    assert book.routes in ("gram", "lookup", "gram+lookup")
    # A tile in float64, while it is added up.
    assert largest.bytes <= 8 * gram.TILE**2, largest.shape
    want = written_in_float64(shape, terms)
    squares = certified([book], [1.0])[1][0]
    torch.testing.assert_close(squares, want.square().sum().reshape(1), rtol=1e-6, atol=0)


def written_in_float64(shape: torch.Size, terms: list[Dense | Lookup]) -> Tensor:
    total = torch.zeros(shape, dtype=torch.float64)
    for term in terms:
        if isinstance(term, Dense):
            total += torch.einsum("nti,ntj->ij", term.left.double(), term.right.double())
        else:
            total.index_add_(0, term.ids[0], term.right[0].double())
    return total


def test_the_limit_holds_as_it_is_without_any_setting(monkeypatch):
    """At 4,608 positions, a whole matrix would have 81 MiB, and half of it in float64 as much."""
    shape, terms = terms_of("dense", 4608, torch.float32)
    monkeypatch.setattr(Dense, "worth_keeping", False)
    with Largest() as largest:
        ParameterBook(shape).add(terms[0], GramCache())
    assert largest.bytes <= 8 * gram.TILE**2, largest.shape
    monkeypatch.setattr(gram, "TILE", 1 << 20)
    with Largest() as largest:
        ParameterBook(shape).add(terms[0], GramCache())
    assert largest.bytes >= 40 * MIB  # what the test would see


@pytest.mark.parametrize("positions", [bounds.ROWS, bounds.ROWS + 1, 3 * bounds.ROWS])
def test_gradients_that_are_written_down_are_added_up_in_pieces(positions, monkeypatch):
    """The bound of a sum is for pieces of ``ROWS`` outer products, however many there are."""
    seen = []
    product = written_down.inner
    monkeypatch.setattr(written_down, "inner", lambda a, b: seen.append(a.shape[2]) or product(a, b))
    left, right = randn(2, positions, 5), randn(2, positions, 3, seed=1)
    got = written_down.gradients(left, right)
    want = torch.einsum("nti,ntj->nij", left.double(), right.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    assert max(seen) <= bounds.ROWS
    assert sum(seen) == positions


# ---------------------------------------------------------------- the logits


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_copies_the_gradient_of_the_logits(tied, dtype, transposed):
    """Neither norms nor sums make a tensor of half the logits' size, whatever its type."""
    batch, positions, words, width = 32, 8, 16384, 16
    left, right = randn(batch, positions, words, dtype=dtype), randn(batch, positions, width, dtype=dtype, seed=1)
    sides = (right, left) if transposed else (left, right)
    shape = torch.Size([width, words] if transposed else [words, width])
    book, cache = ParameterBook(shape), GramCache()
    out = torch.empty(shape)
    with Largest((left, out)) as largest:
        book.add(Dense(*sides), cache)
        if tied and not transposed:
            ids = torch.arange(positions).expand(batch, -1)
            book.add(Lookup(ids, randn(batch, positions, width, dtype=dtype, seed=2)), cache)
        certified([book], [1.0])
        book.weighted_sum(Weights(torch.linspace(0.5, 1, batch, dtype=torch.float64)), out)
    assert book.routes.startswith("gram")
    assert largest.bytes <= left.numel() * left.itemsize // 2, largest.shape


class Head(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_pass_makes_no_more_tensors_of_the_logits_size_than_autograd_does(autocast):
    batch, positions, words, width = 64, 8, 8192, 16
    x = randn(batch, positions, width)

    def count(private: bool) -> int:
        head = Head(words, width)
        parameters = list(head.parameters())
        source = BookKeepingSource(head, parameters, ["layer.weight"], "sum")
        detach = source.attach() if private else (lambda: None)
        with Counted(batch * positions * words) as counted:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = head(x).square().sum()
            loss.backward()
            if private:
                source.finish_batch()
        detach()
        return counted.number

    assert count(True) <= count(False)


class Counted(TorchDispatchMode):
    """Counts the storages of at least so many numbers that operations make."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.number, self.rounded = numbers, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.numel() >= self.numbers and x.untyped_storage().data_ptr() not in given:
                self.number += 1
                self.rounded += tuple(x.shape) == (2, 5, 40) and x.dtype == torch.bfloat16
        return result


class Projections(nn.Module):
    """Three layers of one input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
        made = {"Linear": lambda: nn.Linear(40, 48, bias=False), "Conv1D": lambda: conv1d(48, 40)}
        self.layers = nn.ModuleList(made[kind]() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return sum((number + 1) * layer(x) for number, layer in enumerate(self.layers))


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("autocast", [False, True])
def test_projections_of_one_input_share_what_autocast_made_of_it(kind, autocast, monkeypatch):
    """Its rounded form is kept once, and its Gram matrix is computed once."""
    model = Projections(kind)
    named = dict(model.named_parameters())
    inputs: list[int] = []
    product = gram.inner
    monkeypatch.setattr(gram, "inner", lambda a, b: inputs.append(a.shape[2]) or product(a, b))
    register_rules(model)
    source = BookKeepingSource(model, list(named.values()), list(named), "sum")
    detach = source.attach()
    with Counted(2 * 5 * 40) as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(randn(2, 5, 40)).square().sum()
        counted.rounded = 0
        loss.backward()
    assert counted.rounded == int(autocast)
    source.finish_batch()
    detach()
    assert inputs.count(40) == 1
    assert inputs.count(48) == 3
