"""The README's loop runs as printed."""

import re
from pathlib import Path

import pytest
import tiny_models
import torch
from torch.utils.data import DataLoader

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_loop_of_the_readme(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (40, 8))]
    scope = {"torch": torch, "model": tiny_models.build("qwen2-tied").float(), "loader": DataLoader(rows, batch_size=8)}
    exec(code, scope)
    printed = capsys.readouterr().out
    assert "StepRelease" in printed
    assert "differential privacy by privacy loss distribution accounting; vrdp: " in printed
    assert scope["engine"].get_epsilon(1e-5) <= 8.0


def test_the_commands_of_the_readme_are_those_of_ci():
    ci = (Path(__file__).parent.parent / ".ci" / "run").read_text(encoding="utf-8")
    assert 'pip install -e ".[test]" && pytest' in README
    assert 'pip install --quiet -e ".[test]"' in ci
    assert re.search(r"^OMP_NUM_THREADS=1 pytest$", ci, re.MULTILINE)
