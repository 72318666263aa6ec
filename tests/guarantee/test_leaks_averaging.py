"""Lightning's weight averages copy the module, and the private optimizer in it: the run is the one without them, averaged."""

import copy

import lightning
import pytest
import torch
from lightning.pytorch import callbacks as known
from tiny_lightning import Classifier, made, weights
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac.integrations.lightning import PrivacyCallback

pytestmark = pytest.mark.filterwarnings("ignore")


class Validated(Classifier):
    def validation_step(self, batch, index):
        self.log("val_loss", self.layers(batch[0]).sum())


class Snapshots(lightning.Callback):
    """The weights after every step and at the beginning of every epoch."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(weights(pl_module).clone())

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append(weights(pl_module).clone())


def swa(seen):
    return torch.stack(seen.epochs[1:]).mean(0)


def ema(seen):
    average = None
    for step in seen.steps:
        average = step if average is None else 0.9 * average + 0.1 * step
    return average


AVERAGES = {
    "SWA": (lambda: known.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1), swa),
    "EMA": (lambda: known.EMAWeightAveraging(decay=0.9), ema),
    "mean": (known.WeightAveraging, lambda seen: torch.stack(seen.steps).mean(0)),
}


def fit(folder, run, extra, **settings):
    model, engine, optimizer, loader = run
    public = DataLoader(TensorDataset(torch.ones(4, 4), torch.zeros(4).long()), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        callbacks=[PrivacyCallback(engine, optimizer, loader, delta=1e-3), *extra], **settings,
    )  # fmt: skip
    trainer.fit(model, loader, public)
    return trainer


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize(
    "settings", [{}, {"clipping": "flat"}, {"grad_sample_mode": "hooks", "wrap_model": False}, {"fused_step": True}]
)
def test_an_average_is_of_the_private_run(name, settings, tmp_path):
    average, expected = AVERAGES[name]
    plain, averaged = made(model=Validated(), **settings), made(model=Validated(), **settings)
    before, seen = Snapshots(), Snapshots()
    fit(tmp_path / "a", plain, [before])
    fit(tmp_path / "b", averaged, [seen, average()])
    assert averaged[2].steps_taken == plain[2].steps_taken == 24
    assert averaged[1].accountant.history == plain[1].accountant.history
    if name != "SWA":  # which sets a learning rate of its own
        assert torch.equal(seen.steps[-1], before.steps[-1])
    torch.testing.assert_close(weights(averaged[0]), expected(seen), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_with_an_average_has_the_account(tmp_path):
    run = made(model=Validated())
    trainer = fit(tmp_path, run, [known.EMAWeightAveraging(decay=0.9)])
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)
    assert "averaging_state" in saved
    again = made(model=Validated())
    resumed = lightning.Trainer(
        max_epochs=4, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        callbacks=[PrivacyCallback(again[1], again[2], again[3], delta=1e-3), known.EMAWeightAveraging(decay=0.9)],
    )  # fmt: skip
    resumed.fit(again[0], again[3], ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert again[2].steps_taken == 32
    assert sum(steps for *_, steps in again[1].accountant.history) == 32


def test_a_copy_of_the_module_changes_nothing_of_the_run(tmp_path):
    """No copy charges, steps or watches in the place of the original."""
    run, other = made(), made()
    copied = copy.deepcopy(run[0])
    assert copied.layers[0].weight is not run[0].layers[0].weight
    for one in (run, other):
        lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
            callbacks=[PrivacyCallback(*one[1:], delta=1e-3)], default_root_dir=tmp_path,
        ).fit(one[0], one[3])  # fmt: skip
    assert torch.equal(weights(run[0]), weights(other[0]))
    assert run[1].accountant.history == other[1].accountant.history
