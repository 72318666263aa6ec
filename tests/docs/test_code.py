"""Every code block of the documentation runs as printed, and every command is one."""

from __future__ import annotations

import argparse
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_models
import torch
from checkout import PYTHONPATH, ROOT
from tiny_models import rows
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine, cli
from opacus_ac.integrations.finetune.demo import demo_arguments

TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
}
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, *languages: str) -> list[str]:
    return [textwrap.dedent(code) for _, language, code in FENCE.findall(TEXTS[page]) if language in languages]


# ---- Python --------------------------------------------------------------------------------------------------------


class Filled:
    """An engine for pages that write ``make_private(...)``: the dots stand for the model in hand, a loader and a noise."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope, self.engine = scope, PrivacyEngine()

    def make_private(self, dots: Any, **settings: Any) -> tuple[Any, ...]:
        private = self._make("make_private", dots, {"noise_multiplier": 1.0, **settings})
        private[1].zero_grad()
        self.scope["model"](**next(iter(private[2]))).loss.backward()
        private[1].step()
        self.engine.detach(self.scope["model"])  # a page shows one call after the other as choices
        return private

    def detach(self, model: torch.nn.Module) -> torch.nn.Module:
        return model  # was done after the step

    def make_private_with_epsilon(self, dots: Any, **settings: Any) -> tuple[Any, ...]:
        target = {"target_epsilon": 8.0, "target_delta": 1e-3, "epochs": 1}
        return self._make("make_private_with_epsilon", dots, {**target, **settings})

    def _make(self, method: str, dots: Any, settings: dict[str, Any]) -> tuple[Any, ...]:
        assert dots is ...
        model = self.scope["model"]
        self.engine = PrivacyEngine()
        trained = [p for p in model.parameters() if p.requires_grad]
        filled = {
            "module": model,
            "optimizer": torch.optim.AdamW(trained),
            "data_loader": DataLoader(rows(), batch_size=8),
        }
        return getattr(self.engine, method)(**{**filled, **settings})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def language_model() -> dict[str, Any]:
    scope: dict[str, Any] = {"torch": torch, "model": tiny_models.build("qwen2-tied").float()}
    scope["loader"] = DataLoader(rows(), batch_size=8)
    return scope


def dots_filled() -> dict[str, Any]:
    scope = language_model()
    batch = {key: torch.stack([row[key] for row in rows(3)]) for key in ("input_ids", "labels")}
    return {**scope, "public_batch": batch, "loss_fn": lambda model, records: model(**records).loss}


class Page(NamedTuple):
    """A page whose code runs here: the names that it takes as given, and what has to hold after it ran."""

    given: Callable[[], dict[str, Any]]
    holds: Callable[[dict[str, Any], str], Any]


def prints_the_statement(scope: dict[str, Any], printed: str) -> bool:
    return "-differential privacy by" in printed


PAGES = {
    "README.md": Page(
        dict,
        lambda scope, printed: (
            "differential privacy by privacy loss distribution accounting" in printed
            and 7.9 < scope["engine"].get_epsilon(1e-4) <= 8.0
        ),
    ),
    "docs/coming-from.md": Page(dict, prints_the_statement),
    "docs/loops.md": Page(dict, prints_the_statement),
    "docs/lightning.md": Page(dict, prints_the_statement),
    "docs/tensorboard.md": Page(dots_filled, lambda scope, _: [*Path("runs/first").glob("events.*")]),
    "docs/allocation.md": Page(dots_filled, lambda scope, _: scope["engine"].engine.get_epsilon(1e-3) < 20),
    "docs/automatic-rate.md": Page(dots_filled, lambda scope, printed: "found by AutoAdam from releases" in printed),
    "docs/zeroth-order.md": Page(language_model, lambda scope, _: scope["optimizer"].steps_taken == 5),
}

#: Pages whose code another test runs.
ELSEWHERE = {
    "docs/trainer.md": "docs/test_trainer.py",
    "docs/from-trl.md": "docs/test_from_trl.py",
    "docs/distributed.md": "docs/test_code.py",  # below: on two processes
    "docs/quickstart.md": "docs/test_pages.py",
    "docs/from-opacus.md": "docs/test_pages.py",
    "docs/adaptive-clipping.md": "docs/test_pages.py",
    "docs/bitnet.md": "docs/test_pages.py",
    "docs/lora.md": "docs/test_pages.py",
    "docs/choosing.md": "docs/test_pages.py",
    "docs/extending.md": "docs/test_pages.py",
    "docs/your-model.md": "docs/test_your_model.py",
    "docs/command-line.md": "cli/test_result.py",
}

#: What a fence may hold beside Python and commands; "" is a formula or output.
OTHER = {"", "text", "diff", "{include}", "{toctree}", "{eval-rst}"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = PAGES[page].given()
    if "public_batch" in scope:
        scope["engine"] = Filled(scope)
    for found in FENCE.finditer(TEXTS[page]):
        if found[2] == "python":
            lines_before = TEXTS[page].count("\n", 0, found.start(3))  # so that a traceback shows the line of the page
            exec(compile("\n" * lines_before + found[3], str(ROOT / page), "exec"), scope)
    assert PAGES[page].holds(scope, capsys.readouterr().out)


def left_out(texts: dict[str, str]) -> list[str]:
    """Pages with Python that nothing runs, and fences in a language that nobody looks at."""
    known = OTHER | {"python", "bash", "console", "{literalinclude}"}
    code = {page for page, text in texts.items() if re.search(r"^ *```python", text, re.MULTILINE)}
    strange = [(p, fence.split(" ")[0]) for p, text in texts.items() for _, fence, _ in FENCE.findall(text)]
    return sorted(code - PAGES.keys() - ELSEWHERE.keys()) + [f"{p}: {lang}" for p, lang in strange if lang not in known]


def test_no_page_is_left_out():
    assert left_out(TEXTS) == []
    for page, test in ELSEWHERE.items():
        assert blocks(page, "python")
        assert Path(page).name in (ROOT / "tests" / test).read_text(encoding="utf-8")
    assert left_out({"docs/new.md": "```python\n1 + 1\n```\n", "a.md": "```{code-block} python\n1\n```\n"}) == [
        "docs/new.md",
        "a.md: {code-block}",
    ]


@pytest.mark.filterwarnings("ignore")
def test_steps_by_hand_in_lightning_are_logical_ones(tmp_path, monkeypatch):
    """The second block of the page, with its loader of logical batches."""
    import lightning
    from torch.utils.data import TensorDataset

    from opacus_ac.sampling import LogicalBatches

    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    first, second = blocks("docs/lightning.md", "python")
    exec(first.split("\ndata = ")[0], scope)  # the class, without the run of the test above
    exec(second, scope)
    model, engine = scope["ByHand"](), PrivacyEngine()
    data = TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
    _, model.private, loader = engine.make_private(
        module=model, optimizer=torch.optim.AdamW(model.parameters()), data_loader=DataLoader(data, batch_size=16),
        noise_multiplier=1.0, max_physical_batch_size=3, loss_bound=5.0,
    )  # fmt: skip
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, LogicalBatches(loader))
    assert model.private.steps_taken == 8
    assert engine._unknown_batches == 0


GIVEN_ON_RANKS = """
import tiny_models, torch
from tiny_models import rows
torch.manual_seed(0)
model, data = tiny_models.build("qwen2-tied").float(), rows(512)
"""


@pytest.mark.slow
def test_the_code_for_several_processes(tmp_path):
    """docs/distributed.md on two processes, with gloo in the place of nccl."""
    (code,) = blocks("docs/distributed.md", "python")
    assert '"nccl"' in code
    script = tmp_path / "page.py"
    # Threads of gloo that are still there when Python ends can abort a rank that has done all its work: leave without them.
    leave = "\nimport os\ndist.barrier()\ndist.destroy_process_group()\nos._exit(0)\n"
    script.write_text(GIVEN_ON_RANKS + code.replace('"nccl"', '"gloo"') + leave)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "step-100" / ".metadata").is_file()
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) >= 2


def unknown_names(text: str) -> list[str]:
    return [name for name in sorted(set(re.findall(r"\bopacus_ac(?:\.[A-Za-z_]+)+", text))) if not exists(name)]


def exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True


def test_names_on_the_pages_exist():
    found = {page: unknown_names(text) for page, text in TEXTS.items()}
    assert not any(found.values()), found
    assert unknown_names("`opacus_ac.clipping.ClipPolicy`, `opacus_ac.gone.x`, opacus_ac.audit.gone.") == [
        "opacus_ac.audit.gone",
        "opacus_ac.gone.x",
    ]


# ---- commands ------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, list[str]]]:
    """Commands of all pages: lines of bash, lines after a prompt, and ``python file.py ...`` in running text."""
    for page, text in TEXTS.items():
        lines = [line for code in blocks(page, "bash") for line in code.replace("\\\n", " ").splitlines()]
        lines += [line[2:] for code in blocks(page, "console") for line in code.splitlines() if line.startswith("$ ")]
        lines += [" ".join(found.split()) for found in re.findall(r"`(python (?:examples|tests)/[^`]*)`", text)]
        for line in lines:
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield page, words[:end]
                words = words[end + 1 :]


# Those of CONTRIBUTING.md are for a checkout, and tests/project/test_settings.py knows them.
COMMANDS = list(dict.fromkeys((page, tuple(words)) for page, words in commands() if page != "CONTRIBUTING.md"))


class Parsed(Exception):
    """Raised by a script's parser once it has read its options."""


