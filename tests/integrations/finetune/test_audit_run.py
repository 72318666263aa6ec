"""``opacus-ac audit --run``: a run again with canaries, what is refused, and what removing the noise shows."""

import json
import random
import string

import pytest
from common.tone_dialogues import dialogues, write_jsonl
from tiny_chat import byte_tokenizer, chat_model
from tiny_finetune import command
from tiny_models import opacus_table_restored

from opacus_ac import cli
from opacus_ac.integrations.finetune.audit_run import audit_run, canary_dialogues
from opacus_ac.release.mechanism import GaussianMechanism

NOISE_IN_PLACE = GaussianMechanism.noise_in_place
RECORDS, STEPS, CANARIES = 600, 80, 200
SETTINGS = {
    "dataset_size": RECORDS, "max_steps": STEPS, "target_delta": 1e-5, "learning_rate": 0.03, "full": "",
    "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "report_to": "none", "save_steps": STEPS,
}  # fmt: skip


def with_words(number):
    """A tokenizer that has rare words as tokens, as those of real models have; the byte tokenizer has none."""
    tokenizer, choice = byte_tokenizer(), random.Random(5)
    tokenizer.add_tokens(["".join(choice.choices(string.ascii_lowercase, k=6)) for _ in range(number)])
    return tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that claims epsilon 8."""
    place = tmp_path_factory.mktemp("audited")
    tokenizer = with_words(300)
    chat_model(tokenizer).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    write_jsonl(place / "chats.jsonl", dialogues("loving", RECORDS, 0))
    with opacus_table_restored():
        assert cli.main([word for word in command(place, place / "out", **SETTINGS) if word]) == 0
    return place / "out"


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shown(audit):
    """The lower bound of epsilon from the second check."""
    return {f["check"]: f for f in audit["findings"]}["the same, against the whole curve"]["epsilon"]


def test_the_run_is_not_refuted_and_stays_as_it_was(run, capsys):
    before = files(run)
    arguments = ["audit", "--run", str(run), "--canaries", str(CANARIES), "--confidence", "0.999"]
    assert cli.main([*arguments, "--format", "json"]) == cli.OK
    (audit,) = json.loads(capsys.readouterr().out)["audits"]
    assert files(run) == before
    # The attack is weak against noise: some 50 to 65 of 100 guesses are right, and 2 would need 84.
    assert shown(audit) < 2
    assert [f["refuted"] for f in audit["findings"]] == [False, False, False, False]
    assert f"{CANARIES} canaries beside N = {RECORDS}" in audit["subject"]
    assert any("whoever publishes them adds its epsilon" in note for note in audit["notes"])


@pytest.mark.parametrize("left", [0.0, 0.5, 0.9])
def test_a_run_with_less_noise_than_it_is_charged_for_is_refuted(left, run, monkeypatch, capsys):
    """The charges say epsilon 8 as before. Without noise, of some 98 right guesses of 100, 92 would show epsilon 3."""

    def less(self, totals, std, scale=1.0):
        NOISE_IN_PLACE(self, totals, left * std, scale)

    monkeypatch.setattr(GaussianMechanism, "noise_in_place", less)
    assert cli.main(["audit", "--run", str(run), "--canaries", str(CANARIES), "--format", "json"]) == cli.REFUTED
    (audit,) = json.loads(capsys.readouterr().out)["audits"]
    findings = {f["check"]: f for f in audit["findings"]}
    assert findings["noise of every tensor"]["refuted"]
    assert not findings["what the settings cost"]["refuted"]
    if left == 0:
        assert shown(audit) > 3


def edited(run, tmp_path, name, change):
    """A copy of the two files of a run, one of them changed."""
    for file in ("privacy_report.json", "_run_arguments.json"):
        values = json.loads((run / file).read_text())
        (tmp_path / file).write_text(json.dumps(change(values) if file == name else values))
    return tmp_path


def test_settings_that_cost_more_than_was_claimed_are_refuted(run, tmp_path):
    folder = edited(run, tmp_path, "privacy_report.json", lambda report: {**report, "epsilon": 0.1, "steps": 2})
    result = audit_run(folder, canaries=4, seed=0)
    assert result.finding("what the settings cost").refuted
    assert result.epsilon < 0.1


def test_the_noise_of_fused_steps_is_not_looked_at(run, tmp_path):
    def fused(settings):
        return {**settings, "arguments": [*settings["arguments"], "--fused_step", "true"]}

    result = audit_run(edited(run, tmp_path, "_run_arguments.json", fused), canaries=4, seed=0)
    assert "noise of every tensor" not in [finding.check for finding in result.findings]
    assert "the noise of fused steps is not looked at" in result.notes


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("privacy_report.json", lambda report: {**report, "epsilon": "infinity"}, "claims no finite epsilon"),
        ("privacy_report.json", lambda report: {**report, "sampling": "fixed_size"}, "are for Poisson batches"),
        ("privacy_report.json", lambda report: {}, "no whole privacy_report.json"),
        ("_run_arguments.json", lambda settings: {**settings, "command": "other"}, "no whole _run_arguments.json"),
        (
            "_run_arguments.json",
            lambda settings: {
                **settings,
                "arguments": [w.replace("chats.jsonl", "gone.jsonl") for w in settings["arguments"]],
            },
            "gone.jsonl",
        ),
    ],
)
def test_what_cannot_be_audited_is_refused(run, tmp_path, name, change, message):
    folder = edited(run, tmp_path, name, change)
    with pytest.raises(ValueError, match=message):
        audit_run(folder, canaries=4)


def test_a_folder_without_a_run_and_options_of_both_audits_are_bad_usage(tmp_path, capsys):
    assert cli.main(["audit", "--run", str(tmp_path)]) == cli.BAD_USAGE
    assert cli.main(["audit", "--run", str(tmp_path), "--only", "usage"]) == cli.BAD_USAGE
    assert "give one of them" in capsys.readouterr().err


def test_canaries_have_words_of_their_own():
    private = [[{"role": "user", "content": "hello abcdef"}]]
    made = canary_dialogues(byte_tokenizer(), private, 40, random.Random(0))
    replies = [dialogue[1]["content"] for dialogue in made]
    assert len(set(replies)) == 40
    assert not {"hello", "abcdef"} & set(replies)
    assert {dialogue[0]["content"] for dialogue in made} == {"Which word is it?"}
