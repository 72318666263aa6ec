"""What the ranks run in the tests of distributed training: the runs that are compared with one process.

Each case is a function of (rank, world) that ``distributed_launch`` calls by its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from opacus_ac import AutoAdam, PrivacyEngine
from opacus_ac.sampling import PoissonBatchSampler

FOLDER = Path(os.environ.get("CASES_FOLDER", "."))
RECORDS = 24

# The logical batches of six steps: uneven, larger than the physical limit, one without records on some ranks, one empty.
DRAWS = [[0, 3, 4, 8, 9, 11, 17], [], [5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 23], [3, 4], [0, 19, 7]]


class Tokens(Dataset):
    """Records of a language model with labels of their own; a stand-in is zeros."""

    def __init__(self, vocabulary: int = 61, length: int = 7) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(1, vocabulary, (RECORDS, length), generator=generator)

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def wide_norm(self: Any, states: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the type of its input: transformers computes it in float32, whose rounding hides errors below 1e-9."""
    return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def language_model(tied: bool = True, dtype: torch.dtype = torch.float64, rank: int = 0) -> nn.Module:
    from tiny_models import qwen2
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    Qwen2RMSNorm.forward = wide_norm
    torch.manual_seed(0 if tied else 1)
    model = qwen2(tied, attn_implementation="sdpa").to(dtype)
    if rank:  # the weights of rank 0 are those that count
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(rank)
    return model.train()


def shard(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def shard_leaves(model: nn.Module, mesh: Any = None) -> nn.Module:
    """Every layer with parameters a unit of its own, the tied ones together; whatever is left with the root."""
    from torch.distributed.fsdp import fully_shard

    tied = model.lm_head.weight is model.model.embed_tokens.weight
    ends = [model.model.embed_tokens, model.lm_head]
    for module in list(model.modules()):
        if next(module.parameters(recurse=False), None) is not None and not (tied and module in ends):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fixed_draws(draws: list[list[int]]) -> Callable[..., list[int]]:
    waiting = [list(d) for d in draws]

    def draw(self: PoissonBatchSampler, rate: float) -> list[int]:
        return waiting.pop(0) if waiting else []

    return draw


def prepare(model: nn.Module, data: Dataset | None = None, **options: Any) -> tuple[Any, ...]:
    """Return (engine, model, optimizer, loader) of the run that all parity tests share."""
    optimizer = options.pop("inner", torch.optim.AdamW)(model.parameters(), lr=1e-2)
    ledger = options.pop("ledger", None)
    engine = PrivacyEngine(ledger=ledger)
    arguments = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "max_physical_batch_size": 3,
        "noise_generator": torch.Generator().manual_seed(5),
        "ema_decay": 0.9,
        "loss_bound": 10.0,
        **options,
    }
    loader = DataLoader(data or Tokens(), batch_size=4)
    return engine, *engine.make_private(module=model, optimizer=optimizer, data_loader=loader, **arguments)


def steps(model: nn.Module, optimizer: Any, loader: Any, most: int = 1000) -> list[dict[str, Any]]:
    """Train for a pass, or ``most`` steps, and return what each step released and chose."""
    seen = []
    for batch in loader:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        before = optimizer.steps_taken
        optimizer.step()
        if optimizer.steps_taken > before:
            release = optimizer.released
            seen.append(
                {
                    "bound": optimizer.max_grad_norm.hex(),
                    "loss": release.loss,
                    "counts": release.histogram.counts.tolist(),
                    "rate": release.clip_rate,
                    "multiplier": optimizer.control.multiplier,
                }
            )
            if len(seen) == most:
                break
    return seen


def whole(tensor: torch.Tensor) -> torch.Tensor:
    value = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return value.detach().clone()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p) for name, p in model.named_parameters()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between two sets of weights of the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def outcome(model: nn.Module, optimizer: Any, loader: Any) -> dict[str, Any]:
    PoissonBatchSampler._draw, kept = fixed_draws(DRAWS), PoissonBatchSampler._draw
    try:
        seen = steps(model, optimizer, loader)
    finally:
        PoissonBatchSampler._draw = kept
    trained = weights(model)
    batch = {"input_ids": Tokens().ids[:2], "labels": Tokens().ids[:2]}
    outputs = [evaluated(model, batch)]
    with optimizer.ema_weights():
        averaged = weights(model)
        outputs.append(evaluated(model, batch))
    outputs.append(evaluated(model, batch))
    return {"steps": seen, "weights": trained, "average": averaged, "outputs": dict(zip("abc", outputs, strict=True))}


