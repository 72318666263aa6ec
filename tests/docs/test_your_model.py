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
    for name in ("adapter_model.safetensors", "tokenizer.json", "README.md", "privacy_report.json", "privacy.ledger"):
        assert name in saved
        assert name in PAGE
    scope: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(code, "your-model.md", "exec"), scope)
    assert scope["before"].shape[1] > scope["inputs"]["input_ids"].shape[1]
    assert cli.main(["merge", "out", "out-merged"]) == 0
    assert (tmp_path / "out-merged" / "model.safetensors").is_file()
