"""Names of base models that hold on any machine, in place of paths that hold on one."""

from __future__ import annotations

import json
import re
from pathlib import Path

from opacus_ac.integrations.trained.folder import ADAPTER_CONFIG, CARD, RunError, RunFolder, is_adapter, read_object
from opacus_ac.models.default_model import FOLDER, cache_root, default_model_dir

DEFAULT_BASE = f"opacus_ac:{FOLDER}"
"""Name of the default chat model, which every machine makes from the same package."""
_LOCAL = "local:"
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def portable_name(source: str | None) -> str:
    """Return the name of a base model for a file that leaves this machine.

    Args:
        source: where the model was loaded from: folder or hub name; None or empty for a model that was not loaded.

    Returns:
        A hub name, :data:`DEFAULT_BASE`, or ``local:`` with the name of the folder alone.

    >>> portable_name("Qwen/Qwen2.5-0.5B-Instruct"), portable_name("/home/ana/models/mine")
    ('Qwen/Qwen2.5-0.5B-Instruct', 'local:mine')
    """
    if not source:
        return "unknown"
    path = Path(source)
    if path.is_absolute() or path.exists() or source.startswith((".", "~")):
        resolved = path.expanduser().resolve()
        if resolved == (cache_root() / FOLDER).resolve():
            return DEFAULT_BASE
        for part in resolved.parts:
            if found := _HUB_CACHE.fullmatch(part):
                return f"{found[1]}/{found[2]}"
        return f"{_LOCAL}{resolved.name}"
    return source


def is_hub_name(name: str) -> bool:
    """Say whether a portable name is one of the Hugging Face hub."""
    return name not in ("unknown", DEFAULT_BASE) and not name.startswith(_LOCAL)


def make_portable(folder: Path) -> None:
    """Write portable names of the base model into the adapters that were saved in a folder."""
    inner = (p for p in folder.glob(f"*/{ADAPTER_CONFIG}") if not p.parent.name.startswith("checkpoint-"))
    for path in (folder / ADAPTER_CONFIG, *inner):
        if not path.is_file():
            continue
        config = read_object(path)
        name = portable_name(config.get("base_model_name_or_path"))
        before = config.get("base_model_name_or_path")
        if before in (name, None):
            continue
        config["base_model_name_or_path"] = name
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        card = path.parent / CARD
        if card.is_file():
            card.write_text(_renamed(card.read_text(encoding="utf-8"), before, name), encoding="utf-8")


def _renamed(text: str, before: str, after: str) -> str:
    """Return a card that names the base model by another name.

    A path is replaced wherever it stands. A single word is replaced only where it names the base model for the hub,
    because the text may use the same word otherwise.
    """
    if len(Path(before).parts) > 1:
        return text.replace(before, after)
    names_base = rf"(?m)^((?:- )?base_model:(?:\w+:)? ?[\"']?){re.escape(before)}(?=[\"']?$)"
    return re.sub(names_base, lambda found: found[1] + after, text)


def base_name(run: RunFolder) -> str:
    """Return the portable name of a run's base model."""
    folder = run.model_folder()
    if is_adapter(folder):
        name = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        return portable_name(name)
    return str(run.settings.get("base_model") or "unknown")


def base_source(run: RunFolder, given: str | None = None) -> str:
    """Return the folder or hub name to load a run's base model from.

    Args:
        run: the run.
        given: what the user says it is; None to find it.

    Raises:
        RunError: If the base model was a local folder, and this machine does not have it where it was.
    """
    if given is not None:
        return given
    name = base_name(run)
    if name == DEFAULT_BASE:
        return str(default_model_dir())
    if is_hub_name(name):
        return name
    before = run.local_paths.get("base_model")
    if before and Path(before).is_dir():
        return str(before)
    what = "is not known" if name == "unknown" else f"was the local folder {name.removeprefix(_LOCAL)!r}"
    raise RunError(
        f"the base model of {run.path} {what}, and it is not where it was in training: name its folder with --base"
    )
