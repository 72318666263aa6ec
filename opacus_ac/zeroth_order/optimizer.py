"""The zeroth-order optimizer: the one private step, joined to differences of losses and moves along directions."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from opacus_ac.distributed.reducers import LOCAL, Reducer, ReplicatedReducer
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.sampling.plan import SamplingPlan
from opacus_ac.zeroth_order import checks
from opacus_ac.zeroth_order.coordinates import Coordinates
from opacus_ac.zeroth_order.course import Course
from opacus_ac.zeroth_order.directional_update import DirectionalUpdate
from opacus_ac.zeroth_order.directions import Directions
from opacus_ac.zeroth_order.measurement import DirectionalMeasurement
from opacus_ac.zeroth_order.rounding import Room
from opacus_ac.zeroth_order.settings import ZerothOrderSettings
from opacus_ac.zeroth_order.source import DifferenceSource


class ZerothOrderDPOptimizer(AdaptiveClipDPOptimizer):
    """DP-AggZO and its relatives around any ``torch.optim`` optimizer: private fine-tuning with forward passes only.

    It is DP-SGD in the K coefficients of a step's random directions. ``params`` is that vector ``[K]``, and what a
    record adds to its "gradient" are the differences of its loss along the directions. Around plain SGD the weights
    are updated in place, so that a step takes the memory of inference. Any other optimizer gets a ``grad``, and keeps
    its own state.

    ``step(closure)`` needs a closure that returns the losses of the records of the batch in hand, ``[B]``; see
    :meth:`DirectionalMeasurement.measure <opacus_ac.zeroth_order.measurement.DirectionalMeasurement.measure>`.

    Args:
        optimizer: inner optimizer over the trained weights.
        module: the model whose losses the closure computes. Nothing of it changes but its trained weights.
        settings: directions, stages, pruning and mechanism.
        plan: sampling plan of the private loader; None for a loop that samples by itself.
        reducer: the processes that take the step, each with the whole model; None for one process.
        single: whether physical batches are single records, which rounding then cannot couple
            (:mod:`opacus_ac.zeroth_order.rounding`).
        **kwargs: all other arguments of :class:`AdaptiveClipDPOptimizer`, without ``source``, ``method``,
            ``fused_step`` and ``ema_decay``.

    Guarantees:
        A step releases ``sum_i clip_C(delta_i) + N(0, (z C)^2 I_K)``, each record's K-vector ``delta_i`` clipped as
        one. This is one Gaussian mechanism of multiplier ``noise_multiplier``, whatever K, mask, schedule and weights
        are.

        The directions are public. Their seed has nothing to do with noise or sampling, and the bound holds for
        directions that everybody knows.

        Moving the weights rounds them in the same way for one physical batch and for many, so the weights do not tell
        how many records were drawn.

        Rounding within a batch moves the sum by at most a thousandth of C when a record joins, and by nothing where
        records are measured one by one. :mod:`opacus_ac.zeroth_order.rounding` says what of this is proved, and what
        measured.

        Several processes add up their K numbers, and the sum gets its noise once. Their weights stay equal to the last
        bit.

    References:
        arXiv 2310.09639 (DPZero), 2401.04343 (DP-ZO), 2402.07818 (DP-ZOSO, DP-ZOPO), DP-AggZO (USENIX Security 2025).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        module: nn.Module,
        settings: ZerothOrderSettings | None = None,
        plan: SamplingPlan | None = None,
        reducer: Reducer | None = None,
        single: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in ("source", "method", "fused_step", "ema_decay"):
            if kwargs.pop(name, None):
                raise ValueError(
                    f"{name} is not an argument of ZerothOrderDPOptimizer (ema_decay belongs to its settings)"
                )
        settings = settings or ZerothOrderSettings()
        coefficients = nn.Parameter(torch.zeros(settings.num_directions, dtype=torch.float64))
        reducer = _exchanging(reducer or LOCAL, coefficients)
        course = _course(module, settings, optimizer, reducer)
        super().__init__(
            optimizer,
            method=(DirectionalMeasurement(course, coefficients, plan, single), DirectionalUpdate(optimizer, course)),
            ema_decay=settings.ema_decay,
            plan=plan,
            reducer=reducer,
            **kwargs,
        )
        if not single:
            self.room().check(self.policy.initial_bound)
            self.policy.min_norm = max(self.policy.min_norm, self.room().smallest_bound)

    @property
    def _directional(self) -> DirectionalMeasurement:
        measurement = self.measurement
        assert isinstance(measurement, DirectionalMeasurement)
        return measurement

    @property
    def module(self) -> nn.Module:
        """The model whose losses the closure computes."""
        return self._directional.course.module

    @property
    def settings(self) -> ZerothOrderSettings:
        """Directions, stages, pruning and mechanism."""
        return self._directional.course.settings

    @property
    def coefficients(self) -> nn.Parameter:
        """The K coefficients of a step's directions, whose gradient is what a step releases."""
        return self._directional.source.coefficients

    @property
    def differences(self) -> DifferenceSource:
        """What measures the differences of losses. Private."""
        return self._directional.source

    @property
    def coordinates(self) -> Coordinates:
        """The trained coordinates."""
        return self._directional.course.coordinates

    @property
    def directions(self) -> Directions:
        """Where directions come from."""
        return self.coordinates.directions

    @property
    def stage(self) -> int:
        """Stage of the step that comes next, from 0."""
        return self._directional.course.stage(self.steps_taken)

    @property
    def smoothing(self) -> float:
        """Smoothing of the step that comes next."""
        return self._directional.course.smoothing(self.steps_taken)

    @property
    def direction_seeds(self) -> list[int]:
        """Public 63-bit seeds of the directions of the step that comes next."""
        return self._directional.course.seeds(self.steps_taken)

    def room(self) -> Room:
        """Return what rounding leaves room for in the step that comes next, where batches are not single records."""
        return self._directional.room(self._private)


def _course(module: nn.Module, settings: ZerothOrderSettings, optimizer: Optimizer, reducer: Reducer) -> Course:
    """Return the course of a run, from the beginning.

    Raises:
        ValueError: If the model, its trained weights or the inner optimizer cannot be trained so.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    checks.check_model(module)
    checks.check_parameters(trained)
    checks.check_inner_optimizer(optimizer, settings)
    given = settings.direction_seed
    own = secrets.randbits(63) if given is None else given
    # Asked for on every rank, also where one was given: whether all were given the same is compared later.
    directions = Directions(settings.direction, reducer.on_first(lambda: own))
    return Course(module, settings, Coordinates(trained, directions))


def _exchanging(ranks: Reducer, coefficients: nn.Parameter) -> Reducer:
    """Return the reducer of the K numbers for the processes that have the whole model each.

    Raises:
        ValueError: If the processes have parts of the model.
    """
    if ranks.name == "local":
        return ranks
    if not isinstance(ranks, ReplicatedReducer):
        raise ValueError(
            f"reducer={ranks.name!r} with ZerothOrderDPOptimizer: it needs the whole model on every rank ('ddp', or "
            "'local')"
        )
    coefficients.data = coefficients.data.to(ranks.group.device)
    return ranks.of([coefficients])
