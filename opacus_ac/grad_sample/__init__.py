"""Per-sample gradients: rules for kinds of layers, their registry, and checks that the gradients are exact.

Importing this package registers no rule. ``register_rules(model)`` does.
"""

from opacus_ac.grad_sample.broadcast import expand_broadcast_embeddings
from opacus_ac.grad_sample.checks.exactness import check_model, constant_buffers_ok
from opacus_ac.grad_sample.explain import explain
from opacus_ac.grad_sample.one_backward.windows import register_windows
from opacus_ac.grad_sample.registry import register_rule, register_rules, register_ste_linear

__all__ = [
    "check_model",
    "constant_buffers_ok",
    "expand_broadcast_embeddings",
    "explain",
    "register_rule",
    "register_rules",
    "register_ste_linear",
    "register_windows",
]
