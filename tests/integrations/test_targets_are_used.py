"""With the accountant left alone, every entry point ends within 1 % of its target epsilon, and not above it."""

import json

import lightning
import pytest
import tiny_finetune
import tiny_trainer
import torch
from helpers import classifier, loader
from tiny_lightning import Classifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine, cli
from opacus_ac.integrations.lightning import PrivacyCallback
from opacus_ac.zeroth_order import ZerothOrderSettings

pytestmark = pytest.mark.filterwarnings("ignore")
TARGET, DELTA = 4.0, 1e-3
BUDGET = {"target_epsilon": TARGET, "target_delta": DELTA}


def started(**options):
    model, engine = classifier(), PrivacyEngine()
    model, optimizer, batches = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.AdamW(model.parameters()), data_loader=loader(64, 16), **BUDGET, **options
    )
    return engine, model, optimizer, batches


def loop(passes=3, **options):
    engine, model, optimizer, batches = started(epochs=passes, **options)
    for _ in range(passes):
        for inputs, targets in batches:
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(model(inputs), targets, reduction="none")
            optimizer.record_losses(losses)
            losses.mean().backward()
            optimizer.step()
    return engine.privacy_report(DELTA).epsilon


def zeroth_order():
    model, engine = classifier().eval(), PrivacyEngine()
    model, optimizer, batches = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader(64, 16), steps=8,
        zeroth_order=ZerothOrderSettings(num_directions=2), **BUDGET,
    )  # fmt: skip
    for _ in range(2):
        for inputs, targets in batches:
            optimizer.step(lambda: nn.functional.cross_entropy(model(inputs), targets, reduction="none"))  # noqa: B023
    return engine.privacy_report(DELTA).epsilon


def of_trainer(made):
    made.train()
    assert made.state.global_step == made.args.max_steps
    return made.privacy_report().epsilon


def trainer(folder, **settings):
    return of_trainer(tiny_trainer.trainer(folder, settings={**BUDGET, **settings}))


def trl(name):
    def run(folder):
        pytest.importorskip("trl")
        import tiny_trl

        return of_trainer(getattr(tiny_trl, name)(folder, settings=BUDGET))

    return run


def of_lightning(folder):
    model, engine = Classifier(), PrivacyEngine()
    data = TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
    _, model.private, batches = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.AdamW(model.parameters()), data_loader=DataLoader(data, batch_size=8),
        epochs=2, **BUDGET,
    )  # fmt: skip
    lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
        callbacks=[PrivacyCallback(engine, model.private, batches, delta=DELTA)],
    ).fit(model, batches)  # fmt: skip
    return engine.privacy_report(DELTA).epsilon


def command_line(folder):
    tiny_finetune.chat_place(folder)
    assert cli.main(tiny_finetune.command(folder, folder / "out", **BUDGET, report_to="none")) == 0
    return json.loads((folder / "out" / "privacy_report.json").read_text())["epsilon"]


ENTRIES = {
    "loop": lambda folder: loop(),
    "loop, flat clipping": lambda folder: loop(clipping="flat"),
    "loop, batches that grow": lambda folder: loop(batch_size_schedule=[8, 8, 8, 16]),
    "loop, a function of the step": lambda folder: loop(batch_size_schedule=lambda step: 16),
    "loop, truncated batches": lambda folder: loop(sampling="truncated_poisson", max_batch_size=30),
    "loop, batches of a fixed size": lambda folder: loop(sampling="fixed_size"),
    "loop, shuffled": lambda folder: loop(sampling="shuffled"),
    "zeroth order": lambda folder: zeroth_order(),
    "PrivateTrainer": trainer,
    "PrivateTrainer, fixed size": lambda folder: trainer(folder, sampling="fixed_size"),
    "PrivateSFTTrainer": trl("sft"),
    "PrivateDPOTrainer": trl("dpo"),
    "Lightning": of_lightning,
    "command line": command_line,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_target_is_used(entry, tmp_path):
    assert 0.99 * TARGET <= ENTRIES[entry](tmp_path) <= TARGET
