"""A readable table: how each parameter gets its per-sample gradients, and at what cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from opacus_ac.grad_sample.checks.exactness import module_problem
from opacus_ac.grad_sample.checks.probe import guess_input
from opacus_ac.grad_sample.one_backward.experts import is_experts
from opacus_ac.grad_sample.one_backward.layer_terms import replays_lookup, rule_of, watched_modules
from opacus_ac.grad_sample.one_backward.outer_products import keeps
from opacus_ac.grad_sample.registry import OWN_RULES, GradSampler, UserRule, hooked_modules, sampler_of
from opacus_ac.grad_sample.rules.bitlinear import QuantizedInputs

_BYTES = 4  # values of records are kept in float32


@dataclass(frozen=True)
class RuleRow:
    """How one trainable parameter gets its per-sample gradients.

    Attributes:
        parameter: name of the parameter; of a tied parameter its first name.
        module: path of the module that holds it under that name.
        type: type of that module.
        rule: the rule for it, and who wrote the rule.
        route: how mode "bk" computes the norm. ``gram``: from Gram matrices of input and output gradient. ``kept``:
            from the gradient itself, which is smaller than these. ``lookup``: from an embedding's ids; several routes
            are joined by + for tied weights. ``routed``: from the rows that experts multiply. ``rows``: from gradients
            per record. ``replay``: from a second run of the module. Opacus's modes always have ``rows``. ``refused``:
            ``make_private`` would raise.
        cost: multiplications for the norm beyond ordinary training, as a share of those of the layer's forward and
            backward pass; None if that is unknown.
        memory: bytes per record that are kept until the step.
        note: further remarks; for ``refused`` the reason and the remedy.
    """

    parameter: str
    module: str
    type: str
    rule: str
    route: str
    cost: float | None
    memory: int
    note: str

    def __str__(self) -> str:
        note = f"  ({self.note})" if self.note else ""
        return f"{self.parameter}: {self.rule}, {self.route}{note}"

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, one string per column."""
        cost = "?" if self.cost is None else f"{self.cost:.1%}"
        memory = f"{self.memory / 1024:,.1f}"
        return (self.parameter, self.module, self.type, self.rule, self.route, cost, memory, self.note)


_HEADER = ("parameter", "module", "type", "rule", "route", "cost", "KiB/record", "note")


class RuleTable(list[RuleRow]):
    """The rows of ``explain``. Printing it prints the table."""

    def __str__(self) -> str:
        return format_table(self)


