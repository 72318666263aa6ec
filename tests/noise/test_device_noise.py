"""Noise made on a GPU: the kernel against RFC 8439, ``cryptography`` and ``numpy``; in Triton's interpreter where there is no GPU.

Tests on secret draws cannot fix a seed: their thresholds make a false alarm rarer than 1e-6 each.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

pytest.importorskip("triton")

from opacus_ac.noise import SecretStream, SharedStream
from opacus_ac.noise import gaussian_gpu as device_noise
from opacus_ac.noise.gaussian_gpu import DeviceSampler, draws

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
ON_GPU = DEVICE.type == "cuda"
SEED = b"opacus_ac's test key, 32 bytes.." + bytes([250, 255, 255, 255, 7, 0, 0, 0]) + b"a nonce!"


def seed() -> Any:
    return device_noise._seed_words(SEED)


@pytest.fixture(autouse=True)
def wide_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes by operations, not by values."""
    if not ON_GPU:
        monkeypatch.setattr(device_noise, "_LANES", 1 << 12)


def sampler(summed: int = 1) -> DeviceSampler:
    return DeviceSampler(DEVICE, summed)


def test_the_reference_is_the_cipher_of_rfc_8439() -> None:
    """Section 2.3.2: block 1 of key 00 01 ... 1f and nonce 00:00:00:09:00:00:00:4a:00:00:00:00."""
    nonce = bytes.fromhex("01000000000000090000004a00000000")
    block = device_noise._key_stream(device_noise._seed_words(bytes(range(32)) + nonce), 1)
    assert block.hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


def test_the_counter_of_the_reference_carries() -> None:
    """Six blocks, of which the counter's low word has three left, are those of the two counters."""
    low, high = seed(), seed()
    low[12] = 2**32 - 3
    high[12], high[13] = 0, low[13] + 1
    whole = device_noise._key_stream(low, 6)
    assert whole[:192] == device_noise._key_stream(low, 3)
    assert whole[192:] == device_noise._key_stream(high, 3)


