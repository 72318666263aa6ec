"""One use of a module in a training forward pass: its arguments, and the tensors kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from opacus_ac.grad_sample.folded_rows import Fold
from opacus_ac.grad_sample.late_checks import LateChecks
from opacus_ac.grad_sample.one_backward.experts import Product
from opacus_ac.grad_sample.one_backward.states import NO_STATES, States


@dataclass
class Call:
    """The arguments of one call of a module without their tensors."""

    leaves: list[Any]
    places: list[int]
    spec: TreeSpec | None
    """Structure of the arguments; None for a single positional tensor."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, list[Tensor]]:
        """Return the arguments without their tensors, and the tensors."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return _ONE_TENSOR, [args[0]]
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in places]
        for i in places:
            leaves[i] = None
        return cls(leaves, places, spec), tensors

    def arguments(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with these tensors."""
        if self.spec is None:
            return tuple(tensors), {}
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs

    def without(self, unwanted: Callable[[Any], bool]) -> Call:
        """Return the same with None in the place of some of the rest."""
        return Call([None if unwanted(leaf) else leaf for leaf in self.leaves], self.places, self.spec)


_ONE_TENSOR = Call([], [], None)


def autocast_of(device: str) -> AbstractContextManager[Any]:
    """Return a context with the present autocast settings, for a second run."""
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.autocast(device, dtype=torch.get_autocast_dtype(device))
    return nullcontext()


@dataclass(slots=True)
class Use:
    """One call of a module in a training forward pass, until the gradient at its output arrives."""

    path: str
    """Name of the module in the model."""
    module: nn.Module
    call: Call
    kept: Any
    """Output of the graph node that holds the tensors of the call, and as the last one its output, if requested.

    Holding the node is not enough: before torch 2.13 a node forgets its tensors when its output is deleted.
    """
    autocast: AbstractContextManager[Any]
    """A context with the autocast settings of the call, for a second run."""
    model_pass: int
    """Number of the forward pass of the model."""
    flattened: tuple[int, int] | None = None
    """``(B, T)`` if the module may have been called with ``[B T, d]`` instead of ``[B, T, d]``."""
    folded: Fold | None = None
    """B and K if the module may have been called with K rows of each record, ``[B K, ...]``."""
    product: Product | None = None
    """The product that this use is, without its tensors, if the module holds experts."""
    gradients: tuple[Tensor | None, ...] | None = None
    """Gradients at all floating-point outputs, if the module returns several. An output without gradient has None."""
    is_shared: bool = False
    """Whether the use is for all records at once, so that the gradient at its output is that of B copies."""
    parameter: nn.Parameter | None = None
    """The parameter that this use is, if it is used outside of its module."""
    bare: frozenset[int] = frozenset()
    """Places of the tensors that are shared by all records, and whose part for a record has no batch dimension."""
    second: frozenset[int] = frozenset()
    """Places of the tensors that came with the records in their second dimension."""
    states: States = NO_STATES
    """The attributes that the call has replaced. Those that were tensors are kept after its arguments."""
    is_split: bool = False
    """Whether the tensors came as ``[B T, d]`` and were reshaped to ``[B, T, d]``."""
    late: LateChecks = field(default_factory=LateChecks)
    """Takes the checks of the rule whose outcomes need not be known at once."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the kept tensors, which are recomputed if the forward pass was checkpointed. Works once only."""
        tensors: tuple[Tensor, ...] = self.kept.grad_fn.saved_tensors
        self.kept = None
        return tensors


@dataclass(frozen=True)
class Tracked:
    """A module whose uses are watched.

    Attributes:
        path: its name in the model.
        module: the module.
        parameters: the parameters whose gradients are computed from its uses.
        keep_output: whether a use keeps the output, too.
        is_experts: whether it holds experts. Each of their products is a use.
        is_time_first: whether it gets and returns ``[T, B, d]``, by the source of the layer around it.
    """

    path: str
    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    keep_output: bool = False
    is_experts: bool = False
    is_time_first: bool = False


def in_the_second_dimension(tracked: Tracked, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> frozenset[int]:
    """Return which tensors of a call have the records second, ``[T, B, d]``.

    Of torch's attention and recurrent layers without ``batch_first``, these are the sequences. Of recurrent layers, the
    hidden states ``[layers, B, d]`` always.
    """
    module, tensors = tracked.module, [*inputs, *outputs]
    if tracked.is_time_first:
        return frozenset(i for i, t in enumerate(tensors) if t.dim() == 3)
    if not isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return frozenset()
    recurrent, first = isinstance(module, nn.RNNBase), bool(module.batch_first)
    sequences, states = (1, 2) if recurrent else (3, 0)
    found = {i for i in range(sequences) if not first} | set(range(sequences, sequences + states))
    found = {i for i in found if i < len(inputs)}
    found |= {len(inputs) + i for i in range(len(outputs)) if (i > 0 and recurrent) or (i == 0 and not first)}
    return frozenset(i for i in found if tensors[i].dim() == 3)


Tensors = TypeVar("Tensors", Tensor, "Tensor | None")


def records_first(tensors: Iterable[Tensors], second: Container[int]) -> tuple[Tensors, ...]:
    """Return tensors with the records first, from those of which some have them second."""
    return tuple(t if t is None or i not in second else t.transpose(0, 1) for i, t in enumerate(tensors))


def by_record(use: Use, tensors: tuple[Tensor, ...], gradient: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return tensors and gradient of a use as ``[B, T, d]``, if they came as ``[B T, d]``."""
    if use.flattened is None or use.product is not None:
        return tensors, gradient
    if gradient.dim() != 2 or gradient.shape[0] != use.flattened[0] * use.flattened[1]:
        return tensors, gradient
    use.is_split = True

    def split(tensor: Tensor) -> Tensor:
        assert use.flattened is not None
        whole = tensor.dim() > 0 and tensor.shape[0] == gradient.shape[0]
        return tensor.reshape(*use.flattened, *tensor.shape[1:]) if whole else tensor

    if use.gradients is not None:
        use.gradients = tuple(None if g is None else split(g) for g in use.gradients)
    return tuple(split(t) for t in tensors), split(gradient)


def records_in(use: Use, gradient: Tensor) -> int:
    """Return the number of records of a use; 0 where the gradient at its output has no dimension for them.

    Raises:
        ValueError: If rows are handed to experts, or to a layer inside of windows, of which nothing tells which record
            they belong to.
    """
    rows, folded = _rows_in(use, gradient), use.folded
    if folded is None or (use.is_shared and folded.windows):
        return rows
    if folded.windows and rows != folded.records * folded.rows and folded.records > 1:
        raise ValueError(
            f"{use.path or 'the model'} ({type(use.module).__name__}) has an output of {rows} rows inside of a layer "
            f"with {folded.rows} windows of each of {folded.records} records, so it is not clear which record they "
            "belong to. Call it with a row for each window, or freeze it"
        )
    return folded.records if rows == folded.records * folded.rows else rows


def _rows_in(use: Use, gradient: Tensor) -> int:
    if use.product is None:
        return gradient.shape[0] if gradient.dim() > 1 else 0
    if use.flattened is None or use.flattened[0] * use.flattened[1] != use.product.rows:
        raise ValueError(
            f"{use.path or 'the model'} ({type(use.module).__name__}) holds experts and is handed {use.product.rows} "
            "rows, and nothing tells which record they belong to. Call it from a module that takes [B, T, d], or "
            "freeze it"
        )
    return use.flattened[0]
