"""The package itself: light imports, direction of imports, and a wheel that works without extras."""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from checkout import ROOT

PACKAGE = ROOT / "opacus_ac"
PLACES = (PACKAGE, PACKAGE / "engine", PACKAGE / "grad_sample", PACKAGE / "integrations")

#: Rooms and single modules from the bottom up; a room imports rooms of lower layers only.
LAYERS = (
    {"_lazy", "_version", "errors"},
    {"_bytes", "_validate", "loss", "protocols"},
    {"accounting", "noise"},
    {"grad_sample"},
    {"distributed", "sampling"},
    {"release"},
    {"allocation", "budget", "clipping"},
    {"optimizer"},
    {"models", "zeroth_order"},
    {"checkpoint"},
    {"engine"},
    {"testing"},
    {"audit", "tensorboard"},
    {"integrations"},
    {"cli"},
    {"__main__"},
)
LAYER = {room: number for number, layer in enumerate(LAYERS) for room in layer}
MODULES_BESIDE_THE_FOLDERS = 8

MOST_LINES, MOST_CODE_LINES = 350, 40
#: Files and functions that are longer, each with the reason. The list may only shrink.
TOO_LONG = {
    "noise/gaussian_gpu.py::_add_noise": "a Triton kernel: the 16 words of the cipher are variables, which have no loops",
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("opacus_ac."):
                yield module_of(name)


def module_of(name: str) -> str:
    """The longest prefix of a dotted name that is a file or a folder."""
    parts = name.split(".")
    while not (ROOT.joinpath(*parts).with_suffix(".py").exists() or ROOT.joinpath(*parts, "__init__.py").exists()):
        parts.pop()
    return ".".join(parts)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_rooms_of_lower_layers_only(path):
    own = room(path)
    for module in imports(path):
        other = module.split(".")[1] if "." in module else "__init__"
        if own == "__init__":
            assert other in {"_lazy", "_version"}, f"{path.name} must not import {module}"
        elif other not in (own, "__init__"):
            assert LAYER[other] < LAYER[own], f"{path.relative_to(ROOT)} must not import {module}"


def test_every_room_has_a_layer():
    assert {room(p) for p in PACKAGE.rglob("*.py")} - {"__init__"} == set(LAYER)


def test_the_page_on_the_architecture_has_these_layers():
    page = (ROOT / "docs" / "architecture.md").read_text()
    found = {
        name.removesuffix("/").removesuffix(".py"): int(row[1])
        for row in re.finditer(r"^\| (\d+) \| (.*?) \|", page, re.MULTILINE)
        for name in re.findall(r"`([\w/.]+)`", row[2])
    }
    assert found == LAYER


def test_the_page_on_the_architecture_names_files_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", page))
    assert len(named) > 50
    assert [name for name in named if not any((place / name).exists() for place in (ROOT, *PLACES))] == []


def test_few_modules_stand_beside_the_folders():
    assert len(list(PACKAGE.glob("*.py"))) <= MODULES_BESIDE_THE_FOLDERS


def test_no_file_imports_itself_over_others():
    files = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in PACKAGE.rglob("*.py")
    }
    edges = {name: set(top_imports(path)) & set(files) - {name} for name, path in files.items()}
    assert not list(cycles(edges))


def test_a_cycle_of_imports_is_found():
    assert list(cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}))
    assert not list(cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}))


def test_files_and_functions_are_short_enough_to_read():
    found = dict(entry for path in sorted(PACKAGE.rglob("*.py")) for entry in sizes(path))
    long = {name for name, lines in found.items() if lines > (MOST_CODE_LINES if "::" in name else MOST_LINES)}
    assert {name: found[name] for name in long - set(TOO_LONG)} == {}
    assert sorted(set(TOO_LONG) - long) == [], "short enough by now, or gone: take it off TOO_LONG"


def test_what_stands_in_a_function_is_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    body = '    """What it does.\n\n    At length.\n    """\n    # Why.\n\n' + "    x = 1\n" * 40
    (tmp_path / "file.py").write_text(
        f"class A:\n    def f(\n        self,\n    ):\n        pass\n\n\ndef g(x):\n{body}"
    )
    assert dict(sizes(tmp_path / "file.py")) == {"file.py": 54, "file.py::A.f": 4, "file.py::g": 41}


def sizes(path: Path) -> Iterator[tuple[str, int]]:
    """Number of lines of a file, and of code lines of its functions: neither blank, comments, nor docstrings."""
    name, text = path.relative_to(PACKAGE).as_posix(), path.read_text()
    lines = text.splitlines()
    yield name, len(lines)

    def visit(node: ast.AST, outer: str) -> Iterator[tuple[str, int]]:
        for inner in ast.iter_child_nodes(node):
            own = outer
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                own = f"{outer}.{inner.name}".strip(".")
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                first = inner.body[0]
                described = ast.get_docstring(inner) is not None
                doc = range(first.lineno, (first.end_lineno or 0) + 1) if described else ()
                code = [n for n in range(inner.lineno, (inner.end_lineno or 0) + 1) if n not in doc]
                yield f"{name}::{own}", sum(lines[n - 1].strip()[:1] not in ("", "#") for n in code)
            yield from visit(inner, own)

    yield from visit(ast.parse(text), "")


def top_imports(path: Path) -> Iterator[str]:
    """Modules that a file imports when it is itself imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("opacus_ac"):
            for alias in node.names:
                yield module_of(f"{node.module}.{alias.name}")


def cycles(edges: dict[str, set[str]]) -> Iterator[tuple[str, ...]]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        yield tuple(error.args[1])


def run(code: str, *options: str) -> str:
    return subprocess.run([sys.executable, *options, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_neither_torch_nor_opacus():
    loaded = run(
        "import sys, opacus_ac; dir(opacus_ac); print([m for m in ('torch', 'opacus', 'numpy') if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_every_exported_name_exists():
    import opacus_ac

    for name in opacus_ac.__all__:
        assert getattr(opacus_ac, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        opacus_ac.nonsense  # noqa: B018


@pytest.mark.slow
def test_wheel_works_without_extras(tmp_path):
    """Build a wheel, unpack it alone, and use it where none of the extras can be imported."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("opacus_ac-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "opacus_ac/py.typed" in names
    assert not [n for n in names if n.startswith(("tests", "examples", "docs"))]
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
for name in ('transformers', 'datasets', 'peft', 'accelerate', 'gguf', 'tensorboard', 'tqdm'):
    sys.modules[name] = None  # importing it raises ImportError
import opacus_ac, torch
assert opacus_ac.__file__.startswith({str(tmp_path)!r})
from torch.utils.data import DataLoader, TensorDataset
model = torch.nn.Linear(4, 2)
data = DataLoader(TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,))), batch_size=8)
engine = opacus_ac.PrivacyEngine()
model, optimizer, loader = engine.make_private(module=model, optimizer=torch.optim.AdamW(model.parameters()),
    data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0)
for x, y in loader:
    optimizer.zero_grad(); torch.nn.functional.cross_entropy(model(x), y).backward(); optimizer.step()
print(engine.get_epsilon(1e-3))
"""
    assert float(run(code, "-W", "ignore")) > 0