def format_table(rows: list[RuleRow]) -> str:
    """Return the rows as text with aligned columns, one line each, under a header."""
    cells = [_HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _rule_name(module: nn.Module) -> str:
    sampler = sampler_of(module)
    if sampler is None and is_experts(module):
        return "opacus_ac: experts"
    if sampler is None:
        return "opacus_ac: replayed lookup" if replays_lookup(module) else "functorch"
    if isinstance(sampler, UserRule):
        return f"user: {getattr(sampler.rule, '__name__', 'rule')}"
    name = getattr(sampler, "__name__", repr(sampler))
    if sampler in OWN_RULES:
        return f"opacus_ac: {name}"
    origin = "opacus" if getattr(sampler, "__module__", "").startswith("opacus.") else "user"
    return f"{origin}: {name}"


def _owners(model: nn.Module) -> dict[int, list[tuple[str, str, nn.Module]]]:
    """Return for each parameter all places that hold it, as (full name, module path, module)."""
    owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((f"{path}.{name}" if path else name, path, module))
    return owners


def _handlers(model: nn.Module, mode: str) -> dict[int, tuple[str, nn.Module]]:
    """Return for each module the one that gives its gradients: itself, or the module above it that is run again."""
    handlers: dict[int, tuple[str, nn.Module]] = {}
    modules: Iterator[tuple[str, nn.Module]] = watched_modules(model) if mode == "bk" else hooked_modules(model)
    for path, hooked in modules:
        alone = sampler_of(hooked) is not None or (mode == "bk" and (replays_lookup(hooked) or is_experts(hooked)))
        for module in (hooked,) if alone else hooked.modules():
            handlers.setdefault(id(module), (path, hooked))
    return handlers


def _note(model_path: str, root: tuple[str, nn.Module], tied: list[str]) -> str:
    path, module = root
    notes = []
    if tied:
        notes.append(f"tied with {', '.join(tied)}")
    if path != model_path and sampler_of(module) is None:
        notes.append(f"replayed as part of {path or 'the model'}")
    sampler: GradSampler | None = sampler_of(module)
    if isinstance(sampler, UserRule) and sampler.probe_input is None and guess_input(module) is None:
        notes.append("not verified: no probe input")
    return "; ".join(notes)


@dataclass
class _Price:
    """Route, cost and memory of one parameter, for one record of ``length`` positions."""

    length: int
    kinds: dict[str, int]
    """Number of uses of the parameter, for each kind of use."""

    def __call__(self, parameter: nn.Parameter) -> tuple[str, float | None, int]:
        numel, length = parameter.numel(), self.length
        if "routed" in self.kinds and parameter.dim() == 3:
            # Which experts a record goes through is known at the call only; each row is held once for each of them.
            return "routed", None, _BYTES * length * sum(parameter.shape[1:])
        if self.kinds.keys() & {"rows", "replay"} or parameter.dim() != 2:
            route = "replay" if "replay" in self.kinds else "rows"
            return route, None if route == "replay" else 0.0, _BYTES * numel
        rows, columns = parameter.shape
        dense, lookups = length * self.kinds.get("dense", 0), length * self.kinds.get("lookup", 0)
        small = lookups > 0 and rows <= length  # then the gradient is smaller than what was looked up
        if small or (dense and keeps(length, rows, columns)):
            apart = 0 if small else lookups
            return "kept+lookup" if apart else "kept", 0.0, _BYTES * (numel + apart * columns)
        extra = dense**2 * (rows + columns) + lookups**2 * columns + dense * lookups * columns
        held = dense * (rows + columns) + lookups * columns
        work = 3 * dense * numel
        route = "+".join(["gram"] * bool(dense) + ["lookup"] * bool(lookups))
        return route, extra / work if work else None, _BYTES * held


def _kinds(places: list[tuple[str, str, nn.Module]], handlers: dict[int, tuple[str, nn.Module]]) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for _, path, module in places:
        root_path, root = handlers.get(id(module), (path, None))
        if root is not None and (root_path == path or sampler_of(root) is None):
            name = rule_of(root, QuantizedInputs())[1]
            kinds[name] = kinds.get(name, 0) + 1
    return kinds


def explain(model: nn.Module, *, mode: str = "bk", length: int = 128) -> RuleTable:
    """Return a table of the trainable parameters: the rule for each, its cost, and what is refused.

    Args:
        model: any model. Call ``register_rules(model)`` first to see the rules that ``make_private`` would use.
        mode: ``grad_sample_mode``.
        length: positions per record, for cost and memory. Each place of a module is counted as one use.

    Returns:
        A list of :class:`RuleRow` that prints as a table. A tied parameter has one row, which names its other places.

    Example:
        >>> from torch import nn
        >>> row = explain(nn.Sequential(nn.Linear(512, 1024, bias=False)), length=64)[0]
        >>> row.rule, row.route, f"{row.cost:.1%}", row.memory
        ('opacus: compute_linear_grad_sample', 'gram', '6.2%', 393216)
    """
    owners, handlers = _owners(model), _handlers(model, mode)
    rows, problem = RuleTable(), module_problem(mode)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        places = owners[id(parameter)]
        path, module = next((p, m) for full, p, m in places if full == name)
        answering = (m for _, _, m in [(name, path, module), *places] if id(m) in handlers)
        root = handlers.get(id(next(answering, module)), (path, module))
        note = _note(path, root, [full for full, _, _ in places if full != name])
        route, cost, memory = _Price(length, _kinds(places, handlers) if mode == "bk" else {"rows": 1})(parameter)
        reason = problem(root[1])
        if reason is not None:
            route, note = "refused", "; ".join(filter(None, (note, reason)))
        rows.append(RuleRow(name, path, type(module).__name__, _rule_name(root[1]), route, cost, memory, note))
    return rows
