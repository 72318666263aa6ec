"""The package itself: light imports, direction of imports, and a wheel that works without extras."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT

PACKAGE = ROOT / "opacus_ac"

# Rooms from the bottom up: a module may import those of lower rank, and of its own rank within its own room.
RANK = {
    "gaussian": -1, "secret_state": -1, "forward_randomness": 0, "key_stream": -1, "device_noise": -1,
    "_version": 0, "errors": 0, "randomness": 0, "accounting": 0, "loss": 0, "testing": 2, "testing.policies": 7,
    "statistics": 1, "mechanism": 3, "clipping": 4, "control": 4, "grad_sample": 1, "delivery": 0, "watch": 0, "logical_batch": 0, "sampling": 1, "origin": 2, "users": 2, "data": 3, "allocation": 4, "allocation_rule": 3, "dp_adam": 0,
    "ledger": 1, "budget": 2, "account": 4, "fused_step": 1, "step_state": 5, "optimizer": 6, "report": 7, "projection": 7, "checkpoint": 7, "integrations": 7, "zeroth_order": 7, "preparation": 8, "zeroth_order.preparation": 8.5, "accounted_engine": 8.7, "engine": 9,
    "charges": 0.5,
    "public_randomness": 0, "chosen_records": 0, "fixed_length": 1,
    "audit": 10, "tensorboard": 10,
    # Rooms within a room: the engine uses what makes a loss per record, the Trainer uses the engine.
    "integrations.default_model": 6, "integrations.trainer_arguments": 7, "integrations.trainer_checks": 8, "integrations.public_rows": 0, "integrations.trainer_silent": 8, "integrations.trainer_released": 8,
    "integrations.finetune_arguments": 8, "integrations.finetune_callbacks": 8, "integrations.trainer_ranks": 9, "integrations.trainer_checkpoint": 10, "integrations.lightning_released": 10, "integrations.lightning": 11,
    "integrations.trainer_callback": 11, "integrations.trainer": 12, "integrations.finetune": 13, "cli": 14, "__main__": 15,
    # The mechanism and the optimizer use the reducers; the checkpoints of several processes use the engine.
    "distributed": 0, "distributed.world": 1, "distributed.reducers": 2, "distributed.sharded": 3, "distributed.meeting": 3, "distributed.records": 3, "distributed.roles": 4,
    "distributed.checkpoint": 10,
}  # fmt: skip


def room(path: Path) -> str:
    return named(path.relative_to(PACKAGE).with_suffix("").parts)


def named(parts: tuple[str, ...]) -> str:
    inner = ".".join(parts[:2])
    return inner if inner in RANK else parts[0]


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "opacus_ac" else [node.module]
            )
        for name in names:
            if name.startswith("opacus_ac."):
                yield named(tuple(name.split(".")[1:]))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_the_layers(path):
    own = room(path)
    if own == "__init__":
        assert set(imports(path)) == {"_version"}
        return
    for other in imports(path):
        assert other == own or RANK[other] < RANK[own], f"{own} must not import {other}"


def test_every_room_has_a_rank():
    assert {room(p) for p in PACKAGE.rglob("*.py")} - {"__init__"} == set(RANK)


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
