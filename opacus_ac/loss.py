"""Losses per record, so that the gradient of a record does not depend on the other records of its batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

# Bytes of logits per chunk: few enough for the last-level cache on CPU, enough to fill the device elsewhere. Much
# smaller chunks are a little faster on idle cores. But every operation waits for its slowest thread, and on shared
# cores these waits, several per chunk, cost more than memory does.
_CPU_CHUNK_BYTES = 16 << 20
_DEVICE_CHUNK_BYTES = 64 << 20
# The smallest float16 is 6e-8. So a float16 gradient is kept without its weight, and scaled up by this factor, until
# the weight is known.
_HALF_SCALE = 2.0**15


def per_user_loss(row_losses: torch.Tensor, has_labels: torch.Tensor, users: int) -> torch.Tensor:
    """Return the loss of each user: the mean over the user's rows that have labels.

    Args:
        row_losses: losses of the rows ``[R]``. The rows of a user stand one after the other, as many for each user.
        has_labels: whether a row has labels, ``[R]``. Rows without labels, such as filler rows, do not count.
        users: number of users in the batch: ``loader.users.count(len(row_losses))`` for a batch of the private loader.

    Returns:
        ``[users]``; a user without labelled rows has loss 0.

    Guarantees:
        Entry u depends on the rows of user u alone, and not on the number of its filler rows. The plain mean over a
        user's rows does not have this property: it shrinks when a user with more rows joins the batch.

    Raises:
        ValueError: If the shapes differ, or if the number of rows is not a multiple of ``users``.

    >>> per_user_loss(torch.tensor([1.0, 3.0, 5.0, 0.0]), torch.tensor([True, True, True, False]), users=2).tolist()
    [2.0, 5.0]
    """
    if row_losses.dim() != 1 or has_labels.shape != row_losses.shape:
        raise ValueError(
            f"expected row_losses [R] and has_labels [R], got {tuple(row_losses.shape)} and {tuple(has_labels.shape)}"
        )
    if users < 1 or row_losses.numel() % users or not row_losses.numel():
        raise ValueError(f"{row_losses.numel()} rows are not as many for each of users={users}")
    counted = has_labels.to(device=row_losses.device, dtype=torch.bool).view(users, -1)
    # Selected, not multiplied by zero, because a row that does not count may have a loss that is not finite.
    return torch.where(counted, row_losses.view(users, -1), 0).sum(1) / counted.sum(1).clamp(min=1)


def token_losses(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Return the cross entropy ``[B, T]`` of every position; 0 where the label is ``ignore_index``.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``.
        ignore_index: label of the positions to skip.

    Raises:
        ValueError: If the shapes do not fit.
        IndexError: If a label is neither a token nor ``ignore_index``.
    """
    _check_shapes(logits, labels)
    rows, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if torch._C._functorch.peek_interpreter_stack() is None:
        _check_labels(labels, logits.shape[-1], ignore_index)
        losses: torch.Tensor = _TokenLoss.apply(rows, targets, ignore_index)
    else:  # torch.func does not support functions with a context
        losses = _plain_token_loss(rows, targets, ignore_index)
    return losses.view(labels.shape)


def per_record_token_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Return the mean cross entropy over each record's own labelled positions.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``; positions equal to ``ignore_index`` do not count.
        ignore_index: label of the positions to skip.

    Returns:
        ``[B]`` in float32 or float64; a record without labelled positions has loss 0.

    Guarantees:
        The computation needs one buffer of the size of the logits, for their gradient. Positions that do not count get
        a gradient of exactly 0, whatever their logits.

    Raises:
        ValueError: If the shapes do not fit.
        IndexError: If a label is neither a token nor ``ignore_index``.

    >>> loss = per_record_token_loss(torch.zeros(2, 3, 4), torch.tensor([[1, 2, -100], [-100, -100, -100]]))
    >>> [round(x, 4) for x in loss.tolist()]
    [1.3863, 0.0]
    """
    losses = token_losses(logits, labels, ignore_index)
    counts = (labels != ignore_index).sum(1).clamp(min=1)
    return losses.sum(1) / counts


def per_record_causal_lm_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Return the next-token loss of each record: position t predicts label t + 1.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, not shifted; ``ignore_index`` positions are not predicted.
        ignore_index: label of the positions to skip.

    Returns:
        ``[B]``, the mean over each record's own predicted tokens (0 for a record without any).

    Guarantees:
        Entry i depends on record i alone. The usual mean over all tokens of the batch does not have this property:
        there a record's gradient changes when another, longer record joins the batch.

    Raises:
        ValueError: If the shapes do not fit.
        IndexError: If a label is neither a token nor ``ignore_index``.

    >>> round(per_record_causal_lm_loss(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]])).item(), 4)
    0.6931
    """
    _check_shapes(logits, labels)
    # Shifting the labels copies [B, T]. Cutting off the last logits would copy [B, T, V], forward and backward.
    return per_record_token_loss(logits, next_tokens(labels, ignore_index), ignore_index)


