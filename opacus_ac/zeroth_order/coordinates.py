"""The coordinates that are trained: moved along directions and updated in place, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from opacus_ac.zeroth_order.directions import BLOCK, Directions, derived_seed

Index = Tensor | None
"""Trained coordinates of one flattened tensor, sorted; None for all of them."""


def _trained(parameter: nn.Parameter, index: Index) -> Tensor:
    """Return a copy of the trained coordinates of ``parameter``, flat."""
    flat = parameter.detach().view(-1)
    return flat.clone() if index is None else flat[index]


def _weighted_sums(flat: Tensor) -> list[int]:
    """Return, for each block, a sum of its words modulo 2^64 with odd weights. Any change of one word changes it."""
    if not flat.numel():
        return []
    odd = torch.randint(2**62, (min(BLOCK, flat.numel()),), generator=torch.Generator().manual_seed(0)) * 2 + 1
    odd = odd.to(flat.device)
    sums = []
    for block in flat.split(BLOCK):
        if block.itemsize == 4 and (block.numel() % 2 or block.storage_offset() % 2):
            padded = block.new_zeros(block.numel() + block.numel() % 2)
            padded[: block.numel()] = block
            block = padded
        words = block.view(torch.int64)
        sums.append((words * odd[: words.numel()]).sum())
    return torch.stack(sums).tolist()


def _anchor(state: dict[str, list[Tensor | None] | None]) -> list[Tensor | None] | None:
    """Return the anchor of a state; a list without tensors is none."""
    anchor = state["anchor"]
    return anchor if anchor is not None and any(a is not None for a in anchor) else None


class _Part:
    """A block of the trained coordinates of one tensor."""

    def __init__(self, tensor: int, number: int, flat: Tensor, index: Index, start: int) -> None:
        self.tensor, self.number, self.start = tensor, number, start
        self.stop = min(start + BLOCK, flat.numel() if index is None else index.numel())
        self._flat = flat
        self._index = None if index is None else index[start : self.stop]

    @property
    def values(self) -> Tensor:
        """The values, ``[n]``: the memory of the weights itself where all of them are trained, else a copy."""
        return self._flat[self.start : self.stop] if self._index is None else self._flat[self._index]

    @property
    def like(self) -> Tensor:
        """A tensor of the size and type of the values; what it holds means nothing."""
        return self._flat[: self.stop - self.start]

    def add(self, change: Tensor, scale: float = 1.0) -> None:
        """Add ``scale * change``, ``[n]``, in place; no other coordinate is written."""
        if self._index is None:
            self._flat[self.start : self.stop].add_(change, alpha=scale)
        else:
            self._flat.index_add_(0, self._index, change, alpha=scale)


class Coordinates:
    """Trained coordinates of a model.

    Args:
        parameters: trainable tensors, contiguous.
        directions: where directions come from.

    Guarantees:
        Beside one block nothing of a direction is ever in memory. Coordinates outside the mask are never written.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], directions: Directions) -> None:
        self.parameters = list(parameters)
        self.directions = directions
        self.indices: list[Index] = [None] * len(self.parameters)
        self.anchor: list[Tensor] | None = None
        self._lengths: dict[int, float] = {}

    @property
    def size(self) -> int:
        """Number d of trained coordinates."""
        return sum(p.numel() if i is None else i.numel() for p, i in zip(self.parameters, self.indices, strict=True))

    def choose(self, indices: Sequence[Index] | None) -> None:
        """Train the coordinates ``indices`` from now on, one index per tensor; None for all."""
        self.indices = [None] * len(self.parameters) if indices is None else list(indices)
        self.anchor = None
        self._lengths.clear()

    def set_anchor(self) -> None:
        """Keep a copy of the weights as they are, for the proximal term."""
        self.anchor = self.copy()

    def copy(self) -> list[Tensor]:
        """Return copies of the trained coordinates, flat, one per tensor."""
        return [_trained(p, i) for p, i in zip(self.parameters, self.indices, strict=True)]

    def restore(self, values: Sequence[Tensor]) -> None:
        """Write ``values``, as :meth:`copy` gave them, into the trained coordinates; to the last bit."""
        for parameter, index, value in zip(self.parameters, self.indices, values, strict=True):
            flat = parameter.detach().view(-1)
            if index is None:
                flat.copy_(value)
            else:
                flat[index] = value

    def forget_lengths(self) -> None:
        """Forget the lengths of the directions of earlier steps."""
        self._lengths.clear()

    @torch.no_grad()
    def checksum(self) -> int:
        """Return 63 bits that follow from every bit of the weights and of the mask, to compare processes."""
        sums: list[int] = []
        for parameter, index in zip(self.parameters, self.indices, strict=True):
            sums += [parameter.numel(), *_weighted_sums(parameter.detach().view(-1))]
            sums += [-1] if index is None else [index.numel(), *_weighted_sums(index)]
        return derived_seed(*(value % 2**64 for value in sums))

    def _parts(self, tensor: int) -> Iterator[_Part]:
        parameter, index = self.parameters[tensor], self.indices[tensor]
        flat = parameter.detach().view(-1)
        count = flat.numel() if index is None else index.numel()
        for number, start in enumerate(range(0, count, BLOCK)):
            yield _Part(tensor, number, flat, index, start)

    def _length(self, seed: int) -> float:
        """Return the factor that gives the direction ``seed`` its length: 1, or sqrt(d) / norm on the sphere."""
        if self.directions.kind != "sphere":
            return 1.0
        if seed not in self._lengths:
            squares = 0.0
            for tensor in range(len(self.parameters)):
                for part in self._parts(tensor):
                    block = self.directions.block(seed, tensor, part.number, part.like)
                    squares += float(block.double().square_().sum())
            self._lengths[seed] = math.sqrt(self.size / squares)
        return self._lengths[seed]

    @torch.no_grad()
    def move(self, seed: int, distance: float) -> None:
        """Add ``distance * z`` to the weights, where z is the direction ``seed``.

        It is repeatable, and moving by ``-distance`` undoes it up to rounding.
        """
        scale = distance * self._length(seed)
        for tensor in range(len(self.parameters)):
            for part in self._parts(tensor):
                part.add(self.directions.block(seed, tensor, part.number, part.like), scale)

    @torch.no_grad()
    def descend(
        self,
        seeds: Sequence[int],
        coefficients: Sequence[float],
        rates: Sequence[float],
        decays: Sequence[float],
        proximal: float,
    ) -> None:
        """Set theta to ``theta - rate (sum_k coefficient_k z_k + decay theta + proximal (theta - anchor))``.

        Args:
            seeds: the K directions.
            coefficients: the K released numbers.
            rates: learning rate of each tensor.
            decays: weight decay of each tensor.
            proximal: strength of the pull to the anchor.
        """
        weights = [c * self._length(seed) for seed, c in zip(seeds, coefficients, strict=True)]
        for tensor in range(len(self.parameters)):
            for part in self._parts(tensor):
                change = self._combined(part, seeds, weights)
                self._pull(part, change, decays[tensor], proximal)
                part.add(change, -rates[tensor])

    @torch.no_grad()
    def write_gradients(self, seeds: Sequence[int], coefficients: Sequence[float], proximal: float) -> None:
        """Write ``sum_k coefficient_k z_k + proximal (theta - anchor)`` into ``grad``, for an inner optimizer."""
        weights = [c * self._length(seed) for seed, c in zip(seeds, coefficients, strict=True)]
        for tensor, parameter in enumerate(self.parameters):
            gradient = torch.zeros_like(parameter)
            for part in self._parts(tensor):
                change = self._combined(part, seeds, weights)
                self._pull(part, change, 0.0, proximal)
                gradient.view(-1)[part.start : part.stop] = change
            parameter.grad = gradient

    def _combined(self, part: _Part, seeds: Sequence[int], weights: Sequence[float]) -> Tensor:
        """Return a block ``[n]`` of the weighted sum of directions."""
        like = part.like
        total = torch.zeros_like(like)
        for seed, weight in zip(seeds, weights, strict=True):
            total.add_(self.directions.block(seed, part.tensor, part.number, like), alpha=weight)
        return total

    def _pull(self, part: _Part, change: Tensor, decay: float, proximal: float) -> None:
        """Add weight decay and proximal term to a block of the change."""
        if decay:
            change.add_(part.values, alpha=decay)
        if proximal:
            assert self.anchor is not None
            change.add_(part.values - self.anchor[part.tensor][part.start : part.stop], alpha=proximal)

    def state_dict(self) -> dict[str, list[Tensor | None] | None]:
        """Return mask and anchor."""
        return {"indices": list(self.indices), "anchor": None if self.anchor is None else list(self.anchor)}

    def check_state(self, state: dict[str, list[Tensor | None] | None]) -> None:
        """Raise ``ValueError`` when ``state`` does not fit these tensors."""
        indices, anchor = state["indices"], _anchor(state)
        fits = indices is not None and len(indices) == len(self.parameters)
        for parameter, index in zip(self.parameters, indices or [], strict=False):
            fits = fits and (index is None or not index.numel() or int(index.max()) < parameter.numel())
        sizes = [p.numel() if i is None else i.numel() for p, i in zip(self.parameters, indices or [], strict=False)]
        if anchor is not None:
            fits = fits and [0 if a is None else a.numel() for a in anchor] == sizes
        if not fits:
            raise ValueError("the state's mask or anchor is of other tensors than this optimizer's")

    def load_state_dict(self, state: dict[str, list[Tensor | None] | None]) -> None:
        """Continue with mask and anchor of ``state``."""
        self.check_state(state)
        indices, anchor = state["indices"], _anchor(state)
        assert indices is not None
        devices = [p.device for p in self.parameters]
        self.choose([None if i is None else i.to(d) for i, d in zip(indices, devices, strict=True)])
        if anchor is not None:
            self.anchor = [a.to(d).clone() for a, d in zip(anchor, devices, strict=True) if a is not None]
