"""The utility study runs end to end on a tiny setting, resumes, and its criterion can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_study import TINY

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import clip_study
from clip_study import DEFAULT, FLAT
from common import small_qwen
from common.small_qwen import Settings


def result(name: str, loss: float, seed: int = 0) -> dict:
    course = {"C": [1.0], "clip_rate": [None], "lr_multiplier": [1.0]}
    row = {"name": name, "seed": seed, "settings": Settings().key(), "loss": loss, "loss_before": 9.0, "loss_ema": loss}
    return row | course | {"epsilon": 1.0}


def write(path: Path, losses: dict[str, float], seeds: range = range(3)) -> Path:
    path.write_text("".join(json.dumps(result(n, x, s)) + "\n" for n, x in losses.items() for s in seeds))
    return path


def complete(default_loss: float) -> dict[str, float]:
    losses = {f"flat-{c:g}": 2.0 + c for c in FLAT}
    losses[f"flat-{FLAT[1]:g}"] = 1.0
    return losses | {f"default-{c:g}": 0.9 for c in DEFAULT[:-1]} | {f"default-{DEFAULT[-1]:g}": default_loss}


def test_runs_have_the_same_epsilon_and_follow_their_rule(tmp_path):
    flat = clip_study.run("flat-0.5", 0, TINY, tmp_path)
    default = clip_study.run("default-100", 0, TINY, tmp_path)
    assert flat["epsilon"] == default["epsilon"] > 0
    assert flat["loss_before"] == default["loss_before"]
    assert flat["loss"] != flat["loss_before"]
    assert flat["C"] == [0.5, 0.5]
    assert flat["clip_rate"] == [None, None]
    assert len(default["C"]) == TINY.steps
    assert default["C"][0] == 100
    assert default["C"][1] < 100
    assert default["loss_ema"] != default["loss"]


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(clip_study, "run_all", lambda wanted, *rest: asked.append(wanted))
    out = write(tmp_path / "results.jsonl", {"flat-3": 1.0}, range(1))
    with out.open("a") as stream:
        stream.write('{"name": "flat-30", "se')
    arguments = ["--out", str(out), "--cache", str(tmp_path), "--seeds", "0", "1", "--only", "flat-3", "flat-30"]
    assert clip_study.main(arguments) == 0
    assert asked == [[("flat-30", 0), ("flat-3", 1), ("flat-30", 1)]]


@pytest.mark.parametrize(("loss", "status"), [(1.02, 0), (1.04, 1)])
def test_report_fails_beyond_the_tolerance(tmp_path, capsys, loss, status):
    out = write(tmp_path / "results.jsonl", complete(loss))
    assert clip_study.main(["--out", str(out), "--report"]) == status
    assert f"worst default / best flat = {loss:.4f}" in capsys.readouterr().out


def test_report_fails_while_runs_are_missing(tmp_path, capsys):
    out = write(tmp_path / "results.jsonl", complete(1.0), range(2))
    assert clip_study.main(["--out", str(out), "--report"]) == 1
    assert "INCOMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["flat", "flat-x", "other-3", "paper-3"])
def test_unknown_configuration_is_refused(name):
    with pytest.raises(ValueError, match="unknown configuration"):
        clip_study.clip_arguments(name)


def test_only_replies_carry_labels(tmp_path):
    tokenizer = small_qwen.public_tokenizer(TINY, tmp_path)
    talk = {"messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "go"}]}
    row = small_qwen.encode(talk, tokenizer, TINY)
    labelled = row["labels"] != -100
    assert tokenizer.decode(row["labels"][labelled].tolist()) == "go<end>"
    assert not (labelled & (row["attention_mask"] == 0)).any()
    assert row["input_ids"].shape == (40,)
