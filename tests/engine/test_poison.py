"""Poisonous records: whatever one record does to its own loss or gradient, the others train on and the bound holds."""

import math

import pytest
import torch
from helpers import classifier, loader, loss_of
from hypothesis import given, settings
from hypothesis import strategies as st
from noiseless import engine_for, released
from tiny_models import build, record_losses, token_batch
from torch import nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.clipping import POLICIES

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")
MODES = ["bk", "hooks", "functorch"]


def select(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def spoilt_labels(batch):
    batch["labels"][1] = -100


def empty_sequence(batch):
    batch["labels"][1] = -100
    batch["attention_mask"][1] = 0


WEIGHTS = {
    "NaN": math.nan,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "1e30": 1e30,
    "1e38": 1e38,
    "-1e30": -1e30,
    "1e-30": 1e-30,
}
SEQUENCES = {"all labels masked": spoilt_labels, "empty sequence": empty_sequence}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*WEIGHTS, *SEQUENCES])
def test_one_poisonous_record_of_a_language_model(mode, name):
    """The release moves by at most the sensitivity, stays finite, and is the release of the others where it is dropped."""
    model = build("qwen2-tied", dtype=torch.float32)
    wrapped, optimizer = engine_for(model, 4, mode, loss_bound=5.0)
    batch = token_batch(4, 7)
    if name in SEQUENCES:
        SEQUENCES[name](batch)

    def losses(rows):
        from opacus_ac.loss import per_record_causal_lm_loss

        part = select(batch, rows)
        logits = wrapped(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
        weights = torch.tensor([WEIGHTS.get(name, 1.0) if row == 1 else 1.0 for row in rows])
        return per_record_causal_lm_loss(logits, part["labels"]) * weights

    everybody, others = released(optimizer, losses([0, 1, 2, 3])), released(optimizer, losses([0, 2, 3]))
    assert bool(torch.isfinite(everybody).all())
    moved = float((everybody - others).norm())
    assert moved <= optimizer.statistics.sensitivity * (1 + 1e-4)
    dropped = not math.isfinite(WEIGHTS.get(name, 1.0)) or name in SEQUENCES
    if dropped:
        gradients = sum(p.numel() for p in optimizer.params)
        torch.testing.assert_close(everybody[:gradients], others[:gradients], rtol=1e-4, atol=1e-6)
    if name in ("NaN", "infinite", "minus infinite"):
        assert optimizer.private_nonfinite_records == 1
    elif name in (*SEQUENCES, "1e-30"):
        assert optimizer.private_nonfinite_records == 0  # huge weights may overflow on the way, or be clipped


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on(mode):
    """A dataset with poison in it: 16 noisy steps, finite weights, and no count of it in what is released or saved."""
    data = loader(64, 16).dataset
    data.tensors[0][3] = math.nan
    data.tensors[0][7] = 1e200
    data.tensors[0][11] = -math.inf
    model = classifier()
    wrapped, optimizer, batches = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        data_loader=DataLoader(data, batch_size=32),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        loss_bound=3.0,
        grad_sample_mode=mode,
    )
    for _ in range(8):
        for batch in batches:
            optimizer.zero_grad()
            losses = loss_of(wrapped, batch, "none")
            losses.mean().backward()
            optimizer.record_losses(losses)
            optimizer.step()
            assert math.isfinite(optimizer.released.loss)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert optimizer.private_nonfinite_records > 2  # two such records, half of 16 steps each
    text = f"{optimizer.released} {sorted(optimizer.state_dict()['opacus_ac'])}"
    assert "nonfinite" not in text


def test_masked_losses_are_clipped_to_the_public_bound():
    """An infinite loss moves the released loss by at most its bound, and does not decide anything."""
    model = classifier()
    _, optimizer = engine_for(model, 2, loss_bound=3.0)
    batch = (torch.zeros(2, 4, dtype=torch.float64), torch.tensor([0, 1]))
    losses = loss_of(model, batch, "none")
    losses.sum().backward()
    optimizer.record_losses(torch.tensor([math.inf, -5.0]))
    optimizer.clip_and_accumulate()
    assert optimizer.statistics.vector()[-1] == pytest.approx(optimizer.statistics.loss_weight)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_grad_scaler_is_refused_before_it_decides_anything(mode, unscale):
    """It skips the steps whose gradients overflow: an outcome that depends on private data, without noise."""
    model = classifier()
    wrapped, optimizer = engine_for(model, 16, mode)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(wrapped, next(iter(loader(16, 16))))).backward()
    with pytest.raises(ValueError, match="bfloat16 autocast"):
        scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.steps_taken == 0


def test_a_disabled_grad_scaler_changes_nothing():
    model = classifier()
    _, optimizer = engine_for(model, 16)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(model, next(iter(loader(16, 16))))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.steps_taken == 1


# ------------------------------------------------------------------ any record, through the whole of a mode


finite = st.floats(-1e6, 1e6, width=32)
extreme = st.one_of(finite, st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e-30, 1e-20, 1e20, 3e38]))
row = st.lists(extreme, min_size=3, max_size=3)


class Shared(nn.Module):
    """One weight that is an embedding and a head, with a bias; the loss of a record is any multiple of its logits."""

    def __init__(self):
        super().__init__()
        self.inputs, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.tokens = nn.Embedding(3, 4)
        self.head.weight = self.tokens.weight

    def forward(self, features, ids):
        return self.head(self.inputs(features).unsqueeze(1) + self.tokens(ids))


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "raw_percentile"])
@pytest.mark.parametrize("mode", ["bk", "hooks"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=3),
    extra=row,
    ids=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    weight=extreme,
)
def test_one_record_moves_the_release_of_a_mode_by_at_most_the_sensitivity(mode, policy, batch, extra, ids, weight):
    """Tied weights in float32, inputs and loss weights up to overflow: from the model's forward pass to the release."""
    torch.manual_seed(0)
    model = Shared()
    wrapped, optimizer = engine_for(model, 4, mode, clip_policy=policy)

    def losses(rows, last):
        features = torch.tensor(rows, dtype=torch.float32)
        tokens = torch.tensor(ids).repeat(len(rows), 1)
        logits = wrapped(features, tokens)
        weights = torch.ones(len(rows))
        if last:
            weights[-1] = weight
        return logits.sum((1, 2)) * weights

    everybody = released(optimizer, losses([*batch, extra], True))
    others = released(optimizer, losses(batch, False))
    assert bool(torch.isfinite(everybody).all())
    assert float((everybody - others).norm()) <= optimizer.statistics.sensitivity * (1 + 1e-4)


def test_the_battery_trips_when_a_mode_lets_a_record_through_unclipped(monkeypatch):
    """Planted: norms that are half of what they are."""
    from opacus_ac.grad_sample.one_backward.source import BookKeepingSource

    whole = BookKeepingSource.finish_batch
    monkeypatch.setattr(BookKeepingSource, "finish_batch", lambda self: whole(self) / 2)
    torch.manual_seed(0)
    model = Shared()
    _, optimizer = engine_for(model, 4)
    losses = model(torch.full((1, 3), 100.0), torch.tensor([[0, 1, 2, 2]])).sum((1, 2))
    assert float(released(optimizer, losses).norm()) > 1.9 * optimizer.statistics.sensitivity


def test_language_model_losses_agree_with_the_reference():
    """The losses that the poison is planted in are those of the parity tests."""
    from opacus_ac.loss import per_record_causal_lm_loss

    model, batch = build("qwen2-tied"), token_batch(3, 6)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(per_record_causal_lm_loss(logits, batch["labels"]), record_losses(model, batch))
