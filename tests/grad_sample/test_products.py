"""Products by either library against float64, and the choice between them."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward import matmul as products
from opacus_ac.grad_sample.one_backward import trial

#: B, T, I, J: few rows, many, one; results in one piece and in several; every side the widest one.
SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 3, 5),
    (3, 7, 40, 11),
    (3, 7, 11, 40),
    (8, 64, 96, 200),
    (8, 64, 200, 96),
    (4, 128, 33, 17),
    (2, 300, 1500, 900),
    (1, 31, 2000, 600),
]


def factors(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    records, positions, *widths = shape
    left, right = (torch.randn(records, positions, width, generator=generator, dtype=dtype) for width in widths)
    return left, right


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_outer_products(shape, library):
    left, right = factors(shape)
    want = torch.einsum("bti,btj->ij", left.double(), right.double())
    scale = torch.einsum("bti,btj->ij", left.double().abs(), right.double().abs())
    out = torch.full(shape[2:], torch.nan)
    products.add_outer(left, right, out, first=True)
    assert float(((out - want).abs() / scale).max()) < 4e-6
    products.add_outer(left, right, out, first=False)
    assert float(((out - 2 * want).abs() / scale).max()) < 4e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_inner_products_of_each_record(shape, transposed, library):
    left, right = factors(shape)
    a, b = (left.transpose(1, 2), right.transpose(1, 2)) if transposed else (left, left + 1)
    want = a.double() @ b.double().transpose(1, 2)
    scale = a.double().abs() @ b.double().abs().transpose(1, 2)
    got = products.inner(a, b)
    assert got.shape == want.shape
    assert float(((got - want).abs() / scale).max()) < 4e-6


@pytest.fixture
def calls(monkeypatch):
    """Which of oneDNN's products ran, where it is taken for faster."""
    made: list[str] = []
    monkeypatch.setattr(products, "onednn_is_faster", lambda *_: True)
    for name in ("_multiply", "_outer"):
        call = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *args, n=name, c=call: made.append(n) or c(*args))
    return made


def test_small_products_are_torchs_own(calls):
    left, right = factors((2, 8, 16, 16))
    products.add_outer(left, right, torch.empty(16, 16), first=True)
    products.inner(left, left)
    assert calls == []


def test_large_ones_are_not(calls):
    left, right = factors((2, 600, 64, 64))
    products.add_outer(left, right, torch.empty(64, 64), first=True)
    assert calls == ["_outer"]
    products.inner(left, left)
    assert calls == ["_outer", "_multiply", "_multiply"]


@pytest.mark.parametrize(
    "change", [torch.Tensor.double, lambda x: x[:, ::2], lambda x: x[:, :, 1:]], ids=["float64", "rows", "columns"]
)
def test_what_onednn_has_no_fast_code_for_is_torchs_own(change, calls):
    left, right = map(change, factors((2, 1200, 65, 65)))
    out = torch.empty(left.shape[2], right.shape[2], dtype=left.dtype)
    products.add_outer(left, right, out, first=True)
    products.inner(left, left)
    assert calls == []
    want = torch.einsum("bti,btj->ij", left.double(), right.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-3)


@pytest.fixture
def seconds(monkeypatch):
    """A clock for trials: what a product by torch and by oneDNN takes, of which the last is asked for again."""
    clock = SimpleNamespace(torch=[1.0], onednn=[1.0], calls=[])

    def taken(call: partial[object]) -> float:
        name = "onednn" if "onednn" in getattr(call.func, "__name__", "") else "torch"
        clock.calls.append(name)
        times = getattr(clock, name)
        return times.pop(0) if len(times) > 1 else times[0]

    trial.forget()
    monkeypatch.setattr(trial, "_seconds", taken)
    yield clock
    trial.forget()


@pytest.mark.parametrize(
    ("torchs", "onednns", "onednn_wins"),
    [
        ([1.0], [0.5], True),
        ([1.0], [0.9], False),  # may be chance
        ([1.0], [1.5], False),
        ([0.1, 1.0], [9.0, 0.5], True),  # the first calls do not count
        ([1.0, 1.0, 0.4, 1.0], [0.5], False),  # the machine was busy in the other rounds
        ([1.0], [1.0, 0.5, 0.5, 1.2, 0.5], False),
    ],
)
@pytest.mark.parametrize("kind", ["sum", "Gram", "inner"])
def test_onednn_must_win_every_round_of_a_trial_and_clearly(torchs, onednns, onednn_wins, kind, seconds):
    seconds.torch, seconds.onednn = list(torchs), list(onednns)
    assert products.onednn_is_faster(kind, 600, 300, 400) is onednn_wins


def test_a_trial_is_made_once_for_each_size_and_number_of_threads(seconds):
    seconds.onednn = [0.5]
    assert products.onednn_is_faster("sum", 600, 300, 400)
    made = len(seconds.calls)
    assert made == 2 * (trial.ROUNDS + 1)
    seconds.onednn = [2.0]
    assert products.onednn_is_faster("sum", 700, 260, 500)  # about the same size
    assert len(seconds.calls) == made
    assert not products.onednn_is_faster("inner", 600, 300, 400)
    assert not products.onednn_is_faster("sum", 600, 300, 100)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert not products.onednn_is_faster("sum", 600, 300, 400)
    finally:
        torch.set_num_threads(threads)


def test_a_program_that_asks_for_repeatable_results_gets_torchs_own_without_a_trial(seconds):
    seconds.onednn = [0.5]
    torch.use_deterministic_algorithms(True)
    try:
        assert not products.onednn_is_faster("sum", 600, 300, 400)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seconds.calls == []
    assert products.onednn_is_faster("sum", 600, 300, 400)


@pytest.mark.parametrize("kind", ["sum", "Gram", "inner"])
def test_both_sides_of_a_trial_do_the_same_work(kind):
    """For a Gram matrix, torch's side is three quarters of it."""
    state = torch.get_rng_state()
    usual, other = (call() for call in products._candidates(kind, 64, 32, 16))
    assert torch.equal(torch.get_rng_state(), state)
    if kind == "sum":
        assert torch.equal(usual, torch.full((32, 16), 64.0))
    else:
        assert torch.equal(usual, torch.full((4, 64, 24 if kind == "Gram" else 32), 16.0))
        assert torch.equal(other, torch.full((4, 64, 32), 16.0))


def test_without_onednn_nothing_is_tried(seconds, monkeypatch):
    seconds.onednn = [0.5]
    monkeypatch.setattr(products, "_onednn_was_right", lambda: False)
    assert not products.onednn_is_faster("sum", 600, 300, 400)
    assert seconds.calls == []


@pytest.mark.parametrize("name", ["_multiply", "conv2d_weight"])
def test_a_library_that_rounds_to_bfloat16_or_is_missing_is_not_used(name, monkeypatch):
    right = getattr(products, name)
    monkeypatch.setattr(
        products, name, lambda *args: right(*(a.bfloat16().float() if isinstance(a, Tensor) else a for a in args))
    )
    assert not products.onednn_is_right()

    def missing(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(products, name, missing)
    assert not products.onednn_is_right()


def test_the_benchmark_compares_both(capsys):
    import benchmark_products

    assert benchmark_products.main(["--quick", "--threads", "1", "--rounds", "1"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n| sum ") == text.count("\n| Gram ") == 1
    assert text.rstrip().endswith(" ms")
