"""A record is alone: what couples the records of a batch, or reaches a layer as another record, is refused at the first step."""

import contextlib
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import FORWARD_ONLY, Rows, private
from opacus.layers import DPLSTM
from tiny_models import bitnet, gpt2, llama, opt, qwen2, roberta, token_batch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset

from opacus_ac.loss import per_record_causal_lm_loss

MODES = ["bk", "hooks", "functorch"]
B, T, D = 6, 5, 4


def sequences(records=B, length=T, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(length, D, generator=generator),
            "ids": torch.randint(0, 9, (length,), generator=generator),
            "n": torch.tensor(1 + i % length),
            "y": torch.tensor(i % 3),
        }
        for i in range(records)
    ]


def run(model, rows, loss, *, steps=1, **options):
    """Take steps, and return the optimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, net, optimizer, loader = private(model, rows, **options)
        taken = 0
        while taken < steps:
            for batch in loader:
                optimizer.zero_grad()
                loss(net, batch).backward()
                optimizer.step()
                taken += 1
    return optimizer


def classes(net, batch):
    return F.cross_entropy(net(batch), batch["y"])


class Tagger(nn.Module):
    """Words, a layer over them, and a head; ``arrange`` does something to the batch in between."""

    def __init__(self, arrange=None, body=None):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, D), body or nn.Linear(D, D), nn.Linear(D, 3)
        self.arrange = arrange

    def forward(self, batch):
        h = self.embed(batch["ids"])
        if self.arrange is not None:
            return self.head(self.arrange(self, h, batch))
        return self.head(torch.tanh(self.body(h)).mean(1))


def by_length(model, h, batch):
    order = batch["n"].argsort(descending=True)
    return torch.tanh(model.body(h[order])).mean(1)[order.argsort()]


def reversed_rows(model, h, batch):
    return torch.tanh(model.body(h.flip(0))).mean(1).flip(0)


def without_the_mean(model, h, batch):
    h = model.body(h)
    return (h - h.mean(0)).pow(3).mean(1)


def scaled_by_the_batch(model, h, batch):
    h = model.body(h)
    return torch.tanh(h / h.detach().abs().max()).mean(1)


def positions_first(model, h, batch):
    return torch.tanh(model.body(h.transpose(0, 1))).transpose(0, 1).mean(1)


def shared_row(model, h, batch):
    return torch.tanh(model.body(h)).mean(1) * model.body(torch.ones(1, D))


def as_many_constants(model, h, batch):
    described = model.body(torch.linspace(-1, 1, len(h) * D).view(len(h), D))
    return h.mean(1) * torch.tanh(described.sum(0))


class Lookup(nn.Module):
    """Distances to an own table of prototypes, which is looked up whole."""

    def __init__(self):
        super().__init__()
        self.net, self.code = nn.Linear(D, D), nn.Embedding(B, D)

    def forward(self, batch):
        h = self.net(batch["x"].mean(1))
        return -(h.unsqueeze(1) - self.code(torch.arange(B)).unsqueeze(0)).pow(2).sum(-1)


class Carry(Tagger):
    def __init__(self):
        super().__init__()
        self.carried = [torch.zeros(D)]  # a tensor that is an attribute itself would be put back

    def forward(self, batch):
        h = torch.tanh(self.body(self.embed(batch["ids"])) + self.carried[-1])
        self.carried.append(h.mean((0, 1)).detach() * 3)
        return self.head(h.mean(1))


class Packed(nn.Module):
    def __init__(self, ordered):
        super().__init__()
        self.lstm, self.head, self.ordered = DPLSTM(D, D, batch_first=True), nn.Linear(D, 3), ordered

    def forward(self, batch):
        packed = pack_padded_sequence(batch["x"], batch["n"], batch_first=True, enforce_sorted=self.ordered)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(out.sum(1))


class Image(nn.Module):
    """A convolution over ``[B, C, 5, 4]``, called in an unusual way."""

    def __init__(self, layout=lambda x: x, **options):
        super().__init__()
        self.conv, self.head, self.layout = nn.Conv2d(2, 3, 3, **options), nn.LazyLinear(3), layout
        with torch.no_grad():
            self({"x": torch.zeros(1, T, D)})

    def forward(self, batch):
        x = torch.stack([batch["x"], batch["x"].sin()], 1)
        return self.head(self.conv(self.layout(x)).flatten(1))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, D, mode="sum"), nn.Linear(D, 3)

    def forward(self, batch):
        ids = torch.cat([batch["ids"], batch["ids"]], 1)
        return self.head(self.bag(ids.flatten(), torch.arange(len(ids)) * ids.shape[1]))


def square():
    return sequences(length=B)


def descending():
    return [{**row, "n": torch.tensor(T - i % T)} for i, row in enumerate(sequences(records=T))]


PLANTED = {
    "sorted by length": (lambda: Tagger(by_length), sequences, MODES, "body"),
    "sorted by length, recurrent": (lambda: Tagger(lambda m, h, b: m.body(h[b["n"].argsort()])[0].mean(1)[b["n"].argsort().argsort()], DPLSTM(D, D, batch_first=True)), sequences, MODES, "body"),
    "reversed": (lambda: Tagger(reversed_rows), sequences, MODES, "body"),
    "minus the mean of the batch": (lambda: Tagger(without_the_mean), sequences, MODES, "head"),
    "scaled by a detached maximum": (lambda: Tagger(scaled_by_the_batch), sequences, MODES, "head"),
    "positions first": (lambda: Tagger(positions_first), square, MODES, "body"),
    "one constant row": (lambda: Tagger(shared_row), sequences, ["hooks"], "body"),
    "as many constants as records": (lambda: Tagger(as_many_constants), sequences, MODES, "body"),
    "table looked up whole": (Lookup, sequences, ["hooks", "functorch"], "code"),  # in bk it is right
    "carried over": (Carry, sequences, MODES, "carries something over|was changed"),
    "packed in another order": (lambda: Packed(False), sequences, ["hooks"], "lstm"),
}  # fmt: skip


@pytest.mark.parametrize("loss", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "mode"), [(n, m) for n, (_, _, modes, _) in PLANTED.items() for m in modes])
def test_coupled_and_misplaced_records_are_refused(name, mode, loss):
    """Also with the wider limits of bfloat16 autocast."""
    torch.manual_seed(0)
    build, rows, _, named = PLANTED[name]
    model = build()
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, net, optimizer, loader = private(model, rows(), mode=mode)
        (batch,) = loader
        optimizer.zero_grad()
        (classes if loss == "float32" else in_bfloat16)(net, batch).backward()
        with pytest.raises(ValueError, match=f"alone: .*({named})|{named}"):
            optimizer.step()
    assert optimizer.released is None
    assert len(engine.accountant) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Checkpointed(Tagger):
    def forward(self, batch):
        h = self.embed(batch["ids"])
        h = checkpoint(lambda h: torch.tanh(self.body(h)), h, use_reentrant=self.reentrant)
        return self.head(h.mean(1))


def checkpointed(reentrant):
    model = Checkpointed()
    model.reentrant = reentrant
    return model


class Attention(nn.Module):
    """Biases of keys and before norms have gradients that are zero in exact arithmetic."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.norm = nn.GroupNorm(1, T, affine=False)

    def forward(self, batch):
        x = batch["x"]
        h = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        return self.head(self.norm(h).mean(1))


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, 3)


