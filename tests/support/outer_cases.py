"""Uses of a parameter as terms, and the gradients that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward.gram import GramCache
from opacus_ac.grad_sample.one_backward.outer_products import Dense, Lookup, Rows
from opacus_ac.grad_sample.one_backward.parameter_book import ParameterBook

B, T, V, D = 5, 6, 23, 11


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ids(positions: int = T, seed: int = 3) -> Tensor:
    values = torch.randint(V, (B, positions), generator=torch.Generator().manual_seed(seed))
    values[:, 1] = values[:, 0]  # a token that occurs twice
    return values


def dense(positions: int = T, dtype: torch.dtype = torch.float64, seed: int = 1) -> Dense:
    return Dense(draw(B, positions, V, dtype=dtype, seed=seed), draw(B, positions, D, dtype=dtype, seed=seed + 100))


def lookup(positions: int = T, dtype: torch.dtype = torch.float64, seed: int = 2) -> Lookup:
    return Lookup(ids(positions, seed), draw(B, positions, D, dtype=dtype, seed=seed))


def written_down(term: Dense | Lookup | Rows) -> Tensor:
    """The gradients ``[B, V, D]`` in float64, by the definition."""
    if isinstance(term, Rows):
        return term.values.double()
    if isinstance(term, Dense):
        return torch.einsum("nti,ntj->nij", term.left.double(), term.right.double())
    out = torch.zeros(B, V, D, dtype=torch.float64)
    for record in range(B):
        for position in range(term.ids.shape[1]):
            out[record, term.ids[record, position]] += term.right[record, position].double()
    return out


#: Every way in which a parameter is used, as terms in the order of their arrival. A new kind of term gets all tests.
CASES = {
    "dense": lambda dtype: [dense(dtype=dtype)],
    "lookup": lambda dtype: [lookup(dtype=dtype)],
    "rows": lambda dtype: [Rows(draw(B, V, D, dtype=dtype))],
    "one position": lambda dtype: [dense(1, dtype)],
    "two dense": lambda dtype: [dense(dtype=dtype), dense(4, dtype, seed=7)],
    "three lookups": lambda dtype: [lookup(dtype=dtype), lookup(3, dtype, 8), lookup(4, dtype, 9)],
    "tied": lambda dtype: [dense(dtype=dtype), lookup(dtype=dtype)],
    "tied, lookup first": lambda dtype: [lookup(dtype=dtype), dense(dtype=dtype)],
    "tied twice": lambda dtype: [dense(3, dtype), dense(2, dtype, 9), lookup(2, dtype), lookup(5, dtype, 11)],
    "rows and dense": lambda dtype: [Rows(draw(B, V, D, dtype=dtype)), dense(2, dtype)],
    "dense and rows": lambda dtype: [dense(2, dtype), Rows(draw(B, V, D, dtype=dtype))],
    "rows and lookup": lambda dtype: [Rows(draw(B, V, D, dtype=dtype)), lookup(dtype=dtype)],
    "everything": lambda dtype: [lookup(dtype=dtype), dense(2, dtype), Rows(draw(B, V, D, dtype=dtype)), dense(3, dtype)],
    "long": lambda dtype: [dense(40, dtype)],
    "long and tied": lambda dtype: [dense(40, dtype), lookup(dtype=dtype)],
}  # fmt: skip


def book_of(parts: list) -> ParameterBook:
    book = ParameterBook(torch.Size([V, D]))
    cache = GramCache()
    for part in parts:
        book.add(part, cache)
    return book
