"""PrivateTrainer: a Trainer step is one private step, in every shape that the Trainer can take."""

import copy
import gc
import inspect
import json
import math

import datasets
import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from tiny_trainer import arguments, batch, generator, privacy, rows, trainer, weights
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from opacus_ac.budget import PrivacyLedger
from opacus_ac.engine import PrivacyEngine
from opacus_ac.errors import PrivacyBudgetExceeded
from opacus_ac.integrations import PrivacyArguments, PrivateTrainer
from opacus_ac.models.transformers import use_record_loss
from opacus_ac.optimizer.loss_tape import LossTape
from opacus_ac.sampling import LogicalBatches
from opacus_ac.testing import per_sample_gradients

pytestmark = pytest.mark.filterwarnings("ignore:noise_generator is seeded", "ignore::FutureWarning")
PLAIN = {"clip_policy": "fixed", "lr_control": False, "ema_decay": None, "noise_multiplier": 0.0}
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.5}


def lora(model="llama", dtype=torch.float32):
    base = tiny_models.build(model, dtype=dtype)
    torch.manual_seed(1)
    made = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return made


def loop(model, data, bound, steps, rate):
    """SGD on clipped gradients of a loop of batch size 1."""
    use_record_loss(model, LossTape())
    for _ in range(steps):
        gradients = per_sample_gradients(model, batch(data), lambda m, inputs: m(**inputs).loss)
        norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
        factors = (bound / norms).clamp(max=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in gradients:
                    parameter -= rate * torch.einsum("i,i...->...", factors, gradients[name]) / len(data)


@pytest.mark.parametrize(
    ("mode", "model"), [("bk", "qwen2-tied"), ("bk", "llama"), ("hooks", "llama"), ("bk", "lora"), ("hooks", "lora")]
)
@pytest.mark.parametrize("physical", [8, 2])
def test_three_steps_equal_the_loop_of_batch_size_one(mode, model, physical, tmp_path):
    data, bound = rows(8), 0.5
    private = lora(dtype=torch.float64).double() if model == "lora" else tiny_models.build(model)
    oracle = copy.deepcopy(private)
    settings = {**PLAIN, "grad_sample_mode": mode, "per_sample_max_grad_norm": bound}
    made = trainer(
        tmp_path, model=private, data=data, settings=settings, per_device_train_batch_size=physical,
        gradient_accumulation_steps=8 // physical, **SGD,
    )  # fmt: skip
    output = made.train()
    before = weights(oracle)
    loop(oracle, data, bound, 3, 0.5)
    assert float((weights(oracle) - before).abs().max()) > 1e-3
    torch.testing.assert_close(weights(private), weights(oracle), rtol=1e-5, atol=1e-7)  # RMSNorm works in float32
    assert output.global_step == made.private_optimizer.steps_taken == 3
    assert made.engine.accountant.history == [(0.0, 1.0, 3)]
    assert made.get_epsilon() == math.inf


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("adapters", [True, False])
def test_activation_checkpointing_changes_nothing(adapters, reentrant, tmp_path):
    found = []
    for checkpointing in (False, True):
        model = lora("qwen2-tied") if adapters else tiny_models.build("qwen2-tied").float()
        made = trainer(
            tmp_path, model=model, settings={**PLAIN, "per_sample_max_grad_norm": 0.5}, options={"noise_generator": generator()},
            activation_checkpointing=checkpointing, activation_checkpointing_kwargs={"use_reentrant": reentrant}, **SGD,
        )  # fmt: skip
        start = weights(model)
        made.train()
        found.append(weights(model))
        assert float((weights(model) - start).abs().max()) > 1e-4
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["bk", "hooks"])
@pytest.mark.parametrize("adapters", [True, False])
def test_a_clipped_record_adds_at_most_c_under_bf16(mode, adapters, tmp_path):
    """One record, q = 1, no noise, SGD with rate 1: the weights move by C at most, and by no more less than norms that are bounds cost."""
    model = lora(dtype=torch.bfloat16) if adapters else tiny_models.build("llama").float()
    before = weights(model)
    made = trainer(
        tmp_path, model=model, data=rows(1), settings={**PLAIN, "per_sample_max_grad_norm": 0.25, "grad_sample_mode": mode},
        bf16=True, per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=1, **{**SGD, "learning_rate": 1.0},
    )  # fmt: skip
    made.train()
    moved = float((weights(model) - before).norm())
    assert 0.25 * (1 - 5e-3) <= moved <= 0.25 * (1 + 1e-6)


