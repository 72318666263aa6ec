"""Subcommands that plan and report: the figures of the accountants, and errors that name the option and the remedy."""

import json
import math

import pytest
import torch
from helpers import classifier, loader, train
from tiny_models import qwen2

from opacus_ac import PrivacyEngine, cli
from opacus_ac.accounting import Event, attack_bounds, attack_sentences, calibrate_noise_multiplier, plan_epsilon
from opacus_ac.errors import NotPrivateWarning
from opacus_ac.release import default_histogram_weight

PLAN = ["--dataset-size", "10000", "--batch-size", "100", "--steps", "500", "--delta", "1e-5"]


def out(capsys, *arguments):
    assert cli.main(list(arguments)) == cli.OK
    return capsys.readouterr().out


def values(capsys, *arguments):
    return json.loads(out(capsys, *arguments, "--format", "json"))


@pytest.mark.parametrize("accountant", ["vrdp", "vpld"])
def test_epsilon_and_calibrate_are_the_accountants(capsys, accountant):
    method = {"vrdp": "rdp", "vpld": "pld"}[accountant]
    found = values(capsys, "epsilon", "--noise-multiplier", "0.9", *PLAN, "--accountant", accountant)
    assert found["epsilon"] == plan_epsilon(0.9, 0.01, 500, delta=1e-5, method=method)
    found = values(capsys, "calibrate", "--target_epsilon", "2", *PLAN, "--accountant", accountant)
    wanted = calibrate_noise_multiplier(
        target_epsilon=2.0, target_delta=1e-5, sample_rate=0.01, steps=500, method=method
    )
    assert found["noise_multiplier"] == wanted
    assert 1.95 < found["epsilon"] <= 2.0


def test_epochs_are_steps(capsys):
    epochs = [*PLAN[:4], "--epochs", "5", "--delta", "1e-5"]
    assert values(capsys, "epsilon", "--noise-multiplier", "1", *epochs) == values(
        capsys, "epsilon", "--noise-multiplier", "1", *PLAN
    )


@pytest.mark.parametrize(
    ("sampling", "options", "neighbours"),
    [
        ("fixed_size", [], "zero-out"),
        ("truncated_poisson", ["--max-batch-size", "120"], "zero-out"),
        ("shuffled", [], "zero-out"),
        ("poisson", [], "add/remove"),
    ],
)
def test_every_kind_of_sampling(capsys, sampling, options, neighbours):
    found = values(capsys, "epsilon", "--noise-multiplier", "2", *PLAN, "--sampling", sampling, *options)
    poisson = values(capsys, "epsilon", "--noise-multiplier", "2", *PLAN)
    assert found["epsilon"] >= poisson["epsilon"] * (1 - 1e-9)
    assert neighbours in found["neighbours"]
    assert found["charges"] == (5 if sampling == "shuffled" else 500)
    assert (found["attacks"]["mu"] is not None) == (sampling == "shuffled")
    said = out(capsys, "epsilon", "--noise-multiplier", "2", *PLAN, "--sampling", sampling, *options)
    assert all(sentence in said for sentence in attack_sentences(found))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["epsilon", "--noise-multiplier", "1", "--sample-rate", "0.01", "--steps", "9", "--delta", "0.5"],
            "delta 0.5 is the share",
        ),
        (
            ["calibrate", "--target-epsilon", "30", "--sample-rate", "0.01", "--steps", "9", "--delta", "1e-5"],
            "epsilon 30 promises next to nothing",
        ),
        (
            ["plan", "--target-epsilon", "4", "--dataset-size", "100", "--batch-size", "10", "--delta", "0.1"],
            "Choose 0.001 or less",
        ),
        (["plan", "--target-epsilon", "4", "--dataset-size", "100", "--batch-size", "10", "--delta", "1e-4"], ""),
    ],
)
def test_a_weak_promise_is_called_one(capsys, arguments, words):
    assert cli.main(arguments) == 0
    warned = capsys.readouterr().err
    assert words in warned
    assert ("warning: " in warned) == bool(words)


def test_no_noise_is_infinity(capsys):
    assert values(capsys, "epsilon", "--noise-multiplier", "0", *PLAN)["epsilon"] == "infinity"


def test_plan_is_a_table_of_what_calibrate_says(capsys):
    arguments = [
        "--dataset-size",
        "10000",
        "--batch-size",
        "50",
        "100",
        "--target-epsilon",
        "1",
        "8",
        "--delta",
        "1e-5",
    ]
    rows = values(capsys, "plan", *arguments, "--epochs", "5")
    assert [(row["target_epsilon"], row["batch_size"], row["steps"]) for row in rows] == [
        (1, 50, 1000), (1, 100, 500), (8, 50, 1000), (8, 100, 500),
    ]  # fmt: skip
    wanted = values(capsys, "calibrate", "--target-epsilon", "8", *PLAN)["noise_multiplier"]
    assert rows[3]["noise_multiplier"] == wanted
    one_step = wanted * math.hypot(1, default_histogram_weight(wanted, 100)) / 100
    assert rows[3]["noise_to_signal"] == pytest.approx(one_step)
    assert rows[3]["noise_to_signal_of_run"] == pytest.approx(one_step / 500**0.5)
    assert len(out(capsys, "plan", *arguments).splitlines()) == 2 + 4 + 3
    attacks = attack_bounds({Event(wanted, 0.01): 500})
    assert rows[3]["advantage"] == attacks.advantage
    assert rows[3]["true_positive_rates"] == {str(rate): caught for rate, caught in attacks.true_positive_rates.items()}
    by_steps = values(capsys, "plan", *arguments[:2], "--batch-size", "100", *arguments[5:], "--steps", "250", "500")
    assert [(row["epochs"], row["steps"]) for row in by_steps] == [(2.5, 250), (5, 500)] * 2
    assert by_steps[3] == rows[3]


