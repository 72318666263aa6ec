"""The zeroth-order examples: the shortened forward pass is exact, the table runs, memory is measured."""

import argparse

import pytest
import torch
from torch.utils.data import TensorDataset

pytest.importorskip("transformers")

import benchmark_zeroth_order as benchmark
import finetune_zeroth_order as example
import zeroth_order_table as table
from common import steering
from common.chat_data import IGNORE, reply_losses
from common.tone_dialogues import dialogues, write_jsonl
from tiny_chat import save_chat_model
from zeroth import llama


def chat_batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 32, (3, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    labels = torch.where((torch.arange(9) > 4) & (mask > 0), tokens, IGNORE)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("layers", [1, 2])
def test_losses_from_the_first_steered_layer_on_are_those_of_the_whole_model(layers):
    model, batch = llama(), chat_batch()
    steered = steering.Steering(model, layers, 1)
    closure = steered.closure(batch)
    with torch.no_grad():
        start = closure()
        torch.testing.assert_close(start, reply_losses(model, batch), rtol=0, atol=1e-6)
        steered.vectors[0].add_(torch.linspace(-3, 3, 16))
        assert not torch.allclose(closure(), start)
        torch.testing.assert_close(closure(), reply_losses(model, batch), rtol=0, atol=1e-6)
    assert [p.requires_grad for p in model.parameters()].count(True) == 1


def test_every_method_of_the_table_trains_under_its_budget():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(80, 384, generator=generator), dim=1)
    classes = (vectors[:, 0] > 0).long()
    task = table.Task(TensorDataset(vectors[:60], classes[:60]), (vectors[60:], classes[60:]), vectors[:2])
    args = table.arguments(["--steps", "3", "--batch-size", "20", "--delta", "1e-3"])
    for name in table.METHODS:
        assert 0.0 <= table.one_run(name, task, args, seed=0) <= 1.0


def test_a_step_is_measured_for_every_variant():
    args = argparse.Namespace(
        **{**vars(benchmark.arguments([])), "batch": 2, "tokens": 4, "hidden": 64, "layers": 1, "vocab": 64}
    )
    for variant in benchmark.VARIANTS:
        model = benchmark.build(args)
        before = [p.detach().clone() for p in model.parameters()]
        benchmark.a_step(args, model, variant)()
        same = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert same == (variant == "forward")


def test_the_example_trains_one_vector_within_its_budget(tmp_path, capsys):
    save_chat_model(tmp_path / "model")
    write_jsonl(tmp_path / "mine.jsonl", dialogues("loving", 60, seed=3))
    write_jsonl(tmp_path / "public.jsonl", dialogues("loving", 3, seed=4))
    words = [
        str(tmp_path / "mine.jsonl"),
        "--heldout",
        str(tmp_path / "public.jsonl"),
        "--model",
        str(tmp_path / "model"),
    ]
    words += ["--steps", "6", "--batch", "30"]  # a step whose C was far too large is left out: some will, not all
    words += ["--directions", "2", "--delta", "1e-3", "--max-length", "120", "--layer", "-1"]
    result = example.main([*words, "--output", str(tmp_path / "out" / "vector.pt")])
    assert result["privacy"]["steps"] == 6
    assert 7.9 < result["privacy"]["epsilon"] <= 8
    assert result["before"] != result["after"]
    vector = torch.load(tmp_path / "out" / "vector.pt", weights_only=True)
    assert vector.ndim == 1
    assert vector.abs().sum() > 0
    printed = capsys.readouterr().out
    assert printed.count("noisy loss") == 6
    assert "differential privacy by privacy loss distribution accounting" in printed


def test_the_vector_is_the_only_trained_weight_and_moves_the_output():
    model, batch = llama(), chat_batch()
    whole = reply_losses(model, batch)
    vector = example.add_vector(model, -1)
    assert [p for p in model.parameters() if p.requires_grad] == [vector]
    with torch.no_grad():
        torch.testing.assert_close(reply_losses(model, batch), whole.detach(), rtol=0, atol=0)
        vector.add_(torch.linspace(-3, 3, 16))
        assert not torch.allclose(reply_losses(model, batch), whole)
