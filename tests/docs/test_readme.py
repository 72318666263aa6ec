"""The README's commands are those of CI; its code and its other commands are in tests/docs/test_code.py."""

import re

from checkout import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_of_the_readme_are_those_of_ci():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'pip install -e ".[test]" && pytest' in README
    assert 'pip install --quiet -e ".[test]"' in ci
    options = re.findall(r"^ *(?:[A-Z_]+=\S+ )*pytest (.*)", ci, re.MULTILINE)
    assert options == ["--numprocesses=2 --dist=loadfile --durations=30"]  # the README's command, in two processes


def test_it_is_read_in_a_few_minutes():
    assert len(README.split()) <= 700


def test_what_it_links_to_exists():
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", README)]
    assert [t for t in targets if not t.startswith("https://") and not (ROOT / t).exists()] == []
