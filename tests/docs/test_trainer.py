"""The page for Trainer users: its code runs as printed, and what it says is refused is what the table refuses."""

import re

import pytest
from checkout import ROOT
from common.tone_dialogues import dialogues, write_jsonl
from tiny_chat import save_chat_model

from opacus_ac.integrations.trainer import checks as trainer_checks

PAGE = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_example_of_the_page(tmp_path, monkeypatch, capsys):
    save_chat_model(tmp_path / "model")
    write_jsonl(
        tmp_path / "mails.jsonl", [{**row, "user_id": i % 15} for i, row in enumerate(dialogues("loving", 60, seed=3))]
    )
    write_jsonl(tmp_path / "public.jsonl", dialogues("loving", 4, seed=4))
    monkeypatch.chdir(tmp_path)
    code, code_for_users = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope = {}
    exec(code, scope)
    printed = capsys.readouterr().out
    assert "differential privacy by" in printed
    assert "'eval_loss'" in printed
    trainer = scope["trainer"]
    assert trainer.state.global_step == 8
    assert 7.9 < trainer.get_epsilon() <= 8.0
    for file in ("checkpoint-5/privacy_state.pt", "final/model.safetensors", "final/privacy_report.json"):
        assert (tmp_path / "out" / file).is_file()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 8
    for name in set(logged[0]) - {"step"}:
        assert f"`{name}`" in PAGE.split("## What is logged")[1].split("##")[0]
    exec(code_for_users, scope)
    assert "protects        one user with at most 4 rows" in capsys.readouterr().out
    assert scope["trainer"].state.global_step == 5
    assert 7.9 < scope["trainer"].get_epsilon() <= 8.0
    assert "eval_loss" in scope["trainer"].evaluate()


def test_every_refused_argument_is_on_the_page():
    table = PAGE.split("## What is refused")[1].split("## Data")[0]
    said_in_words = {"world_size", "n_gpu", "deepspeed", "fsdp", "lr_scheduler_type", "optim"}
    for name, *_ in trainer_checks._ARGUMENTS:
        assert name in said_in_words or f"`{name}" in table, name
