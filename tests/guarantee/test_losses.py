"""A loss that leaves a transformers model is that of its records, as a loop of batch size 1 has it, or refused: however it is called."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.models.transformers import use_record_loss
from opacus_ac.optimizer.loss_tape import LossTape

pytestmark = pytest.mark.filterwarnings("ignore:noise_generator is seeded", "ignore::FutureWarning")
LENGTH, VOCAB, RECORDS = 7, 40, 4
ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3,
}  # fmt: skip
DECODER = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3, "use_cache": False, "pad_token_id": 0,
}  # fmt: skip


def bert(cls, **changes):
    return cls(hf.BertConfig(**{**ENCODER, **changes}))


def llama(cls, **changes):
    return cls(hf.LlamaConfig(**{**DECODER, **changes}))


def t5():
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCAB,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("relative_attention_bias" not in name)
    return model


def of_tokens(cut):
    """Labels of one token each; record i has ``i`` of them less, and the last none."""

    def labels(i, ids):
        kept = torch.arange(LENGTH) < (0 if i == RECORDS - 1 else LENGTH - i)
        return {"labels": torch.where(kept, ids % cut, -100)}

    return labels


def of_classes(i, ids):
    return {"labels": torch.tensor([2, 0, -100, 1][i])}


def of_spans(i, ids):
    """One answer lies outside of its record."""
    return {"start_positions": torch.tensor([2, 99, 0, 4][i]), "end_positions": torch.tensor([3, 99, 5, 4][i])}


# Model, and the labels of record i. The stock loss of a record alone is the oracle; a record without anything to learn has none.
HEADS = {
    "masked LM": (lambda: bert(hf.BertForMaskedLM), of_tokens(VOCAB)),
    "masked LM, own loss_function": (
        lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
            max_position_embeddings=32, attn_implementation="eager", cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)),
        of_tokens(VOCAB),
    ),
    "token classes": (lambda: bert(hf.BertForTokenClassification, num_labels=3), of_tokens(3)),
    "token classes, own loss_function": (lambda: llama(hf.LlamaForTokenClassification, num_labels=3, classifier_dropout=0.0), of_tokens(3)),
    "causal LM": (lambda: llama(hf.LlamaForCausalLM), of_tokens(VOCAB)),
    "causal LM, labels shifted already": (
        lambda: hf.BartForCausalLM(hf.BartConfig(
            vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_ffn_dim=24, decoder_attention_heads=2, max_position_embeddings=32,
            dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, is_decoder=True, is_encoder_decoder=False)),
        of_tokens(VOCAB),
    ),
    "order of words": (
        lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(
            vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=24, initializer_range=0.3, dropout=0.0)),
        of_tokens(VOCAB),
    ),
    "seq2seq": (t5, of_tokens(VOCAB)),
    "classes": (lambda: bert(hf.BertForSequenceClassification, num_labels=3), of_classes),
    "classes, own loss_function": (lambda: llama(hf.LlamaForSequenceClassification, num_labels=3), of_classes),
    "regression": (
        lambda: bert(hf.BertForSequenceClassification, num_labels=1),
        lambda i, ids: {"labels": torch.tensor(0.5 * i, dtype=torch.float64)},
    ),
    "several numbers": (
        lambda: bert(hf.BertForSequenceClassification, num_labels=3, problem_type="regression"),
        lambda i, ids: {"labels": ids[:3].double() / 10},
    ),
    "several labels": (
        lambda: bert(hf.BertForSequenceClassification, num_labels=3),
        lambda i, ids: {"labels": (ids[:3] % 2).double()},
    ),
    "next sentence": (lambda: bert(hf.BertForNextSentencePrediction), lambda i, ids: {"labels": torch.tensor([0, 1, -100, 1][i])}),
    "question answering": (lambda: bert(hf.BertForQuestionAnswering), of_spans),
    "question answering, own loss_function": (lambda: llama(hf.LlamaForQuestionAnswering), of_spans),
}  # fmt: skip


def rows(labels):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (RECORDS, LENGTH), generator=generator)
    return [{"input_ids": ids[i], **labels(i, ids[i])} for i in range(RECORDS)]


def collate(records):
    return {key: torch.stack([row[key] for row in records]) for key in records[0]}


def learns(row):
    """Whether the labels of a record count at all."""
    ends = [v for k, v in row.items() if k.endswith("_positions")]
    return all(int(v) < LENGTH for v in ends) and (bool(ends) or bool((row["labels"] != -100).any()))


def by_keyword(model, batch):
    return model(**batch).loss


def by_position(model, batch):
    names = list(inspect.signature(model.forward).parameters)
    names = names[: 1 + max(names.index(name) for name in batch)]
    return model(*[batch.get(name) for name in names])[0]


def as_tuple(model, batch):
    return model(**batch, return_dict=False)[0]


def as_tuple_by_config(model, batch):
    model.config.return_dict = False
    return model(**batch)[0]


def with_items(model, batch):
    """As the Trainer tells some models how many labels the step has."""
    takes = (
        "num_items_in_batch" in str(inspect.signature(model.forward))
        or "kwargs" in inspect.signature(model.forward).parameters
    )
    return model(**batch, **({"num_items_in_batch": torch.tensor(9)} if takes else {})).loss


WAYS = [by_keyword, by_position, as_tuple, as_tuple_by_config, with_items]


def built(make):
    torch.manual_seed(0)
    return make().double().train()


def oracle(model, data):
    """Mean over records of the gradient of each alone, by the model as it came."""
    model = copy.deepcopy(model)
    for row in data:
        if learns(row):
            model(**collate([row])).loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad / len(data) for n, p in model.named_parameters()}


def one_step(model, data, loss_of, **options):
    """What a noiseless step whose C nothing reaches moves the weights by."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1e6, "clipping": "flat", "ema_decay": None, **options}
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        data_loader=DataLoader(data, batch_size=len(data), collate_fn=collate), **settings,
    )  # fmt: skip
    for batch in loader:
        optimizer.zero_grad()
        loss_of(private, batch).backward()
        optimizer.step()
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}


