"""Embeddings with a forward of their own in mode "bk": what they look up, and what they do to the rows."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_ac.grad_sample import check_model, register_rules
from opacus_ac.testing import check_norms, one_backward, per_sample_gradients, worst_error

ROWS, WIDTH, PADDING = 9, 4, 0
IDS = torch.tensor([[0, 3, 3, 5, 8], [1, 0, 2, 7, 7], [4, 4, 4, 4, 0]])


class Squared(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) ** 2


class Normed(nn.Embedding):
    """Holds a norm with a weight of its own, as that of Inkling does."""

    def __init__(self, *sizes: int, **options: int) -> None:
        super().__init__(*sizes, **options)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(super().forward(ids))


class Two(nn.Embedding):
    """Looks up the tokens and those before them."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * super().forward(ids.roll(1, -1))


class ByIndex(nn.Embedding):
    """Takes rows by an index, which padding_idx does not change."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].tanh()


class Unpadded(nn.Embedding):
    """Ignores its own padding_idx."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).sin()


class Misnamed(nn.Embedding):
    """Has a scale that is used elsewhere."""

    embed_scale = 7.0

    def forward(self, ids: Tensor, shift: int = 0) -> Tensor:
        return super().forward(ids + shift)


class Mixed(nn.Embedding):
    """Adds a mean over the record to each of its rows."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return rows.tanh() + rows.mean(1, keepdim=True)


class Positions(Normed):
    """Is called with tokens, and looks up as many positions, once for all records."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.arange(ids.shape[1])[None])


class Counting(Squared):
    """Keeps the ids of the last call as an attribute."""

    last = None

    def forward(self, ids: Tensor) -> Tensor:
        self.last = ids.clone()
        return super().forward(ids)


class WithIds(nn.Embedding):
    """Returns the ids beside the rows, as the positions of ProphetNet do."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(ids).sin(), ids


class Around(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.tokens, self.embedding, self.head = nn.Embedding(ROWS, WIDTH), embedding, nn.Linear(WIDTH, 2)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.embedding(ids)
        return self.head(self.tokens(ids) + (sum(rows[:-1]) if isinstance(rows, tuple) else rows)).tanh()


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return (model(ids) * torch.arange(1.0, 6.0)[None, :, None]).square().sum((1, 2)).mean()


def around(kind: Callable[..., nn.Embedding]) -> nn.Module:
    torch.manual_seed(0)
    model = Around(kind(ROWS, WIDTH, padding_idx=PADDING)).double().train()
    nn.init.normal_(model.embedding.weight)
    register_rules(model)
    return model


@pytest.mark.parametrize(
    "kind",
    [Squared, Normed, Two, ByIndex, Unpadded, Misnamed, Mixed, Positions, Counting, WithIds],
    ids=lambda k: k.__name__,
)
def test_records_are_those_of_the_loop(kind: Callable[..., nn.Embedding]) -> None:
    model = around(kind)
    check_model(model, mode="bk")
    want = per_sample_gradients(copy.deepcopy(model), IDS, loss)
    norms, sums = one_backward(model, IDS, loss)
    check_norms(norms, want, rtol=1e-9)
    assert worst_error(sums, {n: w.sum(0) for n, w in want.items()})[0] < 1e-9
    assert (want["embedding.weight"][:, PADDING].abs().max() > 0) == (kind in (ByIndex, Unpadded))


class Product(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) @ self.weight.T @ self.weight


class Doubled(nn.Embedding):
    """Returns plain rows of another table than its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight * 2)


class Random(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.dropout(super().forward(ids), 0.5, self.training)


class Several(nn.Embedding):
    """Returns two functions of the rows, and the ids."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = super().forward(ids)
        return rows.sin(), rows.cos(), ids


class Spread(nn.Embedding):
    """Looks up one row for each record, and returns several."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids[:, 0])[:, None].expand(-1, ids.shape[1], -1) * 2.0


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Product, "its forward uses its weight otherwise than by lookups"),
        (Doubled, "its forward does not look up rows of its weight"),
        (Random, "run again it does not return what it returned in the forward pass: it is random"),
        (Several, "its forward returns 2 tensors that gradients come back to"),
        (Spread, "its output does not have a place for each row that is looked up"),
    ],
)
def test_what_is_not_known_is_refused(kind: Callable[..., nn.Embedding], reason: str) -> None:
    model = around(kind)
    with pytest.raises(ValueError, match=rf"embedding \({kind.__name__}\) is an embedding that no rule fits: {reason}"):
        one_backward(model, IDS, loss)
    model.embedding.requires_grad_(False)  # the way out of the message
    want = per_sample_gradients(copy.deepcopy(model), IDS, loss) if kind is not Random else None
    norms, _ = one_backward(model, IDS, loss)
    if want is not None:
        check_norms(norms, want, rtol=1e-9)