def fused_causal_lm_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Return the losses of ``per_record_causal_lm_loss``, and overwrite ``logits`` with their gradient to save memory.

    One buffer ``[B, T, V]`` serves as logits, probabilities and gradient. Without gradients (``torch.no_grad``) the
    logits stay as they are.

    Args:
        logits: ``[B, T, V]``. Their values are lost, so the operation that computed them must not need them again. A
            leaf, a view, and a tensor that is not contiguous or that retains its gradient are copied first and stay as
            they were.
        labels: ``[B, T]``, not shifted; ``ignore_index`` positions are not predicted.
        ignore_index: label of the positions to skip.

    Returns:
        ``[B]`` in float32 or float64, the mean over each record's own predicted tokens (0 for a record without any).
        ``.mean().backward()`` is the fast case. Any other weighting of the records costs one more pass.

    Guarantees:
        Entry i depends on record i alone. Values and gradients are those of ``per_record_causal_lm_loss``. Positions
        that are not predicted get a gradient of exactly 0, whatever their logits. Half precision is computed in
        float32. The gradient is rounded once for the mean of bfloat16 logits, and twice otherwise. It reaches the hooks
        that were on ``logits`` before the call, and is not written to afterwards.

    Raises:
        ValueError: If the shapes do not fit.
        IndexError: If a label is neither a token nor ``ignore_index``.
        RuntimeError: If, in the backward pass, the overwritten values are needed: by the operation that made
            ``logits``, by another operation that saved them, by a loss that used them after this one, by a second
            backward pass or by a second derivative. ``torch.autograd.grad`` cannot return the gradient of ``logits``,
            because their values are lost.

    >>> hidden = torch.zeros(1, 3, 2, requires_grad=True)
    >>> loss = fused_causal_lm_loss(hidden * 1.0, torch.tensor([[0, 1, 1]])).mean()
    >>> loss.backward()
    >>> round(loss.item(), 4), hidden.grad.tolist()
    (0.6931, [[[0.25, -0.25], [0.25, -0.25], [0.0, 0.0]]])
    """
    _check_shapes(logits, labels)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return per_record_causal_lm_loss(logits, labels, ignore_index)
    targets = next_tokens(labels, ignore_index)
    _check_labels(targets, logits.shape[-1], ignore_index)
    # If these were overwritten, other holders of the values would see it, or would not get the gradient.
    if logits.is_leaf or logits.retains_grad or logits._is_view() or not logits.is_contiguous():
        logits = logits.clone(memory_format=torch.contiguous_format)
    losses: torch.Tensor = _FusedTokenLoss.apply(logits, targets, ignore_index)[0]
    return losses


def _plain_token_loss(rows: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Return the cross entropies ``[N]`` of rows ``[N, V]`` as torch computes them."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="none")


class _TokenLoss(torch.autograd.Function):
    """Cross entropies ``[N]`` of rows ``[N, V]``, computed in chunks of rows without a buffer for the probabilities.

    ``F.cross_entropy`` keeps log-probabilities, and makes two gradients in its backward pass.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
        """Return losses in float32 or float64. Rows that do not count have loss 0."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        counted = targets != ignore_index
        indices = torch.where(counted, targets, 0)
        total = torch.empty(len(rows), dtype=wide, device=rows.device)
        for part in _chunks(rows, wide):
            values = rows[part].to(wide)
            largest = values.amax(1, keepdim=True)
            # torch.logsumexp does not serve: an infinite logit must make the loss NaN, as in F.cross_entropy.
            total[part] = largest[:, 0] + (values - largest).exp_().sum(1).log_()
        chosen = rows.gather(1, indices[:, None])[:, 0].to(wide)
        ctx.save_for_backward(rows, targets, total)
        ctx.ignore_index = ignore_index
        return torch.where(counted, total - chosen, 0)

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient ``[N, V]`` of the rows."""
        rows, targets, total = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            losses = _plain_token_loss(rows, targets, ctx.ignore_index)
            return torch.autograd.grad(losses, rows, grad_losses, create_graph=True)[0], None, None
        counted = targets != ctx.ignore_index
        indices = torch.where(counted, targets, 0)[:, None]
        weights = torch.where(counted, grad_losses.to(total.dtype), 0)[:, None]
        gradient = torch.empty_like(rows, memory_format=torch.contiguous_format)
        every = bool(counted.all())
        for part in _chunks(rows, total.dtype):
            target = gradient[part]
            work = target if target.dtype == total.dtype else torch.empty_like(target, dtype=total.dtype)
            torch.sub(rows[part], total[part, None], out=work).exp_().mul_(weights[part])
            work.scatter_add_(1, indices[part], -weights[part])
            if not every:
                work.masked_fill_(~counted[part, None], 0)
            if work is not target:
                target.copy_(work)
        return gradient, None, None


