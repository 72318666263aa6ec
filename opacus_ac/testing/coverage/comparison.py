"""One private step beside the gradients that plain autograd gives for each record alone."""

from __future__ import annotations

import copy
import re
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import opacus
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import opacus_ac
from opacus_ac.engine.privacy_engine import PrivacyEngine
from opacus_ac.testing.coverage.case import ONE_LENGTH, Case, Finding, Loss, NotBuilt, Row
from opacus_ac.testing.coverage.tiny import stacked
from opacus_ac.testing.rules import opacus_table_restored

#: Largest relative error of a gradient in float64 that is called exact.
EXACT = 1e-8
#: The same where a layer or the loss computes in float32: this many times what autograd differs from itself, at most
#: ``WIDEST``.
TIMES_FLOOR, WIDEST = 10.0, 1e-5
#: The same for models that have no float64. Records are clipped by upper bounds of their norms, which are wider there.
EXACT_FLOAT32 = 1e-3
_REFUSALS = (ValueError, NotImplementedError)
_OF_THE_PACKAGE = tuple(str(Path(str(package.__file__)).parent) for package in (opacus_ac, opacus))


def examine(kind: str, case: Case, mode: str) -> Finding:
    """Build a case, take one private step, and say what came of it.

    Args:
        kind: the list that the case is in.
        case: what to build.
        mode: "bk" or "hooks".
    """
    began = time.perf_counter()
    found = Finding(kind, case.name, mode, "crash")
    with warnings.catch_warnings(), opacus_table_restored():
        warnings.simplefilter("ignore")
        try:
            torch.manual_seed(0)
            model, rows = _made(case)
        except NotBuilt as reason:
            changes: dict[str, Any] = {"outcome": "not built", "message": str(reason)}
        else:
            changes = _compared(model, rows, case.loss, mode)
    return Finding(**{**vars(found), **changes, "seconds": round(time.perf_counter() - began, 2)})


def _made(case: Case) -> tuple[nn.Module, Sequence[Row]]:
    """Return model and records, in float64 or, where a layer has no float64, in float32.

    Raises:
        NotBuilt: If the model does not run on two of its records.
    """
    try:
        model, rows = case.build()
        try:
            _tried(model, rows, case.loss)
        except RuntimeError:
            model, rows = model.float(), [_single(row) for row in rows]
            _tried(model, rows, case.loss)
    except TimeoutError:
        raise
    except Exception as error:
        raise NotBuilt(sentence(error)) from error
    return model, rows


def _tried(model: nn.Module, rows: Sequence[Row], loss: Loss) -> None:
    value = loss(copy.deepcopy(model), stacked(rows[:2]))
    if not bool(value.isfinite()):
        raise RuntimeError(f"its loss is {float(value.detach())}")
    value.backward()


def _single(row: Row) -> Row:
    return {name: value.float() if value.dtype == torch.float64 else value for name, value in row.items()}


@dataclass(frozen=True)
class _Wanted:
    """The clipped mean of the gradients of single records, the norm they are clipped at, and autograd's rounding."""

    gradient: list[Tensor]
    clip: float
    floor: float


def _wanted(model: nn.Module, rows: Sequence[Row], loss: Loss) -> _Wanted | None:
    """Return what a private step shall release; None where a record alone cannot be run."""
    try:
        alone = [_gradients(model, [row], loss) for row in rows]
    except ValueError:  # batch normalisation of one vector
        return None
    repeated = [_gradients(model, [row] * len(rows), loss) for row in rows]
    norms = _norms(alone)
    clip = float(norms.median())
    gradient = _clipped_mean(alone, norms, clip)
    return _Wanted(gradient, clip, _distance(_clipped_mean(repeated, norms, clip), gradient))


def _compared(model: nn.Module, rows: Sequence[Row], loss: Loss, mode: str) -> dict[str, Any]:
    wanted = _wanted(model, rows, loss)
    if wanted is not None and not 0 < wanted.clip < float("inf"):
        return {"outcome": "not built", "message": f"the median norm of its gradients is {wanted.clip:g}"}
    found = _one_step(copy.deepcopy(model), rows, loss, mode, wanted, stacked)
    if found.get("where") != "first batch" or found["outcome"] != "refused":
        return found
    # What the refusal of a padded batch asks for: a collate function that cannot pad.
    again = _one_step(model, rows, loss, mode, wanted, None)
    if again["outcome"] == "exact":
        return {**again, "outcome": ONE_LENGTH, "message": found["message"]}
    return found if again["outcome"] == "refused" else again