def in_parts(net, batch):
    return F.cross_entropy(net.head(torch.tanh(net.body(batch["x"].mean(1)))), batch["y"])


def siamese(net, batch):
    other = {**batch, "ids": batch["ids"].flip(1), "x": batch["x"].flip(1)}
    return (net(batch) - net(other)).pow(2).sum(1).mean() + classes(net, batch)


def changed_in_place(net, batch):
    return F.cross_entropy(net(batch).mul_(2).add_(1), batch["y"])


def summed(net, batch):
    return F.cross_entropy(net(batch), batch["y"], reduction="sum")


def in_bfloat16(net, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.cross_entropy(net(batch).float(), batch["y"])


class WithLoss(Tagger):
    def forward(self, batch):
        logits = super().forward(batch)
        return {"loss": F.cross_entropy(logits, batch["y"]), "logits": logits}


def loss_inside(net, batch):
    return net(batch)["loss"]


def loss_inside_and_outside(net, batch):
    out = net(batch)
    return out["loss"] + out["logits"].pow(2).sum(1).mean()


CLEAN = {
    "plain": (Tagger, classes, MODES, {}),
    "recurrent": (lambda: Tagger(lambda m, h, b: m.body(h)[0].mean(1), DPLSTM(D, D, batch_first=True)), classes, ["bk", "hooks"], {}),
    "checkpointed": (lambda: checkpointed(False), classes, ["bk"], {}),
    "checkpointed with re-entry": (lambda: checkpointed(True), classes, ["bk", "hooks"], {}),
    "zero in exact arithmetic": (Attention, classes, MODES, {}),
    "two passes": (Tagger, siamese, ["bk"], {}),
    "in parts": (Parts, in_parts, ["bk"], {}),
    "changed in place": (Tagger, changed_in_place, ["bk"], {}),
    "sum": (Tagger, summed, MODES, {"loss_reduction": "sum"}),
    "bfloat16": (Tagger, in_bfloat16, MODES, {}),
    "loss inside": (WithLoss, loss_inside, MODES, {}),
    "loss inside and outside": (WithLoss, loss_inside_and_outside, MODES, {}),
    "physical batches": (Tagger, classes, MODES, {"max_physical_batch_size": 4}),
    "dropout": (lambda: Tagger(body=nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5))), classes, MODES, {}),
    "image": (Image, classes, MODES, {}),
    "reflecting border": (lambda: Image(padding=1, padding_mode="reflect"), classes, ["bk", "hooks"], {}),
    "channels last": (lambda: Image(lambda x: x.contiguous(memory_format=torch.channels_last)), classes, ["bk", "hooks"], {}),
    "double": (lambda: Tagger().double(), classes, MODES, {}),
    "offsets of bags": (Bag, classes, ["bk", "hooks"], {}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), [(n, m) for n, (_, _, modes, _) in CLEAN.items() for m in modes])
