"""The code of the documentation runs as printed, and its commands are commands."""

import re
import shlex
from pathlib import Path

import pytest

from opacus_ac import cli

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["loops.md", "lightning.md"])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    found = blocks(page, "python")
    assert len(found) >= 2
    for code in found:
        exec(code, scope)
    assert "-differential privacy by" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_steps_by_hand_in_lightning_are_logical_ones(tmp_path, monkeypatch):
    """The second block of the page, with its loader of logical batches."""
    import lightning
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from opacus_ac import PrivacyEngine
    from opacus_ac.data import LogicalBatches

    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    first, second = blocks("lightning.md", "python")
    exec(first, scope)
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


COMMANDS = [
    shlex.split(line, comments=True)
    for block in blocks("command-line.md", "bash")
    for line in block.splitlines()
    if line.startswith("opacus-ac")
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[1])
def test_the_commands_of_the_page_parse(words):
    assert len(COMMANDS) == 7
    if words[1] == "finetune":
        from opacus_ac.integrations.finetune import parse

        assert parse(words[2:], None, prog="", usage="").privacy.target_epsilon == 8
    else:
        assert cli.build_parser().parse_args(words[1:]).command.name == words[1]
