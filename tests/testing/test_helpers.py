"""The helpers in ``opacus_ac.testing`` find what they are for."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from opacus_ac.loss import per_record_causal_lm_loss
from opacus_ac.testing import check_norms, check_records_independent, per_sample_gradients, select_records

Pair = namedtuple("Pair", ["x", "y"])


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(2).sum(1).mean()


def test_oracle_against_a_formula() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    grads = per_sample_gradients(model, x, squares)
    residual = 2 * model(x).detach()
    torch.testing.assert_close(grads["weight"], torch.einsum("bo,bi->boi", residual, x))
    torch.testing.assert_close(grads["bias"], residual)


def test_oracle_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    model[1].requires_grad_(False)
    model[0].weight.grad = torch.ones(2, 3)

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        return m[0](batch).sum()

    grads = per_sample_gradients(model, torch.randn(4, 3), loss)
    assert torch.equal(model[0].weight.grad, torch.ones(2, 3))
    assert model[0].bias.grad is None
    assert not model.training
    assert set(grads) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert torch.equal(grads["2.weight"], torch.zeros(4, 2, 2))  # not used by the loss


@pytest.mark.parametrize(
    "wrap",
    [lambda x, y: {"x": x, "y": y, "n": 3}, lambda x, y: (x, y), lambda x, y: [x, y], Pair],
    ids=["dict", "tuple", "list", "namedtuple"],
)
def test_batch_containers(wrap: Any) -> None:
    model, x, y = nn.Linear(3, 1), torch.randn(4, 3), torch.randn(4)

    def loss(m: nn.Module, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            assert batch["n"] == 3
            batch = (batch["x"], batch["y"])
        return F.mse_loss(m(batch[0]).squeeze(1), batch[1])

    want = per_sample_gradients(model, (x, y), loss)
    got = per_sample_gradients(model, wrap(x, y), loss)
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert type(select_records(wrap(x, y), torch.tensor([1]))) is type(wrap(x, y))


def test_oracle_edges() -> None:
    model = nn.Linear(3, 1)
    assert per_sample_gradients(model, torch.zeros(0, 3), squares)["weight"].shape == (0, 1, 3)
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        per_sample_gradients(model, (torch.zeros(2, 3), torch.zeros(3)), squares)
    with pytest.raises(ValueError, match="hooks"):
        per_sample_gradients(GradSampleModule(model), torch.zeros(2, 3), squares)


def test_check_norms() -> None:
    grads = {"a": torch.tensor([[3.0], [6.0]]), "b": torch.tensor([[[4.0]], [[8.0]]])}
    check_norms(grads, torch.tensor([5.0, 10.0]))
    check_norms(torch.tensor([5.0, 0.0]), torch.tensor([5.0, 0.0]))
    with pytest.raises(AssertionError, match="record 1 of 2: norm 10, expected 11"):
        check_norms(grads, torch.tensor([5.0, 11.0]))
    with pytest.raises(AssertionError, match="record 0 of 2: norm nan"):
        check_norms(torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0]))
    with pytest.raises(AssertionError, match="norms of"):
        check_norms(torch.ones(1), torch.ones(2))


def token_mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of transformers: a mean over the tokens of the batch, which couples records of different length."""
    return model(**batch).loss


def test_a_loss_normalised_by_the_batchs_tokens_is_caught() -> None:
    model = tiny_models.build("qwen2-tied")
    padded = tiny_models.token_batch(3, 5)
    check_records_independent(model, padded, tiny_models.mean_loss)
    check_records_independent(model, padded, tiny_models.record_losses)
    with pytest.raises(AssertionError, match=r"model\.embed_tokens\.weight: the gradient of record 0 depends"):
        check_records_independent(model, padded, token_mean_loss)
    # Records of one length hide it: the helper asks for different ones.
    check_records_independent(model, tiny_models.token_batch(3, 5, padded=False), token_mean_loss)


