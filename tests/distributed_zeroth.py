"""Cases of zeroth-order steps on several ranks: runs that are compared with one process, their noise, and planted bugs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from distributed_cases import DRAWS, FOLDER, RECORDS, Tokens, fixed_draws, language_model, weights
from distributed_guards import die, message
from distributed_noise import noise_before_sum
from helpers import classifier, dataset, loss_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.distributed import load_checkpoint, reducers, save_checkpoint
from opacus_ac.distributed.world import Group
from opacus_ac.sampling import PoissonBatchSampler
from opacus_ac.zeroth_order import Pruning, Stages, ZerothOrderSettings
from opacus_ac.zeroth_order.source import DifferenceSource

# Differences of a float64 loss are known to 1e-16 / (2 lambda): a large lambda keeps sums of other orders close.
BASE = {"num_directions": 5, "smoothing": 1e-2, "direction_seed": 7}
STAGED = ZerothOrderSettings(
    **{**BASE, "direction": "rademacher"},
    stages=Stages(first=2, count=2, proximal=0.1, smoothing_end=5e-3),
    pruning=Pruning(ratio=0.5, score="magnitude"),
    ema_decay=0.9,
)
SETTINGS: dict[str, ZerothOrderSettings] = {
    "plain": ZerothOrderSettings(**BASE),
    "staged": STAGED,
    "adam": ZerothOrderSettings(**{**BASE, "direction": "sphere"}, ema_decay=0.9),
    "laplace": ZerothOrderSettings(**BASE, mechanism="laplace"),
    "tokens": ZerothOrderSettings(**BASE),
}
MULTIPLIER, BOUND, BATCH = 2.5, 1.5, 4


def losses(model: nn.Module, batch: Any) -> torch.Tensor:
    """Losses of the records ``[B]``, in float64."""
    if isinstance(batch, dict):
        logits = model(batch["input_ids"]).logits[:, :-1]
        return cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").mean(1)
    return loss_of(model, batch, "none")


def prepare(kind: str = "plain", rank: int = 0, model: nn.Module | None = None, **options: Any) -> tuple[Any, ...]:
    """Return (engine, model, optimizer, loader); the ranks begin with other weights than rank 0, which count for nothing."""
    if model is None:
        model = language_model(rank=rank) if kind == "tokens" else classifier(seed=rank)
    inner = torch.optim.AdamW if kind == "adam" else torch.optim.SGD
    laplace = kind == "laplace"
    engine = PrivacyEngine(accountant="pure" if laplace else "vrdp", ledger=options.pop("ledger", None))
    arguments = {
        "noise_multiplier": 0.0, "max_grad_norm": 1.0, "max_physical_batch_size": 3, "clipping": "zo",
        "zeroth_order": SETTINGS[kind], "noise_generator": torch.Generator().manual_seed(5),
        "loss_bound": None if laplace else 10.0, **options,
    }  # fmt: skip
    data = Tokens() if kind == "tokens" else dataset(RECORDS)
    make = engine.make_private
    if "target_epsilon" in options:
        del arguments["noise_multiplier"]
        make = engine.make_private_with_epsilon
    made = make(
        module=model.train(arguments["clipping"] != "zo"),
        optimizer=inner(model.parameters(), lr=1e-2),
        data_loader=DataLoader(data, batch_size=4),
        **arguments,
    )
    return engine, *made


def steps(
    model: nn.Module,
    optimizer: Any,
    loader: Any,
    draws: list[list[int]] = DRAWS,
    before: Callable[[Any], bool] = lambda optimizer: True,
) -> list[dict[str, Any]]:
    """Take a step for each of ``draws`` and return what it released and chose; ``before`` says whether it is taken."""
    seen: list[dict[str, Any]] = []
    PoissonBatchSampler._draw, kept = fixed_draws(draws), PoissonBatchSampler._draw
    try:
        for batch in loader:
            taken = optimizer.steps_taken
            if before(optimizer):
                optimizer.step(lambda: losses(model, batch))  # noqa: B023
            if optimizer.steps_taken > taken:
                release = optimizer.released
                seen.append(
                    {
                        "bound": optimizer.max_grad_norm.hex(),
                        "counts": None if release.histogram is None else release.histogram.counts.tolist(),
                        "loss": release.loss,
                        "seeds": optimizer.direction_seeds,
                        "checksum": optimizer.coordinates.checksum(),
                    }
                )
            if len(seen) == len(draws):
                break
    finally:
        PoissonBatchSampler._draw = kept
    return seen


def summary(engine: Any, model: nn.Module, optimizer: Any, seen: list[dict[str, Any]]) -> dict[str, Any]:
    with optimizer.ema_weights():
        average = weights(model)
    return {
        "steps": seen,
        "weights": weights(model),
        "average": average,
        "history": engine.accountant.history,
        "role": optimizer.reducer.name,
        "stage": optimizer.stage,
    }


def trained(kind: str, rank: int = 0) -> dict[str, Any]:
    engine, model, optimizer, loader = prepare(kind, rank)
    return summary(engine, model, optimizer, steps(model, optimizer, loader))


def case(kind: str) -> Callable[[int, int], dict[str, Any]]:
    return lambda rank, world: trained(kind, rank)


zo_plain, zo_staged, zo_adam, zo_laplace, zo_tokens = (case(kind) for kind in SETTINGS)


def zo_own_seed(rank: int, world: int) -> list[int]:
    """Return the seed of the directions, where none was given."""
    settings = ZerothOrderSettings(num_directions=2)
    return [prepare(zeroth_order=settings)[2].directions.seed for _ in range(2)]


# ---------------------------------------------------------------- noise


def zo_noise(rank: int, world: int, mechanism: str = "gaussian", count: int = 4000) -> torch.Tensor:
    """Return what a step on a batch without records releases, unscaled, ``[K]``."""
    settings = ZerothOrderSettings(num_directions=count, direction_seed=1, mechanism=mechanism)
    data = TensorDataset(torch.randn(20, 2), torch.randint(0, 2, (20,)))
    model = nn.Linear(2, 2)
    _, optimizer, loader = PrivacyEngine(accountant="pure" if mechanism == "laplace" else "vrdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(data, batch_size=BATCH),
        noise_multiplier=MULTIPLIER,
        max_grad_norm=BOUND,
        clipping="zo",
        clip_policy="fixed",
        histogram_weight=0.0,
        zeroth_order=settings,
        noise_generator=torch.Generator().manual_seed(11),
    )
    found: list[torch.Tensor] = []
    optimizer._move = lambda stage, seeds: found.append(optimizer.coefficients.grad * BATCH)
    steps(model, optimizer, loader, [[]])
    return found[0]


def zo_noise_laplace(rank: int, world: int) -> torch.Tensor:
    return zo_noise(rank, world, "laplace", 2000)


def everywhere(work: Callable[[int, int], torch.Tensor]) -> Callable[[int, int], torch.Tensor]:
    def planted(rank: int, world: int) -> torch.Tensor:
        kept, reducers.sum_with_noise = reducers.sum_with_noise, noise_before_sum
        try:
            return work(rank, world)
        finally:
            reducers.sum_with_noise = kept

    return planted


zo_noise_everywhere, zo_noise_laplace_everywhere = everywhere(zo_noise), everywhere(zo_noise_laplace)


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
        optimizer.mechanism.reducer = optimizer.reducer
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
            weight = optimizer.coordinates.parameters[0]
            weight[0, 0] = torch.nextafter(weight[0, 0], weight[0, 0] + 1)

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

    def work() -> None:
        # Inputs in the type of the weights.
        closure_losses = lambda batch: loss_of(model, (batch[0].float(), batch[1]), "none")  # noqa: E731
        PoissonBatchSampler._draw, kept = fixed_draws(DRAWS[2:]), PoissonBatchSampler._draw
        try:
            for batch in loader:
                optimizer.step(lambda: closure_losses(batch))  # noqa: B023
        finally:
            PoissonBatchSampler._draw = kept

    return message(work)


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


# ---------------------------------------------------------------- checkpoints


def half_frozen() -> nn.Module:
    model = classifier()
    model[0].requires_grad_(False)
    return model


def narrow() -> nn.Module:
    """A model with the parameters of ``classifier`` by name, in other shapes."""
    return nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)).double()


def quiet(kind: str, rank: int) -> tuple[Any, ...]:
    """Accounted with noise that is zero, so that runs can be compared."""
    made = prepare(kind, rank, noise_multiplier=2.0)
    mechanism = made[2].mechanism
    for stream in (mechanism.stream, mechanism._statistics_stream):
        stream.normal = lambda size: torch.zeros(size, dtype=torch.float64)
    return made


def saved(kind: str) -> Callable[[int, int], dict[str, Any]]:
    def save(rank: int, world: int) -> dict[str, Any]:
        engine, model, optimizer, loader = quiet(kind, rank)
        steps(model, optimizer, loader, DRAWS[:4])
        save_checkpoint(engine, model, optimizer, FOLDER / f"zo_{kind}")
        return summary(engine, model, optimizer, steps(model, optimizer, loader, DRAWS[4:]))

    return save


def resumed(kind: str) -> Callable[[int, int], dict[str, Any]]:
    def resume(rank: int, world: int) -> dict[str, Any]:
        engine, model, optimizer, loader = quiet(kind, rank)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        load_checkpoint(engine, model, optimizer, FOLDER / f"zo_{kind}")
        return summary(engine, model, optimizer, steps(model, optimizer, loader, DRAWS[4:]))

    return resume


zo_save_staged, zo_resume_staged = saved("staged"), resumed("staged")
zo_save_adam, zo_resume_adam = saved("adam"), resumed("adam")
