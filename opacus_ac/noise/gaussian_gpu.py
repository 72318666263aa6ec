"""Gaussian noise for tensors on a GPU, added there in one kernel: ChaCha20 key stream, Box-Muller transform, sum.

Noise for a model on a GPU that is drawn by the processor takes many times as long as the rest of a step. The kernel
reads a value, makes its noise in registers from the key stream, adds it in float64, scales, rounds once, and writes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

_LANES = 128  # cipher blocks of a program, one a thread
_PER_BLOCK = 8  # values from the 512 bits of a cipher block: 64 each, of which 53 are used
_SMALL = 1 << 18  # values up to which launching the kernel takes longer than to copy them twice
_TOGETHER = 1 << 22  # most values that are joined, so that the copy stays small beside the model
_CONSTANTS = np.frombuffer(b"expand 32-byte k", "<u4")
_TOLERANCE = 1e-13  # of the kernel against numpy, in standard deviations

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint32]


@triton.jit
def _quarter_round(a, b, c, d):  # type: ignore[no-untyped-def]
    a += b
    d ^= a
    d = (d << 16) | (d >> 16)
    c += d
    b ^= c
    b = (b << 12) | (b >> 20)
    a += b
    d ^= a
    d = (d << 8) | (d >> 24)
    c += d
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def _pair(w0, w1, w2, w3):  # type: ignore[no-untyped-def]
    """Two standard normal values from 128 bits: the upper 53 of one half for the angle, of the other for the radius."""
    angle = ((w1.to(tl.uint64) << 32) | w0.to(tl.uint64)) >> 11
    radius = (((w3.to(tl.uint64) << 32) | w2.to(tl.uint64)) >> 11) + 1
    turn = angle.to(tl.float64) * 6.9757369960172635e-16  # 2 pi / 2^53
    size = tl.sqrt(-2.0 * tl.log(radius.to(tl.float64) * 1.1102230246251565e-16))  # 2^-53
    return size * tl.cos(turn), size * tl.sin(turn)


@triton.jit
def _add_noise(target, count, state, factors, SUMMED: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Set ``target [count]`` to ``(target + std N(0, 1)) scale``.

    ``factors`` is a tensor that holds std and scale, because scalar arguments would be float32.
    """
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    s0 = tl.load(state + 0).to(tl.uint32, bitcast=True)
    s1 = tl.load(state + 1).to(tl.uint32, bitcast=True)
    s2 = tl.load(state + 2).to(tl.uint32, bitcast=True)
    s3 = tl.load(state + 3).to(tl.uint32, bitcast=True)
    s4 = tl.load(state + 4).to(tl.uint32, bitcast=True)
    s5 = tl.load(state + 5).to(tl.uint32, bitcast=True)
    s6 = tl.load(state + 6).to(tl.uint32, bitcast=True)
    s7 = tl.load(state + 7).to(tl.uint32, bitcast=True)
    s8 = tl.load(state + 8).to(tl.uint32, bitcast=True)
    s9 = tl.load(state + 9).to(tl.uint32, bitcast=True)
    s10 = tl.load(state + 10).to(tl.uint32, bitcast=True)
    s11 = tl.load(state + 11).to(tl.uint32, bitcast=True)
    low = tl.load(state + 12).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(state + 13).to(tl.uint32, bitcast=True).to(tl.uint64)
    s14 = tl.load(state + 14).to(tl.uint32, bitcast=True)
    s15 = tl.load(state + 15).to(tl.uint32, bitcast=True)
    start = (high << 32) | low
    std = tl.load(factors)
    scale = tl.load(factors + 1)
    zero = tl.zeros([LANES], dtype=tl.uint32)
    n0 = tl.zeros([LANES], dtype=tl.float64)
    n1 = n0
    n2 = n0
    n3 = n0
    n4 = n0
    n5 = n0
    n6 = n0
    n7 = n0
    for part in tl.static_range(SUMMED):
        counter = start + ((program * LANES + lane) * SUMMED + part).to(tl.uint64)
        s12 = (counter & 0xFFFFFFFF).to(tl.uint32)
        s13 = (counter >> 32).to(tl.uint32)
        x0 = zero + s0
        x1 = zero + s1
        x2 = zero + s2
        x3 = zero + s3
        x4 = zero + s4
        x5 = zero + s5
        x6 = zero + s6
        x7 = zero + s7
        x8 = zero + s8
        x9 = zero + s9
        x10 = zero + s10
        x11 = zero + s11
        x12 = s12
        x13 = s13
        x14 = zero + s14
        x15 = zero + s15
        for _ in range(10):
            x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
            x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
            x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
            x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
            x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
            x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
            x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
            x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
        a, b = _pair(x0 + s0, x1 + s1, x2 + s2, x3 + s3)
        n0 += a
        n1 += b
        a, b = _pair(x4 + s4, x5 + s5, x6 + s6, x7 + s7)
        n2 += a
        n3 += b
        a, b = _pair(x8 + s8, x9 + s9, x10 + s10, x11 + s11)
        n4 += a
        n5 += b
        a, b = _pair(x12 + s12, x13 + s13, x14 + s14, x15 + s15)
        n6 += a
        n7 += b
    base = program * (8 * LANES) + lane
    _write(target, base, count, n0, std, scale)
    _write(target, base + LANES, count, n1, std, scale)
    _write(target, base + 2 * LANES, count, n2, std, scale)
    _write(target, base + 3 * LANES, count, n3, std, scale)
    _write(target, base + 4 * LANES, count, n4, std, scale)
    _write(target, base + 5 * LANES, count, n5, std, scale)
    _write(target, base + 6 * LANES, count, n6, std, scale)
    _write(target, base + 7 * LANES, count, n7, std, scale)


