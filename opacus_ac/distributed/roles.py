"""Which reducer a model needs, and what is refused before the first step because its sum or its noise would be wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.validators.module_validator import ModuleValidator
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from opacus_ac.distributed.reducers import ALONE, LOCAL, Reducer, ReplicatedReducer
from opacus_ac.distributed.sharded import ShardedReducer, check_meshes
from opacus_ac.distributed.world import Group, initialized
from opacus_ac.grad_sample.replay import written_type
from opacus_ac.grad_sample.shards import is_sharded
from opacus_ac.key_stream import SEED
from opacus_ac.randomness import RandomStream, SeededStream, SharedStream

ROLES = ("local", "ddp", "fsdp2")
_WRAPPERS = (DifferentiallyPrivateDistributedDataParallel, DistributedDataParallel, DataParallel)
_HOOKS = "Opacus's hooks keep per-sample gradients on parameters that are replaced or reduced: use 'bk'"
_ONE_PROCESS: dict[tuple[str, Any], str] = {
    ("grad_sample_mode", "hooks"): _HOOKS,
    ("grad_sample_mode", "functorch"): _HOOKS,
    ("sampling", "shuffled"): (
        "every process would shuffle for itself, and a record could be on two of them: use poisson_sampling=True, or "
        "sampling='fixed_size'"
    ),
    ("fused_step", True): "gradients are exchanged in buckets: use fused_step=False",
    ("clip_policy", "raw_percentile"): "it reads the norms of one process only: use 'percentile'",
    ("max_rows_per_user", True): "users have not been divided among processes: use one, or rows as records",
    ("noise_allocation", True): "weights per parameter have no place in the shared buckets: use noise_allocation=None",
}
"""Settings of ``make_private`` that hold on one process only, and why."""

_WHOLE_MODEL: dict[tuple[str, Any], str] = {
    ("clipping", "zo"): (
        "each rank would move its shard along a direction of its own. Leave fully_shard out: forward passes need "
        "no gradients and no optimizer state, and every rank has the whole model"
    ),
}
"""Settings of ``make_private`` that several processes have with the whole model on each of them only, and why."""

_LAUNCHED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables in which launchers (torchrun, accelerate, mpirun, srun) say how many processes they started."""

_NOISE = 1000  # first of the purposes for which seeded noise streams of the ranks are forked


