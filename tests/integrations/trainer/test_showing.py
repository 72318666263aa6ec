"""What people see of a private run: a running mean of the noisy loss with its error, and the true last epsilon."""

import json
import re

import pytest
from tiny_finetune import chat_place, command
from tiny_trainer import trainer, weights

from opacus_ac import cli
from opacus_ac.optimizer.ema import AVERAGE_FROM, average_is_better
from opacus_ac.release.running_mean import WINDOW, RunningMean, with_error

_MEAN = r"-?\d+(\.\d+)? ± \d+(\.\d+)?"


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (3.14159, 0.42, "3.1 ± 0.4"),
        (3.14159, 0.031, "3.14 ± 0.03"),
        (3.14159, 0.96, "3 ± 1"),
        (31.4, 12.3, "31 ± 12"),
        (3.14159, 0.0, "3.14"),
        (3.14159, None, "3.1"),
    ],
)
def test_a_number_has_the_digits_that_its_error_leaves(value, error, shown):
    assert with_error(value, error) == shown


def test_a_running_mean_forgets_and_its_error_falls():
    mean = RunningMean()
    assert str(mean) == "not released"
    mean.add(None, None)
    mean.add(5.0, 0.8)
    assert str(mean) == "5.0 ± 0.8"
    for _ in range(WINDOW):
        mean.add(3.0, 0.8)
    assert str(mean) == "3.0 ± 0.2"  # 0.8 over the root of 20


@pytest.mark.parametrize("bar", [True, False])
def test_the_trainer_shows_the_mean_and_logs_the_value(bar, tmp_path, capsys):
    made = trainer(tmp_path, disable_tqdm=not bar, settings={"target_epsilon": 3.0})
    made.train()
    captured = capsys.readouterr()
    lines = re.findall(r"'loss': '([^']*)'", captured.out + captured.err)
    assert len(lines) == 3
    assert all(re.fullmatch(_MEAN, line) for line in lines)
    assert re.search(rf"'train_loss': '{_MEAN}'", captured.out + captured.err)
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert all(isinstance(loss, float) for loss in logged)
    if bar:
        assert f"epsilon={made.get_epsilon():.3f}" in captured.err.splitlines()[-1].split("\r")[-1]


def test_the_std_of_the_loss_is_that_of_its_noise(tmp_path):
    """The noise of a run with one record's worth of loss, measured over steps of the mechanism itself."""
    made = trainer(tmp_path, max_steps=1)
    made.train()
    optimizer = made.private_optimizer
    statistics, mechanism = optimizer.statistics, optimizer.mechanism
    values = []
    for _ in range(2000):
        statistics.begin(1.0, optimizer.policy.gradient_share)
        values.append(mechanism.release_statistics(statistics, optimizer.released.expected_batch_size).loss)
        statistics.finish()
    std = statistics.loss_std(optimizer.released)
    measured = (sum(value**2 for value in values) / len(values)) ** 0.5
    assert measured == pytest.approx(std, rel=0.12)  # seven standard errors of a std from 2,000 values


def test_the_last_line_of_the_command_has_the_epsilon_of_the_report(tmp_path, capsys):
    out = tmp_path / "out"
    words = command(chat_place(tmp_path), out, max_steps=4, logging_steps=3, report_to="none")
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    epsilon = json.loads((out / "privacy_report.json").read_text())["epsilon"]
    last = [line for line in captured.err.splitlines() if line.startswith("step ")][-1]
    assert last.startswith(f"step 4/4  epsilon {epsilon:.3f}")
    assert re.search(rf"noisy loss {_MEAN}  ", captured.err)


# ---------------------------------------------------------------- which weights


def test_the_last_weights_are_saved_unless_the_run_is_long(tmp_path):
    made = trainer(tmp_path)
    made.train()
    last = weights(made.model)
    assert not made.saves_average
    with made.ema_weights():
        assert weights(made.model).equal(last)
    made.args.max_steps = AVERAGE_FROM
    assert made.saves_average
    with made.ema_weights():
        assert not weights(made.model).equal(last)
    assert [average_is_better(steps) for steps in (30, AVERAGE_FROM - 1, AVERAGE_FROM)] == [False, False, True]


@pytest.mark.parametrize(
    ("wanted", "ema_decay", "saves"), [(True, 0.999, True), (False, 0.999, False), (True, None, False)]
)
def test_what_the_user_says_of_the_average_counts(wanted, ema_decay, saves, tmp_path):
    made = trainer(tmp_path, settings={"average_weights": wanted, "ema_decay": ema_decay}, max_steps=1)
    made.train()
    assert made.saves_average is saves
