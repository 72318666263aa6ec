"""Random projection: private training of linear layers in a random subspace of few dimensions.

A weight ``W [out, in]`` is trained as ``W + P R`` with a random ``P [out, r]`` that knows nothing of the data, and only
``R [r, in]`` gets gradients. A record's gradient of R is ``P^T G_i``, exactly: a sum of outer products as that of any
linear layer, so norms, clipping, noise and the states of the inner optimizer all live in the projected space.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer

_DATA_BASES = ("svd", "galore", "gradient", "gradients")


class ProjectedLinear(nn.Module):
    """``x -> base(x) + P R x`` with the weight of ``base`` and P frozen.

    Attributes:
        base: the linear layer; its bias is trained if it was.
        down: R, ``[r, in]``, trained, zero at the start.
        up: P, ``[out, r]``, entries N(0, 1/r).
        refreshes: how many times P was drawn anew; in the state dict, so that a resumed run goes on with other draws.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, base.out_features, bias=False, **like)
        self.refreshes = nn.Parameter(torch.zeros((), dtype=torch.int64), requires_grad=False)
        nn.init.zeros_(self.down.weight)
        self.up.weight.requires_grad_(False)
        base.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, ``[..., in]`` to ``[..., out]``."""
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out

    @torch.no_grad()
    def fold(self) -> None:
        """Move ``P R`` into the weight of ``base``; the function stays what it was."""
        self.base.weight += self.up.weight @ self.down.weight
        self.down.weight.zero_()


class RandomProjection:
    """Trains linear layers in random subspaces that are drawn anew from time to time, as in DP-GRAPE.

    Args:
        rank: r, dimensions kept of each layer's output.
        seed: PUBLIC seed of the projections; they are no noise.
        basis: "random"; bases computed from raw gradients are refused.

    Guarantees:
        P is a function of the seed and the number of refreshes. Training is DP-SGD on R, with the guarantee of any
        model.

    Raises:
        ValueError: If the rank is below 1, or the basis is not random.

    References:
        DP-GRAPE, arXiv 2506.15588. GaLore's basis, the SVD of raw gradients, is a release without noise.
    """

    def __init__(self, rank: int, *, seed: int = 0, basis: str = "random") -> None:
        if basis in _DATA_BASES:
            raise ValueError(
                f"basis={basis!r}: a subspace computed from raw gradients is a release without noise, and whatever is "
                "trained in it shows it. Use basis='random'"
            )
        if basis != "random":
            raise ValueError(f"unknown basis {basis!r}: the only one is 'random'")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a whole number >= 1, got {rank!r}")
        self.rank, self.seed = rank, seed

    def apply(self, model: nn.Module, targets: Iterable[str] = ("*",)) -> list[str]:
        """Replace trainable linear layers in place and return their names; call it before the optimizer is built.

        Args:
            model: a model that is not private yet.
            targets: patterns of module names.

        Raises:
            ValueError: If no layer fits, there are projected layers already, or a layer's weight is tied, not float32
                or float64, or not larger than the rank; nothing was changed.
        """
        patterns = tuple(targets)
        if next(projected_layers(model), None) is not None:
            raise ValueError("the model has projected layers already: give all targets at once")
        found = [
            (name, module)
            for name, module in model.named_modules()
            if type(module) is nn.Linear
            and module.weight.requires_grad
            and any(fnmatchcase(name, pattern) for pattern in patterns)
        ]
        if not found:
            raise ValueError(f"no trainable nn.Linear fits targets={patterns!r}: see model.named_modules() for names")
        uses: dict[int, int] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        for name, layer in found:
            self._check(name, layer, uses[id(layer.weight)])
        for name, layer in found:
            parent, _, last = name.rpartition(".")
            projected = ProjectedLinear(layer, self.rank).train(layer.training)
            setattr(model.get_submodule(parent), last, projected)
        for index, (_, projected) in enumerate(projected_layers(model)):
            self._draw(projected, index)
        return [name for name, _ in found]

    def _check(self, name: str, layer: nn.Linear, uses: int) -> None:
        remedy = "leave it out of targets"
        if not name:
            raise ValueError("the model is itself an nn.Linear, which cannot be replaced in place: wrap it in a module")
        if uses > 1:
            raise ValueError(f"the weight of {name} is tied to another layer's, which would keep the old one: {remedy}")
        if layer.weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is in {layer.weight.dtype}: updates folded into it would be rounded off; {remedy}"
            )
        if self.rank >= layer.out_features:
            raise ValueError(
                f"{name} has {layer.out_features} outputs, rank {self.rank} projects nothing away: {remedy}"
            )

    def _draw(self, layer: ProjectedLinear, index: int) -> None:
        """Draw P of a layer from the public seed."""
        rng = np.random.default_rng([self.seed, int(layer.refreshes), index])
        values = rng.normal(size=tuple(layer.up.weight.shape)) / np.sqrt(self.rank)
        layer.up.weight.data.copy_(torch.from_numpy(values))

    def refresh(self, model: nn.Module, optimizer: AdaptiveClipDPOptimizer) -> None:
        """Fold what was learned into the weights and draw new projections.

        Call it after a step and before the next forward pass.

        The function that the model computes does not change. First moments of the inner optimizer belong to the old
        directions and start again from zero. Second moments are the same for all directions on average, and stay.

        Raises:
            ValueError: If a logical batch is under way, or weights are averaged (the average of R over several
                projections has no meaning); nothing was changed.
        """
        if optimizer.ema is not None:
            raise ValueError("refresh with an EMA of the weights, which would mix projections: pass ema_decay=None")
        if optimizer.statistics.started:
            raise ValueError("refresh within a logical batch: call it after optimizer.step() has taken a real step")
        for index, (_, layer) in enumerate(projected_layers(model)):
            layer.fold()
            layer.refreshes.data.add_(1)
            self._draw(layer, index)
            state = optimizer.original_optimizer.state.get(layer.down.weight, {})
            for name in ("exp_avg", "momentum_buffer"):
                if state.get(name) is not None:
                    state[name].zero_()

    @staticmethod
    def remove(model: nn.Module) -> list[str]:
        """Fold what was learned into the weights and put the plain layers back; after ``engine.detach``."""
        found = list(projected_layers(model))
        for name, layer in found:
            layer.fold()
            layer.base.weight.requires_grad_(True)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.base)
        return [name for name, _ in found]


def projected_layers(model: nn.Module) -> Iterator[tuple[str, ProjectedLinear]]:
    """Return the projected layers of a model, with their names."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, ProjectedLinear))
