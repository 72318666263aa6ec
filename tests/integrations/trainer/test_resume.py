"""Checkpoints of PrivateTrainer: a resumed run equals the uninterrupted one, and what does not belong together is refused."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from tiny_trainer import generator, trainer, weights
from transformers import TrainerCallback

from opacus_ac.budget import PrivacyLedger
from opacus_ac.errors import LedgerError

pytestmark = pytest.mark.filterwarnings("ignore:noise_generator is seeded", "ignore::FutureWarning")


class InterruptedError(RuntimeError):
    pass


class Interrupt(TrainerCallback):
    """Ends the process, so to speak, in the middle of step 5."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise InterruptedError


def adapters():
    torch.manual_seed(1)
    base = tiny_models.build("llama").float()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def run(folder, *, interrupt=False, model="qwen2-tied", settings=None, **changes):
    model = adapters() if model == "lora" else model
    options = {"noise_generator": generator(), "callbacks": [Interrupt()] if interrupt else None}
    defaults = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "linear",
        "learning_rate": 0.01,
    }
    settings = {"target_epsilon": 6.0, **(settings or {})}
    return trainer(folder, model=model, settings=settings, options=options, **{**defaults, **changes})


def averages(made):
    return torch.cat([a.double().reshape(-1) for a in made.private_optimizer.ema._average])


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder with checkpoint-3 of a run of 7 steps; copied before it is changed."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.warns(UserWarning, match="seeded"), pytest.raises(InterruptedError):
        run(folder, interrupt=True).train()
    return folder


