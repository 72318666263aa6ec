"""What ``opacus-ac finetune`` says of damaged checkpoints, changed settings, full disks and a hub out of reach."""

import errno
import resource
import shutil
import sys

import pytest
from tiny_finetune import chat_place, command
from tiny_models import opacus_table_restored

from opacus_ac import cli
from opacus_ac.budget import PrivacyLedger
from opacus_ac.integrations.finetune.changes import changed_budget, changed_options
from opacus_ac.integrations.finetune.errors import FinetuneError, failing_with, outside
from opacus_ac.integrations.finetune.spelling import on_the_command_line, option_names, training_fields
from opacus_ac.integrations.trainer.checkpoint import damage

OPTIONS = {"target_epsilon": None, "noise_multiplier": 1, "max_steps": 4, "save_steps": 2, "report_to": "none"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return chat_place(tmp_path_factory.mktemp("messages"))


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A finished run with checkpoints 2 and 4."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with opacus_table_restored():
        assert cli.main(command(place, out, **OPTIONS)) == 0
    return out


@pytest.fixture
def out(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


def resumed(place, out, **changes):
    return cli.main(command(place, out, **{**OPTIONS, "resume_from_checkpoint": "last", **changes}))


def charges(out):
    return len(PrivacyLedger(out / "privacy.ledger").charges)


# ---------------------------------------------------------------- checkpoints

DAMAGE = {
    "killed before its last file": (lambda c: (c / "privacy_state.pt").unlink(), "privacy_state.pt, which is written last"),
    "half a last file": (lambda c: halve(c / "privacy_state.pt"), "privacy_state.pt is damaged"),
    "a file is gone": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing, new or changed"),
    "half a file": (lambda c: halve(c / "adapter_model.safetensors"), "adapter_model.safetensors is missing, new or"),
}  # fmt: skip


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_a_whole_checkpoint_has_none(case, out):
    spoil, words = DAMAGE[case]
    last = out / "checkpoint-4"
    assert damage(last) is None
    spoil(last)
    assert words in damage(last)
    assert damage(out / "checkpoint-2") is None


def test_the_checkpoint_before_a_damaged_one_is_taken_and_that_is_said(place, out, capsys):
    before = charges(out)
    DAMAGE["killed before its last file"][0](out / "checkpoint-4")
    assert resumed(place, out) == 0
    said = capsys.readouterr().err
    assert f"note: {out / 'checkpoint-4'} is no whole checkpoint" in said
    assert f"going on from {out / 'checkpoint-2'}, the one before" in said
    assert charges(out) == before + 2  # what the lost steps cost stays charged
    assert damage(out / "checkpoint-4") is None


@pytest.mark.parametrize(
    ("wanted", "words"),
    [("last", "begin anew in another --output_dir, with --ledger"), ("checkpoint-4", "resume from the one before")],
)
def test_where_no_checkpoint_is_whole_it_ends_with_exit_code_3(wanted, words, place, out, capsys):
    for step in (2, 4):
        (out / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    assert resumed(place, out, resume_from_checkpoint=wanted if wanted == "last" else out / wanted) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"opacus-ac finetune: error: {out / 'checkpoint-4' / 'optimizer.pt'} is missing, new or")
    assert words in error
    assert charges(out) == 4


def test_where_nothing_is_to_resume_it_says_so_and_starts(place, tmp_path, capsys):
    assert resumed(place, tmp_path / "out", max_steps=1) == 0
    assert "has no checkpoint, nothing to resume: starting afresh" in capsys.readouterr().err
    assert charges(tmp_path / "out") == 1


# ---------------------------------------------------------------- changed settings


def test_a_changed_setting_is_named_as_the_user_named_it(place, out, capsys):
    for _ in range(2):  # what was noted of the run is not overwritten by a run that is refused
        assert resumed(place, out, per_sample_max_grad_norm=2) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "the run was started with --per_sample_max_grad_norm left out, and not 2" in error
    assert charges(out) == 4


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ("--target_epsilon 8", "--target_epsilon 8.0", ""),
        ("--target_epsilon 8", "--target-epsilon 4", "--target_epsilon 8, and not 4"),
        ("--noise_multiplier 1", "--target_epsilon 4", "--noise_multiplier 1, and not left out"),
        ("--target_epsilon 8", "--target_epsilon 8 --max_length 256 --output_dir b", ""),
        ("--max_length 256 --full", "--max_length 128", "--max_length 256, and not 128 and --full true, and not false"),
        ("--report_to none", "--report_to tensorboard", ""),
        ("--no_such_option 3", "--target_epsilon 4", ""),
    ],
)
def test_changes_in_words(before, now, words):
    found = changed_options(before.split(), now.split())
    assert (words in found) if words else not found
    budget = "epsilon" in words or "noise" in words
    assert bool(changed_budget(before.split(), now.split())) is budget
    assert changed_options(None, now.split()) == changed_budget(None, now.split()) == ""


# ---------------------------------------------------------------- what is around the program


class HubError(Exception):
    __module__ = "huggingface_hub.errors"


