"""Cases of zeroth-order steps on several ranks: runs that are compared with one process, their noise, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from distributed_cases import DRAWS, FOLDER, RECORDS, Tokens, fixed_draws, language_model, weights
from distributed_noise import noise_before_sum
from helpers import classifier, dataset, loss_of
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.distributed import reducers
from opacus_ac.sampling import PoissonBatchSampler
from opacus_ac.zeroth_order import Pruning, Stages, ZerothOrderSettings

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
    inputs, targets = batch
    return loss_of(model, (inputs.to(next(model.parameters()).dtype), targets), "none")


def prepare(kind: str = "plain", rank: int = 0, model: nn.Module | None = None, **options: Any) -> tuple[Any, ...]:
    """Return (engine, model, optimizer, loader); the ranks begin with other weights than rank 0, which count for nothing."""
    if model is None:
        model = language_model(rank=rank) if kind == "tokens" else classifier(seed=rank)
    inner = torch.optim.AdamW if kind == "adam" else torch.optim.SGD
    laplace = kind == "laplace"
    engine = PrivacyEngine(accountant="pure" if laplace else "vrdp", ledger=options.pop("ledger", None))
    arguments = {
        "noise_multiplier": 0.0, "max_grad_norm": 1.0, "max_physical_batch_size": 3,
        "zeroth_order": SETTINGS[kind], "noise_generator": torch.Generator().manual_seed(5),
        "loss_bound": None if laplace else 10.0, **options,
    }  # fmt: skip
    data = Tokens() if kind == "tokens" else dataset(RECORDS)
    make = engine.make_private
    if "target_epsilon" in options:
        del arguments["noise_multiplier"]
        make = engine.make_private_with_epsilon
    made = make(
        module=model.train(arguments["zeroth_order"] is None),
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
        clip_policy="fixed",
        histogram_weight=0.0,
        zeroth_order=settings,
        noise_generator=torch.Generator().manual_seed(11),
    )
    found: list[torch.Tensor] = []
    optimizer._public.apply = lambda *_: found.append(optimizer.coefficients.grad * BATCH)
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


# ---------------------------------------------------------------- checkpoints


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
        engine.save_checkpoint(path=FOLDER / f"zo_{kind}", module=model, optimizer=optimizer)
        return summary(engine, model, optimizer, steps(model, optimizer, loader, DRAWS[4:]))

    return save


def resumed(kind: str) -> Callable[[int, int], dict[str, Any]]:
    def resume(rank: int, world: int) -> dict[str, Any]:
        engine, model, optimizer, loader = quiet(kind, rank)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        engine.load_checkpoint(path=FOLDER / f"zo_{kind}", module=model, optimizer=optimizer)
        return summary(engine, model, optimizer, steps(model, optimizer, loader, DRAWS[4:]))

    return resume


zo_save_staged, zo_resume_staged = saved("staged"), resumed("staged")
zo_save_adam, zo_resume_adam = saved("adam"), resumed("adam")
