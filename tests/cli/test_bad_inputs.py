"""Bad input to ``opacus-ac finetune``: exit code and remedy of each, and that nothing large was imported to say so."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from checkout import ROOT

PAIR = '{"prompt": "How?", "response": "So."}\n'
RUN = {"train_file": "chats.jsonl", "output_dir": "out", "target_epsilon": "8"}

# Name: what the options of RUN are changed to (None: left out), exit code, and the sentence that names the remedy.
BAD = {
    # ---- paths
    "no such file": ({"train_file": "nowhere.jsonl"}, 3, "--train_file nowhere.jsonl: there is no such file"),
    "nearly its name": ({"train_file": "chat.jsonl"}, 3, "did you mean chats.jsonl?"),
    "no such folder": ({"train_file": "where/chats.jsonl"}, 3, "no folder where"),
    "a folder": ({"train_file": "empty"}, 3, "--train_file empty is a folder: name the file in it"),
    "no such public file": (
        {"validation_file": "nowhere.jsonl", "evaluation_is_public": "true"},
        3,
        "--validation_file nowhere.jsonl: there is no such file",
    ),
    "the private file as the public one": (
        {"validation_file": "../place/chats.jsonl", "evaluation_is_public": "true"},
        3,
        "is not public: ../place/chats.jsonl is the private file chats.jsonl",
    ),
    "the output is a file": ({"output_dir": "chats.jsonl"}, 2, "--output_dir chats.jsonl is a file: name a folder"),
    "the output is below a file": ({"output_dir": "chats.jsonl/out"}, 2, "because chats.jsonl is a file"),
    "a folder that cannot be written": ({"output_dir": "{forbidden}/out"}, 2, "choose another folder, or change its"),
    "a run is there": ({"output_dir": "run"}, 2, "holds a run already: go on with --resume_from_checkpoint last"),
    "no such checkpoint": ({"resume_from_checkpoint": "out/checkpoint-3"}, 2, "out has no checkpoint, leave the"),
    "another checkpoint": (
        {"output_dir": "run", "resume_from_checkpoint": "run/checkpoint-3"},
        2,
        "there is no such folder: there are run/checkpoint-8",
    ),
    "the ledger is a folder": ({"ledger": "empty"}, 2, "--ledger empty is a folder: name a file in it"),
    "the ledger is garbage": ({"ledger": "chats.jsonl"}, 3, "chats.jsonl:1: "),
    "no such configuration": ({"config": "nowhere.yaml"}, 2, "--config nowhere.yaml: there is no such file"),
    # ---- numbers
    "epsilon 0": ({"target_epsilon": "0"}, 2, "--target_epsilon must be a finite number > 0, got 0.0"),
    "epsilon below 0": ({"target_epsilon": "-1"}, 2, "--target_epsilon must be a finite number > 0, got -1.0"),
    "epsilon nan": ({"target_epsilon": "nan"}, 2, "--target_epsilon must be a finite number > 0, got nan"),
    "epsilon in words": ({"target_epsilon": "eight"}, 2, "--target_epsilon"),
    "delta 0": ({"target_delta": "0"}, 2, "--target_delta must lie between 0 and 1, well below 1 / N"),
    "delta 1": ({"target_delta": "1"}, 2, "--target_delta must lie between 0 and 1, well below 1 / N"),
    "noise below 0": ({"target_epsilon": None, "noise_multiplier": "-1"}, 2, "--noise_multiplier must be a finite"),
    "no steps": ({"max_steps": "0"}, 2, "--max_steps must be at least 1, got 0"),
    "steps in words": ({"max_steps": "many"}, 2, "--max_steps"),
    "no batch": (
        {"per_device_train_batch_size": "0"},
        2,
        "--per_device_train_batch_size 0 must be a whole number >= 1",
    ),
    "half a batch": ({"gradient_accumulation_steps": "0.5"}, 2, "--gradient_accumulation_steps"),
    "a batch beyond N": ({"gradient_accumulation_steps": "9"}, 2, "lower --gradient_accumulation_steps (now 9)"),
    "a clip rate": ({"target_clip_rate": "3"}, 2, "--target_clip_rate must lie strictly between 0 and 1, got 3.0"),
    "a rate in words": ({"learning_rate": "fast"}, 2, "must be a number or 'auto', got 'fast'"),
    "adapters of rank 0": ({"lora_r": "0"}, 2, "--lora_r must be at least 1, got 0"),
    "one token": ({"max_length": "1"}, 2, "--max_length must be at least 2, got 1"),
    # ---- options
    "no target": ({"target_epsilon": None}, 2, "give --target_epsilon, or --noise_multiplier"),
    "both targets": ({"noise_multiplier": "1"}, 2, "give either --target_epsilon or --noise_multiplier"),
    "no file": ({"train_file": None}, 2, "--train_file is missing"),
    "no output": ({"output_dir": None}, 2, "--output_dir is missing"),
    "misspelt": ({"target_eps": "8"}, 2, "there is no option --target_eps: did you mean --target_epsilon?"),
    "misspelt with dashes": ({"max-step": "8"}, 2, "there is no option --max-step: did you mean --max_steps?"),
    "misspelt of the Trainer": ({"warmup_step": "8"}, 2, "did you mean --warmup_steps?"),
    "misspelt beyond help": ({"xyzzy": "8"}, 2, "there is no option --xyzzy. --help-all lists all options"),
    "misspelt in a file": ({"config": "run.yaml"}, 2, "run.yaml: there is no option 'target_epsilom': did you mean"),
    "truth": ({"lr_control": "perhaps"}, 2, "must be true or false, got 'perhaps'"),
    "public data that are not said to be": ({"validation_file": "public.jsonl"}, 2, "say --evaluation_is_public"),
    "a reporter that is not installed": ({"report_to": "wandb"}, 2, "pip install wandb, or --report_to none"),
    "a misspelt reporter": ({"report_to": "tensorbord"}, 2, "did you mean tensorboard?"),
    "a push without the hub": ({"push_to_hub": "true"}, 2, "--push_to_hub needs the hub, and HF_HUB_OFFLINE is set"),
    "another epsilon on resume": (
        {"output_dir": "run", "resume_from_checkpoint": "last", "target_epsilon": "4"},
        2,
        "the run was started with --target_epsilon 8, and not 4: resume with the same options",
    ),
    # ---- models
    "no such model folder": ({"model_name_or_path": "./nowhere"}, 5, "cannot load the model './nowhere': there is no"),
    "a model that is a file": ({"model_name_or_path": "chats.jsonl"}, 5, "it is a file: name the folder of a model"),
    "an empty model folder": ({"model_name_or_path": "empty"}, 5, "the folder has no config.json"),
    "no tokenizer": ({"model_name_or_path": "bare"}, 5, "the folder has no tokenizer"),
    "adapters alone": ({"model_name_or_path": "adapters"}, 5, "merge them with opacus-ac merge adapters"),
    "the hub, offline": ({"model_name_or_path": "some/model"}, 5, "HF_HUB_OFFLINE is set: name the folder of a model"),
}

# Name of a file, its content, and the sentence.
FILES = {
    "empty": ("a.jsonl", b"", "a.jsonl: no dialogues in this file"),
    "blank lines": ("a.jsonl", b"\n \n", "a.jsonl: no dialogues in this file"),
    "broken JSON": ("a.jsonl", PAIR.encode() + b'{"prompt": \n', "a.jsonl:2: not valid JSON"),
    "an object on many lines": ("a.json", b'{\n"prompt": "a"\n}\n', "A row must stand on one line, or the file be one"),
    "a broken array": ("a.json", b'[\n{"prompt": "a"},\n}]\n', "a.json:3: not valid JSON"),
    "an array of numbers": ("a.json", b"[1]", "a.json:1: not a JSON object"),
    "no form": ("a.jsonl", b'{"question": "a", "answer": "b"}', 'The row has "question", "answer"'),
    "a misspelt column": ("a.jsonl", b'{"mesages": []}', 'Did you mean "messages" by "mesages"?'),
    "semicolons": ("a.csv", b"prompt;response\na;b\n", "a.csv:1: the columns are separated by semicolons: separate"),
    "tabs": ("a.csv", b"prompt\tresponse\na\tb\n", "the columns are separated by tabs: separate them by commas"),
    "no header": ("a.csv", b"my door code is 4927,what a good code\na,b\n", "the first line of a .csv must name"),
    "UTF-16": (
        "a.jsonl",
        PAIR.encode("utf-16"),
        "a.jsonl:1: not UTF-8: invalid start byte at byte 1. Save the file in",
    ),
    "Latin-1": ("a.txt", "Grüße\n".encode("latin-1"), "a.txt:1: not UTF-8"),
    "an archive": ("a.zip", b"PK", "no known kind of file: give .csv, .json, .jsonl, .parquet, .txt"),
    "no archive": ("a.jsonl.gz", b"PK", "a.jsonl.gz: not a whole .gz file, after row 0"),
    "half an archive": (
        "a.jsonl.gz",
        gzip.compress(PAIR.encode() * 99, mtime=0)[:-9],
        "a.jsonl.gz: not a whole .gz file",
    ),
    "no Parquet": ("a.parquet", b"no parquet", "a.parquet:1: not valid Parquet"),
    "no reply": ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', "must be a reply of the assistant"),
    "an image": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}]}',
        "a part of type 'image' is no text: only texts are trained on",
    ),
    "tools alone": ("a.jsonl", b'{"messages": [{"role": "tool", "content": "a"}]}', "all turns are of tools"),
    "no text": ("a.jsonl", b'{"text": " "}', '"text" must be a string that is not empty'),
}
ROWS = {
    **{name: (changes, code, words) for name, (changes, code, words) in BAD.items()},
    **{f"file: {name}": ({"train_file": file}, 3, words) for name, (file, _, words) in FILES.items()},
    "file: a misspelt user": (
        {"group_by": "user"},
        3,
        'chats.jsonl:1: "user" is missing: did you mean "user_id"?',
    ),
}

# Runs every row in one process that has imported nothing, and notes what each row has imported.
RUN_ALL = """
import contextlib, io, json, os, sys
sys.modules["wandb"] = None  # as if it were not installed
from opacus_ac.cli import main
found = {}
for name, (setup, words) in json.load(open("rows.json")).items():
    for path, content in setup.items():
        open(path, "wb").write(bytes.fromhex(content))
    said, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        try:
            code = main(words)
        except SystemExit as stopped:
            code = stopped.code
        except BaseException as error:
            code = repr(error)
    large = sorted({"torch", "transformers", "opacus", "scipy", "datasets"} & set(sys.modules))
    found[name] = [code, said.getvalue(), printed.getvalue(), large]