def test_a_record_has_the_same_norm_alone_and_in_company(tmp_path):
    """The Trainer's own loss couples records through the number of tokens of the batch."""
    norms = {}
    for cls, data in ((PrivateTrainer, rows(2)), (PrivateTrainer, rows(2)[:1])):
        made = trainer(
            tmp_path, data=data, settings=PLAIN, cls=cls, per_device_train_batch_size=len(data), gradient_accumulation_steps=1,
            max_steps=1,
        )  # fmt: skip
        source = made._make_private()[0].source
        finish = source.finish_batch
        seen = norms[len(data)] = []
        source.finish_batch = lambda finish=finish, seen=seen: seen.append(finish()) or seen[-1]
        made.train()
    assert float(norms[1][0][0]) == pytest.approx(float(norms[2][0][0]), rel=1e-5)


def test_the_trainers_own_loss_would_couple_them(tmp_path):
    """What the test above guards against is real: record 0's share of the loss changes with its company."""
    model, losses = tiny_models.build("qwen2-tied").float(), []
    plain = Trainer(model, arguments(tmp_path), train_dataset=rows(2))
    for data in (rows(1), [rows(1)[0], rows(6)[5]]):
        count = plain._get_num_items_in_batch([batch(data)], torch.device("cpu"))
        labels = batch(data)["labels"]
        labels[1:] = -100  # what remains is the share of record 0
        loss = plain.compute_loss(model, {**batch(data), "labels": labels}, num_items_in_batch=count)
        losses.append(float(loss.detach()) * len(data))
    assert losses[0] != pytest.approx(losses[1], rel=0.01)


class Coupled(torch.nn.Module):
    """Subtracts from every position what the batch has there on average, as batch normalisation does."""

    def forward(self, hidden):
        return hidden - hidden.mean(0, keepdim=True)


def test_a_model_that_couples_records_is_refused_before_the_first_step(tmp_path):
    """Found by comparing the loss of two records with their losses alone."""
    model = tiny_models.build("qwen2-tied").float()
    model.model.norm = torch.nn.Sequential(model.model.norm, Coupled())
    coupled = trainer(tmp_path, model=model)
    with pytest.raises(ValueError, match="couples records") as refused:
        coupled.train()
    assert not any(character.isdigit() for character in str(refused.value).replace("Qwen2", ""))  # no losses of records
    assert len(coupled.engine.accountant) == 0
    assert coupled.private_optimizer.steps_taken == 0


def test_a_loss_over_the_tokens_of_the_batch_is_refused_before_the_first_step(tmp_path):
    class TokenMean(PrivateTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            losses = torch.nn.functional.cross_entropy(
                outputs.logits[:, :-1].transpose(1, 2), inputs["labels"][:, 1:], reduction="none"
            )
            self.private_optimizer.record_losses(losses.sum(1))
            return losses.sum() / (inputs["labels"][:, 1:] != -100).sum()

    with pytest.raises(ValueError, match="couples records"):
        trainer(tmp_path, cls=TokenMean).train()


def test_the_seed_of_the_arguments_has_no_part_in_the_noise(tmp_path):
    first, second = (trainer(tmp_path, seed=42, data_seed=42) for _ in range(2))
    start = weights(first.model)
    assert torch.equal(start, weights(second.model))
    first.train()
    second.train()
    assert not torch.equal(weights(first.model), weights(second.model))
    third, fourth = (trainer(tmp_path, seed=s, options={"noise_generator": generator()}) for s in (1, 2))
    third.train()
    fourth.train()
    assert torch.equal(weights(third.model), weights(fourth.model))  # and all randomness of a step is the engine's


def test_target_epsilon_is_met_in_the_planned_steps(tmp_path):
    for plan in ({"max_steps": 5}, {"max_steps": -1, "num_train_epochs": 1.25}):
        made = trainer(tmp_path, settings={"target_epsilon": 3.0}, **plan)
        assert made.train().global_step == 5
        assert 2.9 < made.get_epsilon() <= 3.0
        report = made.privacy_report()
        assert (report.steps, report.dataset_size, report.expected_batch_size) == (5, 64, (16.0, 16.0))


def test_schedules_reach_the_inner_optimizer(tmp_path):
    made = trainer(tmp_path, lr_scheduler_type="linear", warmup_steps=1, max_steps=4)
    made.train()
    rates = [entry["learning_rate"] for entry in made.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.0, 1e-3, 2e-3 / 3, 1e-3 / 3])


