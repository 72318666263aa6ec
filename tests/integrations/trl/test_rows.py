"""Token rows are those that TRL makes, and tell nothing while they are made."""

import copy
import json

import pytest

pytest.importorskip("trl")
import tiny_trl
import torch
from datasets import Dataset
from tiny_chat import byte_tokenizer, chat_model
from tiny_trl import said, text
from trl import DPOConfig, DPOTrainer, SFTTrainer

from opacus_ac.integrations.trl.dpo import PairCollate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def plain_texts(count):
    return [{"text": text(i)} for i in range(count)]


def from_value(count):
    return [
        {"conversations": [{"from": "user", "value": text(i)}, {"from": "assistant", "value": text(2 * i, 1)}]}
        for i in range(count)
    ]


def tokenised(count):
    return [{"input_ids": list(range(3, 9 + i)), "completion_mask": [0, 0, 0] + [1] * (3 + i)} for i in range(count)]


def with_labels(count):
    return [{"input_ids": list(range(3, 9 + i)), "labels": [-100, *range(4, 9 + i)]} for i in range(count)]


SFT = {
    "text": (plain_texts, {}),
    "another column": (lambda n: [{"body": text(i)} for i in range(n)], {"dataset_text_field": "body"}),
    "dialogues": (tiny_trl.dialogues, {}),
    "replies only": (tiny_trl.dialogues, {"assistant_only_loss": True}),
    "from and value": (from_value, {}),
    "completions": (tiny_trl.completions, {}),
    "completions with prompts": (tiny_trl.completions, {"completion_only_loss": False}),
    "prompted dialogues": (tiny_trl.prompted, {}),
    "prompted replies only": (tiny_trl.prompted, {"assistant_only_loss": True}),
    "tokenised": (tokenised, {"completion_only_loss": True}),
    "labelled": (with_labels, {}),
    "cut": (tiny_trl.dialogues, {"max_length": 24}),
    "cut at the start": (tiny_trl.dialogues, {"max_length": 24, "truncation_mode": "keep_end"}),
    "whole": (tiny_trl.dialogues, {"max_length": None}),
}


@pytest.mark.parametrize("kind", SFT)
def test_rows_of_sft_are_those_of_trl(kind, tmp_path):
    made, changes = SFT[kind]
    records, tokenizer = made(12), byte_tokenizer(tiny_trl.MARKED)
    before = json.dumps(records)
    ours = tiny_trl.sft(tmp_path, data=records, tokenizer=tokenizer, **changes)
    peer = SFTTrainer(
        chat_model(tokenizer), tiny_trl.arguments(tmp_path, **changes), train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )  # fmt: skip
    wanted = [{name: row[name] for name in ("input_ids", "labels")} for row in peer.train_dataset]
    assert [ours.train_dataset[i] for i in range(12)] == wanted
    assert json.dumps(records) == before


def test_a_dataset_of_the_library_is_as_good_as_a_list(tmp_path):
    records = tiny_trl.dialogues(12)
    ours, same = (tiny_trl.sft(tmp_path, data=data) for data in (records, Dataset.from_list(records)))
    assert ours.train_dataset.rows == same.train_dataset.rows


def test_a_formatted_text_is_the_record(tmp_path):
    records, tokenizer = tiny_trl.dialogues(12), byte_tokenizer(tiny_trl.MARKED)
    formatted = lambda row: "> " + row["messages"][0]["content"]  # noqa: E731
    ours = tiny_trl.sft(tmp_path, data=records, tokenizer=tokenizer, options={"formatting_func": formatted})
    wanted = tokenizer("> tea 0" + tokenizer.eos_token)["input_ids"]
    assert ours.train_dataset[0] == {"input_ids": wanted, "labels": wanted}


def implicit(count):
    return [
        {"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in tiny_trl.pairs(count)
    ]


def text_pairs(count):
    return [{"prompt": text(i), "chosen": " " + text(i, 1), "rejected": " " + text(2 * i, 2)} for i in range(count)]


@pytest.mark.parametrize("made", [tiny_trl.pairs, implicit, text_pairs])
def test_rows_and_batches_of_dpo_are_those_of_trl(made, tmp_path):
    records, tokenizer = made(12), byte_tokenizer(tiny_trl.MARKED)
    ours = tiny_trl.dpo(tmp_path, data=records, tokenizer=tokenizer)
    peer = DPOTrainer(
        chat_model(tokenizer), args=tiny_trl.arguments(tmp_path, DPOConfig), peft_config=tiny_trl.lora(),
        train_dataset=Dataset.from_list(records), processing_class=tokenizer,
    )  # fmt: skip
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    wanted = [{name: row[name] for name in names} for row in peer.train_dataset]
    assert [ours.train_dataset[i] for i in range(12)] == wanted
    pairs, rows = ours.data_collator(wanted[:3]), peer.data_collator(wanted[:3])
    assert isinstance(ours.data_collator, PairCollate)
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(torch.cat([pairs[name][:, 0], pairs[name][:, 1]]), rows[name])


def test_a_record_without_a_label_stays(tmp_path):
    """TRL drops it, and the number of records would tell."""
    records = [*tiny_trl.prompted(7), {"prompt": [said("user", "x" * 90)], "completion": [said("assistant", "y")]}]
    ours = tiny_trl.sft(tmp_path, data=records, per_device_train_batch_size=1)
    assert len(ours.train_dataset) == 8
    assert set(ours.train_dataset[7]["labels"]) == {-100}
    ours.train()
    pairs = [*tiny_trl.pairs(7), {**tiny_trl.pairs(1)[0], "prompt": [said("user", "x" * 90)]}]
    made = tiny_trl.dpo(tmp_path, data=pairs, per_device_train_batch_size=1)
    assert len(made.train_dataset) == 8
    made.train()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "user", "content": "a secret"}]}, "record 3: no token is the assistant's"),
        ({"messages": 17}, "record 3 with messages is not of the expected format"),
        ({"secret": "a secret"}, "record 3 with secret is not of the expected format"),
        ({"messages": [{"role": "user"}, "a secret"]}, "record 3 with messages is not of the expected format"),
    ],
)
def test_a_bad_record_is_named_by_its_number_and_not_quoted(record, reason, tmp_path):
    with pytest.raises(ValueError, match=reason) as caught:
        tiny_trl.sft(tmp_path, data=[*tiny_trl.dialogues(3), record], assistant_only_loss=True)
    assert "a secret" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_the_tokenizer_does_not_print_how_long_a_record_is(tmp_path, capfd, caplog):
    tokenizer = byte_tokenizer(tiny_trl.MARKED)
    tokenizer.model_max_length = 8
    records = [*tiny_trl.dialogues(6), *tiny_trl.dialogues(1)]
    for data in (records, tiny_trl.completions(6)):
        tiny_trl.sft(tmp_path, data=data, tokenizer=copy.deepcopy(tokenizer))
    tiny_trl.dpo(tmp_path, tokenizer=copy.deepcopy(tokenizer))
    told = "".join(capfd.readouterr()) + caplog.text
    assert "maximum sequence length" not in told


def test_nothing_of_a_record_is_in_the_cache_of_datasets(tmp_path, monkeypatch):
    stored = Dataset.from_list(tiny_trl.dialogues(20))
    stored.save_to_disk(tmp_path / "data")
    opened = Dataset.load_from_disk(tmp_path / "data")
    before = sorted(path.name for path in (tmp_path / "data").rglob("*"))
    tiny_trl.sft(tmp_path / "run", data=opened).train()
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == before
