"""The Gaussian mechanism: the only place where noise is drawn and where private sums become a release."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from opacus_ac._validate import not_negative
from opacus_ac.distributed.reducers import LOCAL, Reducer
from opacus_ac.noise.streams import RandomStream
from opacus_ac.protocols.part import Part
from opacus_ac.release.statistics import StepStatistics
from opacus_ac.release.values import Decoded


@dataclass(frozen=True)
class GradientNoise:
    """The noise of one release of gradients: std of the sum per coordinate, and the public scale of the result."""

    mechanism: GaussianMechanism
    parameters: list[torch.nn.Parameter]
    std: float | Sequence[float]
    scale: float

    def gradients(self, sums: Iterable[torch.Tensor | None]) -> None:
        """Write the noised sums, one per parameter, into the gradients."""
        self.mechanism.release_gradients(self.parameters, sums, self.std, self.scale)

    def in_place(self, totals: Sequence[torch.Tensor]) -> None:
        """Noise sums in place."""
        self.mechanism.noise_in_place(totals, self.std, self.scale)


class GaussianMechanism(Part):
    """Adds Gaussian noise to (gradient sum / C, statistics), one draw per logical step.

    Args:
        noise_multiplier: ratio of the noise std to the joint L2 sensitivity ``sqrt(1 + a^2 + b^2 + c^2)``.
        stream: random stream of the noise; with several processes each has its own.

    Guarantees:
        One step on a Poisson sample of rate q is one Poisson-subsampled Gaussian mechanism with this noise
        multiplier under adding or removing one record, however many parameters, bins or losses it releases.

    References:
        Andrew et al. 2021 (arXiv 1905.03871), theorem 1, generalised to a joint vector.
    """

    name = "gaussian"
    """Of :data:`opacus_ac.accounting.events.MECHANISMS`: what is charged."""

    of_one_process = ("stream", "statistics_stream")

    def __init__(self, noise_multiplier: float, stream: RandomStream) -> None:
        self.noise_multiplier = noise_multiplier
        self.stream = stream
        # A stream of their own: runs with the same test seed share the gradient's noise whatever else they release.
        self._statistics_stream = stream.fork(2)

    @property
    def noise_multiplier(self) -> float:
        """Ratio of the noise std to the joint sensitivity, which the accountant sees."""
        return self._noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self._noise_multiplier = not_negative(noise_multiplier=value)

    def check_hook(self, hook: object) -> None:
        """Take any accountant's step hook: accountants that have no bound for Gaussian noise say so themselves."""

    def gradient_multiplier(self, statistics: StepStatistics) -> float:
        """Return z_g: the std of the noise on every coordinate of the release, in units of C."""
        return self._noise_multiplier * statistics.sensitivity

    def release_gradients(
        self,
        parameters: Iterable[torch.nn.Parameter],
        sums: Iterable[torch.Tensor | None],
        std: float | Sequence[float],
        scale: float = 1.0,
    ) -> None:
        """Write ``(sum + N(0, std^2)) * scale`` into each parameter's ``grad``.

        Args:
            parameters: the trainable parameters.
            sums: summed clipped gradients, taken one by one; None is a sum of zero (and gets its noise). A sum in the
                parameter's dtype becomes the ``grad`` itself, without a copy; a float64 one is rounded after the noise.
            std: std of the noise per coordinate (of the sum, before division by the expected batch size), or one for
                each parameter.
            scale: public factor, such as one over the expected batch size.
        """
        named = list(parameters)
        # All sums first: after a matrix product the threads of BLAS spin for a while, on cores that the noise needs.
        totals = [
            torch.zeros_like(parameter)
            if total is None
            else total
            if total.dtype == parameter.dtype
            else total.to(torch.promote_types(total.dtype, parameter.dtype))
            for parameter, total in zip(named, sums, strict=True)
        ]
        self.noise_in_place(totals, std, scale)
        for i, parameter in enumerate(named):
            parameter.grad = totals[i].to(parameter.dtype).view_as(parameter)
            totals[i] = parameter.grad  # the float64 sum goes

    def noise_in_place(self, totals: Sequence[torch.Tensor], std: float | Sequence[float], scale: float = 1.0) -> None:
        """Set sums of clipped gradients to ``(total + N(0, std^2)) * scale``.

        Args:
            totals: sums, each in its parameter's dtype or in float64.
            std: std of the noise per coordinate (of the sum, before ``scale``), or one for each total.
            scale: public factor.

        Guarantees:
            Noise is drawn, added and scaled in float64; the result is rounded once, to the dtype of the sum.
        """
        if not isinstance(std, float | int):
            # Neighbours of one std together: draws stay in the order of the totals.
            for each, pairs in groupby(zip(std, totals, strict=True), key=lambda pair: pair[0]):
                self.noise_in_place([total for _, total in pairs], each, scale)
        elif std != 0:
            self.stream.add_normal(totals, std, scale)
        elif scale != 1:
            torch._foreach_mul_(list(totals), scale)

    def noise(
        self, parameters: Iterable[torch.nn.Parameter], std: float | Sequence[float], scale: float
    ) -> GradientNoise:
        """Return the noise of one release, for a reducer to add."""
        return GradientNoise(self, list(parameters), std, scale)

    def release_statistics(
        self, statistics: StepStatistics, expected_batch_size: float, reducer: Reducer = LOCAL
    ) -> Decoded:
        """Noise the statistics and return histogram, mean loss and mean profile.

        Args:
            statistics: the sums of all processes.
            expected_batch_size: public denominator of the means.
            reducer: the processes that take the step; rank 0 draws the noise, and all have its values.
        """
        std = self.gradient_multiplier(statistics)
        vector = statistics.vector()
        if std > 0 and vector.size and reducer.rank == 0:
            vector = vector + std * self._statistics_stream.normal(vector.size).numpy()
        if vector.size:
            vector = reducer.agree(vector)
        return statistics.decode(vector, std, expected_batch_size)

    def public_settings(self) -> dict[str, Any]:
        """Return the noise multiplier."""
        return {"noise_multiplier": self._noise_multiplier}

    def warnings(self) -> list[str]:
        """Return what a reader of the report must know."""
        found = []
        if not self.stream.secret:
            found.append("the noise comes from a seeded generator: whoever knows the seed can remove it")
        if self._noise_multiplier == 0:
            found.append("the noise multiplier is 0: nothing is protected")
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return noise multiplier and, for seeded test streams only, their states."""
        return {
            "noise_multiplier": self._noise_multiplier,
            "stream": self.stream.state_dict(),
            "statistics_stream": self._statistics_stream.state_dict(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` unless the noise multiplier is one; streams are not looked into."""
        not_negative(noise_multiplier=state["noise_multiplier"])
        _ = state["stream"], state["statistics_stream"]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.noise_multiplier = state["noise_multiplier"]
        self.stream.load_state_dict(state["stream"])
        self._statistics_stream.load_state_dict(state["statistics_stream"])
