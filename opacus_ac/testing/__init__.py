"""Checks for models, losses, rules and clip policies, for use in test suites.

``records``: the oracle, a loop of batch size one, and whether records couple. ``rules``: per-sample gradients of every
mode beside the oracle. :mod:`opacus_ac.testing.policies` checks clip policies; it needs the optimizer, and is not
imported here.
"""

from opacus_ac.grad_sample.checks.independence import check_losses_add_up, check_records_independent
from opacus_ac.grad_sample.oracle import LossFn, check_norms, per_sample_gradients, select_records
from opacus_ac.testing.rules import check_rule, hooks_gradients, one_backward, opacus_table_restored, worst_error

__all__ = [
    "LossFn",
    "check_losses_add_up",
    "check_norms",
    "check_records_independent",
    "check_rule",
    "hooks_gradients",
    "one_backward",
    "opacus_table_restored",
    "per_sample_gradients",
    "select_records",
    "worst_error",
]
