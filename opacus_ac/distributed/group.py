"""The processes of a run, and the few exchanges that they have, with an error that says what is wrong."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from opacus_ac.errors import DistributedError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
T = TypeVar("T")


def initialized() -> bool:
    """Whether this process is one of several."""
    return bool(dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def _exchange(what: str, work: Callable[[], T]) -> T:
    """Run a collective; an error of the transport becomes one that says what it means."""
    try:
        return work()
    except RuntimeError as error:
        raise DistributedError(
            f"rank {dist.get_rank()} could not exchange {what} with the others: another rank stopped, failed, or is in "
            f"another step. Nothing of this step was applied here; what was charged for it stays charged. Look for the "
            f"first error of the other ranks, and start again from the last checkpoint ({error})"
        ) from error


class Group:
    """A process group with the exchanges of the private step.

    Args:
        group: a process group of ``torch.distributed``; None for all processes.
        device: device of what is exchanged.
    """

    def __init__(self, device: torch.device, group: Any = None) -> None:
        self.device, self._group = device, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def reduce_scatter(self, values: Tensor) -> Tensor:
        """Sum ``values`` ``[world * n]`` over the ranks and return the stretch ``[n]`` of this rank."""
        mine = values.new_empty(values.numel() // self.world)
        collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        _exchange("sums of gradients", lambda: collective(mine, values, group=self._group))
        return mine

    def all_gather(self, mine: Tensor, out: Tensor) -> None:
        """Write what every rank has, ``[n]``, into ``out`` ``[world * n]``."""
        collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        _exchange("gradients", lambda: collective(out, mine, group=self._group))

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite ``tensor``, of any layout, by that of the first rank."""
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        target = tensor.detach()
        flat = target.contiguous()
        _exchange("parameters", lambda: dist.broadcast(flat, source, group=self._group))
        if flat.data_ptr() != target.data_ptr():
            target.copy_(flat)

    def gather(self, row: Ints) -> Ints:
        """Return the rows ``[n]`` of all ranks, ``[world, n]``, on every rank."""
        mine = torch.from_numpy(row).to(self.device)
        rows = mine.new_empty(self.world * mine.numel())
        collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        _exchange("the counts of a step", lambda: collective(rows, mine, group=self._group))
        return np.asarray(rows.view(self.world, -1).cpu().numpy())

    def agree(self, values: Floats) -> Floats:
        """Return the values ``[n]`` of the first rank, to the last bit."""
        tensor = torch.from_numpy(np.array(values, dtype=np.float64)).to(self.device)
        _exchange("the release of a step", lambda: dist.broadcast(tensor, 0, group=self._group))
        return np.asarray(tensor.cpu().numpy())

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the plain values of all ranks, on every rank."""
        values: list[Any] = [None] * self.world
        _exchange("their settings", lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the first rank and return its result, or raise its error, on all of them."""
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [(True, work())]
            except Exception as error:
                outcome = [(False, _sendable(error))]
        _exchange(
            "the outcome of the first rank",
            lambda: dist.broadcast_object_list(outcome, 0, group=self._group, device=self.device),
        )
        succeeded, value = outcome[0]
        if not succeeded:
            raise value
        result: T = value
        return result


def _sendable(error: Exception) -> Exception:
    """Return the error, or its text where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
