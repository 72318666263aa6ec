"""Lookups of the same rows in every batch: the model's output stays, and each record's part of the gradient is its own."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Rows
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine

FEATURES, CODES, D = 4, 6, 3
BOUND = 0.5


class Codes(nn.Module):
    """A model with a table whose rows all records use."""

    def __init__(self, use, codes: int = CODES) -> None:
        super().__init__()
        self.use = use
        self.net, self.code, self.head = nn.Linear(FEATURES, D), nn.Embedding(codes, D), nn.Linear(D, 2)
        self.register_buffer("some", torch.tensor([4, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.net(x))


def everything(m: Codes) -> Tensor:
    return m.code(torch.arange(m.code.num_embeddings))


def logits(m: Codes, h: Tensor) -> Tensor:
    return h @ everything(m).mT


def distances(m: Codes, h: Tensor) -> Tensor:
    return -(h.unsqueeze(1) - everything(m).unsqueeze(0)).pow(2).sum(-1)


def scale(m: Codes, h: Tensor) -> Tensor:
    return h * everything(m).pow(2).sum()


def soft_choice(m: Codes, h: Tensor) -> Tensor:
    return m.head((h @ everything(m).mT).softmax(-1) @ everything(m))


def some_rows(m: Codes, h: Tensor) -> Tensor:
    return h @ m.code(m.some).mT


def rows_from_the_second(m: Codes, h: Tensor) -> Tensor:
    return m.head(h + m.code(torch.arange(1, m.code.num_embeddings)).mean(0))


USES = (logits, distances, scale, soft_choice, some_rows, rows_from_the_second)


def data(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"x": torch.randn(FEATURES, generator=generator, dtype=torch.float64), "y": torch.tensor(i % 2)}
        for i in range(count)
    ]


def loss(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def clipped_mean(model: nn.Module, rows) -> Tensor:
    total = 0.0
    for row in rows:
        gradients = torch.autograd.grad(loss(model, row["x"][None], row["y"][None]), list(model.parameters()),
                                        allow_unused=True, materialize_grads=True)  # fmt: skip
        flat = torch.cat([g.flatten() for g in gradients])
        total = total + flat * min(1.0, BOUND / float(flat.norm()))
    return total / len(rows)


def private(model, rows, mode="bk"):
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(Rows(rows), batch_size=len(rows)),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        clipping="flat",
        ema_decay=None,
        grad_sample_mode=mode,
    )


def step(model, optimizer, loader) -> Tensor:
    """Take a step; return by how much the weights moved."""
    bare = [p.detach().clone() for p in model.parameters()]
    for batch in loader:
        optimizer.zero_grad()
        loss(model, batch["x"], batch["y"]).backward()
        optimizer.step()
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(bare, model.parameters(), strict=True)])


def codes(use, count: int = CODES) -> Codes:
    torch.manual_seed(0)
    return Codes(use, count).double()


@pytest.mark.parametrize("records", [1, 2, 3, FEATURES, CODES, 2 * CODES])
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_each_record_has_its_own_part(use, records):
    model, rows = codes(use), data(records)
    want = clipped_mean(model, rows)
    torch.testing.assert_close(step(*private(model, rows)), want, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_as_many_codes_as_features(use):
    model, rows = codes(use, FEATURES + (use in (some_rows, rows_from_the_second))), data(3)
    want = clipped_mean(model, rows)
    torch.testing.assert_close(step(*private(model, rows)), want, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("mode", ["bk", "hooks"])
@pytest.mark.parametrize("count", [CODES, 5, 2])
@pytest.mark.parametrize("use", USES[:4], ids=lambda use: use.__name__)
def test_make_private_does_not_change_what_the_model_returns(use, count, mode):
    model, x = codes(use, count), torch.stack([row["x"] for row in data(5)])
    want = copy.deepcopy(model)(x)
    model, *_ = private(model, data(5), mode)
    torch.testing.assert_close(model(x), want)


class PerRecord(nn.Module):
    """Looks up one row for each record, whose numbers are in its features."""

    def __init__(self, through) -> None:
        super().__init__()
        self.table, self.net, self.through = nn.Embedding(CODES, D), nn.Linear(FEATURES, D), through

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.table(self.through(x))


LOOKUPS = {
    "in a row": lambda x: torch.arange(len(x)) if len(x) > 1 else x[:, 0].long(),
    "of the features": lambda x: x[:, 0].long(),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_rows_of_single_records_are_exact(name):
    """Row i of a lookup in a row meets record i, of whose gradient it is a part; alone, the record has it, too."""
    torch.manual_seed(0)
    model, rows = PerRecord(LOOKUPS[name]).double(), data(CODES)
    for i, row in enumerate(rows):
        row["x"][0] = i if name == "in a row" else (2 * i) % CODES
    want = clipped_mean(model, rows)
    torch.testing.assert_close(step(*private(model, rows)), want, rtol=1e-7, atol=1e-10)
