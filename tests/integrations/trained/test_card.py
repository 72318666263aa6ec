"""The model card and the names of base models: what a folder says when it leaves the machine."""

import json
from pathlib import Path

import pytest
from tiny_chat import save_chat_model
from tiny_finetune import chat_place, command
from tiny_models import opacus_table_restored
from tiny_trainer import rows, trainer
from transformers import AutoModelForCausalLM

from opacus_ac import cli
from opacus_ac.accounting import attack_sentences
from opacus_ac.integrations.trained.base import DEFAULT_BASE, make_portable, portable_name
from opacus_ac.integrations.trained.card import MARK, model_card
from opacus_ac.integrations.trained.words import number
from opacus_ac.models.default_model import FOLDER


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    public = {"validation_file": folder / "public.jsonl", "evaluation_is_public": True}
    with opacus_table_restored():
        assert cli.main(command(chat_place(folder), folder / "out", report_to="none", **public)) == 0
    return folder / "out"


def test_the_card_says_what_is_protected_how_well_and_what_is_not(run):
    card = (run / "README.md").read_text()
    report = json.loads((run / "privacy_report.json").read_text())
    assert card.startswith("---\nlibrary_name: peft\n")  # a local base has no name on the hub
    for part in (
        f"epsilon = {number(report['epsilon'])} at delta = 0.001",
        f"| what is protected (data unit) | {report['unit']} |",
        "| records | 60 |",
        "LoRA adapters of rank 8 on ",
        "| learning rate | found from releases, from the hint 0.03, constant |",
        "| optimizer | AutoAdam, beta1 0.5, weight decay 0 |",
        "| expected batch | 12 |",
        "| tokens per record at most | 120 |",
        "`model`, a local folder",
        "* loss: ",
        "k records of one person have k times the epsilon",
        "opacus-ac chat",
    ):
        assert part in card
    for released in report["released"]:
        assert released in card
    assert "More Information Needed" not in card


def test_no_file_that_may_be_published_names_a_path_of_this_machine(run):
    texts = [p for p in run.rglob("*") if p.suffix in (".json", ".md", ".jinja") and not p.name.startswith("_")]
    assert len(texts) > 10
    assert [p.name for p in texts if str(run.parent) in p.read_text(encoding="utf-8")] == []
    for folder in (run, run / "checkpoint-8"):
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "local:model"
        assert json.loads((folder / "_local_paths.json").read_text())["train_file"] == str(run.parent / "chats.jsonl")


def test_every_checkpoint_has_a_card_and_can_be_resumed_from(run):
    assert "library_name: peft" in (run / "checkpoint-8" / "README.md").read_text()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("/somewhere/of/mine/model", "local:model"),
        ("./model", "local:model"),
        ("/x/hub/models--Qwen--Qwen2.5-0.5B/snapshots/abc", "Qwen/Qwen2.5-0.5B"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_names_of_base_models_hold_on_any_machine(source, name):
    assert portable_name(source) == name


def test_the_default_model_has_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OPACUS_AC_CACHE", str(tmp_path))
    assert portable_name(str(tmp_path / FOLDER)) == DEFAULT_BASE
    card = model_card({"base_model": DEFAULT_BASE, "adapters": True}, {"epsilon": 8.0, "delta": 1e-5})
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert "4-bit" in card


@pytest.mark.parametrize(
    ("base", "text", "after"),
    [
        ("model", "the model is\nbase_model: model\n", "the model is\nbase_model: local:model\n"),
        ("model", "- base_model:adapter:model\n- lora", "- base_model:adapter:local:model\n- lora"),
        ("/x/model", "base_model: /x/model\nmade from `/x/model`", "base_model: local:model\nmade from `local:model`"),
    ],
)
def test_the_name_of_the_base_replaces_the_name_and_no_other_word(tmp_path, monkeypatch, base, text, after):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "README.md").write_text(text)
    make_portable(tmp_path)
    assert (tmp_path / "README.md").read_text() == after


def test_what_an_attacker_can_do_is_on_the_card_and_in_the_report(run, capsys):
    report = json.loads((run / "privacy_report.json").read_text())
    said = attack_sentences(report)
    assert any("of insiders" in sentence for sentence in said)
    card = (run / "README.md").read_text()
    assert all(f"* {sentence}" in card for sentence in said)
    for path in (run, run / "privacy_report.json"):
        assert cli.main(["report", str(path)]) == 0
        shown = capsys.readouterr().out
        assert all(sentence in shown for sentence in said)
    assert cli.main(["report", str(run / "privacy.ledger"), "--delta", "0.001"]) == 0
    shown = capsys.readouterr().out
    assert all(sentence in shown for sentence in said)


def test_epsilon_on_the_card_is_never_below_the_report():
    card = model_card({}, {"epsilon": 7.0011, "delta": 1e-5})
    assert "epsilon = 7.01 at" in card
    assert "| epsilon, delta | 7.01, 1e-05 |" in card


def test_a_run_without_privacy_has_a_card_that_says_so():
    card = model_card({}, {"epsilon": "infinity", "delta": 1e-5, "warnings": ["the noise multiplier is 0"]})
    assert "NOT private" in card
    assert "* the noise multiplier is 0" in card


def test_a_trainer_on_all_weights_saves_a_card_and_keeps_one_of_your_own(tmp_path):
    save_chat_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    made = trainer(tmp_path / "out", model=model, data=rows(64), settings={"target_epsilon": 3.0})
    made.train()
    made.save_model(tmp_path / "final")
    card = (tmp_path / "final" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "| trained | all weights |" in card
    (tmp_path / "final" / "README.md").write_text("mine")
    made.save_model(tmp_path / "final")
    assert (tmp_path / "final" / "README.md").read_text() == "mine"
    assert MARK in (tmp_path / "final" / "PRIVACY.md").read_text()


def test_a_push_to_the_hub_keeps_the_card(tmp_path):
    made = trainer(tmp_path / "out", data=rows(64))
    made.train()
    made.save_model()
    before = Path(made.args.output_dir, "README.md").read_text()
    made.create_model_card(model_name="mine")
    assert Path(made.args.output_dir, "README.md").read_text() == before
