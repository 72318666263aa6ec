"""Records that are users: norms and sums against a loop over one user at a time, and what one user can move."""

import math
from functools import partial

import pytest
import tiny_models
import torch
import users
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from users import MOST, number_loss, number_users, one_step, oracle, pad, pad_tokens, private, token_loss, token_users

from opacus_ac import PrivacyEngine
from opacus_ac.errors import LedgerError
from opacus_ac.grad_sample.one_backward import outer_products as terms
from opacus_ac.loss import per_user_loss
from opacus_ac.testing import check_losses_add_up, check_norms

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning", "ignore::FutureWarning")


def compare(model, data, collate, loss_of, own_loss, tolerance, **changes):
    norms, want = oracle(users.twin(model), data, own_loss)
    bound = float(norms[norms > 0].median()) * 1.01  # some are clipped, some not
    got, moved = one_step(model, data, collate, loss_of, bound=bound, **changes)
    known = norms > 0
    assert torch.equal(got > 1e-12, known)
    assert bool((norms > bound).any())
    assert bool((norms[known] < bound).any())
    check_norms(got[known], norms[known], rtol=tolerance)
    factors = torch.where(known, (bound / norms).clamp(max=1), 0)
    expected = {n: torch.einsum("i,i...->...", factors, g) for n, g in want.items()}
    error, name = tiny_models.worst_error(moved, expected, floor=1e-4)
    assert error <= tolerance * 10, name


SMALL = {"mlp": users.mlp, "tied embedding": users.words}


