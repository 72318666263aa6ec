"""docs/faq.md and docs/glossary.md: the messages that are explained are messages of the package."""

import ast
import re

import pytest
from checkout import ROOT

FAQ = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.*)`$", FAQ, re.MULTILINE)
#: Of torch, not of this package.
FOREIGN = {"Full backward hook is firing"}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """All texts in the package, with a gap where a value is filled in."""
    found = []
    for path in (ROOT / "opacus_ac").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_that_is_explained_is_one(texts):
    assert len(MESSAGES) > 15
    gone = [message for message in MESSAGES if not any(message in text for text in texts)]
    assert set(gone) <= FOREIGN, "the page explains messages that nothing says: change or remove them"


def test_a_message_that_nothing_says_is_found(texts):
    assert not any("this model is too nice to be private" in text for text in texts)


def test_the_glossary_is_in_order_and_every_entry_is_explained():
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    entries = re.findall(r"^(\S.*)\n: \S", page, re.MULTILINE)
    assert len(entries) > 30
    assert page.count("\n: ") == len(entries)
    assert [entry.lower() for entry in entries] == sorted(entry.lower() for entry in entries)
