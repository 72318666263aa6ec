"""A readable answer to: how does each parameter get its per-sample gradients, and at what price?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from opacus_ac.grad_sample.checks.exactness import module_problem
from opacus_ac.grad_sample.checks.probe import guess_input
from opacus_ac.grad_sample.one_backward.layer_terms import replays_lookup, rule_of, watched_modules
from opacus_ac.grad_sample.one_backward.outer_products import keeps
from opacus_ac.grad_sample.registry import OWN_RULES, GradSampler, UserRule, hooked_modules, sampler_of
from opacus_ac.grad_sample.rules.bitlinear import QuantizedInputs

_BYTES = 4  # records are held in float32


@dataclass(frozen=True)
class RuleRow:
    """How one trainable parameter gets its per-sample gradients.

    Attributes:
        parameter: its name; a tied parameter goes by its first one.
        module: path of the module that holds it under that name.
        type: type of that module.
        rule: the rule that is applied, and who wrote it.
        route: where the norm comes from in mode "bk": ``gram`` matrices of input and output gradient, the gradient
            that is ``kept`` because it is smaller, a ``lookup`` (both where weights are tied), materialised ``rows``,
            or a ``replay`` of the module. In Opacus's modes always ``rows``. ``refused`` where ``make_private`` would
            raise.
        cost: multiplications for the norm beyond ordinary training, as a share of those of the layer's forward and
            backward pass; None where that is not known.
        memory: bytes that one record holds until the step.
        note: what else there is to say; for ``refused`` the reason and the remedy.
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
        """The row as text."""
        cost = "?" if self.cost is None else f"{self.cost:.1%}"
        memory = f"{self.memory / 1024:,.1f}"
        return (self.parameter, self.module, self.type, self.rule, self.route, cost, memory, self.note)


_HEADER = ("parameter", "module", "type", "rule", "route", "cost", "KiB/record", "note")


class RuleTable(list[RuleRow]):
    """The rows of ``explain``; printing it prints the table."""

    def __str__(self) -> str:
        return format_table(self)


def format_table(rows: list[RuleRow]) -> str:
    """The rows as text with aligned columns, one line each, under a header."""
    cells = [_HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _rule_name(module: nn.Module) -> str:
    sampler = sampler_of(module)
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
    """For each parameter every place that holds it: (its full name there, module path, module)."""
    owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((f"{path}.{name}" if path else name, path, module))
    return owners


def _handlers(model: nn.Module, mode: str) -> dict[int, tuple[str, nn.Module]]:
    """For each module the one that answers for its parameters: itself, or the root above it that is run again."""
    handlers: dict[int, tuple[str, nn.Module]] = {}
    modules: Iterator[tuple[str, nn.Module]] = watched_modules(model) if mode == "bk" else hooked_modules(model)
    for path, hooked in modules:
        alone = sampler_of(hooked) is not None or (mode == "bk" and replays_lookup(hooked))
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
    """Route, extra multiplications and numbers held of one parameter, for one record of ``length`` positions."""

    length: int
    kinds: dict[str, int]
    """Which kinds of use it has, and how many."""

    def __call__(self, parameter: nn.Parameter) -> tuple[str, float | None, int]:
        numel, length = parameter.numel(), self.length
        if self.kinds.keys() & {"rows", "replay"} or parameter.dim() != 2:
            route = "replay" if "replay" in self.kinds else "rows"
            return route, None if route == "replay" else 0.0, _BYTES * numel
        rows, columns = parameter.shape
        dense, lookups = length * self.kinds.get("dense", 0), length * self.kinds.get("lookup", 0)
        if dense and keeps(length, rows, columns):
            route = "+".join(["kept"] + ["lookup"] * bool(lookups))
            return route, 0.0, _BYTES * (numel + lookups * columns)
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
    """One row per trainable parameter: which rule computes its per-sample gradients, what that costs, what is refused.

    Args:
        model: any model; call ``register_rules(model)`` first to see what ``make_private`` would use.
        mode: ``grad_sample_mode``.
        length: positions per record, for cost and memory; every module is taken to be used once per place.

    Returns:
        A list of :class:`RuleRow` that prints as a table. A tied parameter has one row, which names the other places.

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
