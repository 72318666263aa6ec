"""The border between the two sides of a step is a border between files: the public side cannot see what has no noise yet."""

import ast
from collections.abc import Iterator

import pytest
from checkout import ROOT

FILES = {
    name: (ROOT / "opacus_ac" / name).read_text()
    for name in (
        "optimizer/public_side.py",
        "optimizer/update.py",
        "optimizer/fused.py",
        "optimizer/auto_adam.py",
        "optimizer/path_length.py",
        "optimizer/path_start.py",
        "optimizer/pieces.py",
        "zeroth_order/directional_update.py",
    )
}
PRIVATE_ROOMS = ("opacus_ac.grad_sample", "opacus_ac.sampling", "opacus_ac.release.statistics", "opacus_ac.loss")
PRIVATE_FILES = (
    "loss_tape", "measurement", "mechanism", "origin", "private_side", "records", "step_checks", "sum_release", "turns",
)  # fmt: skip
PRIVATE_NAMES = {
    "alone",
    "factors",
    "grad_sample",
    "mechanism",
    "observe_private",
    "origin",
    "plan",
    "source",
    "statistics",
    "summed_grad",
    "tape",
    "watch",
}
RECEIVED = {
    "None", "Any", "bool", "Callable", "Iterable", "Mapping", "Sequence", "tuple", "dict", "float", "int", "list", "str", "AbstractContextManager", "Announce", "Apply", "ClipPolicy",
    "ClipRateControl", "Course", "GroupWeights", "Optimizer", "Parameter", "Reducer", "ReleasedGradients", "Slopes", "State", "StepRelease",
    "Tensor", "Update", "WeightEMA", "nn",
}  # fmt: skip


def trespasses(text: str) -> Iterator[str]:
    """What a file of the public side takes from the private side."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in (f"{module}.{alias.name}".strip(".") for alias in node.names):
                if name.startswith(PRIVATE_ROOMS) or set(name.split(".")) & set(PRIVATE_FILES):
                    yield f"imports {name}"
        elif isinstance(node, ast.Attribute) and node.attr in PRIVATE_NAMES:
            yield f"reads .{node.attr}"
        elif isinstance(node, ast.arg) and node.arg not in ("self", "cls"):
            if node.annotation is None:
                yield f"{node.arg} has no type"
                continue
            names = {n.id for n in ast.walk(node.annotation) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(node.annotation) if isinstance(n, ast.Attribute)}
            yield from (f"receives {name}" for name in sorted(names - RECEIVED))


@pytest.mark.parametrize("name", FILES)
def test_the_public_side_starts_from_a_release(name):
    assert list(trespasses(FILES[name])) == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (
            "from opacus_ac.grad_sample.source import GradientSource",
            "imports opacus_ac.grad_sample.source.GradientSource",
        ),
        ("import opacus_ac.sampling.plan", "imports opacus_ac.sampling.plan"),
        ("from opacus_ac.release import statistics", "imports opacus_ac.release.statistics"),
        ("from opacus_ac.optimizer import turns", "imports opacus_ac.optimizer.turns"),
        ("def follow(self, source: GradientSource) -> None: ...", "receives GradientSource"),
        ("def follow(self, anything) -> None: ...", "anything has no type"),
        ("def follow(self) -> None:\n    self.inner.source.sums()", "reads .source"),
        ("def follow(self, parameter: nn.Parameter) -> None:\n    parameter.summed_grad.norm()", "reads .summed_grad"),
    ],
)
def test_a_use_of_the_private_side_is_found(planted, found):
    assert list(trespasses(f"{FILES['optimizer/public_side.py']}\n{planted}\n")) == [found]
