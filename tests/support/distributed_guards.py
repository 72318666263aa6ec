"""Cases in which something is wrong: what is refused, on which ranks, and with which words."""

from __future__ import annotations

import os
import signal
import time
from collections import UserDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from distributed_cases import DRAWS, FOLDER, fixed_draws
from helpers import classifier, dataset, loss_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.allocation import NoiseAllocation
from opacus_ac.engine import privacy_engine
from opacus_ac.release import StepStatistics
from opacus_ac.sampling import PoissonBatchSampler


def sharded(model: nn.Module | None = None, mesh: Any = None, **options: Any) -> nn.Module:
    model = classifier() if model is None else model
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def private(model: nn.Module, records: int = 24, ledger: Any = None, seed: int = 1, **options: Any) -> tuple[Any, ...]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(ledger=ledger)
    arguments = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    loader = DataLoader(dataset(records, seed=seed), batch_size=6)
    return engine, *engine.make_private(module=model, optimizer=optimizer, data_loader=loader, **arguments)


def ordered(order: Iterable[int], kind: Callable[..., Any] = tuple) -> tuple[Any, ...]:
    """Make private with the records in an order of this rank."""
    records = [dataset(24)[i] for i in order]
    rows = records if kind is tuple else [kind(x=x, y=y) for x, y in records]
    model = classifier()
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(rows, batch_size=6),  # type: ignore[arg-type]
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


def message(work: Callable[[], Any]) -> str:
    """Return the error of ``work``; empty when there is none."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def train(model: nn.Module, optimizer: Any, loader: Any, before: Callable[[int], bool] = lambda step: True) -> None:
    """Train for a pass; ``before`` is called before each step and says whether it is taken."""
    PoissonBatchSampler._draw, kept = fixed_draws(DRAWS), PoissonBatchSampler._draw
    try:
        for step, batch in enumerate(loader):
            if before(step):
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                optimizer.step()
    finally:
        PoissonBatchSampler._draw = kept


class DirectUse(nn.Module):
    """Its last layer is used past its own forward, where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.linear(self.first(x), self.last.weight.T @ self.last.weight))


def wrapped(kind: str) -> nn.Module:
    from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    wrappers = {
        "ddp": DistributedDataParallel,
        "dpddp": DifferentiallyPrivateDistributedDataParallel,
        "fsdp1": partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True),
    }
    return nn.Sequential(wrappers[kind](classifier(torch.float32)))


def tensor_parallel(rows: bool) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel() if rows else ColwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def batch_norm_unit() -> nn.Module:
    return sharded(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double())


def partly(frozen: bool = False) -> nn.Module:
    model = classifier()
    model[0].requires_grad_(not frozen)
    fully_shard(model[0])
    return model


def named_mesh(name: str) -> Any:
    return init_device_mesh("cpu", (2,), mesh_dim_names=(name,))


def refusals(rank: int, world: int) -> dict[str, str]:
    """Return, for each thing that is refused, with which words."""
    seeded = torch.Generator().manual_seed(rank)
    cases: dict[str, Callable[[], Any]] = {
        "torch DDP": lambda: private(wrapped("ddp")),
        "Opacus DDP": lambda: private(wrapped("dpddp")),
        "FSDP1": lambda: private(wrapped("fsdp1")),
        "tensor parallel": lambda: private(tensor_parallel(True)),
        "column parallel": lambda: private(tensor_parallel(False)),
        "mesh tp": lambda: private(sharded(mesh=named_mesh("tp"))),
        "mesh cp": lambda: private(sharded(mesh=named_mesh("dp_cp"))),
        "partly sharded": lambda: private(partly()),
        "only frozen ones sharded": lambda: private(partly(frozen=True)),
        "second dimension": lambda: private(sharded(shard_placement_fn=lambda p: Shard(p.dim() - 1))),
        "batch norm": lambda: private(batch_norm_unit()),
        "hooks": lambda: private(classifier(), grad_sample_mode="hooks"),
        "functorch": lambda: private(sharded(), grad_sample_mode="functorch"),
        "shuffled": lambda: private(classifier(), poisson_sampling=False),
        "fused": lambda: private(sharded(), fused_step=True),
        "raw": lambda: private(classifier(), clip_policy="raw_percentile"),
        "users": lambda: private(classifier(), max_rows_per_user=2),
        "allocation": lambda: private(sharded(), noise_allocation=NoiseAllocation(source="dimension")),
        "role": lambda: private(classifier(), reducer="zero"),
        "role fsdp2": lambda: private(classifier(), reducer="fsdp2"),
        "role ddp": lambda: private(sharded(), reducer="ddp"),
        "noise differs": lambda: private(classifier(), noise_multiplier=1.0 + rank),
        "seed differs": lambda: private(classifier(), noise_generator=seeded),
        "records differ": lambda: private(classifier(), records=24 + rank),
        "records in another order": lambda: private(classifier(), seed=1 + rank),
        "two records in each other's place": lambda: ordered(
            [0, 5, *range(2, 5), 1, *range(6, 24)] if rank else range(24)
        ),
        "mappings in another order": lambda: ordered(reversed(range(24)) if rank else range(24), UserDict),
        "model differs": lambda: private(nn.Sequential(nn.Linear(4, 3 + rank).double())),
    }
    return {name: message(case) for name, case in cases.items()}


