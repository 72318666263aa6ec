"""Before the first step a few records that differ are put through collate, model and loss together and alone: what couples them shows."""

import functools
import random
from collections import UserDict, defaultdict

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers as hf
from helpers import classifier as mlp
from tiny_chat import byte_tokenizer
from tiny_trainer import trainer, weights
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.grad_sample.checks.chosen_records import choose_records, fresh, remade
from opacus_ac.integrations import PrivateTrainer
from opacus_ac.integrations.finetune import PadCollate
from opacus_ac.integrations.trainer.record_checks import check_some_records
from opacus_ac.loss import per_record_causal_lm_loss
from opacus_ac.sampling.public_randomness import carried_generator
from opacus_ac.testing import check_losses_add_up, check_records_independent, select_records

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning", "ignore::FutureWarning")
OFF = {"loss_bound": None}


def bert(cls=hf.BertForSequenceClassification, **changes):
    torch.manual_seed(0)
    return cls(hf.BertConfig(**{
        "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 32, "num_labels": 3, **changes,
    }))  # fmt: skip


def by_class(count=60):
    """Rows sorted by class, as files often are; the first and the second are of one class."""
    generator = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.randint(3, 60, (7,), generator=generator), "labels": 3 * i // count} for i in range(count)
    ]


def own(loss):
    """A trainer with the loss ``loss(logits, labels, inputs)``, which takes the labels out of the batch as many guides do."""

    class Own(PrivateTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            found = loss(model(**inputs).logits, labels, inputs)
            if not model.training:
                inputs["input_ids"].zero_()  # and spoils the batch, as long as nothing is to be differentiated
            if labels.dim() > 1:
                self.private_optimizer.record_losses(found.detach().expand(len(labels)))
            return found

    return Own


def in_batch_negatives(logits, labels, inputs):
    return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)))


