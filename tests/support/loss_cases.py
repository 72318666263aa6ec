"""Tiny models with every kind of head, and the labels of their records; the oracle for their losses."""

from __future__ import annotations

import copy
from functools import partial

import torch
import transformers as hf
from torch import nn

LENGTH, VOCAB, RECORDS = 7, 40, 4
ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3,
}  # fmt: skip
DECODER = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3, "use_cache": False, "pad_token_id": 0,
}  # fmt: skip


VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "encoder_stride": 4,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WAV = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8, 8),
       "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
       "mask_time_prob": 0.0, "layerdrop": 0.0}  # fmt: skip


def bert(cls, **changes):
    return cls(hf.BertConfig(**{**ENCODER, **changes}))


def llama(cls, **changes):
    return cls(hf.LlamaConfig(**{**DECODER, **changes}))


def gpt2(cls, **changes):
    shape = {
        "vocab_size": VOCAB,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 32,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return cls(
        hf.GPT2Config(
            **{
                **shape,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
                "summary_first_dropout": 0.0,
                **changes,
            }
        )
    )


def t5():
    return hf.T5ForConditionalGeneration(
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


def deberta(family, **changes):
    config = getattr(hf, f"{family}Config")(**ENCODER, **changes)
    return getattr(hf, f"{family}ForSequenceClassification")(config)


def prophetnet(cls, **changes):
    shape = {
        "vocab_size": VOCAB, "hidden_size": 16, "encoder_ffn_dim": 24, "num_encoder_layers": 1, "num_encoder_attention_heads": 2,
        "decoder_ffn_dim": 24, "num_decoder_layers": 1, "num_decoder_attention_heads": 2, "max_position_embeddings": 32, "init_std": 0.3,
        "activation_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0, "decoder_start_token_id": 1, "use_cache": False,
    }  # fmt: skip
    return cls(hf.ProphetNetConfig(**{**shape, **changes}))


def of_tokens(cut):
    """Labels of one token each; record i has ``i`` of them less, and the last none."""

    def labels(i, ids):
        kept = torch.arange(LENGTH) < (0 if i == RECORDS - 1 else LENGTH - i)
        return {"labels": torch.where(kept, ids % cut, -100)}

    return labels


def of_classes(i, ids):
    return {"labels": torch.tensor([2, 0, -100, 1][i])}


def of_choices(i, ids):
    """Three endings, of which one is right."""
    return {"input_ids": torch.stack([ids, ids.flip(0), (ids * 7) % VOCAB]), **of_classes(i, ids)}


def of_two_endings(i, ids):
    """Words of two endings of one record."""
    labels = of_tokens(VOCAB)(i, ids)["labels"]
    return {"input_ids": torch.stack([ids, ids.flip(0)]), "labels": torch.stack([labels, labels])}


def of_words_and_order(name):
    """Some words of each record, and whether its sentences follow each other."""

    def labels(i, ids):
        return {"labels": torch.where(torch.arange(LENGTH) <= i, ids, -100), name: torch.tensor([0, 1, 1, 0][i])}

    return labels


def of_replaced_tokens(i, ids):
    return {"attention_mask": (torch.arange(LENGTH) < LENGTH - i).long(), "labels": ids % 2}


def floats(i, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def of_images(i, ids):
    return {"input_ids": None, "pixel_values": floats(i, 3, 8, 8), **of_classes(i, ids)}


def of_pixels(i, ids):
    """The last rows of an image are not labelled; of the last image, none."""
    labels = torch.randint(0, 3, (32, 32), generator=torch.Generator().manual_seed(i))
    labels[32 - (32 if i == RECORDS - 1 else 4 * i) :] = 255
    return {"input_ids": None, "pixel_values": floats(i, 3, 32, 32), "labels": labels}


def of_sounds(i, ids):
    mask = (torch.arange(64) < 64 - 4 * i).long()
    return {"input_ids": None, "input_values": floats(i, 64), "attention_mask": mask, **of_classes(i, ids)}


def of_transcripts(i, ids):
    """The last record is silent, which is a transcript, too."""
    labels = torch.tensor([[3, 4, 5], [4, -100, -100], [3, 3, -100], [-100, -100, -100]][i])
    return {**of_sounds(i, ids), "labels": labels}


def wav2vec2(cls, **changes):
    still = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
    }
    return cls(hf.Wav2Vec2Config(**{**WAV, **still, "pad_token_id": 0, "feat_extract_norm": "layer", **changes}))


def two_berts():
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**ENCODER), hf.BertConfig(**ENCODER))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return hf.EncoderDecoderModel(config)


def segformer():
    """Its BatchNorm couples records, so it is replaced."""
    config = hf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], num_attention_heads=[1, 2], decoder_hidden_size=8,
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    model = hf.SegformerForSemanticSegmentation(config)
    model.decode_head.batch_norm = nn.GroupNorm(2, 8)
    return model


def of_spans(i, ids):
    """One answer lies outside of its record."""
    return {"start_positions": torch.tensor([2, 99, 0, 4][i]), "end_positions": torch.tensor([3, 99, 5, 4][i])}


