"""Nothing private leaves a run of TRL's settings: what TRL itself would log is computed beside it and searched for."""

import json
import re

import pytest

pytest.importorskip("trl")
import importlib

import tiny_trl
import torch
from tiny_trainer import generator
from transformers import TrainerCallback

from opacus_ac.integrations import PrivateDPOTrainer, PrivateSFTTrainer
from opacus_ac.integrations.trainer.released import ReleasedLog

# The search and the watch on losses and norms are those of the tests of PrivateTrainer.
spec = importlib.util.spec_from_file_location(
    "trainer_leaks", __file__.replace("trl/test_leaks.py", "trainer/test_leaks.py")
)
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)

pytestmark = pytest.mark.filterwarnings(
    "ignore:noise_generator is seeded", "ignore::FutureWarning", "ignore::UserWarning"
)


NAMES = "mean_token_accuracy|entropy|num_tokens|rewards/|logps/"


class Metrics(TrainerCallback):
    """Computes what TRL logs of each private batch, with the model's own outputs, for :func:`leaks`."""

    def __init__(self):
        self.found: list[dict[str, float]] = []

    def of_texts(self, logits, labels):
        counted = labels[:, 1:] != -100
        probabilities = logits[:, :-1].float().softmax(-1)
        entropy = torch.special.entr(probabilities).sum(-1)[counted]
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[counted]
        self.found.append(
            {
                "entropy": float(entropy.mean()),
                "mean_token_accuracy": float(right.float().mean()),
                "num_tokens": float(counted.sum()),
            }
        )

    def of_pairs(self, logps, reference, beta=0.1):
        rewards = beta * (logps - reference)
        self.found.append(
            {
                "logps/chosen": float(logps[:, 0].mean()),
                "logps/rejected": float(logps[:, 1].mean()),
                "rewards/chosen": float(rewards[:, 0].mean()),
                "rewards/rejected": float(rewards[:, 1].mean()),
                "rewards/margins": float((rewards[:, 0] - rewards[:, 1]).mean()),
            }
        )


def sft_with(metrics, logs):
    class Peer(PrivateSFTTrainer):
        """Does what TRL's trainer does beside the loss."""

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
            if model.training:
                metrics.of_texts(outputs.logits.detach(), inputs["labels"])
                if logs:
                    self.log(dict(metrics.found[-1]))
            return (loss, outputs) if return_outputs else loss

    return Peer


def dpo_with(metrics, logs):
    class Peer(PrivateDPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if model.training:
                with torch.no_grad():
                    reference = self._reference(model, inputs)
                    metrics.of_pairs(self._policy(model, inputs), reference)
                if logs:
                    self.log(dict(metrics.found[-1]))
            return loss

    return Peer


MADE = {"sft": (tiny_trl.sft, sft_with, tiny_trl.dialogues), "dpo": (tiny_trl.dpo, dpo_with, tiny_trl.pairs)}


def leaks(watch, found):
    """Where private values stand: sums with the four digits of a console there, and all values with six digits anywhere."""
    console = {place: numbers for place, numbers in found.items() if place == "console"}
    whole = shared.Watch()
    whole.records = watch.sums | watch.records
    return [*shared.leaks(watch, console), *shared.leaks(whole, found)]


def spread(model, factor):
    """Let records differ: all losses of small random weights are near log V, and those of new adapters are log 2."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "lora" not in name:
                parameter.mul_(factor)
    tiny_trl.moved(model)


def run(kind, folder, monkeypatch, capsys, *, logs=False, gate=True, settings=None, **changes):
    """Three steps of 40 expected records with everything switched on that writes."""
    build, with_metrics, data = MADE[kind]
    watch, metrics = shared.Watch(), Metrics()
    if not gate:
        monkeypatch.setattr(ReleasedLog, "ask", lambda self, name, value: None)
    options = {"callbacks": [watch], "noise_generator": generator(11), "eval_dataset": data(8, 500)}
    made = build(
        folder, data=data(300), cls=with_metrics(metrics, logs), options=options,
        settings={"evaluation_is_public": True, **(settings or {})},
        **{"per_device_train_batch_size": 20, "gradient_accumulation_steps": 2, "report_to": ["tensorboard"],
           "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "log_level": "info",
           "seed": 1234567, **changes},
    )  # fmt: skip
    spread(made.model, 5.0)
    watch.attach(monkeypatch, made.model)
    print(made.train())
    made.save_model()
    print(made.privacy_report())
    captured = capsys.readouterr()
    watch.printed = captured.out + captured.err
    for entry in metrics.found:  # searched for with six digits: so many values are near some number of four
        watch.records |= {value for value in entry.values() if round(value, 4) != value}
    found = shared.written(folder, watch.printed)
    public = ("tokenizer.json", "tokenizer_config.json", "adapter_config.json")  # numbers of tokens, settings
    return made, watch, {place: n for place, n in found.items() if not place.endswith(public)}, metrics


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("settings", [{}, {"loss_bound": None}, {"target_epsilon": 5.0, "noise_multiplier": None}])
def test_no_private_value_is_in_anything_written(kind, settings, tmp_path, monkeypatch, capsys):
    made, watch, found, metrics = run(kind, tmp_path, monkeypatch, capsys, settings=settings)
    assert len(watch.records) > 100
    assert len(metrics.found) >= 3
    assert min(len(found[place]) for place in ("console", "events", "checkpoint-2/optimizer.pt")) > 10
    assert leaks(watch, found) == []
    names = {name for entry in made.state.log_history for name in entry if not name.startswith("eval_")}
    assert not names & {name for entry in metrics.found for name in entry}
    assert not re.search("train_(runtime|samples|steps|tokens)|" + NAMES, watch.printed)
    assert not list(tmp_path.rglob("rng_state.pth"))


@pytest.mark.parametrize("kind", MADE)
def test_what_trl_logs_is_refused_and_would_be_found(kind, tmp_path, monkeypatch, capsys):
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="is logged while private batches are trained on"),
    ):
        run(kind, tmp_path / "refused", patch, capsys, logs=True)
    capsys.readouterr()
    _, watch, found, _ = run(kind, tmp_path / "leaky", monkeypatch, capsys, logs=True, gate=False)
    places = {where for where, _ in leaks(watch, found)}
    assert {"events", "checkpoint-2/trainer_state.json"} <= places
    assert re.search(NAMES, watch.printed)


def test_log_probabilities_of_the_reference_are_nowhere_on_disk(tmp_path, monkeypatch, capsys):
    made, watch, found, _ = run("dpo", tmp_path, monkeypatch, capsys, precompute_ref_log_probs=True)
    assert made.train_dataset.reference.shape == (300, 2)
    watch.records |= set(made.train_dataset.reference.reshape(-1).tolist())
    assert leaks(watch, found) == []


def test_nothing_but_a_loss_is_logged_of_public_pairs(tmp_path, monkeypatch, capsys):
    made, *_ = run("dpo", tmp_path, monkeypatch, capsys)
    (entry,) = (entry for entry in made.state.log_history if "eval_loss" in entry)
    assert entry["eval_loss"] > 0
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
