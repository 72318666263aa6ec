"""What an audit found: claims, bounds and a verdict, for people and for files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One check of one claim.

    Attributes:
        check: what was looked at.
        claim: what the mechanism promises, in words or as a number with its unit.
        shown: what the observations show.
        refuted: whether the two contradict each other at the audit's confidence.
        claimed_epsilon: the claim as an epsilon, where it is one.
        epsilon: the lower bound of epsilon, where the check gives one.
        statistic: the number that decided, where it is one.
        p_value: probability of such a number for a correct mechanism, where the check is a test.
    """

    check: str
    claim: str
    shown: str
    refuted: bool
    claimed_epsilon: float | None = None
    epsilon: float | None = None
    statistic: float | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class AuditResult:
    """Result of one audit.

    Attributes:
        audit: name of the audit.
        subject: what was audited, in words.
        observations: number of independent observations.
        confidence: a correct mechanism is refuted with probability at most ``1 - confidence``, all checks together.
        delta: the delta of every epsilon.
        findings: one row per check.
        notes: what the reader must know.
    """

    audit: str
    subject: str
    observations: int
    confidence: float
    delta: float
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def refuted(self) -> bool:
        """Whether a claim was refuted."""
        return any(finding.refuted for finding in self.findings)

    @property
    def epsilon(self) -> float:
        """Largest lower bound of epsilon that a check gave; 0 without one."""
        return max((f.epsilon for f in self.findings if f.epsilon is not None), default=0.0)

    def finding(self, check: str) -> Finding:
        """Return the finding of the check whose name starts with ``check``.

        Raises:
            KeyError: If there is none.
        """
        for found in self.findings:
            if found.check.startswith(check):
                return found
        raise KeyError(f"no check {check!r}; there are {', '.join(f.check for f in self.findings)}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values as JSON has them; an infinite number becomes the string "infinity"."""
        values: dict[str, Any] = json.loads(json.dumps(_plain({**asdict(self), "refuted": self.refuted})))
        return values

    def __str__(self) -> str:
        verdict = "REFUTED" if self.refuted else "not refuted"
        lines = [
            f"{self.audit}: {verdict}",
            f"  {self.subject}",
            f"  {self.observations} observations; a correct mechanism is refuted with probability at most "
            f"{1 - self.confidence:.2g}; delta = {self.delta:g}",
        ]
        width = max((len(f.check) for f in self.findings), default=0)
        for found in self.findings:
            mark = "REFUTED" if found.refuted else "ok"
            lines.append(f"  {found.check:<{width}}  claimed {found.claim}; shown {found.shown}  [{mark}]")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    """Return ``value`` with infinite floats as strings."""
    if isinstance(value, float) and math.isinf(value):
        return "infinity"
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def check_confidence(confidence: float) -> float:
    """Return alpha = 1 - confidence.

    Raises:
        ValueError: If nothing can be decided at this confidence.
    """
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0.5 and 1, got {confidence!r}: 0.999 is usual")
    return 1 - confidence
