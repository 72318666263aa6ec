"""``python -m opacus_ac.testing.coverage``: its outcomes, its file, and a sample of what it says."""

import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch
from once_failed import ONCE_FAILED
from torch import nn

from opacus_ac.testing.coverage import __main__ as command
from opacus_ac.testing.coverage import comparison, log, run, table
from opacus_ac.testing.coverage.case import Case, Finding

pytest.importorskip("transformers.integrations.moe")  # experts are stacked from transformers 5 on
pytest.importorskip("peft")


@pytest.mark.parametrize("name", ONCE_FAILED)
def test_what_once_failed(name: str) -> None:
    kind, case = name.split("/")
    found = run.one((kind, case, "bk"), 60)
    assert found.outcome == ONCE_FAILED[name], f"{found.where}: {found.message}"
    assert found.outcome != "exact" or found.error < 1e-5


def linear(name: str = "Linear") -> Case:
    return run.cases("layers")[name]


def test_another_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    released = comparison._released
    monkeypatch.setattr(comparison, "_released", lambda *args: [1.0001 * g for g in released(*args)])
    found = comparison.examine("layers", linear(), "bk")
    assert (found.outcome, found.message) == ("wrong", "off by 1e-04, most in 0.weight")


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("of the caller")])
def test_an_error_from_elsewhere_is_a_crash(error: Exception) -> None:
    def fails(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if hasattr(model, "_opacus_ac_wrapped") or any(m._forward_pre_hooks for m in model.modules()):
            raise error
        return linear().loss(model, batch)

    found = comparison.examine("layers", replace(linear(), loss=fails), "bk")
    assert (found.outcome, found.where) == ("crash", "first batch")


def test_a_refusal_says_where_and_why() -> None:
    found = comparison.examine("layers", linear("Embedding, scale_grad_by_freq"), "bk")
    assert (found.outcome, found.where) == ("refused", "make_private")
    assert "scale_grad_by_freq" in found.message
    assert comparison.sentence(ValueError("First.\n Second.")) == "First"
    assert comparison.sentence(KeyError("x")) == "KeyError: 'x'"


def test_a_model_that_does_not_run_is_not_built() -> None:
    def without_timm() -> None:
        raise ImportError("install timm")

    found = comparison.examine("vision", Case("a", without_timm), "bk")
    assert (found.outcome, found.message) == ("not built", "ImportError: install timm")


def test_a_case_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "cases", lambda kind: {"a": Case("a", lambda: time.sleep(30))})
    assert run.one(("layers", "a", "bk"), 1).outcome == "time out"


def test_a_process_that_ends_is_a_crash_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        def __init__(self, processes: int) -> None: ...

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, work: object, job: run.Job, limit: int) -> Future:
            future: Future = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr(run, "_pool", Pool)
    jobs = [("layers", name, "bk") for name in ("Linear", "Conv2d")]
    assert [(f.name, f.outcome) for f in run.examined(jobs, 2, 60)] == [("Linear", "crash"), ("Conv2d", "crash")]


def here(jobs: list[run.Job], processes: int, limit: int):
    return (run.one(job, limit) for job in jobs)


def test_a_run_goes_on_from_its_file(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "examined", here)
    options = ["--kinds", "layers", "--only", "/(Linear|BatchNorm1d)$", "--file", str(tmp_path / "found.jsonl")]
    assert command.main([*options, "--modes", "bk"]) == 0
    first = capsys.readouterr()
    assert "[2 of 2]" in first.err
    assert "1 exact, 1 refused" in first.out
    with (tmp_path / "found.jsonl").open("a") as file:
        file.write('{"kind": "layers", "na')  # the run was killed
    assert command.main([*options, "--modes", "bk"]) == 0
    second = capsys.readouterr()
    assert (second.err, second.out) == ("", first.out)
    now = log.versions()
    monkeypatch.setattr(log, "versions", lambda: {**now, "torch": "another"})
    command.main([*options, "--modes", "bk"])
    assert "[2 of 2]" in capsys.readouterr().err


def test_the_command_in_a_process_of_its_own(tmp_path, capsys) -> None:
    options = ["--kinds", "layers", "--only", "layers/Linear$", "--file", str(tmp_path / "f"), "--processes", "1"]
    assert command.main([*options, "--format", "markdown"]) == 0
    assert "| `Linear` | exact | exact |  |" in capsys.readouterr().out


def test_what_is_missing_is_said(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "peft" else object())
    run.cases.cache_clear()
    assert command.main(["--kinds", "peft", "--list"]) == 0
    assert capsys.readouterr().err == "peft is left out: peft cannot be imported\n"
    run.cases.cache_clear()


def test_the_list_has_every_causal_language_model(capsys) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    command.main(["--list"])
    listed = capsys.readouterr().out.split("\n")
    assert {f"causal/{name}" for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} < set(listed)
    assert {name.split("/")[0] for name in listed if name} == set(run.KINDS) == set(table.TITLES)
    assert set(ONCE_FAILED) < set(listed)


def test_tables() -> None:
    found = [
        Finding("layers", "a", "bk", "exact", error=1e-12),
        Finding("layers", "a", "hooks", "refused", "make_private", "x | y"),
        Finding("layers", "b", "bk", "wrong", message="off by 1"),
    ]
    assert "layers/a" in table.text(found)
    assert table.text(found).endswith("layers     bk     1 exact, 1 wrong\nlayers     hooks  1 refused")
    page = table.markdown(found, {"torch": "1", "transformers": "2", "peft": "3"})
    assert "| `a` | exact | refused (make_private) | x \\| y |\n| `b` | wrong |  | off by 1 |" in page
    assert "| Layers of torch | bk | 1 exact, 1 wrong |" in page
