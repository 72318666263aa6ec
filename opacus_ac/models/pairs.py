"""Language models that run each record as a pair of rows, such as a preferred and a rejected reply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from opacus_ac.loss import next_tokens, token_losses
from opacus_ac.models.loss_heads import PAIRS

_IGNORE = -100


def run_pairs(model: nn.Module) -> Callable[[], None]:
    """Let a language model take ids ``[B, 2, T]``, which it then runs as rows ``[2 B, T]``.

    The rows of a record stand one after the other. An engine that makes the model private afterwards adds up the
    gradients of both rows of a record before it clips. Ids ``[B, T]`` are run as before.

    Args:
        model: a model of transformers, or one that holds such a model and passes its arguments on, as LoRA does.

    Returns:
        A function that ends it.
    """
    outer: Any = model
    inner: Any = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    setattr(inner, PAIRS, True)
    handle = inner.register_forward_pre_hook(_Fold(), with_kwargs=True)

    def undo() -> None:
        handle.remove()
        delattr(inner, PAIRS)

    return undo


class _Fold:
    """Joins the first two dimensions of what a model gets."""

    of_records = True  # goes with the model where single records are run through it

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 3:
            return None
        return args, {
            name: value.flatten(0, 1)
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == ids.shape[:2]
            else value
            for name, value in kwargs.items()
        }


def log_probabilities(logits: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """Return the log-probability of the counted tokens of each row of each record.

    Args:
        logits: ``[2 B, T, V]``, of the rows.
        ids: ``[B, 2, T]``, the tokens.
        counted: ``[B, 2, T]``, nonzero where a token counts. The first token of a row is predicted by none.

    Returns:
        ``[B, 2]`` in float32 or float64, sums over the tokens.

    >>> import torch
    >>> ids = torch.tensor([[[0, 1, 1], [1, 0, 0]]])
    >>> value = log_probabilities(torch.zeros(2, 3, 2), ids, torch.tensor([[[0, 1, 1], [0, 1, 0]]]))
    >>> [round(x, 4) for x in value[0].tolist()]
    [-1.3863, -0.6931]
    """
    labels = next_tokens(ids.masked_fill(counted == 0, _IGNORE).flatten(0, 1), _IGNORE)
    return -token_losses(logits, labels, _IGNORE).sum(1).view(ids.shape[:2])
