"""The example that compares allocations, end to end on a tiny model: one budget, a table, weights that differ."""

import json

import finetune_lora_allocation
import pytest
from common import chat_run
from tiny_chat import save_chat_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SMALL = ["--records", "120", "--expected-batch-size", "12", "--max-length", "120", "--delta", "1e-3", "--steps", "5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_chat_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("both", [False, True])
def test_every_allocation_has_the_same_budget(model, both, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat_run, "HELD_OUT", 3)
    monkeypatch.setattr(finetune_lora_allocation, "PUBLIC", 2)
    options = ["--both-factors"] if both else []
    results = finetune_lora_allocation.main(
        ["--model", model, "--seeds", "1", "--output", str(tmp_path), *SMALL, *options]
    )
    assert [r["allocation"] for r in results] == list(finetune_lora_allocation.ALLOCATIONS)
    assert len({r["epsilon"] for r in results}) == 1
    assert 7.9 < results[0]["epsilon"] <= 8
    by_name = {r["allocation"]: r for r in results}
    assert by_name["uniform"]["weights"] == [1.0, 1.0]
    assert by_name["uniform"]["noise_share"] == pytest.approx(1.0)
    assert by_name["public"]["noise_share"] < 1.0
    assert all(by_name[name]["weights"][0] < by_name[name]["weights"][1] for name in ("dimension", "public"))
    # Secret noise decides what a history of five releases says; tests/allocation/test_allocation.py seeds it and holds it to account.
    assert by_name["history"]["weights"][0] <= by_name["history"]["weights"][1]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "held-out loss" in capsys.readouterr().out


def test_all_weights_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="leave out --full"):
        finetune_lora_allocation.main(["--model", model, "--output", str(tmp_path), "--full"])
