"""``opacus-ac report`` on runs that are finished, interrupted, or something else."""

import json
import re
import shutil

import pytest
from tiny_finetune import STEPS, chat_place, command
from tiny_models import opacus_table_restored

from opacus_ac import cli
from opacus_ac.integrations.trained.words import number


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a ledger of its own."""
    folder = tmp_path_factory.mktemp("report")
    with opacus_table_restored():
        assert cli.main(command(chat_place(folder), folder / "out", report_to="none")) == 0
    return folder / "out"


def reported(capsys, *words):
    assert cli.main(["report", *map(str, words)]) == 0
    return capsys.readouterr().out


def facts(capsys, *words):
    return json.loads(reported(capsys, *words, "--json"))


def interrupted(run, tmp_path, *, without):
    """A copy of the run as a kill would have left it."""
    patterns = ("adapter*", "privacy_report.json", "checkpoint-10", *without)
    out = tmp_path / "out"
    shutil.copytree(run, out, ignore=lambda folder, names: [
        name for name in names if str(folder) == str(run) and any(name == p or (p == "adapter*" and name.startswith("adapter")) for p in patterns)
    ])  # fmt: skip
    paths = out / "_local_paths.json"
    if paths.exists():
        paths.write_text(json.dumps({}))
    for inner in out.glob("*/_local_paths.json"):
        inner.write_text(json.dumps({}))
    return out


def test_a_finished_run_in_words(run, capsys):
    found = facts(capsys, run)
    report = json.loads((run / "privacy_report.json").read_text())
    assert found == {**report, "state": f"finished: {STEPS} of {STEPS} steps were taken", "target_epsilon": 8.0}
    text = reported(capsys, run)
    assert f"epsilon = {number(report['epsilon'])} at delta = 0.001, of a target of 8" in text
    assert "whether one record (a row of the dataset) was in the data" in text
    assert re.search(r"^records +60$", text, re.MULTILINE)
    assert not re.search(r"\d\.\d{6}", text)  # no digits that nobody can use
    assert facts(capsys, run, "--format", "json") == found


def test_an_interrupted_run_is_reported_from_its_ledger(run, tmp_path, capsys):
    out = interrupted(run, tmp_path, without=())
    found = facts(capsys, out)
    assert (
        found["state"] == f"not finished: its newest checkpoint has 8 of {STEPS} steps; the ledger has {STEPS} charges"
    )
    assert found["epsilon"] == pytest.approx(facts(capsys, run)["epsilon"], rel=1e-6)  # the charges, not the checkpoint
    assert found["delta"] == 1e-3
    assert "not finished" in reported(capsys, out)


def test_a_run_that_died_before_its_first_checkpoint(run, tmp_path, capsys):
    out = interrupted(run, tmp_path, without=("checkpoint-8",))
    found = facts(capsys, out)
    assert "it has no checkpoint yet" in found["state"]
    assert found["epsilon"] == pytest.approx(facts(capsys, run)["epsilon"], rel=1e-6)
    (out / "run_settings.json").unlink()
    assert cli.main(["report", str(out)]) == cli.BAD_USAGE
    assert "--delta" in capsys.readouterr().err
    assert facts(capsys, out, "--delta", "1e-3")["epsilon"] == found["epsilon"]


def test_without_a_ledger_the_checkpoint_says_that_it_may_not_be_all(run, tmp_path, capsys):
    out = interrupted(run, tmp_path, without=("privacy.ledger",))
    found = facts(capsys, out)
    assert "Steps after it are not in these figures" in found["state"]
    assert found["steps"] == 8
    assert found["epsilon"] < facts(capsys, run)["epsilon"]


def test_what_is_no_run_or_was_changed_is_refused(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "empty")]) == cli.BAD_USAGE
    assert "is it the folder of a run?" in capsys.readouterr().err
    out = interrupted(run, tmp_path, without=())
    ledger = out / "privacy.ledger"
    data = bytearray(ledger.read_bytes())
    data[-200] ^= 1
    ledger.write_bytes(data)
    assert cli.main(["report", str(out)]) == cli.BAD_USAGE
    assert "privacy.ledger:" in capsys.readouterr().err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "privacy_report.json").write_text("[1]")
    assert cli.main(["report", str(tmp_path / "broken")]) == cli.BAD_USAGE


def test_a_run_without_privacy_is_called_so(run, tmp_path, capsys):
    path = tmp_path / "privacy_report.json"
    path.write_text(json.dumps({**facts(capsys, run), "epsilon": "infinity"}))
    assert "NOT private" in reported(capsys, path)
