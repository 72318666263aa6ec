"""Every package that ``opacus_ac`` imports is named in setup.cfg, where whoever installs it looks."""

import ast
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import packages_distributions

import pytest
from checkout import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = ROOT / "opacus_ac"
CONFIG = ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
DISTRIBUTIONS = packages_distributions()
FOR_DEVELOPERS = {"test", "docs"}
"""Extras that users do not install."""
ROOMS_OF_EXTRAS = {"integrations", "models", "tensorboard"}
"""Rooms whose files may import a package of an extra when they are themselves imported."""
BROUGHT_BY_TORCH = {"triton"}
"""torch requires it on Linux with CUDA, which is where opacus_ac/noise/gaussian_gpu.py is used."""


def named(requirements: str) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements.split("\n") if line.strip()}


REQUIRED = named(CONFIG["options"]["install_requires"])
EXTRAS = {name: named(lines) for name, lines in CONFIG["options.extras_require"].items()}


def imported(tree: ast.AST) -> Iterator[str]:
    """Names, up to the first dot, of the modules that some code imports, without those of Python and of this package."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module)):
                modules = [module]
            case _:
                continue
        for top in {module.partition(".")[0] for module in modules}:
            if top not in sys.stdlib_module_names and top != "opacus_ac":
                yield top


def on_import(source: str) -> ast.AST:
    """The code of a file without its functions: what runs when it is imported."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return tree


def undeclared(modules: Iterator[str], declared: set[str]) -> set[str]:
    """Modules of which no distribution is declared; one that is not installed is taken for its own distribution."""
    return {
        module
        for module in modules
        if not {canonicalize_name(name) for name in DISTRIBUTIONS.get(module, [module])} & declared
    }


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_import_is_required_or_of_an_extra_for_users():
    declared = REQUIRED.union(
        BROUGHT_BY_TORCH, *(names for extra, names in EXTRAS.items() if extra not in FOR_DEVELOPERS)
    )
    found = {path: undeclared(imported(ast.parse(path.read_text("utf-8"))), declared) for path in FILES}
    assert {str(path.relative_to(ROOT)): modules for path, modules in found.items() if modules} == {}


def test_the_rooms_for_everybody_are_imported_without_extras():
    core = [path for path in FILES if path.relative_to(PACKAGE).parts[0] not in ROOMS_OF_EXTRAS]
    found = {
        path: undeclared(imported(on_import(path.read_text("utf-8"))), REQUIRED | BROUGHT_BY_TORCH) for path in core
    }
    assert {str(path.relative_to(ROOT)): modules for path, modules in found.items() if modules} == {}


def test_every_requirement_is_imported():
    used = {name for path in FILES for name in imported(ast.parse(path.read_text("utf-8")))}
    distributions = {canonicalize_name(name) for module in used for name in DISTRIBUTIONS.get(module, [module])}
    assert REQUIRED - distributions == set()


@pytest.mark.parametrize(
    ("source", "found", "found_on_import"),
    [
        ("import yaml", {"yaml"}, {"yaml"}),
        ("def f():\n    import peft.utils", {"peft"}, set()),
        ("from notinstalled.part import name", {"notinstalled"}, {"notinstalled"}),
        ("import torch, scipy.stats\nfrom pathlib import Path\nfrom opacus_ac.loss import LossTape", set(), set()),
    ],
)
def test_an_import_that_is_not_declared_is_found(source, found, found_on_import):
    assert undeclared(imported(ast.parse(source)), REQUIRED) == found
    assert undeclared(imported(on_import(source)), REQUIRED) == found_on_import
