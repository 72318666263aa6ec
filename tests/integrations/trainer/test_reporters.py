"""What a reporter of the Trainer gets are released values; what would show more is refused."""

import importlib.util
import re
from types import SimpleNamespace

import pytest
from tiny_trainer import arguments, generator, privacy, rows, trainer

from opacus_ac.integrations import PrivateTrainer
from opacus_ac.integrations.trainer.reporters import refused_reporters

spec = importlib.util.spec_from_file_location("trainer_leaks", __file__.replace("test_reporters.py", "test_leaks.py"))
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)

pytestmark = pytest.mark.filterwarnings("ignore:noise_generator is seeded", "ignore::FutureWarning", "ignore::DeprecationWarning")  # fmt: skip
QUIET = {"WANDB_X_DISABLE_STATS": "true"}
PUBLIC = {
    "loss", "learning_rate", "epsilon", "max_grad_norm", "noisy_clip_rate", "lr_multiplier", "epoch", "train_loss",
}  # fmt: skip


@pytest.mark.parametrize(
    ("reporter", "environment", "reason"),
    [
        ("wandb", {"WANDB_WATCH": "gradients", **QUIET}, "WANDB_WATCH='gradients' .*: unset it"),
        ("wandb", {"WANDB_WATCH": "all", **QUIET}, "WANDB_WATCH='all' .*: unset it"),
        ("wandb", {"WANDB_WATCH": "parameters", **QUIET}, "WANDB_WATCH='parameters' .*: unset it"),
        ("wandb", {"WANDB_LOG_MODEL": "checkpoint", **QUIET}, "WANDB_LOG_MODEL='checkpoint' .*: unset it"),
        ("wandb", {}, "set the environment variable WANDB_X_DISABLE_STATS=true"),
        ("wandb", {"WANDB_X_DISABLE_STATS": "false"}, "set the environment variable WANDB_X_DISABLE_STATS=true"),
        ("mlflow", {"HF_MLFLOW_LOG_ARTIFACTS": "TRUE"}, "HF_MLFLOW_LOG_ARTIFACTS='TRUE' .*: unset it"),
        ("mlflow", {"MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "1"}, "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.*: unset it"),
        ("dagshub", {"HF_DAGSHUB_LOG_ARTIFACTS": "1"}, "HF_DAGSHUB_LOG_ARTIFACTS='1' .*: unset it"),
        ("comet_ml", {"COMET_LOG_ASSETS": "True"}, "COMET_LOG_ASSETS='True' .*: unset it"),
        ("dvclive", {"HF_DVCLIVE_LOG_MODEL": "all"}, "HF_DVCLIVE_LOG_MODEL='all' .*: unset it"),
        ("swanlab", {"SWANLAB_LOG_MODEL": "true"}, "SWANLAB_LOG_MODEL='true' .*: unset it"),
        ("clearml", {}, "set the environment variable CLEARML_LOG_MODEL=FALSE"),
        ("codecarbon", {}, "the energy of a step .*: leave it out"),
    ],
)
def test_what_a_reporter_would_show_beside_the_log_is_refused(reporter, environment, reason):
    for report_to in ([reporter], reporter, ["tensorboard", reporter]):
        (found,) = refused_reporters(SimpleNamespace(report_to=report_to), environment)
        assert re.search(reason, found)
    for report_to in ([], "none", ["tensorboard"], None):
        assert refused_reporters(SimpleNamespace(report_to=report_to), environment) == []


@pytest.mark.parametrize(
    ("reporter", "environment"),
    [
        ("wandb", {"WANDB_WATCH": "false", "WANDB_LOG_MODEL": "false", **QUIET}),
        ("wandb", {"WANDB__DISABLE_STATS": "True"}),
        ("mlflow", {"HF_MLFLOW_LOG_ARTIFACTS": "0", "WANDB_WATCH": "all"}),
        ("clearml", {"CLEARML_LOG_MODEL": "FALSE"}),
        ("trackio", {}),
    ],
)
def test_a_reporter_of_the_log_alone_is_not_refused(reporter, environment):
    assert refused_reporters(SimpleNamespace(report_to=[reporter]), environment) == []


def test_the_trainer_asks(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_WATCH", "gradients")
    monkeypatch.delenv("WANDB_X_DISABLE_STATS", raising=False)
    with pytest.raises(ValueError, match="WANDB_WATCH='gradients' with report_to='wandb'") as caught:
        PrivateTrainer(None, arguments(tmp_path, report_to=["wandb"]), privacy=privacy(), train_dataset=rows(64))
    assert "WANDB_X_DISABLE_STATS" in str(caught.value)


# ---------------------------------------------------------------- what is written


def run(folder, monkeypatch, reporter):
    watch = shared.Watch()
    made = trainer(
        folder / "run", model="llama", data=rows(300), report_to=[reporter], per_device_train_batch_size=20,
        gradient_accumulation_steps=2, options={"callbacks": [watch], "noise_generator": generator(11)},
    )  # fmt: skip
    watch.attach(monkeypatch, made.model)
    made.train()
    assert len(watch.records) > 100
    return made, watch


def expect_released_only(watch, found, names):
    """Check the numbers that a reporter wrote, and the names under which it did."""
    assert len(found) > 10
    assert shared.leaks(watch, {"reporter": found}) == []
    assert {name.removeprefix("train/") for name in names} - {"global_step"} == PUBLIC


def test_weights_and_biases_gets_released_values_only(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.sdk.wandb_run import Run

    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true", **QUIET}.items():
        monkeypatch.setenv(name, value)
    logged, log = [], Run.log

    def note(self, data, *args, **kwargs):
        logged.append(dict(data))
        return log(self, data, *args, **kwargs)

    monkeypatch.setattr(Run, "log", note)
    _, watch = run(tmp_path, monkeypatch, "wandb")
    assert wandb.run.settings.x_disable_stats is True
    logged.append({name: value for name, value in dict(wandb.run.summary).items() if not name.startswith("_")})
    wandb.finish()
    names = {name for entry in logged for name in entry}
    expect_released_only(watch, [n for entry in logged for n in shared.numbers(entry)], names)


def test_mlflow_gets_released_values_only(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    _, watch = run(tmp_path, monkeypatch, "mlflow")
    found, names = [], set()
    for file in (tmp_path / "mlruns").rglob("metrics/**/*"):
        if file.is_file():
            names.add(file.name)
            found += [float(line.split()[1]) for line in file.read_text().splitlines()]
    expect_released_only(watch, found, names)
    assert not [path for path in (tmp_path / "mlruns").rglob("artifacts/*") if path.is_file()]
    assert mlflow is not None


def test_trackio_gets_released_values_only(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.chdir(tmp_path)
    logged = []
    monkeypatch.setattr(trackio, "init", lambda **options: SimpleNamespace(name="run"))
    monkeypatch.setattr(trackio, "finish", lambda: None)
    monkeypatch.setattr(trackio, "log", lambda metrics, **options: logged.append(metrics))
    _, watch = run(tmp_path, monkeypatch, "trackio")
    assert len(logged) >= 3
    # The callback keeps the mean of the run to itself.
    names = {name for entry in logged for name in entry} | {"train_loss"}
    expect_released_only(watch, [n for entry in logged for n in shared.numbers(entry)], names)
