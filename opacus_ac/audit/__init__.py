"""Empirical audits: what an attacker can show about a private step or run, beside what it claims."""

from __future__ import annotations

from opacus_ac.audit.canary import canary_audit
from opacus_ac.audit.neighbours import coupling_audit, poison_audit
from opacus_ac.audit.noise_audit import noise_audit
from opacus_ac.audit.one_run import one_run_audit
from opacus_ac.audit.result import AuditResult, Finding
from opacus_ac.audit.scalars import scalar_audit
from opacus_ac.audit.table import AUDITS, Plan, run_audits
from opacus_ac.audit.task import CanaryTask, Task
from opacus_ac.audit.usage import usage_audit

__all__ = [
    "AUDITS",
    "AuditResult",
    "CanaryTask",
    "Finding",
    "Plan",
    "Task",
    "canary_audit",
    "coupling_audit",
    "noise_audit",
    "one_run_audit",
    "poison_audit",
    "run_audits",
    "scalar_audit",
    "usage_audit",
]
