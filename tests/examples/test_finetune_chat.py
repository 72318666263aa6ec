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
SMALL = ["--accumulation", "1", "--steps", "4", "--max-length", "120", "--delta", "1e-3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, private dialogues, and two public sets."""
    folder = tmp_path_factory.mktemp("place")
    save_chat_model(folder / "model")
    write_jsonl(folder / "mine.jsonl", dialogues("loving", 120, seed=3))
    write_jsonl(folder / "loving.jsonl", dialogues("loving", 3, seed=4))
    write_jsonl(folder / "angry.jsonl", dialogues("angry", 3, seed=4))
    return folder


def run(place, tmp_path, *options, data="mine.jsonl"):
    where = [str(place / data), "--model", str(place / "model"), "--output", str(tmp_path / "out")]
    return finetune_chat.main([*where, *SMALL, *options])


def heldout(place, *names):
    return ["--heldout", *(str(place / f"{name}.jsonl") for name in names)]


@pytest.mark.parametrize("full", [False, True])
def test_a_private_run_stays_in_its_budget_and_saves_its_report(full, place, tmp_path, capsys):
    result = run(place, tmp_path, *heldout(place, "loving", "angry"), *(["--full"] if full else []))
    out = tmp_path / "out"
    assert result["privacy"]["epsilon"] <= 8
    assert result["privacy"]["epsilon"] > 7.9
    assert result["privacy"]["steps"] == 4
    assert json.loads((out / "privacy_report.json").read_text()) == result["privacy"]
    assert (out / ("model.safetensors" if full else "adapter_model.safetensors")).is_file()
    assert result["before"]["heldout_loss"].keys() == result["after"]["heldout_loss"].keys() == {"loving", "angry"}
    assert result["before"]["heldout_loss"] != result["after"]["heldout_loss"]
    assert len(result["after"]["replies"]) == len(finetune_chat.PROMPTS)
    assert json.loads((out / "result.json").read_text()) == result
    releases = plot_run.read(out)
    assert [r["step"] for r in releases] == [1, 2, 3, 4]
    assert all({"epsilon", "max_grad_norm", "noisy_clip_rate", "loss"} <= r.keys() for r in releases)
    assert releases[-1]["epsilon"] == pytest.approx(result["privacy"]["epsilon"], rel=2e-3)
    plot_run.draw(out, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "differential privacy by privacy loss distribution accounting" in printed
    assert "tensorboard --logdir" in printed


def test_event_files_hold_released_values_and_public_ones_only(place, tmp_path):
    run(place, tmp_path)
    [folder] = {file.parent for file in (tmp_path / "out").rglob("*tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    public = {"train/learning_rate", "train/epoch"}
    released = {
        "train/loss",
        "train/train_loss",
        "train/epsilon",
        "train/max_grad_norm",
        "train/noisy_clip_rate",
        "train/lr_multiplier",
        "train/found_learning_rate",
    }
    found = set(events.Tags()["scalars"])
    # The learning rate is found, and does not follow the clip rate, so there is no band for that.
    assert set(SCALARS) - {"privacy/clip_rate_low", "privacy/clip_rate_high"} <= found
    assert found <= {*SCALARS, *public, *released}


def test_the_published_rule_reports_infinity(place, tmp_path, capsys):
    result = run(place, tmp_path, "--paper")
    assert result["privacy"]["epsilon"] == "infinity"
    assert "un-noised gradient norms" in capsys.readouterr().out


def test_another_budget_and_no_public_dialogues(place, tmp_path):
    write_jsonl(place / "angry_mine.jsonl", dialogues("angry", 60, seed=5))
    result = run(place, tmp_path, "--epsilon", "3", "--steps", "2", data="angry_mine.jsonl")
    assert result["privacy"]["dataset_size"] == 60
    assert result["privacy"]["steps"] == 2
    assert 2.9 < result["privacy"]["epsilon"] <= 3
    assert result["after"]["heldout_loss"] == {}


def test_private_dialogues_are_no_public_ones(place, tmp_path):
    with pytest.raises(ValueError, match="public"):
        run(place, tmp_path, *heldout(place, "mine"))


def test_the_seed_is_not_the_noise(place, tmp_path):
    first, second = (run(place, tmp_path, *heldout(place, "loving"), "--seed", "5") for _ in range(2))
    assert first["before"] == second["before"]
    assert first["after"]["heldout_loss"] != second["after"]["heldout_loss"]


def test_a_broken_line_is_named(place, tmp_path):
    (place / "bad.jsonl").write_text('{"messages": 3}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:1"):
        run(place, tmp_path, data="bad.jsonl")


def test_adapters_of_another_architecture_train_their_second_factor_only():
    model = add_lora(tiny_models.build("gpt2").float(), rank=2, layers=1)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_B" in name for name in trained)
