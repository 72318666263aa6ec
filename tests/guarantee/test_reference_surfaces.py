"""The reference once through each surface: PrivateTrainer, Lightning, the command line, and two ranks.

Every surface is run as people run it, and again with faults planted, each of which the reference has to find.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import tiny_models
import torch
from checkout import PYTHONPATH
from distributed_launch import run
from lightning.pytorch.loggers import CSVLogger
from planted import FAULTS, Fault
from reference import Violation
from reference_ranks import RANKS_FAULTS, STEPS, case_of
from surfaces import DELTA, TIGHT, Oracle, SurfaceReference, some, watched_surface
from tiny_trainer import batch, rows, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainerCallback

from opacus_ac import PrivacyEngine, cli
from opacus_ac.integrations.lightning import PrivacyCallback
from opacus_ac.optimizer.records import RecordSums

pytestmark = pytest.mark.filterwarnings("ignore")


def _first_record_doubled(original: Any) -> Any:
    def _factors(self: Any, norms: Any) -> Any:
        factors = original(self, norms).clone()
        factors[0] *= 2
        return factors

    return _factors


DOUBLED = Fault("a record is summed twice", ((RecordSums, "_factors", _first_record_doubled),), frozenset({"twice"}))
NAMES = (
    "half the noise is drawn",
    "statistics leave without noise",
    "a policy enlarges gradients beyond its share (B13)",
    "one charge in five is lost (D)",
    "a report says less than was spent (A2)",
)
LARGER = "a policy enlarges gradients beyond its share (B13)"
PLANTED = [
    DOUBLED,
    *(
        # A record then adds more than C, or less than C but more than what its noise was charged for.
        replace(fault, kinds=fault.kinds | {"charge"}) if fault.name == LARGER else fault
        for fault in FAULTS
        if fault.name in NAMES
    ),
]


def causal_loss(model: nn.Module, record: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy of the labelled tokens of one record."""
    return tiny_models.record_losses(model, record).mean()


# ---------------------------------------------------------------- PrivateTrainer

RECORDS = 24
EPOCHS, HALF = 4, 6  # of three steps each


class StopAt(TrainerCallback):
    """Ends a run after a number of steps, as a job that has run out of time."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == HALF


def by_trainer(folder: Path) -> SurfaceReference:
    """Four epochs, of which the last two are another run, resumed from the checkpoint of the first."""
    data = rows(RECORDS)
    model = tiny_models.build("qwen2-tied").float()
    reference = SurfaceReference(Oracle(model, [batch([row]) for row in data], causal_loss))
    options = {
        "max_steps": -1,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": HALF,
    }
    with watched_surface(reference):
        cut = trainer(folder, data=data, options={"callbacks": [StopAt()]}, **options)
        cut.train()
        resumed = trainer(folder, data=data, **options)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}"))
        reference.finish(2 * HALF)
    logged = [entry["epsilon"] for entry in resumed.state.log_history if "epsilon" in entry]
    assert len(logged) == 2 * HALF
    assert logged[-1] == resumed.get_epsilon()
    reference.check_reports(some(logged))
    reference.check_reports({2 * HALF: resumed.privacy_report().epsilon}, factor=TIGHT)
    return reference


# ---------------------------------------------------------------- Lightning


class Classifier(lightning.LightningModule):
    """Weights enough that the gradients of the records are independent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        losses = nn.functional.cross_entropy(self.layers(x), y, reduction="none")
        self.private.record_losses(losses)
        return losses.mean()

    def configure_optimizers(self) -> Any:
        return self.private