@pytest.mark.parametrize("kind", ["list", "datasets", "columns"])
def test_data_of_every_kind_survive_the_empty_batch(kind, tmp_path):
    """Rate 1/64, 40 steps, seeded: more than half of the batches are empty, and each is a step like any other."""
    data = rows(64)
    if kind != "list":
        columns = {key: [row[key].tolist() for row in data] for key in data[0]}
        if kind == "columns":
            columns["author"] = ["A"] * 64
        data = datasets.Dataset.from_dict(columns)
    sizes = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            sizes.append(made._private_loader.plan.current().records)

    made = trainer(
        tmp_path, data=data, per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=40, logging_steps=100,
        options={"noise_generator": generator(), "callbacks": [Watch()]},
    )  # fmt: skip
    made.train()
    assert sizes.count(0) > 5
    assert len(sizes) == 40
    assert made.engine.accountant.history == [(1.0, 1 / 64, 40)]


def test_a_public_size_that_is_not_the_number_of_rows(tmp_path):
    """N = 128 is public, 64 rows are there: rate and passes follow N, each row is drawn with that rate."""
    with pytest.warns(UserWarning, match="dataset_size"):
        trainer(tmp_path, settings={"dataset_size": None}).train()
    counts = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            counts.append(made._private_loader.plan.current().records)

    made = trainer(
        tmp_path, settings={"dataset_size": 128}, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=1,
        per_device_train_batch_size=16, options={"noise_generator": generator(), "callbacks": [Watch()]},
    )  # fmt: skip
    made.train()
    assert made.privacy_report().dataset_size == 128
    assert made.engine.accountant.history == [(1.0, 0.125, 8)]
    assert len(counts) == 8
    # 8 draws of 64 records at rate 1/8: mean 64, std 7.5; seeded
    assert abs(sum(counts) - 64) < 45


def test_shuffled_batches_are_charged_without_amplification(tmp_path):
    made = trainer(tmp_path, settings={"sampling": "shuffled"}, max_steps=-1, num_train_epochs=2)
    assert made.train().global_step == 8
    assert made.engine.accountant.history == [(1.0, 1.0, 2)]
    with pytest.raises(ValueError, match="dataset_size=70"):
        trainer(tmp_path, settings={"sampling": "shuffled", "dataset_size": 70}).train()


def test_arguments_of_the_caller_are_not_changed(tmp_path):
    args, public = arguments(tmp_path), vars(arguments(tmp_path)).copy()
    first = PrivateTrainer(tiny_models.build("llama").float(), args, privacy=privacy(), train_dataset=rows(64))
    second = PrivateTrainer(tiny_models.build("llama").float(), args, privacy=privacy(), train_dataset=rows(64))
    assert first.expected_batch_size == second.expected_batch_size == 16
    assert args.gradient_accumulation_steps == public["gradient_accumulation_steps"] == 4


def test_training_twice_adds_up(tmp_path):
    made = trainer(tmp_path)
    made.train()
    once = made.get_epsilon()
    made.train()
    assert made.engine.accountant.history == [(1.0, 0.25, 6)]
    assert made.get_epsilon() > once


# ---------------------------------------------------------------- evaluation and saving


