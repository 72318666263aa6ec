"""What is published: archives that an index accepts, a wheel that serves alone, and files that name what exists."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from checkout import ROOT
from tiny_chat import save_chat_model

ADDRESS = "https://example.invalid/owner/opacus_ac"
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", ".venv", "runs", "out", ".hypothesis", "tests"
)
BUILD = "import sys, setuptools.build_meta as b; to = sys.argv[1]; b.build_sdist(to); b.build_wheel(to)"  # changes argv
CONFIG = ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """A folder with sdist and wheel of a copy whose repository has an address."""
    folder = tmp_path_factory.mktemp("release")
    checkout = shutil.copytree(ROOT, folder / "checkout", ignore=LEFT_OUT)
    text = (checkout / "setup.cfg").read_text(encoding="utf-8")
    (checkout / "setup.cfg").write_text(re.sub(r"^# url = .*$", f"url = {ADDRESS}", text, flags=re.MULTILINE))
    made = folder / "dist"
    made.mkdir()
    subprocess.run([sys.executable, "-c", BUILD, str(made)], cwd=checkout, check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def wheel(archives) -> Path:
    (found,) = archives.glob("*.whl")
    return found


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


@pytest.mark.slow
def test_an_index_accepts_both_archives(archives):
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, archives.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_the_page_on_an_index_has_absolute_links_and_the_links_of_the_project(wheel):
    found = metadata(wheel)
    links = dict(entry.split(", ") for entry in found.get_all("Project-URL"))
    assert links["Source"] == ADDRESS
    assert links["Paper"].startswith("https://arxiv.org/")
    assert set(links) >= {"Documentation", "Changelog", "Issues", "Security", "Opacus"}
    description = str(found.get_payload())
    targets = re.findall(r"\]\(([^)\s]+)", description)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    files = [target.partition("/main/")[2] for target in targets if target.startswith(ADDRESS)]
    assert len(files) > 10
    assert [name for name in files if not (ROOT / name.partition("#")[0]).exists()] == []


@pytest.mark.slow
def test_without_an_address_the_readme_stays_as_it_is(tmp_path):
    for name in ("setup.py", "setup.cfg", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    code = (
        "import setuptools; setuptools.setup = lambda **given: None; import runpy; "
        "print(runpy.run_path('setup.py')['settings']())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{}"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="folders of a virtual environment have other names")
def test_the_wheel_alone_serves_in_a_new_environment(wheel, tmp_path):
    """The dependencies are those of this process; opacus_ac is the wheel, and there is no checkout."""
    new = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(new)], check=True)
    python = new / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    (site,) = new.glob("lib/python*/site-packages")
    # A folder named in a .pth file comes after the environment's own, and .pth files in it (editable installs) count for nothing.
    (site / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {"OPACUS_AC_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(run(str(python), "-c", "import opacus_ac; print(opacus_ac.__file__)").strip()).is_relative_to(site)
    model = save_chat_model(tmp_path / "model")
    # The tiny model's tokens are bytes, of which 64 are the same in different dialogues.
    command = ["finetune", "--demo", "--dry_run", "--model_name_or_path", str(model), "--lora_layers", "1"]
    said = run(str(new / "bin" / "opacus-ac"), *command, "--max_length", "512")
    assert re.search(r"^records N +10000$", said, re.MULTILINE)
    assert re.search(r"^epsilon at the end +7\.9", said, re.MULTILINE)
    assert len((tmp_path / "cache" / "demo" / "loving.jsonl").read_text().splitlines()) == 10_000


@pytest.mark.slow
def test_a_source_distribution_has_what_builds_it_again(archives):
    (sdist,) = archives.glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    assert {"setup.py", "Dockerfile", ".readthedocs.yaml", "CODE_OF_CONDUCT.md", "docs/index.md"} <= packed


# ---- files that name a version, an extra or a file -------------------------------------------------------------------


def test_the_version_is_the_same_wherever_it_stands():
    scope: dict[str, str] = {}
    exec((ROOT / "opacus_ac" / "_version.py").read_text(encoding="utf-8"), scope)
    version = scope["__version__"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert released[0] == (version, str(citation["date-released"]))
    headings = re.findall(r"^### (.*)$", changelog, re.MULTILINE)
    assert set(headings) <= {"Added", "Changed", "Removed", "Fixed", "Privacy"}


def extras_of(file: str) -> set[str]:
    """Extras that a file installs the package with."""
    return {
        name
        for found in re.findall(r"\[([a-z, ]+)\]", (ROOT / file).read_text(encoding="utf-8"))
        for name in re.split(r", *", found)
    }


@pytest.mark.parametrize("file", ["Dockerfile", ".readthedocs.yaml"])
def test_the_extras_of_a_file_exist(file):
    assert extras_of(file) <= set(CONFIG["options.extras_require"])
    assert "lm" in extras_of(file)


def test_the_container_copies_what_a_build_needs_and_little_else():
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[0] == "*"
    assert kept == {"opacus_ac", "setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in kept)


def test_the_site_is_built_from_settings_that_exist_and_strictly():
    settings = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text(encoding="utf-8"))
    assert (ROOT / settings["sphinx"]["configuration"]).is_file()
    assert settings["sphinx"]["fail_on_warning"]
