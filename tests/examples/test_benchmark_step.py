"""The benchmark runs end to end on a tiny model, and a variant that fails is reported. No time is asserted."""

from __future__ import annotations

import json
import math
import time

import pytest

pytest.importorskip("transformers")

import benchmark_step
from step_benchmark.measuring import Figures, Group, groups
from step_benchmark.shapes import SHAPES, new_model
from step_benchmark.tables import report
from step_benchmark.variants import VARIANTS, Options, Trial, Variant, not_applicable

FAST = ["--shapes", "tiny", "--rounds", "2", "--memory-rounds", "1", "--threads", "1"]


def rows(table: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines if name != "variant"}


@pytest.mark.slow
def test_every_variant_gets_a_row_and_one_that_fails_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(VARIANTS, "bk", Variant("opacus_ac", "no such mode"))
    good, raw = ["plain", "opacus-hooks", "opacus-ghost", "hooks"], tmp_path / "raw.json"
    assert benchmark_step.main([*FAST, "--variants", *good, "bk", "--json", str(raw)]) == 1
    captured = capsys.readouterr()
    assert "torch" in captured.out.splitlines()[0]
    assert "--rounds 2" in captured.out.splitlines()[0]
    table = rows(captured.out)
    assert list(table) == [*good, "bk"]
    assert all(float(table[name][0]) > 0 and float(table[name][2]) > 0 for name in good)
    assert table["plain"][2] == "1.00"
    assert "Traceback" in captured.err
    assert "grad_sample_mode='no such mode' is not available" in captured.err
    assert table["bk"][-1].startswith("FAILED: ValueError: grad_sample_mode='no such mode'")
    figures = json.loads(raw.read_text())["shapes"]["tiny"]
    assert all(len(figures[name]["seconds"]) == len(figures[name]["ratios"]) == 2 for name in good)
    assert all(len(figures[name]["peak_mib"]) == 1 for name in good)


def test_exit_status_and_share_of_the_noise(capsys, monkeypatch):
    """Times of two rounds by hand: the comparison is within a round, and no failure means status 0."""

    def measure(shape, names, options, at_once):
        group = object.__new__(Group)
        group.results = {name: Figures() for name in ("plain", "bk", "bk-no-noise")}
        group.note_times({"plain": 1.0, "bk": 2.0, "bk-no-noise": 1.5})
        group.note_times({"plain": 10.0, "bk": 20.0, "bk-no-noise": 15.0})
        return group.results

    monkeypatch.setattr(benchmark_step, "measure", measure)
    assert benchmark_step.main([*FAST]) == 0
    table = rows(capsys.readouterr().out)
    assert [cells[2] for cells in table.values()] == ["1.00", "2.00", "1.50"]
    assert [cells[-1] for cells in table.values()] == ["-", "25%", "-"]


def test_the_defaults_have_a_table_of_their_own(capsys, monkeypatch):
    """Ratios of rounds by hand, for all lengths."""
    asked = []

    def measure(shape, names, options, at_once):
        asked.append((shape.length, tuple(names)))
        group = object.__new__(Group)
        group.results = {name: Figures() for name in ("plain", *names)}
        for slow in (1.0, 2.0, 40.0):
            group.note_times({"plain": slow, **{name: slow * (1.5 if name == "bk" else 2) for name in names}})
        group.note_times({"plain": 1.0, **dict.fromkeys(names, 3.0)})
        return group.results

    monkeypatch.setattr(benchmark_step, "measure", measure)
    assert benchmark_step.main(["--defaults"]) == 0
    assert [length for length, _ in asked] == [128, 512, 2048]
    assert all(names[:2] == ("bk-defaults", "bk") for _, names in asked)
    table = rows(capsys.readouterr().out)
    assert table["8 x 128"] == [
        "1500",
        "2.00 (2.00 to 2.25)",
        "1.50 (1.50 to 1.88)",
        *["2.00 (2.00 to 2.25)"] * 2,
        "14%",
    ]
    assert table["2 x 2048"][-1] == "0%"  # all gradients are written down


def test_variants_keep_the_average_where_they_say_so():
    for name, kept in (("bk-defaults", True), ("bk", False)):
        assert (Trial(SHAPES["tiny"], VARIANTS[name], Options(threads=1)).optimizer.ema is not None) == kept


def test_profile_names_operators(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_step, "prepare_process", lambda options: None)
    assert benchmark_step.main(["--shapes", "tiny", "--profile", "plain"]) == 0
    assert "aten::mm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "trained", "total"),
    [
        ("a-tied", 13.1e6, 13.1e6),
        ("a-untied", 16.3e6, 16.3e6),
        ("b", 37e6, 37e6),
        ("bitnet", 13.1e6, 13.1e6),
        ("lora", 0.06e6, 37e6),
    ],
)
def test_shapes_have_the_published_sizes(shape, trained, total):
    if shape == "lora":
        pytest.importorskip("peft")
    parameters = list(new_model(SHAPES[shape]).parameters())
    assert sum(p.numel() for p in parameters if p.requires_grad) == pytest.approx(trained, rel=0.05)
    assert sum(p.numel() for p in parameters) == pytest.approx(total, rel=0.01)


def test_every_group_has_plain_and_keeps_what_is_compared_together():
    names = ["plain", "bk", "opacus-hooks", "bk-no-noise"]
    assert list(groups(names, 0)) == [["plain", "bk", "bk-no-noise", "opacus-hooks"]]
    assert list(groups(names, 1)) == [["plain", "bk", "bk-no-noise"], ["plain", "opacus-hooks"]]
    assert list(groups(["plain"], 1)) == [["plain"]]


def test_a_variant_that_cannot_run_by_its_nature_says_why():
    note = not_applicable("opacus-ghost", SHAPES["a-tied"])
    plain = Figures(seconds=[1.0], ratios=[1.0], peak_mib=[math.nan], resident_mib=[math.nan])
    table = rows(report("a-tied", SHAPES["a-tied"], {"plain": plain, "opacus-ghost": Figures(note=note)}))
    assert table["opacus-ghost"][-1] == "Opacus's ghost mode refuses tied weights"
    assert table["plain"] == ["1000", "1000 / 1000 / 1000", "1.00", "1.00", "-", "-", "-", "-"]
    assert not not_applicable("opacus-ghost", SHAPES["a-untied"])


@pytest.mark.parametrize("variant", ["bk", "bk-fused-step"])
def test_phases_of_a_step_add_up(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    import benchmark_phases

    trial = Trial(SHAPES["tiny"], VARIANTS[variant], Options(threads=1))
    trial.warm_up()
    kept = [owner.__dict__[name] for owner, name, _ in benchmark_phases.WATCHED]
    assert benchmark_phases.main(["--shapes", "tiny", "--rounds", "1", "--threads", "1", "--variant", variant]) == 0
    assert kept == [owner.__dict__[name] for owner, name, _ in benchmark_phases.WATCHED]
    text = capsys.readouterr().out
    assert "ordinary step + norms + noise" in text
    start = time.perf_counter()
    times = benchmark_phases.step_by_phases(trial)
    passed = time.perf_counter() - start
    phases = {"forward", "backward", "norms", "weighted sums", "noise", "update", "rest of the step"}
    assert set(times) == phases | {"step"}
    assert all(times[name] > 0 for name in phases)
    assert sum(times[name] for name in phases) == pytest.approx(times["step"])
    assert times["step"] <= passed