def test_evaluation_and_saving_use_the_averaged_weights(tmp_path):
    public = rows(12, seed=9)
    made = trainer(
        tmp_path, settings={"evaluation_is_public": True}, options={"eval_dataset": public}, eval_strategy="steps",
        eval_steps=3, learning_rate=0.05, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    before = made.evaluate()["eval_loss"]
    made.train()
    raw = weights(made.model)
    saved = made.evaluate()["eval_loss"]
    assert saved != before
    assert torch.equal(raw, weights(made.model))
    with made.ema_weights():
        averaged = weights(made.model)
        losses = [float(made.model(**batch([row])).loss) for row in public]  # mean over records, whatever the batches
    assert saved == pytest.approx(sum(losses) / 12, rel=1e-5)
    assert any(entry.get("eval_loss") == pytest.approx(saved) for entry in made.state.log_history)
    made.save_model(tmp_path / "final")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", dtype=torch.float32)
    assert torch.equal(weights(final), averaged)
    assert torch.equal(weights(checkpoint), raw)
    for folder in ("final", "checkpoint-3"):
        assert json.loads((tmp_path / folder / "privacy_report.json").read_text()) == made.privacy_report().to_dict()


def test_adapters_are_saved_as_adapters(tmp_path):
    made = trainer(tmp_path, model=lora(), settings={"average_weights": False})
    made.train()
    made.save_model(tmp_path / "final")
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()
    assert made.ema_weights().__class__.__name__ == "nullcontext"


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_evaluation_on_private_data_is_refused(call, tmp_path):
    data = rows(64)
    made = trainer(tmp_path, data=data, settings={"evaluation_is_public": True})
    with pytest.raises(ValueError, match="is train_dataset"):
        getattr(made, call)(data)
    with pytest.raises(ValueError, match="is train_dataset"):
        getattr(made, call)({"mine": data})
    made = trainer(tmp_path, data=data)
    with pytest.raises(ValueError, match="evaluation_is_public=True"):
        getattr(made, call)(rows(4))
    with pytest.raises(ValueError, match="evaluation_is_public=True"):
        trainer(tmp_path, data=data, options={"eval_dataset": rows(4)})


# ---------------------------------------------------------------- budget


def test_the_budget_stops_the_run_saved_and_before_the_step(tmp_path):
    ledger = str(tmp_path / "ledger.jsonl")
    settings = {"target_epsilon": 3.0, "ledger": ledger}
    trainer(tmp_path / "a", settings=settings, max_steps=4, max_grad_norm=0.0).train()
    with pytest.warns(UserWarning, match="has been spent already"), pytest.raises(PrivacyBudgetExceeded):
        trainer(tmp_path / "b", settings=settings, max_steps=4).train()  # not one step fits
    settings["target_epsilon"] = 4.0
    made = trainer(
        tmp_path / "c", settings=settings, max_steps=12, save_strategy="steps", save_steps=100, logging_steps=100
    )
    with pytest.warns(UserWarning, match="stopped after step"):
        output = made.train()
    taken = output.global_step
    assert 0 < taken < 12
    assert made.get_epsilon() <= 4.0
    assert len(PrivacyLedger(ledger).charges) == 4 + taken
    assert (tmp_path / "c" / f"checkpoint-{taken}" / "privacy_state.pt").is_file()
    assert [entry["step"] for entry in made.state.log_history if "loss" in entry] == [taken]
    assert math.isfinite(output.training_loss)
    assert not made.is_in_train


# ---------------------------------------------------------------- settings


def test_one_command_line_for_both_kinds_of_arguments(tmp_path):
    parser = HfArgumentParser((PrivacyArguments, TrainingArguments))
    line = [
        "--target_epsilon",
        "4",
        "--loss_bound",
        "0",
        "--no_lr_control",
        "--per_sample_max_grad_norm",
        "3",
        "--use_cpu",
    ]
    parsed, args = parser.parse_args_into_dataclasses([*line, "--output_dir", str(tmp_path), "--ema_decay", "0"])
    assert (parsed.target_epsilon, parsed.loss_bound, parsed.lr_control, parsed.ema_decay) == (4.0, None, False, None)
    assert parsed.engine_options()["max_grad_norm"] == 3.0
    assert args.max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "either target_epsilon or noise_multiplier"),
        ({"target_epsilon": 1.0, "noise_multiplier": 1.0}, "either target_epsilon or noise_multiplier"),
        ({"target_epsilon": -1.0}, "target_epsilon must be a finite number > 0"),
        ({"noise_multiplier": 1.0, "target_delta": 1.0}, "target_delta must lie between"),
        ({"noise_multiplier": 1.0, "dataset_size": 0}, "dataset_size must be"),
        ({"noise_multiplier": 1.0, "grad_sample_mode": "ghost"}, "grad_sample_mode"),
    ],
)
def test_settings_are_checked(changes, words):
    with pytest.raises(ValueError, match=words):
        PrivacyArguments(**changes)


