"""Lightning's Trainer takes the one private step by itself; the callback watches over what it could break or show."""

import math

import lightning
import loss_cases
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_lightning import Classifier, made, weights
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.integrations.lightning import PrivacyCallback

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(folder, run, epochs=2, ckpt_path=None, **settings):
    model, engine, optimizer, loader = run
    callback = settings.pop("callback", None) or PrivacyCallback(engine, optimizer, loader, delta=1e-3)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback], **{"logger": False, "log_every_n_steps": 1, **settings},
    )  # fmt: skip
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return trainer


def loop(run, epochs=2):
    model, _, optimizer, loader = run
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model.layers(x), y).backward()
            optimizer.step()


@pytest.mark.parametrize(
    "settings", [{}, {"clipping": "flat", "max_grad_norm": 0.1}, {"fused_step": True}, {"noise_multiplier": 0.0}]
)
def test_the_trainer_takes_the_steps_of_a_plain_loop(settings, tmp_path):
    first, second = made(**settings), made(**settings)
    fit(tmp_path, first, enable_checkpointing=False)
    loop(second)
    assert torch.equal(weights(first[0]), weights(second[0]))
    assert first[1].accountant.history == second[1].accountant.history
    assert first[2].steps_taken == 16
    assert first[1]._unknown_batches == 0


def test_a_checkpoint_carries_the_account_and_the_run_goes_on(tmp_path):
    whole, cut, resumed = made(), made(), made()
    fit(tmp_path / "a", whole, epochs=3, enable_checkpointing=False)
    path = fit(tmp_path / "b", cut, epochs=2).checkpoint_callback.best_model_path
    fit(tmp_path / "c", resumed, epochs=3, ckpt_path=path)
    assert resumed[2].steps_taken == 24
    assert resumed[1].accountant.history == whole[1].accountant.history
    assert torch.equal(weights(resumed[0]), weights(whole[0]))


def test_a_checkpoint_without_an_account_is_refused(tmp_path):
    path = fit(tmp_path, made(), callback=lightning.Callback()).checkpoint_callback.best_model_path
    with pytest.raises(ValueError, match="without a PrivacyCallback"):
        fit(tmp_path, made(), epochs=3, ckpt_path=path)


def test_every_logger_gets_the_releases(tmp_path):
    run = made(loss_bound=5.0)
    trainer = fit(tmp_path, run, logger=CSVLogger(tmp_path), enable_checkpointing=False)
    with open(f"{trainer.logger.log_dir}/metrics.csv") as stream:
        header, *lines = [line.strip().split(",") for line in stream]
    names = {"epsilon", "max_grad_norm", "noisy_clip_rate", "lr_multiplier", "noisy_loss"}
    assert {f"privacy/{name}" for name in names} | {"epoch", "step"} == set(header)
    assert float(lines[-1][header.index("privacy/epsilon")]) == pytest.approx(run[1].get_epsilon(1e-3))
    assert len(lines) == 16


def test_tensorboard_gets_the_privacy_tab(tmp_path):
    run = made()
    trainer = fit(tmp_path, run, logger=TensorBoardLogger(tmp_path), enable_checkpointing=False)
    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    assert "privacy/meta" in events.Tags()["tensors"]
    assert len(events.Scalars("privacy/max_grad_norm")) == 16
    assert math.isinf(events.Scalars("privacy/epsilon")[-1].value)  # the noise is seeded, so nothing is private


def test_a_logged_private_value_is_refused_before_a_logger_sees_it(tmp_path):
    run = made()
    run[0].leaks = True
    with pytest.raises(ValueError, match="training_step logs train_loss of a private batch"):
        fit(tmp_path, run, logger=CSVLogger(tmp_path, name="leak"), enable_checkpointing=False)
    assert not any("train_loss" in path.read_text() for path in tmp_path.rglob("*.csv"))
    assert run[2].steps_taken == 0


class Validated(Classifier):
    def validation_step(self, batch, index):
        x, y = batch
        self.log("val_loss", torch.nn.functional.cross_entropy(self.layers(x), y))