def test_what_is_right_stays_right(name, mode):
    torch.manual_seed(0)
    build, loss, _, options = CLEAN[name]
    optimizer = run(build(), sequences(), loss, mode=mode, steps=2, **options)
    assert optimizer.alone.compared >= 3
    assert optimizer.released is not None


class Uneven(Tagger):
    """Rounds as a product does whose kernel depends on the number of rows; with ``always`` also in float64, which is a fault."""

    def __init__(self, error, always):
        super().__init__()
        self.error, self.always = error, always

    def forward(self, batch):
        h = torch.tanh(self.body(self.embed(batch["ids"])))
        if self.always or h.dtype == torch.bfloat16:
            h = h + self.error * h.detach().abs().mean() * torch.linspace(-1, 1, h.shape[-1]).roll(len(h)).to(h.dtype)
        return self.head(h.mean(1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("error", "always", "refused"),
    [(0.1, False, False), (0.1, True, True), (1.0, False, True)],
    ids=["rounding", "as much, and no rounding", "more than rounding"],
)
def test_rounding_of_many_layers_in_bfloat16_is_no_fault(mode, error, always, refused):
    torch.manual_seed(0)
    train = partial(run, Uneven(error, always), sequences(), in_bfloat16, mode=mode, steps=1)
    if refused:
        with pytest.raises(ValueError, match="alone: "):
            train()
    else:
        assert train().alone.compared >= 1


def language(net, batch):
    return net(**batch).loss


def outside(net, batch):
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    return losses.view(len(logits), -1).sum(1).mean()


def lora():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(qwen2(), LoraConfig(target_modules=["q_proj", "down_proj"], r=2, lora_dropout=0.1))


def checkpointing():
    model = llama()
    model.gradient_checkpointing_enable()
    return model


LANGUAGE = {
    "gpt2": (gpt2, ["bk"]),
    "gpt2 with dropout": (lambda: gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1), ["bk"]),
    "llama": (llama, MODES),
    "qwen2": (qwen2, ["bk"]),
    "bitnet": (bitnet, ["bk", "hooks"]),
    "roberta": (roberta, ["bk"]),
    "opt": (opt, ["bk"]),
    "lora": (lora, ["bk", "hooks"]),
    "checkpointing": (checkpointing, ["bk"]),
}