@triton.jit
def _write(target, index, count, noise, std, scale):  # type: ignore[no-untyped-def]
    value = tl.load(target + index, mask=index < count, other=0.0)
    total = (value.to(tl.float64) + noise * std) * scale
    tl.store(target + index, total.to(value.dtype), mask=index < count)


class DeviceSampler:
    """Adds secret Gaussian noise to tensors of one GPU.

    Args:
        device: where the tensors are.
        summed: number of independent Gaussians that are summed for one draw, divided by its square root (see
            :class:`opacus_ac.noise.gaussian_cpu.GaussianSampler`).

    Guarantees:
        Key (256 bits), nonce (64 bits) and first counter come from ``os.urandom``. No block of the key stream is used
        twice. Every Gaussian is float64, from 53 random bits for the angle and 53 for the radius: it reaches to 8.57
        standard deviations. Added in float64, the result is rounded once, to the target's type.

    Raises:
        RuntimeError: If the kernel gives wrong values on this device (before its first use it is compared with
            ``cryptography`` and ``numpy``).

    References:
        ChaCha20: RFC 8439, with the 64-bit counter of Bernstein 2008; Box and Muller 1958.
    """

    def __init__(self, device: torch.device, summed: int = 1) -> None:
        self._device, self._summed = device, summed
        self._check()
        self._seed = _seed_words(os.urandom(48))

    def add(self, targets: Sequence[torch.Tensor], std: float, scale: float) -> None:
        """Set every target ``[n]`` on the device to ``(target + N(0, std^2)) * scale``.

        Targets are contiguous, in float32 or float64. Small ones are joined, so that there are fewer launches.
        """
        parts = _joined(targets)
        whole = [part[0] if len(part) == 1 else torch.cat(part) for part in parts]
        self._add(whole, std, scale, self._seed)
        for part, noised in zip(parts, whole, strict=True):
            if len(part) > 1:
                torch._foreach_copy_(part, noised.split([target.numel() for target in part]))

    def _add(self, targets: Sequence[torch.Tensor], std: float, scale: float, seed: Words) -> None:
        """Draw from ``seed`` on, and move its counter past what was drawn."""
        states = np.repeat(seed[None], len(targets), axis=0)
        for state, target in zip(states, targets, strict=True):
            state[12:14] = seed[12:14]
            programs = -(-target.numel() // (_LANES * _PER_BLOCK))
            counter = (int(seed[12]) | int(seed[13]) << 32) + programs * _LANES * self._summed
            seed[12:14] = counter & 0xFFFFFFFF, counter >> 32 & 0xFFFFFFFF
        on_device = torch.from_numpy(states.view(np.int32)).to(self._device)
        factors = torch.tensor([std / math.sqrt(self._summed), scale], dtype=torch.float64).to(self._device)
        with _current(self._device):
            for state, target in zip(on_device, targets, strict=True):
                if target.numel():
                    grid = (-(-target.numel() // (_LANES * _PER_BLOCK)),)
                    _add_noise[grid](
                        target, target.numel(), state, factors, SUMMED=self._summed, LANES=_LANES, num_warps=4
                    )

    def _check(self) -> None:
        """Compare a draw from a public key with what it should be, over a carry of the counter, from both types."""
        size = 5 * _LANES * _PER_BLOCK // 2 + 3
        for dtype in (torch.float32, torch.float64):
            seed = _seed_words(bytes(range(32)) + b"\xff\xff\xff\xff\x01\x00\x00\x00" + b"opacusac")
            start = np.linspace(-1, 1, size)
            target = torch.from_numpy(start).to(self._device, dtype)
            wanted = (target.double().cpu().numpy() + 0.7 * draws(seed, size, self._summed)) * 0.3
            self._add([target], 0.7, 0.3, seed)
            tolerance = _TOLERANCE if dtype == torch.float64 else 1.2e-7
            error = np.abs(target.double().cpu().numpy() - wanted) / np.maximum(np.abs(wanted), 1.0)
            if not error.max() <= tolerance:
                raise RuntimeError(f"the noise kernel is off by {error.max():.1e} on {self._device} with {dtype}")


def _joined(targets: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return the targets in parts for one launch each: a large one by itself, small ones of a type together."""
    parts, open_parts = [], dict[torch.dtype, list[torch.Tensor]]()
    for target in targets:
        if target.numel() > _SMALL:
            parts.append([target])
            continue
        part = open_parts.get(target.dtype)
        if part is None or sum(map(torch.numel, part)) + target.numel() > _TOGETHER:
            part = open_parts[target.dtype] = []
            parts.append(part)
        part.append(target)
    return parts


def draws(seed: Words, size: int, summed: int = 1) -> Floats:
    """Return the ``[size]`` values that a sampler with this state adds at std 1.

    They are computed by ``cryptography`` and ``numpy``.
    """
    programs = -(-size // (_LANES * _PER_BLOCK))
    blocks = programs * _LANES * summed
    stream = np.frombuffer(_key_stream(seed, blocks), "<u8").reshape(programs, _LANES, summed, 4, 2)
    angle = (stream[..., 0] >> np.uint64(11)) * (2 * math.pi * 2.0**-53)
    radius = np.sqrt(-2 * np.log(((stream[..., 1] >> np.uint64(11)) + np.uint64(1)) * 2.0**-53))
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).sum(axis=2) / math.sqrt(summed)
    values: Floats = pairs.reshape(programs, _LANES, _PER_BLOCK).swapaxes(1, 2).reshape(-1)[:size]
    return values


def _key_stream(seed: Words, blocks: int) -> bytes:
    """Return ``blocks`` of 64 bytes. The library's cipher counts with 32 bits: the carry is made here."""
    low, high = int(seed[12]), int(seed[13])
    parts = []
    while blocks:
        count = min(blocks, 2**32 - low)
        nonce = np.array([low, high, *seed[14:16]], "<u4").tobytes()
        cipher = Cipher(algorithms.ChaCha20(seed[4:12].tobytes(), nonce), mode=None)
        parts.append(cipher.encryptor().update(bytes(64 * count)))
        blocks, low, high = blocks - count, 0, high + 1 & 0xFFFFFFFF
    return b"".join(parts)


def _seed_words(seed: bytes) -> Words:
    """Return the cipher's 16 words: constants, key, counter and nonce."""
    return np.concatenate([_CONSTANTS, np.frombuffer(seed, "<u4")])


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches on ``device``; in its interpreter the tensors are on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
