"""What a ``PrivateTrainer`` says of its run beside the privacy report: public settings, and paths of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from opacus_ac._version import __version__
from opacus_ac.integrations.trained.base import portable_name
from opacus_ac.integrations.trainer.inner import with_planned_momentum


def run_settings(trainer: Any) -> dict[str, Any]:
    """Return the public settings of a run, for the files that may be published with the model.

    Args:
        trainer: the ``PrivateTrainer``.

    Guarantees:
        All values are arguments of the run, sizes of the model, or versions. None follows from a record.
    """
    model, privacy = trainer.model, trainer.privacy
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return {
        "base_model": portable_name(base_path(model)),
        "adapters": hasattr(model, "peft_config"),
        "trained": _trained(model, everything=trained == total),
        "trained_weights": trained,
        "weights": total,
        "saved_weights": "averaged" if trainer.saves_average else "last",
        "target_epsilon": privacy.target_epsilon,
        "delta": privacy.target_delta,
        "planned_steps": trainer._planned_steps(),
        "max_length": getattr(trainer.train_dataset, "max_length", None),
        "training": dict(_training(trainer)),
        "versions": {"opacus_ac": __version__, **_versions("torch", "transformers", "peft")},
    }


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _training(trainer: Any) -> Iterator[tuple[str, Any]]:
    """Yield the settings of the training that a reader of the card wants to know."""
    privacy = trainer.privacy
    args = with_planned_momentum(trainer.args, privacy, trainer._planned_steps())
    rate = f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}"
    optim = f"{getattr(args.optim, 'value', args.optim)}, betas {args.adam_beta1:g} and {args.adam_beta2:g}"
    if privacy.auto_learning_rate:
        rate, optim = f"found from releases, from the hint {rate}", f"AutoAdam, beta1 {args.adam_beta1:g}"
    yield "learning_rate", rate
    yield "optimizer", f"{optim}, weight decay {args.weight_decay:g}"
    yield "expected_batch", trainer.expected_batch_size
    yield "planned_steps", trainer._planned_steps()
    yield "tokens_per_record_at_most", getattr(trainer.train_dataset, "max_length", None)
    yield "gradients", f"mode {privacy.grad_sample_mode}, clipping {privacy.clipping}"


def _trained(model: Any, *, everything: bool) -> str:
    """Say in words what is trained."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    found = []
    for config in configs.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type)).replace("LORA", "LoRA")
        rank, targets = getattr(config, "r", None), getattr(config, "target_modules", None)
        where = "" if targets is None else f" on {targets if isinstance(targets, str) else ', '.join(sorted(targets))}"
        found.append(f"{kind} adapters" + ("" if rank is None else f" of rank {rank}") + where)
    if found:
        return "; ".join(found)
    return "all weights" if everything else "some of the weights"


def base_path(model: Any) -> str | None:
    """Return where the base model was loaded from; None for a model that was not loaded."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return getattr(inner, "name_or_path", None) or None


def local_paths(trainer: Any, beside: Mapping[str, str | None]) -> dict[str, str]:
    """Return paths of this machine that commands on the run need; they are not published.

    Args:
        trainer: the ``PrivateTrainer``.
        beside: further entries.
    """
    base, ledger = base_path(trainer.model), trainer.privacy.ledger
    found = {
        "base_model": str(Path(base).resolve()) if base is not None and os.path.isdir(base) else None,
        "ledger": None if ledger is None else str(Path(ledger).resolve()),
        **beside,
    }
    return {name: value for name, value in found.items() if value is not None}


def held_out_losses(trainer: Any) -> list[str]:
    """Return the losses of the last evaluation on public data, in words."""
    entries = [e for e in trainer.state.log_history if any(str(k).startswith("eval_") for k in e)]
    last = entries[-1] if entries else {}
    return [
        f"{name.removesuffix('_loss').removeprefix('eval').strip('_') or 'loss'}: {value:.3f}"
        for name, value in last.items()
        if name.startswith("eval_") and name.endswith("loss") and isinstance(value, float)
    ]
