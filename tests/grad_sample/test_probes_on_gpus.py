"""Tests of layers with guessed ids run on the processor: a row that is not there breaks a GPU for the rest of the process.

On a GPU the lookup raises nothing at first. Every later call fails, ``torch.manual_seed`` included.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from far_tensors import far
from opacus.grad_sample.embedding import compute_embedding_grad_sample
from torch import Tensor, nn

from opacus_ac.grad_sample.checks.probe import probe
from opacus_ac.grad_sample.rules.embedding import is_scaled_lookup

transformers = pytest.importorskip("transformers")


class Counted(nn.Embedding):
    """Looks up other rows than its ids, as learned positions of OPT and BART do."""

    def forward(self, mask: Tensor) -> Tensor:
        return super().forward(mask.cumsum(-1))


def positions() -> nn.Module:
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    return OPTLearnedPositionalEmbedding(32, 4)


def scaled() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(10, 6, 0, embed_scale=2.5)


LAYERS = {
    "plain": (lambda: nn.Embedding(10, 4), True, "exact"),
    "scaled": (scaled, True, None),
    "OPT's positions": (positions, False, "unknown"),
    "counted": (lambda: Counted(10, 4), False, "unknown"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_whether_a_layer_is_a_lookup_is_tried_on_the_processor(name: str) -> None:
    build, is_lookup, _ = LAYERS[name]
    assert is_scaled_lookup(build()) is is_lookup
    assert is_scaled_lookup(far(build())) is is_lookup


@pytest.mark.parametrize("name", [name for name, row in LAYERS.items() if row[2]])
def test_rules_are_tried_with_ids_on_the_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())  # asks a GPU for its state
    build, _, status = LAYERS[name]
    torch.manual_seed(0)
    assert probe(build(), compute_embedding_grad_sample).status == status
    assert probe(far(build()), compute_embedding_grad_sample).status == status


def test_a_lookup_on_a_gpu_would_be_seen() -> None:
    with pytest.raises(AssertionError, match="device-side assert"):
        far(nn.Embedding(10, 4))(torch.tensor([[1]]))
