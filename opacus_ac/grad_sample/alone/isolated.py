"""Copies of modules that run single records without a change in the model."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from opacus_ac.grad_sample.module_replay import bare_twin

_LARGE = 1 << 24
"""Number of elements above which a buffer is not copied, as for quantised weights, which no forward pass changes."""


def isolated_twin(module: nn.Module) -> nn.Module:
    """Return a twin of ``module`` that shares its parameters, and nothing that a forward pass may change.

    Hooks are left out but those marked ``of_records``, gradient checkpointing is switched off, buffers, tensors and
    containers held as attributes are copied.
    """
    twins: dict[int, nn.Module] = {}
    twin = bare_twin(module, twins)
    for original in module.modules():
        inner = twins[id(original)]
        _copy_state(inner, twins)
        _rebind(inner, original)
        for key, hook in original._forward_hooks.items():
            if getattr(hook, "of_records", False):  # this hook makes the model return a loss per record
                inner._forward_hooks[key] = hook
                inner._forward_hooks_with_kwargs[key] = True
        for key, hook in original._forward_pre_hooks.items():
            if getattr(hook, "of_records", False):  # this one makes rows of the sequences of a record
                inner._forward_pre_hooks[key] = hook
                inner._forward_pre_hooks_with_kwargs[key] = True
        if "_output_capturing_hooks_installed" in vars(inner):  # transformers then adds its own that collect states
            inner.__dict__["_output_capturing_hooks_installed"] = False
        if getattr(inner, "gradient_checkpointing", False) is True:
            inner.gradient_checkpointing = False  # type: ignore[assignment]
    return twin


def _copy_state(twin: nn.Module, twins: dict[int, nn.Module]) -> None:
    for key, buffer in twin._buffers.items():
        if buffer is not None and buffer.numel() < _LARGE:
            twin._buffers[key] = buffer.detach().clone()
    for key, value in twin.__dict__.items():
        if key in ("_parameters", "_buffers", "_modules", "training") or "_hooks" in key:
            continue
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            twin.__dict__[key] = value.detach().clone()
        else:
            twin.__dict__[key] = _copied(value, twins)


def _copied(value: Any, twins: dict[int, nn.Module]) -> Any:
    """Return a copy of a container, with twins for the modules in it (a recurrent layer's cells); else the value."""
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if type(value) in (list, tuple):
        return type(value)(_copied(item, twins) for item in value)
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(item, twins)) for key, item in value.items())
    return copy.copy(value) if isinstance(value, dict | set | deque | list) else value


def _rebind(twin: nn.Module, original: nn.Module) -> None:
    """Bind methods that were set on the instance, such as a wrapped forward, to the twin."""
    for key, value in twin.__dict__.items():
        if isinstance(value, types.MethodType) and value.__self__ is original:
            twin.__dict__[key] = types.MethodType(value.__func__, twin)


class _NotCheckpointed:
    """Replaces torch's reentrant checkpoints, whose backward pass would write ordinary gradients."""

    @staticmethod
    def apply(run: Any, _preserve: Any, *args: Any) -> Any:
        return run(*args)


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Return a context in which reentrant checkpointing does nothing."""
    module: Any = torch.utils.checkpoint
    before = module.CheckpointFunction
    module.CheckpointFunction = _NotCheckpointed
    try:
        yield
    finally:
        module.CheckpointFunction = before


def shapes_of(twin: nn.Module) -> set[int]:
    """Return a set to which layers of a twin add the dimensions of their inputs and outputs when they run."""
    seen: set[int] = set()

    def note(_module: nn.Module, args: Any, output: Any) -> None:
        for tensor in (*args, output):
            if isinstance(tensor, Tensor):
                seen.update(tensor.shape)

    for inner in twin.modules():
        inner.register_forward_hook(note)
    return seen


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Say whether a parameter is sharded over several processes."""
    return any(hasattr(p, "full_tensor") for p in parameters)


def is_coarse(module: nn.Module, tensors: Iterable[Tensor]) -> bool:
    """Say whether a value is computed in lower precision than float32 at present."""
    low = (torch.bfloat16, torch.float16)
    asked = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    # accelerate wraps the forward and uses autocast inside of it.
    asked = asked or any(hasattr(inner, "_original_forward") for inner in module.modules())
    return asked or any(t.dtype in low for t in (*module.parameters(), *tensors))
