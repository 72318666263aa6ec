"""``.ci/run`` does the parts that it is asked for, and fails when one of their commands does."""

import os
import subprocess
import sys

import pytest
from checkout import ROOT

# Every program that the script calls writes its call down; one whose call contains $BROKEN fails.
STUB = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
[ -z "$BROKEN" ] || [[ "$(basename "$0") $*" != *"$BROKEN"* ]] || exit 1
if [ "$(basename "$0") $1 $2" = "python3 -m venv" ]; then
    mkdir -p "$3/bin" && touch "$3/bin/activate"
    cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip"
fi
"""
PROGRAMS = ("python3", "python", "ruff", "mypy", "pytest", "chromium", "chromedriver")
STYLE = ["ruff check .", "ruff format --check .", "mypy "]
OLDEST = "python -m pytest"


@pytest.fixture
def ci(tmp_path):
    """Run the script with stubs in place of all programs: its exit status, its messages and the calls that it made."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)

    def run(*parts: str, broken: str = "") -> tuple[int, str, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        settings = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "BROKEN": broken}
        done = subprocess.run(
            [str(ROOT / ".ci" / "run"), *parts], env={**os.environ, **settings}, capture_output=True, text=True
        )
        return done.returncode, done.stderr, calls.read_text().splitlines()

    return run


def parts_done(calls: list[str]) -> set[str]:
    done = {"style"} if all(call in calls for call in STYLE) else set()
    done |= {"tests"} if any(call.startswith("pytest --numprocesses") for call in calls) else set()
    return done | ({"oldest"} if any(call.startswith(OLDEST) for call in calls) else set())


@pytest.mark.parametrize(
    "parts", [(), ("style",), ("tests",), ("oldest",), ("style", "tests"), ("style", "tests", "oldest")], ids="-".join
)
def test_the_parts_that_were_asked_for_are_done(ci, parts):
    status, errors, calls = ci(*parts)
    assert status == 0, errors
    assert parts_done(calls) == (set(parts) or {"style", "tests", "oldest"})


def test_an_unknown_part_is_refused_before_anything_is_done(ci):
    status, errors, calls = ci("style", "stlye")
    assert (status, calls) == (2, [])
    assert "'stlye'; choose style, tests or oldest" in errors


@pytest.mark.parametrize(
    "broken",
    [
        "python3 -m venv",
        "install --quiet -e .[test]",
        "ruff check",
        "ruff format",
        "mypy",
        "pytest --numprocesses",
        OLDEST,
    ],
)
def test_a_command_that_fails_fails_the_run(ci, broken):
    status, _, calls = ci(broken=broken)
    assert status != 0
    assert any(broken in call for call in calls)


def test_an_oldest_torch_that_cannot_be_had_fails_only_the_run_that_is_for_it(ci):
    status, errors, _ = ci(broken="torch==")
    assert (status, "nothing was tested with it" in errors) == (0, True)
    status, errors, _ = ci("oldest", broken="torch==")
    assert (status, "nothing was tested with it" in errors) == (1, True)


def test_a_test_file_that_cannot_be_imported_is_an_error(tmp_path):
    """It was once collected as empty: a first, failed import left it half-made for the second."""
    (tmp_path / "test_broken.py").write_text(
        "import nothing_of_this_name\n\n\ndef test_something():\n    assert False\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode not in (0, 5), done.stdout
    assert "nothing_of_this_name" in done.stdout
