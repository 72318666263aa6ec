"""Opacus's hooks on a model: a copy is an ordinary model, and errors name the layer and a way out.

Opacus computes the gradients of a layer without a rule by running the layer again under vmap. Many layers cannot be run
so: they take keyword arguments, look at values, or share a parameter with a layer inside. Mode "bk" has other ways for
most of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opacus.grad_sample import GradSampleHooks, GradSampleModule
from torch import nn

_IN_PLACE = "BackwardHookFunction"
"""Part of torch's error about an output that is changed in place after a hook saw it."""


class _Telling(GradSampleHooks):
    """Turns errors inside of the hooks into refusals."""

    def capture_activations_hook(self, module: nn.Module, *given: Any) -> None:
        with self._telling(module):
            super().capture_activations_hook(module, *given)

    def capture_backprops_hook(self, module: nn.Module, *given: Any, **options: Any) -> None:
        with self._telling(module):
            super().capture_backprops_hook(module, *given, **options)

    @contextmanager
    def _telling(self, module: nn.Module) -> Iterator[None]:
        """Name the layer in an error.

        Raises:
            ValueError: If the hook did not work on the layer.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, ValueError) and not str(error).startswith("vmap"):
                raise  # on purpose: several backward passes for one batch
            name = next((name for name, one in self._module.named_modules() if one is module), "")
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}): Opacus's hooks do not work on this layer "
                f'({type(error).__name__}: {error}). Pass grad_sample_mode="bk" to make_private, freeze the layer, or '
                "register a rule for it (opacus_ac.grad_sample.register_rule)"
            ) from error


class _InertCopies:
    """Opacus's hooks on a model. A copy or a pickled copy of the model has them, too, but they do nothing there."""

    hooks_enabled: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.hooks_enabled = False


class HookedModel(_InertCopies, _Telling, GradSampleModule):
    """Opacus's ``GradSampleModule``, a copy of which is an ordinary model, and whose errors name a layer."""

    def __getstate__(self) -> dict[str, Any]:
        # Pickled parameters would take their per-sample gradients along. Those of a copy have none.
        return {**self.__dict__, "_modules": copy.deepcopy(self._modules)} if self.hooks_enabled else self.__dict__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            ValueError: If the model changes the output of a layer in place, which a hook has seen.
        """
        try:
            return super().forward(*args, **kwargs)
        except RuntimeError as error:
            if _IN_PLACE not in str(error):
                raise
            raise ValueError(
                "the model changes the output of a layer in place, and Opacus's hooks forbid it: pass "
                'grad_sample_mode="bk" to make_private, or write the operation out of place'
            ) from error


class ModelHooks(_InertCopies, _Telling):
    """Opacus's ``GradSampleHooks``, which do nothing on a copy of the model."""
