"""One use of a module in a training forward pass: its arguments, and what is held for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass
class Call:
    """The arguments of one call of a module, tensors apart from the rest."""

    leaves: list[Any]
    places: list[int]
    spec: TreeSpec | None
    """None: one positional tensor and nothing else."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, list[Tensor]]:
        """Take the tensors out of the arguments."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return _ONE_TENSOR, [args[0]]
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in places]
        for i in places:
            leaves[i] = None
        return cls(leaves, places, spec), tensors

    def arguments(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put tensors back into the arguments."""
        if self.spec is None:
            return tuple(tensors), {}
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


_ONE_TENSOR = Call([], [], None)


@dataclass(slots=True)
class Use:
    """One call of a module in a training forward pass, until the gradient at its output arrives."""

    path: str
    """Name of the module in the model."""
    module: nn.Module
    call: Call
    kept: Any
    """The output of the graph node that holds the tensors of the call (and, last, the output, where that was asked
    for).

    The node itself would not do: before torch 2.13 it lets go of them when its output is gone.
    """
    autocast: AbstractContextManager[Any]
    """A context in which the module runs again as it ran."""
    model_pass: int
    """Number of the model's forward pass that it belongs to."""
    flattened: tuple[int, int] | None = None
    """``(B, T)`` where the module may have been handed ``[B T, d]`` for ``[B, T, d]``."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors held; recomputed here where the forward was checkpointed. Once."""
        tensors: tuple[Tensor, ...] = self.kept.grad_fn.saved_tensors
        self.kept = None
        return tensors


@dataclass(frozen=True)
class Tracked:
    """A module whose uses are noted.

    Attributes:
        path: its name in the model.
        module: the module.
        parameters: the parameters whose gradients it answers for.
        keep_output: whether a use holds the output too.
    """

    path: str
    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    keep_output: bool = False


def by_record(use: Use, tensors: tuple[Tensor, ...], gradient: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Tensors and gradient of a use with the records first, where they came as ``[B T, d]``."""
    if use.flattened is None or gradient.dim() != 2 or gradient.shape[0] != use.flattened[0] * use.flattened[1]:
        return tensors, gradient

    def split(tensor: Tensor) -> Tensor:
        assert use.flattened is not None
        whole = tensor.dim() > 0 and tensor.shape[0] == gradient.shape[0]
        return tensor.reshape(*use.flattened, *tensor.shape[1:]) if whole else tensor

    return tuple(split(t) for t in tensors), split(gradient)
