"""PrivateTrainer beyond language models: the loss of each task, its bound, label smoothing, evaluation with metrics."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers as hf
from loss_cases import HEADS, LENGTH, VOCAB, built, collate, learns, llama, of_classes, of_tokens, oracle, rows
from tiny_trainer import trainer, weights
from transformers.trainer_pt_utils import LabelSmoother

from opacus_ac.integrations import PrivacyArguments
from opacus_ac.integrations.trainer.arguments import Default

pytestmark = pytest.mark.filterwarnings("ignore:noise_generator is seeded", "ignore::FutureWarning")
SETTINGS = {
    "clip_policy": "fixed", "per_sample_max_grad_norm": 1e6, "lr_control": False, "ema_decay": None, "noise_multiplier": 0.0,
    "normalize": False, "evaluation_is_public": True,
}  # fmt: skip
SGD = {
    "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0, "max_steps": 1, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2, "remove_unused_columns": False,
}  # fmt: skip
TASKS = [
    "classes", "classes, own loss_function", "regression", "several labels", "token classes", "masked LM", "question answering",
    "choice", "next sentence", "words and the next sentence", "replaced tokens", "translation", "transcripts", "images",
]  # fmt: skip


def started(folder, model, data, settings=None, **changes):
    options = {"data_collator": collate, **changes.pop("options", {})}
    return trainer(
        folder, model=model, data=data, settings={**SETTINGS, **(settings or {})}, options=options, **{**SGD, **changes}
    )


def moved(model, before):
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}


def compare(got, wanted):
    scale = max(float(v.abs().max()) for v in wanted.values())
    assert scale > 0
    for name, value in wanted.items():
        assert float((got[name] - value).abs().max()) <= 1e-6 * scale, name


@pytest.mark.parametrize("task", TASKS)
def test_a_step_is_that_of_a_loop_and_the_loss_is_released(task, tmp_path):
    make, labels = HEADS[task]
    model, data = built(make), rows(labels)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = oracle(model, data)
    alone = [float(model(**collate([row])).loss.detach()) if learns(row) else 0.0 for row in data]
    made = started(tmp_path, model, data, {"loss_bound": 1e3})
    output = made.train()
    compare(moved(model, before), expected)
    assert output.training_loss == pytest.approx(sum(alone) / len(alone), rel=1e-5)


def test_padding_that_counts_in_the_loss_is_refused_and_one_length_is_the_way_out(tmp_path):
    """The softmax over the places of an answer includes padding, so the longest row of a batch shows."""
    make, labels = HEADS["question answering"]

    def padded(length):
        def join(records):
            longest = length or max(len(r["input_ids"]) for r in records)
            more = [longest - len(r["input_ids"]) for r in records]
            ids = [torch.cat([r["input_ids"], r["input_ids"].new_zeros(m)]) for r, m in zip(records, more, strict=True)]
            mask = [(torch.arange(longest) < len(r["input_ids"])).long() for r in records]
            places = {k: torch.stack([r[k] for r in records]) for k in ("start_positions", "end_positions")}
            return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask), **places}

        return {"options": {"data_collator": join}}

    data = [{**row, "input_ids": row["input_ids"][: 5 + i % 3]} for i, row in enumerate(rows(labels))]
    with pytest.raises(
        ValueError, match=r'not the mean of the losses.*pad all rows to one length \(padding="max_length"\)'
    ):
        started(tmp_path, built(make), data, **padded(None)).train()
    assert started(tmp_path, built(make), data, **padded(LENGTH)).train().global_step == 1


# ---------------------------------------------------------------- the bound of the loss

BOUNDS = {
    "classes": 4 * math.log(3),
    "token classes": 4 * math.log(3),
    "images": 4 * math.log(3),
    "pixels": 4 * math.log(3),
    "next sentence": 4 * math.log(2),
    "replaced tokens": 4 * math.log(2),
    "regression": 10.0,
    "several numbers": 10.0,
    "choice": 10.0,  # the number of choices is in the data
    "masked LM": 10.0,
    "question answering": 10.0,
    "seq2seq": 10.0,
    "words and the next sentence": 10.0,
}


@pytest.mark.parametrize("task", BOUNDS)
def test_the_bound_of_the_loss_fits_the_number_of_classes(task, tmp_path):
    make, labels = HEADS[task]
    made = started(tmp_path, built(make), rows(labels))
    made.create_optimizer()
    assert made.private_optimizer.statistics.loss_bound == pytest.approx(BOUNDS[task])


@pytest.mark.parametrize("bound", [10.0, 0.5, None])
def test_a_bound_that_the_user_names_holds_for_every_model(bound, tmp_path):
    made = started(tmp_path, built(HEADS["classes"][0]), rows(of_classes), {"loss_bound": bound})
    made.create_optimizer()
    assert made.private_optimizer.statistics.loss_bound == bound


@pytest.mark.parametrize("task", BOUNDS)
def test_fewer_records_of_a_model_of_classes_are_clipped(task, tmp_path):
    make, labels = HEADS[task]
    made = started(tmp_path, built(make), rows(labels), {"clip_policy": "percentile"})
    made.create_optimizer()
    assert made.private_optimizer.policy.target_clip_rate == (0.9 if BOUNDS[task] == 10.0 else 0.3)


@pytest.mark.parametrize(
    "words", [["--target_clip_rate", "0.9"], ["--target_clip_rate", "0.5"], ["--clipping", "flat"]]
)
def test_a_clip_rate_that_the_user_names_holds_for_every_model(words):
    parse = hf.HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses
    (parsed,) = parse(["--noise_multiplier", "1", *words])
    wanted = float(words[1]) if "rate" in words[0] else 0.9
    assert parsed.engine_options(2)["target_clip_rate"] == parsed.engine_options(None)["target_clip_rate"] == wanted
    (usual,) = parse(["--noise_multiplier", "1"])
    assert usual.engine_options(2)["target_clip_rate"] == 0.3
    assert type(usual.engine_options(None)["target_clip_rate"]) is float  # it goes into checkpoints


def test_many_classes_have_the_bound_of_words_and_copies_keep_their_default():
    settings = PrivacyArguments(noise_multiplier=1.0)
    assert settings.bound_for(50_000) == settings.loss_bound == 10.0
    assert type(settings.bound_for(None)) is float  # it goes into checkpoints, which hold plain types
    assert isinstance(copy.deepcopy(settings).loss_bound, Default)
    (parsed,) = hf.HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses(["--noise_multiplier", "1"])
    assert parsed.bound_for(2) == pytest.approx(4 * math.log(2))
    (parsed,) = hf.HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses(
        ["--noise_multiplier", "1", "--loss_bound", "10"]
    )
    assert parsed.bound_for(2) == 10.0


def test_several_labels_have_the_bound_of_yes_and_no(tmp_path):
    config = hf.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=7,
        problem_type="multi_label_classification",
    )  # fmt: skip
    made = started(tmp_path, hf.BertForSequenceClassification(config), rows(of_classes))
    made.create_optimizer()
    assert made.private_optimizer.statistics.loss_bound == pytest.approx(4 * math.log(2))


# ---------------------------------------------------------------- label smoothing


def fed(labels):
    """Labels, and what the decoder is fed, as ``DataCollatorForSeq2Seq`` adds it."""

    def both(i, ids):
        made = labels(i, ids)
        return {**made, "decoder_input_ids": torch.cat([torch.zeros(1, dtype=torch.long), ids[:-1]])}

    return both


SMOOTHED = {
    "causal": (lambda: llama(hf.LlamaForCausalLM), of_tokens(VOCAB), True),
    "classes": (HEADS["classes"][0], of_classes, False),
    "token classes": (*HEADS["token classes"], False),
    "translation": (HEADS["translation"][0], fed(of_tokens(VOCAB)), False),
}


@pytest.mark.parametrize("kind", SMOOTHED)
def test_smoothed_labels_are_a_mean_over_records(kind, tmp_path):
    make, labels, shift = SMOOTHED[kind]
    model, data = built(make), rows(labels)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    alone, smoother = copy.deepcopy(model), LabelSmoother(epsilon=0.3)
    losses = [0.0] * len(data)
    for i, row in enumerate(data):
        if learns(row):
            inputs = collate([row])
            wanted = inputs.pop("labels")
            loss = smoother(alone(**inputs), wanted, shift_labels=shift)
            loss.backward()
            losses[i] = float(loss.detach())
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad / len(data) for n, p in alone.named_parameters()}
    made = started(tmp_path, model, data, {"loss_bound": 1e3}, label_smoothing_factor=0.3)
    public = made.evaluate(rows(labels, seed=2))
    assert math.isfinite(public["eval_loss"])
    output = made.train()
    compare(moved(model, before), expected)
    assert output.training_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_label_that_is_no_class_is_refused(tmp_path):
    data = rows(lambda i, ids: {"labels": torch.tensor(5)})
    made = started(tmp_path, built(HEADS["classes"][0]), data, label_smoothing_factor=0.3)
    start = weights(made.model)
    with pytest.raises(IndexError, match="out of bounds"):
        made.train()
    assert torch.equal(weights(made.model), start)


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("task", ["classes", "token classes"])
def test_metrics_are_those_of_public_data(task, trained, tmp_path):
    make, labels = HEADS[task]
    model = built(make)
    public = rows(labels, seed=2)

    def accuracy(found):
        right = found.predictions.argmax(-1) == found.label_ids
        return {"accuracy": float(np.mean(right[found.label_ids != -100]))}

    made = started(tmp_path, model, rows(labels), options={"compute_metrics": accuracy}, per_device_eval_batch_size=3)
    if trained:
        made.train()
    metrics = made.evaluate(public)
    model.eval()
    logits = model(**{k: v for k, v in collate(public).items() if k != "labels"}).logits
    wanted = collate(public)["labels"]
    right = (logits.argmax(-1) == wanted)[wanted != -100].double().mean()
    alone = [float(built_like(model)(**collate([row])).loss.detach()) if learns(row) else 0.0 for row in public]
    assert metrics["eval_accuracy"] == pytest.approx(float(right))
    assert metrics["eval_loss"] == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    assert made.predict(public).metrics["test_accuracy"] == pytest.approx(float(right))


def built_like(model):
    """A model of the library with these weights."""
    fresh = type(model)(model.config).double().eval()
    fresh.load_state_dict(model.state_dict())
    return fresh
