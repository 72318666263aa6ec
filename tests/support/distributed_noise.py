"""Cases that look at the noise of a step whose sum is zero, as it is and with bugs put into it."""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import fixed_draws, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.distributed import reducers, sharded
from opacus_ac.sampling import PoissonBatchSampler

MULTIPLIER, BOUND, BATCH = 2.5, 1.5, 4


def wide_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """About 120 thousand weights, whose first dimensions three ranks cannot share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(200, 301), nn.Tanh(), nn.Linear(301, 202)).to(dtype)


def noise_of_a_step(model: nn.Module, generator: torch.Generator | None = None) -> dict[str, Any]:
    """Take a step on a batch without records and return what it released, unscaled: the shards, and the whole."""
    data = TensorDataset(torch.randn(20, 200), torch.randint(0, 202, (20,)))
    _, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(data, batch_size=BATCH),
        noise_multiplier=MULTIPLIER,
        max_grad_norm=BOUND,
        clipping="flat",
        noise_generator=generator,
    )[:3]
    loader.batch_sampler._draw = fixed_draws([[]]).__get__(loader.batch_sampler)
    inputs, targets = next(iter(loader))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    gradients = [p.grad * BATCH for p in optimizer.params]
    local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    return {"shard": flat(local), "whole": flat([whole(g) for g in gradients])}


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]).double()


def shard(model: nn.Module, mesh: Any = None) -> nn.Module:
    fully_shard(model[0], mesh=mesh)
    fully_shard(model[2], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicas() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def noise_ddp(rank: int, world: int) -> dict[str, Any]:
    return noise_of_a_step(wide_model())


def noise_fsdp(rank: int, world: int) -> dict[str, Any]:
    return noise_of_a_step(shard(wide_model()))


def noise_hybrid(rank: int, world: int) -> dict[str, Any]:
    return noise_of_a_step(shard(wide_model(), replicas()))


def noise_seeded(rank: int, world: int) -> dict[str, Any]:
    return noise_of_a_step(shard(wide_model()), torch.Generator().manual_seed(11))


# ---------------------------------------------------------------- planted bugs


def noise_same_stream(rank: int, world: int) -> dict[str, Any]:
    """Every rank draws the same noise for its shard, and the guard against that is out."""
    from opacus_ac.engine import privacy_engine as engine
    from opacus_ac.engine import ranks

    kept = engine.rank_streams, ranks.check_noise
    engine.rank_streams = lambda reducer, noise, sampling: (noise, sampling)
    ranks.check_noise = lambda reducer, stream: None
    try:
        return noise_seeded(rank, world)
    finally:
        engine.rank_streams, ranks.check_noise = kept


def noise_before_sum(flat: torch.Tensor, group: Any, noise: Any) -> None:
    """Every rank noises the whole, and then they add up."""
    noise.in_place([flat])
    padded = torch.zeros(-(-flat.numel() // group.world) * group.world, dtype=flat.dtype)
    padded[: flat.numel()] = flat
    group.all_gather(group.reduce_scatter(padded), padded)
    flat.copy_(padded[: flat.numel()])


def noise_everywhere_ddp(rank: int, world: int) -> dict[str, Any]:
    kept, reducers.sum_with_noise = reducers.sum_with_noise, noise_before_sum
    try:
        return noise_ddp(rank, world)
    finally:
        reducers.sum_with_noise = kept


def noise_everywhere_hybrid(rank: int, world: int) -> dict[str, Any]:
    kept, sharded.sum_with_noise = sharded.sum_with_noise, noise_before_sum
    try:
        return noise_hybrid(rank, world)
    finally:
        sharded.sum_with_noise = kept


def drawn(rank: int, world: int) -> dict[str, Any]:
    """Return the records that this rank got of each batch of two passes: with a secret and with a seeded draw."""

    def batches(generator: torch.Generator | None) -> list[list[int]]:
        data = TensorDataset(torch.arange(37.0).view(37, 1), torch.zeros(37, dtype=torch.long))
        model = nn.Linear(1, 2)
        _, _, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            data_loader=DataLoader(data, batch_size=5),
            noise_multiplier=1.0,
            noise_generator=generator,
        )
        sampler: PoissonBatchSampler = loader.batch_sampler
        return [list(batch) for _ in range(2) for batch in sampler]

    return {"secret": batches(None), "seeded": batches(torch.Generator().manual_seed(4))}


# ---------------------------------------------------------------- what a step costs


def sent() -> int:
    """Return the bytes that this process has sent through its TCP connections, as the kernel counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
        except OSError:  # no socket, or closed meanwhile
            continue
        total += struct.unpack_from("Q", info, 120)[0] if len(info) >= 128 else 0  # tcpi_bytes_acked
    return total


def quiet_sent() -> int:
    """Return the bytes sent when all ranks have sent all of theirs."""
    dist.barrier()
    time.sleep(0.3)
    return sent()


def cost_of_a_step(model: nn.Module) -> dict[str, Any]:
    """Take a step of two physical batches and return bytes sent, collectives used, and the memory of what is held."""
    data = TensorDataset(torch.randn(20, 200), torch.randint(0, 202, (20,)))
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        data_loader=DataLoader(data, batch_size=BATCH),
        noise_multiplier=1.0,
        max_grad_norm=BOUND,
        max_physical_batch_size=2,
    )
    world = optimizer.reducer.world
    draws = [list(range(3 * world)), list(range(4 * world))]
    loader.batch_sampler._draw = fixed_draws(draws).__get__(loader.batch_sampler)
    measured: dict[str, Any] = {}
    before = 0
    for number, (inputs, targets) in enumerate(loader):
        if number == 2:
            before = quiet_sent()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if number == 3:
            measured["sent"] = quiet_sent() - before
            break
    held = {
        "weights": optimizer.params,
        "gradients": [p.grad for p in optimizer.params],
        "moments": [t for s in optimizer.original_optimizer.state.values() for t in s.values() if t.dim()],
        "average": optimizer.ema.average,
    }
    for name, tensors in held.items():
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        measured[name] = sum(t.numel() * t.element_size() for t in local)
    return measured


def cost_ddp(rank: int, world: int) -> dict[str, Any]:
    return cost_of_a_step(wide_model())


def cost_fsdp(rank: int, world: int) -> dict[str, Any]:
    return cost_of_a_step(shard(wide_model()))


def cost_hybrid(rank: int, world: int) -> dict[str, Any]:
    return cost_of_a_step(shard(wide_model(), replicas()))
