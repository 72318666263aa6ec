"""Embeddings that are looked up once for the whole batch."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opacus_ac.grad_sample import expand_broadcast_embeddings, register_rules
from opacus_ac.testing import per_sample_gradients

B, T, D = 3, 5, 4


class Positions(nn.Module):
    """Word plus position embeddings; the shape of the position ids is the case under test."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.words = nn.Embedding(11, D)
        self.positions = nn.Embedding(8, D)
        self.head = nn.Linear(D, 2)

    def forward(self, ids: Tensor, fail: bool = False) -> Tensor:
        if fail:
            raise RuntimeError("planted")
        where = torch.arange(ids.shape[1])
        if self.case == "[1, T]":
            where = where.unsqueeze(0)
        return self.head((self.words(ids) + self.positions(where)).tanh())


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(2).flatten(1).sum(1).mean()


def ids(batch: int = B, length: int = T) -> Tensor:
    return torch.randint(11, (batch, length))


@pytest.mark.parametrize("batch", [1, 2, B])
@pytest.mark.parametrize("case", ["[1, T]", "[T]"])
def test_positions_are_kept_apart(case: str, batch: int) -> None:
    model = Positions(case).double().train()
    x = ids(batch)
    want = per_sample_gradients(model, x, squares)
    register_rules(model)
    error, name = tiny_models.worst_error(tiny_models.hooks_gradients(model, x, squares), want)
    assert error < 1e-10, name
    if batch > 1:  # the control: Opacus alone takes the batch (or the positions) for the records
        wrapped = GradSampleModule(copy.deepcopy(model))
        squares(wrapped, x).backward()
        assert wrapped._module.positions.weight.grad_sample.shape[0] == (1 if case == "[1, T]" else T)


def test_functorch_copies_are_left_alone() -> None:
    """Opacus's functorch path copies a module with its hooks; there one record must stay one record."""

    class Squared(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).pow(2)

    model = Positions("[1, T]")
    model.positions = Squared(8, D)
    model = model.double().train()
    x = ids()
    want = per_sample_gradients(model, x, squares)
    register_rules(model)
    model_copy = copy.deepcopy(model)
    with expand_broadcast_embeddings(model_copy):
        squares(GradSampleModule(model_copy), x).backward()
    got = {n: p.grad_sample for n, p in model_copy.named_parameters()}
    assert tiny_models.worst_error(got, want)[0] < 1e-10


class Checkpointed(Positions):
    """Looks positions up inside a block that is recomputed in the backward pass, after the forward has ended."""

    def block(self, hidden: Tensor) -> Tensor:
        return (hidden + self.positions(torch.arange(hidden.shape[1]).unsqueeze(0))).tanh()

    def forward(self, ids: Tensor, fail: bool = False) -> Tensor:
        return self.head(checkpoint(self.block, self.words(ids), use_reentrant=True))


def test_a_recomputed_block_sees_the_batch() -> None:
    model = Checkpointed("").double().train()
    x = ids()
    register_rules(model)
    squares(model, x).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    got = tiny_models.hooks_gradients(model, x, squares)
    assert all(g.shape[0] == B for g in got.values())
    for name, gradient in want.items():
        torch.testing.assert_close(got[name].mean(0), gradient, rtol=1e-10, atol=1e-12)


def seen_shapes(model: Positions) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    model.positions.register_forward_pre_hook(lambda m, a: shapes.append(tuple(a[0].shape)))
    return shapes


def test_only_in_training_with_gradients_and_until_removed() -> None:
    model = Positions("[1, T]").train()
    handle = expand_broadcast_embeddings(model)
    shapes = seen_shapes(model)
    hooks = len(model.positions._forward_pre_hooks)
    model(ids())
    model.eval()(ids())
    with torch.no_grad():
        model.train()(ids())
    model.positions.weight.requires_grad_(False)
    model(ids())
    model.positions.weight.requires_grad_(True)
    handle.remove()
    handle.remove()
    model(ids())
    assert shapes == [(B, T), (1, T), (1, T), (1, T), (1, T)]
    assert len(model.positions._forward_pre_hooks) == hooks - 1
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_outputs_do_not_change() -> None:
    model = Positions("[1, T]").double().train()
    x = ids()
    plain = model(x)
    with expand_broadcast_embeddings(model):
        assert torch.equal(model(x), plain)


def test_an_exception_in_the_forward_forgets_the_batch() -> None:
    model = Positions("[1, T]").train()
    with expand_broadcast_embeddings(model) as handle:
        shapes = seen_shapes(model)
        with pytest.raises(RuntimeError, match="planted"):
            model(ids(), fail=True)
        assert handle._running == []
        model.positions(torch.arange(T).unsqueeze(0))  # outside of the model: left alone
        model(ids=ids(2))
    assert shapes == [(1, T), (2, T)]


class Nested(Positions):
    def forward(self, ids: Tensor, inner: Tensor | None = None) -> Tensor:
        if inner is not None:
            self(inner)
        return super().forward(ids)


def test_nested_calls_keep_their_own_batch() -> None:
    model = Nested("[1, T]").train()
    with expand_broadcast_embeddings(model):
        shapes = seen_shapes(model)
        model(ids(), inner=ids(2))
    assert shapes == [(2, T), (B, T)]


def test_ids_of_another_batch_are_left_alone() -> None:
    model = nn.Sequential(nn.Embedding(11, D)).train()
    seen = []
    model[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].shape))
    with expand_broadcast_embeddings(model):
        model(ids(2))
    assert seen == [(2, T)]


class OneIdEach(nn.Module):
    """One id per record, beside a feature matrix as wide as the batch: not positions."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(11, D)

    def forward(self, features: Tensor, item: Tensor) -> Tensor:
        return self.items(item) * features.sum(1, keepdim=True)


def test_one_id_per_record_is_not_a_position() -> None:
    model = OneIdEach().train()
    with expand_broadcast_embeddings(model):
        assert model(torch.ones(3, 7), torch.arange(3)).shape == (3, D)  # settles it for this embedding
        assert model(torch.ones(3, 3), torch.arange(3)).shape == (3, D)
    with expand_broadcast_embeddings(model):
        assert model(torch.ones(3, 3), torch.tensor([4, 4, 1])).shape == (3, D)
        with pytest.raises(ValueError, match="positions or records"):
            model(torch.ones(3, 3), torch.arange(3))


def test_positions_as_long_as_the_batch() -> None:
    model = Positions("[T]").train()
    with expand_broadcast_embeddings(model):
        with pytest.raises(ValueError, match="positions or records"):
            model(ids(T, T))
        model(ids(B, T))
        shapes = seen_shapes(model)
        model(ids(T, T))
    assert shapes == [(T, T)]


def test_a_tensor_inside_a_mapping_gives_the_batch() -> None:
    class Batched(Positions):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch["ids"])

    model = Batched("[1, T]").train()
    with expand_broadcast_embeddings(model):
        shapes = seen_shapes(model)
        model({"flag": torch.tensor(1.0), "ids": ids()})
    assert shapes == [(B, T)]
