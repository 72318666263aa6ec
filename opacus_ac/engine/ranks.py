"""What several processes must agree on before they train together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from opacus_ac.distributed.reducers import Reducer
from opacus_ac.noise.keys import SEED
from opacus_ac.noise.streams import RandomStream, SeededStream, SharedStream

_HOOKS = "Opacus's hooks keep per-sample gradients on parameters that are replaced or reduced: use 'bk'"


_ONE_PROCESS: dict[tuple[str, Any], str] = {
    ("grad_sample_mode", "hooks"): _HOOKS,
    ("grad_sample_mode", "functorch"): _HOOKS,
    ("sampling", "shuffled"): (
        "every process would shuffle for itself, and a record could be on two of them: use poisson_sampling=True, or "
        "sampling='fixed_size'"
    ),
    ("fused_step", True): "gradients are exchanged in buckets: use fused_step=False",
    ("clip_policy", "raw_percentile"): "it reads the norms of one process only: use 'percentile'",
    ("max_rows_per_user", True): "users have not been divided among processes: use one, or rows as records",
    ("noise_allocation", True): "weights per parameter have no place in the shared buckets: use noise_allocation=None",
}
"""Settings of ``make_private`` that hold on one process only, and why."""


_WHOLE_MODEL: dict[tuple[str, Any], str] = {
    ("zeroth_order", True): (
        "each rank would move its shard along a direction of its own. Leave fully_shard out: forward passes need "
        "no gradients and no optimizer state, and every rank has the whole model"
    ),
}
"""Settings of ``make_private`` that several processes have with the whole model on each of them only, and why."""


_NOISE = 1000  # first of the purposes for which seeded noise streams of the ranks are forked


def check_options(reducer: Reducer, options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for settings of ``make_private`` that hold on one process only.

    Args:
        reducer: the processes.
        options: settings by name, those of ``_ONE_PROCESS`` among them.
    """
    if reducer.name == "local":
        return
    for (name, value), reason in _ONE_PROCESS.items():
        if options.get(name) == value:
            raise ValueError(f"{name}={value!r} does not work with several processes ({reducer.name}): {reason}")
    for (name, value), reason in _WHOLE_MODEL.items():
        if options.get(name) == value and reducer.name != "ddp":
            raise ValueError(f"{name}={value!r} does not work with a sharded model ({reducer.name}): {reason}")


def rank_streams(reducer: Reducer, noise: RandomStream, sampling: RandomStream) -> tuple[RandomStream, RandomStream]:
    """Return the streams of this rank: noise of its own, and draws that all ranks share.

    Guarantees:
        The key of the draws comes from the operating system of rank 0 and is sent to the others; it is never saved. Noise
        streams have a key per rank. Seeded streams (for tests) share the seed for the draws; their noise differs by rank.
    """
    if reducer.world == 1:
        return noise, sampling
    if isinstance(noise, SeededStream):
        return noise.fork(_NOISE + reducer.rank), sampling
    return noise, SharedStream(reducer.on_first(lambda: os.urandom(SEED)))


def check_alike(reducer: Reducer, settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError``, on every rank, when the ranks were set up differently.

    Args:
        reducer: the processes.
        settings: plain values that have to be the same everywhere.
    """
    rows = reducer.gather_objects({name: repr(value) for name, value in settings.items()})
    for name in sorted(set().union(*rows)):
        values = [row.get(name) for row in rows]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"the ranks differ in {name}: rank 0 has {values[0]}, rank {other} {values[other]}. Start every rank with "
                "the same arguments, model and dataset"
            )


def check_noise(reducer: Reducer, stream: RandomStream) -> None:
    """Raise ``ValueError``, on every rank, when two ranks have the same noise: their shares could be subtracted.

    It draws two values that are used for nothing else.
    """
    if reducer.world == 1:
        return
    rows = reducer.gather(stream.normal(2).numpy().view(np.int64))
    seen: dict[tuple[int, ...], int] = {}
    for rank, row in enumerate(map(tuple, rows.tolist())):
        if row in seen:
            raise ValueError(
                f"ranks {seen[row]} and {rank} draw the same noise, which could be taken out of the sums: let "
                "make_private make the streams, without a stream of your own"
            )
        seen[row] = rank


def parameter_layout(parameters: Sequence[nn.Parameter], names: Sequence[str]) -> dict[str, str]:
    """Return name, shape and type of each trained parameter, which all ranks must have in one order."""
    numbered = enumerate(zip(names, parameters, strict=True))
    return {f"trained parameter {i}": f"{name} {tuple(p.shape)} {p.dtype}" for i, (name, p) in numbered}
