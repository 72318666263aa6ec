"""A folder with a tiny BERT of random weights, and a tokenizer for the words of some texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors


def tiny_bert(folder: Path, texts: Iterable[str]) -> None:
    """Write the model and its tokenizer into ``folder``."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normal, split = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    known = {word for text in texts for word, _ in split.pre_tokenize_str(normal.normalize_str(text))}
    letters = sorted(set("".join(known)))
    # Not by a trainer: it breaks ties by the order of a hash table, so each process would have other tokens.
    entries = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *sorted(known)])
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    words = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normal, split
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)
    made.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(made), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