def test_the_trainer_still_has_every_seam():
    """The underscored ones are no public API of transformers: this fails when a new version renames one."""
    seams = {
        "create_optimizer": ["model"], "get_train_dataloader": [], "num_examples": ["dataloader"],
        "get_total_train_batch_size": ["args"], "floating_point_ops": ["inputs"],
        "training_step": ["model", "inputs", "num_items_in_batch"],
        "_get_num_items_in_batch": ["batch_samples", "device"], "_get_grad_norm": ["model", "grad_norm"],
        "_save_optimizer_and_scheduler": ["output_dir"], "_load_optimizer_and_scheduler": ["checkpoint"],
        "_load_from_checkpoint": ["resume_from_checkpoint", "model"], "_save_rng_state": ["output_dir"],
        "_save_checkpoint": ["model", "trial"], "_finalize_training": ["trial", "num_train_samples", "start_time"],
        "save_state": [], "save_model": ["output_dir", "_internal_call"], "log": ["logs", "start_time"],
        "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    }  # fmt: skip
    for name, wanted in seams.items():
        assert list(inspect.signature(getattr(Trainer, name)).parameters)[1:] == wanted, name
        assert getattr(PrivateTrainer, name) is not getattr(Trainer, name), name


def test_an_interrupted_pass_does_not_disturb_the_next(tmp_path):
    """An error leaves the old iterator alive in its traceback; when it goes, the new pass must not end with it."""

    class Fail(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1 and not kept:
                raise RuntimeError("on purpose")

    kept = []
    made = trainer(tmp_path, options={"callbacks": [Fail()]})
    with pytest.raises(RuntimeError, match="on purpose") as error:
        made.train()
    kept.append(error._excinfo)  # traceback, frames, iterator
    del error

    class Drop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                kept[0] = None
                gc.collect()

    made.add_callback(Drop())
    assert made.train().global_step == 3
    assert made.engine.accountant.history == [(1.0, 0.25, 4)]  # one step before the error, three after


def test_logical_batches_group_the_physical_ones():
    data = rows(12)
    loader = DataLoader(data, batch_size=6, collate_fn=batch)
    model = tiny_models.build("llama").float()
    _, optimizer, private = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader, noise_multiplier=1.0,
        max_physical_batch_size=2, noise_generator=generator(),
    )  # fmt: skip
    logical = LogicalBatches(private)
    assert len(logical) == 2
    for _ in range(2):
        for step, parts in enumerate(logical):
            flags = []
            for inputs, last in parts:
                optimizer.zero_grad()
                model(**inputs).loss.backward()
                optimizer.step()
                flags.append(last)
            assert flags == [False] * (len(flags) - 1) + [True]
            if step == 0:
                break  # and the next pass starts afresh
    assert optimizer.steps_taken == 2


def test_integrations_and_its_trainer_export_the_names():
    from opacus_ac import integrations
    from opacus_ac.integrations import trainer

    for name in ("PrivacyArguments", "PrivateTrainer"):
        assert getattr(trainer, name) is getattr(integrations, name)
    for module in (trainer, integrations):
        with pytest.raises(AttributeError, match="nonsense"):
            module.nonsense  # noqa: B018


@pytest.mark.parametrize("low", [False, True])
def test_a_frozen_part_in_bfloat16_is_low_precision_for_the_check_of_the_loss(low, tmp_path, monkeypatch):
    """The default model keeps its frozen weights in bfloat16, which rounds a loss by more than float32 does."""
    given = []
    monkeypatch.setattr("opacus_ac.integrations.trainer.trainer.check_some_records", lambda *_, **kw: given.append(kw))
    model = tiny_models.build("qwen2-tied").float()
    if low:
        model.register_parameter(
            "frozen", torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16), requires_grad=False)
        )
    made = trainer(tmp_path, model=model)
    made._check_independence(model, made.create_optimizer())
    assert given == [{"rtol": 2e-2, "floor": 2e-2} if low else {}]
