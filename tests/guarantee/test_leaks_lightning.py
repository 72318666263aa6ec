"""Lightning: whatever a training hook logs, by whatever way, is refused before a logger, a monitor or the bar has it."""

import io
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch import callbacks as known
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from tiny_lightning import Classifier, made
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac.integrations.lightning import PrivacyCallback
from opacus_ac.sampling import LogicalBatches

pytestmark = pytest.mark.filterwarnings("ignore")

SECRET = 0.123456
HOOKS = (
    "training_step", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad",
    "configure_gradient_clipping", "optimizer_step", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end",
)  # fmt: skip


def secret(name="raw_loss"):
    return {name: torch.tensor(SECRET)}


FORMS = {
    "log": lambda m: m.log("raw_loss", torch.tensor(SECRET)),
    "a float": lambda m: m.log("raw_loss", SECRET),
    "on_epoch": lambda m: m.log("raw_loss", SECRET, on_step=False, on_epoch=True),
    "both": lambda m: m.log("raw_loss", SECRET, on_step=True, on_epoch=True),
    "sum": lambda m: m.log("raw_loss", SECRET, on_step=False, on_epoch=True, reduce_fx="sum"),
    "bar": lambda m: m.log("raw_loss", SECRET, prog_bar=True, logger=False),
    "dict": lambda m: m.log_dict(secret()),
    "a metric": lambda m: m.log("raw_loss", m.metric),
    "under the name of a release": lambda m: m.log("privacy/noisy_loss", SECRET),
    "under the name of a rate": lambda m: m.log("lr", SECRET),
    "under the name of a counter": lambda m: m.log("step", SECRET),
    "logger": lambda m: m.logger.log_metrics(secret()),
    "a release's name, to the logger": lambda m: m.logger.log_metrics(secret("privacy/noisy_loss")),
    "hyperparameters": lambda m: m.logger.log_hyperparams({"raw_loss": SECRET}),
    "experiment": lambda m: m.logger.experiment.add_scalar("raw_loss", SECRET, 0),
    "experiment's keywords": lambda m: m.logger.experiment.add_scalars(
        main_tag="raw_loss", tag_scalar_dict={"raw_loss": SECRET}
    ),
    "histogram": lambda m: m.logger.experiment.add_histogram("raw_loss", torch.ones(3)),
    "callback_metrics": lambda m: m.trainer.callback_metrics.__setitem__("raw_loss", torch.tensor(SECRET)),
    "logged_metrics": lambda m: m.trainer.logged_metrics.update(raw_loss=SECRET),
    "progress_bar_metrics": lambda m: m.trainer.progress_bar_metrics.setdefault("raw_loss", SECRET),
}


def metric():
    torchmetrics = pytest.importorskip("torchmetrics")
    value = torchmetrics.MeanMetric()
    value.update(SECRET)
    return value


class Leaky(Classifier):
    """Leaks in one hook, in one form; validates on public data beside it."""

    hook = form = None

    def __init__(self):
        super().__init__()
        self.metric = metric()

    def leak(self, hook):
        if hook == self.hook:
            FORMS[self.form](self)

    def training_step(self, batch, index):
        if self.automatic_optimization:
            loss = super().training_step(batch, index)
        else:
            for physical, _ in batch:
                self.private.zero_grad()
                loss = super().training_step(physical, index)
                loss.backward()
                self.private.step()
        self.leak("training_step")
        return loss if self.automatic_optimization else None

    def configure_gradient_clipping(self, *args, **kwargs):
        self.leak("configure_gradient_clipping")

    def optimizer_step(self, *args, **kwargs):
        self.leak("optimizer_step")
        super().optimizer_step(*args, **kwargs)

    def validation_step(self, batch, index):
        self.log("val_loss", self.layers(batch[0]).sum())
        self.logger.log_metrics({"val_direct": 1.0})
        self.logger.experiment.add_scalar("val_drawn", 1.0, index)


def leaking(name):
    return lambda self, *args, **kwargs: self.leak(name)


for name in set(HOOKS) - {"training_step", "configure_gradient_clipping", "optimizer_step"}:
    setattr(Leaky, name, leaking(name))


