"""Full float32 precision for norms and clipped sums, whatever precision the program has chosen for its model."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

_FULL = ("none", "ieee")
"""Settings of torch under which products of float32 matrices have the precision of float32."""

_FORCED = {
    "cuda": {"NVIDIA_TF32_OVERRIDE": ("", "0")},
    "cpu": {"ONEDNN_DEFAULT_FPMATH_MODE": ("", "strict"), "DNNL_DEFAULT_FPMATH_MODE": ("", "strict")},
}
"""Environment variables that lower a library's precision despite torch's settings, with their harmless values."""


def check_environment(devices: Iterable[str]) -> None:
    """Refuse environment variables that lower the precision in a way that :func:`exact` cannot undo.

    Args:
        devices: types of the devices of the computation.

    Raises:
        ValueError: If such a variable is set.
    """
    for device in devices:
        for variable, harmless in _FORCED.get(device, {}).items():
            value = os.environ.get(variable, "")
            if value.lower() not in harmless:
                raise ValueError(
                    f"{variable}={value} in the environment lowers the precision of matrix products below float32, so "
                    "norms would be wrong and a clipped record could exceed C: start the program without it"
                )


def exact() -> AbstractContextManager[Any]:
    """Return a context without autograd graph, without autocast, and with full precision in float32 matrix products.

    ``backward()`` and ``step()`` may be called inside an autocast block, and a program may ask for faster products
    (``torch.set_float32_matmul_precision``, ``allow_tf32``, ``tf32=True`` in ``TrainingArguments``). A norm from such
    products is wrong by up to 1e-3 (TF32) or 8e-3 (bfloat16), and a clipped record could exceed C by as much. The
    precision holds for all threads. The settings from before are restored afterwards, for the model's own products.
    """
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    if autocast or _PRODUCTS.reduced:
        return _everything_off()
    return torch.no_grad()


def less_was_asked() -> bool:
    """Say whether the program asks for less than float32 precision in matrix products, for its model."""
    return _PRODUCTS.asked


@contextmanager
def _everything_off() -> Iterator[None]:
    with torch.no_grad(), _PRODUCTS, ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _FullPrecision:
    """A context with full precision in products of float32 matrices. Several threads may be in it at the same time.

    The settings of torch are per process. The first thread to enter notes them, and the last one to leave restores
    them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[str] = []

    @property
    def reduced(self) -> bool:
        """Whether this context must be entered, because a setting is lower or another thread is inside."""
        with self._lock:  # waits for a thread that is just entering
            return self._inside > 0 or any(value not in _FULL for value in _read())

    @property
    def asked(self) -> bool:
        """Whether a setting was lower before the first thread entered."""
        with self._lock:
            return any(value not in _FULL for value in (self._before if self._inside else _read()))

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = _read()
                _write(["ieee" if value not in _FULL else value for value in self._before])
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                _write(self._before)


_PRODUCTS = _FullPrecision()


def _settings() -> list[Any]:
    """Return the objects with ``fp32_precision``, for GPUs and oneDNN; none if torch has one setting for all."""
    onednn: Any = torch.backends.mkldnn
    return [torch.backends.cuda.matmul, onednn.matmul, onednn.conv] if hasattr(onednn, "matmul") else []


def _read() -> list[str]:
    settings = _settings()
    if not settings:  # torch < 2.9
        return ["ieee" if torch.get_float32_matmul_precision() == "highest" else torch.get_float32_matmul_precision()]
    return [setting.fp32_precision for setting in settings]


def _write(values: list[str]) -> None:
    settings = _settings()
    if not settings:
        torch.set_float32_matmul_precision("highest" if values[0] == "ieee" else values[0])
        return
    for setting, value in zip(settings, values, strict=True):
        if setting.fp32_precision == value:
            continue
        # "none" inherits from torch.backends.fp32_precision, as the setting may have done before.
        setting.fp32_precision = "none"
        if setting.fp32_precision != value:
            setting.fp32_precision = value
