"""Blocks that are run again as a whole: experts in a way of their own, parameters that a module returns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import Rows
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, RECORDS = 24, 6, 4
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": VOCAB, "max_position_embeddings": 16, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts_per_tok": 2, "num_local_experts": 3,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "gpt_neox_japanese": {"attention_dropout": 0.0, "hidden_dropout": 0.0},
    "llama4_text": {"intermediate_size_mlp": 12, "moe_layers": [1], "attention_chunk_size": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 12, "moe_top_k": 2},
        "d_model": 16, "n_heads": 2, "n_layers": 1,
    },
    "longcat_flash": {
        "ffn_hidden_size": 12, "expert_ffn_hidden_size": 8, "n_routed_experts": 3, "zero_expert_num": 1, "moe_topk": 2,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
        "num_layers": 1, "head_dim": 4,
    },
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 2},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "apertus": {},
}  # fmt: skip


def causal(kind: str) -> nn.Module:
    cls = transformers.CONFIG_MAPPING[kind]
    known = cls()
    values = {k: v for k, v in {**SMALL, **KINDS[kind]}.items() if hasattr(known, k) or k in cls.attribute_map}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(cls(**values), attn_implementation="eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others have no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.abs().max() > 1e-3:  # zeros, and memory that nobody filled
                parameter.normal_(0, 0.02)
    return model.double().train()


def tokens() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (RECORDS, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in ids]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    returned = model(**batch)
    return returned if isinstance(returned, Tensor) else returned.loss


def clipped_mean(model: nn.Module, rows: list[dict[str, Tensor]], bound: float) -> Tensor:
    total = 0.0
    for row in rows:
        batch = {key: value[None] for key, value in row.items()}
        gradients = torch.autograd.grad(
            loss(model, batch), list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        flat = torch.cat([g.flatten() for g in gradients])
        total = total + flat * min(1.0, bound / float(flat.norm()))
    return total / len(rows)


def step(model: nn.Module, rows: list[dict[str, Tensor]], bound: float) -> Tensor:
    model, optimizer, batches = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(Rows(rows), batch_size=len(rows)),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        clipping="flat",
        ema_decay=None,
    )
    before = [p.detach().clone() for p in model.parameters()]
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)])


def check(model: nn.Module, rows: list[dict[str, Tensor]]) -> None:
    want = clipped_mean(copy.deepcopy(model), rows, 0.3)
    # Some models compute routers, losses or rotations in float32.
    torch.testing.assert_close(step(model, rows, 0.3), want, rtol=1e-4, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_language_models_of_transformers(kind: str) -> None:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    check(causal(kind), tokens())


# ---------------------------------------------------------------- blocks of one's own

D, EXPERTS = 6, 3


class Stack(nn.Module):
    """Experts that get each token once for every expert, one expert after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, D, D) / D)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.bmm(rows.view(EXPERTS, -1, D), self.weight).tanh().reshape(-1, D)


class Repeating(nn.Module):
    """Hands its tokens to all experts, and returns ``[B T, d]`` beside the scores ``[B T, E]``."""

    def __init__(self, used: bool = False) -> None:
        super().__init__()
        self.experts, self.router, self.used = Stack(), nn.Linear(D, EXPERTS), used

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, D)
        scores = self.router(rows).softmax(-1)
        out = self.experts(rows.repeat(EXPERTS, 1) * scores.T.reshape(-1, 1))
        return out.reshape(EXPERTS, -1, D).sum(0), scores


