"""The cost model against what the kernel counts on the sockets of two to four gloo ranks, and against its page."""

from __future__ import annotations

import re
from typing import Any

import pytest
from checkout import ROOT
from distributed_cost import SHAPES, ModelShape, main, memory_per_rank, step_cost
from distributed_launch import run

WEIGHTS = 121505
CASES = ["2:cost_ddp", "2:cost_fsdp", "3:cost_ddp", "3:cost_fsdp", "4:cost_fsdp", "4:cost_hybrid"]
ROLES = {"ddp": "ddp", "fsdp": "fsdp2", "hybrid": "hsdp"}
PAGE = ROOT / "docs" / "distributed.md"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[Any]]:
    return run(CASES, tmp_path_factory.mktemp("ranks"))


def predicted(case: str) -> tuple[float, int]:
    """Return bytes sent by a rank, and ranks that share a copy of the model."""
    world, role = int(case[0]), ROLES[case.split("_")[1]]
    replicas = 2 if role == "hsdp" else 1
    cost = step_cost(role, world=world, trained=WEIGHTS, physical_batches=2, replicas=replicas, backend="gloo")
    return cost.total, 1 if role == "ddp" else world // replicas


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_bytes_on_the_wire_are_those_of_the_model(results, case):
    """Beside them only the small messages (some kB), and the padding of uneven shards (3 of 301 rows at most)."""
    expected, _ = predicted(case)
    for got in results[case]:
        assert expected < got["sent"] < 1.02 * expected


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_memory_is_that_of_the_model(results, case):
    """Weights, gradient, two moments and average: four bytes each, divided by the shards up to their padding."""
    _, shards = predicted(case)
    part = 4 * WEIGHTS / shards
    for name, times in (("weights", 1), ("gradients", 1), ("moments", 2), ("average", 1)):
        held = [got[name] for got in results[case]]
        assert max(held) <= 1.02 * times * part
        assert sum(held) == times * 4 * WEIGHTS * len(held) // shards


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"role": "zero", "world": 2}, "role 'zero' has no cost model"),
        ({"role": "hsdp", "world": 4}, "replicas=1 does not go with role 'hsdp'"),
        ({"role": "ddp", "world": 4, "replicas": 2}, "replicas=2 does not go with role 'ddp'"),
        ({"role": "hsdp", "world": 4, "replicas": 3}, "replicas=3 does not go"),
    ],
)
def test_roles_that_do_not_exist_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        step_cost(trained=10, **arguments)


def test_shapes_are_those_of_the_models():
    """Against transformers' own count, without biases and the norms inside of attention; and a tiny one by hand."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    for kind, config, cls in (("0.5B", Qwen2Config, Qwen2ForCausalLM), ("8B", LlamaConfig, LlamaForCausalLM)):
        s, heads = SHAPES[kind], {"0.5B": 14, "8B": 32}[kind]
        shape = config(
            vocab_size=s.vocabulary, hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers,
            num_attention_heads=heads, num_key_value_heads=s.key_value * heads // s.hidden, tie_word_embeddings=s.tied,
        )  # fmt: skip
        with torch.device("meta"):
            model = cls(shape)
        assert s.total == sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))
    assert ModelShape(2, 1, 3, 5, 1, True).total == 2 * (2 * 3) + 3 * 6 + 4 + 10 + 2


def tables() -> dict[str, list[list[str]]]:
    """Return the cells of the tables of the page by the first cell of their header."""
    found: dict[str, list[list[str]]] = {}
    for block in re.findall(r"((?:^\|.*\n)+)", PAGE.read_text(), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found[rows[0][0]] = rows[2:]
    return found


def gib(value: float) -> str:
    return f"{value / 2**30:.1f}"


def test_the_page_shows_what_the_model_says():
    sent, memory = tables()["bytes sent, GiB"], tables()["memory, GiB"]
    assert len(sent) == len(memory) == 6
    for name, role, ranks, *cells in sent:
        shape = SHAPES[name]
        cost = step_cost(role, world=int(ranks), trained=shape.total, root=shape.root, weight_bytes=2)
        assert cells == [gib(v) for v in (cost.gathered, cost.reduced, cost.returned, cost.total)], (name, role)
    for name, role, ranks, *cells in memory:
        m = memory_per_rank(role, SHAPES[name], world=int(ranks), batch=4, length=512)
        assert cells == [gib(v) for v in (m.weights, m.gathered, m.training, m.exchange, m.records, m.total)], (
            name,
            role,
        )


def test_the_script_prints_the_rows_of_the_page(capsys):
    main([])
    printed = set(capsys.readouterr().out.splitlines())
    rows = [cells for title in ("bytes sent, GiB", "memory, GiB") for cells in tables()[title]]
    assert len(rows) == 12
    assert {f"| {' | '.join(cells)} |" for cells in rows} <= printed