class Centred(nn.Module):
    """Subtracts the batch mean."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y - y.mean(0, keepdim=True).detach() / 2


@pytest.mark.parametrize("per_record", [True, False])
def test_a_model_that_couples_records_is_caught(per_record: bool) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        losses = model(batch).pow(2).sum(1)
        return losses if per_record else losses.mean()

    x = torch.randn(3, 3)
    check_records_independent(nn.Linear(3, 2), x, loss)
    with pytest.raises(AssertionError, match=r"linear\.weight"):
        check_records_independent(Centred(), x, loss)


def mean_classification(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(1), batch[1])


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(2), nn.SyncBatchNorm(2)], ids=lambda n: type(n).__name__
)
def test_batch_normalisation_is_caught(norm: nn.Module) -> None:
    """With one value per channel and record, a record alone cannot even be normalised."""
    x = torch.randn(3, 4) if isinstance(norm, nn.BatchNorm1d) else torch.randn(3, 2, 2, 1)
    model = nn.Sequential(nn.Linear(x.shape[-1], x.shape[-1]), norm).train()
    batch = (x, torch.tensor([0, 1, 2]))
    alone = "cannot be computed without" if isinstance(norm, nn.BatchNorm1d) else "depends on the other records"
    with pytest.raises(AssertionError, match=alone):
        check_records_independent(model, batch, mean_classification)
    model[1] = nn.GroupNorm(1, x.shape[1])
    check_records_independent(model, batch, mean_classification)


def test_an_error_of_the_loss_itself_stays_what_it_is() -> None:
    def broken(model: nn.Module, batch: Tensor) -> Tensor:
        raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="my own mistake"):
        check_records_independent(nn.Linear(3, 2), torch.randn(3, 3), broken)


@pytest.mark.parametrize("per_record", [True, False])
def test_in_batch_negatives_are_caught(per_record: bool) -> None:
    """A contrastive loss compares each record with the others; with fixed negatives it does not."""
    model, negatives = nn.Linear(3, 4), torch.randn(5, 4)
    pairs = Pair(torch.randn(3, 3), torch.randn(3, 3))

    def contrastive(model: nn.Module, batch: Pair) -> Tensor:
        logits = model(batch.x) @ model(batch.y).T
        losses = F.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
        return losses if per_record else losses.mean()

    def against_fixed(model: nn.Module, batch: Pair) -> Tensor:
        anchors, positives = model(batch.x), model(batch.y)
        logits = torch.cat([(anchors * positives).sum(1, keepdim=True), anchors @ negatives.T], 1)
        losses = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none")
        return losses if per_record else losses.mean()

    check_records_independent(model, pairs, against_fixed)
    with pytest.raises(AssertionError, match="record 0 depends on the other records"):
        check_records_independent(model, pairs, contrastive)


@pytest.mark.parametrize("balanced", [True, False])
def test_load_balancing_of_experts_is_caught(balanced: bool) -> None:
    """The router's auxiliary loss is a product of two means over the tokens of the batch."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=tiny_models.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, num_local_experts=3, output_router_logits=balanced,
        router_aux_loss_coef=0.1, use_cache=False, pad_token_id=None, experts_implementation="eager",
    )  # fmt: skip
    model = MixtralForCausalLM(config).double()
    batch = tiny_models.token_batch(3, 5, padded=False)  # of one length, so that the token mean couples nothing
    if balanced:
        with pytest.raises(AssertionError, match="depends on the other records"):
            check_records_independent(model, batch, token_mean_loss)
    else:
        check_records_independent(model, batch, token_mean_loss)


@pytest.mark.parametrize("name", ["qwen2-tied", "llama"])
def test_a_proper_causal_model_passes(name: str) -> None:
    model = tiny_models.build(name)
    batch = tiny_models.token_batch(4, 6)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return per_record_causal_lm_loss(logits, batch["labels"])

    check_records_independent(model, batch, loss)
    check_records_independent(model, batch, lambda m, b: loss(m, b).mean())


def test_reduction() -> None:
    def total(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).pow(2).sum()

    x = torch.randn(3, 3)
    check_records_independent(nn.Linear(3, 2), x, total, loss_reduction="sum")
    with pytest.raises(AssertionError, match="weight"):
        check_records_independent(nn.Linear(3, 2), x, total)
    with pytest.raises(ValueError, match="loss_reduction"):
        check_records_independent(nn.Linear(3, 2), x, total, loss_reduction="none")
    with pytest.raises(ValueError, match="two records"):
        check_records_independent(nn.Linear(3, 2), x[:1], total)