@pytest.mark.parametrize("summed", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_is_what_cryptography_and_numpy_make_of_the_key(dtype: torch.dtype, summed: int) -> None:
    """Over a carry of the counter; the sum is rounded once: all but ties of the last bit of float64 are equal to the bit."""
    size = device_noise._LANES * 8 + 777
    start = torch.linspace(-1, 1, size, dtype=dtype)
    target = start.to(DEVICE, copy=True)
    sampler(summed)._add([target], 0.7, 0.3, seed())
    wanted = (start.double() + 0.7 * torch.from_numpy(draws(seed(), size, summed).copy())) * 0.3
    error = (target.double().cpu() - wanted).abs()
    if dtype == torch.float64:
        assert float(error.max()) < 1e-14
    else:
        differing = int((target.cpu() != wanted.float()).sum())
        assert differing <= size // 1000
        assert float(error.max()) < 3e-7


def test_no_block_of_the_key_stream_is_used_twice() -> None:
    """Tensors of one call, and calls after one another, draw one after the other from the counter on."""
    words, one = seed(), sampler()
    per_program = device_noise._LANES * 8
    sizes = [5, per_program + 1, 0, 3]
    targets = [torch.zeros(n, dtype=torch.float64, device=DEVICE) for n in sizes]
    one._add(targets[:2], 1.0, 1.0, words)
    one._add(targets[2:], 1.0, 1.0, words)
    expected = draws(seed(), 4 * per_program)
    starts = [0, per_program, 3 * per_program, 3 * per_program]
    for target, size, start in zip(targets, sizes, starts, strict=True):
        np.testing.assert_allclose(target.cpu().numpy(), expected[start : start + size], rtol=0, atol=1e-14)
    fresh = [sampler()._seed for _ in range(2)]
    assert not np.array_equal(fresh[0][4:], fresh[1][4:])


@pytest.mark.parametrize("together", [40, 1 << 22])
def test_small_tensors_are_noised_together(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """Few launches for many tensors, each value with noise of its own, whatever the sizes and types."""
    monkeypatch.setattr(device_noise, "_SMALL", 30)
    monkeypatch.setattr(device_noise, "_TOGETHER", together)
    one, launched = sampler(), []
    add = one._add

    def counted(targets: Any, *args: Any) -> None:
        launched.extend(targets)
        add(targets, *args)

    monkeypatch.setattr(one, "_add", counted)
    types = [torch.float32, torch.float64]
    # The start is small beside the noise: beside a large one, float32 would round some of the noise to zero.
    targets = [torch.full((n,), 2**-10, dtype=types[n % 2], device=DEVICE) for n in (3, 31, 7, 4, 1, 8, 40, 30, 0, 12)]
    kept = [target.clone() for target in targets]
    one.add(targets, 1.0, 2.0)
    values = torch.cat([target.double() for target in targets]).cpu() / 2.0 - 2**-10
    assert bool((values != 0).all())
    assert float(values.abs().max()) < 9
    assert (
        len(set(values[torch.cat([torch.full((len(t),), t.dtype == torch.float64) for t in targets])].tolist())) == 42
    )
    assert [t.dtype for t in targets] == [t.dtype for t in kept]
    assert len(launched) == {40: 6, 1 << 22: 4}[together]


@pytest.mark.parametrize("size", [0, 1, 7, 1023, 1025])
def test_every_value_gets_noise_and_nothing_else_does(size: int) -> None:
    around = torch.zeros(size + 2, device=DEVICE)
    sampler().add([around[1:-1]], 1.0, 1.0)
    assert bool((around[1:-1] != 0).all())
    assert float(around[0]) == float(around[-1]) == 0


@pytest.mark.statistical
@pytest.mark.parametrize("summed", [1, 4])
def test_noise_is_gaussian(summed: int) -> None:
    """Kolmogorov-Smirnov at 1e-7 on 2e5 draws (2e7 on a GPU), and for a planted error of 4 % in the std; neighbours |z| < 6."""
    size = 20_000_000 if ON_GPU else 200_000
    target = torch.zeros(size, dtype=torch.float64, device=DEVICE)
    sampler(summed).add([target], 1.0, 1.0)
    values = target.cpu().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-7
    assert stats.kstest(values * 1.04, "norm").pvalue < 1e-7
    for lag in (1, device_noise._LANES, device_noise._LANES * 8):
        correlation = np.mean(values[lag:] * values[:-lag])
        assert abs(correlation) * math.sqrt(size) < 6
        squares = np.mean((values[lag:] ** 2 - 1) * (values[:-lag] ** 2 - 1)) / 2
        assert abs(squares) * math.sqrt(size) < 6


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of one value in a thousand, of 1e-6 of it, is found before anything is drawn."""

    def off(words: Any, size: int, summed: int = 1) -> Any:
        values = draws(words, size, summed).copy()
        values[size // 2] *= 1 + 1e-6
        return values

    monkeypatch.setattr(device_noise, "draws", off)
    with pytest.raises(RuntimeError, match="noise kernel is off by"):
        sampler()
    stream = SecretStream()
    with pytest.warns(RuntimeWarning, match=f"noise for {DEVICE} is drawn by the processor.*noise kernel is off"):
        assert stream._sampler(DEVICE) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stream._sampler(DEVICE) is None  # said once
    assert stream.description == "AES-256-CTR, keyed by the operating system"


def test_without_triton_the_processor_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opacus_ac.noise.gaussian_gpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(RuntimeWarning, match=r"drawn by the processor.*Install triton"):
        assert SecretStream()._sampler(torch.device("cuda", 0)) is None


def test_the_stream_keeps_one_sampler_a_device_and_says_so() -> None:
    stream = SecretStream(hardened=True)
    one = stream._sampler(DEVICE)
    assert one is not None
    assert one is stream._sampler(DEVICE)
    assert one._summed == 4
    assert "ChaCha20" in stream.description
    assert stream.fork(1)._on_devices == {}


def test_a_shared_stream_makes_no_noise_there_either() -> None:
    stream = SharedStream(os.urandom(48))
    target = torch.zeros(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="the same on all of them"):
        stream.add_normal([target], 1.0)
    with pytest.raises(RuntimeError, match="the same on all of them"):
        stream._sampler(DEVICE) or stream.normal(3)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.statistical
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_of_any_layout_on_a_gpu(dtype: torch.dtype) -> None:
    """A transposed and a strided tensor of 90,000 values: mean and variance within 5.5 standard errors, the rest untouched."""
    base = torch.zeros(90_000, 7, dtype=dtype, device=DEVICE)
    targets = [torch.full((300, 300), 5.0, dtype=dtype, device=DEVICE).t(), base[:, :1]]
    SecretStream().add_normal(targets, 1.0, 2.0)
    for target, mean in zip(targets, (10.0, 0.0), strict=True):
        values = target.double()
        assert abs(float(values.mean()) - mean) < 5.5 * 2 / 300 + (0.05 if dtype == torch.bfloat16 else 0)
        assert abs(float(values.var()) / 4 - 1) < 5.5 * math.sqrt(2 / 90_000) + (0.01 if dtype == torch.bfloat16 else 0)
    assert float(base[:, 1:].abs().max()) == 0
