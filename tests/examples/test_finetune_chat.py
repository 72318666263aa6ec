"""The main example, end to end on a tiny model: what it claims, what it writes, what it refuses."""

import json

import finetune_chat
import plot_run
import pytest
import tiny_models
from common.tone_dialogues import dialogues, write_jsonl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_chat import save_chat_model

from opacus_ac.models.peft import add_lora
from opacus_ac.tensorboard.tags import SCALARS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SMALL = ["--records", "120", "--expected-batch-size", "12", "--max-length", "120", "--delta", "1e-3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_chat_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(finetune_chat, "HELD_OUT", 3)


def run(model, tmp_path, *options):
    length = [] if "--epochs" in options else ["--steps", "4"]
    return finetune_chat.main(["--model", model, "--output", str(tmp_path / "out"), *SMALL, *length, *options])


@pytest.mark.parametrize("full", [False, True])
def test_a_private_run_stays_in_its_budget_and_saves_its_report(full, model, tmp_path, capsys):
    result = run(model, tmp_path, *(["--full"] if full else []))
    out = tmp_path / "out"
    assert result["privacy"]["epsilon"] <= 8
    assert result["privacy"]["epsilon"] > 7.9
    assert result["privacy"]["steps"] == 4
    assert json.loads((out / "model" / "privacy_report.json").read_text()) == result["privacy"]
    assert (out / "model" / ("model.safetensors" if full else "adapter_model.safetensors")).is_file()
    assert set(result["heldout_loss"]["before"]) == {"loving", "angry"}
    assert len(result["replies"]["after"]) == 4
    releases = [json.loads(line) for line in (out / "releases.jsonl").read_text().splitlines()]
    assert [r["step"] for r in releases] == [1, 2, 3, 4]
    assert releases[-1]["epsilon"] == pytest.approx(result["privacy"]["epsilon"], rel=2e-3)
    plot_run.draw(out, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "differential privacy by vpld accounting" in printed
    assert "tensorboard --logdir" in printed


def test_event_files_hold_released_values_only(model, tmp_path):
    run(model, tmp_path)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(SCALARS)


def test_the_published_rule_reports_infinity(model, tmp_path, capsys):
    result = run(model, tmp_path, "--paper")
    assert result["privacy"]["epsilon"] == "infinity"
    assert "un-noised gradient norms" in capsys.readouterr().out


def test_own_dialogues_and_public_held_out_ones(model, tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", dialogues("angry", 60, seed=3))
    write_jsonl(tmp_path / "public.jsonl", dialogues("loving", 4, seed=4))
    data = ["--data", str(tmp_path / "mine.jsonl")]
    result = run(model, tmp_path, *data, "--heldout", str(tmp_path / "public.jsonl"), "--epsilon", "3")
    assert result["privacy"]["dataset_size"] == 60
    assert set(result["heldout_loss"]["after"]) == {"held-out"}
    assert run(model, tmp_path, *data, "--epochs", "0.4")["privacy"]["steps"] == 2


def test_the_seed_is_not_the_noise(model, tmp_path):
    first, second = (run(model, tmp_path, "--seed", "5") for _ in range(2))
    assert first["heldout_loss"]["before"] == second["heldout_loss"]["before"]
    assert first["heldout_loss"]["after"] != second["heldout_loss"]["after"]


def test_a_broken_line_is_named(model, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:1"):
        run(model, tmp_path, "--data", str(tmp_path / "bad.jsonl"))


def test_adapters_of_another_architecture_train_their_second_factor_only():
    model = add_lora(tiny_models.build("gpt2").float(), rank=2, layers=1)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_B" in name for name in trained)
