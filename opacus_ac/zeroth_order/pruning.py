"""Which coordinates DP-ZOPO trains: scores of public weights, and the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.zeroth_order.coordinates import Index
from opacus_ac.zeroth_order.directions import derived_seed
from opacus_ac.zeroth_order.settings import Pruning


def choose(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    pruning: Pruning,
    *,
    stage: int,
    seed: int,
    before: Sequence[Index] | None = None,
) -> list[Index]:
    """Return the coordinates to train in ``stage``, one sorted index per tensor.

    Args:
        module: model, for SynFlow.
        parameters: trainable tensors.
        pruning: what to choose by.
        stage: stage that begins.
        seed: public seed, for random scores.
        before: coordinates trained so far, which "incremental" keeps.

    Guarantees:
        A function of the weights and of public constants: no record is read, so the choice costs no privacy when the
        weights are public, as pretrained and as released weights are.

    Raises:
        ValueError: If scores rank nothing or are not finite, or SynFlow cannot run the model.
    """
    sizes = [p.numel() for p in parameters]
    count = max(1, round(pruning.ratio_of(stage) * sum(sizes)))
    scores = _scores(module, parameters, pruning, count, derived_seed(seed, stage))
    if pruning.keep == "low":
        scores.neg_()
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            f'pruning.score="{pruning.score}" gave scores that are not finite: use score="magnitude" or "random"'
        )
    if bool((scores == scores[0]).all()) and count < scores.numel():
        raise ValueError(
            f'pruning.score="{pruning.score}" gives every coordinate the same score {float(scores[0]):g}, which ranks '
            'nothing (weights that start at zero, as in LoRA?): use score="random"'
        )
    if before is not None and pruning.strategy == "incremental":
        for part, index in zip(scores.split(sizes), before, strict=True):
            part.index_fill_(0, torch.arange(part.numel()) if index is None else index.cpu().long(), torch.inf)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.topk(count, sorted=False).indices] = True
    return [
        _narrow(part.nonzero().view(-1), part.numel()).to(p.device)
        for part, p in zip(chosen.split(sizes), parameters, strict=True)
    ]


def _narrow(index: Tensor, size: int) -> Tensor:
    """Return the index in four bytes a coordinate where they suffice."""
    return index.int() if size < 2**31 else index


def _scores(module: nn.Module, parameters: Sequence[nn.Parameter], pruning: Pruning, count: int, seed: int) -> Tensor:
    """Return the scores of all coordinates, ``[d]`` float32 on the CPU."""
    if pruning.score == "magnitude":
        return torch.cat([p.detach().abs().float().view(-1).cpu() for p in parameters])
    if pruning.score == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(sum(p.numel() for p in parameters), generator=generator)
    return _synflow(module, parameters, pruning, count)


def _synflow(module: nn.Module, parameters: Sequence[nn.Parameter], pruning: Pruning, count: int) -> Tensor:
    """Return theta dR/dtheta of the absolute weights, R the sum of the model's outputs for a constant input.

    References:
        arXiv 2006.05467, equation 2 and algorithm 1.
    """
    arguments, named = _public_input(module, pruning.public_input)
    names = {p: name for name, p in module.named_parameters()}
    positive = {name: p.detach().abs() for name, p in module.named_parameters()}
    own = [names[p] for p in parameters]
    total = sum(p.numel() for p in parameters)
    scores = torch.empty(0)
    for r in range(1, pruning.rounds + 1):
        leaves = [positive[name].requires_grad_() for name in own]
        with torch.enable_grad():
            output = torch.func.functional_call(module, positive, arguments, named)
            flow = _tensor(output).double().sum()
            found = torch.autograd.grad(flow, leaves, allow_unused=True)
        with torch.no_grad():
            parts = [(torch.zeros_like(w) if g is None else w * g).float() for w, g in zip(leaves, found, strict=True)]
            scores = torch.cat([part.view(-1).cpu() for part in parts])
            if r < pruning.rounds:
                kept = max(count, round(total * (count / total) ** (r / pruning.rounds)))
                threshold = scores.kthvalue(scores.numel() - kept + 1).values.item()
                for name, part in zip(own, parts, strict=True):
                    positive[name] = positive[name].detach() * (part >= threshold)
    return scores


def _public_input(module: nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of the constant forward pass."""
    if given is None:
        if getattr(getattr(module, "config", None), "vocab_size", None) is None:
            raise ValueError(
                f'pruning.score="synflow" needs a constant input for {type(module).__name__}: give '
                "pruning.public_input=torch.ones(1, ...), or another score"
            )
        device = next(module.parameters()).device
        return (), {"input_ids": torch.ones((1, 1), dtype=torch.long, device=device)}
    if isinstance(given, Mapping):
        return (), dict(given)
    return (given if isinstance(given, tuple) else (given,)), {}


def _tensor(output: Any) -> Tensor:
    """Return the outputs of a model as one tensor."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None:
        found = getattr(output, "last_hidden_state", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f'pruning.score="synflow" needs a model that returns a tensor or logits, not {type(output).__name__}: use '
            'score="magnitude" or "random"'
        )
    return found
