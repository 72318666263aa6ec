"""AutoAdam: an Adam that finds its learning rate from inner products of released gradients, at no epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from opacus_ac._validate import not_negative
from opacus_ac.optimizer import path_start
from opacus_ac.optimizer.momentum import planned_beta1
from opacus_ac.optimizer.path_length import PathLength, are_new
from opacus_ac.optimizer.pieces import over_shards, pieces, products, squares_and_zeros

_TINY = 1e-30  # of a denominator
_NO_PLAN = 0.5  # beta1 where the number of steps is not known
_SHARE, _SHARE_NEW = 0.75, 0.5  # how far steps follow the share of signal, and those of new weights, as of adapters
_SHARE_NEW_SHORT = 0.0  # _SHARE_NEW of a short run, in which new weights do not get to show theirs


class AutoAdam(Optimizer):
    """Adam with one denominator per tensor, whose learning rate is found from released gradients and their known noise.

    A released gradient is ``g_t = gradient + noise`` with noise of known std ``sigma_t``. The weights are
    ``theta_t = theta_0 - s_t Delta_t``, where the path ``Delta_t`` is the sum of all steps at the hinted rate, and
    s one factor for the whole path. With ``Delta = sum a_j g_j`` and a set I of releases from the start::

        D0 = k mean over i in I of <g_i, Delta - a_i g_i>,   k = sum a_j / (sum a_j - mean over I of a_i)
                                     minus the slope at the start, along all of the path
        D1 = <g_t, Delta>            minus the slope at the end; its noise is independent of Delta
        sd1 = sqrt(sum sigma_t^2 |Delta|^2),   sd0 = k sd1 / sqrt(|I|)

        s    moves to where D1 is 0:  ln(s) += gain D1 / (kappa D0)           (PathLength)
        m    = beta1 m + (1 - beta1) g_t
        Delta += lr w m / ((1 - beta1^t) rms)                               rms of the releases of the tensor so far
        w    ~ max(|sum g|^2 / (d sum sigma^2) - 1, sqrt(2 / d))^(share / 2),  scaled to sum d w^2 = sum d

    No release is multiplied with itself in D0, so its noise and the draw of its records do not pass for a slope. Only
    while the path is one release, D0 is ``<g_1, Delta>`` less the known energy of the noise that both have in common.

    s begins at 0.1, and with fewer than 20 planned steps at 0.2. It begins higher where the hint is so low that the
    first step would change the weights by less than 1.5 % of their root mean square, or by less than 15 % where a
    quarter of their entries or more are zero, as with adapters: then that is the first step. s is at most
    1e4, so a hint that is lower still does not get there in one.

    While D1 is at least 0.6 D0 the path is too short to have left its start: s grows by the factor
    ``D0 / (D0 - D1 + sqrt(sd0^2 + sd1^2) / 2)``, at most fivefold per step, and g_t belongs to I. By a factor of 2.5 or
    more, the k steps so far are averaged: Delta is multiplied with k / (k + 1). After the first step, where D1 is at
    least 0.4 D0, s grows by at least 2.5. When the search ends, s is multiplied with (k + 1) / 4 and Delta divided by
    it: the path stays, and is two steps long. With fewer than 20 planned steps, s grows up to 7.5 fold per step, the
    next step counts 1 / (k + 1), so that the path is one step long, and 1.25 after the search.

    Later a scalar Kalman filter for ln(s) weighs each measurement by its noise. kappa says how fast D1 / D0 falls
    with ln(s), 1 for a quadratic at its minimum. A second filter learns it from what each move of s made of D1,
    between 0.3 and 10; a kappa below 1 only makes the path shorter. Where two measurements in a row agree beyond the
    noise, ln(s) is taken to be less certain. A path that is too long costs more than one that is too short. So s moves
    to where D1 / D0 is min(kappa r / 5, 0.75) instead of 0, where r is the std of the noise in D1 / D0.

    While D0 is not told from its noise, the start is taken to be as steep as the end, if that is told. If not, s goes
    towards 1, by a factor of 1.26 a step, by less where the end leads back, and stays there, so that a run in which
    nothing can be measured is one at the hint. When D1 is below -D0 by clearly more than noise, while the filter knows
    little, s is halved.

    Args:
        params: parameters or groups of them.
        lr: a hint of the learning rate, in Adam's units. A group with another ``lr`` takes steps of another length.
            Schedules and ``lr_control`` multiply the steps to come.
        steps: planned number of steps, a public number, for ``beta1`` and for how fast the rate is looked for.
        beta1: momentum; None for that of :func:`opacus_ac.optimizer.momentum.planned_beta1`, or 0.5 without ``steps``.
        weight_decay: decoupled weight decay, at the learning rate that was found.
        share: how far a tensor's steps follow its share of signal. 0 for steps of one length. None for 0.75. Where
            a quarter of the weights or more are zero before the first step, as with adapters, None is 0.5, and 0 with
            fewer than 20 planned steps.

    Attributes:
        learning_rates: the learning rate of each group that the next step starts from, ``s lr``.
        agree: how several processes agree on values, those of rank 0; None for one process. The private optimizer
            sets it.

    Guarantees:
        A function of released gradients, the stated std of their noise, the weights before training and public
        constants: no sensitivity is added, and nothing is charged.

        A parameter without a gradient stays where it is.

        With several processes, inner products are those of whole tensors, sharded or not, and rank 0's count.

    Not guaranteed:
        That the rate is good. The rule is exact for a quadratic loss, and measurements are weighed by the stated noise
        only, not by how much batches differ. A hint more than 10 times above a good rate, or 100 below, was not tried,
        and one that is far off costs steps, which short runs do not have.

    Four buffers of the size of the weights are kept, where Adam has two. The path is an average already: use
    ``ema_decay=None``.

    Raises:
        ValueError: If a value is out of range; in :meth:`step`, if the noise in a gradient was not stated.

    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = AutoAdam([weight], lr=0.01)
    >>> for _ in range(20):
    ...     weight.grad = weight.detach().clone()  # of the loss |weight|^2 / 2, without noise
    ...     optimizer.noise_std(weight, 0.0)
    ...     optimizer.step()
    >>> bool(weight.abs().max() < 0.01)
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        steps: int | None = None,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        share: float | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("share", 0.0 if share is None else share)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"AutoAdam needs a finite {name} >= 0, got {value!r}")
        if steps is not None and steps < 1:
            raise ValueError(f"AutoAdam needs steps >= 1, the planned number of steps, got {steps!r}")
        if beta1 is None:
            beta1 = _NO_PLAN if steps is None else planned_beta1(steps)
        if not 0 <= beta1 < 1:
            raise ValueError(f"AutoAdam needs beta1 in [0, 1), got {beta1!r}")
        settings = {"lr": lr, "beta1": beta1, "weight_decay": weight_decay, "share": share}
        self._told: dict[int, float] = {}
        self.agree: Callable[[Any], Any] | None = None
        super().__init__(params, settings)
        for group in self.param_groups:
            group.update(PathLength.planned(steps).entries())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose path begins here, at the scale that the others have."""
        length = PathLength() if not self.param_groups else PathLength.of(self.param_groups[0])
        super().add_param_group({**length.entries(), **param_group})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._told, self.agree = {}, None

    @property
    def learning_rates(self) -> list[float]:
        """The learning rate of each group that the next step starts from."""
        return [group["path_scale"] * group["lr"] for group in self.param_groups]

    def describe(self) -> str:
        """Return in words what was found, for the report."""
        length, found = PathLength.of(self.param_groups[0]), ", ".join(f"{rate:.3g}" for rate in self.learning_rates)
        hints = ", ".join(f"{group['lr']:.3g}" for group in self.param_groups)
        count = length.measured + length.blind
        return (
            f"{found} found by AutoAdam from releases (hint {hints}), beta1 {self.param_groups[0]['beta1']:g}; "
            f"{length.measured} of {count} measurements told from noise, path cut {length.falls} times"
        )

    def warnings(self) -> list[str]:
        """Return what a reader of the report must know."""
        length = PathLength.of(self.param_groups[0])
        if length.blind <= length.measured:
            return []
        return [
            f"AutoAdam told the slope of the loss from noise in {length.measured} of "
            f"{length.measured + length.blind} steps only, so the learning rate is the hint for the most part: take "
            "larger batches, train fewer weights, or choose the rate on public data"
        ]

    def noise_std(self, parameter: Tensor, std: float) -> None:
        """State the std of the noise in the ``grad`` of ``parameter`` that the next step will see; 0 for none.

        :class:`opacus_ac.AdaptiveClipDPOptimizer` calls this by itself.
        """
        self._told[id(parameter)] = not_negative(**{"std of the noise": std})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            ValueError: If it was written by another optimizer; nothing was changed.
        """
        needed = PathLength().entries()
        missing = {name for group in state_dict["param_groups"] for name in needed if name not in group}
        missing |= {name for state in state_dict["state"].values() for name in path_start.FRESH if name not in state}
        if missing:
            raise ValueError(
                f"the state was not written by AutoAdam, or by an older one: it lacks {', '.join(sorted(missing))}, so "
                "the path whose length is looked for is not known: start anew"
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step on every parameter that has a gradient.

        Raises:
            ValueError: If the noise in a gradient was not stated since the last step; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(id(p) not in self._told for _, p in found):
            raise ValueError(
                "nobody stated the noise in the gradients, and inner products cannot be judged without: use AutoAdam "
                "inside of opacus_ac's make_private, or call optimizer.noise_std(parameter, std) for each before every "
                "step"
            )
        if found:
            self._move(found, [self._told.pop(id(p)) for _, p in found])
        return loss

    def _move(self, found: Sequence[tuple[dict[str, Any], Tensor]], stds: Sequence[float]) -> None:
        """Measure the path, give it its length, and take the next step along it."""
        length = PathLength.of(self.param_groups[0])
        states = [self._observed(p, std) for (_, p), std in zip(found, stds, strict=True)]
        rows = [products(p, state) for (_, p), state in zip(found, states, strict=True)]
        measured = self._numbers(over_shards(rows, [p for _, p in found]))
        kept = taken = 1.0
        share = self.param_groups[0]["share"]  # also of a group that is added later
        if any(row[2] for row in measured):  # before the first step there is no path to measure
            kept, taken = length.follow(path_start.slopes(measured, states, stds, [p.numel() for _, p in found]))
        else:
            size, zeros = self._size_of_weights(found)
            length.begin(size, zeros)
            share = (_SHARE_NEW_SHORT if length.short else _SHARE_NEW) if are_new(zeros) else _SHARE
        for group in self.param_groups:
            group["share"] = share if group["share"] is None else group["share"]
        for (_, parameter), state, row, std in zip(found, states, measured, stds, strict=True):
            if length.searching or not state["anchored"]:
                path_start.join(state, parameter.grad, row[3], std)  # type: ignore[arg-type]  # those that were found have one
        for state, (_, _, _, squares, energy) in zip(states, measured, strict=True):
            state["squares"] += squares
            state["energy"] = energy
        weights = _weights(found, states)
        for (group, parameter), state, weight in zip(found, states, weights, strict=True):
            _step(parameter, group, state, weight * taken, length.scale, kept)
        for group in self.param_groups:
            group.update(length.entries())

    def _size_of_weights(self, found: Sequence[tuple[dict[str, Any], Tensor]]) -> tuple[float, float]:
        """Return the root mean square of the weights in units of the hints, 0 without one, and the share of zeros."""
        parameters = [p for _, p in found]
        rows = self._numbers(over_shards([squares_and_zeros(p) for p in parameters], parameters))
        squares, zeros = (sum(column) for column in zip(*rows, strict=True))
        # Where a schedule begins low, the first step is that much shorter, and not the factor that much larger.
        unit = sum(group.get("initial_lr", group["lr"]) ** 2 * p.numel() for group, p in found)
        return math.sqrt(squares / unit) if unit > 0 else 0.0, zeros / sum(p.numel() for p in parameters)

    def _numbers(self, rows: Tensor) -> list[list[float]]:
        """Return the values of scalars, with one transfer from the device, and those of rank 0 on every rank."""
        values: list[list[float]] = rows.tolist()
        if self.agree is not None:
            values = self.agree(np.array(values).reshape(-1)).reshape(rows.shape).tolist()
        return values

    def _observed(self, parameter: Tensor, std: float) -> dict[str, Any]:
        """Return the state of a parameter, after it took in the release."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            for name in ("path", "exp_avg", "total", "anchor"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state |= {"step": 0, "first_std": std, "variance": 0.0, "squares": 0.0, "scale": 1.0, **path_start.FRESH}
        state["step"] += 1
        state["variance"] += std**2
        return state


def _weights(found: Sequence[tuple[dict[str, Any], Tensor]], states: Sequence[dict[str, Any]]) -> list[float]:
    """Return the length of each tensor's steps, by its share of signal; 1 at first, and where there is no noise."""
    raw = []
    for (group, parameter), state in zip(found, states, strict=True):
        size, weight = parameter.numel(), 1.0
        if state["step"] > 1 and state["variance"] > 0:
            signal = state["energy"] / (size * state["variance"]) - 1
            weight = max(signal, math.sqrt(2 / size)) ** (group["share"] / 2)
        raw.append((size, weight))
    unit = math.sqrt(sum(size for size, _ in raw) / sum(size * weight**2 for size, weight in raw))
    return [unit * weight for _, weight in raw]


def _step(
    parameter: Tensor, group: dict[str, Any], state: dict[str, Any], weight: float, scale: float, kept: float
) -> None:
    """Bring the path of a parameter to its length, and go a step further.

    Args:
        parameter: the parameter, at ``theta_0 - state["scale"] Delta``.
        group: its group.
        state: its state.
        weight: length of the tensor's step.
        scale: the factor on the path from now on.
        kept: the factor by which the steps in the path count from now on.
    """
    beta1, rate, size, steps = group["beta1"], group["lr"], parameter.numel(), state["step"]
    correction = 1 - beta1**steps
    decay = 1 - scale * rate * group["weight_decay"]
    rms = max(math.sqrt(state["squares"] / (size * steps)), _TINY)
    further = rate * weight / (correction * rms)
    for place, g, path, average in pieces(parameter, parameter.grad, state["path"], state["exp_avg"]):
        place.add_(path, alpha=state["scale"] - scale * kept)
        if decay != 1:
            place.mul_(decay)  # start and path alike
        if kept * decay != 1:
            path.mul_(kept * decay)
        average.lerp_(g, 1 - beta1)
        path.add_(average, alpha=further)
        place.add_(average, alpha=-scale * further)
    # Where all releases are zero nothing moved, however large the factor on them.
    path_start.moved(state, kept=kept * decay, further=rate * weight / rms if rms > _TINY else 0.0, beta1=beta1)
    state["scale"] = scale
