"""The pages of proofs: each has its parts, names tests and files that exist, and a command that runs something."""

import re
import shlex

import pytest
from checkout import ROOT

PROOFS = ROOT / "docs" / "proofs"
MECHANISMS = sorted(path for path in PROOFS.glob("*.md") if path.name not in ("index.md", "nist.md"))
PARTS = ["## Statement", "## Proof", "## What the code must do", "## The test that would fail"]


def body(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", MECHANISMS, ids=lambda path: path.stem)
def test_a_page_has_its_parts_in_order(path):
    places = [body(path).find(f"\n{part}\n") for part in PARTS]
    assert -1 not in places
    assert places == sorted(places)


@pytest.mark.parametrize("path", [*MECHANISMS, PROOFS / "nist.md"], ids=lambda path: path.stem)
def test_a_page_begins_in_plain_words_with_a_command_and_says_who_has_read_it(path):
    _, first, status, *_ = body(path).split("\n\n")
    assert first.startswith("In plain words: ")
    (command,) = [text for text in re.findall(r"`([^`]+)`", first) if text.split()[0] in ("pytest", "opacus-ac")]
    for word in shlex.split(command)[1:]:
        assert not word.startswith("tests/") or (ROOT / word).exists(), word
    assert re.search(r"Read against commit `[0-9a-f]{7,40}`\. \*\*(Unreviewed|Reviewed)\*\*", status)


@pytest.mark.parametrize("path", MECHANISMS, ids=lambda path: path.stem)
def test_the_tests_and_files_that_a_page_names_exist(path):
    text = body(path)
    named, inside = 0, None
    for word in re.findall(r"`([^`\s]+)`", text):
        if word.startswith("tests/"):
            inside, _, name = word.partition("::")
            assert (ROOT / inside).exists(), word
            named += bool(name)
        elif word.startswith("test_"):
            name = word
        elif re.fullmatch(r"[a-z_]+/[a-z_/]+\.py", word):
            assert (ROOT / "opacus_ac" / word).exists() or (ROOT / word).exists(), word
            continue
        else:
            continue
        if name:
            assert f"def {name}(" in (ROOT / inside).read_text(encoding="utf-8"), f"{inside}::{name}"
    assert named >= 1


def test_every_page_is_in_the_table_and_in_the_tree():
    index = body(PROOFS / "index.md")
    for path in PROOFS.glob("*.md"):
        if path.name != "index.md":
            assert f"({path.name})" in index
            assert f"\n{path.stem}\n" in index


def test_links_lead_somewhere():
    for path in PROOFS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", body(path)):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"