# Labels of record i, and changes of the config.
OF_DEBERTA = {
    "one number": (lambda i, ids: {"labels": torch.tensor(0.5 * i, dtype=torch.float64)}, {"num_labels": 1}),
    "classes": (of_classes, {"num_labels": 3}),
    "probabilities of classes": (lambda i, ids: {"labels": (ids[:3] / ids[:3].sum()).double()}, {"num_labels": 3}),
    "several labels": (
        lambda i, ids: {"labels": (ids[:3] % 2).double()},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
}
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
    **{
        f"{name} of {family}": (partial(deberta, family, **changes), labels)
        for name, (labels, changes) in OF_DEBERTA.items()
        for family in ("Deberta", "DebertaV2")
    },
    "two next words": (lambda: prophetnet(hf.ProphetNetForCausalLM), of_tokens(VOCAB)),
    "two next words, of which one counts, smoothed": (
        lambda: prophetnet(hf.ProphetNetForCausalLM, disable_ngram_loss=True, eps=0.1), of_tokens(VOCAB)),
    "one next word of ProphetNet": (lambda: prophetnet(hf.ProphetNetForCausalLM, ngram=1), of_tokens(VOCAB)),
    "seq2seq, three next words, smoothed": (
        lambda: prophetnet(hf.ProphetNetForConditionalGeneration, ngram=3, eps=0.1), of_tokens(VOCAB)),
    "several numbers": (
        lambda: bert(hf.BertForSequenceClassification, num_labels=3, problem_type="regression"),
        lambda i, ids: {"labels": ids[:3].double() / 10},
    ),
    "several labels": (
        lambda: bert(hf.BertForSequenceClassification, num_labels=3),
        lambda i, ids: {"labels": (ids[:3] % 2).double()},
    ),
    "next sentence": (lambda: bert(hf.BertForNextSentencePrediction), lambda i, ids: {"labels": torch.tensor([0, 1, -100, 1][i])}),
    "choice": (lambda: bert(hf.BertForMultipleChoice), of_choices),
    "choice, positions that are an argument": (lambda: hf.RobertaForMultipleChoice(hf.RobertaConfig(**ENCODER)), of_choices),
    "words of several endings": (lambda: gpt2(hf.GPT2DoubleHeadsModel, num_labels=1), of_two_endings),
    "words and the next sentence": (lambda: bert(hf.BertForPreTraining), of_words_and_order("next_sentence_label")),
    "words and the order of sentences": (
        lambda: hf.AlbertForPreTraining(hf.AlbertConfig(**ENCODER, embedding_size=8, classifier_dropout_prob=0.0)),
        of_words_and_order("sentence_order_label"),
    ),
    "replaced tokens": (lambda: hf.ElectraForPreTraining(hf.ElectraConfig(**ENCODER, embedding_size=8)), of_replaced_tokens),
    "translation": (
        lambda: hf.MarianMTModel(hf.MarianConfig(
            vocab_size=VOCAB, decoder_vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
            encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32, dropout=0.0, attention_dropout=0.0,
            activation_dropout=0.0, init_std=0.3, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)),
        of_tokens(VOCAB),
    ),
    "two models in one": (two_berts, of_tokens(VOCAB)),
    "next color": (lambda: gpt2(hf.ImageGPTForCausalImageModeling), of_tokens(VOCAB)),
    "classes, decoder": (lambda: gpt2(hf.GPT2ForSequenceClassification, num_labels=3, pad_token_id=0), of_classes),
    "classes of entities": (
        lambda: hf.LukeForEntityClassification(hf.LukeConfig(**ENCODER, entity_vocab_size=10, entity_emb_size=8, num_labels=3)),
        lambda i, ids: {"entity_ids": torch.tensor([2]), "entity_position_ids": torch.tensor([[1, 2, -1]]), "labels": ids[:3] % 2},
    ),
    "images": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT, **STILL, num_labels=3)), of_images),
    "pixels": (segformer, of_pixels),
    "sounds": (lambda: wav2vec2(hf.Wav2Vec2ForSequenceClassification, num_labels=3), of_sounds),
    "transcripts": (lambda: wav2vec2(hf.Wav2Vec2ForCTC), of_transcripts),
    "transcripts, by their length": (lambda: wav2vec2(hf.Wav2Vec2ForCTC, ctc_loss_reduction="mean"), of_transcripts),
    "question answering": (lambda: bert(hf.BertForQuestionAnswering), of_spans),
    "question answering, own loss_function": (lambda: llama(hf.LlamaForQuestionAnswering), of_spans),
}  # fmt: skip


def rows(labels, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (RECORDS, LENGTH), generator=generator)
    records = [{"input_ids": ids[i], **labels(i, ids[i])} for i in range(RECORDS)]
    return [{name: value for name, value in record.items() if value is not None} for record in records]


def collate(records):
    return {key: torch.stack([row[key] for row in records]) for key in records[0]}


def learns(row):
    """Whether the labels of a record count at all."""
    ends = [v for k, v in row.items() if k.endswith("_positions")]
    if ends:
        return all(int(v) < LENGTH for v in ends)
    if "input_values" in row and row["labels"].dim():  # silence is a transcript
        return True
    labels = row["labels"]
    return bool(((labels != -100) & (labels != 255)).any())


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
