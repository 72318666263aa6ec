"""transformers models through make_private: the loss of a record is its own, and the whole path equals the loop."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from opacus_ac import PrivacyEngine
from opacus_ac.loss import per_record_causal_lm_loss, per_record_token_loss
from opacus_ac.models.transformers import use_record_loss
from opacus_ac.optimizer.loss_tape import LossTape
from opacus_ac.testing import check_records_independent, per_sample_gradients

TINY = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip


def qwen(**kwargs):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TINY, use_cache=False, **kwargs)).double().train()


def records(n=6, length=9):
    generator = torch.Generator().manual_seed(2)
    rows = []
    for i in range(n):
        ids = torch.randint(0, 50, (length,), generator=generator)
        mask = (torch.arange(length) < length - i).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)})
    return rows


def batch(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def model_loss(model, inputs):
    return model(**inputs).loss


def test_library_loss_couples_records_and_ours_does_not():
    model = qwen(tie_word_embeddings=True)
    with pytest.raises(AssertionError):
        check_records_independent(model, batch(records()), model_loss)
    undo = use_record_loss(model, LossTape())
    check_records_independent(model, batch(records()), model_loss)
    undo()
    assert "_loss_function" not in model.__dict__
    with pytest.raises(AssertionError):
        check_records_independent(model, batch(records()), model_loss)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_is_the_mean_over_records_of_their_own_means(reduction):
    model, tape, inputs = qwen(), LossTape(), batch(records())
    use_record_loss(model, tape, reduction)
    output = model(**inputs, num_items_in_batch=3)
    alone = torch.stack([per_record_causal_lm_loss(model(**{k: v[i : i + 1] for k, v in inputs.items() if k != "labels"}).logits,
                                                   inputs["labels"][i : i + 1])[0] for i in range(6)])  # fmt: skip
    torch.testing.assert_close(output.loss, getattr(alone, reduction)(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(tape.take(), alone.detach(), rtol=1e-6, atol=1e-7)
    assert tape.take() is None


def test_evaluation_records_nothing():
    model, tape, inputs = qwen(), LossTape(), batch(records())
    use_record_loss(model, tape)
    with torch.no_grad():
        model(**inputs)
    model.eval()
    model(**inputs)
    assert tape.take() is None


def test_router_loss_is_refused():
    config = Qwen3MoeConfig(
        **TINY, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, head_dim=8, output_router_logits=True
    )
    with pytest.raises(ValueError, match="router"):
        use_record_loss(Qwen3MoeForCausalLM(config), LossTape())


@pytest.mark.parametrize("shape", [((2, 3, 4), (2, 4)), ((2, 3), (2, 3))])
def test_loss_shapes_are_checked(shape):
    with pytest.raises(ValueError, match=r"\[B, T, V\]"):
        per_record_token_loss(torch.zeros(shape[0]), torch.zeros(shape[1], dtype=torch.long))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("split", [None, 2])
def test_one_step_equals_clipping_the_loop(tied, split):
    """Tied and untied Qwen2, float64, `.loss` of the model: the released gradient against a loop of batch size 1."""
    model, oracle = qwen(tie_word_embeddings=tied), qwen(tie_word_embeddings=tied)
    engine = PrivacyEngine()
    wrapped, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=DataLoader(records(), batch_size=6),
        noise_multiplier=0.0, max_grad_norm=0.5, clip_policy="fixed", max_physical_batch_size=split, loss_bound=10.0,
    )  # fmt: skip
    for inputs in loader:
        optimizer.zero_grad()
        wrapped(**inputs).loss.backward()
        optimizer.step()
    inputs = batch(records())
    use_record_loss(oracle, LossTape())
    gradients = per_sample_gradients(oracle, inputs, model_loss)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    factors = (0.5 / norms).clamp(max=1)
    for name, parameter in model.named_parameters():
        wanted = torch.einsum("i,i...->...", factors, gradients[name]) / 6
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-6, atol=1e-8)  # Qwen2RMSNorm works in float32
    oracle_losses = per_record_causal_lm_loss(
        oracle(**{k: v for k, v in inputs.items() if k != "labels"}).logits, inputs["labels"]
    )
    assert optimizer.released.loss == pytest.approx(float(oracle_losses.detach().mean()), rel=1e-6)
    engine.detach(wrapped)
    assert "_loss_function" not in model.__dict__


def test_dictionary_batches_survive_the_empty_draw():
    """One record, rate 0.1 through many draws: attention models cannot run on zero records."""
    model = qwen().float()
    rows = records(10)
    wrapped, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.AdamW(model.parameters()), data_loader=DataLoader(rows, batch_size=1),
        noise_multiplier=1.0, max_grad_norm=1.0, noise_generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    empty = 0
    for inputs in loader:
        empty += loader.plan.current().records == 0
        optimizer.zero_grad()
        wrapped(**inputs).loss.backward()
        optimizer.step()
    assert empty
    assert optimizer.steps_taken == 10
    assert all(torch.isfinite(p).all() for p in model.parameters())
