"""Random streams for noise and sampling: secret by default, seeded only for tests.

A differential privacy guarantee holds against everyone who does not know the noise. A training seed is public
(it stands in scripts and logs), and ``torch``'s CPU generator keeps 32 bits of it, so neither is used here.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from opacus_ac._validate import not_negative
from opacus_ac.noise.gaussian_cpu import BLOCK, GaussianSampler, uniform
from opacus_ac.noise.keys import KeyStream

if TYPE_CHECKING:
    from opacus_ac.noise.gaussian_gpu import DeviceSampler

# Values that are drawn at once where noise is moved to another device or comes from a torch generator.
_DEVICE_BLOCK = 1 << 20
# Values below which another thread costs more than it saves.
_VALUES_PER_THREAD = 1 << 17


class RandomStream(Protocol):
    """Source of float64 draws; one object per purpose (noise, sampling)."""

    secret: bool

    @property
    def description(self) -> str:
        """What the draws are made of, for the report."""

    def normal(self, size: int) -> torch.Tensor:
        """Return ``[size]`` independent standard normal float64 values on the CPU."""

    def uniform(self, size: int) -> torch.Tensor:
        """Return ``[size]`` independent uniform float64 values in [0, 1) on the CPU."""

    def add_normal(self, targets: Sequence[torch.Tensor], std: float, scale: float = 1.0) -> None:
        """Set each target to ``(target + std * N(0, 1)) * scale`` in place, in float64, rounded once.

        Args:
            targets: floating tensors of any shape, layout and device. Many at a time are faster than one by one.
            std: std of the noise per coordinate, >= 0; nothing is drawn for 0.
            scale: public factor.
        """

    def fork(self, purpose: int) -> RandomStream:
        """Return an independent stream of the same kind for another purpose."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue the stream; empty for a secret stream."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a seeded stream; a secret stream ignores it."""


def _check_std(std: float) -> None:
    """Refuse a std that would quietly mean no noise or no number."""
    not_negative(**{"std of the noise": std})


def _on_flat(target: torch.Tensor, change: Callable[[torch.Tensor], None]) -> None:
    """Change the values of ``target`` in place through a flat tensor, whatever its layout."""
    target = target.detach()
    flat = target.contiguous().view(-1)  # the same memory, unless the layout forbids it
    change(flat)
    if not target.is_contiguous():
        target.copy_(flat.view_as(target))


def _add_in_device_blocks(flat: torch.Tensor, std: float, scale: float, normal: Callable[[int], torch.Tensor]) -> None:
    """Noise and scale ``flat [n]`` on its device in float64, with draws from the CPU."""
    for start in range(0, flat.numel(), _DEVICE_BLOCK):
        block = flat[start : start + _DEVICE_BLOCK]
        total = block.double()
        if std > 0:
            total.add_(normal(block.numel()).mul_(std).to(block.device))
        block.copy_(total.mul_(scale))


Block = npt.NDArray[np.floating]


def _add_blocks(sampler: GaussianSampler, blocks: deque[Block], std: float, scale: float) -> None:
    """Noise and scale blocks of values until none is left; several threads share ``blocks``."""
    while True:
        try:
            block = blocks.popleft()
        except IndexError:
            return
        sampler.add_to(block, std, scale)


class SecretStream:
    """Cryptographic stream, keyed by the operating system; never saved, never repeated after a fork.

    Noise for large tensors is drawn in ``min(torch.get_num_threads(), os.cpu_count())`` threads. Noise for tensors on a
    CUDA or ROCm device is drawn on that device, by a Triton kernel; where the kernel cannot run, a warning says so and
    the processor draws.

    Args:
        hardened: sum four Gaussian draws per noise value (secure mode), which defeats attacks on floating-point
            rounding.

    Guarantees:
        Every thread that draws has its own key for AES-256 in counter mode, drawn per process. A forked child draws its
        own keys, and a copy of the object is a new stream. A GPU has its own key for ChaCha20
        (``opacus_ac/noise/gaussian_gpu.py``).

    References:
        arXiv 2107.10138 (Holohan and Braghin 2021).
    """

    secret = True

    def __init__(self, hardened: bool = False) -> None:
        self._hardened = hardened
        self._rekey()

    @property
    def description(self) -> str:
        """What the noise is made of, for the report."""
        ciphers = "AES-256-CTR" + (" (on the GPU ChaCha20)" if any(self._on_devices.values()) else "")
        return f"{ciphers}, keyed by the operating system" + (", sums of four Gaussians" if self._hardened else "")

    def _rekey(self) -> None:
        """Draw new keys and forget everything that a forked child shares with its parent, threads included."""
        self._pid = os.getpid()
        self._bits = KeyStream()
        self._samplers: list[GaussianSampler] = []
        self._on_devices: dict[torch.device, DeviceSampler | None] = {}
        self._helpers: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            self._rekey()

    def __reduce__(self) -> tuple[type[SecretStream], tuple[bool]]:
        """Copy and pickle as a new stream: two with one key would draw the same noise."""
        return SecretStream, (self._hardened,)

    def fork(self, purpose: int) -> SecretStream:
        """Return another secret stream, with its own key."""
        return SecretStream(self._hardened)

    def normal(self, size: int) -> torch.Tensor:
        """Return ``[size]`` standard normal float64 values."""
        values = torch.zeros(size, dtype=torch.float64)
        self._add_on_cpu([values.numpy()], 1.0, 1.0)
        return values

    def uniform(self, size: int) -> torch.Tensor:
        """Return ``[size]`` uniform float64 values in [0, 1)."""
        self._check_process()
        words, values = np.empty(size, np.uint64), np.empty(size)
        self._bits.fill(words)
        uniform(words, values)
        return torch.from_numpy(values)

    def add_normal(self, targets: Sequence[torch.Tensor], std: float, scale: float = 1.0) -> None:
        """Set each target to ``(target + std * N(0, 1)) * scale`` in place, in float64, rounded once."""
        _check_std(std)
        together: dict[torch.device, list[torch.Tensor]] = {}
        for target in targets:
            if target.dtype not in (torch.float32, torch.float64):
                _on_flat(target, lambda flat: _add_in_device_blocks(flat, std, scale, self.normal))
            elif target.is_contiguous():
                together.setdefault(target.device, []).append(target.detach().view(-1))
            else:
                _on_flat(target, lambda flat: self._add_there([flat], std, scale))
        for flats in together.values():
            self._add_there(flats, std, scale)

    def _add_there(self, flats: list[torch.Tensor], std: float, scale: float) -> None:
        """Noise and scale tensors ``[n]`` of one device on it."""
        device = flats[0].device
        if device.type == "cpu":
            self._add_on_cpu([flat.numpy() for flat in flats], std, scale)
            return
        sampler = self._sampler(device) if std > 0 and device.type == "cuda" else None
        if sampler is not None:
            with self._lock:
                sampler.add(flats, std, scale)
            return
        for flat in flats:
            _add_in_device_blocks(flat, std, scale, self.normal)

    def _sampler(self, device: torch.device) -> DeviceSampler | None:
        """Return what draws on the device, or None if the processor has to."""
        self._check_process()
        if device not in self._on_devices:
            sampler = None
            try:
                from opacus_ac.noise.gaussian_gpu import DeviceSampler

                sampler = DeviceSampler(device, self._summed)
            except Exception as error:  # no Triton, no compiler for it, a device that it does not know
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                warnings.warn(
                    f"noise for {device} is drawn by the processor, which takes longer, because its kernel cannot run "
                    f"there ({reason}). Install triton and a C compiler to draw it there",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._on_devices[device] = sampler
        return self._on_devices[device]

    @property
    def _summed(self) -> int:
        return 4 if self._hardened else 1

    def _add_on_cpu(self, arrays: list[Block], std: float, scale: float) -> None:
        """Noise and scale arrays ``[n]``, in several threads if that pays."""
        self._check_process()
        allowed = min(torch.get_num_threads(), os.cpu_count() or 1)
        threads = max(1, min(allowed, sum(values.size for values in arrays) // _VALUES_PER_THREAD))
        blocks = deque(values[i : i + BLOCK] for values in arrays for i in range(0, values.size, BLOCK))
        with self._lock:  # a sampler serves one tensor at a time
            while len(self._samplers) < threads:
                self._samplers.append(GaussianSampler(KeyStream(), self._summed))
            if threads > 1 and self._helpers is None:
                self._helpers = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="opacus_ac noise")
            helping = [
                self._helpers.submit(_add_blocks, sampler, blocks, std, scale)
                for sampler in self._samplers[1:threads]
                if self._helpers is not None
            ]
            try:
                _add_blocks(self._samplers[0], blocks, std, scale)
            finally:
                blocks.clear()  # if interrupted, the others stop after the block in hand
                wait(helping)
        for helper in helping:
            helper.result()  # raises what the thread raised: its blocks have no noise

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the state of a secret stream is never saved."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore ``state``: a secret stream always starts from new entropy."""


