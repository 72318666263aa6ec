"""Noise: Gaussian to the tails, independent between threads and processes, and added in float64 with one rounding.

Tests on secret draws cannot fix a seed: their thresholds make a false alarm rarer than 1e-6 each.
"""

import copy
import math
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from itertools import combinations

import numpy as np
import pytest
import torch
from helpers import by_hand
from scipy import stats
from torch import nn

from opacus_ac.noise import SecretStream, SeededStream
from opacus_ac.noise import gaussian_cpu as gaussian
from opacus_ac.noise import keys as key_stream
from opacus_ac.noise import streams as randomness
from opacus_ac.noise.gaussian_cpu import BLOCK, GaussianSampler
from opacus_ac.noise.keys import KeyStream
from opacus_ac.release import GaussianMechanism

THREADS = 4
DTYPES = [torch.float32, torch.float64]


def seeded(seed: int = 3) -> SeededStream:
    return SeededStream(torch.Generator().manual_seed(seed))


def noise(stream: SecretStream | SeededStream, size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    target = torch.zeros(size, dtype=dtype)
    stream.add_normal([target], 1.0)
    return target


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw in four threads, and let each take a block before any takes another."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: THREADS)
    monkeypatch.setattr(os, "cpu_count", lambda: THREADS)
    monkeypatch.setattr(randomness, "_VALUES_PER_THREAD", BLOCK)
    barrier = threading.Barrier(THREADS, timeout=60)
    add_to = GaussianSampler.add_to

    def in_step(sampler, block, std, scale):
        barrier.wait()
        add_to(sampler, block, std, scale)

    monkeypatch.setattr(GaussianSampler, "add_to", in_step)


def independent(blocks: torch.Tensor) -> bool:
    """Tell whether no two rows of ``blocks [k, n]``, nor their absolute values, are correlated: |z| < 6.6, 4e-11 a pair."""
    for rows in (blocks, blocks.abs()):
        correlation = np.corrcoef(rows.double().numpy())
        if any(abs(correlation[i, j]) * math.sqrt(rows.shape[1]) > 6.6 for i, j in combinations(range(len(rows)), 2)):
            return False
    return True


@pytest.mark.statistical
@pytest.mark.parametrize("hardened", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_gaussian(dtype, hardened):
    """Kolmogorov-Smirnov on 2e6 draws at 1e-7, and once more for a planted error of 2 % in the std."""
    draws = noise(SecretStream(hardened), 2_000_000, dtype).double().numpy()
    assert stats.kstest(draws, "norm").pvalue > 1e-7
    assert stats.kstest(draws * 1.02, "norm").pvalue < 1e-7


@pytest.mark.statistical
@pytest.mark.parametrize("hardened", [False, True])
def test_moments_and_tails(hardened):
    """2e7 draws: four moments |z| < 5.5 (4e-8 each); counts beyond 3, 4 and 5 std, either side, at 1e-8 each."""
    size = 20_000_000
    draws = noise(SecretStream(hardened), size).numpy()
    variances = [1, 2, 15, 96]  # of the average of x, x^2, x^3 and x^4, times the number of draws
    for power, (mean, variance) in enumerate(zip([0, 1, 0, 3], variances, strict=True), start=1):
        assert abs(np.mean(draws**power) - mean) < 5.5 * math.sqrt(variance / size), power
    for side in (draws, -draws):
        for level in (3, 4, 5):
            count, expected = int(np.sum(side > level)), stats.binom(size, stats.norm.sf(level))
            assert min(expected.cdf(count), expected.sf(count - 1)) > 1e-8, (level, count, expected.mean())
    # A cosine and its sine are neighbours, as are, every other time, values of two angles.
    for lag in (1, 2, BLOCK // 2):
        assert abs(np.mean(draws[lag:] * draws[:-lag])) < 5.5 / math.sqrt(size)
        assert abs(np.mean((draws[lag:] ** 2 - 1) * (draws[:-lag] ** 2 - 1))) < 5.5 * 2 / math.sqrt(size)


class Given:
    """Stands in for a key stream: the words of the angle and those of the radius are given."""

    def __init__(self, *words):
        self.words = iter(words)

    def fill(self, words):
        words[:] = next(self.words)


def test_draws_are_box_and_muller_to_float64():
    """Directions at the table's points, at both ends of what each stands for, and elsewhere: to 2e-15 of the radius."""
    rng = np.random.default_rng(0)
    steps = np.arange(1 << gaussian._CHOICE, dtype=np.uint64) << np.uint64(64 - gaussian._CHOICE)
    width = 1 << (64 - gaussian._CHOICE)
    ends = [steps + np.uint64(rest) for rest in (0, 1, width // 2, width - 2, width - 1)]
    angles = np.concatenate([*ends, rng.integers(0, 2**64, 99, dtype=np.uint64)])
    # The radius, too, from its largest value to its smallest: uniform numbers in (0, 1].
    radii = rng.integers(0, 2**53, angles.size, dtype=np.uint64)
    radii[:4] = 0, 1, 2**53 - 1, 2**53 - 2
    low = rng.integers(0, 2**11, angles.size, dtype=np.uint64)  # the bits that are not used
    drawn = GaussianSampler(Given(angles, (radii << np.uint64(11)) | low)).draw(2 * angles.size, 1.7)
    assert np.isfinite(drawn).all()
    radius = 1.7 * np.sqrt(-2 * np.log((radii + np.uint64(1)) * 2.0**-53))
    assert radius.max() == pytest.approx(1.7 * 8.572, rel=1e-4)
    # The largest multiple of a quarter turn is taken away in integers: what is left is exact to 1e-16 of a turn.
    quarters, rest = angles >> np.uint64(62), angles & np.uint64(2**62 - 1)
    exact = np.exp(2j * math.pi * (rest * 2.0**-64)) * np.array([1, 1j, -1, -1j])[quarters]
    error = np.abs(drawn.view(np.complex128) - radius * exact)
    assert np.max(error / np.maximum(radius, 1e-300) * (radius > 0)) < 2e-15


def test_the_table_of_directions_follows_the_std():
    words = np.random.default_rng(2).integers(0, 2**64, (2, 8), dtype=np.uint64)
    one, other = (GaussianSampler(Given(*words, *words, *words)) for _ in range(2))
    want = one.draw(16, 1.0).copy()
    for std in (3.0, 3.0, 0.5):
        np.testing.assert_allclose(other.draw(16, std), std * want, rtol=1e-15)


def test_four_draws_make_one_in_secure_mode():
    """The mean of four independent Gaussians times two, to the bit; one alone, or one four times, is something else."""
    rng = np.random.default_rng(1)
    words = [rng.integers(0, 2**64, 50, dtype=np.uint64) for _ in range(8)]
    single = GaussianSampler(Given(*words))
    parts = [single.draw(100, 1.5).copy() for _ in range(4)]
    drawn = GaussianSampler(Given(*words), 4).draw(100, 3.0)
    np.testing.assert_array_equal(drawn, ((parts[0] + parts[1]) + parts[2]) + parts[3])
    assert SecretStream(hardened=True)._hardened
    target = torch.zeros(10)
    stream = SecretStream(hardened=True)
    stream.add_normal([target], 1.0)
    assert [sampler._summed for sampler in stream._samplers] == [4]
    for other in (stream.fork(1), copy.deepcopy(stream)):
        other.normal(3)
        assert [sampler._summed for sampler in other._samplers] == [4]


# NIST SP 800-38A, F.5.5: key, first counter, and key stream ("output block") of AES-256 in counter mode.
NIST_KEY = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
NIST_COUNTER = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"
NIST_STREAM = (
    "0bdf7df1591716335e9a8b15c860c502" "5a6e699d536119065433863c8f657b94"
    "1bc12c9c01610d5d0d8bd6a3378eca62" "2956e1c8693536b1bee99c73a31576b6"
)  # fmt: skip


def test_the_key_stream_is_aes_256_in_counter_mode(monkeypatch):
    given = {32: bytes.fromhex(NIST_KEY), 16: bytes.fromhex(NIST_COUNTER)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "urandom", given.__getitem__)
        stream = KeyStream()
    words = np.empty(8, np.uint64)
    stream.fill(words[:3])
    stream.fill(words[3:])
    assert words.tobytes().hex() == NIST_STREAM


def test_a_key_serves_for_a_bounded_number_of_bytes(monkeypatch):
    monkeypatch.setattr(key_stream, "_LIMIT", 1000)
    keys, urandom = [], os.urandom

    def counted(size):
        keys.append(size)
        return urandom(size)

    monkeypatch.setattr(os, "urandom", counted)
    stream, words = KeyStream(), np.empty(100, np.uint64)
    for _ in range(5):
        stream.fill(words)
    assert keys == [32, 16] * 5


@pytest.mark.statistical
def test_uniform_draws_are_uniform():
    """Kolmogorov-Smirnov on 1e6 draws at 1e-7; 53 bits, of which the last is as often 1 as 0 (z < 5.5)."""
    draws = SecretStream().uniform(1_000_000).numpy()
    assert stats.kstest(draws, "uniform").pvalue > 1e-7
    assert draws.min() >= 0
    assert draws.max() < 1
    integers = draws * 2.0**53
    assert (integers == np.floor(integers)).all()
    assert abs((integers % 2).mean() - 0.5) < 5.5 * 0.5 / 1000


@pytest.mark.statistical
@pytest.mark.parametrize("hardened", [False, True])
def test_streams_are_independent(hardened):
    """A stream, its fork, a copy, one resumed from its state, and another (each 2^17 draws): no pair correlated, below 1e-8."""
    stream = SecretStream(hardened)
    resumed = SecretStream(hardened)
    resumed.load_state_dict(stream.state_dict())
    streams = [stream, stream.fork(1), copy.deepcopy(stream), resumed, SecretStream(hardened)]
    draws = torch.stack([noise(s, BLOCK) for s in streams] + [s.normal(BLOCK) for s in streams])
    assert independent(draws)
    assert not independent(torch.cat([draws, draws[:1]]))


@pytest.mark.statistical
def test_threads_draw_independently(threads):
    """Four threads, four blocks each (120 pairs, twice): below 1e-8; and two threads with one key are caught."""
    stream = SecretStream()
    assert independent(noise(stream, 4 * THREADS * BLOCK).view(-1, BLOCK))
    assert len(stream._samplers) == THREADS


def test_threads_with_one_key_are_caught(threads, monkeypatch):
    given = {32: bytes(32), 16: bytes(16)}
    monkeypatch.setattr(os, "urandom", given.__getitem__)
    assert not independent(noise(SecretStream(), 4 * THREADS * BLOCK).view(-1, BLOCK))


def from_child(draw) -> torch.Tensor:
    """Return what ``draw()`` gives in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(write, "wb") as pipe:
                pipe.write(draw().numpy().tobytes())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    return torch.frombuffer(bytearray(data), dtype=torch.float64)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.statistical
def test_no_thread_repeats_its_draws_after_a_fork(threads):
    """Parent and two children, all threads of each (3 x 4 blocks): no pair correlated, below 1e-8."""
    stream, size = SecretStream(), THREADS * BLOCK
    noise(stream, size)
    draws = [from_child(lambda: noise(stream, size)) for _ in range(2)] + [noise(stream, size)]
    assert independent(torch.cat(draws).view(-1, BLOCK))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("hardened", [False, True])
def test_a_forked_child_draws_its_own(hardened):
    stream = SecretStream(hardened)
    for draw in (stream.normal, stream.uniform):
        draw(4)
        values = torch.cat([from_child(lambda draw=draw: draw(4)), draw(4)])
        assert values.unique().numel() == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_stream_that_did_not_notice_the_fork_is_caught(monkeypatch):
    monkeypatch.setattr(SecretStream, "_check_process", lambda self: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    stream = SecretStream()
    noise(stream, BLOCK)
    child = from_child(lambda: noise(stream, BLOCK))
    assert not independent(torch.stack([child, noise(stream, BLOCK)]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_does_not_wait_for_threads_of_its_parent():
    """The parent's torch has worked in two threads, which a child does not have; any torch call of this size would hang."""
    code = """
import os, signal, torch
from opacus_ac.noise import SecretStream
torch.set_num_threads(2)
stream, target = SecretStream(), torch.zeros(600_000)
torch.rand(3_000_000).log()
stream.add_normal([target], 1.0)
child = os.fork()
if child == 0:
    signal.alarm(20)
    target.numpy()[:] = 0
    stream.add_normal([target], 1.0)
    os._exit(0 if 590_000 < (target.numpy() ** 2).sum() < 610_000 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "0", run.stderr


def test_a_copy_is_a_new_stream():
    stream = SecretStream()
    noise(stream, 4)
    other = copy.deepcopy(stream)
    assert not torch.equal(noise(stream, 4), noise(other, 4))
    assert not torch.equal(stream.normal(4), other.normal(4))


@pytest.mark.parametrize("make", [SecretStream, seeded])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 65537, 300_001])
def test_every_value_gets_noise_and_nothing_else_does(make, dtype, size):
    around = torch.zeros(size + 2, dtype=dtype)
    make().add_normal([around[1:-1]], 1.0)
    assert bool((around[1:-1] != 0).all())
    assert around[1:-1].unique().numel() >= 0.95 * size  # float32 has few values near 1
    assert float(around[0]) == float(around[-1]) == 0


def expected_value(target: torch.Tensor, std: float, draws: torch.Tensor, scale: float) -> torch.Tensor:
    return ((target.double() + std * draws) * scale).to(target.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1 / 48, 0.0123])
def test_one_rounding(dtype, offset, scale, monkeypatch):
    """The result is the float64 one, rounded: equal to the bit, which float32 noise or two roundings would not be."""
    std, size = 0.37, 2 * BLOCK + 11
    target = (torch.randn(size, dtype=torch.float64) + offset).to(dtype)
    draws = torch.randn(size, dtype=torch.float64)
    given = iter(draws.split(BLOCK))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(GaussianSampler, "draw", lambda self, n, std: (std * next(given)).numpy())
    secret, other = target.clone(), target.clone()
    SecretStream().add_normal([secret], std, scale)
    assert torch.equal(secret, expected_value(target, std, draws, scale))
    seeded(5).add_normal([other], std, scale)
    draws = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(other, expected_value(target, std, draws, scale))
    if dtype == torch.float32:
        twice = (target.double() + std * draws).float() * scale
        narrow = ((target + std * draws.float()).double() * scale).float()
        assert torch.equal(other, twice) == (scale == 1)
        assert offset == 1e6 or not torch.equal(other, narrow)  # there the last bits of the noise are lost anyhow


@pytest.mark.parametrize("make", [SecretStream, seeded])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_noise_only_the_scale_acts_and_nothing_is_drawn(make, dtype, monkeypatch):
    monkeypatch.setattr(GaussianSampler, "draw", None)
    target = torch.randn(300_001, dtype=torch.float64).to(dtype)
    result, stream = target.clone(), make()
    before = stream.state_dict()
    stream.add_normal([result], 0.0, 1 / 48)
    assert torch.equal(result, (target.double() * (1 / 48)).to(dtype))
    assert all(torch.equal(value, before[name]) for name, value in stream.state_dict().items())


@pytest.mark.parametrize("make", [SecretStream, seeded])
@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_a_std_that_means_no_noise_is_refused(make, std):
    with pytest.raises(ValueError, match="std"):
        GaussianMechanism(1.0, make()).noise_in_place([torch.zeros(3)], std)


@pytest.mark.statistical
@pytest.mark.parametrize("make", [SecretStream, seeded])
@pytest.mark.parametrize("given", [True, False])
def test_a_parameter_of_any_layout(make, given):
    """A transposed parameter and a strided one, 90,000 coordinates each, with a sum or without: noise std within 5.5 standard errors."""
    parameter = nn.Parameter(torch.zeros(300, 300).t())
    column = nn.Parameter(torch.zeros(90_000, 7)[:, :1])
    parameters = [parameter, column]
    assert not any(p.is_contiguous() for p in parameters)
    sums = [torch.full((300, 300), 5.0).t() if given else None, torch.full((90_000, 7), 5.0)[:, :1]]
    GaussianMechanism(1.0, make()).release_gradients(parameters, (s for s in sums), 2.0, 0.5)
    for p, mean in zip(parameters, [2.5 if given else 0.0, 2.5], strict=True):
        assert p.grad.shape == p.shape
        values = p.grad.double()
        assert abs(float(values.mean()) - mean) < 5.5 / math.sqrt(values.numel())
        assert abs(float(values.var()) - 1) < 5.5 * math.sqrt(2 / values.numel())


def test_a_sum_in_the_right_dtype_becomes_the_gradient_without_a_copy():
    parameters = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in DTYPES]
    sums = [torch.ones(3), torch.ones(3)]
    GaussianMechanism(1.0, seeded()).release_gradients(parameters, sums, 1.0, 0.5)
    assert parameters[0].grad.data_ptr() == sums[0].data_ptr()
    assert parameters[1].grad.dtype == torch.float64
    assert sums[1].tolist() == [1.0] * 3


def test_other_dtypes_get_noise_too():
    values = noise(SecretStream(), 10_000, torch.bfloat16).float()
    assert float(values.std()) == pytest.approx(1.0, rel=0.1)


def test_seeded_noise_is_in_the_order_of_the_generator_whatever_the_threads():
    """Blocks of 2^20 from ``torch.randn``, one after the other."""
    size, results = (1 << 20) + 77, []
    before = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            results.append(noise(seeded(), size))
        finally:
            torch.set_num_threads(before)
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(n, dtype=torch.float64, generator=generator) for n in (1 << 20, 77)]
    assert torch.equal(results[0], torch.cat(draws))
    assert torch.equal(*results)


def test_a_thread_that_fails_is_not_passed_over(threads, monkeypatch):
    """Its blocks have no noise, so the release must not go on; the next one works."""
    add_to, stream = GaussianSampler.add_to, SecretStream()

    def fail_elsewhere(sampler, block, std, scale):
        add_to(sampler, block, std, scale)
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("planted")

    monkeypatch.setattr(GaussianSampler, "add_to", fail_elsewhere)
    with pytest.raises(RuntimeError, match="planted"):
        noise(stream, THREADS * BLOCK)
    monkeypatch.setattr(GaussianSampler, "add_to", add_to)
    assert bool((noise(stream, THREADS * BLOCK) != 0).all())


@pytest.mark.parametrize("locked", [True, False])
def test_one_stream_in_two_threads_of_the_user(locked, monkeypatch):
    """A sampler's work space serves one tensor at a time; without the lock it is seen to serve two."""
    stream, clashes, meeting = SecretStream(), [], threading.Barrier(2)
    if not locked:
        stream._lock = nullcontext()
    busy = threading.Lock()

    def add_to(sampler, block, std, scale):
        if not busy.acquire(blocking=False):
            clashes.append(sampler)
            return
        try:
            threading.Event().wait(0.02)
        finally:
            busy.release()

    monkeypatch.setattr(GaussianSampler, "add_to", add_to)
    noise(stream, 1)

    def use():
        meeting.wait()
        for _ in range(5):
            noise(stream, 1)

    users = [threading.Thread(target=use) for _ in range(2)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert bool(clashes) != locked


def test_the_gradient_is_scaled_once():
    """The release scales: Opacus's separate call of ``scale_grad`` after it changes nothing."""
    optimizer, _ = by_hand(torch.full((2, 5), 0.1, dtype=torch.float64), expected_batch_size=8)
    optimizer.clip_and_accumulate()
    optimizer._private._account(None, lambda: None)
    optimizer.add_noise()
    optimizer.scale_grad()
    for p in optimizer.params:
        torch.testing.assert_close(p.grad, torch.full_like(p, 0.2 / 8), rtol=1e-14, atol=0)
