"""Users of several rows, models for them, and the loop over one user at a time that everything is compared with."""

from __future__ import annotations

import copy
from typing import Any

import tiny_models
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.integrations.finetune import UserCollate
from opacus_ac.loss import per_user_loss

MOST = 3
Row = dict[str, Tensor]
User = list[Row]


def user_of(rows: int, seed: int, scale: float = 1.0) -> User:
    """A user with ``rows`` rows of numbers ``[4]``, a class each."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (rows,), generator=generator)
    return [{"x": x[i], "y": y[i], "has": torch.tensor(True)} for i in range(rows)]


def number_users(counts=(1, 3, 2, 0, 3, 1)) -> list[User]:
    """Users of 0 to 3 rows; the last one has no labels."""
    made = [user_of(rows, seed=10 + i, scale=1 + i) for i, rows in enumerate(counts)]
    for row in made[-1]:
        row["has"] = torch.tensor(False)
    return made


def pad(users: list[User]) -> Row:
    """Collate users of numbers; rows that fill up are zeros without a label."""
    most = max([1, *map(len, users)])
    filling = {"x": torch.zeros(4, dtype=torch.float64), "y": torch.tensor(0), "has": torch.tensor(False)}
    rows = [row for own in users for row in (*own, *[filling] * (most - len(own)))]
    return {key: torch.stack([row[key] for row in rows]) for key in filling}


def token_users(counts=(1, 3, 2, 0, 1), length: int = 7) -> list[User]:
    """Users of token rows of different lengths; the last one has no labels, nor has a row of the second if that has three."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for rows in counts:
        own = []
        for i in range(rows):
            ids = torch.randint(3, tiny_models.VOCAB, (length - i,), generator=generator)
            ids[1] = ids[0]
            own.append({"input_ids": ids, "labels": ids.clone()})
        made.append(own)
    if counts[1] > 2:
        made[1][1]["labels"].fill_(-100)
    made[-1][0]["labels"].fill_(-100)
    return made


pad_tokens = UserCollate(0, 8, multiple=1)


def number_loss(model: nn.Module, batch: Row, users: Any) -> Tensor:
    """Mean over users of the loss of each; ``users`` counts them."""
    losses = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    return per_user_loss(losses, batch["has"], users(len(losses))).mean()


def token_loss(model: nn.Module, batch: Row, users: Any) -> Tensor:
    """What the model computes by itself."""
    return model(**batch).loss


def own_number_loss(model: nn.Module, rows: User) -> Tensor | None:
    """The loss of a user, from that user's rows alone, one by one."""
    losses = [nn.functional.cross_entropy(model(r["x"][None]), r["y"][None]) for r in rows if r["has"]]
    return torch.stack(losses).mean() if losses else None


def own_token_loss(model: nn.Module, rows: User) -> Tensor | None:
    losses = []
    for row in rows:
        if bool((row["labels"][1:] != -100).any()):
            logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
            losses.append(nn.functional.cross_entropy(logits, row["labels"][1:]))
    return torch.stack(losses).mean() if losses else None


def oracle(model: nn.Module, users: list[User], own_loss: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Norms ``[U]`` and gradients ``{name: [U, *shape]}`` by autograd, one user at a time."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = []
    for user in users:
        loss = own_loss(model, user)
        given = None if loss is None else torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if given is None or given[i] is None else given[i]
                     for i, p in enumerate(named.values())])  # fmt: skip
    found = {n: torch.stack([row[i] for row in rows]) for i, n in enumerate(named)}
    return torch.stack([g.flatten(1).square().sum(1) for g in found.values()]).sum(0).sqrt(), found


def private(
    model: nn.Module, users: Any, collate: Any, *, bound: float = 0.5, engine: Any = None, **changes: Any
) -> Any:
    """``make_private`` for users: every one is in every batch, no noise, SGD of rate 1; wrapped model, optimizer, loader."""
    options = {
        "noise_multiplier": 0.0, "max_grad_norm": bound, "clip_policy": "fixed", "lr_control": False, "ema_decay": None,
        "max_rows_per_user": MOST, **changes,
    }  # fmt: skip
    batches = DataLoader(users, batch_size=len(users), collate_fn=collate)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    engine = PrivacyEngine() if engine is None else engine
    return engine.make_private(module=model, optimizer=optimizer, data_loader=batches, **options)


def one_step(
    model: nn.Module, users: Any, collate: Any, loss_of: Any, **changes: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Norms ``[U]`` that a step saw, and the sum of clipped gradients that it released."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    wrapped, optimizer, loader = private(model, users, collate, **changes)
    norms, finish = [], optimizer.source.finish_batch
    optimizer.source.finish_batch = lambda: norms.append(finish()) or norms[-1]
    for batch in loader:
        optimizer.zero_grad()
        loss_of(wrapped, batch, loader.users.count).backward()
        optimizer.step()
    after = dict(model.named_parameters())
    mean = changes.get("loss_reduction", "mean") == "mean"
    return torch.cat(norms), {n: (p - after[n].detach()) * (len(users) if mean else 1) for n, p in before.items()}


def lora(model: str = "llama") -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base = tiny_models.build(model)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(base, config).double().train()


class Words(nn.Module):
    """An embedding that is used twice in a row, tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        ids = x.abs().mul(3).long() % 11
        return self.head(torch.tanh(self.scale(self.table(ids))) + self.table(ids.flip(1))).mean(1)[:, :3]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()


def words() -> nn.Module:
    torch.manual_seed(0)
    return Words().double()


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
