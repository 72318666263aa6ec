"""docs/on-a-gpu.md: its table is what its command prints, its targets are those of the check, its devices those of make_private."""

import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import memory_table
from checkout import ROOT
from device_checks.entries import ENTRIES
from device_checks.speed import SPEEDS

from opacus_ac.engine.checks import _DEVICES, _NOT_A_DEVICE

PAGE = (ROOT / "docs" / "on-a-gpu.md").read_text(encoding="utf-8")


def printed() -> list[str]:
    return PAGE.split(memory_table.BEGIN)[1].split(memory_table.END)[0].strip().splitlines()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B, LoRA", "ViT-B (197 patches)"])
def test_rows_of_the_table_are_what_the_command_prints(name):
    row = f"| {' | '.join(memory_table.row(name, memory_table.SHAPES[name]))} |"
    assert row in printed(), "run python examples/benchmarks/memory_table.py --write"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_table_is_what_the_command_prints():
    assert printed() == list(memory_table.lines()), "run python examples/benchmarks/memory_table.py --write"


def test_the_command_writes_into_the_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{memory_table.BEGIN}\nold\n{memory_table.END}\nafter\n")
    monkeypatch.setattr(memory_table, "PAGE", page)
    monkeypatch.setattr(memory_table, "SHAPES", {})
    monkeypatch.setattr("sys.argv", ["memory_table.py", "--write"])
    memory_table.main()
    head = f"| {' | '.join(memory_table.HEADER)} |\n{'|---' * len(memory_table.HEADER)}|"
    assert page.read_text() == f"before\n{memory_table.BEGIN}\n\n{head}\n\n{memory_table.END}\nafter\n"


def test_devices_on_the_page_are_those_of_make_private():
    rows = dict(re.findall(r"^\| `(\w+)`.*? \| (works|refused|not refused)", PAGE, re.MULTILINE))
    accepted = {name for name, said in rows.items() if said != "refused"}
    assert accepted == set(_DEVICES)
    assert {name for name, said in rows.items() if said == "refused"} == {*_NOT_A_DEVICE, "xpu"}


def test_targets_on_the_page_are_those_of_the_check():
    full, adapters = (
        next(s.target for s in SPEEDS if s.name == name) for name in ("qwen2.5-0.5b full", "llama-8b lora")
    )
    text = " ".join(PAGE.split())
    assert f"at most {full.time:.2f} of the time and {full.memory:.2f} of the memory" in text
    assert f"{adapters.time:.2f} and {adapters.memory:.2f} with LoRA" in text
    assert f"at most {full.noise:.0%}".replace("%", " %") + " of the step for noise" in text
    assert f"{full.ahead:g} times as fast as Opacus" in text


def test_the_page_says_what_was_measured():
    assert "No training step of the present version has been run or timed on a GPU" in PAGE
    assert "python examples/benchmarks/device_check.py" in PAGE
    assert len(ENTRIES) == 13
