"""The README's loop as a script: it has the README's lines, and runs."""

import os
import re
import subprocess
import sys

from checkout import ROOT

SCRIPT = ROOT / "examples" / "train_loop.py"


BEGINS = "engine = PrivacyEngine()"


def lines_of(text: str) -> str:
    """The README's loop: its first Python block, after the imports, data and model, which the script has of its own."""
    block = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[0]
    return block[block.index(BEGINS) :].strip("\n")


def test_the_script_ends_with_the_loop_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    loop = lines_of(readme)
    assert "make_private" in loop
    assert "optimizer.step()" in loop
    assert SCRIPT.read_text(encoding="utf-8").endswith("\n" + loop + "\n")


def test_another_line_in_the_readme_is_found():
    loop = lines_of(f"text\n\n```python\nimport torch\n\na = 1\n{BEGINS}\nb = 2\n```\n\n```python\nc = 3\n```\n")
    assert loop == f"{BEGINS}\nb = 2"


def test_the_script_trains_within_its_budget(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    epsilon = float(re.search(r"^\((\d+\.\d+), 0\.0001\)-differential privacy", done.stdout, re.MULTILINE).group(1))
    assert 0 < epsilon <= 8
    assert re.search(r"^  steps +33$", done.stdout, re.MULTILINE)  # three passes over 512 sentences in batches of 50
