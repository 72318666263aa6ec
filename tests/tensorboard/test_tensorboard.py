"""What the dashboard writes: the releases and nothing else, where it belongs, and loudly when nothing is private."""

import math

import helpers
import numpy as np
import pytest
import torch
from tensorboard_runs import DELTA, metas, private, raw_events, read, scalars, statements, steps
from torch.utils.tensorboard import SummaryWriter

from opacus_ac import PrivacyEngine
from opacus_ac.release.running_mean import WINDOW, RunningMean
from opacus_ac.tensorboard import PrivacyDashboard, tags

pytestmark = pytest.mark.filterwarnings("ignore")
OWN_PAGES = {
    "custom_scalars__config__",
    "_hparams_/experiment",
    "_hparams_/session_start_info",
    "_hparams_/session_end_info",
}


def test_every_value_is_that_of_the_release_or_a_public_constant(tmp_path):
    run = private(loss_bound=3.0, batch_size_schedule=[16, 16, 24])
    engine, _, optimizer, _ = run
    epsilons = {}
    with PrivacyDashboard(tmp_path, engine, optimizer) as dashboard:
        releases = []
        for _ in range(5):
            releases += steps(run, dashboard, 1, losses=True)
            epsilons[optimizer.steps_taken] = (engine.get_epsilon(DELTA), engine.remaining_steps())
    written = scalars(tmp_path)
    assert set(written) == set(tags.SCALARS)
    noise = {tag for tag in tags.SCALARS if tag.endswith(("_std", "_mean"))}
    for release in releases:
        expected = {
            "epsilon": epsilons[release.step][0],
            "epsilon_target": 8.0,
            "remaining_steps": epsilons[release.step][1],
            "max_grad_norm": release.max_grad_norm,
            "noisy_clip_rate": release.clip_rate,
            "target_clip_rate": 0.9,
            "clip_rate_low": 0.8,
            "clip_rate_high": 1.0,
            "lr_multiplier": release.lr_multiplier,
            "noisy_loss": release.loss,
            "sample_rate": release.sample_rate,
            "noise_multiplier": release.noise_multiplier,
        }
        assert {f"privacy/{name}" for name in expected} | noise == set(tags.SCALARS)
        for name, value in expected.items():
            # Event files hold 32-bit floats. The figures of privacy losses follow from a grid, which may change.
            near = 1e-4 if name == "epsilon" else 1e-6
            assert written[f"privacy/{name}"][release.step] == pytest.approx(value, rel=near), name
    assert [written["privacy/sample_rate"][s] * 64 for s in (1, 2, 3, 5)] == [16, 16, 24, 24]
    assert written["privacy/epsilon"][0] == 0
    assert len(list(tmp_path.iterdir())) == 1  # one event file: no second one for hyperparameters


@pytest.mark.parametrize("sizes", [None, [16, 16, 24]], ids=["one size", "two sizes"])
def test_the_noise_of_a_curve_is_written_where_it_changes_and_its_running_mean_at_every_step(sizes, tmp_path):
    run = private(loss_bound=3.0, batch_size_schedule=sizes)
    with PrivacyDashboard(tmp_path, run[0], run[2]) as dashboard:
        releases = steps(run, dashboard, WINDOW + 4, losses=True)
    written = scalars(tmp_path)
    stds = {r.step: run[2].statistics.loss_std(r) for r in releases}
    changes = [s for s in stds if s == 1 or stds[s] != stds[s - 1]]
    assert list(written["privacy/noisy_loss_std"]) == changes
    assert len(changes) == (1 if sizes is None else 2)
    expected = RunningMean()
    for release in releases:
        expected.add(release.loss, stds[release.step])
        mean, error = expected.known
        assert written["privacy/noisy_loss_mean"][release.step] == pytest.approx(mean, rel=1e-5)
        errors = {s: e for s, e in written["privacy/noisy_loss_mean_std"].items() if s <= release.step}
        assert errors[max(errors)] == pytest.approx(error, rel=1e-5)
    if sizes is None:
        assert list(written["privacy/noisy_loss_mean_std"]) == list(range(1, WINDOW + 1))
    rates = [r.clip_rate for r in releases[-WINDOW:]]
    assert written["privacy/noisy_clip_rate_mean"][WINDOW + 4] == pytest.approx(np.mean(rates), rel=1e-5)
    last = releases[-1]
    near = pytest.approx(last.histogram.fraction_std(last.max_grad_norm), rel=1e-5)
    assert list(written["privacy/noisy_clip_rate_std"].values())[-1] == near


def test_all_tags_are_on_the_list(tmp_path):
    run = private(loss_bound=3.0)
    with PrivacyDashboard(tmp_path, run[0], run[2]) as dashboard:
        steps(run, dashboard, 2, losses=True)
    found = {v.tag.removesuffix("/text_summary") for e in raw_events(tmp_path) if e.summary for v in e.summary.value}
    assert found == tags.ALLOWED | OWN_PAGES


