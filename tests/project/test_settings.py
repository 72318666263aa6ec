"""Settings that stand in several files agree, and the commands that pages for contributors name exist."""

import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from configparser import ConfigParser

import pytest
import tomllib
import yaml
from checkout import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONFIG = ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
CI = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["ci"]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
CI_RUN = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """Lines of a page's bash blocks, each command of "a && b" by itself."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]


def recipes() -> dict[str, list[str]]:
    """Commands of every target of the Makefile."""
    found = re.findall(r"^(\w+):.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return {target: body.replace("\t", "").splitlines() for target, body in found}


# ---- what the package is: setup.cfg alone ---------------------------------------------------------------------------


def test_metadata_and_settings_stand_in_one_place_each():
    assert "project" not in PYPROJECT
    assert PYPROJECT["build-system"]["build-backend"] == "setuptools.build_meta"
    assert set(PYPROJECT["tool"]) == {"ruff", "mypy", "pytest"}
    assert not [name for name in CONFIG.sections() if name.partition(":")[0] in {"tool", "mypy", "flake8"}]
    others = ("ruff.toml", ".ruff.toml", "mypy.ini", ".mypy.ini", "pytest.ini", "tox.ini")
    assert not [name for name in others if (ROOT / name).exists()]


def test_python_versions_agree():
    listed = re.findall(r"Python :: (3\.\d+)", CONFIG["metadata"]["classifiers"])
    tried = {entry["python"] for entry in CI["strategy"]["matrix"]["include"]}
    assert sorted(listed) == sorted(tried)
    oldest = min(listed, key=lambda version: int(version.partition(".")[2]))
    assert CONFIG["options"]["python_requires"] == f">={oldest}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] in listed


def test_the_source_distribution_is_the_checkout(tmp_path):
    """Built from a copy, because a build leaves files behind. Tests can run from it: they read pages and settings."""
    left_out = shutil.ignore_patterns(
        ".git", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", ".venv", "runs", "out", ".hypothesis"
    )
    checkout = shutil.copytree(ROOT, tmp_path / "checkout", ignore=left_out)
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=checkout, check=True, capture_output=True)
    (archive,) = tmp_path.glob("opacus_ac-*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "setup.cfg", "pyproject.toml"} <= packed
    folders = ("opacus_ac", "tests", "docs", "examples", ".ci", ".github")
    files = [path for folder in folders for path in (checkout / folder).rglob("*") if path.is_file()]
    assert {path.relative_to(checkout).as_posix() for path in files} - packed == set()


# ---- who runs what --------------------------------------------------------------------------------------------------


def test_the_workflow_runs_every_part_of_ci_and_no_other():
    parts = re.search(r"set -- (.*)\n", CI_RUN)[1].split()
    assert {entry["part"] for entry in CI["strategy"]["matrix"]["include"]} == set(parts)
    assert [step["run"] for step in CI["steps"] if "run" in step] == [".ci/run ${{ matrix.part }}"]


def test_the_makefile_has_the_commands_of_the_readme_and_of_ci():
    targets = recipes()
    install, test = 'pip install -e ".[test]"', "pytest"
    position = commands("README.md").index(test)
    assert commands("README.md")[position - 1] == install
    assert targets["install"] == [install]
    assert targets["test"] == [f"{test} $(if $(ROOM),tests/$(ROOM))"]
    style = re.search(r"if asked style; then\n( *ruff.*?)fi\n", CI_RUN, re.DOTALL)[1]
    assert targets["lint"] == [line.strip() for line in style.splitlines()]
    assert targets["docs"][0] in (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    phony = (ROOT / "Makefile").read_text(encoding="utf-8").partition(".PHONY:")[2].splitlines()[0].split()
    assert sorted(phony) == sorted(targets)


def test_hooks_run_the_tools_of_lint():
    tools = {line.removesuffix(" .").replace(" --check", "") for line in recipes()["lint"]}
    assert tools == {hook["entry"] for hook in HOOKS if hook["language"] == "system"}


# ---- what contributors are told -------------------------------------------------------------------------------------


def check(command: str) -> None:
    """One command of CONTRIBUTING.md: its target, folder, part or package exists."""
    match shlex.split(command):
        case ["make", target]:
            assert target in recipes(), command
        case ["make", "test", room]:
            assert (ROOT / "tests" / room.removeprefix("ROOM=")).is_dir(), command
        case [".ci/run", *parts]:
            assert set(parts) <= {"style", "tests", "oldest"}, command
        case ["pytest", "-m", "not slow"]:
            assert any(marker.startswith("slow:") for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"])
        case ["python", "-m", "opacus_ac.testing.coverage", "--format", "markdown", ">", page]:
            assert (ROOT / page).is_file(), command
        case ["python", "-m", "build"] | ["twine", "check" | "upload", *_]:
            assert PYPROJECT["build-system"]["build-backend"]
        case ["python", script] | ["python", script, "--write"]:
            assert (ROOT / script).is_file(), command
        case ["pip", "install", "pre-commit"] | ["pre-commit", "install"]:
            assert HOOKS
        case _:
            raise AssertionError(f"unknown command {command}")


def named(page: str) -> list[str]:
    """Commands of the bash blocks, and those in the text: code that starts with a program's name and has arguments."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return commands(page) + re.findall(r"`((?:make|pytest|python|pip|\.ci/run) [^`]+)`", text)


def test_the_commands_of_contributing_exist():
    found = named("CONTRIBUTING.md")
    assert {"make install", "make lint", ".ci/run", ".ci/run oldest", 'pytest -m "not slow"'} <= set(found)
    for command in found:
        check(command)


@pytest.mark.parametrize(
    "command", ["make gone", "make test ROOM=gone", ".ci/run gone", "python gone.py", "pip install gone", "rm -r runs"]
)
def test_a_command_that_does_not_exist_is_found(command):
    with pytest.raises(AssertionError):
        check(command)


@pytest.mark.parametrize(
    "page", ["CONTRIBUTING.md", ".github/pull_request_template.md", ".github/ISSUE_TEMPLATE/privacy.md", ".ci/run"]
)
def test_the_files_and_folders_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = re.findall(r"\]\(([^):#]+)[)#]", text)
    paths += re.findall(r"`((?:docs|tests|examples|opacus_ac)/[\w./]*|\w+\.(?:md|toml|cfg))`", text)
    paths += re.findall(r"\btests/[\w/]+\.py", text)
    paths += [f"tests/{room}" for room in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)]
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_templates_ask_for_what_a_review_needs():
    asked = (ROOT / ".github" / "pull_request_template.md").read_text(encoding="utf-8")
    for words in ("what is released or what is charged", "Which test fails without it", "heading of `CHANGELOG.md`"):
        assert words in asked
    templates = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.md")}
    assert set(templates) == {"bug", "feature", "privacy"}
    for text in templates.values():
        assert set(yaml.safe_load(text.split("---")[1])) == {"name", "about", "labels"}
    assert templates["privacy"].index("do not describe") < templates["privacy"].index("SECURITY.md")
