"""What any run has spent so far: from its report if it is finished, from checkpoints and ledger if it is not."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opacus_ac.integrations.trained.folder import PRIVACY_REPORT, RunError, RunFolder, read_object
from opacus_ac.integrations.trained.words import in_words


@dataclass(frozen=True)
class RunStatus:
    """How far a run is, and what it has spent.

    Attributes:
        state: how far it is, in words.
        facts: the privacy report, or what a ledger knows, as plain values.
        target_epsilon: epsilon that the run may spend; None without a target, or where it is not known.
    """

    state: str
    facts: dict[str, Any]
    target_epsilon: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**self.facts, "state": self.state, "target_epsilon": self.target_epsilon}

    def __str__(self) -> str:
        facts = self.facts
        rows = {
            "state": self.state,
            "protects": facts.get("unit") or facts.get("protects"),
            "neighbours": facts.get("adjacency") or facts.get("neighbours"),
            "records": facts.get("dataset_size"),
            "steps": facts.get("steps"),
            "noise": f"multiplier {facts['noise_multiplier']:.4g}" if "noise_multiplier" in facts else None,
            "clipping": facts.get("clip_policy"),
            "accountant": facts.get("accountant"),
            "ledger": facts.get("ledger"),
            "released": "; ".join(facts.get("released", ())),
        }
        lines = [f"{name:12} {value}" for name, value in rows.items() if value]
        lines += [f"attackers    {sentence}" for sentence in facts.get("attack_sentences", ())]
        lines += [f"WARNING      {warning}" for warning in facts.get("warnings", ())]
        return "\n".join([in_words(facts, self.target_epsilon), "", *lines])


def run_status(run: RunFolder, delta: float | None = None) -> RunStatus:
    """Return what a run has spent so far.

    Args:
        run: its folder.
        delta: delta, where neither a report nor the settings of the run have one.

    Raises:
        RunError: If nothing in the folder says what was spent, or no delta is known.
        LedgerError: If the ledger is damaged.
    """
    settings = run.settings
    target, planned = settings.get("target_epsilon"), settings.get("planned_steps")
    of = "" if planned is None else f" of {planned}"
    if (run.path / PRIVACY_REPORT).is_file():
        facts = read_report(run.path / PRIVACY_REPORT)
        taken = facts.get("steps", 0)
        early = planned is not None and taken < planned
        return RunStatus(f"{'ended early' if early else 'finished'}: {taken}{of} steps were taken", facts, target)
    saved = next((read_report(p / PRIVACY_REPORT) for p in run.checkpoints if (p / PRIVACY_REPORT).is_file()), None)
    kept = "it has no checkpoint yet" if saved is None else f"its newest checkpoint has {saved.get('steps')}{of} steps"
    if run.ledger is not None:
        known = settings.get("delta") if saved is None else saved["delta"]
        facts = ledger_facts(run.ledger, known if delta is None else delta)
        state = f"not finished: {kept}; the ledger has {facts['charged_steps']} charges"
        return RunStatus(state, {**(saved or {}), **facts}, target)
    if saved is None:
        raise RunError(
            f"{run.path} has neither {PRIVACY_REPORT}, checkpoints with one, nor a ledger, so nothing says what was "
            f"spent{'' if settings else ': is it the folder of a run?'}"
        )
    state = f"not finished: {kept}. Steps after it are not in these figures, because the run had no ledger"
    return RunStatus(state, saved, target)


def read_report(path: Path) -> dict[str, Any]:
    """Return a privacy report as plain values.

    Raises:
        RunError: If the file is none.
    """
    facts = read_object(path)
    if "epsilon" not in facts or "delta" not in facts:
        raise RunError(f"{path} is not a privacy report: it has no epsilon and delta")
    return facts


def ledger_facts(path: Path, delta: float | None) -> dict[str, Any]:
    """Return the sum of the charges of a ledger, after a check of every line.

    Raises:
        RunError: If ``delta`` is None.
        LedgerError: If the ledger is damaged.
    """
    from opacus_ac.accounting import PureDPAccountant, attack_sentences
    from opacus_ac.accounting.pld_accountant import VariableRatePLDAccountant
    from opacus_ac.budget.account import Account
    from opacus_ac.budget.ledger import PrivacyLedger

    if delta is None:
        raise RunError("a ledger has no delta: give --delta")
    ledger = PrivacyLedger(path)
    laplace = ledger.mechanism == "laplace"
    account = Account(PureDPAccountant() if laplace else VariableRatePLDAccountant(), path)
    epsilon, notes = min(account.bounds(delta).values()), account.notes(delta)
    counts = Counter(ledger.charges)
    attacks = account.attacks() if counts else None
    return {
        "epsilon": "infinity" if math.isinf(epsilon) else epsilon,
        "delta": delta,
        "unit": ledger.unit or "nothing yet",
        "adjacency": account.adjacency(next(iter(counts)).sampling) if counts else "none yet",
        "ledger": ledger.summary,
        "charged_steps": len(ledger),
        "charges": [[repr(event), count] for event, count in counts.items()],
        **({} if attacks is None else {"attacks": asdict(attacks), "attack_sentences": attack_sentences(attacks)}),
        **({"warnings": notes} if notes else {}),
    }