def _one_step(
    model: nn.Module, rows: Sequence[Row], loss: Loss, mode: str, wanted: _Wanted | None, collate: Any
) -> dict[str, Any]:
    """Take one private step, and compare.

    Args:
        model: is changed.
        rows: its records.
        loss: the loss of a batch.
        mode: "bk" or "hooks".
        wanted: what the step shall release.
        collate: makes a batch of records; None for that of torch.
    """
    reached: list[str] = []
    try:
        got = _released(model, rows, loss, mode, 1.0 if wanted is None else wanted.clip, reached, collate)
    except TimeoutError:
        raise
    except Exception as error:
        where = "first batch" if reached else "make_private"
        return {"outcome": _outcome_of(error), "where": where, "message": sentence(error)}
    if wanted is None:
        return {"outcome": "wrong", "message": "a record alone cannot be run, and the batch can"}
    off = _distance(got, wanted.gradient)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    entries = zip(names, got, wanted.gradient, strict=True)
    worst = max(entries, key=lambda entry: float((entry[1] - entry[2]).norm()))[0]
    single = any(p.dtype == torch.float32 for p in model.parameters())
    exact = off <= (EXACT_FLOAT32 if single else max(EXACT, min(TIMES_FLOOR * wanted.floor, WIDEST)))
    message = "" if exact else f"off by {off:.0e}, most in {worst}"
    return {"outcome": "exact" if exact else "wrong", "message": message, "error": off, "floor": wanted.floor}


def _gradients(model: nn.Module, rows: Sequence[Row], loss: Loss) -> list[Tensor]:
    """Return the gradients of the loss of some records on a copy of a model, in float64; zeros where unused."""
    twin = copy.deepcopy(model)
    value = loss(twin, stacked(rows))
    twin.zero_grad()
    if value.requires_grad:
        value.backward()  # and not autograd.grad, which lacks what reversible layers leave on the weights by themselves
    found = [(p, p.grad) for p in twin.parameters() if p.requires_grad]
    return [(torch.zeros_like(p) if g is None else g).to_dense().double() for p, g in found]


def _norms(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack([g.square().sum() for g in record]).sum().sqrt() for record in gradients])


def _clipped_mean(gradients: Sequence[Sequence[Tensor]], norms: Tensor, clip: float) -> list[Tensor]:
    factors = (clip / norms).clamp(max=1.0).nan_to_num(1.0)
    sums = [torch.zeros_like(g) for g in gradients[0]]
    for factor, record in zip(factors, gradients, strict=True):
        for total, gradient in zip(sums, record, strict=True):
            total += factor * gradient
    return [total / len(gradients) for total in sums]


def _distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Return the norm of a difference, relative to what is wanted."""
    size = float(torch.stack([w.square().sum() for w in want]).sum().sqrt())
    return float(torch.stack([(g - w).square().sum() for g, w in zip(got, want, strict=True)]).sum().sqrt()) / size


class _Rows(torch.utils.data.Dataset[Row]):
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def _released(
    model: nn.Module, rows: Sequence[Row], loss: Loss, mode: str, clip: float, reached: list[str], collate: Any
) -> list[Tensor]:
    """Return the gradient of one private step: what plain SGD at rate one takes off the weights."""
    params = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in params]
    wrapped, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(params, lr=1.0),
        data_loader=DataLoader(_Rows(rows), batch_size=len(rows), collate_fn=collate),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        clipping="flat",
        grad_sample_mode=mode,
        ema_decay=None,
        lr_control=False,
        normalize=False,
    )
    reached.append("first batch")
    batch = next(iter(loader))
    optimizer.zero_grad()
    loss(wrapped, batch).backward()
    optimizer.step()
    return [(old - p.detach()).double() for old, p in zip(before, params, strict=True)]


def _outcome_of(error: Exception) -> str:
    """Say "refused" where this package or Opacus raised the error on purpose, else "crash"."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    deliberate = isinstance(error, _REFUSALS) or type(error).__module__.startswith("opacus")
    raised = last.filename.startswith(_OF_THE_PACKAGE) and (last.line or "").startswith("raise ")
    return "refused" if deliberate and raised else "crash"


def sentence(error: BaseException, most: int = 240) -> str:
    """Return the first sentence of an error's message, in one line; the type first where it is no refusal."""
    text = re.sub(r"""^\[\w+\(["']""", "", " ".join(str(error).split())) or type(error).__name__  # a list of Opacus's
    first = text.split(". ")[0].rstrip(".")
    shown = first if len(first) <= most else first[: most - 1] + "…"
    return shown if isinstance(error, _REFUSALS) else f"{type(error).__name__}: {shown}"