@pytest.fixture
def checkpoint(interrupted, tmp_path):
    return shutil.copytree(interrupted / "checkpoint-3", tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    ("model", "mode", "plan"),
    [
        ("qwen2-tied", "bk", {}),
        ("lora", "bk", {}),
        ("llama", "hooks", {}),
        (
            "qwen2-tied",
            "bk",
            {"max_steps": -1, "num_train_epochs": 1.75},
        ),  # the checkpoint is within an epoch of 4 steps
        ("qwen2-tied", "bk", {"lr_scheduler_type": "cosine", "warmup_steps": 2, "optim": "sgd"}),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(model, mode, plan, tmp_path):
    settings = {"grad_sample_mode": mode}
    whole = run(tmp_path / "whole", model=model, settings=settings, **plan)
    output = whole.train()
    with pytest.raises(InterruptedError):
        run(tmp_path / "parts", model=model, settings=settings, interrupt=True, **plan).train()
    resumed = run(tmp_path / "parts", model=model, settings=settings, **plan)
    again = resumed.train(resume_from_checkpoint=True)
    assert output.global_step == again.global_step == 7
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert torch.equal(averages(resumed), averages(whole))
    assert (
        resumed.engine.accountant.history
        == whole.engine.accountant.history
        == [(pytest.approx(0.99, abs=0.5), 0.25, 7)]
    )
    assert resumed.get_epsilon() == pytest.approx(whole.get_epsilon(), rel=1e-4)  # the grid follows from the history
    assert resumed.private_optimizer.max_grad_norm == whole.private_optimizer.max_grad_norm
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    epsilons = [[entry.pop("epsilon") for entry in log] for log in logs]
    assert epsilons[0] == pytest.approx(epsilons[1], rel=1e-4)
    assert logs[0] == logs[1]
    assert len(logs[0]) == 7
    assert resumed.state.epoch == whole.state.epoch


@pytest.mark.parametrize(
    "plan", [{"max_steps": 3}, {"max_steps": 4, "save_steps": 4}, {"max_steps": -1, "num_train_epochs": 0.75}]
)
@pytest.mark.parametrize("ledger", [False, True])
@pytest.mark.parametrize("budget", [{}, {"target_epsilon": None, "noise_multiplier": 1.0}])
def test_a_run_that_is_complete_takes_no_further_step(tmp_path, plan, ledger, budget):
    settings = {**budget, **({"ledger": str(tmp_path / "ledger")} if ledger else {})}
    whole = run(tmp_path / "run", settings=settings, **plan)
    steps = whole.train().global_step
    files = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    again = run(tmp_path / "run", settings=settings, **plan)
    with pytest.warns(UserWarning, match=f"complete: its {steps} steps were taken"):
        output = again.train(resume_from_checkpoint=True)
    assert output.global_step == again.state.global_step == again.private_optimizer.steps_taken == steps
    assert again.was_complete
    assert not whole.was_complete
    assert again.engine.accountant.history == whole.engine.accountant.history
    assert again.get_epsilon() == pytest.approx(whole.get_epsilon(), rel=1e-4)
    assert torch.equal(weights(again.model), weights(whole.model))
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == files
    assert not ledger or len(PrivacyLedger(tmp_path / "ledger").charges) == steps


def test_with_a_ledger_the_steps_after_the_checkpoint_stay_spent(tmp_path):
    ledger = str(tmp_path / "ledger.jsonl")
    with pytest.raises(InterruptedError):
        run(tmp_path / "run", settings={"ledger": ledger}, interrupt=True).train()
    assert len(PrivacyLedger(ledger).charges) == 4
    resumed = run(tmp_path / "run", settings={"ledger": ledger})
    with pytest.warns(UserWarning, match="stopped after step 6"):  # steps 1 to 4, and 4 to 6 again
        output = resumed.train(resume_from_checkpoint=True)
    assert output.global_step == 6
    assert len(PrivacyLedger(ledger).charges) == 7
    assert resumed.get_epsilon() <= 6.0
    with pytest.raises(ValueError, match="written under a privacy ledger"):
        run(tmp_path / "run").train(resume_from_checkpoint=True)
    with pytest.raises(LedgerError, match="lines are missing"):
        run(tmp_path / "run", settings={"ledger": str(tmp_path / "other.jsonl")}).train(resume_from_checkpoint=True)


def damage(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def edit_state(folder, **changes):
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def false_epsilon(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    log = [entry | ({"epsilon": 0.1} if "epsilon" in entry else {}) for entry in state["log_history"]]
    edit_state(folder, log_history=log)


def replace_privacy_state(folder):
    path = folder / "privacy_state.pt"
    state = torch.load(path, weights_only=True)
    state["step"] = 1
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "privacy_state.pt").unlink(), "privacy_state.pt is missing"),
        (lambda f: damage(f, "model.safetensors"), "model.safetensors is missing, new or changed"),
        (lambda f: damage(f, "optimizer.pt"), "optimizer.pt is missing, new or changed"),
        (lambda f: (f / "optimizer.pt").unlink(), "optimizer.pt is missing, new or changed"),
        (lambda f: (f / "scheduler.pt").unlink(), "scheduler.pt is missing, new or changed"),
        (lambda f: (f / "adapter_model.bin").write_bytes(b"1"), "adapter_model.bin is missing, new or changed"),
        (lambda f: edit_state(f, global_step=1), "trainer_state.json is missing, new or changed"),
        (false_epsilon, "trainer_state.json is missing, new or changed"),
        (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json is missing, new or changed"),
        (lambda f: (f / "trainer_state.json").write_text("{"), "trainer_state.json is missing, new or changed"),
        (lambda f: torch.save({}, f / "rng_state.pth"), "rng_state.pth is missing, new or changed"),
        (lambda f: torch.save({}, f / "rng_state_0.pth"), "rng_state_0.pth is missing, new or changed"),
        (lambda f: torch.save({}, f / "scaler.pt"), "scaler.pt is missing, new or changed"),
        (lambda f: torch.save({}, f / "scheduler.pt"), "scheduler.pt is missing, new or changed"),
        (lambda f: damage(f, "training_args.bin"), "training_args.bin is missing, new or changed"),
        (lambda f: (f / "vocab.txt").write_text("[PAD]"), "vocab.txt is missing, new or changed"),
        (lambda f: (f / "merges.txt").write_text("a b"), "merges.txt is missing, new or changed"),
        (lambda f: damage(f, "config.json"), "config.json is missing, new or changed"),
        (lambda f: damage(f, "privacy_report.json"), "privacy_report.json is missing, new or changed"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json is missing, new or changed"),
        (
            lambda f: (f / "global_step3").mkdir() or torch.save({}, f / "global_step3" / "a.pt"),
            "a.pt is missing, new or",
        ),
        (replace_privacy_state, "digest differs"),
    ],
)
def test_a_folder_that_is_no_whole_checkpoint_is_refused(change, words, checkpoint):
    change(checkpoint)
    made = run(checkpoint.parent)
    before = weights(made.model)
    with pytest.raises(ValueError, match=words):
        made.train(resume_from_checkpoint=str(checkpoint))
    assert made.private_optimizer.steps_taken == 0
    assert len(made.engine.accountant) == 0
    assert torch.equal(weights(made.model), before)


def test_notes_beside_a_checkpoint_do_no_harm(checkpoint):
    (checkpoint / "README.md").write_text("mine")
    (checkpoint / ".cache").mkdir()
    (checkpoint / ".cache" / "metadata.json").write_text("{}")
    assert run(checkpoint.parent).train(resume_from_checkpoint=str(checkpoint)).global_step == 7


class Texts:
    """Stands for a tokenizer whose files are text."""

    files = ("vocab.txt", "words.csv", "notes.md")

    def save_pretrained(self, folder, **options):
        for name in self.files:
            (Path(folder) / name).write_text("as it was")


@pytest.mark.parametrize("name", Texts.files)
def test_a_text_that_was_saved_with_the_checkpoint_may_not_change(tmp_path, name):
    """What a folder may get later it may not lose or change: a tokenizer reads its words from a text file."""
    texts = {"options": {"processing_class": Texts(), "noise_generator": generator()}, "save_strategy": "steps"}
    trainer(tmp_path, save_steps=2, **texts).train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "later.md").write_text("a note")
    trainer(tmp_path, **texts).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / name).write_text("changed")
    with pytest.raises(ValueError, match=f"{name} is missing, new or changed"):
        trainer(tmp_path, **texts).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": 8}, "noise_multiplier"),  # more steps for the same epsilon
        ({"gradient_accumulation_steps": 3}, "expected_batch_size"),
        ({"settings": {"per_sample_max_grad_norm": 2.0}}, "max_grad_norm = 1.0, this run has 2.0"),
        ({"settings": {"dataset_size": 65}}, "dataset_size"),
        ({"settings": {"loss_bound": None}}, "statistics"),
        ({"settings": {"accountant": "rdp"}}, "accounted by 'vpld', this engine uses 'rdp'"),
    ],
)
def test_other_settings_are_refused(changes, words, checkpoint):
    made = run(checkpoint.parent, **changes)
    before = weights(made.model)
    with pytest.raises(ValueError, match=words):
        made.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(made.model), before)


def test_weights_alone_cannot_be_resumed(tmp_path):
    with pytest.raises(InterruptedError):
        run(tmp_path, interrupt=True, save_only_model=True).train()
    with pytest.raises(ValueError, match="save_only_model"):
        run(tmp_path).train(resume_from_checkpoint=True)


def test_secret_streams_are_not_in_a_checkpoint(tmp_path):
    made = trainer(tmp_path, save_strategy="steps", save_steps=3)
    made.train()
    private = torch.load(tmp_path / "checkpoint-3" / "privacy_state.pt", weights_only=True)
    optimizer = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert private["sampling_stream"] == {}
    assert optimizer["opacus_ac"]["mechanism"]["stream"] == {}
    assert not (tmp_path / "checkpoint-3" / "rng_state.pth").exists()
