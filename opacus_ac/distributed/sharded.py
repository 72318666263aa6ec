"""The reducer for models under ``fully_shard``: FSDP2, and hybrid sharding (HSDP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from opacus_ac.distributed.group import Group
from opacus_ac.distributed.reducers import BUCKET, GroupReducer, Noise, Source, buckets, sum_with_noise
from opacus_ac.grad_sample.module_replay import written_type
from opacus_ac.grad_sample.sharded_parameters import is_sharded

_WITHIN_MODEL = {"tp", "cp", "pp", "ep", "sp", "tensor", "context", "pipeline", "expert", "sequence"}
"""Names of mesh dimensions along which ranks share the records instead of having their own."""


def check_meshes(module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Raise ``ValueError`` unless the trained parameters are sharded over all processes as FSDP2 or HSDP does it."""
    names = {id(p): name for name, p in module.named_parameters()}
    meshes: list[Any] = []
    for parameter in parameters:
        name = names.get(id(parameter), "a parameter")
        if not isinstance(parameter, DTensor):
            raise ValueError(
                f"{name} is trained but not sharded, while other parameters are, so nobody would reduce its gradient: "
                "call fully_shard on the whole model, without ignored_params, before the optimizer is built"
            )
        if not any(parameter.device_mesh == mesh for mesh in meshes):
            meshes.append(parameter.device_mesh)
        _check_placements(name, parameter)
    outside = {id(p) for p in module.parameters()} - managed(module)
    if any(id(p) in outside for p in parameters):
        name = next(names[id(p)] for p in parameters if id(p) in outside)
        raise ValueError(
            f"{name} is a DTensor that fully_shard does not manage: tensor parallelism, and ignored_params, are not "
            "available. Call fully_shard on the whole model"
        )
    if len(meshes) > 1:
        raise ValueError("parameters are sharded over different device meshes: use one mesh for all fully_shard calls")
    _check_mesh(meshes[0])


def managed(module: nn.Module) -> set[int]:
    """Return the ``id`` of every parameter that ``fully_shard`` gathers and reduces."""
    found: set[int] = set()
    for inner in module.modules():
        if written_type(inner) is type(inner):
            continue
        state: Any = inner._get_fsdp_state()  # type: ignore[operator]
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        found.update(id(p.sharded_param) for group in groups if group is not None for p in group.fsdp_params)
    return found


def _check_placements(name: str, parameter: DTensor) -> None:
    kinds = tuple(type(placement) for placement in parameter.placements)
    if kinds not in ((Shard,), (Replicate, Shard)) or parameter.placements[-1] != Shard(0):
        raise ValueError(
            f"{name} is placed as {parameter.placements}, which is no FSDP2 or HSDP sharding along the first "
            "dimension: tensor and context parallelism, and other shard placements, are not available; shard by "
            "fully_shard alone"
        )
    if parameter.to_local().device.type != parameter.device_mesh.device_type:
        raise ValueError(f"{name} is offloaded to the CPU, which is not available: leave out offload_policy")


def _check_mesh(mesh: Any) -> None:
    names = mesh.mesh_dim_names or ()
    within = [name for name in names if _WITHIN_MODEL & set(str(name).lower().split("_"))]
    if within:
        raise ValueError(
            f"the device mesh has a dimension {within[0]!r}: with tensor, context or pipeline parallelism ranks share "
            "records, and a record would be clipped in pieces. Use a mesh of data-parallel dimensions only"
        )
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"the model is sharded over {mesh.size()} of {dist.get_world_size()} processes: all have to take part in "
            "the same step. Use a mesh over all of them, or start fewer"
        )
    if any(mesh.get_local_rank(i) != dist.get_rank(mesh.get_group(i)) for i in range(mesh.ndim)):
        raise ValueError("the device mesh has its ranks in another order than its process groups: use init_device_mesh")