def by_place(logits, labels, inputs):
    """The later in the batch, the heavier."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * torch.linspace(0.5, 1.5, len(losses))).mean()


CLASSES = {
    "a mean over records": (lambda logits, labels, inputs: F.cross_entropy(logits, labels), True),
    "class weights as factors": (
        lambda logits, labels, inputs: (F.cross_entropy(logits, labels, reduction="none") * (1.0 + labels)).mean(),
        True,
    ),
    "class weights": (
        lambda logits, labels, inputs: F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 3.0, 9.0])),
        False,
    ),
    "negatives in the batch": (in_batch_negatives, False),
    "by place in the batch": (by_place, False),
    "of the largest": (lambda logits, labels, inputs: F.cross_entropy(logits, labels, reduction="none").max(), False),
}


def refused(made):
    start = weights(made.model)
    with pytest.raises(ValueError, match="couples records"):
        made.train()
    assert torch.equal(weights(made.model), start)
    assert len(made.engine.accountant) == 0


@pytest.mark.parametrize("name", CLASSES)
def test_a_loss_of_ones_own_on_rows_sorted_by_class(name, tmp_path):
    loss, good = CLASSES[name]
    made = trainer(tmp_path, model=bert(), data=by_class(), cls=own(loss), settings=OFF, max_steps=1)
    if good:
        assert made.train().global_step == 1
    else:
        refused(made)


def ragged(count=40, lengths=(4, 6, 14)):
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(count):
        ids = torch.randint(3, tiny_models.VOCAB, (lengths[i % len(lengths)],), generator=generator)
        made.append({"input_ids": ids, "labels": ids.clone()})
    return made


def pad_left(records):
    longest = max(len(row["input_ids"]) for row in records)

    def padded(values, filling):
        return torch.cat([torch.full((longest - len(values),), filling), values])

    return {
        "input_ids": torch.stack([padded(row["input_ids"], 0) for row in records]),
        "attention_mask": torch.stack([padded(torch.ones_like(row["input_ids"]), 0) for row in records]),
        "labels": torch.stack([padded(row["labels"], -100) for row in records]),
    }


def pad_left_without_the_first_label(records):
    """Without padding nothing predicts the first token, so nothing may with it."""
    records = [{**row, "labels": torch.cat([torch.tensor([-100]), row["labels"][1:]])} for row in records]
    return pad_left(records)


def pad_left_with_positions(records):
    batch = pad_left_without_the_first_label(records)
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def rope(kind):
    scaling = {"default": None, "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}[kind]
    return tiny_models.llama(max_position_embeddings=8, rope_scaling=scaling, initializer_range=0.3)


PADDED = {
    "default positions": (lambda: rope("default"), PadCollate(0, 16, multiple=1), True),
    "positions by the longest": (lambda: rope("dynamic"), PadCollate(0, 16, multiple=1), False),
    "counted from the left": (lambda: tiny_models.gpt2(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0), pad_left, False),
    "told": (lambda: tiny_models.gpt2(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0), pad_left_with_positions, True),
    "rope on the left": (lambda: rope("default"), pad_left_without_the_first_label, True),
    "padding predicts the first token": (lambda: rope("default"), pad_left, False),
}


@pytest.mark.parametrize("name", PADDED)
def test_what_depends_on_the_padded_length(name, tmp_path):
    """Each record is collated alone as well, so that it comes without the padding that others bring."""
    make, collate, good = PADDED[name]
    torch.manual_seed(0)
    data = ragged(29, lengths=(5, 7, 7, 7))
    data.insert(13, ragged(1, lengths=(16,))[0])
    made = trainer(tmp_path, model=make().float(), data=data, max_steps=1, options={"data_collator": collate})
    if good:
        assert made.train().global_step == 1
    else:
        refused(made)


@pytest.mark.parametrize("equal", [True, False])
def test_a_mean_over_all_tokens_shows_where_all_rows_are_alike(equal, tmp_path):
    data = [{k: v.clone() for k, v in row.items()} for row in ragged(lengths=(7,) if equal else (4, 9))]
    made = trainer(
        tmp_path, data=data, cls=own(lambda logits, labels, inputs: F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())),
        max_steps=1, options={"data_collator": PadCollate(0, 16, multiple=1)},
    )  # fmt: skip
    refused(made)


# ---------------------------------------------------------------- collate functions


def masking(**options):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": tokenizer.convert_ids_to_tokens(5)})
    return hf.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, **options)


def token_rows(count=40):
    return [{"input_ids": row["input_ids"].tolist()} for row in ragged(count)]


def test_masks_drawn_by_a_collator_are_no_coupling(tmp_path):
    made = trainer(
        tmp_path, model=bert(hf.BertForMaskedLM), data=token_rows(), max_steps=1, options={"data_collator": masking()}
    )
    assert made.train().global_step == 1


def test_a_collator_with_a_seed_is_refused(tmp_path):
    """By the Trainer with all other reasons, and by make_private whatever the loop."""
    with pytest.raises(
        ValueError, match=r"data_collator DataCollatorForLanguageModeling has a generator of its own \(seed=3\)"
    ):
        trainer(tmp_path, model=bert(hf.BertForMaskedLM), data=token_rows(), options={"data_collator": masking(seed=3)})
    model, engine = bert(hf.BertForMaskedLM), PrivacyEngine()
    with pytest.raises(ValueError, match=r"collate_fn has a generator of its own \(seed=3\)"):
        engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=1.0, max_grad_norm=1.0,
            data_loader=DataLoader(token_rows(), batch_size=4, collate_fn=masking(seed=3)),
        )  # fmt: skip
    assert not any(m._forward_hooks for m in model.modules())


PUBLIC = random.Random(0)


class DrawingCollator:
    def __init__(self, rng=None):
        self.rng = rng

    def __call__(self, records):
        return records

    def collate(self, records):
        return self(records)


def with_a_global(records):
    return PUBLIC.sample(records, 1)


def with_a_closure():
    generator = torch.Generator()
    return lambda records: torch.rand(2, generator=generator)


@pytest.mark.parametrize(
    ("collate", "name"),
    [
        (DrawingCollator(np.random.default_rng(0)), "rng"),
        (DrawingCollator(np.random.RandomState(0)), "rng"),
        (DrawingCollator(torch.Generator()).collate, "rng"),
        (functools.partial(DrawingCollator(random.Random(1)), 3), "rng"),
        (functools.partial(sorted, key=random.Random(1)), "key"),
        (with_a_global, "PUBLIC"),
        (with_a_closure(), "generator"),
        (masking(seed=4), "seed=4"),
        (DrawingCollator(random.SystemRandom()), None),
        (DrawingCollator(), None),
        (masking(), None),
        (torch.utils.data.default_collate, None),
        (PadCollate(0, 8), None),
    ],
)
def test_generators_that_a_collate_carries_are_found(collate, name):
    assert carried_generator(collate) == name


def needs_two(records):
    if len(records) < 2:
        raise ValueError("at least two")
    return torch.utils.data.default_collate(records)


class Encoding(UserDict):
    """As BatchEncoding is: no dict, items as attributes."""

    def __getattr__(self, name):
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


@pytest.mark.parametrize(
    "kind", [dict, Encoding, lambda batch: defaultdict(list, batch)], ids=["dict", "own", "default"]
)
@pytest.mark.parametrize("collate", [torch.utils.data.default_collate, needs_two], ids=["plain", "needs two"])
def test_batches_are_given_as_they_are_and_never_shared(kind, collate):
    """The loss may change what it gets, the records of the dataset stay what they are."""
    data = by_class()
    before = fresh(data)
    model = bert().eval()

    def loss(batch):
        assert type(batch) is type(kind({}))
        labels = batch.pop("labels")
        found = F.cross_entropy(model(**batch).logits, labels)
        batch["input_ids"].zero_()
        labels.zero_()
        return found

    check_some_records(loss, data, lambda records: kind(collate(records)))
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(data, before, strict=True))


def test_a_collate_that_drops_records_is_taken_as_it_is():
    data = [{"x": torch.full((2,), float(i)), "y": i % 2} for i in range(20)]

    def collate(records):
        kept = [row for row in records if row["y"]]
        return torch.stack([row["x"] for row in kept]) if kept else torch.zeros(0, 2)

    check_some_records(lambda x: x.square().mean(), data, collate)
    with pytest.raises(AssertionError):
        check_some_records(lambda x: x.mean().square(), data, collate)


# ---------------------------------------------------------------- which records


def test_records_are_chosen_to_differ():
    """Rows sorted by class, one of them long, one short; all classes, the longest and the shortest are among them."""
    lengths = [6] * 30
    lengths[4], lengths[17] = 15, 2
    data = [{"input_ids": [5] * n, "labels": i // 10} for i, n in enumerate(lengths)]
    chosen = choose_records(data)
    assert [len(row["input_ids"]) for row in chosen][:2] == [15, 2]
    assert {row["labels"] for row in chosen} == {0, 1, 2}
    assert len(chosen) == 4
    users = [[{"x": torch.ones(3)}] * n for n in (2, 1, 3, 2)]
    assert [len(user) for user in choose_records(users, most=3)] == [3, 1, 2]
    assert len(choose_records([(torch.ones(2), 1)])) == 1
    assert {y for _, y in choose_records([(torch.ones(2), i // 5) for i in range(20)])} == {0, 1, 2, 3}


def test_places_are_drawn_in_secret():
    torch.manual_seed(0)
    random.seed(0)
    first = [row["labels"] for row in choose_records([{"labels": i} for i in range(10**6)])]
    torch.manual_seed(0)
    random.seed(0)
    assert first != [row["labels"] for row in choose_records([{"labels": i} for i in range(10**6)])]


# ---------------------------------------------------------------- the checks for loops of one's own


def test_checks_for_loops_find_what_two_rows_do_not_show():
    """The first two rows are of one class and length."""
    model = mlp()
    x, y = torch.randn(6, *next(model.parameters()).shape[1:], dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 2])
    weight = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)

    def weighted(m, batch):
        return F.cross_entropy(m(batch["x"])[:, :3], batch["y"], weight=weight)

    def plain(m, batch):
        return F.cross_entropy(m(batch["x"])[:, :3], batch.pop("y"))

    batch = {"x": x, "y": y}
    check_records_independent(model, batch, plain)
    check_losses_add_up(lambda b: plain(model, b), batch)
    assert set(batch) == {"x", "y"}
    with pytest.raises(AssertionError, match="depends on the other records"):
        check_records_independent(model, batch, weighted)
    with pytest.raises(AssertionError, match="is not the mean"):
        check_losses_add_up(lambda b: weighted(model, b), batch)


def test_checks_for_loops_take_padding_away():
    torch.manual_seed(0)
    model = tiny_models.gpt2(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0).double().eval()

    def loss(m, batch):
        labels = batch.pop("labels")
        return per_record_causal_lm_loss(m(**batch).logits, labels).mean()

    for collate, good in ((pad_left, False), (pad_left_with_positions, True)):
        batch = collate(ragged(3))
        if good:
            check_losses_add_up(lambda b: loss(model, b), batch)
            check_records_independent(model, batch, loss)
            continue
        with pytest.raises(AssertionError):
            check_losses_add_up(lambda b: loss(model, b), batch)
        with pytest.raises(AssertionError):
            check_records_independent(model, batch, loss)


def test_small_weights_show_beside_large_losses():
    """The losses differ by a hundredth, and weights between 1 and 2 move their mean by less than a thousandth."""
    x = torch.tensor([10.00, 10.02, 10.04, 10.06], dtype=torch.float64)
    check_losses_add_up(torch.mean, x)
    with pytest.raises(AssertionError):
        check_losses_add_up(lambda rows: (rows * rows).sum() / rows.sum() + 0.2 * (rows - rows.mean()).abs().mean(), x)


def test_mappings_keep_their_kind():
    made = select_records(hf.BatchEncoding({"x": torch.arange(3)}), torch.tensor([2]))
    assert isinstance(made, hf.BatchEncoding)
    assert made.x.tolist() == [2]
    counted = remade(defaultdict(int, a=1), {"b": 2})
    assert counted == {"b": 2}
    assert counted["c"] == 0
