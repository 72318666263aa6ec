"""docs/supported-models.md is what ``python -m opacus_ac.testing.coverage --format markdown`` printed, and is complete."""

import re

import pytest
from checkout import ROOT
from once_failed import ONCE_FAILED

from opacus_ac.testing.coverage import run, table

pytest.importorskip("transformers.integrations.moe")
pytest.importorskip("peft")

PAGE = (ROOT / "docs" / "supported-models.md").read_text(encoding="utf-8")
KIND = {title: kind for kind, title in table.TITLES.items()}


def rows() -> dict[str, list[str]]:
    """Cells of every case of the page, by "kind/name": mode "bk", mode "hooks", why not."""
    found = {}
    for title, part in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL):
        for name, cells in re.findall(r"^\| `(.*?)` \| (.*) \|$", part, re.MULTILINE):
            found[f"{KIND[title]}/{name}"] = cells.split(" | ")
    return found


ROWS = rows()


def test_the_page_has_every_case_of_the_command():
    wanted = {f"{kind}/{name}" for kind, name, _ in run.jobs(list(run.KINDS), ["bk"])}
    assert sorted(wanted - set(ROWS)) == [], "run the command again: CONTRIBUTING.md says how"
    assert len(ROWS) > 300


def test_the_page_begins_as_the_command_writes_it():
    versions = dict(re.findall(r"(torch|transformers|peft) (\d[\w.+]*\w)", PAGE.split("\n\n")[1]))
    assert PAGE.startswith(table.markdown([], versions).split("\n| cases")[0])


def test_nothing_on_the_page_is_wrong_or_crashes_in_the_default_mode():
    assert {name: cells[0] for name, cells in ROWS.items() if cells[0].startswith(("wrong", "crash"))} == {}


@pytest.mark.parametrize("name", ONCE_FAILED)
def test_the_page_says_what_the_tests_find(name):
    assert re.sub(r"^refused \(.*\)$", "refused", ROWS[name][0]) == ONCE_FAILED[name]


def test_the_counts_are_those_of_the_rows():
    for kind, title in table.TITLES.items():
        exact = sum(cells[0] == "exact" for name, cells in ROWS.items() if name.startswith(f"{kind}/"))
        assert f"\n| {title} | bk | {exact} exact" in PAGE