def test_private_state_of_the_step_is_not_read(tmp_path):
    """Sentinels in everything that is private after a step reach no event."""
    run = private(loss_bound=3.0)
    _, _, optimizer, _ = run
    with PrivacyDashboard(tmp_path, run[0], optimizer) as dashboard:
        steps(run, dashboard, 1, losses=True)
        steps(run, type("Silent", (), {"log_step": lambda self: False})(), 1, losses=True)
        optimizer.statistics._counts[:] = 777
        optimizer.statistics._loss_sum = 777.0
        for p in optimizer.params:
            p.summed_grad = torch.full_like(p, 777.0)
        optimizer.record_losses(torch.full((16,), 777.0))
        assert dashboard.log_step()
    histogram = read(tmp_path).Histograms(tags.HISTOGRAM_TAG)[-1]
    assert histogram.step == 2
    assert not np.isin(777, histogram.histogram_value.bucket)
    assert all(777 not in curve.values() for curve in scalars(tmp_path).values())


def test_event_times_do_not_tell_how_long_a_step_took(tmp_path):
    run = private()
    with PrivacyDashboard(tmp_path, run[0], run[2]) as dashboard:
        steps(run, dashboard, 3)
    assert len({e.wall_time for e in raw_events(tmp_path) if e.summary.value}) == 1


def test_histogram_is_the_released_one_without_negative_counts(tmp_path):
    run = private(target=0.5)
    with PrivacyDashboard(tmp_path, run[0], run[2]) as dashboard:
        releases = steps(run, dashboard, 6)
    events = read(tmp_path).Histograms(tags.HISTOGRAM_TAG)
    assert [e.step for e in events] == [r.step for r in releases]
    assert any((r.histogram.counts < 0).any() for r in releases)
    for event, release in zip(events, releases, strict=True):
        edges = np.log10(release.histogram.window.edges)
        value = event.histogram_value
        np.testing.assert_allclose(value.bucket_limit, [*edges, edges[-1] + 0.2], atol=1e-9)
        np.testing.assert_allclose([value.min, value.max], [edges[0] - 0.2, edges[-1] + 0.2], atol=1e-9)
        np.testing.assert_allclose(value.bucket, np.maximum(release.histogram.counts, 0))


def test_without_histogram_loss_target_or_control_their_tags_are_absent(tmp_path):
    run = private(noise_multiplier=1.0, clipping="flat", lr_control=False)
    with PrivacyDashboard(tmp_path, run[0], run[2], delta=DELTA) as dashboard:
        steps(run, dashboard, 2)
    names = {"epsilon", "max_grad_norm", "lr_multiplier", "sample_rate", "noise_multiplier"}
    assert set(scalars(tmp_path)) == {f"privacy/{name}" for name in names}
    assert tags.HISTOGRAM_TAG not in read(tmp_path).Tags()["histograms"]


def test_histograms_can_be_left_out(tmp_path):
    run = private()
    with PrivacyDashboard(tmp_path, run[0], run[2], histograms=False) as dashboard:
        steps(run, dashboard, 1)
    assert tags.HISTOGRAM_TAG not in read(tmp_path).Tags()["histograms"]


NOT_PRIVATE = {
    "raw percentile": ({"noise_multiplier": 1.0, "clip_policy": "raw_percentile"}, "un-noised"),
    "seeded": ({"noise_generator": torch.Generator().manual_seed(3)}, "seeded"),
    "no noise": ({"noise_multiplier": 0.0}, "nothing is protected"),
}


@pytest.mark.parametrize("case", NOT_PRIVATE)
def test_a_run_that_is_not_private_says_infinity(case, tmp_path):
    options, reason = NOT_PRIVATE[case]
    run = private(**options)
    with PrivacyDashboard(tmp_path, run[0], run[2], delta=DELTA) as dashboard:
        steps(run, dashboard, 2)
    written = scalars(tmp_path)
    assert set(written["privacy/epsilon"].values()) == {math.inf}
    assert "privacy/remaining_steps" not in written
    meta, _ = metas(tmp_path)
    assert meta["private"] is False
    assert any(reason in warning for warning in meta["warnings"])
    assert all(text.strip().startswith("NOT PRIVATE: epsilon = infinity") for text in statements(tmp_path))


def test_noise_that_was_off_for_one_step_is_infinity_from_then_on(tmp_path):
    run = private(noise_multiplier=1.0)
    with PrivacyDashboard(tmp_path, run[0], run[2], delta=DELTA) as dashboard:
        steps(run, dashboard, 1)
        run[2].noise_multiplier = 0.0
        steps(run, dashboard, 1)
        run[2].noise_multiplier = 1.0
        steps(run, dashboard, 1)
    epsilons = scalars(tmp_path)["privacy/epsilon"]
    assert [math.isfinite(epsilons[step]) for step in (0, 1, 2, 3)] == [True, True, False, False]
    assert [meta["private"] for meta in metas(tmp_path)][-1] is False


