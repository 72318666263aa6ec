"""PrivateTrainer: what user code logs of private batches is refused, however it gets to the log; nothing of it is written."""

import json
from pathlib import Path

import pytest
import torch
from tiny_trainer import generator, rows, trainer
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from opacus_ac.integrations import PrivateTrainer
from opacus_ac.integrations.trainer.released import ReleasedLog

pytestmark = pytest.mark.filterwarnings("ignore")

SECRET = 0.123456


def history(change):
    """Change the log as soon as it has an entry."""
    return lambda made: change(made.state.log_history) if made.state.log_history else None


WAYS = {  # name of what is refused, and how it gets to the log
    "log": ("raw_loss", lambda made: made.log({"raw_loss": SECRET})),
    "a name of an evaluation": ("eval_loss", lambda made: made.log({"eval_loss": SECRET})),
    "a name of a prediction": ("test_loss", lambda made: made.log({"test_loss": SECRET})),
    "the name of the noisy loss": ("loss", lambda made: made.log({"loss": SECRET})),
    "the name of the mean": ("train_loss", lambda made: made.log({"train_loss": SECRET})),
    "the name of a release": ("noisy_clip_rate", lambda made: made.log({"noisy_clip_rate": SECRET})),
    "the name of a rate": ("learning_rate", lambda made: made.log({"learning_rate": SECRET})),
    "the name of a counter": ("global_step", lambda made: made.log({"global_step": SECRET})),
    "beside what is public": ("raw_loss", lambda made: made.log({"learning_rate": 1e-3, "raw_loss": SECRET})),
    "Trainer.log": ("raw_loss", lambda made: Trainer.log(made, {"raw_loss": SECRET})),
    "super": ("raw_loss", lambda made: super(PrivateTrainer, made).log({"raw_loss": SECRET})),
    "handler": ("raw_loss", lambda made: made.callback_handler.on_log(made.args, made.state, made.control, {"raw_loss": SECRET})),
    "event": ("raw_loss", lambda made: made.callback_handler.on_log(made.args, made.state, made.control, logs={"raw_loss": SECRET})),
    "append": ("raw_loss", lambda made: made.state.log_history.append({"raw_loss": SECRET, "step": 1})),
    "insert": ("raw_loss", history(lambda log: log.insert(0, {"raw_loss": SECRET}))),
    "entry": ("raw_loss", history(lambda log: log[-1].update(raw_loss=SECRET))),
    "first entry": ("raw_loss", history(lambda log: log[0].update(raw_loss=SECRET))),
    "loss of an entry": ("loss", history(lambda log: log[-1].update(loss=SECRET))),
    "another list": ("raw_loss", lambda made: setattr(made.state, "log_history", [{"raw_loss": SECRET}])),
}  # fmt: skip


def trained(folder, cls=PrivateTrainer, *, callbacks=(), **changes):
    """Return (trainer, error) of a run that writes to a bar, event files and checkpoints."""
    settings = {"evaluation_is_public": True, **changes.pop("settings", {})}
    options = {"callbacks": list(callbacks), "eval_dataset": rows(4, seed=8), "noise_generator": generator(2)}
    made = trainer(
        folder, cls=cls, options=options, settings=settings, **{"report_to": ["tensorboard"], "save_strategy": "steps", "save_steps": 1,
        "disable_tqdm": False, "eval_strategy": "steps", "eval_steps": 2, **changes},
    )  # fmt: skip
    for callback in callbacks:
        callback.trainer = made
    try:
        made.train()
    except ValueError as reason:
        return made, str(reason)
    return made, None


def assert_refused(made, error, name, folder, printed):
    assert error is not None
    assert name in error
    assert "no noise" in error
    assert "public_keys" in error
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert not any(b"raw_loss" in path.read_bytes() for path in files)
    states = [json.loads(path.read_text()) for path in files if path.name == "trainer_state.json"]
    logged = [entry for state in [*states, {"log_history": made.state.log_history}] for entry in state["log_history"]]
    assert SECRET not in {value for entry in logged for value in entry.values()}
    assert "0.1234" not in printed