@pytest.mark.parametrize("physical", [None, 4, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", ["bk", "hooks", "functorch"])
@pytest.mark.parametrize("name", SMALL)
def test_a_users_gradient_is_that_of_its_own_loss(name, mode, reduction, physical):
    def loss_of(model, batch, count):
        return number_loss(model, batch, count) * (1 if reduction == "mean" else count(len(batch["y"])))

    compare(
        SMALL[name](), number_users(), pad, loss_of, users.own_number_loss, 1e-10,
        grad_sample_mode=mode, loss_reduction=reduction, max_physical_batch_size=physical,
    )  # fmt: skip


MODELS = {
    "qwen2-tied": partial(tiny_models.build, "qwen2-tied"),
    "llama-tied": partial(tiny_models.build, "llama-tied"),
    "llama": partial(tiny_models.build, "llama"),
    "bitnet-tied": partial(tiny_models.build, "bitnet-tied"),
    "gpt2": partial(tiny_models.build, "gpt2"),
    "opt": partial(tiny_models.build, "opt"),
    "lora": users.lora,
}
LANGUAGE = [
    *[(name, "bk") for name in MODELS],
    ("qwen2-tied", "hooks"), ("llama", "hooks"), ("bitnet-tied", "hooks"), ("lora", "hooks"), ("lora", "functorch"),
]  # fmt: skip


@pytest.mark.parametrize("physical", [None, 2])
@pytest.mark.parametrize(("name", "mode"), LANGUAGE)
def test_language_models(name, mode, physical):
    """transformers' norms compute in float32 even in a float64 model: that is the floor, at 1e-7."""
    compare(
        MODELS[name](), token_users(), pad_tokens, token_loss, users.own_token_loss, 5e-7,
        grad_sample_mode=mode, max_physical_batch_size=physical,
    )  # fmt: skip


@pytest.mark.parametrize("factor", [0.0, 1e9], ids=["gram", "kept"])
def test_both_routes_of_the_norm(factor, monkeypatch):
    monkeypatch.setattr(terms, "KEEP_FACTOR", factor)
    for name in ("qwen2-tied", "lora"):
        test_language_models(name, "bk", None)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, data = MODELS["qwen2-tied"](), token_users()
    norms, _ = oracle(users.twin(model), data, users.own_token_loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    got, _ = one_step(model, data, pad_tokens, token_loss)
    check_norms(got[norms > 0], norms[norms > 0], rtol=5e-7)


def test_the_noisy_loss_is_the_mean_over_users():
    data = token_users()
    model = MODELS["llama"]()
    own = [users.own_token_loss(model, user) for user in data]
    want = sum(0.0 if loss is None else float(loss.detach()) for loss in own) / len(data)
    wrapped, optimizer, loader = private(model, data, pad_tokens, loss_bound=10.0)
    for batch in loader:
        optimizer.zero_grad()
        wrapped(**batch).loss.backward()
        optimizer.step()
    assert optimizer.released.loss == pytest.approx(want, rel=1e-6)


def test_a_row_counts_where_it_predicts_a_token():
    """The first token is predicted by nobody: a row labelled only there would halve the loss of its user."""
    model, data = MODELS["llama"](), token_users()
    batch = pad_tokens(data[:2])
    batch["labels"][0, 0] = 5  # the left end of a row, with or without padding before it
    batch["labels"][1] = -100
    batch["labels"][1, 0] = 5
    wrapped, _, loader = private(model, data, pad_tokens)
    own = users.own_token_loss(model, data[0][:1])
    with loader.users.suppose(MOST), torch.no_grad():
        assert float(wrapped(**{k: v[:MOST] for k, v in batch.items()}).loss) == pytest.approx(float(own), rel=1e-6)


def test_with_the_fused_step():
    compare(users.mlp(), number_users(), pad, number_loss, users.own_number_loss, 1e-10, fused_step=True)


# ---------------------------------------------------------------- sensitivity


def release(data, loss_of=number_loss, *, public=8, mode="bk", change=lambda optimizer: None, **options):
    """What a step would release of these users without noise, in units of C: sum of gradients and statistics."""
    wrapped, optimizer, loader = private(
        users.mlp(), data, pad, clip_policy="percentile", loss_bound=5.0, grad_sample_mode=mode, **options
    )
    change(optimizer)
    assert len(data) <= public
    batch = next(iter(loader))
    optimizer.zero_grad()
    losses = []

    def noted(losses_of_users):
        losses.append(losses_of_users.detach())
        return losses_of_users

    loss_of(wrapped, batch, loader.users.count, noted).backward()
    optimizer.record_losses(losses[0])
    optimizer.clip_and_accumulate()
    summed = torch.cat([s.reshape(-1) for s in optimizer.source.sums() if s is not None]) / optimizer.max_grad_norm
    bound = optimizer.statistics.sensitivity
    return torch.cat([summed, torch.from_numpy(optimizer.statistics.vector())]), bound


def user_losses(model, batch, count, noted=lambda x: x):
    losses = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    return noted(per_user_loss(losses, batch["has"], count(len(losses)))).mean()


number = st.one_of(st.floats(-1e3, 1e3), st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]))
extreme_row = st.tuples(st.lists(number, min_size=4, max_size=4), st.integers(0, 2), st.booleans())


def as_user(rows):
    return [
        {"x": torch.tensor(x, dtype=torch.float64), "y": torch.tensor(y), "has": torch.tensor(has)}
        for x, y, has in rows
    ]


@pytest.mark.parametrize("mode", ["bk", "hooks"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    others=st.lists(st.integers(0, MOST), min_size=1, max_size=4),
    rows=st.lists(extreme_row, max_size=MOST),
    bound=st.floats(1e-3, 1e3),
)
def test_one_user_moves_the_release_by_at_most_the_sensitivity(mode, others, rows, bound):
    data = number_users([*others, 1])
    without, _ = release(data, user_losses, mode=mode, bound=bound)
    having, sensitivity = release([*data, as_user(rows)], user_losses, mode=mode, bound=bound)
    assert float((having - without).norm()) <= sensitivity * (1 + 1e-6)


def test_without_regrouping_a_user_moves_it_by_more():
    """A planted bug: rows are clipped one by one. The sum alone is beyond what all of the release may move by."""

    def by_row(optimizer):
        optimizer.source._users = None
        optimizer._private._check_records = lambda draw, norms: optimizer.tape.record(norms)
        optimizer.statistics.observe = lambda norms, losses, squares: None

    data, loud = number_users((1, 2, 1)), users.user_of(MOST, seed=1, scale=1e3)
    for row in loud:
        row["y"] = torch.tensor(0)
        row["x"] = loud[0]["x"]
    without, _ = release(data, user_losses, bound=1e-3, change=by_row)
    having, sensitivity = release([*data, loud], user_losses, bound=1e-3, change=by_row)
    assert float((having - without).norm()) > 2 * sensitivity
    without, _ = release(data, user_losses, bound=1e-3)
    having, sensitivity = release([*data, loud], user_losses, bound=1e-3)
    assert float((having - without).norm()) <= sensitivity * (1 + 1e-9)


def test_a_mean_over_rows_that_fill_up_would_couple_users():
    """Why ``per_user_loss`` counts labelled rows: else a user with more rows shrinks the gradients of all others."""

    def coupled(model, batch, count, noted=lambda x: x):
        losses = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none") * batch["has"]
        return noted(losses.view(count(len(losses)), -1).mean(1)).mean()

    data, more = [users.user_of(1, seed=s) for s in range(7)], users.user_of(MOST, seed=9)
    moved = {}
    for loss_of in (coupled, user_losses):
        without, _ = release(data, loss_of, bound=50.0)
        having, sensitivity = release([*data, more], loss_of, bound=50.0)
        moved[loss_of] = float((having - without).norm()) / sensitivity
    assert moved[coupled] > 1.5
    assert moved[user_losses] <= 1


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("mode", ["bk", "hooks", "functorch"])
@pytest.mark.parametrize("physical", [None, 2])
def test_an_empty_batch_takes_its_step_and_leaves_no_trace(mode, physical):
    engine, model = PrivacyEngine(), users.mlp()
    before = users.twin(model)
    wrapped, optimizer, loader = private(
        model, number_users((2, 1, 1)), pad, engine=engine, grad_sample_mode=mode, max_physical_batch_size=physical
    )
    loader.batch_sampler._draw = lambda rate: []
    for batch in loader:
        optimizer.zero_grad()
        number_loss(wrapped, batch, loader.users.count).backward()
        optimizer.step()
    assert optimizer.steps_taken == 1
    assert engine.accountant.history == [(0.0, 1.0, 1)]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_batches_count_users():
    data = [users.user_of(1 + i % MOST, seed=i) for i in range(40)]
    model, engine = users.mlp(), PrivacyEngine()
    batches = torch.utils.data.DataLoader(data, batch_size=10, collate_fn=pad)
    wrapped, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.AdamW(model.parameters()), data_loader=batches, noise_multiplier=1.0,
        max_rows_per_user=MOST, max_physical_batch_size=3,
    )  # fmt: skip
    assert (len(loader), loader.sample_rate, optimizer.expected_batch_size) == (4, 0.25, 10.0)
    for batch in loader:
        assert loader.plan.current().records <= 3
        assert len(batch["y"]) <= 3 * MOST
        optimizer.zero_grad()
        number_loss(wrapped, batch, loader.users.count).backward()
        optimizer.step()
    assert engine.accountant.history == [(1.0, 0.25, 4)]
    report = engine.privacy_report(delta=1e-3)
    assert report.unit == f"one user with at most {MOST} rows"
    assert report.unit in str(report)
    assert (report.dataset_size, report.expected_batch_size) == (40, (10.0, 10.0))


def ragged(data):
    """A collate that forgets to fill up."""
    rows = [row for user in data for row in user]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def sided(data):
    return {**pad(data), "users": torch.arange(len(data))}


def step_twice(wrapped, optimizer, loader, batch):
    number_loss(wrapped, batch, loader.users.count).backward()
    optimizer.step()
    optimizer.zero_grad()
    nn.functional.cross_entropy(wrapped(batch["x"]), batch["y"]).backward()
    optimizer.step()


def in_parts(wrapped, optimizer, loader, batch):
    """Each part has half of the users; taken for the whole, every user of it would be cut in two."""
    half = len(batch["y"]) // 2
    loss = sum(
        nn.functional.cross_entropy(wrapped(x), y)
        for x, y in zip(batch["x"].split(half), batch["y"].split(half), strict=True)
    )
    loss.backward()
    optimizer.step()


def part_by_part(wrapped, optimizer, loader, batch):
    half = len(batch["y"]) // 2
    for x, y in zip(batch["x"].split(half), batch["y"].split(half), strict=True):
        nn.functional.cross_entropy(wrapped(x), y).backward()
    optimizer.step()


def twice_backward(wrapped, optimizer, loader, batch):
    for _ in range(2):
        number_loss(wrapped, batch, loader.users.count).backward()
    optimizer.step()


def repeated(wrapped, optimizer, loader, batch):
    nn.functional.cross_entropy(wrapped(batch["x"].repeat(2, 1)), batch["y"].repeat(2)).backward()
    optimizer.step()


LOOPS = {
    "ragged rows": ((1, 3, 1, 2), ragged, None, "not as many for each"),
    "too many rows": ((1, MOST + 1, 1, 2), pad, None, f"max_rows_per_user={MOST}"),
    "a tensor per user": ((1, 3, 1, 2), sided, None, "different first dimensions"),
    "no tensors": ((1, 3, 1, 2), lambda data: {"rows": 3}, None, "different first dimensions"),
    "a batch used twice": ((1, 3, 1, 2), pad, step_twice, "just drawn"),
    "two forward passes": ((1, 2, 1, 2), pad, in_parts, "whole"),
    "part by part": ((1, 2, 1, 2), pad, part_by_part, "whole|backward.. once|grad accumulation"),
    "two backward passes": ((1, 3, 1, 2), pad, twice_backward, "grad accumulation|just drawn|backward.. once"),
    "rows repeated": ((1, 3, 1, 2), pad, repeated, "whole"),
}


@pytest.mark.parametrize(("mode", "sampling"), [("bk", "poisson"), ("hooks", "poisson"), ("hooks", "shuffled")])
@pytest.mark.parametrize("name", LOOPS)
def test_a_batch_whose_rows_nobody_can_assign_is_refused(name, mode, sampling):
    counts, collate, use, words = LOOPS[name]
    data = [users.user_of(rows, seed=i) for i, rows in enumerate(counts)]
    model, engine = users.mlp(), PrivacyEngine()
    steps = 1 if name == "a batch used twice" else 0

    def run():
        wrapped, optimizer, loader = private(
            model, data, collate, engine=engine, grad_sample_mode=mode, sampling=sampling,
            poisson_sampling=sampling == "poisson",
        )  # fmt: skip
        for batch in loader:
            optimizer.zero_grad()
            use(wrapped, optimizer, loader, batch)

    with pytest.raises(ValueError, match=words):
        run()
    assert len(engine.accountant) == steps


def test_opacus_batch_memory_manager_is_refused():
    """Its loader is not ours: nobody counts the rows that it hands out."""
    wrapped, optimizer, loader = private(users.mlp(), number_users(), pad)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as batches:
        batch = next(iter(batches))
        loss = nn.functional.cross_entropy(wrapped(batch["x"]), batch["y"])
        with pytest.raises(ValueError, match="just drawn"):
            loss.backward()


class Said(list):
    """A dataset that says what its items are."""

    max_rows_per_user = 2


@pytest.mark.parametrize(
    ("data", "rows", "words"),
    [
        (None, 0, "max_rows_per_user must be a whole number >= 1, got 0"),
        (None, True, "got True"),
        (None, 2.5, "got 2.5"),
        (Said, None, "pass max_rows_per_user=2"),
        (Said, 3, "max_rows_per_user=3: pass max_rows_per_user=2"),
    ],
)
def test_bad_arguments_change_nothing(data, rows, words):
    items = number_users((1, 2, 1))
    model = users.mlp()
    with pytest.raises(ValueError, match=words):
        private(model, data(items) if data else items, pad, max_rows_per_user=rows)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    private(model, items, pad)


@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_a_loss_that_averages_rows_is_made_one_of_users(mode):
    """Of a classifier the library computes a mean over all labelled rows of the batch, whoever has them."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(1)
    config = Qwen2Config(**{**tiny_models._SHAPE, "pad_token_id": 0, "num_labels": 3})
    model = Qwen2ForSequenceClassification(config).double().train()
    data = [
        [{"input_ids": torch.randint(3, 50, (6,)), "labels": torch.tensor(i % 3)} for i in range(rows)]
        for rows in (1, 3, 2)
    ]

    def collate(items):
        most = max(map(len, items))
        filling = {"input_ids": torch.full((6,), 3), "labels": torch.tensor(-100)}
        rows = [row for user in items for row in (*user, *[filling] * (most - len(user)))]
        return {key: torch.stack([row[key] for row in rows]) for key in filling}

    def own_loss(model, rows):
        return torch.stack([model(**collate([[row]])).loss for row in rows]).mean()

    compare(model, data, collate, users.token_loss, own_loss, 1e-6, grad_sample_mode=mode)


def round_robin(items):
    """The first row of each user, then the second of each."""
    batch, most = pad(items), max([1, *map(len, items)])
    order = torch.arange(len(items) * most).view(len(items), most).T.reshape(-1)
    return {key: value[order] for key, value in batch.items()}


def rows_backwards(items):
    return {key: value.flip(0) for key, value in pad(items).items()}


def filling_last(items):
    """All rows, then what fills up."""
    batch = pad(items)
    order = torch.argsort(~batch["has"], stable=True)
    return {key: value[order] for key, value in batch.items()}


def filled_first(items):
    """In its block, but with what fills up before the rows."""
    batch, most = pad(items), max([1, *map(len, items)])
    return {
        key: value.view(len(items), most, *value.shape[1:]).flip(1).reshape(value.shape) for key, value in batch.items()
    }


@pytest.mark.parametrize("count", [2, 3, 40])
@pytest.mark.parametrize(
    ("collate", "good"),
    [(round_robin, False), (rows_backwards, True), (filling_last, False), (filled_first, True), (pad, True)],
)
def test_rows_of_users_in_another_layout_are_refused(collate, good, count):
    """Users with equally many rows, one of which has no label, too: a mean over users of their mean cannot tell those."""
    data = [users.user_of(2 if collate is round_robin else 1 + i % 2, seed=i) for i in range(count)]
    model, engine = users.mlp(), PrivacyEngine()
    if good:
        private(model, data, collate, engine=engine)
        return
    with pytest.raises(ValueError, match="one user after the other"):
        private(model, data, collate, engine=engine)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert len(engine.accountant) == 0


def test_rows_that_nobody_can_recognise_are_refused():
    def blurred(items):
        return {key: value + torch.rand(()) if key == "x" else value * 0 for key, value in pad(items).items()}

    with pytest.raises(ValueError, match="nothing in the batches"):
        private(users.mlp(), number_users((1, 3, 2)), blurred)


# ---------------------------------------------------------------- the account


def made(engine, **changes):
    model = users.mlp()
    batches = torch.utils.data.DataLoader(number_users((1, 2, 1, 2)), batch_size=2, collate_fn=pad)
    wrapped, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=batches, noise_multiplier=1.0,
        **{"max_rows_per_user": MOST, **changes},
    )  # fmt: skip
    return engine, model, optimizer, wrapped, loader


def take_steps(engine, **changes):
    engine, model, optimizer, wrapped, loader = made(engine, **changes)
    for batch in loader:
        optimizer.zero_grad()
        number_loss(wrapped, batch, loader.users.count).backward()
        optimizer.step()
    return engine, model, optimizer


def test_a_ledger_of_rows_and_one_of_users_do_not_mix(tmp_path):
    path = tmp_path / "l.jsonl"
    engine, _, _ = take_steps(PrivacyEngine(ledger=path))
    assert f'"unit":"one user with at most {MOST} rows"' in path.read_text()
    spent = engine.get_epsilon(1e-3)
    before = path.read_bytes()
    for other in (None, MOST - 1):
        with pytest.raises(LedgerError, match=rf"l\.jsonl:1: the ledger has unit 'one user with at most {MOST} rows'"):
            take_steps(PrivacyEngine(ledger=path), max_rows_per_user=other)
    assert path.read_bytes() == before
    assert take_steps(PrivacyEngine(ledger=path))[0].get_epsilon(1e-3) > spent


def test_one_engine_does_not_mix_units():
    engine, _, _ = take_steps(PrivacyEngine())
    with pytest.raises(ValueError, match="protect one user with at most 3 rows, and this run protects one record"):
        take_steps(engine, max_rows_per_user=None)
    take_steps(engine)


def test_a_checkpoint_of_users_is_not_one_of_rows(tmp_path):
    engine, model, optimizer = take_steps(PrivacyEngine())
    engine.save_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    for rows in (2, None):
        other, fresh, optimizer = made(PrivacyEngine(), max_rows_per_user=rows)[:3]
        with pytest.raises(ValueError, match=f"max_rows_per_user = 3, this run has {rows}"):
            other.load_checkpoint(path=tmp_path / "run.pt", module=fresh, optimizer=optimizer)
    other, fresh, optimizer = made(PrivacyEngine())[:3]
    other.load_checkpoint(path=tmp_path / "run.pt", module=fresh, optimizer=optimizer)
    assert other.get_epsilon(1e-3) == engine.get_epsilon(1e-3)


def test_a_supposition_counts_for_losses_alone():
    wrapped, _, loader = private(users.mlp(), number_users(), pad)
    batch = pad(number_users())
    with loader.users.suppose(MOST):
        loss = number_loss(wrapped, batch, loader.users.count)
        with pytest.raises(ValueError, match="just drawn"):
            loss.backward()


def test_losses_of_users_add_up():
    x = torch.tensor([1.0, 2.0, 4.0, 4.0])
    check_losses_add_up(lambda rows: rows.view(-1, 2).prod(1).mean(), x, rows_per_record=2)
    with pytest.raises(AssertionError, match="is not the mean of the losses of its records alone"):
        check_losses_add_up(lambda rows: rows.prod(), x, rows_per_record=2)
    for rows in (0, 3):
        with pytest.raises(ValueError, match=f"rows_per_record={rows}"):
            check_losses_add_up(torch.mean, x, rows_per_record=rows)
    with pytest.raises(ValueError, match="at least two records"):
        check_losses_add_up(torch.mean, x, rows_per_record=4)


@pytest.mark.parametrize(
    ("losses", "labels", "count", "words"),
    [
        (torch.zeros(2, 2), torch.ones(2, 2), 1, r"row_losses \[R\]"),
        (torch.zeros(4), torch.ones(3), 1, r"has_labels \[R\]"),
        (torch.zeros(4), torch.ones(4), 3, "users=3"),
        (torch.zeros(4), torch.ones(4), 0, "users=0"),
        (torch.zeros(0), torch.ones(0), 1, "0 rows"),
    ],
)
def test_per_user_loss_refuses_what_does_not_fit(losses, labels, count, words):
    with pytest.raises(ValueError, match=words):
        per_user_loss(losses, labels.bool(), count)


def test_a_row_that_does_not_count_leaves_no_trace():
    losses = torch.tensor([1.0, math.nan, math.inf, 4.0], requires_grad=True)
    found = per_user_loss(losses, torch.tensor([True, False, False, True]), 2)
    assert found.tolist() == [1.0, 4.0]
    found.sum().backward()
    assert losses.grad.tolist() == [1.0, 0.0, 0.0, 1.0]