class Unfolded(Repeating):
    """Returns ``[B, T, d]`` beside the scores ``[B T, E]``."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, scores = super().forward(x)
        return out.view_as(x), scores


class Methods(nn.Module):
    """Experts that are never called: the module around them uses their methods."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.bias = Stack(), nn.Parameter(torch.randn(D))

    def sort(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows.repeat(EXPERTS, 1), self.bias

    def run(self, rows: Tensor) -> Tensor:
        return self.stack(rows).reshape(EXPERTS, -1, D).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("planted: call sort and run")


class ByMethods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixture, self.first = Methods(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        rows, bias = self.mixture.sort(self.first(x).reshape(-1, D))
        return (self.mixture.run(rows) + bias).view_as(x)


class Lent(nn.Module):
    """Holds the stacks ``[E J, d]`` of experts, and is called with the part of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS * 5, D) / D) for _ in range(2))

    def forward(self, rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (rows @ up.T).tanh() @ down


class Lending(nn.Module):
    """Sorts tokens by their expert, as DBRX does."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = Lent()

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        rows, out = x.reshape(-1, D), torch.zeros_like(x).reshape(-1, D)
        best = scores.argmax(1)
        for expert in best.unique().tolist():
            own = (best == expert).nonzero().reshape(-1)
            up, down = (stack.view(EXPERTS, 5, D)[expert] for stack in (self.parts.up, self.parts.down))
            out.index_add_(0, own, self.parts(rows[own], up, down) * scores[own, expert, None])
        return out.view_as(x)


class WithLentStacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.router = Lending(), nn.Linear(D, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x.reshape(-1, D)).softmax(-1))


class Bias(nn.Module):
    """Returns its bias for others to add, frozen or not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, D) / D), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> tuple[Tensor, nn.Parameter]:
        return x @ self.weight, self.bias


class Around(nn.Module):
    def __init__(self, block: nn.Module, second: bool = False) -> None:
        super().__init__()
        self.embed, self.block, self.head, self.second = nn.Embedding(VOCAB, D), block, nn.Linear(D, 2), second

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Tensor) -> Tensor:
        x = self.embed(input_ids)
        out = self.block(x)
        out, scores = out if isinstance(out, tuple) else (out, None)
        if isinstance(self.block, Bias):
            out, scores = (out + scores).tanh(), None
        found = self.head(x + out.view_as(x)).mean(1)
        extra = scores.view(len(x), -1, EXPERTS).pow(2).sum((1, 2)).mean() if self.second and scores is not None else 0
        return nn.functional.cross_entropy(found, labels[:, 0] % 2) + extra


BLOCKS = {
    "repeated rows": lambda: Around(Repeating()),
    "repeated rows and scores": lambda: Around(Repeating(), second=True),
    "records, and scores in rows": lambda: Around(Unfolded(), second=True),
    "scores in rows without gradient": lambda: Around(Unfolded()),
    "methods": lambda: Around(ByMethods()),
    "lent stacks": lambda: Around(WithLentStacks()),
    "a bias for others": lambda: Around(Bias()),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_ones_own(name: str) -> None:
    torch.manual_seed(0)
    check(BLOCKS[name]().double().train(), tokens())


def test_a_frozen_parameter_that_is_returned_stays_what_it_is() -> None:
    torch.manual_seed(0)
    model = Around(Bias()).double().train()
    model.block.bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    rows, want = tokens(), []
    for row in rows:
        batch = {key: value[None] for key, value in row.items()}
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, batch), trained)])
        want.append(flat * min(1.0, 0.3 / float(flat.norm())))
    moved = step_of(model, trained, rows)
    torch.testing.assert_close(moved, torch.stack(want).mean(0), rtol=1e-6, atol=1e-9)


def step_of(model: nn.Module, trained: list[nn.Parameter], rows: list[dict[str, Tensor]]) -> Tensor:
    before = [p.detach().clone() for p in trained]
    model, optimizer, batches = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(trained, lr=1.0), data_loader=DataLoader(Rows(rows), batch_size=len(rows)),
        noise_multiplier=0.0, max_grad_norm=0.3, clipping="flat", ema_decay=None,
    )  # fmt: skip
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, trained, strict=True)])


class Sorted(Repeating):
    """Returns its rows in another order than it got them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, scores = super().forward(x)
        order = x.reshape(-1, D)[:, 0].argsort()
        return out[order][order.argsort()] if not self.used else out[order], scores


def test_rows_that_are_not_record_after_record_are_refused() -> None:
    torch.manual_seed(0)
    check(Around(Sorted()).double().train(), tokens())  # the control: put back in order
    with pytest.raises(
        ValueError, match="run again on single records it does not return what it returned on the batch"
    ):
        check(Around(Sorted(used=True)).double().train(), tokens())