class SharedStream(SecretStream):
    """Secret stream that several processes draw alike, for the records of a step; it makes no noise.

    Args:
        seed: :data:`opacus_ac.noise.keys.SEED` secret bytes, the same everywhere.
    """

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        super().__init__()

    def _rekey(self) -> None:
        super()._rekey()
        self._bits = KeyStream(self._seed)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                "a forked process drew from a stream that all ranks share: draw in the process of the rank"
            )

    def __reduce__(self) -> tuple[type[SecretStream], tuple[bool]]:
        raise TypeError("a stream that all ranks share cannot be copied: the copy would draw the same records again")

    def _add_on_cpu(self, arrays: list[Block], std: float, scale: float) -> None:
        raise RuntimeError("noise from a stream that all ranks share would be the same on all of them")

    def _sampler(self, device: torch.device) -> None:
        return None  # as the processor's


class SeededStream:
    """Reproducible stream over a ``torch.Generator``, for tests only: whoever knows the seed removes the noise.

    >>> a, b = (SeededStream(torch.Generator().manual_seed(1)) for _ in range(2))
    >>> bool((a.normal(3) == b.normal(3)).all()), a.secret
    (True, False)
    """

    secret = False
    description = "SEEDED generator (for tests)"

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

    def add_normal(self, targets: Sequence[torch.Tensor], std: float, scale: float = 1.0) -> None:
        """Set each target to ``(target + std * N(0, 1)) * scale``, in one thread.

        So the draws do not depend on the machine.
        """
        _check_std(std)
        for target in targets:
            _on_flat(target, lambda flat: _add_in_device_blocks(flat, std, scale, self.normal))

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state (a seeded stream is not secret)."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        if "generator" in state:
            self._generator.set_state(state["generator"])


def noise_stream(generator: torch.Generator | None, secure_mode: bool = False) -> RandomStream:
    """Return the stream of the noise: secret, in secure mode of four Gaussians a value; or seeded, for tests.

    Raises:
        ValueError: If a generator is given together with secure mode.
    """
    if generator is None:
        return SecretStream(hardened=secure_mode)
    if secure_mode:
        raise ValueError(
            "generator with secure_mode=True: whoever knows its seed could remove the noise. Leave one of them out"
        )
    return SeededStream(generator)