def test_a_private_run_has_its_statement_at_start_and_end(tmp_path):
    run = private()
    with PrivacyDashboard(tmp_path, run[0], run[2]) as dashboard:
        steps(run, dashboard, 2)
    first, last = statements(tmp_path)
    assert "steps           0" in first
    assert last.split() == str(run[0].privacy_report()).split()
    meta, ended = metas(tmp_path)
    assert (meta["first_step"], meta["ended"]) == (0, False)
    assert ended == {**meta, "ended": True, "next_bound": run[2].max_grad_norm}
    assert meta["private"] is True
    assert (meta["target_epsilon"], meta["delta"], meta["dataset_size"]) == (8.0, DELTA, 64)


def test_a_new_warning_reaches_the_record(tmp_path):
    run = private(noise_multiplier=1.0)
    engine, model, optimizer, _ = run
    with PrivacyDashboard(tmp_path, engine, optimizer, delta=DELTA) as dashboard:
        steps(run, dashboard, 1)
        helpers.train(model, optimizer, helpers.loader(16))  # not the private loader: charged at rate 1
        assert dashboard.log_step()
    before, after, _ = metas(tmp_path)
    assert before["warnings"] == []
    assert "unknown origin" in after["warnings"][0]


def test_a_writer_of_the_caller_stays_open_with_its_own_tags(tmp_path):
    run = private()
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("eval/public_loss", 1.0, 10)
        with PrivacyDashboard(writer, run[0], run[2]) as dashboard:
            steps(run, dashboard, 2)
        writer.add_scalar("eval/public_loss", 2.0, 20)
    written = scalars(tmp_path)
    assert written["eval/public_loss"] == {10: 1.0, 20: 2.0}
    assert list(written["privacy/max_grad_norm"]) == [1, 2]
    assert len(list(tmp_path.iterdir())) == 1


def test_hyperparameters_are_public_settings(tmp_path):
    run = private(target_clip_rate=0.7)
    with PrivacyDashboard(tmp_path, run[0], run[2]):
        pass
    (start,) = (
        v.metadata.plugin_data.content
        for e in raw_events(tmp_path)
        for v in e.summary.value
        if v.tag == "_hparams_/session_start_info"
    )
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = HParamsPluginData.FromString(start).session_start_info.hparams
    assert found["target_epsilon"].number_value == 8.0
    assert found["target_clip_rate"].number_value == 0.7
    assert found["optimizer"].string_value == "AdamW"
    assert found["normalize"].string_value == "True"


@pytest.mark.parametrize("tag", ["loss", "train/loss", "privacy/clip_rate", "privacy/grad_norm", "eval/loss"])
def test_other_tags_are_refused_by_name(tag, tmp_path):
    run = private()
    with (
        PrivacyDashboard(tmp_path, run[0], run[2]) as dashboard,
        pytest.raises(ValueError, match=rf"{tag}.*SummaryWriter of your own"),
    ):
        dashboard.add_scalar(tag, 1.0, 1)
    assert tag not in scalars(tmp_path)


REFUSED = {
    "every": ({"every": 0}, "every must be"),
    "every as float": ({"every": 2.5}, "every must be"),
    "no delta": ({"options": {"noise_multiplier": 1.0}}, "delta="),
    "other writer": ({"where": object()}, "builtins.object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_and_nothing_is_written(case, tmp_path):
    arguments, message = REFUSED[case]
    arguments = dict(arguments)
    run = private(**arguments.pop("options", {}))
    with pytest.raises(ValueError, match=message):
        PrivacyDashboard(arguments.pop("where", tmp_path / "logs"), run[0], run[2], **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_of_another_engine_is_refused(tmp_path):
    first, second = private(), private()
    for engine, optimizer in ((first[0], second[2]), (PrivacyEngine(), None)):
        with pytest.raises(ValueError, match="does not account for this optimizer"):
            PrivacyDashboard(tmp_path, engine, optimizer)


def test_a_folder_with_another_run_is_refused(tmp_path):
    run = private()
    PrivacyDashboard(tmp_path, run[0], run[2]).close()
    with pytest.raises(ValueError, match="holds the events of another run"):
        PrivacyDashboard(tmp_path, run[0], run[2])


def test_a_closed_dashboard_refuses_and_closing_twice_is_harmless(tmp_path):
    run = private()
    dashboard = PrivacyDashboard(tmp_path, run[0], run[2])
    dashboard.close()
    dashboard.close()
    for call in (dashboard.log_step, lambda: dashboard.add_scalar("privacy/epsilon", 1.0, 1)):
        with pytest.raises(ValueError, match="closed"):
            call()
