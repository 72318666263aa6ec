"""The arithmetic that norms and clipped sums are computed in, whatever the program around them asks for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

_FULL = ("none", "ieee")
"""Settings of torch under which products of float32 matrices have float32's precision."""

_FORCED = {
    "cuda": {"NVIDIA_TF32_OVERRIDE": ("", "0")},
    "cpu": {"ONEDNN_DEFAULT_FPMATH_MODE": ("", "strict"), "DNNL_DEFAULT_FPMATH_MODE": ("", "strict")},
}
"""Variables by which a library takes another precision than torch asks for, with the harmless values, per device
type."""


def check_environment(devices: Iterable[str]) -> None:
    """Raise ``ValueError`` where an environment variable takes precision away that :func:`exact` could not give back.

    Args:
        devices: types of the devices that are computed on.
    """
    for device in devices:
        for variable, harmless in _FORCED.get(device, {}).items():
            value = os.environ.get(variable, "")
            if value.lower() not in harmless:
                raise ValueError(
                    f"{variable}={value} in the environment lowers the precision of matrix products below float32, so "
                    "that norms would be wrong and a clipped record could exceed C: start the program without it"
                )


def exact() -> AbstractContextManager[Any]:
    """No graph, no autocast, and no TF32 or bfloat16 inside products of float32 matrices, for all threads.

    ``backward()`` and ``step()`` may be called inside an autocast block, and a program may have asked for faster
    products (``torch.set_float32_matmul_precision``, ``allow_tf32``, ``tf32=True`` in Hugging Face's arguments). A norm
    from such products is wrong by up to 1e-3 (TF32) or 8e-3 (bfloat16), and a clipped record could exceed C by as much.
    What was set before is set again afterwards, and holds for the model's own products.
    """
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    if autocast or _PRODUCTS.reduced:
        return _everything_off()
    return torch.no_grad()


def less_was_asked() -> bool:
    """Whether the program asks for less than float32 in products, as the model's own are then computed."""
    return _PRODUCTS.asked


@contextmanager
def _everything_off() -> Iterator[None]:
    with torch.no_grad(), _PRODUCTS, ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _FullPrecision:
    """Context in which products of float32 matrices are float32's; any number of threads may be in it at a time.

    torch keeps these settings per process: the first thread to enter notes them, and the last one to leave puts them
    back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[str] = []

    @property
    def reduced(self) -> bool:
        """Whether this has to be entered: something is set to less, perhaps only until another thread leaves."""
        with self._lock:  # not between another thread's entering and its being counted
            return self._inside > 0 or any(value not in _FULL for value in _read())

    @property
    def asked(self) -> bool:
        """Whether something was set to less before the first thread entered."""
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
    """What holds ``fp32_precision`` of products, on GPUs and in oneDNN; empty where torch has one setting for all."""
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
        # What was inherited from torch.backends.fp32_precision is inherited again, not pinned.
        setting.fp32_precision = "none"
        if setting.fp32_precision != value:
            setting.fp32_precision = value