@pytest.mark.parametrize(("name", "mode"), [(n, m) for n, (_, modes) in LANGUAGE.items() for m in modes])
@pytest.mark.parametrize("loss", [language, outside])
def test_language_models_stay_right(name, mode, loss):
    torch.manual_seed(0)
    rows = token_batch(6, 8)
    data = Rows([{k: v[i] for k, v in rows.items()} for i in range(6)])
    optimizer = run(LANGUAGE[name][0]().train(), data, loss, mode=mode)
    assert optimizer.alone.compared == 3


def rope(kind):
    scaling = {
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        "longrope": {
            "rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 4,
        },
    }[kind]  # fmt: skip
    positions = 4 if kind == "dynamic" else 32
    return llama(rope_scaling={**scaling, "rope_theta": 10000.0}, max_position_embeddings=positions)


def left(rows):
    """Padded on the left; nothing predicts a record's first token."""
    rows = {k: v.flip(1) for k, v in rows.items()}
    first = rows["attention_mask"].argmax(1, keepdim=True)
    return {**rows, "labels": rows["labels"].scatter(1, first, -100)}


def to_the_longest(rows):
    """Collate rows and cut off the positions that all of them have as padding."""
    batch = torch.utils.data.default_collate(rows)
    used = batch["attention_mask"].any(0)
    return {k: v[:, used] for k, v in batch.items()}