class FromACallback(lightning.Callback):
    """Leaks in a hook of a callback, which has the module."""

    def __init__(self, hook, form):
        def leak(trainer, pl_module, *args, **kwargs):
            FORMS[form](pl_module)

        setattr(self, hook, leak)


def fit(folder, hook=None, form=None, *, manual=False, callback=False, extra=(), run=None, **settings):
    """Return (trainer, run, error, text of all files) of one epoch that may leak."""
    model, engine, optimizer, loader = run or made(model=Leaky(), loss_bound=5.0)
    if not callback:
        model.hook, model.form = hook, form
    model.automatic_optimization = not manual
    guards = [FromACallback(hook, form)] if callback else []
    public = DataLoader(TensorDataset(torch.zeros(4, 4), torch.zeros(4).long()), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=folder, enable_model_summary=False, log_every_n_steps=1,
        callbacks=[PrivacyCallback(engine, optimizer, loader, delta=1e-3), *guards, *extra],
        **{"logger": TensorBoardLogger(folder), "enable_progress_bar": False, "enable_checkpointing": False, **settings},
    )  # fmt: skip
    error = None
    try:
        trainer.fit(model, LogicalBatches(loader) if manual else loader, public)
    except ValueError as reason:
        error = str(reason)
    written = b"".join(path.read_bytes() for path in Path(folder).rglob("*") if path.is_file())
    return trainer, (model, engine, optimizer, loader), error, written


def assert_refused(trainer, error, written, hook, name):
    assert f"{hook} " in error
    assert f" {name} of a private batch without noise" in error
    assert "PrivacyCallback(public_keys=" in error
    assert b"raw_loss" not in written
    for held in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics):
        assert not any("raw_loss" in key for key in held)
        assert float(held.get("privacy/noisy_loss", 0)) != pytest.approx(SECRET)


@pytest.mark.parametrize(
    ("hook", "callback"), [(h, False) for h in HOOKS] + [(h, True) for h in HOOKS if hasattr(lightning.Callback, h)]
)
@pytest.mark.parametrize("form", ["on_epoch", "logger", "callback_metrics"])
def test_every_hook(hook, form, callback, tmp_path):
    trainer, _, error, written = fit(tmp_path, hook, form, callback=callback)
    assert_refused(trainer, error, written, hook, "raw_loss")


