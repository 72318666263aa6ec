"""The release of a logical batch: its sums get their noise here, and nowhere else."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opacus_ac.distributed.reducers import Reducer, Source
from opacus_ac.grad_sample.source import OnlyTrained
from opacus_ac.optimizer.lr_control import ClipRateControl
from opacus_ac.optimizer.records import RecordSums
from opacus_ac.optimizer.released import Apply, ReleasedGradients
from opacus_ac.optimizer.turns import Turns
from opacus_ac.release.mechanism import GaussianMechanism
from opacus_ac.release.values import StepRelease
from opacus_ac.sampling.delivery import Draw


class SumRelease(RecordSums):
    """Releases the sums of a logical batch, which become public values in :meth:`add_noise`.

    Args:
        params: the parameters whose gradients are released.
        mechanism: draws the noise.
        reducer: how the sums of several processes become one.
        control: the multiplier of the learning rate, which a release states; None for 1.
        normalize: scale the released gradient by C0 / C_t.
        fused_step: keep the sums until :attr:`ReleasedGradients.in_turns` asks for them.
        loss_reduction: "mean" or "sum".
        expected_batch_size: public denominator of a batch of unknown origin.
        **sums: the other arguments of :class:`RecordSums`.

    Attributes:
        released: what the last step released; the one value in here that is public.
        steps_taken: number of releases.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        *,
        mechanism: GaussianMechanism,
        reducer: Reducer,
        control: ClipRateControl | None,
        normalize: bool,
        fused_step: bool,
        loss_reduction: str,
        expected_batch_size: float | None,
        **sums: Any,
    ) -> None:
        super().__init__(params, **sums)
        self.mechanism, self.reducer, self.control = mechanism, reducer, control
        self.normalize, self.fused_step = normalize, fused_step
        self.loss_reduction, self.expected_batch_size = loss_reduction, expected_batch_size
        self.released: StepRelease | None = None
        self.steps_taken = 0
        self._draw: Draw | None = None
        self._noise: tuple[dict[int, float], float, float] = ({}, 1.0, 1.0)

    @property
    def noise_multiplier(self) -> float:
        """Noise multiplier that an accountant may count on: 0 when the clip policy is not private."""
        return self.mechanism.noise_multiplier if self.policy.is_private else 0.0

    def _denominator(self) -> float:
        """Return the public expected batch size of the step."""
        if self._draw is not None:
            return self._draw.expected_batch_size
        if self.expected_batch_size is None:
            return 1.0
        return float(self.expected_batch_size) * self.source.backward_passes

    def add_noise(self) -> None:
        """Release the step, scaled: the only place where private sums become public values."""
        bound, statistics = self.policy.bound, self.statistics
        multiplier = self.mechanism.gradient_multiplier(statistics)
        std, scale = multiplier * bound, self._gradient_scale()
        weights = self._weights()
        stds = [std] * len(self.params) if weights is None else [std / w for w in weights]
        self._noise = (
            {id(p): s for p, s in zip(self.params, stds, strict=True)},
            scale,
            scale * self._denominator(),
        )
        if not self.fused_step:
            trained, source = self._trained()
            own = std if weights is None else [self._noise[0][id(p)] for p in trained]
            self.reducer.release(source, self.mechanism.noise(trained, own, scale))
        decoded = self.mechanism.release_statistics(statistics, self._denominator(), self.reducer)
        statistics.finish()
        self.steps_taken += 1
        self.released = StepRelease(
            step=self.steps_taken,
            max_grad_norm=bound,
            noise_multiplier=self.noise_multiplier,
            gradient_noise_multiplier=multiplier,
            sample_rate=1.0 if self._draw is None else self._draw.sample_rate,
            expected_batch_size=self._denominator(),
            clip_rate=None if decoded.histogram is None else decoded.histogram.fraction_above(bound),
            lr_multiplier=1.0 if self.control is None else self.control.multiplier,
            **decoded._asdict(),
        )

    def _gradient_scale(self) -> float:
        """Return one over the public batch size, times C0 / C_t when ``normalize`` is set."""
        factor = self.policy.initial_bound / self.policy.bound if self.normalize else 1.0
        return factor / self._denominator() if self.loss_reduction == "mean" else factor

    def gradients(self) -> ReleasedGradients:
        """Return the gradients of the release: in ``.grad``, or noised in turns as they are asked for."""
        (stds, scale, unit), weights = self._noise, self._weights()
        trained, source = self._trained()

        def noise(parameters: list[nn.Parameter], totals: list[Tensor]) -> None:
            std = [stds[id(p)] for p in parameters]
            self.mechanism.noise_in_place(totals, std[0] if weights is None else std, scale)

        def in_turns(apply: Apply) -> None:
            turns = Turns(trained, noise, apply)
            for parameter, total in zip(trained, source.sums(turns.place), strict=True):
                turns.add(parameter, total)
            turns.flush()

        found = {id(p): stds[id(p)] * scale for p in trained}
        return ReleasedGradients(trained, found, unit, in_turns if self.fused_step else None)

    def _trained(self) -> tuple[list[nn.Parameter], Source]:
        """Return the parameters that this release moves, and where their sums come from; frozen ones get no noise."""
        trained = [p for p in self.params if p.requires_grad]
        if len(trained) == len(self.params):
            return trained, self.source
        return trained, OnlyTrained(self.source, self.params)
