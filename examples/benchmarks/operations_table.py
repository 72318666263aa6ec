"""What a private step asks of a device in each layer, beside an ordinary step: the counts in docs/on-a-gpu.md.

    python examples/benchmarks/operations_table.py

A small model waits for the processor to ask, not for the device to compute. Operations are counted on the CPU, where the same
ones are asked for. Views and new memory are none. The count of a layer is the difference between models of two lengths.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from opacus_ac import PrivacyEngine

LENGTHS = (16, 512)
LAYERS = (2, 6)
VOCAB = 64


class Operations(TorchDispatchMode):
    """A context that counts the operations that a device would be asked for.

    Attributes:
        count: number of operations.
    """

    _FREE = frozenset({"detach", "view", "unbind", "slice", "select", "t", "transpose", "unsqueeze", "expand"}) | {
        *("reshape", "_reshape_alias", "as_strided", "alias", "unflatten", "promote_types", "split", "_unsafe_view"),
        *("squeeze", "permute", "diagonal", "empty", "empty_like", "new_empty", "empty_strided"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the operation, and do it."""
        self.count += func.overloadpacket.__name__ not in self._FREE
        return func(*args, **(kwargs or {}))


def of_a_step(layers: int, length: int, *, private: bool) -> int:
    """Return the operations of a step of AdamW, the third one: the first ones also try and check."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=layers, tie_word_embeddings=True, **sizes)
    model: Any = LlamaForCausalLM(config).train()
    inner: Any = torch.optim.AdamW(model.parameters(), fused=True)
    loader: Any = DataLoader([{"input_ids": torch.arange(length) % VOCAB}] * 12, 4)
    if private:
        settings: dict[str, Any] = {"noise_multiplier": 0.7, "ema_decay": None, "poisson_sampling": False}
        model, inner, loader = PrivacyEngine().make_private(
            module=model, optimizer=inner, data_loader=loader, lr_control=False, **settings
        )
    counts = []
    for batch in itertools.islice(loader, 3):
        tokens = batch["input_ids"]
        with Operations() as found:
            inner.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            inner.step()
        counts.append(found.count)
    return counts[-1]


def of_a_layer(length: int, *, private: bool) -> float:
    """Return the operations of a step that each layer adds."""
    few, many = (of_a_step(layers, length, private=private) for layers in LAYERS)
    return (many - few) / (LAYERS[1] - LAYERS[0])


def main() -> None:
    argparse.ArgumentParser(description="What a private step asks of a device in each layer.").parse_args()
    warnings.filterwarnings("ignore")
    print("| tokens of a record | ordinary step | private step |\n|---|---|---|")
    for length in LENGTHS:
        own = [of_a_layer(length, private=private) for private in (False, True)]
        print(f"| {length} | {own[0]:.0f} | {own[1]:.0f} |")


if __name__ == "__main__":
    main()
