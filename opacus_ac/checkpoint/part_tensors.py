"""States of the parts of a step in a folder: tensors by the names of the parameters, all else as plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.optimizer.state import private_state

Entries = Mapping[str, Any]
"""What a folder says of its tensors, by their names in it."""


@dataclass(frozen=True)
class PartTensors:
    """Takes tensors of single parameters out of the states of parts, and puts them in again.

    Attributes:
        optimizer: the private optimizer, whose parts they are.
        names: names of its trained parameters.
        parameters: these parameters.
    """

    optimizer: AdaptiveClipDPOptimizer
    names: Sequence[str]
    parameters: Sequence[nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module, optimizer: AdaptiveClipDPOptimizer) -> PartTensors:
        """Return those of an optimizer over parameters of ``model``.

        Raises:
            ValueError: If the optimizer trains parameters that are not in the model.
        """
        for module in model.modules():  # a pass without gradients leaves the outermost one whole, in other parameters
            if isinstance(module, FSDPModule):
                module.reshard()
        names = {parameter: name for name, parameter in model.named_parameters()}
        moved = optimizer.measurement.moved
        if not all(parameter in names for parameter in moved):
            raise ValueError(
                "the optimizer trains parameters that are not in this model: pass model and optimizer of one "
                "make_private"
            )
        return cls(optimizer, [names[parameter] for parameter in moved], moved)

    def plain(self) -> dict[str, Any]:
        """Return the state of all parts as plain values: in place of each tensor of a parameter whether there is one.

        What is of one process alone is empty.
        """
        state = private_state(self.optimizer)
        for name, part in self.optimizer.parts.items():
            if part is not None:
                state[name] = {
                    **state[name],
                    **{key: {} for key in part.of_one_process},
                    **{key: _present(state[name][key]) for key in part.by_parameter},
                }
        return state

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that :meth:`plain` leaves out, sharded where the parameters are."""
        found: dict[str, Tensor] = {}
        for name, part in self.optimizer.parts.items():
            state = {} if part is None or not part.by_parameter else part.state_dict()
            for key in () if part is None else part.by_parameter:
                for label, parameter, tensor in zip(self.names, self.parameters, state[key] or self._none, strict=True):
                    if tensor is not None:
                        found[f"parts.{name}.{key}.{label}"] = _like(tensor, parameter)
        return found

    @property
    def _none(self) -> list[None]:
        return [None] * len(self.names)

    def whole(
        self, plain: Mapping[str, Any], entries: Entries, version: int, read: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Return what :meth:`plain` described, with its tensors read into new memory.

        Args:
            plain: the plain values.
            entries: the tensors of the folder.
            version: version of the folder.
            read: fills tensors from the folder.

        Raises:
            ValueError: If a tensor is missing, or is of a parameter of another shape.
        """
        wanted: dict[str, Any] = {}
        state = dict(plain)
        for name, part in self.optimizer.parts.items():
            if part is None or state.get(name) is None:
                continue
            lists = {key: self._empty(name, key, state[name].get(key), entries, version) for key in part.by_parameter}
            wanted |= {place: tensor for found in lists.values() for place, tensor in found or () if tensor is not None}
            state[name] = {**state[name], **{key: _local_list(found) for key, found in lists.items()}}
        if wanted:
            read(wanted)
        return state

    def _empty(
        self, part: str, key: str, present: Sequence[bool] | None, entries: Entries, version: int
    ) -> list[tuple[str, Tensor | None]] | None:
        """Return the name in the folder, and memory, of one tensor for each parameter; None where there are none."""
        if present is None:
            return None
        found: list[tuple[str, Tensor | None]] = []
        for label, parameter, there in zip(self.names, self.parameters, present, strict=True):
            place = stored_name(part, key, label, version)
            found.append((place, _room(entries, place, parameter) if there else None))
        return found


def stored_name(part: str, key: str, parameter: str, version: int) -> str:
    """Return the name that a tensor of a parameter has in a folder of a version."""
    if version > 1:
        return f"parts.{part}.{key}.{parameter}"
    return f"ema.{parameter}" if part == "ema" else f"{part}.{key}.{parameter}"


def upgraded(saved: dict[str, Any], entries: Entries, names: Sequence[str]) -> dict[str, Any]:
    """Return the text of a folder of version 1 as version 2 has it.

    Args:
        saved: the text, which is changed.
        entries: the tensors of the folder.
        names: names of the trained parameters of this run.
    """
    step = saved["step"]
    saved["trained"] = list(names)
    if step["ema"] is not None:
        averaged = {name.removeprefix("ema.") for name in entries if name.startswith("ema.")}
        saved["trained"] = list(names) if averaged == set(names) else sorted(averaged)
        step["ema"] = {"updates": step["ema"], "average": [True] * len(averaged)}
    course = step.get("zeroth_order")
    if course is not None:
        saved["trained"] = course.pop("trained")
        for key in ("indices", "anchor"):
            course[key] = [f"zeroth_order.{key}.{name}" in entries for name in saved["trained"]]
        course["anchor"] = course["anchor"] if any(course["anchor"]) else None
    return saved


def _present(tensors: Sequence[Tensor | None] | None) -> list[bool] | None:
    return None if tensors is None else [tensor is not None for tensor in tensors]


def _room(entries: Entries, place: str, parameter: Any) -> Tensor:
    """Return memory for a tensor of the folder, sharded as its parameter is."""
    entry = entries.get(place)
    if not isinstance(entry, TensorStorageMetadata):
        raise ValueError(f"the checkpoint is damaged: it has no tensor {place}")
    dtype = entry.properties.dtype
    if not isinstance(parameter, DTensor):
        return torch.empty(tuple(entry.size), dtype=dtype)
    if tuple(entry.size) != tuple(parameter.shape):
        raise ValueError(f"the checkpoint is of another model: {place} has another shape than its parameter")
    return _like(torch.empty_like(parameter.to_local(), dtype=dtype), parameter)


def _like(local: Tensor, parameter: Any) -> Tensor:
    """Return the part that this rank has of something of a parameter's shape, as the parameter is: sharded or not."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    whole: Tensor = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return whole


def _local_list(found: Sequence[tuple[str, Tensor | None]] | None) -> list[Tensor | None] | None:
    """Return the tensors, of sharded ones what this rank holds, in the memory that is read into."""
    return None if found is None else [t.to_local() if isinstance(t, DTensor) else t for _, t in found]
