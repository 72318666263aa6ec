"""The optimizer inside: momentum for the planned steps, and a learning rate that the run finds."""

from __future__ import annotations

import pytest
import torch
from tiny_trainer import generator, trainer, weights
from transformers import TrainingArguments

from opacus_ac import AutoAdam
from opacus_ac.integrations.finetune.arguments import LEARNING_RATES
from opacus_ac.integrations.finetune.job import parse
from opacus_ac.optimizer.momentum import planned_beta1

pytestmark = pytest.mark.filterwarnings("ignore:noise_generator is seeded", "ignore::FutureWarning")


def inner(run):
    return run.create_optimizer().original_optimizer


@pytest.mark.parametrize("steps", [3, 100])
def test_momentum_follows_the_planned_steps(steps, tmp_path):
    run = trainer(tmp_path, max_steps=steps)
    assert {group["betas"] for group in inner(run).param_groups} == {(planned_beta1(steps), 0.999)}
    assert run.args.adam_beta1 == 0.9


@pytest.mark.parametrize(
    ("changes", "settings", "beta1"),
    [({"adam_beta1": 0.8}, {}, 0.8), ({}, {"planned_momentum": False}, 0.9), ({"max_steps": -1}, {}, 0.5)],
)
def test_momentum_of_the_caller_wins(changes, settings, beta1, tmp_path):
    run = trainer(tmp_path, settings=settings, **changes)
    assert inner(run).param_groups[0]["betas"][0] == beta1


def test_other_optimizers_keep_what_they_have(tmp_path):
    run = trainer(tmp_path, optim="sgd", optim_args="momentum=0.25")
    assert inner(run).param_groups[0]["momentum"] == 0.25


def test_an_optimizer_of_the_caller_is_left_as_it_is(tmp_path):
    run = trainer(tmp_path)
    own = torch.optim.AdamW(run.model.parameters())
    run.optimizer = own
    assert inner(run) is own
    assert own.param_groups[0]["betas"][0] == 0.9


def test_the_rate_is_found(tmp_path):
    run = trainer(
        tmp_path, settings={"auto_learning_rate": True}, options={"noise_generator": generator()},
        max_steps=6, weight_decay=0.1,
    )  # fmt: skip
    before = weights(run.model)
    found = inner(run)
    assert isinstance(found, AutoAdam)
    assert [group["weight_decay"] for group in found.param_groups] == [0.1, 0.0]
    assert {group["lr"] for group in found.param_groups} == {1e-3}
    assert {group["beta1"] for group in found.param_groups} == {planned_beta1(6)}
    assert sum(p.numel() for group in found.param_groups for p in group["params"]) == len(before)
    run.train()
    assert not torch.equal(before, weights(run.model))
    assert (run.private_optimizer.ema, run.private_optimizer.control) == (None, None)
    assert "found by AutoAdam" in run.engine.privacy_report(1e-3).learning_rate
    assert all("found_learning_rate" in entry for entry in run.state.log_history if "epsilon" in entry)


@pytest.mark.parametrize(("given", "hint"), [(5e-5, 1e-3), (2e-4, 2e-4)])
def test_the_hint_where_nobody_named_a_rate(tmp_path, given, hint):
    """transformers' default learning rate suits runs without noise, and is far below a good hint."""
    assert TrainingArguments(output_dir=str(tmp_path)).learning_rate == 5e-5
    found = inner(trainer(tmp_path, settings={"auto_learning_rate": True}, learning_rate=given))
    assert {group["lr"] for group in found.param_groups} == {hint}


def test_an_average_that_was_asked_for_is_kept(tmp_path):
    run = trainer(tmp_path, settings={"auto_learning_rate": True, "ema_decay": 0.5})
    run.create_optimizer()
    assert run.private_optimizer.ema.decay == 0.5


def test_the_path_goes_on_after_a_checkpoint(tmp_path):
    fixed = {"auto_learning_rate": True, "clip_policy": "fixed"}  # so that every step moves the weights
    settings = {"settings": fixed, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, max_steps=4, **settings).train()
    resumed = trainer(tmp_path, max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state = next(iter(resumed.private_optimizer.original_optimizer.state.values()))
    assert state["step"] == 4


@pytest.mark.parametrize(
    ("changes", "settings", "options", "words"),
    [
        ({"optim": "adafactor"}, {}, {}, "leave optim out"),
        ({}, {"fused_step": True}, {}, "use fused_step=False"),
        ({}, {}, {"optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), None)}, "leave one"),
    ],
)
def test_what_does_not_go_together_is_refused_with_a_remedy(changes, settings, options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, settings={"auto_learning_rate": True, **settings}, options=options, **changes)


# ---------------------------------------------------------------- the command line

NEEDED = ["--train_file", "a.jsonl", "--output_dir", "out", "--target_epsilon", "8", "--report_to", "none", "--use_cpu"]


def job(*words):
    return parse([*NEEDED, *words], None, prog="finetune", usage="")


@pytest.mark.parametrize(
    ("words", "auto", "rate"),
    [
        ([], True, LEARNING_RATES["lora"]),
        (["--full"], True, LEARNING_RATES["full"]),
        (["--full", "--fused_step"], False, LEARNING_RATES["full"]),
        (["--preset", "paper"], False, LEARNING_RATES["lora"]),
        (["--optim", "sgd"], False, LEARNING_RATES["lora"]),
        (["--learning_rate", "0.5"], False, 0.5),
        (["--learning_rate", "auto"], True, LEARNING_RATES["lora"]),
        (["--auto_learning_rate", "--learning_rate", "0.5"], True, 0.5),
    ],
)
def test_the_run_finds_its_rate_unless_one_is_named_or_cannot_be_found(words, auto, rate):
    found = job(*words)
    assert (found.privacy.auto_learning_rate, found.training.learning_rate) == (auto, rate)


@pytest.mark.parametrize("words", [["--fused_step"], ["--optim", "adafactor"]])
def test_what_the_command_line_cannot_combine_is_said_in_its_words(words, capsys):
    with pytest.raises(SystemExit) as ended:
        job("--full", "--learning_rate", "auto", *words)
    message = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert "--learning_rate auto" in message
    assert f"leave out {words[0]}" in message
    assert "=" not in message


@pytest.mark.parametrize(("words", "planned"), [([], True), (["--adam_beta1", "0.9"], False)])
def test_momentum_that_was_named_is_kept(words, planned):
    found = job(*words)
    assert (found.privacy.planned_momentum, found.training.adam_beta1) == (planned, 0.9)


def test_another_word_is_no_rate(capsys):
    with pytest.raises(SystemExit):
        job("--learning_rate", "fast")
    assert "must be a number or 'auto'" in capsys.readouterr().err
