"""Random streams for noise and sampling: secret by default, seeded only for tests.

A differential privacy guarantee holds against everyone who does not know the noise. A training seed is public
(it stands in scripts and logs), and ``torch``'s CPU generator keeps 32 bits of it, so neither is used here.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np
import torch


class RandomStream(Protocol):
    """Source of float64 draws; one object per purpose (noise, sampling)."""

    secret: bool

    def normal(self, size: int) -> torch.Tensor:
        """Return ``[size]`` independent standard normal float64 values on the CPU."""

    def uniform(self, size: int) -> torch.Tensor:
        """Return ``[size]`` independent uniform float64 values in [0, 1) on the CPU."""

    def fork(self, purpose: int) -> RandomStream:
        """Return an independent stream of the same kind for another purpose."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue the stream; empty for a secret stream."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a seeded stream; a secret stream ignores it."""


class SecretStream:
    """Stream keyed with 256 bits of the operating system's entropy; never saved, never repeated after a fork.

    Guarantees: the key is drawn per process; a forked child draws its own. The generator (PCG64-DXSM) is
    statistically strong and secret but not cryptographic.
    """

    secret = True

    def __init__(self) -> None:
        self._rekey()

    def _rekey(self) -> None:
        self._pid = os.getpid()
        seed = np.random.SeedSequence(int.from_bytes(os.urandom(32), "little"), pool_size=8)
        self._generator = np.random.Generator(np.random.PCG64DXSM(seed))

    def fork(self, purpose: int) -> SecretStream:
        """Return another secret stream, with a key of its own."""
        return SecretStream()

    def _current(self) -> np.random.Generator:
        if os.getpid() != self._pid:
            self._rekey()
        return self._generator

    def normal(self, size: int) -> torch.Tensor:
        """Return ``[size]`` standard normal float64 values."""
        return torch.from_numpy(self._current().standard_normal(size))

    def uniform(self, size: int) -> torch.Tensor:
        """Return ``[size]`` uniform float64 values in [0, 1)."""
        return torch.from_numpy(self._current().random(size))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the state of a secret stream is never saved."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore ``state``: a secret stream always starts from new entropy."""


class SeededStream:
    """Reproducible stream over a ``torch.Generator``, for tests only: whoever knows the seed removes the noise.

    >>> a, b = (SeededStream(torch.Generator().manual_seed(1)) for _ in range(2))
    >>> bool((a.normal(3) == b.normal(3)).all()), a.secret
    (True, False)
    """

    secret = False

    def __init__(self, generator: torch.Generator) -> None:
        if generator.device.type != "cpu":
            raise ValueError(f"noise_generator must be a CPU torch.Generator, got one on {generator.device}")
        self._generator = generator

    def fork(self, purpose: int) -> SeededStream:
        """Return a seeded stream that differs by ``purpose``."""
        seed = (self._generator.initial_seed() + purpose * 0x9E3779B9) % 2**63
        return SeededStream(torch.Generator().manual_seed(seed))

    def normal(self, size: int) -> torch.Tensor:
        """Return ``[size]`` standard normal float64 values."""
        return torch.randn(size, dtype=torch.float64, generator=self._generator)

    def uniform(self, size: int) -> torch.Tensor:
        """Return ``[size]`` uniform float64 values in [0, 1)."""
        return torch.rand(size, dtype=torch.float64, generator=self._generator)

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state (a seeded stream is not secret)."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        if "generator" in state:
            self._generator.set_state(state["generator"])
