"""Cases of zeroth-order steps on several ranks in which something is wrong, and what the ranks exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from distributed_cases import DRAWS, FOLDER, weights
from distributed_guards import die, message
from distributed_zeroth import prepare, steps
from helpers import classifier
from torch import nn
from torch.distributed.fsdp import fully_shard

from opacus_ac.distributed.group import Group
from opacus_ac.zeroth_order import ZerothOrderSettings
from opacus_ac.zeroth_order.source import DifferenceSource


def half_frozen() -> nn.Module:
    model = classifier()
    model[0].requires_grad_(False)
    return model


def narrow() -> nn.Module:
    """A model with the parameters of ``classifier`` by name, in other shapes."""
    return nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)).double()


# ---------------------------------------------------------------- what is exchanged


def zo_exchanged(rank: int, world: int) -> dict[str, list[tuple[str, int, bool]]]:
    """Return (exchange, values, whether a closure was under way) of the second step, for a small and a larger model."""
    return {name: exchanges(nn.Linear(4, width).double()) for name, width in (("small", 3), ("large", 300))}


def exchanges(model: nn.Module) -> list[tuple[str, int, bool]]:
    log: list[tuple[str, int, bool]] = []
    measuring: list[bool] = []
    _, model, optimizer, loader = prepare(model=model)
    sizes = {"reduce_scatter": 0, "all_gather": 0, "gather": 0, "agree": 0, "on_first": 0, "broadcast": 0}
    kept = {name: getattr(Group, name) for name in sizes}
    measure = DifferenceSource.measure

    def logged(name: str) -> Callable[..., Any]:
        def exchange(self: Group, value: Any, *rest: Any) -> Any:
            log.append(
                (name, getattr(value, "size", 0) if name in ("gather", "agree") else count(value), bool(measuring))
            )
            return kept[name](self, value, *rest)

        return exchange

    def noted(self: DifferenceSource, *arguments: Any) -> torch.Tensor:
        measuring.append(True)
        try:
            return measure(self, *arguments)
        finally:
            measuring.pop()

    for name in sizes:
        setattr(Group, name, logged(name))
    DifferenceSource.measure = noted
    try:
        # The reducers took bound methods of the group when they were made.
        optimizer.reducer.gather, optimizer.reducer.agree = (
            getattr(optimizer.reducer.group, name) for name in ("gather", "agree")
        )
        steps(model, optimizer, loader, DRAWS[:1])
        log.clear()
        steps(model, optimizer, loader, DRAWS[3:4])
    finally:
        DifferenceSource.measure = measure
        for name, function in kept.items():
            setattr(Group, name, function)
    return log


def count(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else 0


# ---------------------------------------------------------------- what stops a run


def zo_refusals(rank: int, world: int) -> dict[str, str]:
    def frozen_shard() -> nn.Module:
        model = half_frozen()
        fully_shard(model[0])
        return model

    def seed(value: int | None) -> ZerothOrderSettings:
        return ZerothOrderSettings(num_directions=2, direction_seed=value)

    cases = {
        "sharded": lambda: prepare(model=fully_shard(classifier())),
        "frozen shard": lambda: prepare(model=frozen_shard()),
        "given seeds": lambda: prepare(zeroth_order=seed(rank)),
        "one given seed": lambda: prepare(zeroth_order=seed(3 if rank else None)),
        "settings": lambda: prepare(zeroth_order=ZerothOrderSettings(num_directions=2 + rank)),
    }
    return {name: message(case) for name, case in cases.items()}


def zo_planted(rank: int, world: int) -> dict[str, str]:
    """Return what stops a run in which one rank does something else."""

    def run(spoil: Callable[[Any], Any], kind: str = "plain", **options: Any) -> str:
        """Call ``spoil`` on the last rank, before the second step and later."""
        _, model, optimizer, loader = prepare(kind, **options)

        def before(optimizer: Any) -> bool:
            return not (rank == world - 1 and optimizer.steps_taken > 0 and spoil(optimizer))

        return message(lambda: steps(model, optimizer, loader, before=before))

    def other_seed(optimizer: Any) -> None:
        optimizer.directions.seed += 1

    def a_bit(optimizer: Any) -> None:
        with torch.no_grad():
            weight = optimizer.coordinates.parameters[0].view(-1)
            place = weight.abs().argmax()  # moving rounds away the last bits of small ones
            weight[place] = torch.nextafter(weight[place], 2 * weight[place])

    def other_mask(optimizer: Any) -> None:
        optimizer.coordinates.indices[0] = optimizer.coordinates.indices[0][1:]

    def other_bound(optimizer: Any) -> None:
        optimizer.max_grad_norm = 2.0

    def empty(optimizer: Any) -> bool:
        return optimizer.plan.current().records == 0 and optimizer.plan.current().last

    cases = {
        "direction seed": lambda: run(other_seed),
        "a bit of a weight": lambda: run(a_bit),
        "mask": lambda: run(other_mask, "staged"),
        "bound": lambda: run(other_bound),
        "empty rank that skips": lambda: run(empty, max_physical_batch_size=None),
        "stand-in that is not measured": lambda: unmeasured(rank, world),
    }
    return {name: case() for name, case in cases.items()}


def unmeasured(rank: int, world: int) -> str:
    """The last rank does not move its weights for a stand-in, which leaves their float32 roundings behind those of the others."""
    _, model, optimizer, loader = prepare(model=classifier(torch.float32))
    measure = optimizer.differences.measure

    def lazy(closure: Any, seeds: list[int], smoothing: float) -> torch.Tensor:
        if rank < world - 1 or optimizer.plan.current().records:
            return measure(closure, seeds, smoothing)
        optimizer.differences._deltas = torch.zeros(1, len(seeds), dtype=torch.float64)
        return torch.zeros(1, dtype=torch.float64)

    optimizer.differences.measure = lazy

    # Draws without a first one: the last rank begins with a stand-in.
    return message(lambda: steps(model, optimizer, loader, DRAWS[2:]))


def zo_budget(rank: int, world: int) -> dict[str, Any]:
    """Spend a budget of three steps."""
    engine, model, optimizer, loader = prepare(
        target_epsilon=4.0, target_delta=1e-3, steps=3, noise_generator=None, ledger=FOLDER / f"zo_budget{rank}"
    )
    error = message(lambda: steps(model, optimizer, loader))
    return {
        "error": error,
        "taken": optimizer.steps_taken,
        "weights": weights(model),
        "epsilon": engine.get_epsilon(1e-3),
    }


def zo_die_in_closure(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 dies while it measures its records."""
    _, model, optimizer, loader = prepare(ledger=FOLDER / f"zo_died{rank}", noise_multiplier=1.0, noise_generator=None)
    kept = optimizer.differences._ends

    def ends(*arguments: Any) -> Any:
        if rank == 1 and optimizer.steps_taken == 3:
            die()
        return kept(*arguments)

    optimizer.differences._ends = ends
    error = message(lambda: steps(model, optimizer, loader))
    return {"error": error, "taken": optimizer.steps_taken}
