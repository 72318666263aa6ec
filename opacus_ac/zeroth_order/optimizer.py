"""The zeroth-order step: measure along directions, clip jointly, release K numbers, move the weights along them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opacus_ac.accounting import Event
from opacus_ac.distributed.reducers import LOCAL, Reducer, ReplicatedReducer
from opacus_ac.grad_sample.alone.outputs import OutputsAlone
from opacus_ac.optimizer.ema import WeightEMA
from opacus_ac.optimizer.optimizer import STATE_KEY, AdaptiveClipDPOptimizer
from opacus_ac.release.statistics import StepStatistics
from opacus_ac.sampling.delivery import Delivery, Draw
from opacus_ac.zeroth_order import checks, pruning
from opacus_ac.zeroth_order.arithmetic import Evaluation
from opacus_ac.zeroth_order.coordinates import Coordinates
from opacus_ac.zeroth_order.directional_private_side import DirectionalPrivateSide
from opacus_ac.zeroth_order.directional_update import DirectionalUpdate
from opacus_ac.zeroth_order.directions import Directions
from opacus_ac.zeroth_order.laplace import GRID, LaplaceMechanism, laplace_statistics
from opacus_ac.zeroth_order.rounding import WIDE, Room, coarsest, room_of
from opacus_ac.zeroth_order.settings import ADDED_SETTINGS, ZerothOrderSettings
from opacus_ac.zeroth_order.source import Closure, DifferenceSource
from opacus_ac.zeroth_order.trial import try_closure

ZEROTH_ORDER = "zeroth_order"


class ZerothOrderDPOptimizer(AdaptiveClipDPOptimizer):
    """DP-AggZO and its relatives around any ``torch.optim`` optimizer: private fine-tuning with forward passes only.

    It is DP-SGD in the K coefficients of a step's random directions: ``params`` is that vector ``[K]``, and what a record
    adds to its "gradient" are the differences of its loss along the directions. Around plain SGD the weights are updated in
    place, so that a step takes the memory of inference; any other optimizer gets a ``grad``, and keeps its own state.

    Args:
        optimizer: inner optimizer over the trained weights.
        module: the model whose losses the closure computes; looked at, never changed but for its trained weights.
        settings: directions, stages, pruning and mechanism.
        reducer: the processes that take the step, each with the whole model; None for one process.
        single: physical batches are single records, which rounding then cannot couple (:mod:`opacus_ac.zeroth_order.rounding`).
        **kwargs: all other arguments of :class:`AdaptiveClipDPOptimizer`; no ``source``, ``fused_step`` or ``ema_decay``.

    Guarantees:
        A step releases ``sum_i clip_C(delta_i) + N(0, (z C)^2 I_K)``, each record's K-vector ``delta_i`` clipped as one: one
        Gaussian mechanism of multiplier ``noise_multiplier``, whatever K, mask, schedule and weights. The directions are
        public: their seed has nothing to do with noise or sampling, and the bound holds for directions known to everybody.
        What moving rounds is the same for one physical batch and for many: the weights do not tell how many records were drawn.
        Rounding within a batch moves the sum by at most a thousandth of C when a record joins: exactly nothing for single records,
        else by float64 and a smallest C (:mod:`opacus_ac.zeroth_order.rounding` says what of this is proved and what measured).
        Several processes add up their K numbers, which get their noise once; the weights of all stay the same to the last bit.

    References:
        arXiv 2310.09639 (DPZero), 2401.04343 (DP-ZO), 2402.07818 (DP-ZOSO, DP-ZOPO), DP-AggZO (USENIX Security 2025).
    """

    _private: DirectionalPrivateSide
    _public: DirectionalUpdate

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        module: nn.Module,
        settings: ZerothOrderSettings | None = None,
        noise_multiplier: float,
        max_grad_norm: float,
        statistics: StepStatistics | None = None,
        reducer: Reducer | None = None,
        single: bool = False,
        **kwargs: Any,
    ) -> None:
        self.settings = settings or ZerothOrderSettings()
        for name in ("source", "fused_step", "ema_decay"):
            if kwargs.pop(name, None):
                raise ValueError(
                    f"{name} is not an argument of ZerothOrderDPOptimizer (ema_decay belongs to its settings)"
                )
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        checks.check_model(module)
        checks.check_parameters(trained)
        checks.check_inner_optimizer(optimizer, self.settings)
        self.module = module
        self.outputs = OutputsAlone(module, lambda tensors: self.plan is not None and self.plan.keeps_length(tensors))
        # What base class and mechanism see as the parameters: their "gradient" is what a step releases.
        self.coefficients = nn.Parameter(torch.zeros(self.settings.num_directions, dtype=torch.float64))
        reducer = self._exchanging(reducer or LOCAL)
        laplace = self.settings.mechanism == "laplace"
        if laplace:
            statistics = laplace_statistics(statistics, max_grad_norm, kwargs)
        given = self.settings.direction_seed
        own = secrets.randbits(63) if given is None else given
        # Asked for on every rank, also where one was given: whether all were given the same is compared later.
        self.directions = Directions(self.settings.direction, reducer.on_first(lambda: own))
        self.coordinates = Coordinates(trained, self.directions)
        self.single = single
        self.wide = self.settings.precision == "float64" or (self.settings.precision is None and not single)
        self._evaluate = Evaluation(module, wide=self.wide)
        self.differences = DifferenceSource(
            self.coordinates, self.coefficients, 1 if laplace else 2, GRID if laplace else None, self._evaluate
        )
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            statistics=statistics,
            source=self.differences,
            ema_decay=None,
            reducer=reducer,
            **kwargs,
        )
        if laplace:
            self.mechanism = LaplaceMechanism(noise_multiplier, self.mechanism.stream)
            self.mechanism.reducer = reducer
        self.ema = None if self.settings.ema_decay is None else WeightEMA(trained, self.settings.ema_decay)
        self.check_budget: Callable[[Event], None] = lambda event: None
        self._stage: int | None = None
        self._rounded: list[Tensor] | None = None
        self._tried: int | None = None
        if not self.single:
            self.room().check(self.policy.initial_bound)
            self.policy.min_norm = max(self.policy.min_norm, self.room().smallest_bound)

    def _exchanging(self, ranks: Reducer) -> Reducer:
        """Return the reducer of the K numbers for the processes that have the whole model each.

        Raises:
            ValueError: processes that have parts of the model.
        """
        if ranks.name == "local":
            return ranks
        if not isinstance(ranks, ReplicatedReducer):
            raise ValueError(
                f"reducer={ranks.name!r} with ZerothOrderDPOptimizer: it needs the whole model on every rank ('ddp', or 'local')"
            )
        self.coefficients.data = self.coefficients.data.to(ranks.group.device)
        return ranks.of([self.coefficients])

    def _private_side(self, **parts: Any) -> DirectionalPrivateSide:
        """Return the private side, which releases the coefficients of the directions."""
        return DirectionalPrivateSide(differences=self.differences, coordinates=self.coordinates, **parts)

    def _public_side(self, **parts: Any) -> DirectionalUpdate:
        """Return the public side, which moves the weights along the directions."""
        return DirectionalUpdate(self.original_optimizer, self.settings, self.coordinates, **parts)

    @property
    def params(self) -> list[nn.Parameter]:
        """The K coefficients of a step's directions, whose gradient is released; the weights are in ``param_groups``."""
        return [self.coefficients]

    @property
    def sum_description(self) -> str:
        """What the sum that a step releases is, for reports."""
        noise = ", with Laplace noise" if self.settings.mechanism == "laplace" else ""
        return (
            f"the sum of the records' clipped differences along {self.settings.num_directions} public directions{noise}"
        )

    @property
    def stage(self) -> int:
        """Stage of the step that comes next, from 0."""
        stages = self.settings.stages
        return 0 if stages is None else stages.stage(self.steps_taken)

    @property
    def smoothing(self) -> float:
        """Smoothing of the step that comes next."""
        stages = self.settings.stages
        start = self.settings.smoothing
        return start if stages is None else stages.smoothing(self.stage, start)

    @property
    def direction_seeds(self) -> list[int]:
        """Public 63-bit seeds of the directions of the step that comes next."""
        return self.directions.seeds(self.steps_taken, self.settings.num_directions)

    def attach_step_hook(self, fn: Callable[[Any], None]) -> None:
        """Attach an accountant's hook; with Laplace noise only that of the accountant "pure" knows what it costs.

        Raises:
            ValueError: the hook of another accountant with Laplace noise.
        """
        if self.settings.mechanism == "laplace" and getattr(fn, "accountant", None) != "pure":
            raise ValueError(
                "this accountant takes the noise for Gaussian: with mechanism='laplace' use the accountant 'pure' "
                "(opacus_ac.accounting.PureDPAccountant)"
            )
        super().attach_step_hook(fn)

    # ---------------------------------------------------------------- the step

    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        """Measure, clip, charge, release and move; on all but the last physical batch of a logical one only measure.

        Args:
            closure: computes the losses of the records of the batch in hand, ``[B]``, with the weights as they are. It is
                called 2K times without gradients, and up to three times more in the first step. What it returns is private.

        Raises:
            ValueError: no closure, losses that are not one per record or not the same again, a closure that draws at random or writes into the
                model, a C that rounding leaves no room for, or a model in training mode with dropout. Nothing was charged.
            PrivacyBudgetExceeded: the step would exceed the target budget; the weights are as before.
        """
        if closure is None:
            raise ValueError(
                "a zeroth-order step needs optimizer.step(closure), whose closure returns the losses of the batch's records"
            )
        checks.check_not_random(self.module)
        self._look_ahead()
        self._enter_stage()
        self.tape.take()
        self._private.look_away()
        self._measure(closure, None if self.plan is None else self.plan.in_hand)
        # Those of this step: what follows counts it.
        self._public.stage_and_seeds = self.stage, self.direction_seeds
        if not self.pre_step():
            return
        self._rounded = None
        self._finish_step()
        self.differences.clear(sums=True)

    def _measure(self, closure: Closure, delivery: Delivery | None) -> None:
        """Measure the physical batch in hand, from the weights from which the first one of its logical batch was."""
        draw = None if delivery is None else delivery.draw
        self._private.measuring = True
        try:
            self._try(closure, draw)
            if not self._private.continues(delivery):
                # How many physical batches follow is private: all start from the same weights, which show the roundings of one.
                self._rounded = self.coordinates.copy() if self._private.is_skipped(delivery) else None
            elif self._rounded is not None:
                self.coordinates.restore(self._rounded)
            self.differences.largest_loss = math.inf if self.single else self.room().largest_loss(self.policy.bound)
            losses = self.differences.measure(self.outputs.noting(closure), self.direction_seeds, self.smoothing)
        except Exception:
            self._private.die_together()
            raise
        finally:
            self._private.measuring = False
        if self.single and losses.numel() > 1:
            self.differences.clear(sums=False)
            raise ValueError(
                f"physical batches are single records, and the closure returned {losses.numel()} losses: pass each batch of the loader by itself, "
                "or make private without max_physical_batch_size=1"
            )
        self.tape.record(losses)

    def _try(self, closure: Closure, draw: Draw | None) -> None:
        """Look at the closure of the first batch, and of the first one after the model's mode changed."""
        mode = hash(tuple(inner.training for inner in self.module.modules()))
        if self.plan is None or mode == self._tried:
            return
        slack = 0.0 if self.single else self.room().slack(self.policy.bound)
        try_closure(
            closure, self.module, wide=self.wide, single=self.single, loss=self.settings.largest_loss, slack=slack
        )
        if draw is None or draw.records:
            self._tried = mode

    def room(self) -> Room:
        """Return what rounding leaves room for in the step that comes next, where physical batches are not single records."""
        expected = (
            float(self.expected_batch_size or 1) if self.plan is None else self.plan.sizes.expected(self.plan.step)
        )
        return room_of(self.settings, self.plan, expected, WIDE if self.wide else coarsest(self.module.parameters()))

    def _look_ahead(self) -> None:
        """Refuse a step that cannot be paid for, or whose C is too small, before the weights are touched at all."""
        if not self.single:
            self.room().check(self.policy.bound)
        if self.plan is None or self.plan.sampling == "shuffled":
            return
        draw = self.plan.current()
        self.check_budget(self.plan.event(self.noise_multiplier, 1.0 if draw is None else draw.sample_rate))

    def _enter_stage(self) -> None:
        """At the start of a stage choose its mask and keep its anchor: functions of weights that are public by now."""
        stage, settings = self.stage, self.settings
        if stage == self._stage:
            return
        first, chosen = self._stage is None, settings.pruning
        if chosen is not None and (first or chosen.strategy != "static"):
            self.coordinates.choose(
                pruning.choose(
                    self.module,
                    self.coordinates.parameters,
                    chosen,
                    stage=stage,
                    seed=self.directions.seed,
                    before=None if first else self.coordinates.indices,
                )
            )
        if settings.stages is not None and settings.stages.proximal > 0:
            self.coordinates.set_anchor()
        self._stage = stage

    # ---------------------------------------------------------------- state

    def public_settings(self) -> dict[str, Any]:
        """Return the public settings of directions, stages and pruning, for ledger and checkpoint."""
        return self.settings.configuration()

    def state_dict(self) -> dict[str, Any]:
        """Return the base class's state with seed, stage, mask and anchor; the noise stream as there."""
        state = super().state_dict()
        state[STATE_KEY][ZEROTH_ORDER] = self.zeroth_order_state()
        return state

    def zeroth_order_state(self) -> dict[str, Any]:
        """Return settings, seed, stage, mask and anchor."""
        return {
            "settings": self.settings.configuration(),
            "direction_seed": self.directions.seed,
            "stage": self._stage,
            **self.coordinates.state_dict(),
        }

    def check_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the private part of ``state_dict`` if it fits this optimizer.

        Raises:
            ValueError: as the base class; or it is of no zeroth-order run, or of one with other settings.
        """
        state = super().check_state_dict(state_dict)
        self.check_zeroth_order_state(state.get(ZEROTH_ORDER))
        return state

    def check_zeroth_order_state(self, state: dict[str, Any] | None) -> None:
        """Raise ``ValueError`` unless ``state`` is that of a zeroth-order run with these settings and tensors."""
        if state is None:
            raise ValueError("the state was not written by a zeroth-order run: build the optimizer as it was then")
        settings = {**ADDED_SETTINGS, **state["settings"]}
        if settings != self.settings.configuration():
            changed = [k for k, v in self.settings.configuration().items() if settings.get(k) != v]
            raise ValueError(
                f"the state was written with other zeroth-order settings ({', '.join(changed)}): use the same settings"
            )
        self.coordinates.check_state({"indices": state["indices"], "anchor": state["anchor"]})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, along its directions; refuses what does not fit before changing anything."""
        state = self.check_state_dict(state_dict)[ZEROTH_ORDER]
        super().load_state_dict(state_dict)
        self.load_zeroth_order_state(state)

    def load_zeroth_order_state(self, state: dict[str, Any]) -> None:
        """Continue along the directions of a state that :meth:`check_zeroth_order_state` has accepted."""
        self._rounded = self._tried = None
        self.directions.seed, self._stage = int(state["direction_seed"]), state["stage"]
        self.coordinates.load_state_dict({"indices": state["indices"], "anchor": state["anchor"]})
