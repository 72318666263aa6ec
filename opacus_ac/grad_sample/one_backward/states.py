"""States that a module keeps as plain attributes and replaces in its forward pass, as recurrent layers do.

A second run of the module must begin with the states of the first run. So they are arguments of the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Place = tuple[str, str]
"""Name of a part of a module, and of one of its attributes."""


@dataclass(frozen=True)
class States:
    """The attributes that one call of a module has replaced.

    Attributes:
        tensors: those that were tensors before the call, in the order in which these are kept with its arguments.
        empty: those that were None.
        absent: those that were not there.
    """

    tensors: tuple[Place, ...] = ()
    empty: tuple[Place, ...] = ()
    absent: tuple[Place, ...] = ()


NO_STATES = States()


def attributes(module: nn.Module) -> dict[Place, Any]:
    """Return the plain attributes of a module and its parts that are tensors, or None."""
    return {
        (path, name): value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if value is None or isinstance(value, Tensor)
    }


def replaced(module: nn.Module, before: Mapping[Place, Any]) -> tuple[States, list[Tensor]]:
    """Return which attributes are another tensor than before a call, and the tensors that they were."""
    after = {place: value for place, value in attributes(module).items() if isinstance(value, Tensor)}
    changed = [place for place, value in after.items() if before.get(place) is not value]
    tensors = tuple(place for place in changed if before.get(place) is not None)
    empty = tuple(place for place in changed if place in before and before[place] is None)
    absent = tuple(place for place in changed if place not in before)
    return States(tensors, empty, absent), [before[place] for place in tensors]


class StatesOfTwin:
    """Gives a twin of a module the states of before a call, each time before it runs.

    Args:
        twin: the twin.
        states: what the call has replaced.
    """

    def __init__(self, twin: nn.Module, states: States) -> None:
        self._parts = {} if states == NO_STATES else dict(twin.named_modules())
        self._states = states

    def restore(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Set the states, which are the last of the tensors, and return the others."""
        first = len(tensors) - len(self._states.tensors)
        for (path, name), value in zip(self._states.tensors, tensors[first:], strict=True):
            vars(self._parts[path])[name] = value
        for path, name in self._states.empty:
            vars(self._parts[path])[name] = None
        for path, name in self._states.absent:
            vars(self._parts[path]).pop(name, None)
        return tensors[:first]
