"""Checks that the loss of a Trainer does not couple records: compares records in a batch with each record alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from opacus_ac.grad_sample.checks.chosen_records import choose_records, fresh, named_rows, same
from opacus_ac.grad_sample.checks.independence import check_losses_add_up, expect_mean
from opacus_ac.grad_sample.oracle import select_records, trim_padding
from opacus_ac.noise.secret_state import secret_randomness
from opacus_ac.sampling.users import UserRows, row_count

Collate = Callable[[list[Any]], Any]


def check_some_records(
    loss_of: Callable[[Any], Any],
    dataset: Any,
    collate: Collate,
    users: UserRows | None = None,
    *,
    rtol: float = 3e-4,
    floor: float = 5e-5,
) -> None:
    """Check that the loss of a batch of some records is the mean of the losses of each record alone.

    The check takes forward passes only. Its records differ in length and in label, and each is collated with the others
    and by itself. So it finds losses that depend on the padded length, on the classes in the batch, or on the order.

    Args:
        loss_of: returns the loss of a batch, and may change the batch.
        dataset: the records.
        collate: makes a batch of a list of records.
        users: counts the users of a batch, where a record is a user.
        rtol: tolerance relative to the losses.
        floor: absolute tolerance, for rounding.

    Raises:
        AssertionError: If the losses differ. The message contains losses of records, so it is private.
    """
    with torch.no_grad(), secret_randomness():
        records = choose_records(dataset, usable=lambda record: _is_kept(record, collate))
        if len(records) < 2:
            return
        if users is None:
            _check_rows(loss_of, records, collate, rtol, floor)
        else:
            _check_users(loss_of, records[:2], collate, users, rtol, floor)


def _is_kept(record: Any, collate: Collate) -> bool:
    """Say whether ``collate`` keeps a record that is alone; True where that cannot be found out."""
    try:
        return all(len(rows) for _, rows in named_rows(collate(fresh([record]))))
    except Exception:  # it may need two records
        return True


def _check_rows(loss_of: Callable[[Any], Any], records: list[Any], collate: Collate, rtol: float, floor: float) -> None:
    """Compare losses of records alone with the losses of batches.

    The batches are all records in two orders, and the first record, the largest, with each of the others.
    """

    def batch(places: list[int]) -> Any:
        made = collate(fresh([records[place] for place in places]))
        return with_fewer_labels(made, places.index(0)) if 0 in places else made

    whole = list(range(len(records)))
    together = batch(whole)
    reproducible = same(together, batch(whole))
    parts = _alone(batch, whole) if reproducible else None
    if parts is None:
        # A collate that draws at random would give a record alone another mask, so records are cut out of the batch.
        parts = [trim_padding(select_records(together, torch.tensor([row]))) for row in whole]
    alone = [float(loss_of(fresh(part))) for part in parts]
    expect_mean(float(loss_of(fresh(together))), alone, rtol, floor)
    if reproducible:
        for places in [whole[::-1], *([0, other] for other in whole[1:] if len(whole) > 2)]:
            expect_mean(float(loss_of(batch(places))), [alone[place] for place in places], rtol, floor)


def _alone(batch: Callable[[list[int]], Any], places: list[int]) -> list[Any] | None:
    """Return a batch of each record alone; None where ``collate`` needs two records."""
    try:
        return [batch([place]) for place in places]
    except Exception:
        return None


def _check_users(
    loss_of: Callable[[Any], Any], records: list[Any], collate: Collate, users: UserRows, rtol: float, floor: float
) -> None:
    """Compare two users together, alone, and with one more filler row each.

    The number of filler rows depends on the other users of a batch, so filler rows must not change a loss.
    """

    def loss(batch: Any, count: int) -> float:
        with users.suppose(row_count(batch) // count):
            return float(loss_of(fresh(batch)))

    batch = collate(fresh(records))
    if same(batch, collate(fresh(records))):
        expect_mean(loss(batch, 2), [loss(collate(fresh([user])), 1) for user in records], rtol, floor)
    batch, rows = with_fewer_labels(batch), row_count(batch) // 2
    with users.suppose(rows):
        check_losses_add_up(loss_of, batch, rtol=rtol, rows_per_record=rows)
    labelled = _labelled_row(batch, rows)
    if labelled is None:
        return
    with users.suppose(rows + 1):
        # With equally many labelled rows each, a mean over rows would be the same as a mean over users.
        different = _with_one_row_more(batch, rows, labelled)
        check_losses_add_up(loss_of, different, rtol=rtol, rows_per_record=rows + 1)
    before, filled = loss(batch, 2), loss(_with_one_row_more(batch, rows), 2)
    if not abs(before - filled) <= rtol * max(abs(before), abs(filled)):
        raise AssertionError(
            "the loss of a user changes with the number of filler rows (rows without labels) in its batch: make it a "
            "mean over the user's labelled rows (opacus_ac.loss.per_user_loss)"
        )


def _labels(batch: Any) -> Any:
    """Return a copy of the labels ``[R, T]`` of a batch of token ids; None without such labels."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return None
    return labels.clone()


def _labelled_row(batch: Any, rows: int) -> int | None:
    """Return the first labelled row of the user with more labelled rows, of two users with ``rows`` rows each.

    Returns:
        The number of the row in the batch; None if no row has a label.
    """
    labels = _labels(batch)
    labelled = torch.zeros(0) if labels is None else (labels != -100).any(1).view(2, rows)
    if not bool(labelled.any()):
        return None
    more = int(labelled.sum(1).argmax())
    return more * rows + int(labelled[more].nonzero()[0])


def _with_one_row_more(batch: Any, rows: int, labelled: int | None = None) -> Any:
    """Return a batch of two users, ``rows`` rows each, with one more row for each.

    The new rows have no labels, except that a copy of the row ``labelled`` keeps its labels.
    """
    more = [0, rows]
    if labelled is not None:
        more[labelled // rows] = labelled
    longer = select_records(batch, torch.tensor([*range(rows), more[0], *range(rows, 2 * rows), more[1]]))
    for user in (0, 1):
        if labelled is None or user != labelled // rows:
            longer["labels"][user * (rows + 1) + rows] = -100
    return longer


def with_fewer_labels(batch: Any, row: int = 0) -> Any:
    """Return a batch of token ids with half of one record's labels masked, which shows in a mean over all tokens."""
    labels = _labels(batch)
    if labels is None:
        return batch
    labelled = (labels[row] != -100).nonzero().reshape(-1)
    labels[row, labelled[: labelled.numel() // 2]] = -100
    changed = fresh(batch)
    changed["labels"] = labels
    return changed
