"""Prints findings, as text or as a page of the documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from opacus_ac.testing.coverage.case import OUTCOMES, Finding

TITLES = {
    "causal": "Causal language models",
    "encoders": "Encoders with heads",
    "seq2seq": "Encoder-decoder models",
    "audio": "Audio",
    "vision": "Vision",
    "layers": "Layers of torch",
    "peft": "PEFT methods",
}
Rows = Mapping[tuple[str, str], Mapping[str, Finding]]


def by_case(findings: Sequence[Finding]) -> dict[tuple[str, str], dict[str, Finding]]:
    """Return findings by kind and name, then by mode."""
    rows: dict[tuple[str, str], dict[str, Finding]] = {}
    for found in findings:
        rows.setdefault((found.kind, found.name), {})[found.mode] = found
    return rows


def counts(findings: Sequence[Finding], kind: str, mode: str) -> dict[str, int]:
    """Return how many cases of a kind came out how in a mode; outcomes that did not happen are left out."""
    found = Counter(one.outcome for one in findings if (one.kind, one.mode) == (kind, mode))
    return {outcome: found[outcome] for outcome in OUTCOMES if found[outcome]}


def text(findings: Sequence[Finding]) -> str:
    """Return one line per case and mode, and the counts."""
    lines = []
    for one in sorted(findings, key=lambda f: (list(TITLES).index(f.kind), f.name, f.mode)):
        error = "" if one.error is None else f"{one.error:.0e}"
        lines.append(f"{one.kind + '/' + one.name:40} {one.mode:6} {_outcome(one):24} {error:6} {one.message}".rstrip())
    lines += ["", *(f"{kind:10} {mode:6} {_listed(found)}" for kind, mode, found in _totals(findings))]
    return "\n".join(lines)


def markdown(findings: Sequence[Finding], versions: Mapping[str, str]) -> str:
    """Return the page "Supported models".

    Args:
        findings: of every case.
        versions: that they hold for.
    """
    rows = by_case(findings)
    modes = sorted({one.mode for one in findings})
    parts = [_OPENING.format(**versions), "", "| cases | mode | outcome |", "|---|---|---|"]
    parts += [f"| {TITLES[kind]} | {mode} | {_listed(found)} |" for kind, mode, found in _totals(findings)]
    for kind, title in TITLES.items():
        names = sorted(name for of, name in rows if of == kind)
        if names:
            head = ["name", *(f"mode {mode}" for mode in modes), "why not"]
            parts += ["", f"## {title}", "", _line(head), _line(["---"] * len(head))]
            parts += [_line([f"`{name}`", *_cells(rows[kind, name], modes)]) for name in names]
    return "\n".join(parts) + "\n"


_OPENING = """# Supported models

This page says which models, heads, layers and PEFT methods train privately with exact gradients, and what the package
says about the others. It is the output of `python -m opacus_ac.testing.coverage --format markdown` with torch {torch},
transformers {transformers} and peft {peft}.

Each case is a small model with random weights in float64, trained with all its parameters or, for PEFT methods, with
those that the method trains. One private step without noise, on six records that are padded to one length, is compared
with a loop that runs plain autograd on each record alone, padded, and clips at the median norm. The loss is that of the
library.

* **exact**: the released gradient is that of the loop, to a relative error of 1e-8. Where a layer or the loss computes
  in float32, the limit is ten times the rounding of autograd itself, and at most 1e-5. A model with weights that have
  to be float32 runs in float32, and the limit is 1e-3.
* **exact (one length)**: the gradient of a record depends on the length to which it is padded, as where the
  softmax of an answer's place runs over padding. A batch that may be padded to its longest record is refused, as the
  last column says. The same batch from the default `collate_fn`, which cannot pad, is exact: pad every record to one
  length in the dataset.
* **refused**: `make_private`, or the first batch, raises an error before anything is released. The last column has its
  first sentence.
* **wrong**: the released gradient is another. **crash**: an error that was not meant for users.
* **not built**: the model does not run here without privacy either: a package is missing, or the recipe for small
  configs does not fit. Nothing is known about it. **time out**: nothing is known after a minute.

Mode "bk" is the default; mode "hooks" is that of Opacus ([one-backward.md](one-backward.md))."""


def _totals(findings: Sequence[Finding]) -> list[tuple[str, str, dict[str, int]]]:
    pairs = dict.fromkeys((kind, mode) for kind in TITLES for mode in sorted({one.mode for one in findings}))
    return [(*pair, found) for pair in pairs if (found := counts(findings, *pair))]


def _listed(found: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in found.items())


def _outcome(one: Finding) -> str:
    return f"{one.outcome} ({one.where})" if one.where else one.outcome


def _cells(row: Mapping[str, Finding], modes: Sequence[str]) -> list[str]:
    """Return the cells of a case: its outcome in every mode, and the message of the first mode in which it has one."""
    shown = [_outcome(row[mode]) if mode in row else "" for mode in modes]
    said = next((row[mode].message for mode in modes if mode in row and row[mode].message), "")
    return [*shown, said]


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*") for cell in cells)
    return "| " + " | ".join(escaped) + " |"
