"""Collate functions that leave records out: the rest is a batch like any other, and a record left out is not counted."""

from __future__ import annotations

import pytest
import torch
from helpers import Rows
from torch import nn
from torch.utils.data import DataLoader, default_collate

from opacus_ac import PrivacyEngine

BOUND = 0.5


def rows(count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(count)]


def without_none(records):
    return default_collate([r for r in records if r is not None])


def short_enough(records):
    return {"x": default_collate([r for r in records if r is not None and r[0] < 0.5])}


def or_nothing(records):
    kept = [r for r in records if r is not None]
    return torch.stack(kept) if kept else torch.zeros(0, 4, dtype=torch.float64)


def or_none(records):
    kept = [r for r in records if r is not None]
    return torch.stack(kept) if kept else None


def filled(records):
    return torch.stack([torch.ones(4, dtype=torch.float64) if r is None else r for r in records])


def inputs_of(batch):
    return batch["x"] if isinstance(batch, dict) else batch


MIXED = [None, *rows(), None, None]
COLLATES = {
    "None is left out": (without_none, [r for r in MIXED if r is not None]),
    "rows are left out by content": (short_enough, [r for r in MIXED if r is not None and r[0] < 0.5]),
    "an empty batch where all are left out": (or_nothing, [r for r in MIXED if r is not None]),
    "None where all are left out": (or_none, [r for r in MIXED if r is not None]),
    "None is filled": (filled, list(filled(MIXED))),
}


def model_of() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 1, dtype=torch.float64)


def private(model, data, collate, batch_size, **options):
    settings = {"noise_multiplier": 0.0, "max_grad_norm": BOUND, "clipping": "flat", "ema_decay": None, **options}
    workers = settings.pop("num_workers", 0)
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(Rows(data), batch_size=batch_size, collate_fn=collate, num_workers=workers),
        **settings,
    )


def train(model, optimizer, loader) -> int:
    steps = 0
    for batch in loader:
        optimizer.zero_grad()
        model(inputs_of(batch)).exp().mean().backward()
        optimizer.step()
        steps += 1
    return steps


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", COLLATES)
def test_the_step_is_the_clipped_sum_of_the_records_that_are_in_the_batch(name, workers):
    collate, kept = COLLATES[name]
    if workers and name != "None is left out":
        pytest.skip("one collate function shows that workers tell how many records there are")
    model, want = model_of(), torch.zeros(5, dtype=torch.float64)
    for row in kept:
        gradients = torch.autograd.grad(model(row[None]).exp().mean(), list(model.parameters()))
        flat = torch.cat([g.flatten() for g in gradients])
        want += flat * min(1.0, BOUND / float(flat.norm()))
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    model, optimizer, loader = private(model, MIXED, collate, len(MIXED), num_workers=workers)
    assert train(model, optimizer, loader) == 1
    moved = before - nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(moved, want / len(MIXED), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["bk", "hooks"])
@pytest.mark.parametrize("name", COLLATES)
def test_a_batch_of_records_that_are_all_left_out_takes_the_step_of_an_empty_one(name, mode):
    collate, _ = COLLATES[name]
    data = [None, *rows(), *[None] * 31]
    model, optimizer, loader = private(model_of(), data, collate, 1, grad_sample_mode=mode)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    assert train(model, optimizer, loader) == len(data)  # about 80 % of the batches have no record that is kept
    assert optimizer.steps_taken == len(data)
    assert not torch.equal(before, nn.utils.parameters_to_vector(model.parameters()))


def joined(records):
    """Join two records to one row."""
    pairs = [sum(records[i : i + 2]) for i in range(0, len(records), 2)]
    return torch.stack(pairs)


def once_each(records):
    """Leave out a record that is in the batch already, so that a record's part depends on the others."""
    return torch.stack(list({tuple(r.tolist()): r for r in records}.values()))


@pytest.mark.parametrize(
    ("collate", "data"), [(joined, rows()), (once_each, [*rows(4), *rows(4)])], ids=["joined", "once each"]
)
def test_rows_that_depend_on_other_records_are_refused(collate, data):
    model, optimizer, loader = private(model_of(), data, collate, len(data))
    with pytest.raises(ValueError, match="fewer per-sample gradients than the loader's batch has records"):
        train(model, optimizer, loader)
    assert optimizer.steps_taken == 0


def test_a_failure_of_the_collate_function_is_raised():
    def broken(records):
        if len(records) > 4:
            raise RuntimeError("planted: too many rows")
        return torch.stack(records)

    model, optimizer, loader = private(model_of(), rows(), broken, 8)
    with pytest.raises(RuntimeError, match="planted"):
        train(model, optimizer, loader)
