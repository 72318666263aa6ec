"""Products by either library against float64, and the choice between them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward import matmul as products

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
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
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
def choice():
    products.onednn_is_faster.cache_clear()
    yield products.onednn_is_faster
    products.onednn_is_faster.cache_clear()


@pytest.mark.parametrize(("capability", "amd"), [("AVX512", True), ("AVX512", False), ("AVX2", True)])
def test_the_choice_follows_from_the_machine(capability, amd, choice, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_made_by_amd", lambda: amd)
    monkeypatch.setattr(products, "onednn_is_right", lambda: True)
    assert choice() == (capability == "AVX512" and amd)


def test_without_mkl_nothing_changes(choice, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not choice()


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
    assert text.rstrip().endswith("here")
