"""Local files of dialogues: the three kinds, errors by line, and no copy of private rows on disk."""

import os
import subprocess
import sys

import pytest
from chat_rows import write
from checkout import ROOT

from opacus_ac.integrations.finetune import chat_files

CHAT = [{"role": "user", "content": 'Hi, "there"\nyou'}, {"role": "assistant", "content": "Hello, ünïcode"}]
TWO = [*CHAT, {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Any time"}]
PAIR = {"prompt": "How?", "response": "So."}
AS_MESSAGES = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]

KINDS = [".csv", ".json", ".jsonl", ".parquet"]


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([{"messages": CHAT, "user": "a"}, {"messages": TWO, "user": "b"}], [CHAT, TWO]),
        ([{**PAIR, "note": "x"}, {**PAIR, "note": "y"}], [AS_MESSAGES, AS_MESSAGES]),
    ],
)
def test_each_kind_of_file(suffix, rows, wanted, tmp_path):
    assert chat_files.read_dialogues(write(tmp_path / f"mails{suffix}", rows)) == wanted


@pytest.mark.parametrize("suffix", KINDS)
def test_a_bad_row_is_named_by_file_and_line(suffix, tmp_path):
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}]
    # JSON lines with a blank one between; in CSV each row ends on the line on which it starts; Parquet and arrays count rows.
    line = {".jsonl": 3, ".csv": 3, ".parquet": 2, ".json": 2}[suffix]
    path = write(tmp_path / f"mails{suffix}", rows)
    with pytest.raises(ValueError, match="last message must be a reply") as caught:
        chat_files.read_dialogues(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.zip", b"hi", "a.zip: no known kind of file: give .csv, .json, .jsonl, .parquet, .txt"),
        ("a.jsonl", b"\n\n", "a.jsonl: no dialogues in this file"),
        ("a.jsonl", b'\n{"messages": "\xff"}', "a.jsonl:2: not UTF-8: invalid start byte at byte 15"),
        ("a.csv", b"", "a.csv: no dialogues in this file"),
        ("a.csv", b"prompt,response\n", "a.csv: no dialogues in this file"),
        ("a.csv", b"note\nhi\n", 'a.csv:2: "messages" is missing'),
        ("a.csv", b"prompt,response\na,b\nc\n", "a.csv:3: this row has another number of fields"),
        ("a.csv", b"prompt,response\na,b\nc,d,e\n", "a.csv:3: this row has another number of fields"),
        ("a.csv", b'prompt,response\n"a\nb",c\nd,\n"e', "a.csv:5: not valid CSV in UTF-8: unexpected end"),
        ("a.csv", b"prompt,response\na,\xff\n", "not valid CSV in UTF-8"),
        ("a.csv", b'messages\n"{broken"\n', "a.csv:2: not valid JSON"),
        ("a.parquet", b"no parquet", "a.parquet:1: not valid Parquet"),
    ],
)
def test_broken_files(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="a\\.") as caught:
        chat_files.read_dialogues(tmp_path / name)
    assert words in str(caught.value)


def test_a_null_in_parquet_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", [PAIR, {"prompt": None, "response": "b"}])
    with pytest.raises(ValueError, match=r'a.parquet:2: message 1: "content" must be a string'):
        chat_files.read_dialogues(path)


def test_reading_leaves_no_copy_and_loads_no_torch(tmp_path):
    """In a process of its own whose home and cache are watched: only the file itself is there afterwards."""
    for suffix in KINDS:
        write(tmp_path / f"mails{suffix}", [PAIR])
    code = """
import sys
from opacus_ac.integrations.finetune.chat_files import read_dialogues
for suffix in ("jsonl", "json", "csv", "parquet"):
    assert read_dialogues(f"mails.{suffix}")[0][1]["content"] == "So."
assert not {"torch", "datasets", "opacus"} & set(sys.modules)
"""
    home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, **home})
    assert {p.name for p in tmp_path.rglob("*")} == {f"mails{suffix}" for suffix in KINDS}


def test_the_datasets_library_needs_a_cache_of_its_own(tmp_path):
    """It keeps a copy even with keep_in_memory=True: that is why ours does not use it, and what the folder is for."""
    from datasets import load_dataset

    path = write(tmp_path / "mails.jsonl", [PAIR])
    cache = chat_files.private_cache_dir(tmp_path / "out")
    load_dataset("json", data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True)
    (copy,) = (tmp_path / "out" / "private_cache").rglob("*.arrow")
    assert b"How?" in copy.read_bytes()
    assert os.stat(cache).st_mode & 0o777 == 0o700
    assert chat_files.private_cache_dir(tmp_path / "out") == cache
    os.chmod(cache, 0o750)
    with pytest.raises(ValueError, match="mode 750"):
        chat_files.private_cache_dir(tmp_path / "out")