def _chunks(rows: torch.Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Return slices of rows ``[N, V]`` that are computed together in ``dtype``."""
    limit = _CPU_CHUNK_BYTES if rows.device.type == "cpu" else _DEVICE_CHUNK_BYTES
    size = max(1, limit // max(1, rows.shape[1] * dtype.itemsize))
    return (slice(start, start + size) for start in range(0, len(rows), size))


def _check_labels(labels: torch.Tensor, tokens: int, ignore_index: int) -> None:
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= tokens))
    if bool(outside.any()):
        raise IndexError(f"labels must be in [0, {tokens}) or equal to ignore_index={ignore_index}")


class _FusedTokenLoss(torch.autograd.Function):
    """Mean cross entropy per record. The forward pass writes the gradient into the memory of the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, ignore_index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses ``[B]`` and the overwritten logits ``[B, T, V]``."""
        predicted = targets != ignore_index
        counts = predicted.sum(1).clamp(min=1)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # If the losses [B] get this gradient, the buffer is the gradient of the logits without another change.
        expected = torch.full(counts.shape, 1 / max(len(counts), 1), dtype=wide, device=logits.device)
        if logits.dtype == torch.float16:
            expected = counts.to(wide) * _HALF_SCALE
        weights = (expected / counts).repeat_interleave(targets.shape[1])
        losses = _overwrite(logits.detach().flatten(0, 1), targets.flatten(), weights, predicted.flatten())
        # The logits are an output only so that a loss that uses them later shows up in the backward pass.
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits)  # backward then checks that nothing has written to it
        ctx.expected, ctx.consumed = expected, False
        return losses.view(targets.shape).sum(1) / counts, logits

    @staticmethod
    def backward(
        ctx: Any, grad_losses: torch.Tensor | None, grad_logits: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None, None]:
        """Return the gradient ``[B, T, V]`` of the logits, which is the buffer itself."""
        if grad_logits is not None:
            raise RuntimeError(
                "fused_causal_lm_loss overwrote the logits, but a value that was computed from them afterwards needs "
                "their gradient: use per_record_causal_lm_loss, which keeps them"
            )
        if grad_losses is None:
            return None, None, None
        if ctx.consumed or torch.is_grad_enabled():  # once_differentiable does not refuse create_graph
            raise RuntimeError(
                "fused_causal_lm_loss allows one backward and no second derivative, because its gradient is handed on "
                "without a copy: use per_record_causal_lm_loss with retain_graph or create_graph"
            )
        (saved,) = ctx.saved_tensors
        ctx.consumed = True
        gradient = saved.detach()
        factors = grad_losses / ctx.expected
        if not bool(((factors - 1).abs() <= torch.finfo(factors.dtype).eps).all()):
            gradient.mul_(factors[:, None, None])
        return gradient, None, None


def _overwrite(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, predicted: torch.Tensor
) -> torch.Tensor:
    """Overwrite logits ``[N, V]`` with ``weights[n] * d loss[n] / d logits[n]`` and return the losses ``[N]``.

    Args:
        logits: ``[N, V]``.
        targets: ``[N]``, a token where ``predicted``.
        weights: ``[N]``, float32 or float64. Their dtype is the precision of the computation.
        predicted: ``[N]``, booleans. The other rows get loss and gradient 0, and are not read.
    """
    losses = torch.zeros_like(weights)
    targets = targets.masked_fill(~predicted, 0)
    predicted = predicted.cpu()  # waits for the device once, not once per chunk
    for part in _chunks(logits, weights.dtype):
        rows, mask = logits[part], predicted[part]
        index = mask.nonzero()[:, 0].to(logits.device)
        if 2 * len(index) >= len(rows):
            work = rows.to(weights.dtype)  # the rows themselves, if they have this dtype
            losses[part] = _overwrite_rows(work, targets[part], weights[part])
            if work.dtype != rows.dtype:
                rows.copy_(work)
            others = (~mask).nonzero()[:, 0].to(logits.device)
            rows.index_fill_(0, others, 0)
            losses[part].index_fill_(0, others, 0)
        else:  # most rows are prompts and padding, so the others are worth a copy
            work = rows[index].to(weights.dtype)
            rows.zero_()
            losses[part][index] = _overwrite_rows(work, targets[part][index], weights[part][index])
            rows[index] = work.to(rows.dtype)
    return losses


def _overwrite_rows(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Overwrite a chunk of rows ``[R, V]`` as ``_overwrite`` does, as if all of them were predicted."""
    target, weight = targets[:, None], weights[:, None]
    largest = logits.amax(1, keepdim=True)
    gap = largest - logits.gather(1, target)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    logits.mul_(weight / total).scatter_add_(1, target, -weight)
    # Computed from the logits, because the probability underflows where the loss is above 87.
    return (gap + total.log())[:, 0]


def next_tokens(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Return the label that each position predicts, ``[B, T]``. The last position predicts none."""
    shifted = torch.full_like(labels, ignore_index)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


def _check_shapes(logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"expected logits [B, T, V] and labels [B, T], got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
