"""The site: it builds without a warning, and its reference has every public name.

A name is public if ``__all__`` of a room of opacus_ac has it, or a module directly in opacus_ac, in opacus_ac.models or in
opacus_ac.integrations has it: in ``__all__`` if there is one, else every class and function that it defines without an underscore
(constants are details unless ``__all__`` says otherwise). Not public are the modules of ``INTERNAL``. Of a public class, its methods
and properties without an underscore are public too, those of its bases in opacus_ac included.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from checkout import ROOT

import opacus_ac

DOCS = ROOT / "docs"

#: Modules without public names, and why.
INTERNAL = {
    "_bytes": "how tensors are read as bytes",
    "_lazy": "how rooms import names on first use",
    "_validate": "parts of argument checks",
    "_version": "opacus_ac.__version__ says it",
    "__main__": "a script",
    "protocols": "what the parts of a private optimizer offer each other",
    "models.loss_heads": "parts of what makes losses per record",
    "models.loss_entries": "parts of what makes losses per record",
    "models.pairs": "how PrivateDPOTrainer runs the two rows of a record",
    "models.record_mean": "parts of what makes losses per record",
    "integrations.lightning_released": "parts of Lightning's PrivacyCallback",
    "integrations.run_registry": "the list of runs that PrivateTrainer keeps",
    "integrations.public_rows": "parts of PrivateTrainer, of the command line and of Lightning's callback",
    "integrations.file_digest": "shared by checks of files",
    "integrations.same_file": "a check of the command line",
}


def modules() -> Iterator[ModuleType]:
    """The package, its rooms, and the modules directly in it and in integrations, less the internal ones."""
    yield opacus_ac
    for room in (opacus_ac, *map(importlib.import_module, ("opacus_ac.integrations", "opacus_ac.models"))):
        for info in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
            if info.name.removeprefix("opacus_ac.") not in INTERNAL:
                yield importlib.import_module(info.name)


def names_of(module: ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("_")]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def is_internal(module: str) -> bool:
    """Whether a module is one of ``INTERNAL``, or stands in such a room."""
    name = module.removeprefix("opacus_ac.")
    return any(name == internal or name.startswith(f"{internal}.") for internal in INTERNAL)


def members_of(cls: type, documented: Iterable[type]) -> Iterator[str]:
    """Methods and properties of the class and of those of its bases here that have no entry and are not internal."""
    for base in cls.__mro__:
        ours = base.__module__.startswith("opacus_ac") and not is_internal(base.__module__)
        if base is cls or (ours and base not in documented):
            for name, value in vars(base).items():
                kinds = (property, classmethod, staticmethod, functools.cached_property)
                if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds)):
                    yield name


def public_names(where: Iterable[ModuleType]) -> dict[str, set[str]]:
    """Public name -> the names under which the reference may have it: an export also under where it is defined."""
    found: dict[str, object] = {
        f"{module.__name__}.{name}": getattr(module, name) for module in where for name in names_of(module)
    }
    aliases: dict[str, set[str]] = {}
    classes = [value for value in found.values() if inspect.isclass(value)]
    for name, value in found.items():
        named = inspect.isclass(value) or inspect.isfunction(value)
        same = {other for other, o in found.items() if o is value} if named else {name}
        aliases[name] = same | ({f"{value.__module__}.{value.__qualname__}"} if named else set())
        if inspect.isclass(value):
            for member in members_of(value, classes):
                aliases[f"{name}.{member}"] = {f"{alias}.{member}" for alias in aliases[name]}
    return aliases


def missing(public: dict[str, set[str]], reference: set[str]) -> list[str]:
    return sorted(name for name, aliases in public.items() if not aliases & reference)


def build(source: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A strict build: every warning counts, references without a target included."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-n",
        "-b",
        "html",
        *options,
        str(source),
        str(out),
    ]
    return subprocess.run(command, capture_output=True, text=True)


def inventory(path: Path) -> set[str]:
    """Python names of an ``objects.inv``: four lines of text, then zlib."""
    *_, packed = path.read_bytes().split(b"\n", 4)
    lines = zlib.decompress(packed).decode().splitlines()
    return {line.split(" ", 1)[0] for line in lines if line.split(" ", 2)[1].startswith("py:")}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    made = build(DOCS, out)
    assert made.returncode == 0, made.stderr
    return out


@pytest.mark.slow
def test_the_reference_has_every_public_name(site):
    public = public_names(modules())
    assert "opacus_ac.PrivacyEngine.get_epsilon" in public
    assert "opacus_ac.clipping.ClipPolicy.factors" in public
    assert "opacus_ac.zeroth_order.PRESETS" in public
    without_entry = missing(public, inventory(site / "objects.inv"))
    assert not without_entry, without_entry


@pytest.mark.slow
def test_a_public_name_without_an_entry_is_found(site, monkeypatch):
    before = missing(public_names(modules()), inventory(site / "objects.inv"))

    def made_up(): ...

    class Made:
        def up(self): ...

    made_up.__module__ = Made.__module__ = opacus_ac.loss.__name__
    made_up.__qualname__, Made.__qualname__ = "made_up", "Made"
    monkeypatch.setattr(opacus_ac.loss, "made_up", made_up, raising=False)
    monkeypatch.setattr(opacus_ac.loss, "Made", Made, raising=False)
    monkeypatch.setattr(opacus_ac.clipping.ClipPolicy, "made_up", made_up, raising=False)
    monkeypatch.setattr("opacus_ac.accounting.__all__", [*opacus_ac.accounting.__all__, "grid"])
    after = missing(public_names(modules()), inventory(site / "objects.inv"))
    assert [name for name in after if name not in before] == [
        "opacus_ac.accounting.grid",
        "opacus_ac.clipping.ClipPolicy.made_up",
        "opacus_ac.loss.Made",
        "opacus_ac.loss.Made.up",
        "opacus_ac.loss.made_up",
    ]


def test_internal_modules_exist():
    for name in INTERNAL:
        place = ROOT.joinpath("opacus_ac", *name.split("."))
        assert place.with_suffix(".py").is_file() or (place / "__init__.py").is_file(), name


@pytest.mark.slow
def test_every_page_is_in_the_site_and_every_link_to_a_file_works(site):
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file()
    text = (site / "index.html").read_text(encoding="utf-8")
    for target in ("security.html", "guarantee.html", "changelog.html", "_images/finetune_chat.png"):
        assert f'"{target}' in text
    assert "security.html" in (site / "guarantee.html").read_text(encoding="utf-8")
    for page in site.rglob("*.html"):
        assert "cdn." not in page.read_text(encoding="utf-8"), f"{page.name} loads from another address"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[page](gone.md)", "gone"),
        ("[section](other.md#gone)", "gone"),
        ("{class}`PrivacyEngin`", "reference target not found: PrivacyEngin"),
        ("{data}`opacus_ac.accounting.events.GONE`", "reference target not found: opacus_ac.accounting.events.GONE"),
        ("{class}`opacus_ac.PrivacyEngin`", "reference target not found: opacus_ac.PrivacyEngin"),
    ],
)
def test_a_broken_reference_fails_the_build(text, words, tmp_path):
    (tmp_path / "index.md").write_text(f"# Site\n\n```{{toctree}}\nother\n```\n\n{text}\n")
    (tmp_path / "other.md").write_text("# Other\n")
    made = build(tmp_path, tmp_path / "out", "-c", str(DOCS))
    assert made.returncode != 0
    assert words in made.stderr