@pytest.mark.parametrize(("steps", "said"), [("11", True), ("12", False)])
def test_plan_says_how_long_a_run_must_be_to_find_its_learning_rate(capsys, steps, said):
    arguments = ["--dataset-size", "1000", "--batch-size", "50", "--target-epsilon", "8", "--delta", "1e-5"]
    assert ("plan 12 steps or more" in out(capsys, "plan", *arguments, "--steps", steps)) == said


def test_the_noise_of_a_step_is_that_of_the_plan(capsys):
    """The std of one coordinate of what the inner optimizer is given, over C, against the column "per step"."""
    (row,) = values(
        capsys,
        "plan",
        "--dataset-size",
        "40",
        "--batch-size",
        "8",
        "--steps",
        "3",
        "--target-epsilon",
        "2",
        "--delta",
        "1e-2",
    )
    model = torch.nn.Linear(4, 20_000, bias=False)
    torch.nn.init.zeros_(model.weight)
    with pytest.warns(NotPrivateWarning):
        model, optimizer, batches = PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=loader(40, 8),
            noise_multiplier=row["noise_multiplier"], max_grad_norm=0.25, clip_policy="fixed",
            noise_generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    inputs, _ = next(iter(batches))
    (model(inputs.float()).sum(1).mean() * 0).backward()
    optimizer.step()
    # 80,000 draws: the standard error of a std is 1 / sqrt(2 n) = 0.25 %, and 2 % are eight of them.
    assert float(model.weight.grad.std()) / 0.25 == pytest.approx(row["noise_to_signal"], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epsilon", "--noise-multiplier", "1", "--steps", "5", "--delta", "1e-5"], "give --sample-rate, or both"),
        (["epsilon", "--noise-multiplier", "1", *PLAN, "--sample-rate", "0.1"], "not all"),
        (["epsilon", "--noise-multiplier", "1", *PLAN, "--epochs", "3"], "either --steps or --epochs"),
        (["epsilon", "--noise-multiplier", "-1", *PLAN], "noise_multiplier=-1.0"),
        (["epsilon", "--noise-multiplier", "1", *PLAN, "--max-batch-size", "9"], "--max-batch-size belongs"),
        (["epsilon", "--noise-multiplier", "1", *PLAN, "--sampling", "truncated_poisson"], "--max-batch-size"),
        (["calibrate", "--target-epsilon", "0", *PLAN], "target_epsilon"),
        (["calibrate", "--target-epsilon", "1", *PLAN[:2], "--batch-size", "64000", *PLAN[4:]], "--batch-size 64000"),
        (["plan", *PLAN[:2], "--batch-size", "0", "--target-epsilon", "1", "--delta", "1e-5"], "--batch-size 0"),
        (["plan", *PLAN[:4], "--target-epsilon", "1", "--delta", "1e-5", "--steps", "0"], "--steps 0"),
        (["plan", *PLAN[:4], "--target-epsilon", "1", "--delta", "1e-5", "--epochs", "-1"], "--epochs -1"),
        (["plan", *PLAN, "--target-epsilon", "1", "--epochs", "3"], "either --steps or --epochs"),
        (["report", "nowhere"], "nowhere does not exist"),
    ],
)
def test_errors_are_one_line_that_names_the_option(capsys, arguments, message):
    assert cli.main(arguments) == cli.BAD_USAGE
    error = capsys.readouterr().err
    assert error.startswith(f"opacus-ac {arguments[0]}: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["epsilon", "--noise", "1", *PLAN], ["epsilon", *PLAN], ["calibrate", *PLAN]])
def test_no_abbreviations_and_no_missing_options(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == cli.BAD_USAGE


def spent(tmp_path):
    engine = PrivacyEngine(ledger=tmp_path / "all.ledger")
    model = classifier()
    model, optimizer, batches = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader(64, 16),
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    train(model, optimizer, batches)
    return engine


def test_report_reads_ledgers_and_reports(capsys, tmp_path):
    report = spent(tmp_path).privacy_report(1e-3)
    found = values(capsys, "report", str(tmp_path / "all.ledger"), "--delta", "1e-3")
    assert found["epsilon"] == report.epsilon
    assert found["ledger"] == report.ledger
    assert found["charges"] == [["Event(noise_multiplier=1.0, sample_rate=0.25, sampling='poisson')", 4]]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "privacy_report.json").write_text(report.to_json())
    found = values(capsys, "report", str(tmp_path / "run"))
    assert found == {**report.to_dict(), "state": "finished: 4 steps were taken", "target_epsilon": None}
    assert f"epsilon = {report.epsilon:.2f} at delta = 0.001" in out(capsys, "report", str(tmp_path / "run"))


def test_report_refuses_what_it_cannot_trust(capsys, tmp_path):
    spent(tmp_path)
    ledger = tmp_path / "all.ledger"
    assert cli.main(["report", str(ledger)]) == cli.BAD_USAGE
    assert "--delta" in capsys.readouterr().err
    data = bytearray(ledger.read_bytes())
    data[1200] ^= 1
    ledger.write_bytes(data)
    assert cli.main(["report", str(ledger), "--delta", "1e-3"]) == cli.BAD_USAGE
    assert "all.ledger:2" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("[1]")
    assert cli.main(["report", str(tmp_path / "x.json")]) == cli.BAD_USAGE


def test_explain_prints_a_row_per_parameter(capsys, tmp_path):
    model = qwen2()
    model.config.save_pretrained(tmp_path)
    printed = out(capsys, "explain", str(tmp_path), "--length", "16")
    for name, _ in model.named_parameters():
        assert name in printed
    assert cli.main(["explain", str(tmp_path / "nothing")]) == cli.BAD_USAGE
