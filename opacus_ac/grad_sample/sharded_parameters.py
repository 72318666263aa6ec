"""Parameters under ``fully_shard``: while a module runs, it holds other objects than the optimizer.

Outside of a forward and backward pass, a module holds shards of its parameters (DTensors), as the optimizer does.
During a pass, torch replaces them by whole parameters, which are other objects. Both have the same place: module and
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from opacus_ac.grad_sample.module_replay import written_type


class _Watched(Protocol):
    @property
    def module(self) -> nn.Module: ...

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]: ...


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a rank holds only a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def places_of(model: nn.Module, index: Mapping[int, int]) -> Callable[[nn.Parameter, nn.Module], int | None]:
    """Return a function that finds a parameter by its place. For a model without shards it always returns None.

    Args:
        model: the model, with the parameters that the optimizer has.
        index: number of each of these parameters, by ``id``.
    """
    places: dict[tuple[int, str], int] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_sharded(parameter) and id(parameter) in index:
                places[id(module), name] = index[id(parameter)]

    def find(parameter: nn.Parameter, module: nn.Module) -> int | None:
        if not places:
            return None
        for inner in module.modules():
            for name, held in inner._parameters.items():
                if held is parameter:
                    return places.get((id(inner), name))
        return None

    return find


class ShardedParameters:
    """Finds the current parameters of watched modules, and gathers them when they are needed.

    Args:
        model: the model.
        watched: its watched modules, with the parameters that the optimizer has.
    """

    def __init__(self, model: nn.Module, watched: Iterable[_Watched]) -> None:
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for item in watched:
            own = {id(p) for p in item.parameters if is_sharded(p)}
            if own:
                self._places[id(item.module)] = [
                    (inner, name)
                    for inner in item.module.modules()
                    for name, parameter in inner._parameters.items()
                    if id(parameter) in own
                ]
        self._units = _units(model) if self._places else {}

    @property
    def any(self) -> bool:
        """Whether a watched module has a sharded parameter."""
        return bool(self._places)

    def now(self, item: _Watched) -> Iterable[nn.Parameter]:
        """Return the parameters that a watched module holds at this moment."""
        places = self._places.get(id(item.module))
        if places is None:
            return item.parameters
        held = (module._parameters.get(name) for module, name in places)
        return [parameter for parameter in held if parameter is not None]

    def gather(self, module: nn.Module) -> None:
        """Gather the parameters of a watched module, if torch has not done so yet in its backward pass.

        For a module that is sharded by itself, the gradient at its output arrives here before torch gathers.
        """
        if any(
            is_sharded(p)
            for inner, name in self._places.get(id(module), ())
            if (p := inner._parameters[name]) is not None
        ):
            self._units[id(module)].unshard()


def _units(model: nn.Module) -> dict[int, Any]:
    """Return for each module the innermost sharded module that contains it, which may be itself."""
    units: dict[int, Any] = {}

    def walk(module: nn.Module, unit: Any) -> None:
        unit = module if written_type(module) is not type(module) else unit
        units.setdefault(id(module), unit)
        for child in module.children():
            walk(child, unit)

    walk(model, None)
    return units
