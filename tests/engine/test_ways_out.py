"""Loops that are refused: the message names the reason and a way out, and the way out trains."""

from __future__ import annotations

import pytest
import torch
from helpers import Rows
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from opacus_ac import PrivacyEngine

cross_entropy = nn.functional.cross_entropy


def rows(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(4, generator=generator), "y": torch.tensor(i % 2)} for i in range(count)]


# Public rows are more than the records: no draw has as many as they are, which another check refuses first.
DATA, PUBLIC = Rows(rows(24)), Rows(rows(25, seed=1))
PUBLIC_X, PUBLIC_Y = torch.stack([r["x"] for r in PUBLIC.rows]), torch.stack([r["y"] for r in PUBLIC.rows])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def run(loss_of, data=DATA, *, decay=0.0, parts=False, again=False, engine=None, **options) -> int:
    """Train a pass with a loss; return how many steps were taken."""
    model, engine = net(), engine or PrivacyEngine()
    groups = [{"params": part.parameters()} for part in (model[0], model[2])] if parts else model.parameters()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(groups, lr=0.1, weight_decay=decay),
        data_loader=DataLoader(data, batch_size=8, collate_fn=options.pop("collate_fn", None)),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )
    for batch in loader:
        optimizer.zero_grad()
        for _ in range(1 + again):
            loss_of(model, batch["x"], batch["y"]).backward()
        optimizer.step()
    return int(optimizer.steps_taken)


def plain(model, x, y):
    return cross_entropy(model(x), y)


def twice(model, x, y):
    return plain(model, x, y) + plain(model, x, y)


def l2(model, x, y):
    return plain(model, x, y) + 0.01 * sum(p.pow(2).sum() for p in model.parameters())


def proximal(model, x, y):
    return plain(model, x, y) + 0.01 * sum((p - 1).pow(2).sum() for p in model[2].parameters())


def public_beside(model, x, y):
    return plain(model, x, y) + plain(model, PUBLIC_X, PUBLIC_Y)


def public_among(model, x, y):
    return plain(model, torch.cat([x, PUBLIC_X]), torch.cat([y, PUBLIC_Y]))


def pairs_joined(model, x, y):
    one, other = model(torch.cat([x, -x])).chunk(2)
    return (one - other).pow(2).sum(1).mean()


def pairs_as_items(items):
    """Put the two rows of a record one after the other."""
    return {"x": torch.stack([row for r in items for row in (r["x"], -r["x"])]),
            "y": torch.stack([r["y"] for r in items for _ in range(2)])}  # fmt: skip


def of_pairs(model, x, y):
    one, other = model(x).unflatten(0, (-1, 2)).unbind(1)
    return (one - other).pow(2).sum(1).mean()


def slope(model, x, y):
    point = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(point).sum(), point, create_graph=True)
    return plain(model, x, y) + found.pow(2).sum(1).mean()


def slope_by_difference(model, x, y, step=1e-2):
    way = nn.functional.normalize(torch.ones_like(x), dim=1)
    return plain(model, x, y) + ((model(x + step * way) - model(x)) / step).pow(2).sum(1).mean()


def two_optimizers() -> None:
    model, engine = net(), PrivacyEngine()
    for part in (model[0], model[2]):
        engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(part.parameters(), lr=0.1),
            data_loader=DataLoader(DATA, batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


LOOPS = {  # what is refused, what the message says, and the way out
    "L2 term": (lambda: run(l2), "penalizes the parameters.*weight_decay", lambda: run(plain, decay=0.02)),
    "proximal term": (lambda: run(proximal), "proximal term.*weight_decay", lambda: run(plain, decay=0.02)),
    "public rows in a second forward pass": (
        lambda: run(public_beside), r"forward passes of .* went into one backward pass.*add them to the dataset",
        lambda: run(plain, ConcatDataset([DATA, PUBLIC])),
    ),
    "public rows beside the records": (
        lambda: run(public_among), "more rows .* than the loader's batch has records.*add them to the dataset",
        lambda: run(plain, ConcatDataset([DATA, PUBLIC])),
    ),
    "pairs of rows": (
        lambda: run(pairs_joined), "Several rows of one record.*max_rows_per_user",
        lambda: run(of_pairs, collate_fn=pairs_as_items, max_rows_per_user=2),
    ),
    "a loss after another": (
        lambda: run(plain, again=True), "several backward passes.*add up the losses", lambda: run(twice),
    ),
    "a penalty on gradients": (
        lambda: run(slope), "two backward passes.*differences of the model's outputs", lambda: run(slope_by_difference),
    ),
    "two optimizers": (two_optimizers, "one optimizer that has a param group", lambda: run(plain, parts=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_a_refusal_says_the_way_out_and_the_way_out_trains(name):
    refused, words, way_out = LOOPS[name]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        refused()
    assert way_out() >= 3