@pytest.mark.parametrize("mode", ["bk", "hooks"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope", "left-padded GPT-2"])
def test_padded_length_is_found(kind, mode):
    torch.manual_seed(0)
    rows = token_batch(6, 8)
    if kind == "left-padded GPT-2":
        if mode == "hooks":
            pytest.skip("tied weights need mode bk")
        model, rows = gpt2(), left(rows)
    else:
        model = rope(kind)
    data = Rows([{k: v[i] for k, v in rows.items()} for i in range(6)])
    with pytest.raises(ValueError, match=r"pads it|was changed"):
        run(model.train(), data, language, mode=mode, collate=to_the_longest)


def test_left_padding_with_position_ids_is_right():
    rows = left(token_batch(6, 8))
    rows["position_ids"] = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
    data = Rows([{k: v[i] for k, v in rows.items()} for i in range(6)])
    assert run(gpt2().train(), data, language).alone.compared == 3


def test_padding_to_a_fixed_length_is_no_coupling():
    rows = left(token_batch(6, 8))
    rows = {k: F.pad(v, (3, 0), value=-100 if k == "labels" else 0) for k, v in rows.items()}
    data = Rows([{k: v[i] for k, v in rows.items()} for i in range(6)])
    assert run(gpt2().train(), data, language).alone.compared == 3


def test_nothing_runs_again_until_something_changes():
    torch.manual_seed(0)
    _, net, optimizer, loader = private(Tagger(), sequences(48), batch_size=48)
    alone = optimizer.alone

    def step():
        before = alone.compared
        for batch in loader:
            optimizer.zero_grad()
            classes(net, batch).backward()
            optimizer.step()
        return alone.compared - before

    assert [step(), step(), step()] == [3, 0, 0]
    net.body.eval()
    net.body.requires_grad_(False)
    assert [step(), step()] == [3, 0]


def test_a_batch_as_large_as_another_dimension_is_looked_at():
    """Positions come first in the model; records and positions are as many in the second pass only."""
    torch.manual_seed(0)

    def half(model, h, batch):  # right as long as the numbers differ
        return positions_first(model, h, batch) if len(h) == h.shape[1] else torch.tanh(model.body(h)).mean(1)

    _, net, optimizer, loader = private(Tagger(half), sequences(9, T), poisson_sampling=False, batch_size=9)
    for batch in loader:
        classes(net, batch).backward()
        optimizer.step()
    small = {k: v[:T] for k, v in batch.items()}
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classes(net, small).backward()
    with pytest.raises(ValueError, match=r"alone: .*body"):
        optimizer.alone.check(optimizer.source)


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = gpt2(resid_pdrop=0.1).train()
    rows = token_batch(6, 8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    _, net, optimizer, loader = private(
        model, Rows([{k: v[i] for k, v in rows.items()} for i in range(6)]), loss_bound=5.0
    )
    (batch,) = loader
    random = torch.get_rng_state()
    language(net, batch).backward()
    optimizer.alone.check(optimizer.source)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert optimizer.tape.take().shape == (6,)
    optimizer.alone.remove()
    assert not [h for m in model.modules() for h in m._forward_hooks.values() if "Alone" in repr(h)]


def test_what_cannot_be_taken_apart_is_said():
    class Objects(Tagger):
        def forward(self, text):
            ids = torch.stack([torch.tensor([ord(c) % 9 for c in word]) for word in text.split()])
            return super().forward({"ids": ids})

    torch.manual_seed(0)
    _, net, optimizer, loader = private(Objects(), sequences(), poisson_sampling=False)

    def train():
        for _ in range(3):
            for batch in loader:
                optimizer.zero_grad()
                F.cross_entropy(net(" ".join(["abcde"] * len(batch["y"]))), batch["y"]).backward()
                optimizer.step()

    with pytest.warns(UserWarning, match="cannot be checked"):
        train()


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (lambda: nn.BatchNorm1d(D, affine=False), T),
        (lambda: nn.BatchNorm1d(D).requires_grad_(False), T),
        (lambda: nn.BatchNorm1d(D, affine=False, track_running_stats=False).eval(), T),
        (lambda: nn.InstanceNorm1d(D, track_running_stats=True), T),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(D, D)).requires_grad_(False), T),
        (lambda: nn.utils.spectral_norm(nn.Linear(D, D)).requires_grad_(False), T),
        (lambda: nn.Embedding(4, D, max_norm=1.0).requires_grad_(False), None),
        (lambda: nn.EmbeddingBag(4, D, max_norm=1.0).requires_grad_(False).eval(), None),
    ],
)
@pytest.mark.parametrize("options", [{}, {"mode": "hooks"}, {"zeroth_order": "aggzo"}])
def test_layers_that_couple_or_write_are_refused_before_the_run(layer, inputs, options):
    model = Tagger()
    model.extra = layer()
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match="extra"):
        private(model, sequences(), **options)
    assert hooks == [dict(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize(
    "layer", [lambda: nn.BatchNorm1d(D).requires_grad_(False).eval(), lambda: nn.InstanceNorm1d(D)]
)
def test_layers_that_do_neither_are_not(layer):
    model = Tagger()
    model.extra = layer()
    with contextlib.suppress(StopIteration):
        private(model, sequences())


def test_users_of_several_rows():
    class Users(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            generator = torch.Generator().manual_seed(index)
            return torch.randn(3, D, generator=generator), torch.randint(0, 3, (3,), generator=generator)

    def collate(users):
        return torch.cat([x for x, _ in users]), torch.cat([y for _, y in users])

    for mode in ("bk", "hooks"):
        torch.manual_seed(0)
        _, net, optimizer, loader = private(
            nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)),
            Users(),
            mode=mode,
            collate=collate,
            max_rows_per_user=3,
        )
        for x, y in loader:
            F.cross_entropy(net(x), y, reduction="none").view(-1, 3).mean(1).mean().backward()
            optimizer.step()
        assert optimizer.alone.compared == 3


def test_data_of_tuples_and_tensors():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(6, D), torch.arange(6) % 3)
    _, net, optimizer, loader = private(nn.Linear(D, 3), data)
    for x, y in loader:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert optimizer.alone.compared == 3


def zeroth(model, rows, **options):
    """One zeroth-order step."""
    _, net, optimizer, loader = private(
        model,
        rows,
        **FORWARD_ONLY,
        max_grad_norm=1.0,
        **options,
    )
    (batch,) = loader
    optimizer.step(lambda: F.cross_entropy(net(batch), batch["y"], reduction="none"))
    return optimizer


