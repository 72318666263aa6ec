"""What several processes must agree on before they train together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from opacus_ac.distributed.reducers import Reducer
from opacus_ac.distributed.same_records import check_same_records
from opacus_ac.engine.parts import Job
from opacus_ac.noise.keys import SEED
from opacus_ac.noise.streams import RandomStream, SeededStream, SharedStream
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.optimizer.parameters import named_parameters
from opacus_ac.optimizer.state import public_settings
from opacus_ac.sampling.loader import PrivateDataLoader

_NOISE = 1000  # first of the purposes for which seeded noise streams of the ranks are forked


def check_start(optimizer: AdaptiveClipDPOptimizer, loader: PrivateDataLoader, job: Job) -> None:
    """Check that all ranks begin the same run. With one process there is nothing to check.

    Raises:
        ValueError: If they do not, on every rank.
    """
    if optimizer.reducer.world == 1:
        return
    generator = job.noise_generator
    settings = {
        **public_settings(optimizer),
        "reducer": optimizer.reducer.name,
        "normalize": optimizer.normalize,
        "lr_control": optimizer.control is not None,
        "ema_decay": None if optimizer.ema is None else optimizer.ema.decay,
        "max_physical_batch_size": job.options.performance.max_physical_batch_size,
        "loss_reduction": optimizer.loss_reduction,
        "seed of noise_generator": None if generator is None else generator.initial_seed(),
        "batches in a pass": len(loader),
        "number of records": len(loader.dataset),  # type: ignore[arg-type]
        **optimizer.measurement.compared_at_start(),
        **parameter_layout(*named_parameters(job.module, optimizer.original_optimizer)),
    }
    check_alike(optimizer.reducer, settings)
    check_same_records(optimizer.reducer, loader.dataset)
    check_noise(optimizer.reducer, optimizer.mechanism.stream)


def rank_streams(reducer: Reducer, noise: RandomStream, sampling: RandomStream) -> tuple[RandomStream, RandomStream]:
    """Return the streams of this rank: noise of its own, and draws that all ranks share.

    Guarantees:
        The key of the draws comes from the operating system of rank 0 and is sent to the others; it is never saved.
        Noise streams have a key per rank. Seeded streams (for tests) share the seed for the draws; their noise differs
        by rank.
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
                f"the ranks differ in {name}: rank 0 has {values[0]}, rank {other} {values[other]}. Start every rank "
                "with the same arguments, model and dataset"
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