@pytest.mark.parametrize("leaks", [False, True])
def test_metrics_of_public_validation_are_no_leak(leaks, tmp_path):
    model, engine, optimizer, loader = made(model=Validated())
    public = DataLoader(TensorDataset(torch.zeros(4, 4), torch.zeros(4).long()), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[PrivacyCallback(engine, optimizer, loader, delta=1e-3)],
    )  # fmt: skip
    model.leaks = leaks
    if leaks:
        with pytest.raises(ValueError, match="training_step logs train_loss of"):
            trainer.fit(model, loader, public)
        assert optimizer.steps_taken == 0
    else:
        trainer.fit(model, loader, public)
        assert optimizer.steps_taken == 24
        assert "val_loss" in trainer.callback_metrics


REFUSED = {
    "accumulation": ({"accumulate_grad_batches": 2}, {}, "accumulate_grad_batches"),
    "clipping": ({"gradient_clip_val": 1.0}, {}, "gradient_clip_val"),
    "physical batches": ({}, {"max_physical_batch_size": 4}, "max_physical_batch_size"),
    "loader": ({"other_loader": DataLoader(TensorDataset(torch.zeros(8, 4), torch.zeros(8).long()))}, {}, "loader"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_breaks_the_private_step_is_refused(case, tmp_path):
    changes, settings, message = REFUSED[case]
    changes, run = dict(changes), made(**settings)
    callback = PrivacyCallback(run[1], run[2], run[3], delta=1e-3)
    loader = changes.pop("other_loader", run[3])
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[callback], **changes
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        trainer.fit(run[0], loader)
    assert run[2].steps_taken == 0


def test_another_optimizer_is_refused(tmp_path):
    run = made()
    run[0].private = torch.optim.SGD(run[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="configure_optimizers"):
        fit(tmp_path, run, enable_checkpointing=False)


class Tuned(lightning.LightningModule):
    """A model of transformers, and its own loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return self.private


@pytest.mark.parametrize("head", ["classes", "several labels", "regression", "token classes"])
def test_a_model_of_transformers_learns_classes_by_its_own_loss(head, tmp_path):
    """The step is that of a loop of batch size 1, and the noisy loss is the mean over records (here without noise)."""
    make, labels = loss_cases.HEADS[head]
    data, module, bound = loss_cases.rows(labels), Tuned(loss_cases.built(make)), 50.0
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    wanted = loss_cases.oracle(module.model, data)
    alone = [float(module.model(**loss_cases.collate([row])).loss.detach()) for row in data if loss_cases.learns(row)]
    engine = PrivacyEngine()
    _, module.private, loader = engine.make_private(
        module=module.model, optimizer=torch.optim.SGD(module.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1e6,
        data_loader=DataLoader(data, batch_size=len(data), collate_fn=loss_cases.collate), clipping="flat", ema_decay=None,
        loss_bound=bound,
    )  # fmt: skip
    trainer = fit(tmp_path, (module, engine, module.private, loader), epochs=1, logger=CSVLogger(tmp_path))
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(before[name] - parameter, wanted[name], rtol=1e-5, atol=1e-7)
    assert max(alone) < bound
    assert module.private.released.loss == pytest.approx(sum(alone) / len(data), rel=1e-5)
    assert float(trainer.callback_metrics["privacy/noisy_loss"]) == pytest.approx(sum(alone) / len(data), rel=1e-5)


def test_a_model_inside_of_the_module_is_to_be_made_private_itself(tmp_path):
    """The positions of BERT are computed once for all records, and no pass of the outer module tells how many there are."""
    make, labels = loss_cases.HEADS["classes"]
    data, module, engine = loss_cases.rows(labels), Tuned(loss_cases.built(make)), PrivacyEngine()
    _, module.private, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=1.0), noise_multiplier=1.0,
        data_loader=DataLoader(data, batch_size=len(data), collate_fn=loss_cases.collate),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"output of 1 records.*pass the part that it calls to make_private"):
        fit(tmp_path, (module, engine, module.private, loader), epochs=1)
    assert module.private.steps_taken == 0
    assert engine.accountant.history == []


def test_a_delta_is_needed():
    with pytest.raises(ValueError, match="delta="):
        PrivacyCallback(*made()[1:])
