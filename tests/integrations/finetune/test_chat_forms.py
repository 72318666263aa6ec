"""The forms of rows: each becomes the same messages, turns of tools are left out and counted, counts stay private."""

import gzip
import json
from codecs import BOM_UTF8

import pytest
import torch
from chat_rows import write
from tiny_chat import byte_tokenizer

from opacus_ac.integrations.finetune import ChatDataset
from opacus_ac.integrations.finetune.chat_data import IGNORE, encode
from opacus_ac.integrations.finetune.chat_files import HUGE, FileFacts, read_dialogues, read_users
from opacus_ac.integrations.finetune.chat_forms import RowFacts, dialogue
from opacus_ac.integrations.finetune.rows import notes

ASKED = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
TOLD = [{"role": "system", "content": "Be kind."}, *ASKED]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Ho"}, {"type": "text", "text": "w?"}]}, ASKED[1]]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
FOUND = {"role": "tool", "content": "3", "tool_call_id": "1"}

FORMS = {
    "messages": ({"messages": ASKED}, ASKED, "messages"),
    "more keys": ({"messages": [{**m, "name": "x", "weight": 1} for m in ASKED], "id": 3}, ASKED, "messages"),
    "parts": ({"messages": PARTS}, ASKED, "messages"),
    "a text as a part": ({"messages": [{"role": "user", "content": ["How?"]}, ASKED[1]]}, ASKED, "messages"),
    "response": ({"prompt": "How?", "response": "So."}, ASKED, "prompt and response"),
    "completion": ({"prompt": "How?", "completion": "So."}, ASKED, "prompt and completion"),
    "completion of messages": ({"prompt": TOLD[:2], "completion": TOLD[2:]}, TOLD, "prompt and completion"),
    "completion of both": ({"prompt": TOLD[:2], "completion": "So."}, TOLD, "prompt and completion"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]},
        ASKED,
        "conversations",
    ),
    "ShareGPT, system turn": (
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "user", "value": "How?"}, {"from": "chatgpt", "value": "So."}]},
        TOLD,
        "conversations",
    ),
    "ShareGPT, system column": (
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]},
        TOLD,
        "conversations",
    ),
    "conversations of roles": ({"conversations": ASKED}, ASKED, "conversations"),
    "messages of ShareGPT": ({"messages": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]}, ASKED, "messages"),
    "Alpaca": ({"instruction": "How?", "input": "", "output": "So."}, ASKED, "instruction and output"),
    "Alpaca, no input": ({"instruction": "How?", "output": "So."}, ASKED, "instruction and output"),
    "Alpaca, input": (
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        [{"role": "user", "content": "Add.\n\n1 + 1"}, {"role": "assistant", "content": "2"}],
        "instruction and output",
    ),
    "Alpaca, input alone": ({"instruction": "", "input": "How?", "output": "So."}, ASKED, "instruction and output"),
    "Alpaca, history and system": (
        {"system": "Be kind.", "history": [["How?", "So."]], "instruction": "Why?", "output": "Thus."},
        [*TOLD, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Thus."}],
        "instruction and output",
    ),
    "Alpaca with its text": ({"instruction": "How?", "output": "So.", "text": "### How? So."}, ASKED, "instruction and output"),
    "text": ({"text": "Once.", "label": 1}, [{"role": "text", "content": "Once."}], "text"),
    "a null beside": ({"messages": None, "prompt": "How?", "response": "So."}, ASKED, "prompt and response"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_each_form_becomes_its_messages(name):
    row, wanted, form = FORMS[name]
    facts = RowFacts()
    assert dialogue(row, facts) == wanted
    assert (facts.form, facts.tools) == (form, 0)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("name", ["response", "completion", "ShareGPT", "Alpaca, input", "text", "messages"])
def test_each_form_in_each_kind_of_file(name, suffix, tmp_path):
    row, wanted, form = FORMS[name]
    facts = FileFacts()
    assert read_dialogues(write(tmp_path / f"a{suffix}", [row, row]), facts) == [wanted, wanted]
    assert (dict(facts.forms), facts.duplicates) == ({form: 2}, 1)


# ---------------------------------------------------------------- tools


TOOLS = {
    "a call and its result": ([ASKED[0], CALL, FOUND, ASKED[1]], ASKED, 2),
    "a call beside a text": ([ASKED[0], {**ASKED[1], "tool_calls": [{"id": "1"}]}], ASKED, 1),
    "no calls": ([ASKED[0], {**ASKED[1], "tool_calls": []}], ASKED, 0),
    "null calls": ([ASKED[0], {**ASKED[1], "tool_calls": None, "function_call": None}], ASKED, 0),
    "a function": ([ASKED[0], {"role": "function", "name": "f", "content": "3"}, ASKED[1]], ASKED, 1),
    "ShareGPT": (
        [{"from": "human", "value": "How?"}, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "3"}, {"from": "gpt", "value": "So."}],
        ASKED,
        2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOOLS)
def test_turns_of_tools_are_left_out_and_counted(name):
    turns, wanted, count = TOOLS[name]
    facts = RowFacts()
    assert dialogue({"messages": turns}, facts) == wanted
    assert facts.tools == count


def test_a_call_at_the_end_is_no_reply():
    with pytest.raises(ValueError, match="last message must be a reply"):
        dialogue({"messages": [ASKED[0], CALL]})


# ---------------------------------------------------------------- rows that are refused


BAD = {
    "no form": ({"a": "b", "c": "d"}, 'The row has "a", "c"'),
    "half a form": ({"prompt": "How?"}, 'The row has "prompt"'),
    "many columns": ({f"c{i}": 1 for i in range(20)}, '"c11", ...'),
    "a case": ({"Messages": ASKED}, 'Did you mean "messages" by "Messages"?'),
    "a role": ({"conversations": [{"from": "alien", "value": "hi"}]}, "from must be one of system, user, assistant, or in"),
    "a null": ({"messages": [ASKED[0], {"role": "assistant", "content": None}]}, 'message 2: "content" must be a string'),
    "no parts": ({"messages": [{"role": "user", "content": []}]}, "must be a string, or a list of parts"),
    "a number in parts": ({"messages": [{"role": "user", "content": [3]}]}, "a part of type 'int' is no text"),
    "a broken history": ({"history": ["a"], "instruction": "a", "output": "b"}, '"history" must be a list of pairs'),
    "a number": ({"instruction": 3, "input": "a", "output": "b"}, "must be strings"),
    "a number as a prompt": ({"prompt": 3, "completion": "b"}, 'message 1: "content" must be a string'),
    "a number as text": ({"text": 3}, '"text" must be a string'),
    "an empty list": ({"conversations": []}, '"conversations" must be a list that is not empty'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_of_no_form_says_what_it_has(name):
    row, words = BAD[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (words are compared below)
        dialogue(row)
    assert words in str(caught.value)


# ---------------------------------------------------------------- files


LINES = "".join(
    json.dumps({"prompt": f"Ü {i}", "response": "So."}, ensure_ascii=False) + "\n" for i in range(3)
).encode()
WANTED = [[{"role": "user", "content": f"Ü {i}"}, ASKED[1]] for i in range(3)]
CSV = "prompt,response\n" + "".join(f"Ü {i},So.\n" for i in range(3))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", BOM_UTF8 + LINES),
        ("a.JSONL", LINES),
        ("a.json", LINES),
        ("a.json", BOM_UTF8 + b"\n [" + LINES.strip().replace(b"\n", b",\n") + b"]"),
        ("a.jsonl", b"[" + LINES.strip().replace(b"\n", b",") + b"]"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.json.gz", gzip.compress(BOM_UTF8 + LINES, mtime=0)),
        ("a.csv", BOM_UTF8 + CSV.encode()),
        ("a.csv.gz", gzip.compress(CSV.replace("\n", "\r\n").encode(), mtime=0)),
    ],
    ids=[
        "marked",
        "upper case",
        "lines of objects",
        "marked array",
        "array on a line",
        "packed",
        "packed, marked",
        "table",
        "packed table",
    ],  # not of the bytes, which name no form
)
def test_ways_to_write_the_same_rows(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_dialogues(tmp_path / name) == WANTED


def test_a_line_of_a_text_is_a_row(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM_UTF8 + "Once. \r\n\n  Üpon\n".encode())
    assert read_dialogues(tmp_path / "a.txt") == [[{"role": "text", "content": t}] for t in ("Once.", "Üpon")]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_huge_row_is_read_and_counted(suffix, tmp_path):
    text = "a" * (HUGE + 1)
    lines = {"jsonl": [json.dumps({"text": text}), '{"text": "b"}'], "csv": ["text", text, "b"]}
    (tmp_path / f"a.{suffix}").write_text("\n".join(lines[suffix]))
    facts = FileFacts()
    assert [len(d[0]["content"]) for d in read_dialogues(tmp_path / f"a.{suffix}", facts)] == [HUGE + 1, 1]
    assert (facts.huge, facts.duplicates) == (1, 0)


def test_a_row_that_two_users_wrote_is_no_duplicate(tmp_path):
    rows = [{"text": "Once.", "user_id": user} for user in ("ann", "bob", "ann")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for count, read in ((1, read_users), (2, read_dialogues)):
        facts = FileFacts()
        read(tmp_path / "a.jsonl", facts=facts)
        assert facts.duplicates == count


def test_counts_are_for_a_terminal_only():
    facts = FileFacts(duplicates=12, huge=7, tools=5)
    facts.forms["text"] = 160
    shown = "\n".join(notes(facts, on_terminal=True))
    for words in (
        "160 private rows were read: 160 as text",
        "12 rows repeat",
        "7 rows have more than 100 kB",
        "5 turns",
    ):
        assert words in shown
    elsewhere = notes(facts, on_terminal=False)
    assert elsewhere == ["turns and calls of tools are left out"]
    assert len(notes(FileFacts(), on_terminal=True)) == 1
    assert notes(FileFacts(duplicates=12, huge=7), on_terminal=False) == []


# ---------------------------------------------------------------- texts as records


def test_a_text_is_tokenised_as_it_is_with_a_label_on_each_token_but_the_first():
    tokenizer = byte_tokenizer()
    row = encode([{"role": "text", "content": "Once."}], tokenizer, 100)
    ids = tokenizer("Once.")["input_ids"]
    assert row["input_ids"].tolist() == [*ids, tokenizer.eos_token_id]
    assert row["labels"].tolist() == [IGNORE, *ids[1:], tokenizer.eos_token_id]
    cut = encode([{"role": "text", "content": "Once."}], tokenizer, 3)
    assert torch.equal(cut["input_ids"], row["input_ids"][:3])
    assert torch.equal(cut["labels"], row["labels"][:3])


def test_a_text_needs_no_chat_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    assert len(ChatDataset([[{"role": "text", "content": "Once."}]], tokenizer, 8)) == 1
    with pytest.raises(ValueError, match="no chat template"):
        ChatDataset([ASKED], tokenizer, 8)


def test_a_template_that_refuses_a_dialogue_is_named():
    """Such as one that wants turns to alternate, where the turn of a tool was left out."""
    tokenizer = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="record 0: the chat template refuses this dialogue: roles must alternate"):
        ChatDataset([ASKED], tokenizer, 8)