def mesh_refusals(rank: int, world: int) -> dict[str, str]:
    """As ``refusals``, for meshes of four ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    flat = init_device_mesh("cpu", (4,))

    def two_meshes() -> nn.Module:
        model = classifier()
        fully_shard(model[0], mesh=flat)
        fully_shard(model[2], mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return {
        "part of the ranks": message(lambda: private(sharded(mesh=mesh["shard"]))),
        "two meshes": message(lambda: private(two_meshes())),
    }


def penalized() -> None:
    """The loss has a term of the weights themselves."""
    _, model, optimizer, loader = private(classifier())
    batch = next(iter(loader))
    (loss_of(model, batch) + next(model.parameters()).square().sum()).backward()
    optimizer.step()


def in_the_loop(rank: int, world: int) -> dict[str, str]:
    """Return with which words a loop is stopped in which one rank does something else, or something is wrong."""

    def direct() -> None:
        train(*private(fully_shard(DirectUse()))[1:])

    def skipping() -> None:
        train(*private(classifier())[1:], before=lambda step: not (rank == 1 and step == 1))

    def own_bound() -> None:
        _, model, optimizer, loader = private(classifier(), clipping="flat")
        if rank == 1:
            optimizer.max_grad_norm = 2.0
        train(model, optimizer, loader)

    def own_batch() -> None:
        _, model, optimizer, _ = private(classifier())
        loss_of(model, dataset()[:4]).backward()
        optimizer.step()

    def loader_around() -> None:
        """As accelerate prepares a loader: whole batches of our sampler, in turn."""
        _, model, optimizer, loader = private(classifier())
        train(model, optimizer, DataLoader(loader.dataset, batch_sampler=loader.batch_sampler))

    def other_draw() -> None:
        _, model, optimizer, loader = private(classifier())
        loader.batch_sampler._draw = fixed_draws([[rank, 2, 3]]).__get__(loader.batch_sampler)
        inputs = next(iter(loader))
        loss_of(model, inputs).backward()
        optimizer.step()

    def note_in_checkpoint() -> None:
        engine, model, optimizer, _ = private(classifier())
        engine.save_checkpoint(path=FOLDER / "never", module=model, optimizer=optimizer, checkpoint_dict={"note": 5})

    def file_of_one_process() -> None:
        engine, model, optimizer, _ = private(classifier())
        file = FOLDER / f"file_of_rank_{rank}"
        one = PrivacyEngine()
        alone, inner = classifier(), torch.optim.SGD
        made = one.make_private(
            module=alone,
            optimizer=inner(alone.parameters(), lr=0.1),
            data_loader=DataLoader(dataset(), batch_size=4),
            noise_multiplier=1.0,
            reducer="local",
        )
        one.save_checkpoint(path=file, module=made[0], optimizer=made[1])
        engine.load_checkpoint(path=file, module=model, optimizer=optimizer)

    cases = {
        "penalty on weights, ddp": penalized,
        "direct use, fsdp2": direct,
        "skipped batch": skipping,
        "own bound": own_bound,
        "own batch": own_batch,
        "loader around ours": loader_around,
        "other draw": other_draw,
        "note in a checkpoint": note_in_checkpoint,
        "file of one process": file_of_one_process,
    }
    return {name: message(case) for name, case in cases.items()}


# ---------------------------------------------------------------- planted bugs that stop a run


def planted(rank: int, world: int) -> dict[str, str]:
    """Return what stops a run into which a bug was put."""
    own = privacy_engine.rank_streams

    def same_noise(reducer: Any, noise: Any, sampling: Any) -> Any:
        return noise, sampling

    privacy_engine.rank_streams = same_noise
    try:
        same = message(lambda: private(classifier(), noise_generator=torch.Generator().manual_seed(1)))
    finally:
        privacy_engine.rank_streams = own

    _, model, optimizer, loader = private(classifier())
    optimizer.reducer.agree = lambda values: values
    own_noise = message(lambda: train(model, optimizer, loader))
    return {"same noise": same, "C computed per rank": own_noise}


def uncounted(rank: int, world: int) -> list[str]:
    """Return the clipping norms of a run whose counts are not added up."""
    StepStatistics.merge, kept = lambda self, tallies: None, StepStatistics.merge
    try:
        return bounds(rank, world)
    finally:
        StepStatistics.merge = kept


def bounds(rank: int, world: int) -> list[str]:
    """Return the clipping norms of a run without noise, as they are to the last bit."""
    _, model, optimizer, loader = private(classifier(), noise_multiplier=0.0, max_physical_batch_size=2)
    seen: dict[int, str] = {}
    train(
        model,
        optimizer,
        loader,
        lambda step: bool(seen.setdefault(optimizer.steps_taken, optimizer.max_grad_norm.hex())),
    )
    return [*seen.values(), optimizer.max_grad_norm.hex()]


# ---------------------------------------------------------------- budget, ledger, and ranks that die


def budget(rank: int, world: int) -> dict[str, Any]:
    """Spend a budget of three steps, under a ledger that rank 0 has; rank 1 looks where none is."""
    ledger = FOLDER / f"ledger{rank}"
    engine = PrivacyEngine(ledger=ledger)
    model = sharded()
    _, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(dataset(24), batch_size=6),
        target_epsilon=1.0,
        target_delta=1e-3,
        steps=3,
        max_grad_norm=1.0,
    )
    error = message(lambda: train(model, optimizer, loader))
    return {
        "error": error,
        "taken": optimizer.steps_taken,
        "epsilon": engine.get_epsilon(1e-3),
        "exists": ledger.exists(),
        "noise": optimizer.noise_multiplier,
        "report": engine.privacy_report().epsilon,
    }


def damaged(rank: int, world: int) -> str:
    """The ledger of rank 0 is damaged during the run."""
    path = FOLDER / f"damaged{rank}"
    _, model, optimizer, loader = private(classifier(), ledger=path)

    def damage(step: int) -> bool:
        if step == 3 and rank == 0:
            with path.open("ab") as file:
                file.write(b"not a line\n")
        return True

    return message(lambda: train(model, optimizer, loader, damage))


def one_fails(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 fails while it clips the last part of its third batch; every rank tries the batch again, and goes on."""
    engine, model, optimizer, loader = private(
        classifier(), ledger=FOLDER / f"failed{rank}", noise_multiplier=0.0, max_physical_batch_size=2, clipping="flat"
    )
    accumulate, errors = optimizer.source.accumulate, []
    failures = [1] if rank == 1 else []

    def fail(factors: torch.Tensor) -> None:
        accumulate(factors)
        if optimizer.steps_taken == 2 and optimizer.plan.current().last and failures:
            failures.pop()
            raise RuntimeError("planted: out of memory")

    optimizer.source.accumulate = fail
    PoissonBatchSampler._draw, kept = fixed_draws(DRAWS), PoissonBatchSampler._draw
    try:
        for batch in loader:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            try:
                optimizer.step()
            except (ValueError, RuntimeError) as error:
                errors.append(str(error))
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                optimizer.step()
    finally:
        PoissonBatchSampler._draw = kept
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return {
        "errors": errors,
        "taken": optimizer.steps_taken,
        "charges": len(engine._account.history),
        "weights": weights,
    }