@pytest.mark.parametrize(
    "name", ["minus the mean of the batch", "scaled by a detached maximum", "table looked up whole", "carried over"]
)
def test_zeroth_order_refuses_what_couples_outputs(name):
    torch.manual_seed(0)
    model = PLANTED[name][0]()
    before = [p.detach().clone() for p in model.parameters()]
    if name == "table looked up whole":  # right: what it returns for a record is its own
        assert zeroth(model, sequences()).measurement.outputs.compared == 3
        return
    with pytest.raises(ValueError, match=r"alone: |was changed"):
        zeroth(model, sequences())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["plain", "recurrent", "zero in exact arithmetic", "image", "double"])
def test_zeroth_order_leaves_alone_what_is_right(kind):
    torch.manual_seed(0)
    assert zeroth(CLEAN[kind][0](), sequences()).measurement.outputs.compared == 3


@pytest.mark.parametrize("given", [False, True])
def test_zeroth_order_finds_padded_length(given):
    torch.manual_seed(0)
    rows = left(token_batch(6, 8))
    if given:
        rows["position_ids"] = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
    data = Rows([{k: v[i] for k, v in rows.items()} for i in range(6)])
    _, net, optimizer, loader = private(
        gpt2().eval(),
        data,
        **FORWARD_ONLY,
        collate=to_the_longest,
    )
    (batch,) = loader

    def losses():
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return per_record_causal_lm_loss(net(**inputs).logits, batch["labels"])

    with contextlib.nullcontext() if given else pytest.raises(ValueError, match="pads it"):
        optimizer.step(losses)
    assert optimizer.measurement.outputs.compared == (3 if given else 0)


def test_dropout_in_a_checkpointed_part_is_said_to_hide_the_records():
    torch.manual_seed(0)
    model = checkpointed(True)
    model.body = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5))
    _, net, optimizer, loader = private(model, sequences(), poisson_sampling=False)

    def train():
        for _ in range(3):
            for batch in loader:
                optimizer.zero_grad()
                classes(net, batch).backward()
                optimizer.step()

    with pytest.warns(UserWarning, match="draws at random"):
        train()
    assert optimizer.alone.compared == 0


def test_physical_batches_of_one_record_are_looked_at_once():
    torch.manual_seed(0)
    _, net, optimizer, loader = private(Tagger(), sequences(), max_physical_batch_size=1)
    for batch in loader:
        optimizer.zero_grad()
        classes(net, batch).backward()
        optimizer.step()
    assert optimizer.alone.compared == 1


