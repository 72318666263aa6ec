"""The public side of a step: all that follows a release. Nothing that is not noised yet comes in here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from opacus_ac.allocation.weights import GroupWeights
from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.distributed.reducers import LOCAL, Reducer
from opacus_ac.optimizer.ema import WeightEMA
from opacus_ac.optimizer.lr_control import ClipRateControl
from opacus_ac.optimizer.released import ReleasedGradients
from opacus_ac.optimizer.update import Update
from opacus_ac.release.values import StepRelease


class PublicSide:
    """Moves C, learning rate, weights and averages by what a step released.

    Args:
        inner: the optimizer that applies released gradients.
        update: moves the weights, with ``inner`` or by itself.
        policy: chooses the next C.
        control: chooses the multiplier of the learning rate; None for 1.
        ema: averages the weights; None for no average.
        allocation: learns the weights of the parameters from released gradients; None for 1.
        reducer: the processes, which agree on C and learning rate.

    Guarantees:
        Whatever it changes is a function of releases, of public constants, and of what it was before.
    """

    def __init__(
        self,
        inner: Optimizer,
        *,
        update: Update,
        policy: ClipPolicy,
        control: ClipRateControl | None,
        ema: WeightEMA | None,
        allocation: GroupWeights | None,
        reducer: Reducer,
    ) -> None:
        self.inner, self.update, self.policy, self.control = inner, update, policy, control
        self.ema, self.allocation, self.reducer = ema, allocation, reducer
        if reducer.world > 1 and hasattr(inner, "agree"):
            inner.agree = reducer.agree  # AutoAdam's measurements, which decide about all weights

    def learn(self, release: StepRelease) -> bool:
        """Choose the next C; return whether the step served to find C only, so that its gradient is not applied.

        All processes have the same release; should their arithmetic differ in the last bit, that of rank 0 counts.
        """
        self.policy.update(release)
        if self.reducer.world == 1:
            return self.policy.searching
        multiplier = 1.0 if self.control is None else self.control.multiplier
        agreed = self.reducer.agree(np.array([self.policy.bound, self.policy.searching, multiplier]))
        self.policy.bound, searching, multiplier = agreed.tolist()
        if self.control is not None:
            self.control.multiplier = multiplier
        return bool(searching)

    def apply(self, release: StepRelease, gradients: ReleasedGradients) -> float | None:
        """Let the inner optimizer, and all that follows releases, move by what was released."""
        with self.controlled_learning_rate():
            result = self.update.apply(release, gradients, partial(self._announce, gradients))
        self.follow(release)
        if self.allocation is not None:
            self.allocation.observe_profile(release.profile)
            self.allocation.update()
        if self.ema is not None:
            self.ema.update()
        return result

    def follow(self, release: StepRelease) -> None:
        """Let the multiplier of the learning rate follow the clip rate."""
        if self.control is not None:
            self.control.update(self.policy.clip_rate(release))

    def _announce(self, gradients: ReleasedGradients, parameters: list[nn.Parameter], released: list[Any]) -> None:
        """Show released gradients to the allocation, and tell an inner optimizer that asks the std of their noise."""
        found = [gradients.stds[id(p)] for p in parameters]
        if self.allocation is not None:
            self.allocation.observe(parameters, released, found, gradients.unit)
        tell = getattr(self.inner, "noise_std", None)
        if tell is not None:
            for parameter, std in zip(parameters, found, strict=True):
                tell(parameter, std)

    @contextmanager
    def controlled_learning_rate(self) -> Iterator[None]:
        """Multiply the learning rates for the length of the inner step; schedulers keep seeing their own."""
        multiplier = 1.0 if self.control is None else self.control.multiplier
        # A rate of None is one that the optimizer chooses itself (Adafactor): there is nothing to multiply.
        groups = [group for group in self.inner.param_groups if group.get("lr") is not None]
        base = [group["lr"] for group in groups]
        if multiplier != 1.0:
            for group in groups:
                group["lr"] = group["lr"] * multiplier
        try:
            yield
        finally:
            for group, lr in zip(groups, base, strict=True):
                group["lr"] = lr

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the averaged weights; without an EMA nothing changes."""
        return nullcontext() if self.ema is None else self._averaged(self.ema)

    @contextmanager
    def _averaged(self, ema: WeightEMA) -> Iterator[None]:
        try:
            with ema.applied():
                self.reducer.refresh()
                yield
        finally:
            self.reducer.refresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> PublicSide:
        """Return a copy without the processes."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            copied.__dict__[name] = LOCAL if name == "reducer" else copy.deepcopy(value, memo)
        return copied
