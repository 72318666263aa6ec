"""Norms and sums of bfloat16 sides, widened and as they are: near those of float64, and never below what a record adds."""

from __future__ import annotations

import dataclasses

import outer_cases
import pytest
import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward import half_products, norm_sums, routes, trial
from opacus_ac.grad_sample.one_backward import outer_products as terms
from opacus_ac.grad_sample.one_backward.bounds import stacked
from opacus_ac.grad_sample.one_backward.certified import certified
from opacus_ac.grad_sample.one_backward.gram import GramCache
from opacus_ac.grad_sample.one_backward.outer_products import Dense, Lookup
from opacus_ac.grad_sample.one_backward.parameter_book import ParameterBook
from opacus_ac.grad_sample.one_backward.routed import Routed, RoutedBook
from opacus_ac.grad_sample.one_backward.weighted_sums import Weights, add_product

HALF = torch.bfloat16


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(batch: int, positions: int, height: int, width: int, dtype: torch.dtype = HALF) -> Dense:
    return Dense(draw(batch, positions, height, dtype=dtype), draw(batch, positions, width, seed=1, dtype=dtype))


def norms_of(book: ParameterBook | RoutedBook) -> Tensor:
    return certified([book], [1.0])[1][0].sqrt()


@pytest.mark.parametrize("factor", [0.0, 1e9], ids=["gram", "kept"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", outer_cases.CASES)
def test_norms_of_every_use_are_those_of_float64(name, dtype, factor, halves, monkeypatch):
    """To 1e-6 of the norms of the same numbers in half precision."""
    monkeypatch.setattr(terms, "KEEP_FACTOR", factor)
    parts = outer_cases.CASES[name](dtype)
    want = sum(outer_cases.written_down(part) for part in parts)
    book = outer_cases.book_of(parts)
    torch.testing.assert_close(norms_of(book), want.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    out = torch.empty(want.shape[1:])
    weights = torch.tensor([0.3, 0.0, 1.0, 2.0, 0.7], dtype=torch.float64)
    book.weighted_sum(Weights(weights), out)
    expected = torch.einsum("n,nij->ij", weights, want)
    assert (out - expected).norm() <= 8e-6 * expected.norm()


LAYERS = {  # records, positions, I, J
    "attention": (4, 128, 384, 384),
    "MLP": (2, 128, 1056, 384),
    "head": (2, 32, 8192, 96),
    "first matrix of a Conv1D": (2, 32, 96, 8192),
    "adapter": (4, 128, 8, 576),
    "long": (1, 2500, 96, 64),
}


@pytest.mark.parametrize("name", LAYERS)
def test_norms_of_layers_of_real_sizes_are_those_of_float64(name, halves):
    term = dense(*LAYERS[name])
    book = ParameterBook(torch.Size([term.left.shape[2], term.right.shape[2]]))
    book.add(term, GramCache())
    want = torch.einsum("nti,ntj->nij", term.left.double(), term.right.double())
    torch.testing.assert_close(norms_of(book), want.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    out = torch.empty(book.shape)
    book.weighted_sum(Weights(torch.linspace(0.1, 1, len(want), dtype=torch.float64)), out)
    expected = torch.einsum("n,nij->ij", torch.linspace(0.1, 1, len(want), dtype=torch.float64), want)
    assert (out - expected).norm() <= 8e-6 * expected.norm()


@pytest.mark.parametrize("rows", [24, 600])
def test_norms_of_experts_are_those_of_float64(rows, halves):
    left, right, records = draw(rows, 40), draw(rows, 24, seed=1), torch.arange(rows) % 3
    counts = [rows // 2, 0, rows // 2]
    book = RoutedBook(torch.Size([3, 40, 24]))
    book.add(Routed(left, right, records, counts, 3), GramCache())
    want = torch.zeros(3, 3, 40, 24, dtype=torch.float64)
    for row in range(rows):
        want[records[row], 0 if row < rows // 2 else 2] += torch.outer(left[row].double(), right[row].double())
    torch.testing.assert_close(norms_of(book), want.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    out = torch.empty(book.shape)
    book.weighted_sum(Weights(torch.ones(3, dtype=torch.float64)), out)
    assert (out - want.sum(0)).norm() <= 8e-6 * want.sum(0).norm()


def test_a_device_multiplies_half_precision_as_it_is(halves):
    """Norms and sums of bfloat16 sides need products of bfloat16 only; sums of float16 are widened."""
    for dtype, wanted in ((torch.bfloat16, {torch.bfloat16}), (torch.float16, {torch.float16})):
        term = dense(2, 6, 40, 24, dtype)
        book = ParameterBook(torch.Size([40, 24]))
        if halves is not None:
            halves.clear()
        book.add(term, GramCache())
        certified([book], [1.0])
        made = len(halves or [])
        book.weighted_sum(Weights(torch.ones(2, dtype=torch.float64)), torch.empty(40, 24))
        if halves is not None:
            assert set(halves) == wanted
            assert made >= 2
            assert len(halves) - made == (2 if dtype == torch.bfloat16 else 0)  # the weighted side in two parts


# ---------------------------------------------------------------- what rounding adds is paid for


def adversarial(kind: str, positions: int, width: int) -> Tensor:
    """Sides whose weighted values all round to the same side, or to numbers of which half the bits are lost."""
    value = {"third": 1 / 3, "odd": 1 + 2.0**-7, "small": 3e-20}[kind]
    return torch.full((1, positions, width), value).to(HALF)


@pytest.mark.parametrize("kind", ["third", "odd", "small"])
@pytest.mark.parametrize("positions", [3, 12])
@pytest.mark.parametrize("share", [1.0, 0.777, 1 / 3])
def test_a_clipped_record_adds_no_more_than_its_bound(kind, positions, share, halves):
    """Whatever the factor rounds to: added <= factor times bound, in float64."""
    term = Dense(adversarial(kind, positions, 48), adversarial(kind, positions, 40))
    book = ParameterBook(torch.Size([48, 40]))
    book.add(term, GramCache())
    assert book.routes == "gram"
    bound = certified([book], [1.0])[0]
    factor = share / bound
    out = torch.empty(48, 40)
    book.weighted_sum(Weights(factor), out)
    assert float(out.double().norm()) <= share


def test_one_part_instead_of_two_would_add_more(halves, monkeypatch):
    """What the second part is for: rounding a weighted side to bfloat16 once may lengthen a record by 2^-8."""
    if halves is None:
        pytest.skip("nothing is rounded")
    monkeypatch.setattr(half_products, "split", lambda x: (x.to(HALF), torch.zeros_like(x, dtype=HALF)))
    worst = 0.0
    for share in torch.linspace(0.5, 1, 40).tolist():
        book = ParameterBook(torch.Size([48, 40]))
        book.add(Dense(adversarial("third", 12, 48), adversarial("third", 12, 40)), GramCache())
        factor = share / certified([book], [1.0])[0]
        out = torch.empty(48, 40)
        book.weighted_sum(Weights(factor), out)
        worst = max(worst, float(out.double().norm()) / share)
    assert worst > 1.001


def test_the_bound_holds_the_error_of_both_parts(halves):
    term = dense(2, 12, 48, 40)
    book = ParameterBook(torch.Size([48, 40]))
    book.add(term, GramCache())
    error = book.certificate().sum_error
    x = draw(10_000, dtype=torch.float32)
    high, low = half_products.split(x)
    assert bool(((high.double() + low.double() - x).abs() <= half_products.SPLIT * x.abs()).all())
    assert bool(
        ((high.double() + low.double() - x).abs() >= half_products.SPLIT / 4 * x.abs()).any()
    )  # and not far above
    same = ParameterBook(torch.Size([48, 40]))
    same.add(Dense(term.left.float(), term.right.float()), GramCache())
    plain = same.certificate().sum_error
    assert error == plain if halves is None else error >= plain + half_products.SPLIT


@pytest.mark.parametrize("mixed", [(HALF, torch.float32), (torch.float32, HALF)], ids=str)
def test_two_uses_of_different_types(mixed, halves):
    """As of a head under autocast and one outside of it."""
    uses = [dense(2, 5, 48, 40, dtype) for dtype in mixed]
    book = ParameterBook(torch.Size([48, 40]))
    for use in [*uses, Lookup(torch.arange(4).expand(2, 4), draw(2, 4, 40, dtype=mixed[1]))]:
        book.add(use, GramCache())
    want = sum(torch.einsum("nti,ntj->nij", use.left.double(), use.right.double()) for use in uses)
    want[:, :4] += draw(2, 4, 40, dtype=mixed[1]).double()
    torch.testing.assert_close(norms_of(book), want.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    assert book.certificate().sum_error >= (0 if halves is None else half_products.SPLIT)
    out = torch.empty(48, 40)
    book.weighted_sum(Weights(torch.ones(2, dtype=torch.float64)), out)
    assert (out - want.sum(0)).norm() <= 8e-6 * want.sum(0).norm()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 30, 7), (2, 5, 7, 30), (3, 1500, 30, 7), (2, 0, 3, 4)])
def test_sums_into_what_is_there(shape, first, halves):
    term = dense(*shape)
    scale = torch.linspace(0.5, 1, shape[0]).view(-1, 1, 1)
    out = torch.full(shape[2:], 3.0)
    add_product(out, term.left, term.right, scale, first=first)
    want = torch.einsum("n,nti,ntj->ij", scale.flatten().double(), term.left.double(), term.right.double())
    torch.testing.assert_close(out.double(), want + 3 * (not first), rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------- what a device can do, and which route it takes


def test_a_cpu_has_no_such_products_or_right_ones():
    half_products._are_right.cache_clear()
    x = draw(1, 4, 4)
    if half_products.available(x):
        assert half_products.multiply(x, x).dtype == torch.float32
    assert not half_products.available(x.float())
    assert not half_products.available(x.double())


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: torch.bmm(a, b),
        lambda a, b: torch.bmm(a, b).float(),
        lambda a, b: sum(torch.bmm(x, y) for x, y in zip(a.split(64, 2), b.split(64, 1), strict=True)).float(),
    ],
    ids=["result in bfloat16", "rounded to it", "partial sums in it"],
)
def test_a_device_that_rounds_results_is_found(product, monkeypatch):
    half_products._are_right.cache_clear()
    monkeypatch.setattr(half_products, "multiply", product)
    assert not half_products._are_right("cpu", HALF)
    half_products._are_right.cache_clear()
    monkeypatch.setattr(half_products, "multiply", lambda a, b: torch.bmm(a.float(), b.float()))
    assert half_products._are_right("cpu", HALF)
    half_products._are_right.cache_clear()


@pytest.mark.parametrize("error", [TypeError, NotImplementedError, RuntimeError])
def test_a_torch_without_such_products_is_no_error(error, monkeypatch):
    def missing(*_):
        raise error("bmm() got an unexpected keyword argument 'out_dtype'")

    half_products._are_right.cache_clear()
    monkeypatch.setattr(half_products, "multiply", missing)
    assert not half_products.available(draw(1, 2, 2))
    half_products._are_right.cache_clear()


class Elsewhere:
    """The shape of a side on a device that this machine does not have."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.device = torch.Size(shape), torch.device("cuda")


@pytest.mark.parametrize("grams_win", [False, True])
@pytest.mark.parametrize(
    ("positions", "kept", "kept_where_grams_win"),
    [(250, False, False), (256, True, False), (511, True, False), (512, True, True)],
)
def test_another_device_takes_the_route_that_won_on_it(positions, kept, kept_where_grams_win, grams_win, monkeypatch):
    monkeypatch.setattr(routes, "grams_are_faster", lambda _: grams_win)
    term = Dense(Elsewhere(2, positions, 512), Elsewhere(2, positions, 512))
    assert routes.is_written_down(term) == (kept_where_grams_win if grams_win else kept)


def test_a_cpu_does_not_try_routes(monkeypatch):
    monkeypatch.setattr(routes, "grams_are_faster", lambda _: pytest.fail("tried"))
    assert routes.is_written_down(dense(1, 40, 16, 8))
    assert not routes.is_written_down(dense(1, 2, 16, 8))


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_both_routes_of_the_trial_compute_a_weighted_sum_once_per_type(dtype, halves, monkeypatch):
    trial.forget()
    tried = []
    monkeypatch.setattr(trial, "_wins", lambda usual, other: tried.append((usual(), other())) or True)
    monkeypatch.setattr(routes, "_TRIED", (2, 16, 32))
    calls = []
    for module, name in ((routes, "add_rows"), (routes, "add_product"), (routes, "dense_sums")):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, c=call, **k: calls.append(n) or c(*a, **k))
    for _ in range(3):
        assert routes.grams_are_faster(draw(1, 1, 1, dtype=dtype))
    assert len(tried) == 1
    assert calls == ["add_rows", "dense_sums", "add_product"]
    trial.forget()


def test_bounds_do_not_depend_on_the_route(halves, monkeypatch):
    term = dense(2, 16, 32, 32)
    found = []
    for factor in (0.0, 1e9):
        monkeypatch.setattr(terms, "KEEP_FACTOR", factor)
        book = ParameterBook(torch.Size([32, 32]))
        book.add(term, GramCache())
        found.append(book.certificate())
    one, other = (stacked([dataclasses.replace(c, squares=found[0].squares)]).bounds() for c in found)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert norm_sums.dense_sizes(term, GramCache()).split == norm_sums.dense_sums(term, GramCache()).split