def test_two_passes_over_inputs_of_different_lengths():
    """The records that are run alone are the same in both passes."""
    torch.manual_seed(0)
    rows = token_batch(6, 8)
    data = Rows([{k: v[i] for k, v in rows.items()} for i in range(6)])

    def loss(net, batch):
        other = {k: v.flip(0) for k, v in batch.items() if k != "labels"}
        one, two = (net(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in (batch, other))
        masks = [b["attention_mask"].unsqueeze(-1) for b in (batch, other)]
        return ((one * masks[0]).sum((1, 2)) - (two * masks[1]).sum((1, 2))).pow(2).mean() / 100

    assert run(llama().train(), data, loss).alone.compared == 3


def spans(records=B, length=10, pad=True):
    """Questions with answers, one of them as long as ``length``; ``pad`` pads all to it."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(records):
        own = length if i == 0 else 5 + i % 4
        size = length if pad else own
        ids = torch.randint(2, 64, (size,), generator=generator)
        mask = (torch.arange(size) < own).long()
        row = {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}
        rows.append({**row, "start_positions": torch.tensor(i % 4), "end_positions": torch.tensor(2 + i % 3)})
    return rows


def span_head(**options):
    from transformers import RobertaConfig, RobertaForQuestionAnswering

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, type_vocab_size=1, pad_token_id=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    return RobertaForQuestionAnswering(config).train()


def padded_to(length_of):
    """A collate function that pads to a length made of the longest row's."""

    def collate(rows):
        length = length_of(max(len(row["input_ids"]) for row in rows))
        fill = {"input_ids": 1, "attention_mask": 0}
        return {
            k: torch.stack([F.pad(r[k], (0, length - len(r[k])), value=fill[k]) if k in fill else r[k] for r in rows])
            for k in rows[0]
        }

    return collate


LONGEST, EIGHTS, FIXED = padded_to(lambda n: n), padded_to(lambda n: -(-n // 8) * 8), padded_to(lambda n: 12)


@pytest.mark.parametrize("mode", MODES)
def test_padding_of_the_dataset_is_a_part_of_the_record(mode):
    """The softmax over positions counts the padding, which is the same whatever else is in the batch."""
    optimizer = run(span_head(), Rows(spans()), language, mode=mode, steps=2)
    assert optimizer.alone.compared == 3
    assert optimizer.released is not None


class Again(torch.autograd.Function):
    """Reformer: the layer runs again in the backward pass, which has a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.layer(x), gradient)
        return x.grad, None


def one_table(self, h, mask):
    """MPNet: positions are looked up once for all records."""
    length = h.shape[1]
    return h + self.table(torch.arange(length) - torch.arange(length)[:, None] + length).mean(1)


def backward_within_backward(self, h, mask):
    return Again.apply(h, self.layer)


def not_finite_in_float64(self, h, mask):
    """ProphetNet: the difference is float32, where the least number of float64 is infinite."""
    return self.layer(h) + 0 * ((1.0 - mask) * torch.finfo(h.dtype).min).unsqueeze(-1)


class Bent(nn.Module):
    """The places of answers in texts, of which ``bend`` does something to the tokens."""

    def __init__(self, bend):
        super().__init__()
        self.inner, self.bend = span_head(), bend
        self.table, self.layer = nn.Embedding(32, 16), nn.Linear(16, 16)
        for one in (self.table, self.layer):
            one.requires_grad_((one is self.table) == (bend is one_table))

    def forward(self, input_ids, attention_mask, start_positions, end_positions):
        h = self.inner.roberta(input_ids, attention_mask=attention_mask)[0]
        logits = self.inner.qa_outputs(self.bend(self, h, attention_mask))
        losses = [F.cross_entropy(logits[..., k], y) for k, y in enumerate((start_positions, end_positions))]
        return {"loss": losses[0] + losses[1]}


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("bend", [one_table, backward_within_backward, not_finite_in_float64])
def test_padding_of_the_dataset_in_models_of_all_kinds(bend, pad):
    """It is a part of the record; padding that follows the batch is named as the reason of the refusal."""
    data, collate = Rows(spans(pad=pad)), None if pad else LONGEST
    with contextlib.nullcontext() if pad else pytest.raises(ValueError, match=r"pads it.*in the dataset"):
        optimizer = run(Bent(bend), data, lambda net, batch: net(**batch)["loss"], collate=collate)
        assert optimizer.alone.compared == 3


@pytest.mark.parametrize("kind", ["transformers", "own", "tokenizer", "subset", "copied", "checkpointed", "bfloat16"])
def test_fixed_padding_is_known_however_it_is_made(kind):
    import transformers

    rows, collate, loss, model = spans(), None, language, span_head()
    if kind == "transformers":
        collate = transformers.default_data_collator
    elif kind == "own":
        rows, collate = spans(pad=False), FIXED
    elif kind == "subset":
        rows = torch.utils.data.Subset(Rows(rows), range(B))
    elif kind == "copied":
        loss = lambda net, batch: net(**{k: v.clone() for k, v in batch.items()}).loss  # noqa: E731
    elif kind == "checkpointed":
        model.gradient_checkpointing_enable()
    elif kind == "bfloat16":
        loss = in_autocast
    elif kind == "tokenizer":
        rows = [{k: v.tolist() for k, v in row.items()} for row in spans(pad=False)]
        collate = padding_tokenizer("max_length", 12)
    assert run(model, rows if kind == "subset" else Rows(rows), loss, collate=collate).alone.compared == 3


def padding_tokenizer(padding, length=None, multiple=None):
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="1", unk_token="0")
    return DataCollatorWithPadding(tokenizer, padding, length, multiple)


def in_autocast(net, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net(**batch).loss


class FetchedTogether(Rows):
    """Rows that are padded to the longest of those that are fetched together."""

    def __getitems__(self, places):
        batch = LONGEST([self.rows[place] for place in places])
        return [{k: v[i] for k, v in batch.items()} for i in range(len(places))]


def cut_by_the_loop(net, batch):
    length = int(batch["attention_mask"].sum(1).max())
    return net(**{k: v[:, :length] if v.dim() > 1 else v for k, v in batch.items()}).loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["longest", "multiple of eight", "tokenizer", "by the dataset", "by the loop"])
def test_padding_that_follows_the_batch_is_refused(kind, mode):
    """Where the loss depends on it, and whether or not a record of this batch is as long as the batch."""
    data, collate, loss = Rows(spans(pad=False)), None, language
    if kind == "longest":
        collate = LONGEST
    elif kind == "multiple of eight":
        collate = EIGHTS
    elif kind == "tokenizer":
        data = Rows([{k: v.tolist() for k, v in row.items()} for row in data.rows])
        collate = padding_tokenizer("longest", multiple=8)
    elif kind == "by the dataset":
        data = FetchedTogether(data.rows)
    else:
        data, loss = Rows(spans()), cut_by_the_loop
    with pytest.raises(ValueError, match=r"pads it.*in the dataset"):
        run(span_head(), data, loss, collate=collate, mode=mode)


def test_a_later_batch_of_another_length_is_refused_before_its_release():
    """What the loop cut off and copied looks like the loader's batch as long as it has a full-length record."""
    _, net, optimizer, loader = private(span_head(), Rows(spans()), poisson_sampling=False)

    def loss(rows):
        length = int(batch["attention_mask"][rows].sum(1).max())
        return net(**{k: (v[:, :length] if v.dim() > 1 else v).clone() for k, v in batch.items()}).loss

    (batch,) = loader
    loss(slice(None)).backward()
    optimizer.step()
    released = optimizer.released
    (batch,) = loader
    optimizer.zero_grad()
    longest = batch["attention_mask"].sum(1) == batch["attention_mask"].shape[1]
    loss(~longest).backward()
    with pytest.raises(ValueError, match="length 8 where others before had 10"):
        optimizer.step()
    assert optimizer.released is released


@pytest.mark.parametrize("mode", MODES)
def test_fixed_padding_does_not_excuse_layers_that_mix_records(mode):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = span_head()

        def forward(self, input_ids, attention_mask, start_positions, end_positions):
            h = self.inner.roberta(input_ids, attention_mask=attention_mask)[0]
            logits = self.inner.qa_outputs(h - h.mean(0))
            losses = [F.cross_entropy(logits[..., k], y) for k, y in enumerate((start_positions, end_positions))]
            return {"loss": losses[0] + losses[1]}

    with pytest.raises(ValueError, match=r"alone: .*qa_outputs"):
        run(Mixing(), Rows(spans()), lambda net, batch: net(**batch)["loss"], mode=mode)


def test_a_model_made_for_one_length_is_held_to_it():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(64, D), nn.Linear(10 * D, 4)

        def forward(self, input_ids, attention_mask):
            return self.head((self.embed(input_ids) * attention_mask.unsqueeze(-1)).flatten(1))

    def loss(net, batch):
        return F.cross_entropy(net(batch["input_ids"], batch["attention_mask"]), batch["start_positions"])

    assert run(Flat(), Rows(spans()), loss).alone.compared == 3


def test_zeroth_order_knows_padding_of_the_dataset():
    """Padding on the left moves GPT-2's positions, by as much whatever else is in the batch."""
    rows = left(token_batch(6, 8))
    data = Rows([{k: v[i] for k, v in rows.items()} for i in range(6)])
    _, net, optimizer, loader = private(
        gpt2().eval(), data, zeroth_order="aggzo", clipping="adaptive", clip_policy="fixed", ema_decay=None
    )
    (batch,) = loader

    def losses():
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return per_record_causal_lm_loss(net(**inputs).logits, batch["labels"])

    optimizer.step(losses)
    assert optimizer.measurement.outputs.compared == 3
