"""docs/your-data.md: every form that it shows is read, every kind of file is named, every message is one."""

import json
import re

from checkout import ROOT

from opacus_ac.integrations.finetune import chat_files
from opacus_ac.integrations.finetune.chat_forms import _FORMS, RowFacts, dialogue

PAGE = (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8")


def test_every_row_on_the_page_is_read_in_a_form_of_its_own():
    rows = re.findall(r"`(\{\".*?\})`", PAGE)
    found = []
    for row in rows:
        facts = RowFacts()
        assert dialogue(json.loads(row), facts)[-1]["content"]
        found.append(facts.form)
    assert sorted(found) == sorted(" and ".join(columns) for columns, _ in _FORMS)


def test_every_kind_of_file_is_on_the_page():
    assert set(re.findall(r"^\| `(\.\w+)` \|", PAGE, re.MULTILINE)) == set(chat_files._READERS)


def test_every_message_on_the_page_is_one():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "opacus_ac").rglob("chat_*.py"))
    messages = re.findall(r"^\| `(.*?)`.* \| .* \|$", PAGE.partition("## Messages")[2], re.MULTILINE)
    assert len(messages) > 6
    said = {message: re.split(r"semicolons|'image'|\"user_id\"", message) for message in messages}
    gone = [message for message, parts in said.items() if not all(part.strip() in source for part in parts)]
    assert not gone
