"""The comparison of families, end to end on tiny models: one budget for all, resumable results, a table."""

from __future__ import annotations

import json
import math
import subprocess

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import families
from tiny_chat import save_chat_model
from tiny_study import TINY

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SIZES = ["--steps", "2", "--records", "60", "--batch", "12", "--heldout", "3", "--delta", "1e-3", "--physical", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_chat_model(tmp_path_factory.mktemp("model")))


WEIGHTS = {"full": (10608, 7952), "lora": (320,), "allocation": (320,), "paid": (320,), "zeroth-order": (16,)}
"""Of the tiny chat model, and of the tiny version of the small one."""


def check(found: dict, family: str) -> None:
    assert found["family"] == family
    assert 7.9 < found["epsilon"] <= 8
    assert found["before"].keys() == found["after"].keys() == found["averaged"].keys() == {"loving", "angry"}
    assert all(math.isfinite(x) for name in ("before", "after", "averaged") for x in found[name].values())
    assert found["weights"] in WEIGHTS[family]
    assert found["processor_seconds"] > 0
    assert found["model_mib"] > 0


def child(capsys, *words: str) -> dict:
    families.main([*words])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_trains_a_chat_model_under_the_same_budget(family, model, tmp_path, capsys):
    common = ["--model", model, *SIZES, "--max-length", "120", "--output", str(tmp_path)]
    check(child(capsys, *common, "--child", family, "1"), family)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_trains_the_small_model(family, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(families.small_qwen, "Settings", lambda: TINY)
    found = child(capsys, "--model", "small", *SIZES, "--output", str(tmp_path), "--child", family, "1")
    check(found, family)
    assert found["rate"] == families.RATES["small"][family]


def stub(argv: list[str], family: str, seed: int) -> dict:
    args = families.arguments(argv)
    settings = families.settings_of(args)
    rate = families.RATES["smollm2"][family] if args.lr is None else args.lr
    losses = {"loving": 2.0 + seed, "angry": 4.0}
    return {
        "family": family, "seed": seed, "rate": rate, "settings": settings.key(), "epsilon": 7.99, "weights": 1234, "before": losses,
        "after": losses, "averaged": losses, "processor_seconds": 60.0, "seconds": 90.0, "model_mib": 500.0, "mib_above": 70.0,
    }  # fmt: skip


def test_finished_runs_are_kept_and_not_repeated(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(families, "measure", lambda *given: asked.append(given[1:]) or stub(*given))
    words = ["--families", "lora", "full", "--output", str(tmp_path)]
    families.main([*words, "--seeds", "0"])
    with (tmp_path / "results.jsonl").open("a") as stream:
        stream.write('{"family": "lora", "se')
        stream.write("\n")
    families.main([*words, "--seeds", "0", "1"])
    assert asked == [("full", 0), ("lora", 0), ("full", 1), ("lora", 1)]
    families.main([*words, "--seeds", "0", "--steps", "3"])  # another table
    assert asked[4:] == [("full", 0), ("lora", 0)]
    capsys.readouterr()
    results = families.main([*words, "--seeds", "0", "1", "--report"])
    assert len(results) == 4
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4
    assert rows[2].startswith(
        "| DP-Adam-AC, all weights | 1,234 | 2 | 7.990 | 2.500 | 2.500 (2.000 to 3.000) | 2.500 | 4.000 | 4.000 | 60 | 90 | 70 |"
    )
    assert len(asked) == 6


def test_a_learning_rate_of_its_own_is_a_run_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(families, "measure", stub)
    words = ["--families", "lora", "--output", str(tmp_path)]
    families.main(words)
    assert len(families.main([*words, "--lr", "0.5"])) == 1
    assert len(families.main(words)) == 1
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("status", "output"), [(0, 'something\n{"family": "lora"}\n'), (1, "")])
def test_a_run_is_a_process_of_its_own_and_a_failed_one_is_named(status, output, monkeypatch):
    seen = []
    done = subprocess.CompletedProcess([], status, output)
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: seen.append((command, kwargs["env"])) or done)
    if status:
        with pytest.raises(SystemExit, match="lora with seed 3 failed"):
            families.measure(["--steps", "2"], "lora", 3)
    else:
        assert families.measure(["--steps", "2"], "lora", 3) == {"family": "lora"}
    command, environment = seen[0]
    assert command[1:] == [families.__file__, "--steps", "2", "--child", "lora", "3"]
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "65536"


def test_the_length_of_the_small_model_is_fixed():
    with pytest.raises(ValueError, match="--max-length"):
        families.main(["--model", "small", "--max-length", "64"])
