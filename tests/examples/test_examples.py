"""How examples are laid out: what stands where, who imports whom, and how long a file and a function may be."""

import ast
from pathlib import Path

import pytest
from checkout import ROOT

EXAMPLES = ROOT / "examples"
TOP = {
    "answer_questions.py",
    "classify_sentences.py",
    "classify_tokens.py",
    "finetune_chat.py",
    "finetune_distributed.py",
    "finetune_zeroth_order.py",
    "train_loop.py",
}
FILES = sorted(EXAMPLES.rglob("*.py"))
SCRIPTS = [file for file in FILES if file.parent in (EXAMPLES, EXAMPLES / "benchmarks", EXAMPLES / "studies")]


def imported(source: str) -> set[str]:
    """Every module that a source names in an import, at any depth, with all packages that it lies in."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module", "__import__", "run_path", "run_module",
        ):  # fmt: skip
            found |= {
                word.value for word in ast.walk(node) if isinstance(word, ast.Constant) and isinstance(word.value, str)
            }
    return {part for name in found for part in _ends(name)}


def _ends(name: str) -> list[str]:
    """A name, its first part, and its last part, which are what a script could be imported as."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    return [name, parts[0], parts[-1]]


def scripts_imported(source: str, scripts: set[str]) -> set[str]:
    """The scripts among the modules that ``source`` imports; names of the package and of libraries are not examples."""
    outside = ("opacus_ac", "opacus", "torch", "transformers")
    kept = "\n".join(ast.unparse(node) for node in ast.walk(ast.parse(source))
                     if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)
                     and not (getattr(node, "module", None) or "").split(".")[0].startswith(outside))  # fmt: skip
    return imported(kept) & scripts


def test_at_the_top_are_these_scripts():
    assert {file.name for file in EXAMPLES.glob("*.py")} == TOP
    assert {folder.name for folder in EXAMPLES.iterdir() if folder.is_dir() and [*folder.glob("*.py")]} == {
        "benchmarks",
        "studies",
    }


@pytest.mark.parametrize("name", sorted(TOP))
def test_a_script_at_the_top_stands_alone(name):
    """It needs the package and its libraries: no path is added, and no support package imported."""
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    support = {folder.name for folder in EXAMPLES.glob("*/*") if folder.is_dir()}
    assert support >= {"common", "step_benchmark"}
    assert not imported(source) & (support | {"sys.path"})
    assert "sys.path" not in source


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(EXAMPLES)) for file in FILES])
def test_no_example_imports_a_script(file):
    assert scripts_imported(file.read_text(encoding="utf-8"), {script.stem for script in SCRIPTS}) == set()


@pytest.mark.parametrize(
    "line",
    [
        "import clip_study",
        "from clip_study import Settings",
        "from examples.studies import clip_study",
        "def f():\n    import clip_study as c",
        "import importlib\nimportlib.import_module('clip_study')",
        "import runpy\nrunpy.run_path('examples/studies/clip_study.py')",
    ],
)
def test_an_import_of_a_script_is_found(line):
    assert scripts_imported(line, {"clip_study", "families"}) == {"clip_study"}


def test_names_of_the_package_are_no_scripts():
    assert scripts_imported("from opacus_ac.integrations import families", {"families"}) == set()


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    """Lines of a function that are neither empty, nor a comment, nor its docstring."""
    lines = range(function.lineno, (function.end_lineno or 0) + 1)
    first = function.body[0]
    doc = range(first.lineno, (first.end_lineno or 0) + 1) if ast.get_docstring(function) is not None else range(0)
    return sum(n not in doc and bool((text := source[n - 1].strip()) and not text.startswith("#")) for n in lines)


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(EXAMPLES)) for file in FILES])
def test_files_and_functions_are_short(file: Path):
    text = file.read_text(encoding="utf-8")
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert len(text.splitlines()) <= (100 if file.name in {"finetune_chat.py", "train_loop.py"} else 350)
    assert {f.name: n for f in functions if (n := code_lines(f, text.splitlines())) > 40} == {}


def test_a_long_function_is_found():
    text = "def f():\n    'doc'\n" + "    # a comment\n\n    x = 1\n" * 41
    assert code_lines(ast.parse(text).body[0], text.splitlines()) == 42
