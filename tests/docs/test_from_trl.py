"""The page for users of TRL: its code runs as printed, and what it says is refused is what is refused."""

import re

import pytest
from checkout import ROOT

pytest.importorskip("trl")
from common.tone_dialogues import dialogues, write_jsonl
from tiny_chat import save_chat_model

from opacus_ac.integrations.trl import checks

PAGE = (ROOT / "docs" / "from-trl.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_examples_of_the_page(tmp_path, monkeypatch, capsys):
    save_chat_model(tmp_path / "model")
    write_jsonl(tmp_path / "mails.jsonl", dialogues("loving", 60, seed=3))
    monkeypatch.chdir(tmp_path)
    scope = {}
    for code, steps, name in zip(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), (8, 5), ("trainer", "preferring"), strict=True):  # fmt: skip
        exec(code, scope)
        assert "differential privacy by" in capsys.readouterr().out
        assert scope[name].state.global_step == steps
        assert 7.9 < scope[name].get_epsilon() <= 8.0
    assert (tmp_path / "out" / "final" / "adapter_model.safetensors").is_file()


def test_every_refused_argument_is_on_the_page():
    table = PAGE.split("## What is refused")[1]
    for name, *_ in (*checks._SFT, *checks._DPO):
        assert name == "truncation_mode" or f"`{name}" in table, name