CAUSES = {
    "disk": (OSError(errno.ENOSPC, "No space left on device", "/out/model"), "the disk is full"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "/out/model"), "(/out/model): make room"),
    "safetensors": (RuntimeError("IoError(Os { code: 28, kind: StorageFull, message: ... })"), "the disk is full"),
    "torch": (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "the disk is full"),
    "torch, of a stream": (RuntimeError("basic_ios::clear: iostream error"), "a file may not grow"),
    "torch, of a place": (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "make room"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/out/model"), "/out/model cannot be written or read"),
    "forbidden": (PermissionError(errno.EACCES, "Permission denied", "/out/model"), "Change its permissions"),
    "hub": (HubError("no answer"), "the hub did not answer (no answer)"),
    "connection": (ConnectionError("refused"), "Leave out --push_to_hub"),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_causes_around_the_program_are_told_with_a_remedy(name):
    error, words = CAUSES[name]
    assert words in outside(error)
    later = RuntimeError("while saving")
    later.__cause__ = error
    assert words in outside(later)


@pytest.mark.parametrize("error", [RuntimeError("shape"), FileNotFoundError(errno.ENOENT, "gone", "a"), KeyError("a")])
def test_a_defect_is_not_blamed_on_the_machine(error):
    assert outside(error) is None


def test_a_full_disk_is_one_line_and_exit_code_6_and_the_run_goes_on_afterwards(place, tmp_path, capsys):
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # a file may not grow beyond this
    try:
        assert cli.main(command(place, out, **OPTIONS)) == 6
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("opacus-ac finetune: error: the disk is full, or a file may not grow")
    spent = charges(out)
    assert spent >= 1
    if any(out.glob("checkpoint-*")):
        assert resumed(place, out) == 3
        assert "begin anew in another --output_dir" in capsys.readouterr().err
    assert charges(out) == spent


def test_a_hub_out_of_reach_is_one_line_and_exit_code_6(place, tmp_path, capsys, monkeypatch):
    def init_hf_repo(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", init_hf_repo)
    assert cli.main(command(place, tmp_path / "out", **OPTIONS, push_to_hub=True)) == 6
    assert "error: the hub did not answer (no route to the hub)" in capsys.readouterr().err


# ---------------------------------------------------------------- spelling


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("give either target_epsilon or noise_multiplier", "give either --target_epsilon or --noise_multiplier"),
        ("clipping='sideways' is not available", "--clipping sideways is not available"),
        ("say evaluation_is_public=True", "say --evaluation_is_public"),
        ("say PrivacyArguments(evaluation_is_public=True).", "say --evaluation_is_public."),
        ("set PrivacyArguments.per_sample_max_grad_norm, and", "set --per_sample_max_grad_norm, and"),
        ("use fused_step=False", "use --fused_step False"),
        ("Use loss_bound=None (0 on a command line)", "Use --loss_bound 0"),
        ("the same PrivacyArguments", "the same privacy options"),
        ("/max_length/a.jsonl:3: bad", "/max_length/a.jsonl:3: bad"),
        ('"max_length" is missing', '"max_length" is missing'),
        ("--max_steps and sampling and full", "--max_steps and sampling and full"),
        ("eval_dataset: its loss", "--validation_file: its loss"),
    ],
)
def test_names_of_python_become_options(text, wanted):
    assert on_the_command_line(text) == wanted
    with pytest.raises(FinetuneError) as caught, failing_with(5, ValueError):
        raise ValueError(text)
    assert (str(caught.value), caught.value.exit_code) == (wanted, 5)


def test_the_names_that_are_read_from_the_source_are_those_of_the_full_parser():
    from opacus_ac.integrations.finetune.job import full_parser

    known = {action.dest for action in full_parser("", "")._actions}
    assert len(training_fields()) > 100
    assert known - {"help"} <= set(option_names())


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("on_terminal", [True, False])
def test_counts_of_the_private_file_are_for_the_terminal_and_in_no_file(
    on_terminal, place, tmp_path, capsys, monkeypatch
):
    rows = (place / "chats.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "chats.jsonl").write_text("".join([*rows, *rows[:7]]))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    options = {**OPTIONS, "max_steps": 1, "train_file": tmp_path / "chats.jsonl", "report_to": "tensorboard"}
    assert cli.main(command(place, tmp_path / "out", **options)) == 0
    said = capsys.readouterr()
    assert ("7 rows repeat an earlier row exactly" in said.err) is on_terminal
    assert ("67 private rows were read: 67 as messages" in said.err) is on_terminal
    assert "repeat" not in said.out
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"repeat an earlier" not in written
    assert b"private rows" not in written


# ---------------------------------------------------------------- texts


def test_texts_train_a_model_without_chat_template(place, tmp_path, capsys):
    model = shutil.copytree(place / "model", tmp_path / "plain")
    (model / "chat_template.jinja").unlink()
    (tmp_path / "texts.txt").write_text("\n".join(f"Once upon {i} times." for i in range(60)))
    options = {**OPTIONS, "train_file": tmp_path / "texts.txt", "model_name_or_path": model}
    assert cli.main(command(place, tmp_path / "out", **options)) == 0
    assert charges(tmp_path / "out") == 4
    assert "no replies to show: the tokenizer has no chat template" in capsys.readouterr().err
