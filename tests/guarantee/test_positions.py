"""Arguments that name positions, as ``logits_to_keep`` does: a record alone, without padding, has other positions."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import FORWARD_ONLY, Rows, private
from tiny_models import gpt2, llama, token_batch

from opacus_ac.grad_sample.alone.positions import take_call
from opacus_ac.grad_sample.alone.single import Cut

ROWS, LENGTH = 6, 8
KEPT = {
    "two": 2,
    "as many as the shortest record has": 3,
    "more than the shortest record has": 6,
    "all": LENGTH,
    "zero, which means all": 0,
    "more than there are": 2 * LENGTH,
    "positions": torch.tensor([2, 4, 5, 7]),
    "as many positions as records": torch.tensor([1, 2, 3, 4, 5, 6]),
}


def batch_of(side):
    """Records of 3 to 8 tokens, padded on one side; nothing predicts a record's first token."""
    rows = token_batch(ROWS, LENGTH)
    if side == "left":
        rows = {name: values.flip(1) for name, values in rows.items()}
    first = rows["attention_mask"].argmax(1, keepdim=True)
    rows["labels"] = rows["labels"].scatter(1, first, -100)
    rows["position_ids"] = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return rows


def losses(net, batch, kept, *, padding=False):
    """Loss of each record ``[B]`` over the positions that are kept and predict a token of its own."""
    names = ("input_ids", "attention_mask", "position_ids")
    logits = net(**{name: batch[name] for name in names}, logits_to_keep=kept).logits
    positions = torch.arange(LENGTH)[slice(-kept, None) if isinstance(kept, int) else kept]
    next_labels = F.pad(batch["input_ids"] if padding else batch["labels"], (0, 1), value=-100)[:, 1:][:, positions]
    if not padding:
        next_labels = next_labels.masked_fill(batch["attention_mask"][:, positions] == 0, -100)
    return F.cross_entropy(logits.transpose(1, 2), next_labels, ignore_index=-100, reduction="none").sum(1)


def one_step(model, rows, kept, *, mode="bk", **options):
    data = Rows([{name: values[i] for name, values in rows.items()} for i in range(ROWS)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, net, optimizer, loader = private(model.train(), data, mode=mode, collate=to_the_longest)
        (batch,) = loader
        optimizer.zero_grad()
        losses(net, batch, kept, **options).mean().backward()
        optimizer.step()
    return optimizer


def to_the_longest(rows):
    """A function that makes batches, so that the loader is not known to pad every record to one length."""
    return torch.utils.data.default_collate(rows)


@pytest.mark.parametrize("mode", ["bk", "hooks"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kept", KEPT)
def test_logits_of_some_positions_are_no_coupling(kept, side, mode):
    """Found by a study: a record shorter than the longest reply of its batch was refused for its padding."""
    torch.manual_seed(0)
    assert one_step(llama(), batch_of(side), KEPT[kept], mode=mode).alone.compared >= 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kept", [3, 6, torch.tensor([2, 4, 5, 7])], ids=str)
def test_what_depends_on_padding_is_still_refused(kept, side):
    torch.manual_seed(0)
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = llama(rope_scaling=scaling, max_position_embeddings=4)
    with pytest.raises(ValueError, match=r"pads it|was changed"):
        one_step(model, batch_of(side), kept)


@pytest.mark.parametrize("kept", [6, torch.tensor([2, 4, 5, 7])], ids=str)
def test_a_loss_on_padding_is_still_refused(kept):
    """The short record has a gradient from outputs that it does not have alone."""
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="pads it"):
        one_step(llama(), batch_of("left"), kept, padding=True)


@pytest.mark.parametrize("kept", [3, 6, torch.tensor([2, 4, 5, 7])], ids=str)
def test_mixed_records_are_still_refused(kept):
    torch.manual_seed(0)
    model = llama()
    model.model.norm.register_forward_hook(lambda _module, _args, output: output - output.mean(0))
    with pytest.raises(ValueError, match="is not the one that it gets alone"):
        one_step(model, batch_of("left"), kept)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kept", KEPT)
def test_zeroth_order_compares_the_same_positions(kept, side, right):
    torch.manual_seed(0)
    rows = batch_of(side)
    data = Rows([{name: values[i] for name, values in rows.items()} for i in range(ROWS)])
    model = llama() if right else gpt2()
    if not right:
        model.transformer.ln_f.register_forward_hook(lambda _module, _args, output: output - output.mean(0))
    _, net, optimizer, loader = private(model.eval(), data, collate=to_the_longest, **FORWARD_ONLY)
    (batch,) = loader
    with contextlib.nullcontext() if right else pytest.raises(ValueError, match="gets alone"):
        optimizer.step(lambda: losses(net, batch, KEPT[kept]))
    assert (optimizer.measurement.outputs.compared == 3) == right


def positions_of(kind, batch):
    """Arguments that tell the positions of a batch ``[B, T]``."""
    count, length = batch["input_ids"].shape
    steps = torch.arange(length)
    return {
        "for all records": {"position_ids": steps[None]},
        "for each record": {"position_ids": steps.expand(count, -1)},
        "in the cache": {"cache_position": steps},
        "none": {},
    }[kind]


@pytest.mark.parametrize("mode", ["bk", "hooks"])
@pytest.mark.parametrize("kind", ["for all records", "for each record", "in the cache", "none"])
def test_positions_may_be_told_for_all_records_together(kind, mode):
    """Batches have other lengths: one table of positions was taken for a length that all of them must have."""
    torch.manual_seed(0)
    rows = token_batch(12, LENGTH)
    data = Rows([{name: values[i] for name, values in rows.items()} for i in torch.randperm(12).tolist()])
    draws = torch.Generator().manual_seed(1)  # batches that have three records and several lengths
    lengths = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, net, optimizer, loader = private(
            llama().train(), data, mode=mode, batch_size=4, collate=without_padding, noise_generator=draws
        )
        for _ in range(3):
            for batch in loader:
                optimizer.zero_grad()
                names = ("input_ids", "attention_mask")
                logits = net(**{name: batch[name] for name in names}, **positions_of(kind, batch)).logits
                targets = batch["labels"][:, 1:]
                F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none").sum(1).mean().backward()
                optimizer.step()
                lengths.add(batch["input_ids"].shape[1])
    assert len(lengths) > 1
    assert optimizer.alone.compared >= 3


def without_padding(rows):
    """Cut a batch, padded on the right, to its longest record."""
    batch = torch.utils.data.default_collate(rows)
    return {name: values[:, batch["attention_mask"].any(0)] for name, values in batch.items()}


def test_positions_with_a_first_dimension_of_their_own():
    """``[3, B, T]``, as models of text and pictures have them, also where a batch has three records."""
    for rows in (3, 4):
        values = torch.arange(3 * rows * 5).reshape(3, rows, 5)
        _, own = take_call(Cut(rows, 1, 1, positions=(0, 4, 5)), ((), {"position_ids": values}))
        assert torch.equal(own["position_ids"], values[:, 1:2, :4])


@pytest.mark.parametrize("length", [5, 6])
def test_positions_with_a_last_dimension_of_their_own(length):
    """``[B, T, 2]``, also where a batch has as many records as positions."""
    values = torch.arange(5 * length * 2).reshape(5, length, 2)
    _, own = take_call(Cut(5, 1, 1, positions=(1, 4, length)), ((), {"position_ids": values}))
    assert torch.equal(own["position_ids"], values[1:2, 1:4])
