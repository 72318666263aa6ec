"""The study of a chat model: its quick form on a tiny model, with adapters and with all weights; which runs it wants."""

import chat_model_study as study
import pytest
from common.results import read
from tiny_chat import save_chat_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def arguments(*options):
    """The runs that the command line asks for."""
    return study.wanted(*study.parser().parse_known_args(options))


@pytest.mark.parametrize("full", [False, True])
def test_the_quick_form_runs_both_methods(full, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "HELD_OUT", 2)
    out, model = tmp_path / "rows.jsonl", save_chat_model(tmp_path / "model")
    options = ["--full", "--rates", "0.001"] if full else []
    small = ["--records", "40", "--batch", "8", "--max-length", "120", "--jobs", "1"]
    assert study.main(["--quick", "--out", str(out), "--model", str(model), *small, *options]) == 0
    by_method = {row["method"]: row for row in read(out)}
    assert by_method.keys() == {"auto", "adamw"}
    for row in by_method.values():
        assert 7.8 < row["spent"] <= 8
        assert row["loss"] != row["loss_before"]
    assert by_method["auto"]["rate"] == (0.001 if full else 0.03)
    assert by_method["auto"]["found_rate"] > 0
    assert by_method["adamw"]["found_rate"] is None
    assert "| loving | 8 | auto |" in capsys.readouterr().out
    study.main(["--report", "--quick", "--out", str(out), "--model", str(model), *small, *options])
    assert "| loving | 8 | adamw |" in capsys.readouterr().out


def test_momentum_and_clipping_are_compared_at_the_middle_rate():
    cells = arguments("--seeds", "5", "--rates", "0.1", "0.2", "0.4", "--epsilons", "2", "8")
    tried = [(c.method, c.epsilon, c.rate, c.beta1) for c in cells if c.method != "auto"]
    planned = tried[0][3]
    assert tried[:3] == [("adamw", 8.0, rate, planned) for rate in (0.1, 0.2, 0.4)]
    assert tried[3:] == [("adamw", 8.0, 0.2, 0.9), ("adamw-flat", 8.0, 0.2, planned)]
    assert [c.epsilon for c in cells if c.method == "auto"] == [8.0, 2.0]


def test_without_runs_there_is_no_table(tmp_path):
    with pytest.raises(SystemExit, match="run it first"):
        study.main(["--report", "--out", str(tmp_path / "none.jsonl")])
