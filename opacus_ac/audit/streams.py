"""Random numbers of audits: repeated batches with a record or without it, and generators that an attacker knows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from opacus_ac.noise.streams import RandomStream


class FixedDraws:
    """Sampling stream that draws the same batches in every run, the canary always or never.

    Two such streams give neighbouring runs with the same public N.

    Args:
        seed: seed of the draws.
        present: mapping from a record's index to whether it is in every batch (True) or in none (False). The value may
            also be a sequence with one such flag for each batch, of which the last holds from then on.
    """

    secret = False

    def __init__(self, seed: int, present: Mapping[int, bool | Sequence[bool]]) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.present = {i: [there] if isinstance(there, bool) else list(there) for i, there in present.items()}
        self._drawn = 0

    def uniform(self, size: int) -> torch.Tensor:
        """Return ``[size]`` values in [0, 1]; a record that is absent gets 1, which no rate exceeds."""
        values = torch.rand(size, dtype=torch.float64, generator=self._generator)
        for index, inside in self.present.items():
            values[index] = 0.0 if inside[min(self._drawn, len(inside) - 1)] else 1.0
        self._drawn += 1
        return values


class WithoutRecords:
    """Sampling stream in which some records are never drawn: a dataset without them, whose public N stays the same.

    Args:
        stream: stream of the draws.
        absent: indices of the records that are not there.
    """

    def __init__(self, stream: RandomStream, absent: list[int]) -> None:
        self._stream, self._absent, self.secret = stream, absent, stream.secret

    def uniform(self, size: int) -> torch.Tensor:
        """Return ``[size]`` uniform values, 1 for the absent records: no rate exceeds it."""
        values = self._stream.uniform(size)
        values[self._absent] = 1.0
        return values


def seed_public_generators(seed: int) -> None:
    """Seed every generator whose seed an attacker may know: noise that follows them is no noise."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # the legacy generator is the global one that code might use by mistake
    random.seed(seed)


@contextmanager
def public_generators() -> Iterator[None]:
    """Restore the global generators of torch, numpy and Python afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
