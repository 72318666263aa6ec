"""Gradients of users from those of their rows: a user's gradient is the sum over its rows, clipped as one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from opacus_ac.grad_sample.one_backward.bounds import wide
from opacus_ac.grad_sample.one_backward.outer_products import Dense, Lookup, Rows, Term

CountUsers = Callable[[int], int]
"""From the number of rows of a batch, each user's one after the other, to the number of users; it raises when in
doubt."""


def sum_rows(values: Tensor, users: int) -> Tensor:
    """Sum per-row gradients ``[U K, *shape]`` over each user's rows: ``[U, *shape]``, in float32 or better."""
    if values.shape[0] == users:
        return values
    return wide(values).reshape(users, values.shape[0] // users, *values.shape[1:]).sum(1)


def regroup(term: Term, users: int) -> Term:
    """Return what a use of a parameter adds to the gradients of ``users`` users, from the same of their rows.

    In a sum of outer products a user's rows are more positions of one record, so nothing is computed: ``[U K, T, d]``
    is read as ``[U, K T, d]``.
    """
    if isinstance(term, Dense):
        if term.left.shape[0] == users:
            return term
        return Dense(_as_positions(term.left, users), _as_positions(term.right, users))
    if isinstance(term, Lookup):
        if term.ids.shape[0] == users:
            return term
        return Lookup(term.ids.reshape(users, -1), _as_positions(term.right, users))
    return Rows(sum_rows(term.values, users))


def _as_positions(values: Tensor, users: int) -> Tensor:
    return values.reshape(users, -1, values.shape[-1])
