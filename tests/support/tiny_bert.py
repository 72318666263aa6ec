"""A folder with a tiny BERT of random weights, and a tokenizer for the words of some texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers


def tiny_bert(folder: Path, texts: Iterable[str]) -> None:
    """Write the model and its tokenizer into ``folder``."""
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)
    made.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(made), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