def check_wrappers(module: nn.Module) -> None:
    """Raise ``ValueError`` for a model inside of a wrapper of ``torch`` or Opacus that reduces gradients itself."""
    for inner in module.modules():
        if isinstance(inner, _WRAPPERS):
            raise ValueError(
                f"the model is wrapped in {type(inner).__name__}, whose own reduction finds no gradient to reduce, and whose "
                "forward pass waits for ranks that have fewer batches: pass the bare model (its attribute module). "
                "make_private gives every rank the weights of rank 0 and reduces the clipped sums itself"
            )
        if isinstance(inner, FullyShardedDataParallel):
            raise ValueError(
                "the model is wrapped in FullyShardedDataParallel, which flattens parameters away from their layers: use "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def choose_reducer(role: str | Reducer | None, module: nn.Module, parameters: Sequence[nn.Parameter]) -> Reducer:
    """Return the reducer for the model as it is: sharded, a replica, or alone.

    Args:
        role: "local", "ddp" or "fsdp2", or a reducer; None for what the model and the processes say.
        module: the model.
        parameters: its trained parameters.

    Raises:
        ValueError: the role does not fit, or the model is spread over the processes in a way that is not covered.
    """
    sharded = [is_sharded(p) for p in parameters]
    frozen = next((name for name, p in module.named_parameters() if is_sharded(p)), None)
    if frozen is not None and not any(sharded):
        raise ValueError(
            f"{frozen} is sharded and frozen, while nothing that is trained is sharded, so nobody would reduce the gradients: "
            "call fully_shard on the whole model, without ignored_params, or not at all"
        )
    if role is not None and not isinstance(role, str):
        return role
    if role not in (None, *ROLES):
        raise ValueError(f"reducer={role!r} is not available: choose one of {', '.join(map(repr, ROLES))}, or None")
    if any(sharded):
        if role not in (None, "fsdp2"):
            raise ValueError(f"reducer={role!r} with parameters that fully_shard has sharded: leave it out")
        check_meshes(module, parameters)
        _check_sharded_types(module)
        return ShardedReducer(parameters)
    if role == "fsdp2":
        raise ValueError("reducer='fsdp2' needs a model that torch.distributed.fsdp.fully_shard was applied to")
    if role == "ddp" and not initialized():
        raise ValueError("reducer='ddp' needs several processes: start them with torchrun, and call init_process_group")
    if role == "local":
        return LOCAL
    if not initialized():
        check_joined()
        return ALONE
    return ReplicatedReducer(parameters, Group(parameters[0].device))


def check_joined() -> None:
    """Raise ``ValueError`` where a launcher started several processes that ``init_process_group`` has not joined.

    Each would train for itself on the same records, and report what it spent alone.
    """
    for name in _LAUNCHED:
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise ValueError(
                f"{name}={count}: this is one of several processes, and torch.distributed has not joined them, so each would spend a budget of "
                "its own on the same records. Call torch.distributed.init_process_group before make_private; or pass reducer='local' where "
                "the processes are runs of their own on different people's data"
            )


def _check_sharded_types(module: nn.Module) -> None:
    """Refuse what Opacus's own check would refuse, had ``fully_shard`` not put a class under the module's."""
    for name, inner in module.named_modules():
        cls = written_type(inner)
        if cls is type(inner) or cls not in ModuleValidator.VALIDATORS:
            continue
        errors = ModuleValidator.VALIDATORS[cls](inner)
        if errors:
            raise ValueError(f"{name or 'the model'} ({cls.__name__}) cannot be made private: {errors[0]}")


def check_options(reducer: Reducer, options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for settings of ``make_private`` that hold on one process only.

    Args:
        reducer: the processes.
        options: settings by name, those of ``_ONE_PROCESS`` among them.
    """
    if reducer.name == "local":
        return
    for (name, value), reason in _ONE_PROCESS.items():
        if options.get(name) == value:
            raise ValueError(f"{name}={value!r} does not work with several processes ({reducer.name}): {reason}")
    for (name, value), reason in _WHOLE_MODEL.items():
        if options.get(name) == value and reducer.name != "ddp":
            raise ValueError(f"{name}={value!r} does not work with a sharded model ({reducer.name}): {reason}")


def rank_streams(reducer: Reducer, noise: RandomStream, sampling: RandomStream) -> tuple[RandomStream, RandomStream]:
    """Return the streams of this rank: noise of its own, and draws that all ranks share.

    Guarantees:
        The key of the draws comes from the operating system of rank 0 and is sent to the others; it is never saved. Noise
        streams have a key per rank. Seeded streams (for tests) share the seed for the draws; their noise differs by rank.
    """
    if reducer.world == 1:
        return noise, sampling
    if isinstance(noise, SeededStream):
        return noise.fork(_NOISE + reducer.rank), sampling
    return noise, SharedStream(reducer.on_first(lambda: os.urandom(SEED)))


def check_alike(reducer: Reducer, settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError``, on every rank, when the ranks were set up differently.

    Args:
        reducer: the processes.
        settings: plain values that have to be the same everywhere.
    """
    rows = reducer.gather_objects({name: repr(value) for name, value in settings.items()})
    for name in sorted(set().union(*rows)):
        values = [row.get(name) for row in rows]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"the ranks differ in {name}: rank 0 has {values[0]}, rank {other} {values[other]}. Start every rank with "
                "the same arguments, model and dataset"
            )


def check_noise(reducer: Reducer, stream: RandomStream) -> None:
    """Raise ``ValueError``, on every rank, when two ranks have the same noise: their shares could be subtracted.

    It draws two values that are used for nothing else.
    """
    if reducer.world == 1:
        return
    rows = reducer.gather(stream.normal(2).numpy().view(np.int64))
    seen: dict[tuple[int, ...], int] = {}
    for rank, row in enumerate(map(tuple, rows.tolist())):
        if row in seen:
            raise ValueError(
                f"ranks {seen[row]} and {rank} draw the same noise, which could be taken out of the sums: let "
                "make_private make the streams, without a stream of your own"
            )
        seen[row] = rank


def parameter_layout(parameters: Sequence[nn.Parameter], names: Sequence[str]) -> dict[str, str]:
    """Return name, shape and type of each trained parameter, which all ranks must have in one order."""
    numbered = enumerate(zip(names, parameters, strict=True))
    return {f"trained parameter {i}": f"{name} {tuple(p.shape)} {p.dtype}" for i, (name, p) in numbered}
