"""Epsilon, remaining steps and step numbers of the dashboard: every so often, at the end, and after resuming."""

import pytest
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard_browser import next_second
from tensorboard_runs import DELTA, private, read, resumed, scalars, statements, steps

from opacus_ac import PrivacyBudgetExceeded
from opacus_ac.tensorboard import PrivacyDashboard

pytestmark = pytest.mark.filterwarnings("ignore")


def test_epsilon_every_so_many_steps_and_at_the_end(tmp_path):
    run = private()
    with PrivacyDashboard(tmp_path, run[0], run[2], every=3) as dashboard:
        steps(run, dashboard, 7)
    written = scalars(tmp_path)
    assert list(written["privacy/epsilon"]) == [0, 3, 6, 7]
    assert list(written["privacy/max_grad_norm"]) == list(range(1, 8))
    assert written["privacy/epsilon"][7] == pytest.approx(run[0].get_epsilon(DELTA))


@pytest.mark.parametrize(
    ("options", "asked"),
    [({}, 1), ({"batch_size_schedule": [16] * 4 + [24]}, 2), ({"poisson_sampling": False}, 8)],
    ids=["constant rate", "two rates", "passes"],
)
def test_remaining_steps_are_asked_again_only_when_rate_or_noise_change(options, asked, tmp_path, monkeypatch):
    run = private(**options)
    engine, count, calls = run[0], run[0].remaining_steps, []
    monkeypatch.setattr(engine, "remaining_steps", lambda: calls.append(1) or count())
    expected = {0: count()}
    with PrivacyDashboard(tmp_path, engine, run[2]) as dashboard:
        for step in range(1, 8):
            steps(run, dashboard, 1)
            expected[step] = count()
    assert scalars(tmp_path)["privacy/remaining_steps"] == expected
    assert len(calls) == asked


def test_a_change_of_noise_is_priced_anew(tmp_path):
    run = private(accountant="vrdp")
    with PrivacyDashboard(tmp_path, run[0], run[2]) as dashboard:
        steps(run, dashboard, 2)
        run[2].noise_multiplier *= 2
        steps(run, dashboard, 1)
        expected = run[0].remaining_steps()
    assert scalars(tmp_path)["privacy/remaining_steps"][3] == expected > 50


def test_the_budget_ends_the_run_and_the_last_epsilon_is_there(tmp_path):
    run = private(target=2.0, steps=4)
    with (
        pytest.raises(PrivacyBudgetExceeded),
        PrivacyDashboard(tmp_path, run[0], run[2], every=100) as dashboard,
    ):
        steps(run, dashboard, 100)
    written = scalars(tmp_path)
    end = run[2].steps_taken
    assert written["privacy/remaining_steps"][end] == 0
    assert written["privacy/epsilon"][end] == pytest.approx(run[0].get_epsilon(DELTA))
    assert "NOT PRIVATE" not in statements(tmp_path)[-1]


def test_physical_batches_and_repeated_calls_write_once_per_step(tmp_path):
    run = private(max_physical_batch_size=4)
    with PrivacyDashboard(tmp_path, run[0], run[2]) as dashboard:
        assert dashboard.log_step() is False
        releases = steps(run, dashboard, 3)
        assert dashboard.log_step() is False
    assert [r.step for r in releases] == [1, 2, 3]
    curve = read(tmp_path).Scalars("privacy/max_grad_norm")
    assert [e.step for e in curve] == [1, 2, 3]


def shown_by_tensorboard(folder, tag):
    """Return the steps of a curve as TensorBoard's own reader has them, which hides less than ``EventAccumulator``."""
    multiplexer = EventMultiplexer(size_guidance={"tensors": 0})
    multiplexer.AddRun(str(folder), "run")
    multiplexer.Reload()
    return [event.step for event in multiplexer.Tensors("run", tag)]


def test_resuming_continues_the_steps_and_hides_what_the_checkpoint_lacks(tmp_path):
    logs = tmp_path / "logs"
    resumed(logs, tmp_path / "saved.pt", next_second)
    assert shown_by_tensorboard(logs, "privacy/max_grad_norm") == [1, 2, 3, 4, 5]
    assert shown_by_tensorboard(logs, "privacy/epsilon") == [0, 1, 2, 3, 4, 5]


def test_loading_an_earlier_checkpoint_hides_the_later_steps(tmp_path):
    logs, saved = tmp_path / "logs", tmp_path / "saved.pt"
    run = private()
    with PrivacyDashboard(logs, run[0], run[2]) as dashboard:
        steps(run, dashboard, 2)
        run[0].save_checkpoint(path=saved, module=run[1], optimizer=run[2])
        steps(run, dashboard, 3)
        run[0].load_checkpoint(path=saved, module=run[1], optimizer=run[2])
        (again,) = steps(run, dashboard, 1)
    assert shown_by_tensorboard(logs, "privacy/max_grad_norm") == [1, 2, 3]
    # The running mean has forgotten the steps that are hidden.
    assert shown_by_tensorboard(logs, "privacy/noisy_clip_rate_mean") == [1, 2, 3]
    assert scalars(logs)["privacy/noisy_clip_rate_mean"][3] == pytest.approx(again.clip_rate, rel=1e-6)
