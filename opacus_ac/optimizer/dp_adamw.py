"""DPAdamW: AdamW whose second moment is freed of the noise that the mechanism added to its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from opacus_ac._validate import not_negative


class DPAdamW(Optimizer):
    """AdamW with noise correction of the second moment, as the inner optimizer of a private one.

    Under noise of std s, Adam's second moment estimates ``E[g]^2 + s^2``: where noise outweighs the signal, all
    coordinates move alike, as in SGD with momentum. Here the known ``s^2`` of every step is averaged with the same
    decay and taken off. s follows C, batch size, ``normalize`` and noise allocation; the private optimizer tells it
    before each step.

    Args:
        params: parameters or groups of them.
        lr: learning rate. Corrected denominators are smaller: rates tuned for AdamW are too large where noise
            dominates.
        betas: decays of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        gamma: floor of the corrected second moment, as a share of the noise's part in it. The floor of the paper is an
            absolute number; as a share it need not be tuned again when C or the batch size changes.

    Guarantees:
        A function of released gradients and public numbers. Without noise its numbers are those of
        ``torch.optim.AdamW``.

    Raises:
        ValueError: a value out of range; in :meth:`step`, a gradient whose noise nobody stated.

    References:
        DP-AdamBC, arXiv 2312.14334, algorithm 1, with a variance that changes from step to step.

    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = DPAdamW([weight], lr=0.1)
    >>> weight.grad = torch.ones(3)
    >>> optimizer.noise_std(weight, 0.5)
    >>> optimizer.step()
    >>> weight.detach()
    tensor([-0.1155, -0.1155, -0.1155])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        gamma: float = 0.1,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("gamma", gamma)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"DPAdamW needs a finite {name} >= 0, got {value!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"DPAdamW needs betas in [0, 1), got {betas!r}")
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "gamma": gamma}
        super().__init__(params, settings)
        self._told: dict[int, float] = {}

    def noise_std(self, parameter: Tensor, std: float) -> None:
        """State the std of the noise in the ``grad`` of ``parameter`` that the next step will see; 0 for none.

        :class:`opacus_ac.AdaptiveClipDPOptimizer` calls this by itself.
        """
        self._told[id(parameter)] = not_negative(**{"std of the noise": std})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            ValueError: it was written by another optimizer; nothing was changed.
        """
        if any("noise" not in state for state in state_dict["state"].values()):
            raise ValueError(
                "the state was not written by DPAdamW: how much noise is in its second moment is not known. Start anew"
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step on every parameter that has a gradient.

        Raises:
            ValueError: the noise in a gradient was not stated since the last step; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(id(p) not in self._told for _, p in found):
            raise ValueError(
                "nobody stated the noise in the gradients, so it cannot be corrected for: use DPAdamW inside of "
                "opacus_ac's make_private, or call optimizer.noise_std(parameter, std) for each before every step"
            )
        for group, parameter in found:
            self._update(parameter, group, self._told.pop(id(parameter)))
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], std: float) -> None:
        """Apply the gradient of one parameter."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["noise"] = 0.0
        first, second = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        state["noise"] = second * state["noise"] + (1 - second) * std**2
        steps, rate = state["step"].item(), group["lr"]
        parameter.mul_(1 - rate * group["weight_decay"])
        size = rate / (1 - first**steps)
        root = second_moment(state["exp_avg_sq"], state["noise"], group["gamma"]).sqrt()
        denominator = (root / math.sqrt(1 - second**steps)).add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-size)


def second_moment(average: Tensor, noise: float, gamma: float) -> Tensor:
    """Return ``max(average - noise, gamma * noise)``: an average of squares less the mean variance of their noise."""
    return average if noise == 0 else (average - noise).clamp_(min=gamma * noise)
