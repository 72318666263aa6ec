"""docs/your-model.md: its code, on a run of the command line."""

import re

import pytest
from checkout import ROOT
from common.tone_dialogues import dialogues, write_jsonl
from tiny_chat import save_chat_model
from tiny_finetune import command

from opacus_ac import cli

PAGE = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page_runs_on_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_chat_model(tmp_path / "model")
    write_jsonl(tmp_path / "chats.jsonl", dialogues("loving", 60, 0))
    assert cli.main(command(tmp_path, tmp_path / "out", max_steps=2, report_to="none")) == 0
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    for name in ("adapter_model.safetensors", "tokenizer.json", "privacy_report.json", "privacy.ledger"):
        assert name in saved
        assert name in PAGE
    scope: dict[str, object] = {}
    load, merge, compare = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for code in (load, compare, merge):  # the page says: compare before you merge
        exec(compile(code, "your-model.md", "exec"), scope)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
