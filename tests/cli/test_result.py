"""``opacus-ac chat``, ``generate``, ``merge`` and ``evaluate`` on what a run has left."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from checkout import ROOT
from tiny_finetune import chat_place, command, loud_copy
from tiny_models import opacus_table_restored
from transformers import AutoModelForCausalLM

from opacus_ac import cli
from opacus_ac.integrations.trained import load_run
from opacus_ac.integrations.trained.replies import ReplyOptions, chat_ids, write_reply

SHORT = ["--max-new-tokens", "8"]
PROMPT = "How are you?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return chat_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """A finished run with LoRA and public data."""
    folder = tmp_path_factory.mktemp("run")
    options = {"report_to": "none", "validation_file": place / "public.jsonl", "evaluation_is_public": True}
    with opacus_table_restored():
        assert cli.main(command(place, folder / "plain", **options)) == 0
    return loud_copy(folder / "plain", folder / "out")


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A finished run on all weights."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with opacus_table_restored():
        assert cli.main(command(place, out, full=True, max_steps=2, report_to="none")) == 0
    return out


def spoken(capsys, *words):
    code = cli.main([*map(str, words)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def said(model, tokenizer, prompt=PROMPT):
    ids = chat_ids([{"role": "user", "content": prompt}], tokenizer)
    return write_reply(model.eval(), tokenizer, ids, ReplyOptions(max_new_tokens=8))


# ---------------------------------------------------------------- generate


def test_a_reply_is_that_of_the_adapters_and_beside_it_that_of_the_base(place, run, capsys):
    tokenizer = load_run(run).tokenizer
    base = said(AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32), tokenizer)
    reply = spoken(capsys, "generate", run, PROMPT, *SHORT).rstrip("\n")
    found = json.loads(spoken(capsys, "generate", run, PROMPT, *SHORT, "--compare", "--format", "json"))
    assert found == {"prompt": PROMPT, "reply": reply, "before": base}
    assert reply != base


def test_a_prompt_may_come_from_the_standard_input(run, capsys, monkeypatch):
    wanted = spoken(capsys, "generate", run, PROMPT, *SHORT)
    for words in (["generate", run], ["generate", run, "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))
        assert spoken(capsys, *words, *SHORT) == wanted


def test_plain_text_is_continued_without_a_template(run, capsys):
    loaded = load_run(run)
    ids = loaded.tokenizer("Once")["input_ids"]
    wanted = write_reply(loaded.model, loaded.tokenizer, ids, ReplyOptions(max_new_tokens=8))
    assert spoken(capsys, "generate", run, "Once", "--plain", *SHORT) == f"{wanted}\n"


def test_all_weights_and_a_checkpoint(place, whole, run, capsys):
    found = json.loads(spoken(capsys, "generate", whole, PROMPT, *SHORT, "--compare", "--format", "json"))
    tokenizer = load_run(whole).tokenizer
    assert found["before"] == said(AutoModelForCausalLM.from_pretrained(place / "model"), tokenizer)
    assert found["reply"] == said(AutoModelForCausalLM.from_pretrained(whole), tokenizer)
    assert cli.main(["generate", str(run / "checkpoint-8"), PROMPT, *SHORT]) == 0


def test_of_a_run_that_is_not_finished_the_newest_checkpoint_speaks(run, tmp_path, capsys):
    out = shutil.copytree(run, tmp_path / "out")
    (out / "adapter_model.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-10")
    wanted = spoken(capsys, "generate", out / "checkpoint-8", PROMPT, *SHORT)
    assert cli.main(["generate", str(out), PROMPT, *SHORT]) == 0
    captured = capsys.readouterr()
    assert captured.out == wanted
    assert f"its checkpoint {out / 'checkpoint-8'}" in captured.err


# ---------------------------------------------------------------- chat


def test_a_chat_goes_on_and_compares_with_the_base(place, run, capsys, monkeypatch):
    both = json.loads(spoken(capsys, "generate", run, PROMPT, *SHORT, "--compare", "--format", "json"))
    lines = ["/base", PROMPT, "/base", "/what", "/new", PROMPT, "", "/quit", "never said"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert cli.main(["chat", str(run), "--temperature", "0", *SHORT]) == 0
    captured = capsys.readouterr()
    assert "write a message first" in captured.err
    assert captured.err.count("/quit") == 2  # at the start, and after /what
    printed = captured.out
    assert printed.count(both["reply"]) == 2
    assert printed.count(both["before"]) == 1
    assert printed.index(both["reply"]) < printed.index(both["before"]) < printed.rindex(both["reply"])


def test_a_chat_ends_with_its_input_and_may_have_a_system_message(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))
    assert cli.main(["chat", str(run), "--system", "Be kind.", "--temperature", "0", *SHORT]) == 0
    loaded = load_run(run)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": PROMPT}]
    ids = chat_ids(messages, loaded.tokenizer)
    assert write_reply(loaded.model, loaded.tokenizer, ids, ReplyOptions(8)) in capsys.readouterr().out


# ---------------------------------------------------------------- merge


def test_a_merged_model_needs_neither_adapters_nor_base(run, tmp_path, capsys):
    merged = tmp_path / "merged"
    spoken(capsys, "merge", run, merged)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert said(model, load_run(run).tokenizer) == spoken(capsys, "generate", run, PROMPT, *SHORT).rstrip("\n")
    assert spoken(capsys, "generate", merged, PROMPT, *SHORT) == spoken(capsys, "generate", run, PROMPT, *SHORT)
    assert not (merged / "adapter_config.json").exists()
    card = (merged / "README.md").read_text()
    assert "merged into the base model" in card
    assert "library_name: transformers" in card
    assert json.loads((merged / "privacy_report.json").read_text())["epsilon"] <= 8


def test_what_cannot_be_merged_is_refused(run, whole, tmp_path, capsys):
    assert cli.main(["merge", str(whole), str(tmp_path / "out")]) == cli.BAD_USAGE
    assert "no adapters to merge" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert cli.main(["merge", str(run), str(tmp_path / "full")]) == cli.BAD_USAGE
    assert "not an empty folder" in capsys.readouterr().err


# ---------------------------------------------------------------- evaluate


def test_the_loss_on_public_data_is_that_of_the_run(place, run, capsys):
    plain = run.parent / "plain"
    words = ["evaluate", plain, "--data", place / "public.jsonl", "--evaluation-is-public"]
    found = json.loads(spoken(capsys, *words, "--format", "json"))
    assert found["after"]["records"] == 6
    [loss] = re.findall(r"^\* loss: (\S+)$", (plain / "README.md").read_text(), re.MULTILINE)
    assert found["after"]["mean"] == pytest.approx(float(loss), abs=2e-2)  # the base may be in bfloat16
    assert found["before"]["mean"] != found["after"]["mean"]
    text = spoken(capsys, *words)
    assert re.search(r"^after +\d\.\d{3} ± \d\.\d{3}$", text, re.MULTILINE)


def same(place, tmp_path):
    return place / "chats.jsonl"


def linked(place, tmp_path):
    os.link(place / "chats.jsonl", tmp_path / "other.jsonl")
    return tmp_path / "other.jsonl"


def copied(place, tmp_path):
    return shutil.copy(place / "chats.jsonl", tmp_path / "copy.jsonl")


def one_row(place, tmp_path):
    row = (place / "chats.jsonl").read_text().splitlines()[17]
    (tmp_path / "mixed.jsonl").write_text((place / "public.jsonl").read_text() + row + "\n")
    return tmp_path / "mixed.jsonl"


@pytest.mark.parametrize("file", [same, linked, copied, one_row])
def test_private_data_are_not_evaluated_on(file, place, run, tmp_path, capsys):
    assert cli.main(["evaluate", str(run), "--data", str(file(place, tmp_path)), "--evaluation-is-public"]) == 2
    captured = capsys.readouterr()
    assert "is not public: " in captured.err
    assert captured.out == ""


def test_data_are_public_by_word_and_by_comparison(place, run, tmp_path, capsys):
    out = shutil.copytree(run, tmp_path / "out")
    (out / "_local_paths.json").unlink()  # as on another machine
    (out / "checkpoint-8" / "_local_paths.json").unlink()
    (out / "checkpoint-10" / "_local_paths.json").unlink()
    words = ["evaluate", str(out), "--data", str(place / "public.jsonl")]
    assert cli.main(words) == 2
    assert "--evaluation-is-public" in capsys.readouterr().err
    words.append("--evaluation-is-public")
    assert cli.main(words) == 2
    assert "--train-file" in capsys.readouterr().err
    words += ["--base", str(place / "model")]
    assert cli.main([*words, "--unchecked"]) == 0
    assert cli.main([*words, "--train-file", str(place / "chats.jsonl")]) == 0
    private = ["evaluate", str(out), "--data", str(one_row(place, tmp_path)), *words[4:]]
    capsys.readouterr()
    assert cli.main([*private, "--train-file", str(place / "chats.jsonl")]) == 2
    assert "1 of its rows" in capsys.readouterr().err


# ---------------------------------------------------------------- in Python


def test_the_code_of_the_page_on_the_command_line(run, monkeypatch):
    """docs/command-line.md"""
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(run.parent)
    scope = {}
    exec(code, scope)
    loaded = scope["run"]
    trained = said(loaded.model, loaded.tokenizer)
    with loaded.base() as base:
        assert said(base, loaded.tokenizer) != trained
    assert said(loaded.model, loaded.tokenizer) == trained


# ---------------------------------------------------------------- what cannot be done


def test_a_base_that_moved_has_to_be_named(place, run, tmp_path, capsys):
    out = shutil.copytree(run, tmp_path / "out")
    for path in out.rglob("_local_paths.json"):
        path.write_text(json.dumps({"base_model": str(tmp_path / "gone")}))
    assert cli.main(["generate", str(out), PROMPT, *SHORT]) == 2
    error = capsys.readouterr().err
    assert "local folder 'model'" in error
    assert "--base" in error
    wanted = spoken(capsys, "generate", run, PROMPT, *SHORT)
    assert spoken(capsys, "generate", out, PROMPT, *SHORT, "--base", place / "model") == wanted


def nothing(run, tmp_path):
    (tmp_path / "nothing").mkdir()
    return tmp_path / "nothing"


def only_a_ledger(run, tmp_path):
    folder = nothing(run, tmp_path)
    shutil.copy(run / "privacy.ledger", folder)
    return folder


def classifier(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "classifier", ignore=shutil.ignore_patterns("adapter*", "checkpoint-*"))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})
    )
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def untemplated(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    return folder


REFUSED = {
    "no folder": (lambda run, tmp_path: tmp_path / "gone", "does not exist"),
    "a file": (lambda run, tmp_path: run / "README.md", "is a file"),
    "nothing": (nothing, "has no model"),
    "a ledger alone": (only_a_ledger, "--resume_from_checkpoint last"),
    "a classifier": (classifier, "LlamaForSequenceClassification, which writes no text"),
    "no template": (untemplated, "--plain"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_speak_is_one_line(case, run, tmp_path, capsys):
    folder, message = REFUSED[case]
    assert cli.main(["generate", str(folder(run, tmp_path)), PROMPT, *SHORT]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--max-new-tokens", "0"], "--max-new-tokens"), (["--temperature", "-1"], "--temperature")],
)
def test_numbers_out_of_range_are_named(words, message, run, capsys):
    assert cli.main(["generate", str(run), PROMPT, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_none_is_refused_without_torch():
    for words in (["chat", "gone"], ["generate", "gone", "Hi"], ["merge", "gone", "x"], ["report", "gone"]):
        code = f"import sys; from opacus_ac.cli import main; assert main({words!r}) == 2; assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