def check_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file exists and its parser takes the options; nothing is run."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise Parsed(parse(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words)
    assert (ROOT / words[0]).is_file(), words[0]
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One command line, by its first word; an unknown one is an error."""
    match words:
        case ["opacus-ac", "finetune", "--demo", *options]:
            from opacus_ac.integrations.finetune.job import parse

            parse([*demo_arguments(), *options], None, prog="", usage="")
        case ["opacus-ac", "finetune", *options]:
            from opacus_ac.integrations.finetune.job import parse

            parse(options, None, prog="", usage="")
        case ["opacus-ac", *options]:
            assert cli.build_parser().parse_args(options).command.name == options[0]
        case ["python", *script]:
            check_script(script, monkeypatch)
        case ["torchrun", nproc, *script]:
            assert nproc.startswith("--nproc_per_node=")
            check_script(script, monkeypatch)
        case ["pip", "install", "-e", extras] | ["pip", "install", extras]:
            config = ConfigParser()
            config.read(ROOT / "setup.cfg")
            what, _, names = extras.rstrip("]").partition("[")
            assert what == ("." if "-e" in words else config["metadata"]["name"])
            assert set(names.split(",") if names else []) <= set(config["options.extras_require"])
        case ["tensorboard", "--logdir", _, "--host", "127.0.0.1"] | ["pytest"]:
            pass
        case _:
            raise AssertionError(f"unknown command {shlex.join(words)}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{p}-{' '.join(w[:3])}" for p, w in COMMANDS])
def test_a_command_is_one(page, words, monkeypatch, tmp_path):
    monkeypatch.setenv("OPACUS_AC_CACHE", str(tmp_path))  # for --demo
    check_command(list(words), monkeypatch)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("opacus-ac epsilon --no-such-option 1", SystemExit),
        ("python examples/gone.py", AssertionError),
        ("python examples/studies/clip_study.py --no-such-option", SystemExit),
        ("python examples/studies/finetune_lora_allocation.py --no-such-option", SystemExit),
        ('pip install -e ".[gone]"', AssertionError),
        ('pip install "other[lm]"', AssertionError),
        ("rm -r runs", AssertionError),
    ],
)
def test_a_command_that_is_none_is_found(line, error, monkeypatch, capsys):
    with pytest.raises(error):
        check_command(shlex.split(line), monkeypatch)


def test_all_commands_were_found():
    assert len([words for page, words in COMMANDS if page == "docs/command-line.md"]) == 14
    assert {words[0] for _, words in COMMANDS} >= {"opacus-ac", "python", "torchrun", "pip", "tensorboard"}
