"""What PrivateTrainer refuses: each reason by name, all of them in one message, nothing changed before."""

import copy
import math
import types

import pytest
import tiny_models
import torch
from tiny_trainer import Stream, arguments, privacy, rows, trainer, weights
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from opacus_ac.integrations import PrivacyArguments, PrivateTrainer
from opacus_ac.integrations.trainer import checks as trainer_checks
from opacus_ac.loss import per_record_causal_lm_loss

# Argument, value, word of the reason. Set on the finished TrainingArguments, which would check some of them for hardware.
ARGUMENTS = [
    ("deepspeed", {"zero": 1}, "DeepSpeed reduces gradients"),
    ("fsdp", ["full_shard"], "FSDP is not available"),
    ("parallelism_config", object(), "parallelism within the model"),
    ("fp16", True, "use bf16=True"),
    ("torch_compile", True, "compilation decides"),
    ("use_liger_kernel", True, "no rule"),
    ("neftune_noise_alpha", 5.0, "longest record of the batch"),
    ("auto_find_batch_size", True, "choose per_device_train_batch_size"),
    ("dataloader_num_workers", 2, "workers draw batches ahead"),
    ("train_sampling_strategy", "group_by_length", "drawn at random"),
    ("include_num_input_tokens_seen", "all", "counts private tokens"),
    ("include_num_input_tokens_seen", "non_padding", "counts private tokens"),
    ("skip_memory_metrics", False, "peaks of memory"),
    ("debug", ["underflow_overflow"], "private activations"),
    ("load_best_model_at_end", True, "choose among checkpoints"),
    ("lr_scheduler_type", "reduce_lr_on_plateau", "follows a loss"),
    ("lr_scheduler_type", "greedy", "follows a loss"),
    ("optim", "lomo", "outside of optimizer.step"),
    ("optim", "galore_adamw_layerwise", "outside of optimizer.step"),
    ("optim", "schedule_free_adamw", "outside of optimizer.step"),
    ("enable_jit_checkpoint", True, "middle of a step"),
    ("packing", True, "packed row"),
    ("padding_free", True, "one row"),
    ("max_grad_norm", 0.5, "per_sample_max_grad_norm"),
]


def made(folder, args=None, settings=None, model=None, **options):
    model = tiny_models.build("llama").float() if model is None else model
    options = {"train_dataset": rows(64), **options}
    return PrivateTrainer(model, args or arguments(folder), privacy=settings or privacy(), **options)


@pytest.mark.parametrize(("name", "value", "words"), ARGUMENTS)
def test_each_argument_is_refused_by_name(name, value, words, tmp_path):
    args = arguments(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ValueError, match="this training cannot be made private") as caught:
        made(tmp_path, args)
    (line,) = str(caught.value).split("\n")[1:]
    assert line.startswith(f"  * {name}=")
    assert words in line


def test_several_devices_of_one_process_are_refused():
    options = {"model": None, "train_dataset": None, "eval_dataset": None, "options": {}}
    (line,) = trainer_checks.refusals(args=types.SimpleNamespace(n_gpu=2), privacy=privacy(), **options)
    assert line.startswith("n_gpu='2'")


def test_every_row_of_the_table_is_tested():
    assert {name for name, _, _ in trainer_checks._ARGUMENTS} == {name for name, *_ in ARGUMENTS} | {"n_gpu"}


def test_the_defaults_pass(tmp_path):
    made(tmp_path, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_all_reasons_come_in_one_message_and_nothing_is_changed(tmp_path):
    args = arguments(tmp_path, neftune_noise_alpha=5.0, max_grad_norm=0.5)
    model, before = tiny_models.build("llama").float(), copy.copy(vars(args))
    start = weights(model)
    with pytest.raises(ValueError, match="cannot be made private") as caught:
        made(tmp_path, args, model=model, eval_dataset=rows(3), compute_loss_func=lambda *a, **k: 0)
    lines = str(caught.value).split("\n")[1:]
    found = [line.removeprefix("  * ").split("=")[0].split(":")[0] for line in lines]
    assert found == ["neftune_noise_alpha", "max_grad_norm", "compute_loss_func", "eval_dataset"]
    assert vars(args) == before
    assert torch.equal(weights(model), start)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compute_loss_func": lambda *a, **k: 0}, "compute_loss_func: the loss must be computed per record"),
        ({"model_init": lambda: None}, "model_init: a new model"),
        ({"train_dataset": Stream()}, "train_dataset is iterable"),
        ({"train_dataset": iter([])}, "train_dataset is iterable"),
        ({"data_collator": DataCollatorWithFlattening()}, "DataCollatorWithFlattening packs"),
        ({"eval_dataset": rows(3)}, "evaluation_is_public=True"),
        ({"eval_dataset": {"a": rows(3)}}, "evaluation_is_public=True"),
    ],
)
def test_other_options_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match="cannot be made private") as caught:
        made(tmp_path, **options)
    assert words in str(caught.value)


