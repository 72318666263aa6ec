"""What a private step holds in memory, by model: the table of docs/on-a-gpu.md.

    python examples/benchmarks/memory_table.py
    python examples/benchmarks/memory_table.py --write     # puts it into the page

Models are built without memory, on torch's "meta" device. Weights, states of AdamW, the average of the weights and sums of
gradients follow from the numbers of weights; what is held for a record is what ``opacus_ac.grad_sample.explain`` says.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from device_checks.speed import BITNET, LLAMA, OPT, QWEN, VIT
from step_benchmark.shapes import Shape, new_model

from opacus_ac.grad_sample import explain, register_rules

PAGE = Path(__file__).parents[2] / "docs" / "on-a-gpu.md"
BEGIN, END = "<!-- Written by examples/benchmarks/memory_table.py. -->", "<!-- Until here. -->"
LENGTHS = (512, 2048)
HEADER = ("model", "trained", "weights", "AdamW", "average", "sums", *(f"a record, T = {t:,}" for t in LENGTHS))
SHAPES = {
    "Qwen2.5-0.5B": QWEN,
    "Qwen2.5-0.5B, LoRA": replace(QWEN, lora_rank=16, base="bfloat16"),
    "BitNet-b1.58-2B": BITNET,
    "BitNet-b1.58-2B, LoRA": replace(BITNET, lora_rank=16, base="bfloat16"),
    "OPT-2.7B, LoRA": replace(OPT, lora_rank=16, base="bfloat16"),
    "Llama-3-8B, LoRA": LLAMA,
    "ViT-B (197 patches)": VIT,
}


def row(name: str, shape: Shape) -> list[str]:
    """Return the cells of a model."""
    model = new_model(shape, "meta")
    register_rules(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    held = [sum(rule.memory for rule in explain(model, length=197 if shape.image else t)) for t in LENGTHS]
    records = [size(held[0]), "-"] if shape.image else [size(each) for each in held]
    return [name, count(trained), size(weights), size(8 * trained), size(4 * trained), size(4 * trained), *records]


def count(number: int) -> str:
    """Return a number of weights in words."""
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def size(number: int) -> str:
    """Return a number of bytes in words."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def lines() -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"| {' | '.join(HEADER)} |"
    yield "|---" * len(HEADER) + "|"
    for name, shape in SHAPES.items():
        yield f"| {' | '.join(row(name, shape))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="What a private step holds in memory, by model.")
    parser.add_argument("--write", action="store_true", help="put the table into docs/on-a-gpu.md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    table = "\n".join(lines())
    if not arguments.write:
        print(table)
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