class _Shards:
    """A bucket of parameters: how their sums lie in what the ranks exchange.

    Of every parameter, each rank gets a stretch of ``ceil(rows / world)`` rows. The last ranks may have fewer, or none.
    """

    def __init__(self, parameters: list[nn.Parameter], world: int) -> None:
        self.parameters, self.world = parameters, world
        self.firsts: list[int] = []
        self.parts: list[int] = []
        self.size = 0  # values of a rank, padding included
        for parameter in parameters:
            rows = -(-parameter.shape[0] // world)
            part = rows * (parameter.numel() // max(parameter.shape[0], 1))
            self.firsts.append(self.size)
            self.parts.append(part)
            self.size += part

    def memory(self) -> Tensor:
        """Return zeros for the sums of all ranks, ``[world, size]``."""
        first = self.parameters[0]
        return torch.zeros(self.world, self.size, dtype=first.dtype, device=first.device)

    def put(self, memory: Tensor, number: int, total: Tensor) -> None:
        """Write a whole sum to where its stretches belong."""
        first, part = self.firsts[number], self.parts[number]
        flat = total.reshape(-1).to(memory.dtype)
        for rank in range(self.world):
            stretch = flat[rank * part : (rank + 1) * part]
            memory[rank, first : first + stretch.numel()] = stretch

    def gradient(self, mine: Tensor, number: int) -> Tensor:
        """Return the gradient of a parameter from the sums of this rank ``[size]``: a view, as a DTensor."""
        parameter: Any = self.parameters[number]
        local = parameter.to_local()
        values = mine[self.firsts[number] : self.firsts[number] + local.numel()].view(local.shape)
        gradient: Tensor = DTensor.from_local(
            values,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return gradient


class ShardedReducer(GroupReducer):
    """Every rank has a shard of each parameter, and the whole only while it is needed.

    Args:
        parameters: the trained parameters, sharded over one mesh.
        bucket: values that are exchanged at a time, at least.

    Guarantees:
        Whole sums of clipped gradients are reduced as each physical batch ends, and no rank keeps more than its shard.
        The rank that holds a shard adds its noise, after all records were added. With replicas (HSDP), each of them
        adds the noise of a stretch of the shard and sends that on, so that they agree to the last bit.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], bucket: int = BUCKET) -> None:
        first = parameters[0]
        assert isinstance(first, DTensor)
        mesh = first.device_mesh
        device = first.to_local().device
        super().__init__(Group(device))
        self._shard = Group(device, mesh.get_group(mesh.ndim - 1))
        self._replicas = Group(device, mesh.get_group(0)) if mesh.ndim > 1 else None
        self.name = "fsdp2" if self._replicas is None else "hsdp"
        self._buckets = [_Shards(held, self._shard.world) for held in buckets(parameters, bucket)]
        self._sums: list[Tensor | None] = [None] * len(self._buckets)
        self._units: list[Any] = []

    def sync_module(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0.

        Where shards have replicas, all replicas get the values of the first one.
        """
        self._units = [m for m in module.modules() if written_type(m) is not type(m)]
        for tensor in (*module.parameters(), *module.buffers()):
            if not is_sharded(tensor):
                self.group.broadcast(tensor)
            elif self._replicas is not None:
                self._replicas.broadcast(tensor.to_local())  # type: ignore[attr-defined]

    def settle(self, source: Source) -> None:
        """Reduce the sums of a physical batch, so that only the shard of this rank has to be kept."""
        sums = iter(source.sums())
        for number, shards in enumerate(self._buckets):
            memory = shards.memory()
            for position in range(len(shards.parameters)):
                total = next(sums)
                if total is not None:
                    shards.put(memory, position, total)
            mine = self._shard.reduce_scatter(memory.view(-1))
            before = self._sums[number]
            self._sums[number] = mine if before is None else before.add_(mine)
        next(sums, None)  # the source learns that all were taken

    def release(self, source: Source, noise: Noise) -> None:
        """Write the noised sums of this rank's shards into the gradients."""
        self.settle(source)
        for number, shards in enumerate(self._buckets):
            mine, self._sums[number] = self._sums[number], None
            assert mine is not None
            if self._replicas is None:
                noise.in_place([mine])  # that of the padding is thrown away
            else:
                sum_with_noise(mine, self._replicas, noise)
            for position, parameter in enumerate(shards.parameters):
                parameter.grad = shards.gradient(mine, position)

    def clear(self) -> None:
        """Forget the sums of the logical batch."""
        self._sums = [None] * len(self._buckets)

    def refresh(self) -> None:
        """Drop what is gathered: after a forward pass alone the outermost unit still has the whole old weights."""
        for unit in self._units:
            unit.reshard()