@pytest.mark.parametrize("way", WAYS)
def test_every_way_from_compute_loss(way, tmp_path, capsys):
    name, leak = WAYS[way]

    class Mine(PrivateTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.model.training:
                leak(self)
            return super().compute_loss(*args, **kwargs)

    made, error = trained(tmp_path, Mine)
    printed = capsys.readouterr()
    assert_refused(made, error, name, tmp_path, printed.out + printed.err)


EVENTS = ("on_train_begin", "on_epoch_begin", "on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end",
          "on_save", "on_epoch_end", "on_train_end")  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("way", ["log", "append", "another list"])
def test_every_event_of_a_callback(event, way, tmp_path, capsys):
    class Mine(TrainerCallback):
        pass

    setattr(Mine, event, lambda self, args, state, control, **kwargs: WAYS[way][1](self.trainer))
    made, error = trained(tmp_path, callbacks=[Mine()])
    printed = capsys.readouterr()
    assert_refused(made, error, "raw_loss", tmp_path, printed.out + printed.err)


LOGS = {
    "item": ("raw_loss", lambda logs: logs.__setitem__("raw_loss", SECRET)),
    "update": ("raw_loss", lambda logs: logs.update(raw_loss=SECRET)),
    "setdefault": ("raw_loss", lambda logs: logs.setdefault("raw_loss", SECRET)),
    "or": ("raw_loss", lambda logs: logs.__ior__({"raw_loss": SECRET})),
    "loss": ("loss", lambda logs: logs.update(loss=SECRET)),
}


@pytest.mark.parametrize("form", LOGS)
def test_callbacks_that_change_an_entry(form, tmp_path, capsys):
    name, change = LOGS[form]

    class Mine(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            change(logs)

    made, error = trained(tmp_path, callbacks=[Mine()])
    printed = capsys.readouterr()
    assert_refused(made, error, name, tmp_path, printed.out + printed.err)


class AddsAKey(PrivateTrainer):
    def log(self, logs, *args):
        logs["raw_loss"] = SECRET
        super().log(logs, *args)


class ChangesTheLoss(PrivateTrainer):
    def log(self, logs, *args):
        if "loss" in logs:
            logs["loss"] = SECRET
        super().log(logs, *args)


class ReturnsTheLoss(PrivateTrainer):
    def training_step(self, *args):
        return super().training_step(*args) + SECRET


@pytest.mark.parametrize(
    ("cls", "name"),
    [(AddsAKey, "raw_loss"), (ChangesTheLoss, "loss"), (ReturnsTheLoss, "loss"), (ReturnsTheLoss, None)],
)
def test_subclasses_with_a_log_or_step_of_their_own(cls, name, tmp_path, capsys):
    settings = {} if name else {"loss_bound": None}
    made, error = trained(tmp_path, cls, settings=settings, eval_strategy="no")
    printed = capsys.readouterr()
    if name is None:  # no loss is logged then, so nothing of it leaves
        assert error is None
        assert not any({"loss", "train_loss"} & set(entry) for entry in made.state.log_history)
    else:
        assert_refused(made, error, name, tmp_path, printed.out + printed.err)


def writer_of(made):
    return next(c for c in made.callback_handler.callbacks if isinstance(c, TensorBoardCallback)).tb_writer


WRITES = {
    "scalar": lambda w: w.add_scalar("raw_loss", SECRET, 1),
    "keywords": lambda w: w.add_scalar(scalar_value=SECRET, tag="raw_loss"),
    "scalars": lambda w: w.add_scalars("raw_loss", {"raw_loss": SECRET}),
    "histogram": lambda w: w.add_histogram("raw_loss", torch.ones(3)),
    "text": lambda w: w.add_text("raw_loss", str(SECRET)),
    "the name of a release": lambda w: w.add_scalar("privacy/noisy_loss/raw_loss", SECRET),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_train_end"])
def test_the_event_file_takes_no_values_of_user_code(write, event, tmp_path, capsys):
    class Mine(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.writer = writer_of(self.trainer)

    setattr(Mine, event, lambda self, args, state, control, **kwargs: WRITES[write](self.writer))
    made, error = trained(tmp_path, callbacks=[Mine()], eval_strategy="no")
    printed = capsys.readouterr()
    assert_refused(made, error, "raw_loss", tmp_path, printed.out + printed.err)


def test_a_writer_of_their_own_is_given_back(tmp_path):
    writer = SummaryWriter(tmp_path / "own")
    _, error = trained(tmp_path, callbacks=[TensorBoardCallback(writer)], report_to="none")
    assert error is None
    assert not any(name.startswith("add_") for name in vars(writer))
    assert b"privacy/epsilon" in b"".join(path.read_bytes() for path in (tmp_path / "own").iterdir())


def test_the_log_after_training_is_looked_at_before_it_is_saved(tmp_path):
    made, error = trained(tmp_path)
    assert error is None
    made.save_state()
    before = (tmp_path / "trainer_state.json").read_bytes()
    made.state.log_history[0]["raw_loss"] = SECRET
    with pytest.raises(ValueError, match=r"raw_loss was put into state\.log_history"):
        made.save_state()
    made.save_state()
    assert (tmp_path / "trainer_state.json").read_bytes() == before


def test_what_is_public_passes(tmp_path):
    class Mine(PrivateTrainer):
        public_keys = ("temperature",)

        def compute_loss(self, *args, **kwargs):
            if self.model.training:
                self.log({"temperature": 0.5, "learning_rate": self.optimizer.param_groups[0]["lr"]})
            else:
                self.log({"public_accuracy": 0.25})
            return super().compute_loss(*args, **kwargs)

    made, error = trained(tmp_path, Mine, lr_scheduler_type="linear", logging_steps=2)
    assert error is None
    logged = {key for entry in made.state.log_history for key in entry}
    assert {"temperature", "public_accuracy", "eval_loss", "loss", "train_loss", "epsilon"} <= logged
    made.evaluate(metric_key_prefix="other")
    assert "other_loss" in made.state.log_history[-1]
    _, error = trained(tmp_path, Mine, lr_scheduler_type="linear", logging_steps=2, max_steps=3)
    assert error is None


def test_without_the_gate_the_value_would_be_there(tmp_path, monkeypatch):
    """The assertions above can fail."""
    monkeypatch.setattr(ReleasedLog, "ask", lambda *args: None)

    class Mine(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.trainer.log({"raw_loss": SECRET})

    _, error = trained(tmp_path, callbacks=[Mine()])
    assert error is None
    assert "raw_loss" in (tmp_path / "checkpoint-3" / "trainer_state.json").read_text()
