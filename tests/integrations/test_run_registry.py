"""Runs on the same data are remembered, and named where their epsilons add up unseen."""

import json
import stat
import warnings

import pytest
import torch
from datasets import Dataset
from tiny_finetune import chat_place, command
from tiny_models import opacus_table_restored
from tiny_trainer import rows, trainer
from torch.utils.data import TensorDataset

from opacus_ac import cli
from opacus_ac.errors import WeakPrivacyWarning
from opacus_ac.integrations.run_registry import RunRegistry, warning


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.delenv("OPACUS_AC_REGISTRY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "opacus_ac"


def others(data, ledger=None, folder=None, **options):
    return RunRegistry([data]).others(ledger=ledger, folder=folder, **options)


def noted(data, ledger=None, folder=None):
    RunRegistry([data]).note(ledger=ledger, folder=folder)


SAME = {
    "rows": (lambda: rows(64), lambda: rows(64)),
    "a table": (lambda: Dataset.from_list(plain(100)), lambda: Dataset.from_list(plain(100)).with_format("torch")),
    "tensors": (lambda: TensorDataset(torch.arange(9.0)), lambda: TensorDataset(torch.arange(9.0))),
    "texts": (lambda: ["a", "b"], lambda: ["a", "b"]),
}
DIFFERENT = {
    "other rows": (lambda: rows(64), lambda: rows(64, seed=4)),
    "more rows": (lambda: rows(64), lambda: rows(65)),
    "what cannot be compared": (lambda: [object()], lambda: [object()]),
    "nothing": (list, lambda: ["a"]),
}


def plain(count):
    return [{"text": f"row {k}", "label": k} for k in range(count)]


@pytest.mark.parametrize("case", SAME)
def test_the_same_data_are_known_again(case):
    first, second = (make() for make in SAME[case])
    noted(first, ledger="a")
    assert [run.ledger.rsplit("/")[-1] for run in others(second, ledger="b")] == ["a"]
    assert others(second, ledger="a") == []
    assert others(second)


@pytest.mark.parametrize("case", DIFFERENT)
def test_other_data_are_not(case):
    first, second = (make() for make in DIFFERENT[case])
    noted(first, ledger="a")
    assert others(second, ledger="b") == []


def test_a_file_is_known_by_its_content(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}')
    noted(tmp_path / "a.jsonl", folder="out")
    assert others(tmp_path / "b.jsonl")[0].ledger is None
    (tmp_path / "b.jsonl").write_text('{"text": "y"}')
    assert others(tmp_path / "b.jsonl") == []


def test_a_resumed_run_is_itself():
    noted(["a"], folder="out")
    assert others(["a"], folder="out", resumed=True) == []
    assert others(["a"], folder="out")


def test_nothing_of_the_data_is_in_the_file(state):
    noted(["a secret"], ledger="l")
    text = (state / "runs.jsonl").read_text()
    assert "secret" not in text
    assert set(json.loads(text)) == {"data", "ledger", "folder", "day"}
    assert stat.S_IMODE((state / "key").stat().st_mode) == 0o600
    first = json.loads(text)["data"]
    (state / "key").unlink()
    noted(["a secret"], ledger="l")
    assert json.loads((state / "runs.jsonl").read_text().splitlines()[-1])["data"] != first


def test_it_can_be_switched_off(state, monkeypatch):
    monkeypatch.setenv("OPACUS_AC_REGISTRY", "0")
    noted(["a"])
    assert not state.exists()


def test_a_folder_that_cannot_be_written_stops_nobody(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    noted(["a"])
    assert others(["a"]) == []


def test_damaged_lines_are_passed_over(state):
    noted(["a"], ledger="l")
    with (state / "runs.jsonl").open("a") as file:
        file.write('{"data": 1\n[]\n')
    assert len(others(["a"])) == 1


def test_many_runs_are_counted_and_some_named():
    for number in range(8):
        noted(["a"], ledger=f"ledger-{number}")
    said = warning(others(["a"]), None)
    assert "in 8 runs" in said
    assert "and 3 more" in said
    assert "ledger-7" in said
    assert warning([], None) is None


def train(folder, **settings):
    made = trainer(folder, data=rows(64), settings={"noise_multiplier": 1.0, **settings}, max_steps=1)
    made.train()
    return made


def test_a_second_training_without_a_common_ledger_is_warned_before_it_spends(tmp_path, monkeypatch):
    train(tmp_path / "first", ledger=str(tmp_path / "first.ledger"))
    with pytest.warns(WeakPrivacyWarning, match=r"in 1 run that .*first\.ledger"):
        train(tmp_path / "second", ledger=str(tmp_path / "second.ledger"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeakPrivacyWarning)
        made = trainer(tmp_path / "third", data=rows(64), settings={"noise_multiplier": 1.0}, max_steps=1)
        with pytest.raises(WeakPrivacyWarning):
            made.train()
        assert made.get_epsilon() == 0
        train(tmp_path / "quiet", run_registry=False)


def test_a_run_that_failed_before_its_first_step_is_not_noted(tmp_path, state, monkeypatch):
    made = trainer(tmp_path / "first", data=rows(64), settings={"noise_multiplier": 1.0}, max_steps=1)
    monkeypatch.setattr(type(made), "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.train()
    assert not (state / "runs.jsonl").exists()


def test_the_command_line_names_the_other_ledger(tmp_path, capsys):
    place = chat_place(tmp_path)
    with opacus_table_restored():
        for name in ("one", "two"):
            assert cli.main(command(place, tmp_path / name, report_to="none", max_steps=1)) == 0
    shown = capsys.readouterr().err
    assert shown.count("trained on before") == 1
    assert str(tmp_path / "one" / "privacy.ledger") in shown
