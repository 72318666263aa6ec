"""The command line: light, with exit codes that scripts can use."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import EntryPoint

import pytest

from opacus_ac import cli
from opacus_ac.audit.table import Plan
from opacus_ac.cli import audit as audit_command

QUICK = ["audit", "--steps", "100", "--runs", "40", "--seed", "1", "--noise-multiplier", "2"]
QUICK += [word for name in ("canary", "noise", "scalars", "one-run", "poison", "coupling") for word in ("--only", name)]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["audit", "--help"], ["audit", "--steps", "many"], ["plan", "--help"], []]
)
def test_help_and_usage_errors_load_neither_torch_nor_opacus(arguments):
    code = (
        "import sys\nfrom opacus_ac.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    assert not {'torch', 'opacus', 'numpy', 'scipy'} & set(sys.modules)"
    )
    done = run_python("-c", code, *arguments)
    assert done.returncode == (0 if {"--help", "--version"} & set(arguments) else cli.BAD_USAGE)
    assert "AssertionError" not in done.stderr


def test_a_reader_that_goes_away_is_no_error():
    """Before, the command reported bad usage and Python a broken pipe."""
    command = [
        sys.executable,
        "-m",
        "opacus_ac",
        "plan",
        "--dataset-size",
        "1000",
        "--batch-size",
        "10",
        "--target-epsilon",
        "8",
        "--delta",
        "1e-5",
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(60) == cli.BROKEN_PIPE


def test_module_and_entry_point_are_the_same_command():
    done = run_python("-m", "opacus_ac", "--help")
    assert done.returncode == 0
    assert "audit" in done.stdout
    assert EntryPoint("opacus-ac", "opacus_ac.cli:main", "console_scripts").load() is cli.main


def test_audit_prints_each_bound_beside_its_claim(capsys):
    assert cli.main(QUICK) == cli.OK
    text = capsys.readouterr().out
    for audit in (
        "white-box canary: not refuted",
        "noise over steps: not refuted",
        "released scalars: not refuted",
        "one training run: not refuted",
        "models that couple records: not refuted",
    ):
        assert audit in text
    assert text.count("claimed epsilon <= ") == text.count("shown epsilon >= ") == 4
    assert text.endswith("No claim was refuted.\n")


def test_a_refuted_claim_is_exit_code_1_and_json_says_which(capsys):
    assert cli.main([*QUICK, "--clipping", "raw_percentile", "--format", "json"]) == cli.REFUTED
    found = json.loads(capsys.readouterr().out)
    assert found["refuted"] is True
    assert [audit["refuted"] for audit in found["audits"]] == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mode", "hooks", "--clipping", "automatic"],
        ["--mode", "functorch", "--clipping", "flat", "--max-physical-batch-size", "20"],
        ["--clipping", "geometric", "--fused-step"],
    ],
)
def test_options_reach_the_step(capsys, arguments):
    assert cli.main([*QUICK, *arguments]) == cli.OK
    text = capsys.readouterr().out
    assert (arguments[1] if arguments[0] == "--mode" else "clip_policy=geometric, fused_step=True") in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "5"], "steps must be at least 100"),
        (["--noise-multiplier", "0"], "noise_multiplier"),
        (["--confidence", "1"], "confidence"),
        (["--max-physical-batch-size", "0"], "max_physical_batch_size"),
    ],
)
def test_a_value_that_cannot_be_audited_is_bad_usage(capsys, arguments, message):
    assert cli.main([*QUICK, *arguments]) == cli.BAD_USAGE
    error = capsys.readouterr().err
    assert error.startswith("opacus-ac audit: error: ")
    assert message in error


def test_the_defaults_of_audit_are_those_of_its_plan():
    options = vars(cli.build_parser().parse_args(["audit"]))
    defaults = {field.name: field.default for field in fields(Plan) if field.name != "settings"}
    assert options.pop("confidence") is None  # it depends on what is audited
    assert defaults.pop("confidence") == audit_command._OF_THE_STEP
    assert {name: options[name] for name in defaults} == defaults


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["audit", "--mode", "ghost"], ["audit", "--format", "xml"]])
def test_argparse_refuses_with_exit_code_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == cli.BAD_USAGE


def test_a_command_is_a_row(monkeypatch):
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--number", type=int, default=3)

    row = cli.Command("twice", "doubles a number", arguments, lambda options: 2 * options.number)
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, row))
    assert cli.main(["twice", "--number", "21"]) == 42


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["report", "out", "--dleta", "3"], "error: there is no option --dleta 3: did you mean --delta?"),
        (["explain", "model", "--mod=bk"], "error: there is no option --mod=bk: did you mean --mode?"),
        (["explain", "model", "--xyzzy"], "error: there is no option --xyzzy\n"),
    ],
)
def test_a_misspelt_option_is_answered_with_the_nearest_one(words, error, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == cli.BAD_USAGE
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "words"),
    [("./nowhere", "there is no such folder"), ("some/model", "HF_HUB_OFFLINE is set"), ("", "no config.json")],
)
def test_explain_looks_for_the_folder_before_it_imports_anything(model, words, tmp_path):
    code = (
        "import sys\nfrom opacus_ac.cli import main\ncode = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\nsys.exit(code)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, "explain", model or str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == cli.BAD_USAGE
    assert done.stderr.startswith("opacus-ac explain: error: cannot load the model ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