json.dump(found, open("found.json", "w"))
"""


def words_of(changes, forbidden):
    options = {**RUN, "per_device_train_batch_size": "1", "gradient_accumulation_steps": "1", **changes}
    given = ((k, v.format(forbidden=forbidden)) for k, v in options.items() if v is not None)
    return ["finetune", *(word for name, value in given for word in (f"--{name}", value))]


def forbidden_folder(folder):
    """A folder where nobody can write, not even root."""
    if os.getuid() == 0:
        return "/proc"
    (folder / "read-only").mkdir(mode=0o555)
    return "read-only"


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Exit code, stderr, stdout and large modules of each row."""
    folder = tmp_path_factory.mktemp("bad") / "place"
    for name in ("empty", "bare", "adapters", "run/checkpoint-8"):
        (folder / name).mkdir(parents=True)
    (folder / "chats.jsonl").write_text('{"prompt": "How?", "response": "So.", "user_id": "a"}\n' * 4)
    (folder / "public.jsonl").write_text(PAIR)
    (folder / "run.yaml").write_text("target_epsilom: 8\n")
    (folder / "bare" / "config.json").write_text("{}")
    (folder / "adapters" / "adapter_config.json").write_text("{}")
    noted = {"command": "finetune", "arguments": words_of({}, "")[1:]}
    (folder / "run" / "_run_arguments.json").write_text(json.dumps(noted))
    forbidden = forbidden_folder(folder)
    contents = {f"file: {name}": {file: content.hex()} for name, (file, content, _) in FILES.items()}
    rows = {name: (contents.get(name, {}), words_of(changes, forbidden)) for name, (changes, *_) in ROWS.items()}
    (folder / "rows.json").write_text(json.dumps(rows))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    subprocess.run([sys.executable, "-c", RUN_ALL], cwd=folder, env=environment, check=True)
    assert not (folder / "out").exists()
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_is_one_line_with_its_remedy_before_anything_large_is_imported(name, answers):
    _, code, words = ROWS[name]
    found, said, printed, large = answers[name]
    lines = [line for line in said.splitlines() if not line.startswith("usage: ")]
    assert found == code, said
    assert len(lines) == 1
    assert lines[0].startswith("opacus-ac finetune: error: ")
    assert words in lines[0]
    assert not printed
    assert not large
    for name_in_python in ("PrivacyArguments", "TrainingArguments", "=True", "Errno", "Traceback"):
        assert name_in_python not in said


def test_a_line_that_may_be_private_is_not_shown_as_a_name_of_columns(answers):
    assert "4927" not in answers["file: no header"][1]


def test_there_are_more_than_thirty_rows():
    assert len(ROWS) > 60