def untroubled(rank: int, world: int) -> torch.Tensor:
    """Return the weights of the same run without a failure."""
    _, model, optimizer, loader = private(
        classifier(), noise_multiplier=0.0, max_physical_batch_size=2, clipping="flat"
    )
    train(model, optimizer, loader)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def with_death(name: str, rank: int, when: Callable[[int, Any], None], model: nn.Module) -> dict[str, Any]:
    """Train under a ledger; ``when`` may kill this rank. Return the error of a rank that is left."""
    _, model, optimizer, loader = private(model, ledger=FOLDER / f"{name}{rank}")
    started = time.monotonic()

    def before(step: int) -> bool:
        when(step, optimizer)
        return True

    error = message(lambda: train(model, optimizer, loader, before))
    return {"error": error, "seconds": time.monotonic() - started, "taken": optimizer.steps_taken}


def die_before_meeting(rank: int, world: int) -> dict[str, Any]:
    def when(step: int, optimizer: Any) -> None:
        if step == 3 and rank == 1:
            die()

    return with_death("before", rank, when, classifier())


def die_after_charge(rank: int, world: int) -> dict[str, Any]:
    """The step was charged, and rank 1 dies before its sums were exchanged."""

    def when(step: int, optimizer: Any) -> None:
        if step == 3 and rank == 1:
            optimizer.reducer.release = lambda source, noise: die()

    return with_death("charged", rank, when, sharded())


def stall_and_die(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 does not go on, for longer than the others wait."""

    def when(step: int, optimizer: Any) -> None:
        if step == 3 and rank == 1:
            time.sleep(8)
            die()

    return with_death("stalled", rank, when, classifier())


def first_dies_after_charge(rank: int, world: int) -> dict[str, Any]:
    """Rank 0 has written the charge and dies before the others know."""

    def when(step: int, optimizer: Any) -> None:
        if step == 3 and rank == 0:
            charge = optimizer.reducer.on_first
            optimizer.reducer.on_first = lambda work: (work(), die(), charge)

    return with_death("first", rank, when, classifier())