NAMES = {"under the name of a rate": "lr", "under the name of a counter": "step", "hyperparameters": "raw_loss"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("manual", [False, True])
def test_every_form(form, manual, tmp_path):
    trainer, _, error, written = fit(tmp_path, "training_step", form, manual=manual)
    name = "privacy/noisy_loss" if "release" in form else NAMES.get(form, "raw_loss")
    assert_refused(trainer, error, written, "training_step", name)


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_end", "on_fit_end"])
def test_hooks_around_training(hook, tmp_path):
    trainer, _, error, written = fit(tmp_path, hook, "logger", callback=True)
    if hook != "on_train_start":  # a hook that precedes every private batch may leak nothing
        assert_refused(trainer, error, written, hook, "raw_loss")
    assert b"raw_loss" not in written


def test_a_csv_logger_and_a_second_logger(tmp_path):
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    FORMS["second"] = lambda m: m.loggers[1].experiment.log_metrics(secret())
    try:
        trainer, _, error, written = fit(tmp_path, "training_step", "second", logger=loggers)
    finally:
        del FORMS["second"]
    assert_refused(trainer, error, written, "training_step", "raw_loss")


def test_a_logger_that_came_late(tmp_path):
    class Late(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.loggers = [CSVLogger(tmp_path)]

    trainer, _, error, written = fit(tmp_path, "training_step", "logger", extra=[Late()])
    assert_refused(trainer, error, written, "training_step", "raw_loss")


def test_a_bar_that_shows_the_loss(tmp_path):
    class Bar(known.TQDMProgressBar):
        def get_metrics(self, *args):
            return {**super().get_metrics(*args), "raw_loss": SECRET}

    _trainer, _, error, _ = fit(tmp_path, extra=[Bar()], enable_progress_bar=True)
    assert "on_train_batch_end shows raw_loss of a private batch" in error


CALLBACKS = {
    "LearningRateFinder": lambda: known.LearningRateFinder(num_training_steps=4),
    "GradientAccumulationScheduler": lambda: known.GradientAccumulationScheduler({1: 4}),
    "of their own": lambda: type("MyFinder", (known.LearningRateFinder,), {})(num_training_steps=4),
    "ThroughputMonitor": lambda: known.ThroughputMonitor(batch_size_fn=len, window_size=2),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_that_cannot_be_private(name, tmp_path):
    run = made(model=Leaky(), loss_bound=5.0)
    run[0].lr = 0.01
    _, _, error, written = fit(tmp_path, extra=[CALLBACKS[name]()], run=run, enable_checkpointing=True)
    assert "without noise" in error if name == "ThroughputMonitor" else "cannot be made private" in error
    if name != "ThroughputMonitor":
        assert run[2].steps_taken == 0
        assert run[1].accountant.history == []
    assert b"batches_per_sec" not in written


class WithLoader(Leaky):
    """Has what the tuner asks for."""

    batch_size, lr = 8, 0.01

    def train_dataloader(self):
        return self.loader

    def val_dataloader(self):
        return []


@pytest.mark.parametrize(("search", "name"), [("lr_find", "LearningRate"), ("scale_batch_size", "BatchSize")])
def test_the_tuner_is_refused(search, name, tmp_path):
    model, engine, optimizer, loader = made(model=WithLoader())
    model.loader = loader
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        callbacks=[PrivacyCallback(engine, optimizer, loader, delta=1e-3)],
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"{name}Finder: it"):
        getattr(Tuner(trainer), search)(model)
    assert engine.accountant.history == []


class Public(lightning.Callback):
    """Logs what is public, in training hooks."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pl_module.log("lr", optimizer.param_groups[0]["lr"])
        pl_module.log_dict({"global_step": float(trainer.global_step), "temperature": 0.5})
        trainer.logger.log_metrics({"epoch": trainer.current_epoch, "learning_rate": 0.01})

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("epoch", float(trainer.current_epoch))


def test_what_is_public_passes_and_nothing_stays_behind(tmp_path):
    run = made(model=Leaky(), loss_bound=5.0)
    logger = TensorBoardLogger(tmp_path)
    checkpoints = known.ModelCheckpoint(tmp_path, monitor="val_loss")
    callback = PrivacyCallback(*run[1:], delta=1e-3, public_keys=["temperature"])
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=logger, enable_model_summary=False, log_every_n_steps=1,
        callbacks=[callback, Public(), checkpoints, known.LearningRateMonitor(log_momentum=True, log_weight_decay=True)],
    )  # fmt: skip
    public = DataLoader(TensorDataset(torch.zeros(4, 4), torch.zeros(4).long()), batch_size=4)
    trainer.fit(run[0], run[3], public)
    assert run[2].steps_taken == 16
    assert {"val_loss", "privacy/noisy_loss", "lr", "global_step", "temperature"} <= set(trainer.callback_metrics)
    assert float(trainer.callback_metrics["privacy/noisy_loss"]) == pytest.approx(run[2].released.loss)
    assert checkpoints.best_model_score is not None
    own = {k for o in (logger, logger.experiment, trainer._logger_connector) for k, v in vars(o).items() if callable(v)}
    assert not own & {"log_metrics", "add_scalar", "reset_metrics", "log_hyperparams"}
    assert type(trainer._logger_connector._callback_metrics) is dict
    logger.log_metrics({"after": 1.0})  # the fit is over
    torch.save(dict(trainer.callback_metrics), io.BytesIO())


def test_without_the_gate_the_values_would_be_there(tmp_path, monkeypatch):
    """The assertions above can fail: with the gate left open, raw values are in files and monitors."""
    from opacus_ac.integrations.lightning_released import ReleasedOnly

    monkeypatch.setattr(ReleasedOnly, "ask", lambda *args, **kwargs: None)
    trainer, _, error, written = fit(tmp_path, "training_step", "log")
    assert error is None
    assert b"raw_loss" in written
    assert "raw_loss" in trainer.callback_metrics
