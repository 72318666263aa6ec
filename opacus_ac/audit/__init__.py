"""Empirical audits: what an attacker can show about a private step or run, beside what it claims."""

from __future__ import annotations

from opacus_ac.audit.canary import canary_audit
from opacus_ac.audit.noise_audit import noise_audit
from opacus_ac.audit.one_run import one_run_audit
from opacus_ac.audit.result import AuditResult, Finding
from opacus_ac.audit.scalars import scalar_audit
from opacus_ac.audit.task import CanaryTask

__all__ = ["AuditResult", "CanaryTask", "Finding", "canary_audit", "noise_audit", "one_run_audit", "scalar_audit"]
