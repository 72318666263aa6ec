"""A test that breaks the GPU is named, and takes no other test with it; tests that need no transformers run without it."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import gpu_state
import pytest
import torch
from checkout import PYTHONPATH, ROOT


def broken(*_: object) -> None:
    raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later")


@pytest.mark.parametrize(("fails", "stops"), [(broken, True), (lambda *_: None, False)])
def test_the_run_stops_after_the_test_that_broke_the_gpu(monkeypatch, fails, stops):
    working = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, synchronize=fails)
    monkeypatch.setattr(torch, "cuda", working)
    if not stops:
        gpu_state.stop_if_broken("test_a")
        return
    with pytest.raises(
        pytest.exit.Exception, match=r"since test_a \(CUDA error: device-side assert triggered\)"
    ) as found:
        gpu_state.stop_if_broken("test_a")
    assert found.value.returncode == gpu_state.BROKEN


def test_on_the_processor_nothing_is_asked(monkeypatch):
    idle = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: False, synchronize=broken)
    monkeypatch.setattr(torch, "cuda", idle)
    gpu_state.stop_if_broken("test_a")


def test_helpers_are_read_without_transformers():
    """Every test's set-up reads them: without the guard, each test of such a machine is an error at set-up."""
    code = "import sys; sys.modules['transformers'] = None; import tiny_models; print(len(tiny_models.MORE_MODELS))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
