"""TRL's own first scripts, with two changed lines, end at the target; pages show them."""

import pytest

pytest.importorskip("trl")
import runpy
import subprocess
import sys

import tiny_trl
from checkout import ROOT
from datasets import Dataset
from tiny_chat import save_chat_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

# https://huggingface.co/docs/trl/sft_trainer, Quick start, on a local model and a local dataset.
SFT = """
from trl import SFTTrainer
from datasets import load_from_disk

trainer = SFTTrainer(
    model="model",
    train_dataset=load_from_disk("data"),
)
trainer.train()
"""
# https://huggingface.co/docs/trl/dpo_trainer, Train adapters with PEFT.
DPO = """
from trl import DPOTrainer
from datasets import load_from_disk
from peft import LoraConfig

trainer = DPOTrainer(
    "model",
    train_dataset=load_from_disk("data"),
    peft_config=LoraConfig(),
)
trainer.train()
"""
PRIVACY = "privacy=PrivacyArguments(target_epsilon=4.0, target_delta=1e-3),\n    train_dataset"


def privately(script, name):
    """The script with two changed lines."""
    first = script.replace(
        f"from trl import {name}", f"from opacus_ac.integrations import PrivacyArguments, Private{name} as {name}"
    )
    second = first.replace("train_dataset", PRIVACY, 1)
    lines = (set(second.splitlines()) - set(script.splitlines()), set(script.splitlines()) - set(second.splitlines()))
    assert [len(found) for found in lines] == [2, 1]
    return second


@pytest.mark.parametrize(
    ("script", "name", "made"), [(SFT, "SFTTrainer", tiny_trl.dialogues), (DPO, "DPOTrainer", tiny_trl.pairs)]
)
def test_the_first_script_of_trl_ends_at_the_target(script, name, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_chat_model(tmp_path / "model")
    Dataset.from_list(made(40)).save_to_disk(tmp_path / "data")
    (tmp_path / "script.py").write_text(privately(script, name))
    trainer = runpy.run_path(str(tmp_path / "script.py"))["trainer"]
    assert type(trainer).__name__ == f"Private{name}"
    assert trainer.state.global_step == 15  # 3 epochs of 40 records in batches of 8
    assert 3.96 <= trainer.get_epsilon() <= 4.0
    assert trainer.privacy.accountant == "vpld"
    trainer.save_model()
    assert (tmp_path / trainer.args.output_dir / "privacy_report.json").exists()


@pytest.mark.parametrize("name", ["PrivateSFTTrainer", "PrivateDPOTrainer"])
def test_without_trl_the_error_says_what_to_install(name):
    code = f"""
import sys
sys.modules["trl"] = None
import opacus_ac, opacus_ac.integrations as i
i.PrivateTrainer
try:
    i.{name}
except ImportError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert 'pip install "opacus_ac[trl]"' in told


def test_the_package_does_not_load_trl_by_itself():
    code = "import sys, opacus_ac, opacus_ac.integrations as i; i.PrivateTrainer; print('trl' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert told.strip() == "False"