def compare(got, wanted, rtol=1e-6):
    scale = max(float(v.abs().max()) for v in wanted.values())
    for name, value in wanted.items():
        assert float((got[name] - value).abs().max()) <= rtol * scale, name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head", HEADS)
def test_the_loss_of_a_known_head_is_the_mean_over_records(head, way):
    make, labels = HEADS[head]
    data = rows(labels)
    try:
        way(built(make), collate(data))
    except AttributeError:
        pytest.skip("the library itself cannot")
    compare(one_step(built(make), data, way), oracle(built(make), data))


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("head", ["token classes", "classes", "question answering, own loss_function"])
def test_in_opacus_modes_too(head, mode):
    make, labels = HEADS[head]
    model, data = built(make), rows(labels)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("key.bias" not in name and "qa_outputs.bias" not in name)  # zero but for rounding
    expected = oracle(model, data)
    compare(one_step(model, data, as_tuple, grad_sample_mode=mode), expected)


@pytest.mark.parametrize("head", HEADS)
def test_in_evaluation_mode_too(head):
    make, labels = HEADS[head]
    model, data = built(make).eval(), rows(labels)
    expected = oracle(model, data)
    use_record_loss(model, LossTape())
    model(**collate(data)).loss.backward()
    compare({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("head", HEADS)
def test_losses_of_records_can_be_released(head):
    """They arrive on the tape once, whatever computes them."""
    make, labels = HEADS[head]
    model, data, tape = built(make), rows(labels), LossTape()
    alone = [float(model(**collate([row])).loss.detach()) if learns(row) else 0.0 for row in data]
    undo = use_record_loss(model, tape)
    loss = model(**collate(data)).loss
    torch.testing.assert_close(tape.take(), torch.tensor(alone), rtol=1e-5, atol=1e-6, check_dtype=False)
    assert float(loss.detach()) == pytest.approx(sum(alone) / len(alone), rel=1e-6)
    undo()
    assert "_loss_function" not in model.__dict__
    assert not model._forward_hooks


@pytest.mark.parametrize("precision", ["autocast", "half"])
@pytest.mark.parametrize("head", HEADS)
def test_in_lower_precision_too(head, precision):
    """What the library computes in bfloat16 is still known for what it is."""
    make, labels = HEADS[head]
    model, batch = built(make).float(), collate(rows(labels))
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    model = model.bfloat16() if precision == "half" else model
    use_record_loss(model, LossTape())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        model(**batch).loss.backward()


@pytest.mark.parametrize("task", ["TOKEN_CLS", "SEQ_CLS", "QUESTION_ANS"])
def test_with_adapters(task):
    """Through the wrapper, whose own forward passes labels on; with a prefix it computes some losses by itself."""
    peft = pytest.importorskip("peft")
    head = {"TOKEN_CLS": "token classes", "SEQ_CLS": "classes", "QUESTION_ANS": "question answering"}[task]
    make, labels = HEADS[head]

    def adapted():
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type=task, r=2, target_modules=["query", "value"], init_lora_weights=False)
        return peft.get_peft_model(make(), config)

    model = built(adapted)
    assert any(p.requires_grad for p in model.parameters())
    compare(one_step(model, rows(labels), as_tuple), oracle(built(adapted), rows(labels)))


# ---------------------------------------------------------------- what is refused


class Weighted(hf.BertForSequenceClassification):
    """Class weights: a record weighs by the classes of the others."""

    def forward(self, input_ids=None, labels=None, return_dict=None, **kwargs):
        logits = super().forward(input_ids).logits
        loss = F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 5.0, 9.0], dtype=logits.dtype))
        return {"loss": loss, "logits": logits} if return_dict is not False else (loss, logits)


