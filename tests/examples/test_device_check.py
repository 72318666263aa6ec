"""The check of a device runs whole on the processor with tiny models; what goes wrong is a row, and a rerun goes on."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import device_check
from device_checks import batteries, pytest_lines, speed
from device_checks.entries import ENTRIES, Process
from device_checks.report import whole
from device_checks.results import FAILED, PASSED, SKIPPED, Result, Results
from device_entries import Wrong
from step_benchmark.measuring import Figures
from step_benchmark.shapes import SHAPES
from step_benchmark.syncs import SKIPPED as NOT_COUNTED
from step_benchmark.syncs import count_syncs
from step_benchmark.variants import Options, Variant
from step_benchmark.workers import fitting

TINY = ["--tiny", "--device", "cpu"]


def rows(page: str) -> dict[str, list[str]]:
    """Cells of every line of the tables of a page, by the first one; of equal ones the first."""
    found: dict[str, list[str]] = {}
    for line in page.splitlines():
        if line.startswith("| "):
            name, *cells = line.strip("| ").split(" | ")
            found.setdefault(name, cells)
    return found


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Any:
    """The folder of a run of everything, and its exit status."""
    folder = tmp_path_factory.mktemp("check")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEVICE_CHECK_PATIENCE", "20")  # machines that test may be slow, and busy
        patch.delenv("OPACUS_AC_TEST_DEVICE", raising=False)
        status = device_check.main([*TINY, "--minutes", "60", "--out", str(folder)])
    return folder, status


@pytest.mark.slow
def test_everything_runs_and_has_its_rows(whole_run):
    folder, status = whole_run
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()[1:]]
    assert {one["entry"]: one["reason"] for one in found if one["status"] != PASSED} == {}
    assert status == 0
    assert [one["entry"] for one in found] == list(ENTRIES)
    page = (folder / "report.md").read_text()
    table = rows(page)
    assert all(table[name][1] == "passed" for name in ENTRIES)
    assert all(f"### {one.name}: " in page for one in speed.SPEEDS)
    for one in (entry for entry in found if "figures" in entry["values"]):
        for variant, figures in one["values"]["figures"].items():
            assert figures["note"] or (figures["seconds"] and not figures["failure"]), (one["entry"], variant)
            assert figures["note"] or figures["syncs"] == {"skipped": NOT_COUNTED}
    targets = [line for line in page.splitlines() if " | at most " in line or " | at least " in line]
    assert len(targets) == 6 * sum(one.target is not None for one in speed.SPEEDS)
    assert all(line.endswith("| - | - |") for line in targets)  # nothing is judged on a processor
    tests = [one["values"]["counts"] for one in found if "counts" in one["values"]]
    assert len(tests) == len(batteries.BATTERIES)
    assert all(counts["passed"] > 0 and counts["failed"] == counts["error"] == 0 for counts in tests)


@pytest.mark.slow
def test_a_rerun_runs_nothing_anew(whole_run, monkeypatch, capsys):
    folder, _ = whole_run
    before = (folder / "results.jsonl").read_bytes()
    monkeypatch.setattr(Process, "run", lambda *_: pytest.fail("an entry ran again"))
    assert device_check.main([*TINY, "--out", str(folder)]) == 0
    assert (folder / "results.jsonl").read_bytes() == before
    assert set(ENTRIES) <= set(rows(capsys.readouterr().out))


@pytest.mark.slow
def test_what_goes_wrong_is_a_row_and_the_others_run(tmp_path, monkeypatch, capsys):
    planted = {
        "raises": (Wrong("raises", "raises"), "RuntimeError: CUDA error: planted"),
        "dies": (Wrong("dies", "dies"), "the process ended with status 7"),
        "hangs": (Wrong("hangs", "hangs", 0.5), "stopped after 5 s"),
    }
    monkeypatch.setenv("DEVICE_CHECK_PATIENCE", "10")
    for name, (entry, _) in planted.items():
        monkeypatch.setitem(ENTRIES, name, ("noise", entry))
    last = "noise of the device"
    arguments = [*TINY, "--out", str(tmp_path), "--only", *planted, last]
    assert device_check.main(arguments) == 1
    table = rows(capsys.readouterr().out)
    for name, (_, reason) in planted.items():
        assert table[name][1] == FAILED
        assert table[name][3].startswith(reason)
    assert table[last][1] == PASSED
    # A rerun leaves what has ended alone, unless it is asked to try again.
    asked: list[str] = []
    monkeypatch.setattr(Process, "run", lambda self, name, *_: asked.append(name) or Result(name, PASSED))
    assert device_check.main(arguments) == 1
    assert asked == []
    assert device_check.main([*arguments, "--again"]) == 0
    assert asked == list(planted)


def test_an_entry_without_time_waits_for_the_next_run(tmp_path, capsys):
    assert device_check.main([*TINY, "--out", str(tmp_path), "--minutes", "0", "--only", "vit-b full"]) == 3
    assert rows(capsys.readouterr().out)["vit-b full"][1] == "not run"


def test_results_of_another_machine_are_not_mixed_in(tmp_path):
    path = tmp_path / "results.jsonl"
    first = Results(path, {"device": "A", "torch": "2"})
    first.add(Result("a", PASSED))
    with path.open("a") as file:
        file.write('{"entry": "b", "sta')  # killed while it wrote
    again = Results(path, {"device": "A", "torch": "2"})
    again.add(Result("c", FAILED))
    assert list(Results(path, {"device": "A", "torch": "2"}).found) == ["a", "c"]
    with pytest.raises(ValueError, match=r"results of another torch \(2, now 3\): give another --out"):
        Results(path, {"device": "A", "torch": "3"})


# ---- tests on the device -------------------------------------------------------------------------------------------

FILE = """
import pathlib, pytest
HERE = pathlib.Path(__file__).parent
def test_first(): pass
def test_breaks_the_gpu():
    if not (HERE / "broken").exists():
        (HERE / "broken").write_text("")
        pytest.exit("the GPU answers with errors only", returncode=4)
