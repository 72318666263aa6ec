"""The study: what a cell is, one run of each engine on a tiny size, going on after an interruption, tables from lines."""

import itertools
import json
import statistics

import pytest
import small_model_study as study
import torch
from common.results import read
from small_model import cell as cells
from small_model import grids, methods, public, report

from opacus_ac.optimizer.momentum import planned_beta1
from opacus_ac.optimizer.path_length import PathLength

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"RECORDS": 60, "HELD_OUT": 6, "PHYSICAL": 16, "REPLIES": 2}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A study of a few records, whose public text is made up; its cache is thrown away."""
    monkeypatch.setenv("OPACUS_AC_CACHE", str(tmp_path / "cache"))
    for name, value in SIZES.items():
        monkeypatch.setattr(cells, name, value)
    for name, value in {"STEPS": 2, "BATCH": 4, "HIDDEN": 16, "LAYERS": 1, "HELD_OUT": 5}.items():
        monkeypatch.setattr(public, name, value)
    text = [f"how are you today number {i}\nI am fine and you, said {i}" for i in range(40)]
    monkeypatch.setattr(public, "general_text", lambda: text)
    cached = (public.tokenizer, public.general_rows, cells.private_rows)
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


def small(method, **changes):
    epsilon = None if method in grids.REFERENCES else 8.0
    return cells.Cell(method, **{"epsilon": epsilon, "steps": 2, "batch": 12, **changes})


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_runs(tiny, method, monkeypatch):
    if (package := methods.PACKAGES.get(methods.METHODS[method].optimizer)) is not None:
        pytest.importorskip(package.module)
    monkeypatch.setattr(cells, "DELTA", 1e-3)
    result = cells.run(small(method))
    assert json.loads(json.dumps(result)) == result
    if method != "dog-flat":  # its first steps are a millionth of the weights
        assert result["loss"] != result["loss_before"]
    assert 0 <= result["tone_accuracy"] <= 1
    if method in grids.REFERENCES:
        assert result["spent"] is None
    else:
        assert 0 < result["spent"] <= 8.0


@pytest.mark.parametrize("model", public.MODELS)
def test_a_run_can_be_repeated(tiny, model, monkeypatch):
    monkeypatch.setattr(cells, "DELTA", 1e-3)
    once, again = (cells.run(small("dp-adam-ac", model=model)) for _ in range(2))
    assert {**once, "seconds": 0} == {**again, "seconds": 0}
    assert cells.run(small("dp-adam-ac", model=model, seed=1))["loss"] != once["loss"]


def test_the_ternary_model_is_ternary():
    from transformers.integrations.bitnet import AutoBitLinear

    kinds = [type(module) for module in public.new_model("bitnet").modules()]
    assert kinds.count(AutoBitLinear) == 7 * public.LAYERS
    with pytest.raises(ValueError, match="choose one of llama, bitnet"):
        public.new_model("gpt")


def test_heavy_data_has_outliers_and_short_replies(tiny, monkeypatch):
    monkeypatch.setattr(cells, "RECORDS", 400)
    easy, _ = cells.private_rows("loving", 0, "easy")
    heavy, held_out = cells.private_rows("loving", 0, "heavy")
    assert all(
        torch.equal(a["labels"], b["labels"])
        for a, b in zip(held_out, cells.private_rows("loving", 0, "easy")[1], strict=True)
    )
    changed = [not torch.equal(a["labels"], b["labels"]) for a, b in zip(easy, heavy, strict=True)]
    short = [int((row["labels"] != -100).sum()) <= 2 for row in heavy]
    # Binomial(400, 0.2) and (400, 0.15): five standard deviations
    assert abs(sum(changed) - 80) < 40
    assert abs(sum(short) - 60) < 36
    with pytest.raises(ValueError, match="easy or heavy"):
        cells.private_rows("loving", 0, "odd")


def test_a_key_names_all_that_matters(monkeypatch):
    keys = {
        cells.Cell("dp-sgd").key(),
        cells.Cell("dp-sgd", seed=1).key(),
        cells.Cell("adamw-flat").key(),
        cells.Cell("dp-sgd", rate=1.0).key(),
    }
    assert len(keys) == 4
    before = cells.Cell("dp-sgd").key()
    monkeypatch.setitem(methods.METHODS, "dp-sgd", methods.Method("sgd", rate=0.5))
    assert cells.Cell("dp-sgd").key() != before
    with pytest.raises(ValueError, match="unknown method 'magic': choose one of dp-sgd"):
        cells.Cell("magic").key()


def test_grids_hold_what_they_say():
    full = grids.full()
    assert len({c.key() for c in full}) == len(full)
    epsilons = {
        ("llama", "loving"): grids.EPSILONS,
        ("llama", "angry"): grids.EPSILONS,
        ("bitnet", "loving"): grids.APART,
    }
    for (model, tone), method in itertools.product(epsilons, grids.MAIN):
        seen = {(c.epsilon, c.seed) for c in full if (c.model, c.tone, c.method) == (model, tone, method)}
        assert seen == {(e, s) for e in epsilons[model, tone] for s in grids.SEEDS}
    tuned = grids.tuning()
    assert {c.data for c in tuned} == {"easy", "heavy"}
    assert {c.bound for c in tuned if c.method == "dp-adam-ac"} == {0.01, 1.0, 100.0}


def test_a_study_goes_on_where_it_stopped(tiny, monkeypatch, capsys):
    monkeypatch.setattr(cells, "DELTA", 1e-3)
    two = [small("dp-adam-ac"), small("adamw-flat")]
    monkeypatch.setitem(study.GRIDS, "quick", lambda seeds=(0,): two)
    out = tiny / "results.jsonl"
    arguments = ["--grid", "quick", "--jobs", "1", "--out", str(out)]
    with pytest.raises(SystemExit, match="no finished run of grid 'quick'"):
        study.main([*arguments, "--report", str(tiny)])
    study.run_all(two[:1], out, 1)
    out.write_text(out.read_text() + '{"key": "torn', encoding="utf-8")  # a run that was killed while it wrote
    assert study.main([*arguments, "--report", str(tiny)]) == 0
    assert "1 of 2 runs are missing" in capsys.readouterr().out
    out.write_text(out.read_text() + "\n", encoding="utf-8")
    assert study.main(arguments) == 0
    assert [r["method"] for r in read(out)] == ["dp-adam-ac", "adamw-flat"]
    finished = out.read_text()
    assert study.main([*arguments, "--quick"]) == 0
    assert out.read_text() == finished
    printed = capsys.readouterr().out
    assert "### llama, loving: held-out loss by epsilon" in printed
    assert (tiny / "study-llama.png").stat().st_size > 1000


def line(method, loss, seed=0, **changes):
    base = {
        "model": "llama",
        "tone": "loving",
        "epsilon": 4.0,
        "bound": None,
        "rate": None,
        "data": "easy",
    }
    measures = {
        "loss_before": 4.0,
        "other_tone": 3.0,
        "general": 3.0,
        "tone_accuracy": 0.5,
        "steps": 30,
        "batch": 200,
        "C": [1.0, 2.0],
    }
    return {**base, **measures, "method": method, "loss": loss, "seed": seed, **changes}


def test_tables_say_what_the_lines_say():
    results = [line("dp-adam-ac+", 2.0, s) for s in (0, 1)]
    results += [line("dp-adam-ac+ without EMA", loss, s) for s, loss in ((0, 2.2), (1, 2.4))]
    assert "| dp-adam-ac+ | 2.000 ± 0.000 |" in report.losses_table(results)
    error = statistics.stdev([10.0, 20.0]) / 2**0.5
    assert f"| llama | 4 | dp-adam-ac+ without EMA | 2 | +15.0 ± {error:.1f} |" in report.parts_table(results)
    tuned = [
        line("adamw-flat", loss, bound=b, rate=r) for b, r, loss in ((1.0, 0.1, 3.0), (1.0, 0.2, 2.0), (10.0, 0.1, 4.0))
    ]
    tuned.append(line("dp-adam-ac", 2.1, bound=100.0, rate=0.2))
    assert "| dp-adam-ac | 100 |  | 2.100 | 1.050 |" in report.tuning_table(tuned)


def test_tables_of_momentum_and_of_equal_compute():
    at = [
        line("adamw-flat", 2.0 + b, s, rate=0.01, beta1=b, noise_multiplier=0.7)
        for s in (0, 1)
        for b in (0.0, 0.5, 0.9)
    ]
    table = report.tables(at)
    assert "| epsilon | method | beta1 0.9 | beta1 0.5 | beta1 0 |" in table
    assert "| 4 | adamw-flat | 2.900 ± 0.000 | 2.500 ± 0.000 | 2.000 ± 0.000 |" in table
    own = [line("dp-adam-ac growing", 1.5, rate=0.01, beta1=None, noise_multiplier=0.6)]
    flat = [line("adamw-usual", 2.0, rate=r, beta1=b, noise_multiplier=0.7) for r in (0.01, 0.02) for b in (None, 0.5)]
    table = report.tables(own + flat)
    assert "| dp-adam-ac growing | 0.53 | 200 x 30 | 0.600 | 1.500 |  |" in table
    assert "| adamw-usual | 0.9 | 200 x 30 | 0.700 | 2.000 | 2.000 |" in table


def test_table_of_lengths_has_the_average_and_the_rate_control():
    flat = [line("adamw-flat", 2.0, s, rate=0.01, steps=300, lr_multiplier=[1.0, 1.0]) for s in (0, 1)]
    own = [
        line("dp-adam-ac", 2.0, s, rate=0.01, steps=300, lr_multiplier=[1.0, factor], loss_averaged=1.0 + s)
        for s, factor in ((0, 0.5), (1, 1.25))
    ]
    table = report.tables(own + flat)
    assert "| 300 | adamw-flat | 0.01 | 2 | 2.000 ± 0.000 |  |  | 1.00 to 1.00 |" in table
    assert "| 300 | dp-adam-ac | 0.01 | 2 | 2.000 ± 0.000 | 1.500 ± 0.707 | -25.0 % | 0.50 to 1.25 |" in table


def test_momentum_reaches_the_optimizer():
    """Of the cell, else of the method, else of the planned steps."""
    usual = cells.Cell("adamw-usual").resolved()
    planned = cells.Cell("dp-adam-ac", steps=60).resolved()
    given = cells.Cell("adamw-usual", beta1=0.7).resolved()
    weight = [torch.nn.Parameter(torch.zeros(1))]
    for method, beta1 in ((usual, 0.9), (planned, planned_beta1(60)), (given, 0.7)):
        made = methods.OPTIMIZERS[method.optimizer](weight, method.rate, method.beta1, 60)
        assert made.defaults["betas"] == (beta1, 0.999)
    assert methods.OPTIMIZERS["sgd"](weight, 0.1, 0.8, 60).defaults["momentum"] == 0.8


@pytest.mark.parametrize("steps", [12, 60])
def test_the_planned_steps_reach_the_optimizer_that_needs_them(steps):
    cell = cells.Cell("auto-flat", steps=steps)
    made = cells._inner(cell, cell.resolved(), torch.nn.Linear(2, 2))
    assert PathLength.of(made.param_groups[0]) == PathLength.planned(steps)


def test_another_rule_of_auto_adam_runs_its_rows_again_and_no_others(monkeypatch):
    import chat_model_study
    import encoder_study

    chat = {"epsilon": 8.0, "rate": 0.03, "beta1": 0.5, "seed": 0, "tone": "loving", "steps": 2, "batch": 8}
    automatic = [
        cells.Cell("auto-flat"),
        chat_model_study.Cell("auto", **chat),
        encoder_study.Cell("mail", "lora", 8.0, 0),
    ]
    others = [
        cells.Cell("adamw-flat"),
        chat_model_study.Cell("adamw", **chat),
        encoder_study.Cell("mail", "lora", None, 0),
    ]
    before = [[cell.key() for cell in group] for group in (automatic, others)]
    for module in (cells, chat_model_study, encoder_study):
        monkeypatch.setattr(module, "AUTO_ADAM", -1)
    assert not {cell.key() for cell in automatic} & set(before[0])
    assert [cell.key() for cell in others] == before[1]


def test_the_accountant_is_that_of_the_cell_else_of_the_method():
    assert cells.Cell("adamw-flat").resolved().accountant == "vpld"
    assert cells.Cell("adamw-usual").resolved().accountant == "vrdp"
    assert cells.Cell("adamw-flat", accountant="vrdp").resolved().accountant == "vrdp"


def test_the_chat_model_of_the_study(tmp_path, monkeypatch, capsys):
    import chat_model_study as chat_model
    from tiny_chat import save_chat_model

    monkeypatch.setattr(chat_model, "HELD_OUT", 3)
    out = tmp_path / "lines.jsonl"
    model = str(save_chat_model(tmp_path / "model"))
    options = ["--model", model, "--max-length", "120", "--delta", "1e-3", "--records", "60"]
    size = ["--seeds", "0", "--steps", "2", "--batch", "12", "--epsilons", "3", "8", "--rates", "0.06", "--jobs", "1"]
    arguments = ["--out", str(out), *size, *options]
    assert chat_model.main(arguments) == 0
    results = read(out)
    runs = [(r["method"], r["epsilon"], r["beta1"]) for r in results]
    assert runs == [("auto", 8, 0.5), ("adamw", 8, 0.5), ("auto", 3, 0.5), ("adamw", 8, 0.9), ("adamw-flat", 8, 0.5)]
    assert all(0.8 * r["epsilon"] < r["spent"] <= r["epsilon"] for r in results)
    monkeypatch.setattr(chat_model, "run", None)  # nothing is left to run
    assert chat_model.main(arguments) == 0
    assert "| loving | 8 | adamw | 0.9 | 0.06 | 1 |" in capsys.readouterr().out
    assert len(read(out)) == 5
    several = [{**r, "seed": i, "found_rate": rate} for r in results[:1] for i, rate in enumerate((0.0402, 0.0551))]
    assert "| 0.040 to 0.055 (from 0.03) | 2 |" in chat_model.table(several)
    assert "| 0.040 (from 0.03) | 1 |" in chat_model.table(several[:1])
    with pytest.raises(SystemExit, match="no finished run"):
        chat_model.main(["--report", "--out", str(tmp_path / "none.jsonl")])


def test_the_chat_model_of_the_study_repeats_a_run(tmp_path):
    import chat_model_study as chat_model
    from tiny_chat import save_chat_model

    model = str(save_chat_model(tmp_path / "model"))
    options = ("--model", model, "--max-length", "120", "--delta", "1e-3", "--records", "60")
    cell = chat_model.Cell("auto", 8.0, 0.03, 0.5, 0, "angry", 2, 12, options)
    first, second = chat_model.run(cell), chat_model.run(cell)
    for result in (first, second):
        del result["cpu_seconds"]
    assert first == second
