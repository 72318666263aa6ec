"""Secret states of the global random generators, for what draws from them while private records are worked on.

The global generators of torch, numpy and Python have public seeds (``seed=42`` in a script), and checkpoints save their
states. What they draw while a batch is collated, or goes through a model, must not be known: dropout masks that are
drawn for the whole batch shift with every record that joins it.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORDS = 624
"""32-bit words of the state of a Mersenne Twister."""

Undo = Callable[[], None]


def secret_torch_state() -> Tensor:
    """Return a state of torch's CPU generator with 19,937 bits of entropy: a seed would keep 32 of them."""
    # The layout of a state is torch's own business but for the words, which a check in the tests finds in their place.
    state = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little")).get_state()
    words = np.frombuffer(os.urandom(4 * _WORDS), dtype=np.uint32).astype(np.uint64)
    state[24 : 24 + 8 * _WORDS] = torch.from_numpy(words.view(np.uint8).copy())
    return state


def replace_torch_state() -> Undo:
    """Give torch's global generators (processor and CUDA devices in use) secret states.

    Returns a function that restores the old states.
    """
    before = torch.get_rng_state()
    devices = _cuda_generators()
    known = [generator.get_state() for generator in devices]
    torch.set_rng_state(secret_torch_state())
    for generator in devices:
        generator.manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))

    def undo() -> None:
        torch.set_rng_state(before)
        for generator, state in zip(devices, known, strict=True):
            generator.set_state(state)

    return undo


def _cuda_generators() -> list[torch.Generator]:
    # In a forked worker CUDA cannot be used, and asking for its generators would raise.
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()) or torch.cuda._is_in_bad_fork():
        return []
    return list(torch.cuda.default_generators)


def replace_other_states() -> Undo:
    """Give the global generators of numpy (where it is in use) and of Python secret states.

    Returns a function that restores the old states.
    """
    before = random.getstate()
    random.seed(os.urandom(64))
    numpy_before: Any = np.random.get_state() if "numpy.random" in sys.modules else None
    if numpy_before is not None:
        np.random.set_state(("MT19937", np.frombuffer(os.urandom(4 * _WORDS), dtype=np.uint32), _WORDS, 0, 0.0))

    def undo() -> None:
        random.setstate(before)
        if numpy_before is not None:
            np.random.set_state(numpy_before)

    return undo


def seed_states(content: bytes) -> None:
    """Seed the global generators of torch, numpy (where it is in use) and Python: for runs that are to be repeated.

    These are the generators that :func:`replace_torch_state` and :func:`replace_other_states` put back.

    Args:
        content: at most 4 bytes.
    """
    seed = int.from_bytes(content, "little")
    for generator in (torch.default_generator, *_cuda_generators()):  # torch.manual_seed would reach others as well
        generator.manual_seed(seed)
    random.seed(seed)
    if "numpy.random" in sys.modules:
        np.random.seed(seed)


@contextmanager
def secret_randomness() -> Iterator[None]:
    """Give the global generators of torch, numpy and Python secret states, and put the old ones back at the end.

    Works in a loader's worker processes too. Each use starts from new entropy of the operating system.

    Guarantees:
        Knowing the seeds tells nothing about what is drawn inside. Afterwards the states are those of before, whatever
        was drawn, so they tell nothing about the records.

    >>> before = torch.manual_seed(0).get_state()
    >>> with secret_randomness():
    ...     drawn = torch.rand(3)
    >>> torch.equal(before, torch.get_rng_state()), torch.equal(drawn, torch.rand(3))
    (True, False)
    """
    undo = [replace_torch_state()]
    try:
        undo.append(replace_other_states())
        yield
    finally:
        for step in reversed(undo):
            step()