class WithPenalty(hf.LlamaForCausalLM):
    """Adds in place to the loss that was made per record."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids, labels=labels)
        output.loss += output.logits.mean().square()
        return output


class OtherName(hf.BertForSequenceClassification):
    """The loss is called something else, and made without labels."""

    def forward(self, input_ids=None, **kwargs):
        logits = super().forward(input_ids).logits
        return {"contrastive_loss": (logits @ logits.T).logsumexp(1).mean(), "logits": logits}


def moe():
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**DECODER, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, head_dim=8)
    )


def clip():
    text = {**ENCODER, "projection_dim": 8, "eos_token_id": 2}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "encoder_stride": 4,
}
WAV = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8, 8),
       "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
       "mask_time_prob": 0.0, "layerdrop": 0.0}  # fmt: skip
IDS = torch.randint(3, VOCAB, (RECORDS, LENGTH), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(RECORDS, 3, 8, 8, generator=torch.Generator().manual_seed(1))
# Model, inputs. Each has a loss that mixes records, or that nobody has looked at.
REFUSED = {
    "class weights": (lambda: bert(Weighted, num_labels=3), {"input_ids": IDS, "labels": torch.tensor([0, 1, 2, 2])}),
    "a term added in place": (lambda: llama(WithPenalty), {"input_ids": IDS, "labels": IDS}),
    "another name": (lambda: bert(OtherName), {"input_ids": IDS}),
    "router loss as an argument": (moe, {"input_ids": IDS, "labels": IDS, "output_router_logits": True}),
    "two losses": (
        lambda: bert(hf.BertForPreTraining),
        {"input_ids": IDS, "labels": IDS, "next_sentence_label": torch.tensor([0, 1, 1, 0])},
    ),
    "negatives in the batch": (clip, {"input_ids": IDS, "pixel_values": PIXELS, "return_loss": True}),
    "masked images": (
        lambda: hf.ViTForMaskedImageModeling(hf.ViTConfig(**VIT)),
        {"pixel_values": PIXELS, "bool_masked_pos": torch.tensor([[1, 0, 1, 0]] * RECORDS).bool()},
    ),
    "masked images, no labels at all": (lambda: hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**VIT, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=8)), {"pixel_values": PIXELS}),
    "CTC": (
        lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**WAV)),
        {"input_values": torch.randn(RECORDS, 64), "labels": torch.tensor([[3, 4, -100]] * RECORDS)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", [{}, {"return_dict": False}], ids=["output", "tuple"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_nobody_has_looked_at_is_refused(name, form):
    """At the forward pass in training; in evaluation mode it may be looked at, and gives no gradient."""
    make, inputs = REFUSED[name]
    if form and name in ("a term added in place", "another name"):
        pytest.skip("has one form")
    torch.manual_seed(0)
    model = make().train()
    use_record_loss(model, LossTape())
    with pytest.raises(ValueError, match="not known to be a mean over records"):
        model(**inputs, **form)
    output = model.eval()(**inputs, **form)
    loss = output[0] if form else next(v for k, v in output.items() if "loss" in k)
    assert torch.isfinite(loss)
    with pytest.raises(ValueError, match="not known to be a mean over records"):
        loss.backward()
    with torch.no_grad():
        assert torch.isfinite(model(**inputs, **form)[0] if form else loss)


@pytest.mark.parametrize("name", ["router loss as an argument", "two losses", "negatives in the batch"])
def test_nothing_is_refused_without_a_loss(name):
    make, inputs = REFUSED[name]
    model = make().train()
    use_record_loss(model, LossTape())
    output = model(**{k: v for k, v in inputs.items() if k in ("input_ids", "pixel_values")})
    next(v for v in output.values() if isinstance(v, torch.Tensor)).sum().backward()


def test_a_loss_function_of_ones_own_is_looked_at_and_not_replaced():
    """It stays where it is what the library computes, and is refused otherwise."""
    model = llama(hf.LlamaForCausalLM)
    batch = collate(rows(of_tokens(VOCAB)))
    weights = torch.linspace(1, 5, VOCAB)

    def weighted(logits, labels, **kwargs):
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), weight=weights)

    model.loss_function = weighted
    use_record_loss(model, LossTape())
    with pytest.raises(ValueError, match="not known to be a mean over records"):
        model.train()(**batch)
    assert model.loss_function is weighted


def test_models_inside_models_are_watched():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bert(hf.BertForMaskedLM)

        def forward(self, ids, labels):
            return by_position(self.inner, {"input_ids": ids, "labels": labels})

    data = rows(of_tokens(VOCAB))
    model = built(Both)
    expected = oracle(model.inner, data)
    moved = one_step(model, data, lambda m, b: m(b["input_ids"], b["labels"]))
    compare({n.removeprefix("inner."): v for n, v in moved.items()}, expected)


def test_a_loss_that_two_kinds_of_heads_have_is_refused_until_one_has_told():
    """Equal logits give every position the same loss, shifted labels or not; the gradients differ."""
    model = HEADS["causal LM, labels shifted already"][0]().double().train()
    use_record_loss(model, LossTape())
    head = model.lm_head.weight.detach().clone()
    batch = {"input_ids": IDS, "labels": IDS}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(ValueError, match="not known to be a mean over records"):
        model(**batch)
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    assert model(**batch).loss.requires_grad
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert model(**batch).loss.requires_grad
