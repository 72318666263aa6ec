"""Norms and weighted sums of outer-product gradients against the gradients written down in float64."""

from __future__ import annotations

import pytest
import torch
from outer_cases import CASES, B, D, T, V, book_of, dense, draw, ids, lookup, written_down
from torch import Tensor

from opacus_ac.grad_sample.one_backward import certified as certification
from opacus_ac.grad_sample.one_backward import gram, norm_sums, reach
from opacus_ac.grad_sample.one_backward import outer_products as terms
from opacus_ac.grad_sample.one_backward.bounds import RECORDS, squared_norms, squared_norms_of_many
from opacus_ac.grad_sample.one_backward.certified import certified
from opacus_ac.grad_sample.one_backward.gram import GramCache
from opacus_ac.grad_sample.one_backward.outer_products import Dense, Lookup
from opacus_ac.grad_sample.one_backward.parameter_book import ParameterBook
from opacus_ac.grad_sample.one_backward.reach import Reach, Sides, reaches
from opacus_ac.grad_sample.one_backward.weighted_sums import Weights, add_product, add_rows

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-5}


def squares_of(book: ParameterBook) -> Tensor:
    """The squared norms as computed, those of doubtful records in float64."""
    return certified([book], [1.0])[1][0]


def bounds_of(book: ParameterBook) -> Tensor:
    """The norms by which records are clipped."""
    return certified([book], [1.0])[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("factor", [0.0, 2.0, 1e9], ids=["gram", "measured", "kept"])
@pytest.mark.parametrize("name", CASES)
def test_norms_and_sums_are_those_of_the_gradients(name, factor, dtype, library, monkeypatch):
    """bfloat16 terms too: the tolerance is that of float32 sums, not of bfloat16 numbers."""
    monkeypatch.setattr(terms, "KEEP_FACTOR", factor)
    parts = CASES[name](dtype)
    want = sum(written_down(part) for part in parts)
    book = book_of(parts)
    torch.testing.assert_close(squares_of(book), want.flatten(1).square().sum(1), rtol=TOLERANCE[dtype], atol=0)
    weights = torch.tensor([0.3, 0.0, 1.0, 2.0, 0.7], dtype=torch.float64)
    for w in (weights, weights + 0.1, torch.zeros(B, dtype=torch.float64)):
        out = torch.full((V, D), 7.0, dtype=torch.promote_types(dtype, torch.float32))
        book.weighted_sum(Weights(w), out)
        expected = torch.einsum("n,nij->ij", w, want)
        assert (out - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_the_kept_route_is_taken_where_it_is_cheaper():
    assert book_of([dense(40)]).routes == "kept"
    assert book_of([dense(2)]).routes == "gram"
    assert book_of([dense(2), lookup()]).routes == "gram+lookup"


@pytest.mark.parametrize("name", ["dense", "tied", "tied twice", "three lookups", "two dense"])
@pytest.mark.parametrize("limit", [1, 300])
@pytest.mark.parametrize("tile", [1, 2, 4, 1024])
def test_long_sequences_are_taken_in_slices_of_records_and_tiles_of_positions(name, limit, tile, monkeypatch):
    whole = squares_of(book_of(CASES[name](torch.float64)))
    monkeypatch.setattr(norm_sums, "_GRAM_BYTES", limit)
    monkeypatch.setattr(gram, "TILE", tile)
    torch.testing.assert_close(squares_of(book_of(CASES[name](torch.float64))), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", CASES)
def test_a_record_of_weight_zero_leaves_no_trace(name, poison, library):
    parts = CASES[name](torch.float32)
    clean = CASES[name](torch.float32)
    for part in parts:
        for tensor in vars(part).values():
            if tensor.is_floating_point():
                tensor[2] = poison
    weights = torch.tensor([1.0, 0.5, 0.0, 0.2, 1.0], dtype=torch.float64)
    got, want = torch.empty(V, D), torch.empty(V, D)
    book, reference = book_of(parts), book_of(clean)
    squares = squares_of(book)
    expected = squares_of(reference)
    others = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(squares[others], expected[others])
    # Its own norm must not come out as something that would let it through.
    assert not squares[2] < 1e20
    book.weighted_sum(Weights(weights), got)
    reference.weighted_sum(Weights(weights), want)
    assert torch.equal(got, want)


def cancelling(share: float, dtype: torch.dtype = torch.float32) -> Dense:
    """Per-position terms that add up to ``share`` of their size, as near a minimum or in an adversary's record."""
    generator = torch.Generator().manual_seed(5)
    left, right = draw(B, T, V, seed=5), draw(B, T, D, seed=6)
    left[:, 1::2], right[:, 1::2] = -left[:, ::2], right[:, ::2]
    left += share * torch.randn(left.shape, generator=generator, dtype=torch.float64)
    return Dense(left.to(dtype), right.to(dtype))


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("tie", [False, True])
def test_gram_sums_that_nearly_cancel_are_written_down(share, tie, library, monkeypatch):
    """A Gram sum in float32 would be off by far more than the clipping norm may be."""
    monkeypatch.setattr(terms, "KEEP_FACTOR", 0.0)
    parts = [cancelling(share)]
    if tie:
        parts.append(Lookup(ids(), share * draw(B, T, D, dtype=torch.float32)))
    want = sum(written_down(p) for p in parts).flatten(1).square().sum(1)
    torch.testing.assert_close(squares_of(book_of(parts)), want, rtol=2e-5, atol=0)
    if share <= 1e-3:  # the guard is what does it
        monkeypatch.setattr(certification, "WORTHWHILE", float("inf"))
        error = (squares_of(book_of(parts)) - want).abs() / want
        assert float(error.max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("factor", [0.0, 1e9], ids=["gram", "kept"])
def test_no_clipped_record_adds_more_than_the_bound(factor, share, dtype, library, monkeypatch):
    """Whatever rounding does to a gradient, what one record adds to the sum has norm C, to 1e-4."""
    monkeypatch.setattr(terms, "KEEP_FACTOR", factor)
    for record in range(B):
        book = book_of([cancelling(share, dtype), Lookup(ids(), share * draw(B, T, D, dtype=dtype))])
        weights = torch.zeros(B, dtype=torch.float64)
        weights[record] = 0.25 / squares_of(book)[record].sqrt()
        out = torch.empty(V, D)
        book.weighted_sum(Weights(weights), out)
        assert float(out.double().norm()) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize(
    ("left", "right"), [(1e18, 1e-24), (1e19, 1e-23), (1e-24, 1e18), (1e12, 1e-16), (1e25, 1e-25), (1e30, 1e-37)]
)
def test_a_record_with_sides_of_extreme_sizes_is_clipped(left, right, library, monkeypatch):
    """The square of the small side underflows in float32: the norm would be 0, and the record would go in unclipped."""
    monkeypatch.setattr(terms, "KEEP_FACTOR", 0.0)
    part = dense(dtype=torch.float32)
    part.left[2, 1] = left * draw(V, dtype=torch.float32)
    part.right[2, 1] = right * draw(D, dtype=torch.float32)
    part.left[2, 0], part.left[2, 2:] = 0, 0
    want = written_down(part).flatten(1).square().sum(1)
    torch.testing.assert_close(squares_of(book_of([part])), want, rtol=2e-6, atol=0)
    if left == 1e18:  # the guards are what does it
        monkeypatch.setattr(certification, "WORTHWHILE", float("inf"))
        monkeypatch.setattr(certification, "EXTREME", float("inf"))
        assert float(squares_of(book_of([part]))[2]) < 0.5 * float(want[2])


def test_a_gradient_that_is_exactly_zero_has_norm_zero():
    zero = Dense(torch.zeros(B, T, V), torch.zeros(B, T, D))
    assert squares_of(book_of([zero])).tolist() == [0.0] * B
    opposite = Dense(torch.cat([torch.ones(B, 1, V), -torch.ones(B, 1, V)], 1), torch.ones(B, 2, D))
    assert squares_of(book_of([opposite])).tolist() == [0.0] * B


def test_squared_norms_of_millions_of_entries_are_not_biased():
    """float32 ``norm`` over millions of entries is biased by 1e-4 on CPU."""
    rows = draw(2, 2000, 1000, dtype=torch.float32)
    want = rows.double().square().sum((1, 2))
    torch.testing.assert_close(squared_norms(rows), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        squared_norms(rows.bfloat16()), rows.bfloat16().double().square().sum((1, 2)), rtol=1e-6, atol=0
    )
    assert squared_norms(torch.zeros(3, 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_squared_norms_of_many_are_those_of_each(dtype):
    """To the last bit, so a parameter's norm does not depend on which others are trained."""
    shapes = [(B, 7), (B, 7), (B, 1500), (B, 3, 5), (B, 1500), (2, 7), (B,), (B, 9000), (B, 7), (B, 0), (B, 9000)]
    rows = [draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    rows[1][2, 3] = float("nan")
    found = squared_norms_of_many([*rows, None])
    assert found.pop() is None
    for values, squares in zip(rows, found, strict=True):
        if values.shape[1:].numel() == 9000:
            assert squares is None
        else:
            assert torch.equal(squares.nan_to_num(-1), squared_norms(values).nan_to_num(-1))


@pytest.mark.parametrize("positions", [2, 3, 8, 64, 65])
def test_gram_matrices_by_halves(positions, monkeypatch):
    x, y = draw(B, positions, D), draw(B, positions, V, seed=1)
    want = [torch.bmm(z, z.transpose(1, 2)) for z in (x, y)]
    reach = (want[0].diagonal(dim1=1, dim2=2) * want[1].diagonal(dim1=1, dim2=2)).sqrt().sum(-1)
    largest = [w.diagonal(dim1=1, dim2=2).amax(-1) for w in want]
    for chunk in (4, 10**9):
        for fewest in (2, 10**9):
            monkeypatch.setattr(gram, "_HALVED", (fewest, 10**9))
            torch.testing.assert_close(gram.Gram.of(x, chunk).whole(), want[0], rtol=1e-12, atol=1e-12)
            for other in (gram.Gram.of(y, chunk), gram.Gram(want[1], None)):
                total, sides = gram.products(gram.Gram.of(x, chunk), other)
                (found,) = reaches([sides])
                got = total, found.total, found.largest
                expected = ((want[0] * want[1]).sum((1, 2)), reach, torch.maximum(*largest))
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("together", [1, 40, 10**9], ids=["each alone", "some", "all"])
def test_the_reach_of_many_uses_is_that_of_each(together, monkeypatch):
    """To the last bit, so a record's norm does not depend on which other layers there are."""
    monkeypatch.setattr(reach, "_ENTRIES", together)
    kinds = [(T, torch.float32), (T, torch.float64), (7 * T, torch.float32), (T, torch.float32), (0, torch.float32)]
    sides = [
        Sides(*(draw(B, length, dtype=dtype, seed=i + j).square() for j in (0, 50)), squared=squared)
        for i, (length, dtype) in enumerate(3 * kinds)
        for squared in (True, False)
    ]
    sides.append(Sides(draw(B, T).square(), draw(B, T, dtype=torch.float32).square(), squared=False))
    before = [(own.left.clone(), own.right.clone()) for own in sides]
    for own, (left, right), found in zip(sides, before, reaches(sides), strict=True):
        lengths = left.double() * right.double()
        assert torch.equal(found.total, (lengths.sqrt() if own.squared else lengths).sum(-1))
        if own.squared and left.shape[1]:
            assert torch.equal(found.largest, torch.maximum(left, right).double().amax(-1))
        else:
            assert found.largest is None
        assert torch.equal(own.left, left)  # another use may share it
        assert torch.equal(own.right, right)


def test_the_reach_of_two_uses_is_their_sum():
    total = torch.ones(B, dtype=torch.float64)
    both = Reach(total, total).plus(Reach(total, 2 * total))
    assert torch.equal(both.total, 2 * total)
    assert torch.equal(both.largest, 2 * total)
    for one, other in ((total, None), (None, total)):
        assert Reach(total, one).plus(Reach(total, other)).largest is total
    assert Reach(total, None).plus(Reach(total, None)).largest is None


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float16], ids=str)
@pytest.mark.parametrize("records", [0, 1, RECORDS, RECORDS + 1])
def test_what_was_in_the_memory_of_a_sum_is_not_in_the_sum(records, dtype):
    """A sum is written into memory as it comes, in which there may be values that are not finite."""
    factors = torch.ones(records, 1, 1)
    for width in (1, 7):
        rows = draw(records, width, dtype=dtype)
        for out_dtype in (dtype, torch.float64):  # float64: exact sums
            found = torch.full((width,), float("nan"), dtype=out_dtype)
            add_rows(rows, factors.view(-1), found, first=True)
            torch.testing.assert_close(found.double(), rows.double().sum(0), rtol=0.02, atol=0.3)
    for positions in (0, 1, 3, 70):
        left, right = (draw(records, positions, d, dtype=dtype, seed=d) for d in (5, 4))
        found = torch.full((5, 4), float("nan"), dtype=torch.promote_types(dtype, torch.float32))
        add_product(found, left, right, factors.to(found), first=True)
        want = torch.einsum("nti,ntj->ij", left.double(), right.double())
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-3)


def test_gram_cache_shares_one_input_and_forgets():
    cache = GramCache(size=1)
    x = draw(B, T, D)
    assert cache.gram(x) is cache.gram(x.view(B, T, D))
    first = cache.gram(x)
    cache.gram(draw(B, T, D, seed=4))
    assert cache.gram(x) is not first
    assert cache.gram(x[:2]).whole().shape == (2, T, T)
