"""A readable answer to: how does each parameter get its per-sample gradients?"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

from torch import nn

from opacus_ac.grad_sample.probe import guess_input
from opacus_ac.grad_sample.registry import OWN_RULES, GradSampler, UserRule, hooked_modules, sampler_of


@dataclass(frozen=True)
class RuleRow:
    """How one trainable parameter gets its per-sample gradients."""

    parameter: str
    module: str
    type: str
    rule: str
    trainable: bool
    note: str

    def __str__(self) -> str:
        note = f"  ({self.note})" if self.note else ""
        return f"{self.parameter}: {self.rule}{note}"


class RuleTable(list[RuleRow]):
    """The rows of ``explain``; printing it prints the table."""

    def __str__(self) -> str:
        return format_table(self)


def format_table(rows: list[RuleRow]) -> str:
    """The rows as text with aligned columns, one line each, under a header."""
    header = tuple(f.name for f in fields(RuleRow))
    cells = [header, *(tuple(str(v) for v in astuple(row)) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _rule_name(sampler: GradSampler | None) -> str:
    if sampler is None:
        return "functorch"
    if isinstance(sampler, UserRule):
        return f"user: {getattr(sampler.rule, '__name__', 'rule')}"
    name = getattr(sampler, "__name__", repr(sampler))
    if sampler in OWN_RULES:
        return f"opacus_ac: {name}"
    origin = "opacus" if getattr(sampler, "__module__", "").startswith("opacus.") else "user"
    return f"{origin}: {name}"


def _owners(model: nn.Module) -> dict[int, list[tuple[str, str, nn.Module]]]:
    """For each parameter every place that holds it: (its full name there, module path, module)."""
    owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((f"{path}.{name}" if path else name, path, module))
    return owners


def _handlers(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """For each module the hooked module that answers for it: itself, or the functorch root above it."""
    handlers: dict[int, tuple[str, nn.Module]] = {}
    for path, hooked in hooked_modules(model):
        covered = hooked.modules() if sampler_of(hooked) is None else (hooked,)
        for module in covered:
            handlers.setdefault(id(module), (path, hooked))
    return handlers


def _note(model_path: str, root: tuple[str, nn.Module], tied: list[str]) -> str:
    path, module = root
    notes = []
    if tied:
        notes.append(f"tied with {', '.join(tied)}")
    if path != model_path:
        notes.append(f"replayed as part of {path or 'the model'}")
    sampler = sampler_of(module)
    if isinstance(sampler, UserRule) and sampler.probe_input is None and guess_input(module) is None:
        notes.append("not verified: no probe input")
    return "; ".join(notes)


def explain(model: nn.Module) -> RuleTable:
    """One row per trainable parameter: where it lives and which rule computes its per-sample gradients.

    Args:
        model: any model; call ``register_rules(model)`` first to see what would be used.

    Returns:
        A list of :class:`RuleRow` that prints as a table. A tied parameter has one row, which names the other places.

    Example:
        >>> from torch import nn
        >>> [row.rule for row in explain(nn.Sequential(nn.Linear(2, 3, bias=False)))]
        ['opacus: compute_linear_grad_sample']
    """
    owners, handlers = _owners(model), _handlers(model)
    rows = RuleTable()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        places = owners[id(parameter)]
        path, module = next((p, m) for full, p, m in places if full == name)
        root = handlers.get(id(module), (path, module))
        note = _note(path, root, [full for full, _, _ in places if full != name])
        rule = _rule_name(sampler_of(root[1]))
        rows.append(RuleRow(name, path, type(module).__name__, rule, parameter.requires_grad, note))
    return rows
