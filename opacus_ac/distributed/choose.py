"""Which reducer a model needs, and what is refused before the first step because its sum or noise would be wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence

from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.validators.module_validator import ModuleValidator
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from opacus_ac.distributed.group import Group, initialized
from opacus_ac.distributed.reducers import ALONE, LOCAL, Reducer, ReplicatedReducer
from opacus_ac.distributed.sharded import ShardedReducer, check_meshes
from opacus_ac.grad_sample.module_replay import written_type
from opacus_ac.grad_sample.sharded_parameters import is_sharded

ROLES = ("local", "ddp", "fsdp2")
_WRAPPERS = (DifferentiallyPrivateDistributedDataParallel, DistributedDataParallel, DataParallel)


_LAUNCHED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables in which launchers (torchrun, accelerate, mpirun, srun) say how many processes they started."""


def check_wrappers(module: nn.Module) -> None:
    """Raise ``ValueError`` for a model inside of a wrapper of ``torch`` or Opacus that reduces gradients itself."""
    for inner in module.modules():
        if isinstance(inner, _WRAPPERS):
            raise ValueError(
                f"the model is wrapped in {type(inner).__name__}, whose own reduction finds no gradient to reduce, and "
                "whose forward pass waits for ranks that have fewer batches: pass the bare model (its attribute "
                "module). make_private gives every rank the weights of rank 0 and reduces the clipped sums itself"
            )
        if isinstance(inner, FullyShardedDataParallel):
            raise ValueError(
                "the model is wrapped in FullyShardedDataParallel, which flattens parameters away from their layers: "
                "use torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def choose_reducer(role: str | Reducer | None, module: nn.Module, parameters: Sequence[nn.Parameter]) -> Reducer:
    """Return the reducer for the model as it is: sharded, a replica, or alone.

    Args:
        role: "local", "ddp" or "fsdp2", or a reducer; None for what the model and the processes say.
        module: the model.
        parameters: its trained parameters.

    Raises:
        ValueError: If the role does not fit, or the model is spread over the processes in a way that is not covered.
    """
    sharded = [is_sharded(p) for p in parameters]
    frozen = next((name for name, p in module.named_parameters() if is_sharded(p)), None)
    if frozen is not None and not any(sharded):
        raise ValueError(
            f"{frozen} is sharded and frozen, while nothing that is trained is sharded, so nobody would reduce the "
            "gradients: call fully_shard on the whole model, without ignored_params, or not at all"
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
                f"{name}={count}: this is one of several processes, and torch.distributed has not joined them, so each "
                "would spend a budget of its own on the same records. Call torch.distributed.init_process_group before "
                "make_private; or pass reducer='local' where the processes are runs of their own on different people's "
                "data"
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
