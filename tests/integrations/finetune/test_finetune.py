"""``opacus-ac finetune`` on a tiny model: from files to a private adapter, through kills, signals and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter

import pytest
import yaml
from common.tone_dialogues import dialogues, write_jsonl
from tiny_chat import save_chat_model
from tiny_finetune import STEPS, command
from tiny_models import opacus_table_restored

from opacus_ac import cli
from opacus_ac.budget import PrivacyLedger
from opacus_ac.engine import privacy_engine
from opacus_ac.integrations.finetune import finetune
from opacus_ac.integrations.finetune.errors import FinetuneError
from opacus_ac.integrations.finetune.job import TrainingArguments
from opacus_ac.optimizer.sum_release import SumRelease


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, private and public dialogues."""
    folder = tmp_path_factory.mktemp("finetune")
    save_chat_model(folder / "model")
    write_jsonl(folder / "chats.jsonl", dialogues("loving", 60, 0))
    write_jsonl(folder / "public.jsonl", dialogues("loving", 6, 1))
    return folder


def charges(out):
    return Counter(PrivacyLedger(out / "privacy.ledger").charges)


def report(out):
    return json.loads((out / "privacy_report.json").read_text())


def last_step(out):
    return max(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with opacus_table_restored():  # made before the fixture of a test that restores it
        assert cli.main(command(place, out, validation_file=place / "public.jsonl", evaluation_is_public=True)) == 0
    return out


def test_a_run_leaves_an_adapter_its_report_its_ledger_and_the_privacy_tab(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert 7.9 < report(whole)["epsilon"] <= 8
    assert report(whole)["steps"] == STEPS == sum(charges(whole).values())
    assert (whole / "adapter_model.safetensors").is_file()
    assert (whole / "tokenizer.json").is_file()
    assert {p.name for p in whole.glob("checkpoint-*")} == {"checkpoint-8", f"checkpoint-{STEPS}"}
    (folder,) = {file.parent for file in (whole / "runs").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    meta = json.loads(events.Tensors("privacy/meta")[-1].tensor_proto.string_val[0])
    assert meta["target_epsilon"] == 8
    assert len(events.Scalars("privacy/epsilon")) == STEPS + 1
    assert len(events.Scalars("eval/loss")) == 1


def test_stdout_has_the_statement_and_stderr_the_progress(place, tmp_path, capsys):
    code = cli.main(command(place, tmp_path / "out", max_steps=2, report_to="none"))
    captured = capsys.readouterr()
    assert code == 0
    assert "-differential privacy by privacy loss distribution accounting" in captured.out
    assert "step 2/2  epsilon " in captured.err
    assert "step 2/2" not in captured.out
    assert not (tmp_path / "out" / "runs").exists()


def test_all_weights_and_another_accountant(place, tmp_path):
    out = tmp_path / "out"
    options = {"full": True, "fused_step": True, "accountant": "vrdp", "max_steps": 2, "report_to": "none"}
    assert cli.main(command(place, out, **options)) == 0
    assert (out / "model.safetensors").is_file()
    assert "vrdp" in json.dumps(report(out))


def test_users_instead_of_rows(place, tmp_path, capsys):
    rows = [{**row, "user_id": number % 20} for number, row in enumerate(dialogues("loving", 60, 0))]
    write_jsonl(tmp_path / "chats.jsonl", rows)
    options = {
        "train_file": tmp_path / "chats.jsonl",
        "dataset_size": 20,
        "group_by": "user_id",
        "max_rows_per_user": 2,
    }
    assert cli.main(command(place, tmp_path / "out", max_steps=2, report_to="none", **options)) == 0
    assert report(tmp_path / "out")["unit"] == "one user with at most 2 rows"
    assert report(tmp_path / "out")["dataset_size"] == 20
    assert cli.main(command(place, tmp_path / "other", **{**options, "group_by": "name"})) == 3
    assert 'chats.jsonl:1: "name" is missing' in capsys.readouterr().err


def test_a_dry_run_says_what_it_would_cost_and_leaves_nothing(place, tmp_path, capsys):
    assert cli.main([*command(place, tmp_path / "out"), "--dry_run"]) == 0
    text = capsys.readouterr().out
    for part in (
        "records N            60",
        f"steps                {STEPS}",
        "epsilon at the end   7.9",
        "320 of 11,440",
    ):
        assert part in text
    assert not (tmp_path / "out").exists()


def test_the_command_line_overrides_the_configuration_file(place, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        "target_epsilon: 3\nmax_steps: 7\nweight_decay: -0.0\nlr_control: false\nreport_to: [none]\nema-decay: null\n"
    )
    rest = command(place, tmp_path / "out", target_epsilon=None, max_steps=5)
    assert cli.main([*rest, "--config", str(config), "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "steps                5" in text
    assert "epsilon at the end   2.9" in text


# ---------------------------------------------------------------- interrupted, killed, resumed


def test_a_signal_ends_the_run_after_a_whole_step_from_which_it_goes_on(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    add_noise = SumRelease.add_noise

    def interrupt(optimizer):
        if optimizer.steps_taken == 5:
            os.kill(os.getpid(), signal.SIGINT)
        add_noise(optimizer)

    monkeypatch.setattr(SumRelease, "add_noise", interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(command(place, out)) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert f"--resume_from_checkpoint {out / 'checkpoint-6'}" in capsys.readouterr().err
    monkeypatch.undo()
    assert sum(charges(out).values()) == last_step(out) == 6
    assert cli.main(command(place, out)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main(command(place, out, resume_from_checkpoint="last")) == 0
    assert sum(charges(out).values()) == last_step(out) == report(out)["steps"] == STEPS
    before, written = charges(out), (out / "privacy_report.json").read_bytes()
    capsys.readouterr()
    assert cli.main(command(place, out, resume_from_checkpoint="last")) == 0
    said = capsys.readouterr()
    assert f"complete: its {STEPS} steps were taken" in said.err
    assert "differential privacy" in said.out
    assert charges(out) == before
    assert (out / "privacy_report.json").read_bytes() == written


def test_a_second_signal_ends_it_at_once(place, tmp_path, monkeypatch, capsys):
    def interrupt(optimizer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SumRelease, "add_noise", interrupt)
    assert cli.main(command(place, tmp_path / "out")) == 130
    assert sum(charges(tmp_path / "out").values()) == 1  # charged, though nothing was released


@pytest.mark.slow
@pytest.mark.parametrize("charged", [1, 5])
def test_killed_and_resumed_it_ends_with_the_history_of_the_uninterrupted_run(charged, place, whole, tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    words = [sys.executable, "-m", "opacus_ac", *command(place, out)]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    ledger = out / "privacy.ledger"
    while process.poll() is None and (not ledger.exists() or ledger.read_bytes().count(b'"kind":"charge"') < charged):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    spent = sum(charges(out).values())
    assert charged <= spent < STEPS
    done = subprocess.run([*words, "--resume_from_checkpoint", "last"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert charges(out) == charges(whole)
    assert report(out)["epsilon"] == pytest.approx(report(whole)["epsilon"], rel=2e-4)  # the grid follows the history
    assert last_step(out) <= STEPS


# ---------------------------------------------------------------- refusals


def bad_file(place):
    path = place / "bad.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    return path


def zipped(place):
    path = place / "chats.zip"
    path.write_bytes(b"PK")
    return path


def plain_model(place):
    """A model whose tokenizer has no chat template."""
    path = save_chat_model(place / "plain")
    (path / "chat_template.jinja").unlink()
    return path


def foreign_ledger(place):
    from opacus_ac.accounting import Event

    path = place / "foreign.ledger"
    PrivacyLedger(path).charge(Event(1.0, 0.1), dataset_size=7, settings={})
    return path


REFUSED = {
    "no file": ({"train_file": None}, 2, "--train_file is missing"),
    "no budget": ({"target_epsilon": None}, 2, "give --target_epsilon"),
    "both": ({"noise_multiplier": 1}, 2, "either --target_epsilon or --noise_multiplier"),
    "not a number": ({"max_length": "long"}, 2, "--max_length"),
    "unknown option": ({"target_eps": 3}, 2, "--target_eps"),
    "rank": ({"lora_r": 0}, 2, "lora_r must be at least 1"),
    "no such checkpoint": ({"resume_from_checkpoint": "nowhere"}, 2, "no such folder"),
    "no such file": ({"train_file": "nowhere.jsonl"}, 3, "nowhere.jsonl"),
    "bad row": ({"train_file": bad_file}, 3, "bad.jsonl:2: "),
    "other kind of file": ({"train_file": zipped}, 3, "no known kind of file"),
    "too short": ({"max_length": 3}, 3, "--max_length 3"),
    "foreign ledger": ({"ledger": foreign_ledger}, 3, "7"),
    "no such model": ({"model_name_or_path": "./nowhere"}, 5, "cannot load the model './nowhere'"),
    "no template": ({"model_name_or_path": plain_model}, 5, "no chat template"),
    "private evaluation": ({"validation_file": "chats"}, 2, "say --evaluation_is_public"),
    "a setting": ({"neftune_noise_alpha": 5.0}, 5, "--neftune_noise_alpha 5.0: its noise"),
    "few records": ({"gradient_accumulation_steps": 30}, 2, "a step expects 120 records"),
    "mode": ({"clipping": "sideways"}, 5, "--clipping sideways is not available"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_line_with_its_exit_code(case, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changes, code, message = REFUSED[case]
    changes = {
        k: v(place) if callable(v) else (place / "chats.jsonl" if v == "chats" else v) for k, v in changes.items()
    }
    try:
        found = cli.main(command(place, tmp_path / "out", **changes))
    except SystemExit as stopped:
        found = stopped.code
    error = capsys.readouterr().err
    assert found == code
    assert message in error
    assert "opacus-ac finetune: error: " in error
    assert "Traceback" not in error
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_several_processes_are_refused(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    assert cli.main(command(place, tmp_path / "out")) == 2
    assert "in one process, not 2" in capsys.readouterr().err


CONFIGS = {
    "an option in a list": ("report_to: [none, --target_epsilon, '80']\n", "starts with '-'"),
    "an option with its value": ("report_to: [none, --target_epsilon=80]\n", "starts with '-'"),
    "an option as a value": ("model_name_or_path: --full\n", "starts with '-'"),
    "a short option": ("run_name: -h\n", "starts with '-'"),
    "the end of options": ("report_to: ['none', '--']\n", "starts with '-'"),
    "unknown": ("target_epsilom: 3\n", "there is no option 'target_epsilom'"),
    "no mapping": ("- 3\n", "is not a mapping"),
    "no YAML": ("a: [\n", "run.yaml"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_file_that_cannot_be_read_is_bad_usage(case, place, tmp_path, capsys):
    content, message = CONFIGS[case]
    (tmp_path / "run.yaml").write_text(content)
    assert cli.main([*command(place, tmp_path / "out"), "--config", str(tmp_path / "run.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_notes_of_this_package_are_shown_and_those_of_others_are_not(place, tmp_path, capsys, monkeypatch):
    def build(job):
        warnings.warn_explicit("of the engine", UserWarning, privacy_engine.__file__, 1)
        warnings.warn_explicit("of a library", UserWarning, yaml.__file__, 1)
        raise FinetuneError("that was all", 3)

    monkeypatch.setattr(finetune, "build_trainer", build)
    assert cli.main(command(place, tmp_path / "out")) == 3
    assert capsys.readouterr().err == "note: of the engine\nopacus-ac finetune: error: that was all\n"


def test_a_spent_budget_is_exit_code_4(place, whole, tmp_path, capsys):
    """The ledger of a finished run has no room for one more step of it."""
    assert cli.main(command(place, tmp_path / "out", ledger=whole / "privacy.ledger")) == 4
    assert "would" in capsys.readouterr().err


def test_debug_shows_where_an_error_came_from(place, tmp_path):
    with pytest.raises(FinetuneError, match="nowhere"):
        cli.main([*command(place, tmp_path / "out", train_file="nowhere.jsonl"), "--debug"])


def test_help_lists_the_options_of_every_group_without_torch():
    code = "import sys; from opacus_ac.cli import main\ntry:\n    main(['finetune', '--help'])\nfinally:\n"
    code += "    assert not {'torch', 'opacus', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in ("--train_file", "--lora_r", "--target_epsilon", "--learning_rate", "--dry-run"):
        assert option in done.stdout


def test_help_all_has_the_options_of_training_arguments(capsys):
    assert cli.main(["finetune", "--help-all"]) == 0
    assert "--warmup_steps" in capsys.readouterr().out
