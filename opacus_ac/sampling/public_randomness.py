"""Finds random generators that a collate function carries. Their seed stands in a script, so their draws are public."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_DEPTH = 3


def carried_generator(collate: Any) -> str | None:
    """Return the name of a generator or of a seed that a collate function carries; None if it has none.

    The draws of such a generator for a batch tell how many records it has seen, and one more record changes the draws
    for all records after it. The global generators are safe, because they have secret states during a step.

    Args:
        collate: a function, a method, a ``functools.partial``, or a collator object that may wrap another.

    >>> carried_generator(functools.partial(sorted, key=random.Random(0))), carried_generator(sorted)
    ('key', None)
    """
    return _search(collate, _DEPTH, set())


def _search(holder: Any, depth: int, seen: set[int]) -> str | None:
    seen.add(id(holder))
    for name, value in _held(holder):
        if isinstance(value, _KINDS) and not isinstance(value, random.SystemRandom):
            return name
        if name == "seed" and isinstance(value, int) and _is_collator(holder):
            return f"seed={value}"
        deeper = depth > 1 and id(value) not in seen and (_is_collator(value) or isinstance(value, _FUNCTIONS))
        found = _search(value, depth - 1, seen) if deeper else None
        if found is not None:
            return found
    return None


_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


def _is_collator(value: Any) -> bool:
    return "collat" in type(value).__name__.lower()


def _held(holder: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and values that a collate function refers to."""
    if isinstance(holder, functools.partial):
        yield "func", holder.func
        yield from ((f"argument {place}", value) for place, value in enumerate(holder.args))
        yield from holder.keywords.items()
    elif isinstance(holder, types.MethodType):
        yield "self", holder.__self__
        yield "function", holder.__func__
    elif isinstance(holder, types.FunctionType):
        yield from _of_function(holder)
    else:
        yield from getattr(holder, "__dict__", {}).items()
        call = vars(type(holder)).get("__call__")
        if isinstance(call, types.FunctionType):
            yield "__call__", call


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from ((f"default {place}", value) for place, value in enumerate(function.__defaults__ or ()))
    yield from (function.__kwdefaults__ or {}).items()
    for name in code.co_names:
        if isinstance(function.__globals__.get(name), _KINDS):
            yield name, function.__globals__[name]
