"""Gradients of users: the gradient of a user is the sum of the gradients of its rows, and is clipped as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from opacus_ac.grad_sample.one_backward.bounds import wide
from opacus_ac.grad_sample.one_backward.outer_products import Dense, Lookup, Rows, Term
from opacus_ac.grad_sample.one_backward.routed import Routed

CountUsers = Callable[[int], int]
"""Returns the number of users in a batch with so many rows. It raises if that number is not certain."""


def sum_rows(values: Tensor, users: int) -> Tensor:
    """Return the sums ``[U, *shape]`` of gradients ``[U K, *shape]`` over each user's rows, in float32 or float64."""
    if values.shape[0] == users:
        return values
    return wide(values).reshape(users, values.shape[0] // users, *values.shape[1:]).sum(1)


def regroup(term: Term | Routed, users: int) -> Term | Routed:
    """Return the term that a use of a parameter adds to the gradients of users, from the term for their rows.

    In a sum of outer products, the rows of a user are further positions of one record. So ``[U K, T, d]`` is read as
    ``[U, K T, d]``, without computation.

    Args:
        term: the term for rows.
        users: number of users U.
    """
    if isinstance(term, Dense):
        if term.left.shape[0] == users:
            return term
        return Dense(_as_positions(term.left, users), _as_positions(term.right, users))
    if isinstance(term, Lookup):
        if term.ids.shape[0] == users:
            return term
        return Lookup(term.ids.reshape(users, -1), _as_positions(term.right, users))
    if isinstance(term, Routed):
        return replace(term, records=term.records // (term.batch // users), batch=users)
    return Rows(sum_rows(term.values, users))


def _as_positions(values: Tensor, users: int) -> Tensor:
    return values.reshape(users, -1, values.shape[-1])