def by_lightning(folder: Path) -> SurfaceReference:
    """Four epochs of four steps."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(RECORDS, 16, generator=generator), torch.randint(0, 4, (RECORDS,), generator=generator)
    model, engine = Classifier(), PrivacyEngine()
    reference = SurfaceReference(
        Oracle(
            model,
            list(zip(x.split(1), y.split(1), strict=True)),
            lambda m, r: nn.functional.cross_entropy(m.layers(r[0]), r[1]),
        )
    )
    with watched_surface(reference):
        _, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=6),
            noise_multiplier=1.0,
            loss_bound=5.0,
        )
        model.private = optimizer
        fitting = lightning.Trainer(
            max_epochs=4, accelerator="cpu", default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[PrivacyCallback(engine, optimizer, loader, delta=DELTA)], logger=CSVLogger(folder), log_every_n_steps=1,
            enable_checkpointing=False,
        )  # fmt: skip
        fitting.fit(model, loader)
        reference.finish(16)
    with open(f"{fitting.logger.log_dir}/metrics.csv") as stream:
        logged = [float(line["privacy/epsilon"]) for line in csv.DictReader(stream)]
    assert len(logged) == 16
    assert logged[-1] == pytest.approx(engine.get_epsilon(DELTA))
    reference.check_reports(some(logged))
    reference.check_reports({16: engine.privacy_report(DELTA).epsilon}, factor=TIGHT)
    return reference


# ---------------------------------------------------------------- the command line


def by_command_line(folder: Path) -> SurfaceReference:
    """Eight steps on all weights, with a ledger and a target."""
    from common.tone_dialogues import dialogues, write_jsonl
    from tiny_chat import byte_tokenizer, chat_model, save_chat_model

    from opacus_ac.integrations.finetune.chat_data import ChatDataset, PadCollate, read_dialogues

    save_chat_model(folder / "model")
    write_jsonl(folder / "chats.jsonl", dialogues("loving", RECORDS, 0))
    tokenizer, out, steps = byte_tokenizer(), folder / "out", 8
    data = ChatDataset(read_dialogues(str(folder / "chats.jsonl")), tokenizer, 240)
    collate = PadCollate(tokenizer.pad_token_id, 240)
    records = [collate([data[i]]) for i in range(len(data))]
    reference = SurfaceReference(Oracle(chat_model(tokenizer), records, causal_loss), str(out / "privacy.ledger"))
    options = {
        "train_file": folder / "chats.jsonl", "model_name_or_path": folder / "model", "output_dir": out, "target_epsilon": 8,
        "target_delta": DELTA, "dataset_size": RECORDS, "max_steps": steps, "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2, "max_length": 240, "full": True, "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    words = ["finetune", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    with watched_surface(reference):
        code = cli.main(words)
        if code != 0:  # a step that the package refuses
            raise Violation("crash", f"exit code {code}")
        reference.finish(steps)
    reference.check_reports({steps: json.loads((out / "privacy_report.json").read_text())["epsilon"]}, factor=TIGHT)
    return reference


# ---------------------------------------------------------------- the tests in one process

SURFACES = {"trainer": by_trainer, "lightning": by_lightning, "command line": by_command_line}


@pytest.mark.parametrize("surface", SURFACES)
def test_what_a_surface_releases_and_reports_is_what_the_reference_says(surface, tmp_path):
    reference = SURFACES[surface](tmp_path)
    sizes = {len(release.records) for release in reference.releases}
    assert len(sizes) > 1  # the batches were draws


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.name)
@pytest.mark.parametrize("surface", SURFACES)
def test_a_planted_fault_is_found_through_every_surface(surface, fault, tmp_path):
    with fault.planted(), pytest.raises(Violation) as found:
        SURFACES[surface](tmp_path)
    assert found.value.kind in fault.kinds, found.value


# ---------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks found and reported: as it is, and with each fault planted."""
    cases = ["surface_ranks", *(case_of(fault) for fault in RANKS_FAULTS.values())]
    settings = {
        "PYTHONPATH": os.pathsep.join([PYTHONPATH, str(Path(__file__).parent)]),
        "CASES_MODULES": "reference_ranks",
    }
    results = run([f"2:{case}" for case in cases], tmp_path_factory.mktemp("ranks"), timeout=600, **settings)
    return {name.split(":")[1]: result for name, result in results.items()}


@pytest.mark.slow
def test_what_two_ranks_release_and_report_is_what_the_reference_says(ranks):
    """Noise is added once: what is applied, without the records' sum over both ranks, has the variance of one draw."""
    first, second = ranks["surface_ranks"]
    assert first["found"] is None, first["found"]
    assert second["found"] is None, second["found"]
    assert first["reported"] == second["reported"]
    assert first["report"] == second["report"]
    assert len(first["reported"]) == STEPS
    assert first["records"] == second["records"]
    for rank in (first, second):
        squares, count = rank["applied"]
        assert abs(squares / count - 1) < 0.05
        assert count > 1.2 * rank["drawn"]  # a rank draws noise for its half, and applies the whole


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS_FAULTS)
def test_a_planted_fault_is_found_on_a_rank(ranks, name):
    fault = RANKS_FAULTS[name]
    found = [rank["found"] for rank in ranks[case_of(fault)] if rank["found"] is not None]
    assert found
    assert all(kind in fault.kinds for kind, _ in found), found