def test_fails(): assert (HERE / "mended").exists(), "planted"
def test_skipped(): pytest.skip("no such unit")
"""


@pytest.mark.slow
def test_a_battery_goes_on_after_a_broken_gpu_and_repeats_what_failed(tmp_path, monkeypatch):
    (tmp_path / "test_planted.py").write_text(FILE)
    monkeypatch.setattr(batteries, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(device_check.__file__).rpartition("/")[0])
    battery = batteries.Battery("planted", "test_planted.py", "", 120)
    found = battery.run("cpu", False, tmp_path, 120)
    assert found.status == FAILED
    assert found.reason.startswith("test_fails: ")
    assert "planted" in found.reason
    assert found.values["counts"] == {"passed": 2, "failed": 1, "error": 0, "skipped": 1}
    (tmp_path / "mended").write_text("")
    lines = tmp_path / "planted.tests.jsonl"
    kept = [line for line in lines.read_text().splitlines() if "test_fails" not in line]
    again = battery.run("cpu", False, tmp_path, 120)
    assert (again.status, again.reason) == (PASSED, "")
    assert lines.read_text().splitlines()[:-1] == kept  # only the failed one ran again


@pytest.mark.parametrize(("missing", "reason"), [("file", "is not there"), ("pytest", "pytest is not installed")])
def test_a_battery_that_cannot_run_says_why(missing, reason, tmp_path, monkeypatch):
    if missing == "pytest":
        monkeypatch.setattr(batteries.importlib.util, "find_spec", lambda name: None)
    file = "tests/gone.py" if missing == "file" else "tests/engine/test_devices.py"
    found = batteries.Battery("planted", file, "", 60).run("cpu", True, tmp_path, 60)
    assert found.status == SKIPPED
    assert reason in found.reason


@pytest.mark.parametrize("name", [one.name for one in speed.SPEEDS if one.shape.lora_rank])
def test_adapters_without_peft_are_skipped(name, tmp_path, monkeypatch):
    monkeypatch.setattr("device_checks.entries.importlib.util.find_spec", lambda package: None)
    found = Process("cpu", True).run(name, tmp_path, 60)
    assert (found.status, found.reason) == (SKIPPED, "peft is not installed")


def test_batteries_are_tests_that_are_there():
    assert all((batteries.ROOT / battery.file).is_file() for battery in batteries.BATTERIES)


@pytest.mark.parametrize(
    ("when", "result", "word"),
    [("setup", "passed", None), ("setup", "failed", "error"), ("call", "passed", "passed"), ("call", "failed", "failed"),
     ("setup", "skipped", "skipped"), ("teardown", "failed", "error"), ("teardown", "passed", None)],
)  # fmt: skip
def test_phases_of_a_test_make_one_word(when, result, word):
    assert pytest_lines.outcome(when, result) == word


# ---- speed and memory ----------------------------------------------------------------------------------------------


def figures(seconds: float, plain: float, mib: float, noise: float | None = None) -> dict[str, Any]:
    shares = [] if noise is None else [noise]
    return vars(
        Figures(seconds=[seconds], ratios=[seconds / plain], peak_mib=[mib], resident_mib=[1.0], noise_shares=shares)
    )


def test_targets_are_judged_on_a_gpu_alone():
    measured = {
        "plain": figures(1.0, 1.0, 100.0),
        "bk": figures(1.25, 1.0, 120.0, 0.02),
        "bk-no-noise": figures(1.2, 1.0, 120.0),
        "opacus-hooks": figures(2.5, 1.0, 300.0),
        "opacus-ghost": vars(Figures(note="refused")),
        "opacus-functorch": vars(Figures(failure="OutOfMemoryError")),
    }
    name = "qwen2.5-0.5b full"
    shape = vars(SHAPES["tiny"])
    result = {name: Result(name, PASSED, values={"shape": shape, "figures": measured})}
    lines = [line for line in whole(result, {}, [name], judge=True).splitlines() if line.startswith(f"| {name} | ")]
    assert [line.split(" | ")[2:] for line in lines[1:]] == [
        ["at most 1.3", "1.25", "yes |"],
        ["at most 1.15", "1.2", "no |"],
        ["at most 0.03", "0.02", "yes |"],
        ["at least 1.5", "2", "yes |"],
        ["at least 1.5", "-", "- |"],
        ["at least 1.5", "-", "- |"],
    ]
    page = whole(result, {}, [name], judge=False)
    assert "| yes |" not in page
    assert "| no |" not in page


class Fake:
    """A trial whose memory is 100 MiB, and 10 more for each record; more than 8 do not fit."""

    counts = (1, 1)

    def __init__(self, records: int) -> None:
        self.records = records

    def warm_up(self) -> float:
        if self.records > 8:
            raise torch.OutOfMemoryError("planted")
        return 1.0

    def memory(self) -> tuple[float, float]:
        return 100.0 + 10 * self.records, 50.0


class Faked(Variant):
    def ready(self, shape: Any, options: Any) -> Any:
        return Fake(shape.batch)


@pytest.mark.parametrize(("free", "records"), [(200, 2), (500, 16), (1000, 32), (10_000, speed.RECORDS_AT_MOST)])
def test_the_largest_batch_that_fits(free, records, monkeypatch):
    """Two variants hold 50 MiB each; a step takes 100 and 10 a record: 0.85 free - 200 is left for records."""
    monkeypatch.setattr(
        torch, "cuda", SimpleNamespace(empty_cache=lambda: None, mem_get_info=lambda: (free * 2**20, 0))
    )
    shape = speed.replace(SHAPES["tiny"], batch=0, at_once=1)
    assert speed.largest_batch(shape, Faked(), Options()) == records


def test_a_batch_that_does_not_fit_is_halved():
    shape = speed.replace(SHAPES["tiny"], batch=32, parts=2)
    trial, loss, parts = fitting(shape, Faked(), Options(halve=True))
    assert (trial.records, loss, parts) == (8, 1.0, 8)
    with pytest.raises(torch.OutOfMemoryError):
        fitting(shape, Faked(), Options())
    with pytest.raises(torch.OutOfMemoryError):
        fitting(speed.replace(shape, batch=9), Faked(), Options(halve=True))


class Waiting:
    """A step that waits for the device twice at one line and once at another, if it may."""

    def __init__(self, waits: bool) -> None:
        self.waits, self.mode = waits, 0

    def synchronize(self) -> None: ...

    def step(self) -> None:
        for number in range(3 if self.waits else 0):
            if self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1 if number < 2 else 2)
        warnings.warn("something else", stacklevel=1)


@pytest.mark.parametrize("waits", [True, False])
def test_waits_for_the_device_are_counted_by_line(waits, monkeypatch):
    trial = Waiting(waits)
    modes = SimpleNamespace(
        get_sync_debug_mode=lambda: 0, set_sync_debug_mode=lambda mode: setattr(trial, "mode", mode)
    )
    monkeypatch.setattr(torch, "cuda", modes)
    found = count_syncs(trial, "cuda")
    assert trial.mode == 0
    assert found["waits"] == (3 if waits else 0)
    assert sorted(found["places"].values()) == ([1, 2] if waits else [])
    assert (__file__ in found["refused"]) == waits
    assert count_syncs(trial, "cpu") == {"skipped": NOT_COUNTED}