def test_training_data_as_public_data_are_refused(tmp_path):
    data = rows(64)
    with pytest.raises(ValueError, match="eval_dataset is train_dataset"):
        made(tmp_path, settings=privacy(evaluation_is_public=True), train_dataset=data, eval_dataset=data)


def test_half_precision_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight and \d+ more are trained in torch.bfloat16"):
        made(tmp_path, model=tiny_models.build("llama").bfloat16())


def test_recomputed_layers_in_mode_hooks_are_refused(tmp_path):
    args = arguments(tmp_path, activation_checkpointing=True)
    with pytest.raises(ValueError, match='Use "bk"'):
        made(tmp_path, args, settings=privacy(grad_sample_mode="hooks"))


def classifier():
    config = BertConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("bound", [10.0, None])
def test_a_classifier_trains_with_and_without_a_noisy_loss(bound, tmp_path):
    data = [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(rows(64))]
    settings = {"loss_bound": bound, "noise_multiplier": 0.0, "clip_policy": "fixed"}
    private = trainer(tmp_path, model=classifier(), data=data, settings=settings)
    result = private.train()
    assert result.global_step == 3
    assert (0 < result.training_loss < 3) if bound else math.isnan(result.training_loss)


def test_a_model_whose_losses_of_records_are_not_known_has_no_noisy_loss(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForMaskedImageModeling(ViTConfig(**size, image_size=8, patch_size=4, encoder_stride=4))
    with pytest.raises(ValueError, match=r"loss_bound=10: .* ViTForMaskedImageModeling"):
        made(tmp_path, model=model)
    made(tmp_path, model=model, settings=privacy(loss_bound=None))


@pytest.mark.parametrize("bound", [10.0, None])
def test_a_loss_of_ones_own_is_noticed(bound, tmp_path):
    """It bypasses the loss per record: no losses of records arrive, and the first step refuses."""

    class Own(PrivateTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            return per_record_causal_lm_loss(logits, inputs["labels"]).mean()

    private = trainer(tmp_path, cls=Own, settings={"loss_bound": bound})
    start = weights(private.model)
    with pytest.raises(ValueError, match="compute_loss of Own bypassed"):
        private.train()
    assert torch.equal(weights(private.model), start)


def test_a_loss_of_ones_own_per_record_is_welcome(tmp_path):
    """Twice the loss of each record, fixed C far above: twice the gradient, and twice the noisy loss without noise."""

    class Twice(PrivateTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            losses = 2 * per_record_causal_lm_loss(logits, inputs["labels"])
            self.private_optimizer.record_losses(losses)
            return losses.mean()

    found = []
    settings = {"noise_multiplier": 0.0, "clip_policy": "fixed", "per_sample_max_grad_norm": 1e6}
    for cls in (PrivateTrainer, Twice):
        private = trainer(
            tmp_path,
            data=rows(8),
            cls=cls,
            settings=settings,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            gradient_accumulation_steps=2,
        )
        start = weights(private.model)
        loss = private.train().training_loss
        found.append((weights(private.model) - start, loss))
    torch.testing.assert_close(found[1][0], 2 * found[0][0], rtol=1e-3, atol=1e-6)
    assert found[1][1] == pytest.approx(2 * found[0][1], rel=1e-5)


def test_hyperparameter_search_is_refused(tmp_path):
    with pytest.raises(ValueError, match="each costs its epsilon"):
        trainer(tmp_path).hyperparameter_search()


def test_more_records_per_step_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="exceeds the number of records"):
        trainer(tmp_path, data=rows(10)).train()
    with pytest.raises(ValueError, match="train_dataset="):
        PrivateTrainer(tiny_models.build("llama").float(), arguments(tmp_path), privacy=privacy()).train()


def test_trainers_of_trl_are_refused_by_name():
    SFTTrainer = type("SFTTrainer", (Trainer,), {"__module__": "trl.trainer.sft_trainer"})
    with pytest.raises(TypeError, match="PrivateSFT inherits from SFTTrainer of TRL"):
        type("PrivateSFT", (PrivateTrainer, SFTTrainer), {})


def test_real_trl_trainers_are_refused_by_name():
    trl = pytest.importorskip("trl")
    with pytest.raises(TypeError, match="inherits from SFTTrainer of TRL"):
        type("PrivateSFT", (PrivateTrainer, trl.SFTTrainer), {})
    assert PrivacyArguments(noise_multiplier=1.0)