@torch.no_grad()
def evaluated(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits in evaluation mode: a sharded model has to gather the weights that it has now."""
    model.eval()
    logits = model(**batch).logits
    model.train()
    return logits.clone()


def train(model: nn.Module, **options: Any) -> dict[str, Any]:
    engine, model, optimizer, loader = prepare(model, **options)
    result = outcome(model, optimizer, loader)
    return {**result, "role": optimizer.reducer.name, "history": engine.accountant.history}


# ---------------------------------------------------------------- runs that are compared with one process


def frozen() -> nn.Module:
    model = language_model()
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(False)
    return model


def checkpointed() -> nn.Module:
    model = language_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def other(name: str) -> nn.Module:
    import tiny_models

    torch.manual_seed(2)
    return getattr(tiny_models, name)().double().train()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": language_model,
    "untied": lambda: language_model(False),
    "frozen": frozen,
    "checkpointed": checkpointed,
    "gpt2": lambda: other("gpt2"),  # Conv1D, positions looked up once for the batch
    "bitnet": lambda: other("bitnet"),  # layers that are run again
    "mamba": lambda: other("mamba"),  # mixers without a rule
    "mixtral": lambda: other("mixtral"),  # stacked weights of experts
    "experts": lambda: other("gpt_oss"),  # the same with biases, and attention that is run again
}


def low_hint(parameters: Any, lr: float) -> AutoAdam:
    """A hint so low that the size of the weights says where the search begins, which has to be that of all shards."""
    return AutoAdam(parameters, lr=1e-3 * lr)


INNER: dict[str, Any] = {"auto": low_hint}
"""The inner optimizers of the kinds that have another than AdamW."""


def single(kind: str = "tied") -> dict[str, Any]:
    """Train in one process."""
    return train(MODELS.get(kind, language_model)(), inner=INNER.get(kind, torch.optim.AdamW))


def layers_of(model: nn.Module) -> Any:
    """The blocks of a transformers model."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def ddp_tied(rank: int, world: int) -> dict[str, Any]:
    """The ranks begin with other weights than rank 0."""
    return train(language_model(rank=rank))


def ddp_auto(rank: int, world: int) -> dict[str, Any]:
    """The rate is found from the sums of all ranks."""
    return train(language_model(rank=rank), inner=low_hint)


def fsdp_auto(rank: int, world: int) -> dict[str, Any]:
    """The rate is found from inner products of shards."""
    return train(shard(language_model()), inner=low_hint)


def hybrid_auto(rank: int, world: int) -> dict[str, Any]:
    return train(shard(language_model(), replicas_of_shards(world)), inner=low_hint)


def ddp_untied(rank: int, world: int) -> dict[str, Any]:
    return train(language_model(False))


def ddp_checkpointed(rank: int, world: int) -> dict[str, Any]:
    return train(checkpointed())


def sharded_kind(kind: str) -> Callable[[int, int], dict[str, Any]]:
    return lambda rank, world: train(shard(MODELS[kind]()))


fsdp_tied, fsdp_untied, fsdp_frozen = (sharded_kind(kind) for kind in ("tied", "untied", "frozen"))
fsdp_checkpointed, fsdp_gpt2, fsdp_bitnet, fsdp_mamba = (
    sharded_kind(kind) for kind in ("checkpointed", "gpt2", "bitnet", "mamba")
)


fsdp_mixtral, fsdp_experts = sharded_kind("mixtral"), sharded_kind("experts")


def ddp_mixtral(rank: int, world: int) -> dict[str, Any]:
    return train(MODELS["mixtral"]())


def leaves_untied(rank: int, world: int) -> dict[str, Any]:
    return train(shard_leaves(language_model(False)))


def leaves_tied(rank: int, world: int) -> dict[str, Any]:
    return train(shard_leaves(language_model()))


def hybrid_tied(rank: int, world: int) -> dict[str, Any]:
    """The replicas of the shards begin with other weights than the first."""
    return train(shard(language_model(rank=rank // (world // 2)), replicas_of_shards(world)))


def replicas_of_shards(world: int) -> Any:
    """Return a mesh of two replicas, each of which is sharded."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))


def first_gradient(model: nn.Module) -> dict[str, Any]:
    """Return the gradients that the first step releases, and their type."""
    _, model, optimizer, loader = prepare(model, clipping="flat", loss_bound=None, max_physical_batch_size=None)
    loader.batch_sampler._draw = fixed_draws(DRAWS).__get__(loader.batch_sampler)
    batch = next(iter(loader))
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()
    dtypes = {str(p.grad.dtype) for p in optimizer.params} | {str(p.dtype) for p in optimizer.params}
    return {"gradient": torch.cat([whole(p.grad).reshape(-1).double() for p in optimizer.params]), "dtypes": dtypes}


def low_precision(rank: int, world: int) -> dict[str, Any]:
    """Weights are gathered in bfloat16, kept and updated in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    return first_gradient(shard(language_model(dtype=torch.float32), mp_policy=policy))


# ---------------------------------------------------------------- checkpoints


def prepare_quiet(model: nn.Module, **options: Any) -> tuple[Any, ...]:
    """As ``prepare``, accounted with noise that is zero: epsilon is finite, and runs can be compared."""
    made = prepare(model, noise_multiplier=2.0, **options)
    mechanism = made[2].mechanism
    for stream in (mechanism.stream, mechanism._statistics_stream):
        stream.normal = lambda size: torch.zeros(size, dtype=torch.float64)
    return made


def some_steps(model: nn.Module, optimizer: Any, loader: Any, draws: list[list[int]]) -> list[dict[str, Any]]:
    PoissonBatchSampler._draw = fixed_draws(draws)
    return steps(model, optimizer, loader, len(draws))


def summary(engine: Any, model: nn.Module, optimizer: Any, seen: list[dict[str, Any]]) -> dict[str, Any]:
    with optimizer.ema_weights():
        average = weights(model)
    return {
        "steps": seen,
        "weights": weights(model),
        "average": average,
        "history": engine.accountant.history,
        "epsilon": engine.get_epsilon(1e-3),
        "taken": optimizer.steps_taken,
        "state": optimizer.mechanism.state_dict(),
    }


def save(model: nn.Module, folder: Path, **options: Any) -> dict[str, Any]:
    made = engine, model, optimizer, _ = prepare_quiet(model, **options)
    some_steps(*made[1:], DRAWS[:4])
    engine.save_checkpoint(path=folder, module=model, optimizer=optimizer, folder=True)
    middle = engine.get_epsilon(1e-3)
    seen = some_steps(*made[1:], DRAWS[4:])
    return {**summary(engine, model, optimizer, seen), "middle": middle}


def resume(model: nn.Module, folder: Path, **options: Any) -> dict[str, Any]:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    engine, model, optimizer, loader = prepare_quiet(model, **options)
    engine.load_checkpoint(path=folder, module=model, optimizer=optimizer)
    middle = engine.get_epsilon(1e-3)
    seen = some_steps(model, optimizer, loader, DRAWS[4:])
    return {**summary(engine, model, optimizer, seen), "middle": middle}


def save_fsdp(rank: int, world: int) -> dict[str, Any]:
    return save(shard(language_model()), FOLDER / "fsdp")


def save_ddp(rank: int, world: int) -> dict[str, Any]:
    return save(language_model(), FOLDER / "ddp")


def resume_fsdp(rank: int, world: int) -> dict[str, Any]:
    return resume(shard(language_model()), FOLDER / "fsdp")


def resume_ddp(rank: int, world: int) -> dict[str, Any]:
    return resume(language_model(), FOLDER / "fsdp")


def resume_fsdp_of_ddp(rank: int, world: int) -> dict[str, Any]:
    return resume(shard(language_model()), FOLDER / "ddp")
