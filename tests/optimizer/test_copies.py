"""Copies, pickles and hooks: a copy of a private model is an ordinary one, and torch's hooks run once for every release."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import tiny_models
import torch
from helpers import classifier, loader, train
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from opacus_ac import PrivacyEngine

MODES = ("bk", "hooks")


def private(model, mode="bk", records=64, batch_size=16, **options):
    data = options.pop("data", None) or loader(records, batch_size)
    engine = PrivacyEngine()
    made = engine.make_private(
        module=model,
        optimizer=options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.01),
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        **options,
    )
    return engine, *made


# ---------------------------------------------------------------- models


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "AveragedModel": AveragedModel,
    "exponential average": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
}
MODELS = {"plain": None, "gpt2": "gpt2"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_private_model_is_an_ordinary_model(name, kind, mode):
    if kind == "plain":
        model, data = classifier(), loader(12, 4)
        batch = next(iter(loader(6, 6)))

        def loss(m, b):
            return nn.functional.cross_entropy(m(b[0]), b[1])
    else:
        model, batch = tiny_models.build("gpt2"), tiny_models.token_batch(padded=False)
        rows = [{key: value[0] for key, value in batch.items()}] * 12
        data = torch.utils.data.DataLoader(rows, batch_size=4)

        def loss(m, b):
            return m(**b).loss

    _, model, optimizer, batches = private(model, mode, data=data)

    def steps():
        for b in batches:
            optimizer.zero_grad()
            loss(model, b).backward()
            optimizer.step()

    steps()
    other = COPIES[name](model)
    torch.testing.assert_close(loss(other, batch), loss(model, batch))
    loss(other, batch).backward()  # ordinary gradients, which no step knows of
    assert all(p.grad is not None for p in other.parameters() if p.requires_grad)
    assert all(getattr(p, "grad_sample", None) is None for p in other.parameters())
    optimizer.zero_grad()
    taken = optimizer.steps_taken
    steps()
    assert optimizer.steps_taken > taken
    if isinstance(other, AveragedModel):
        other.update_parameters(model)
        assert math.isfinite(loss(other, batch).item())


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize("mode", MODES)
def test_copies_of_a_private_optimizer_take_no_steps_and_leave_others_alone(mode):
    engine, model, optimizer, batches = private(classifier(), mode)
    train(model, optimizer, batches)
    history = list(engine.accountant.history)
    twin, copied = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match="a copy of a private optimizer takes no steps"):
        train(twin, copied, loader())
    for save in (pickle.dumps, lambda value: torch.save(value, io.BytesIO())):
        with pytest.raises(ValueError, match=r"cannot be pickled: its noise is secret.*optimizer\.state_dict\(\)"):
            save(optimizer)
    assert engine.accountant.history == history
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, io.BytesIO())
    for again in ((model, optimizer, batches), private(classifier(), mode)[1:]):
        before = again[1].steps_taken
        train(*again)
        assert again[1].steps_taken == before + 4


# ---------------------------------------------------------------- hooks


@pytest.mark.parametrize("options", [{}, {"fused_step": True}, {"max_physical_batch_size": 5}], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_hooks_on_steps_run_once_for_every_release_and_see_released_gradients(mode, options):
    if mode == "hooks" and "fused_step" in options:
        pytest.skip("a fused step belongs to mode bk")
    _, model, optimizer, batches = private(classifier(), mode, **options)
    seen = []

    def before(given, args, kwargs):
        assert given is optimizer
        assert args == (optimizer,)
        assert not kwargs
        grads = [p.grad for p in model.parameters()]
        assert "fused_step" in options or all(g is not None and not hasattr(g, "grad_sample") for g in grads)
        seen.append(("before", optimizer.steps_taken))

    def after(given, args, kwargs):
        seen.append(("after", optimizer.steps_taken))

    handles = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
    train(model, optimizer, batches)
    steps = optimizer.steps_taken
    assert steps == 4
    assert seen == [(when, step + 1) for step in range(steps) for when in ("before", "after")]
    for handle in handles:
        handle.remove()
    train(model, optimizer, batches)
    assert len(seen) == 2 * steps


def test_a_hook_that_returns_arguments_for_the_step_is_refused_and_the_batch_is_dead():
    engine, model, optimizer, batches = private(classifier())
    handle = optimizer.register_step_pre_hook(lambda given, args, kwargs: (args, kwargs))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="returned arguments for it"):
        train(model, optimizer, batches)
    assert all(map(torch.equal, before, model.parameters()))
    assert len(engine.accountant.history) == 1  # it was released
    handle.remove()
    train(model, optimizer, batches)
    assert optimizer.steps_taken >= 4


def test_hooks_of_before_and_of_all_optimizers_run_around_the_inner_step():
    model, seen = classifier(), []
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    inner.register_step_pre_hook(lambda given, *_: seen.append(given is inner))
    _, model, optimizer, batches = private(model, optimizer=inner, lr_control=False, clip_policy="fixed")
    handles = [register(lambda given, *_: seen.append(given is inner)) for register in
               (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)]  # fmt: skip
    try:
        train(model, optimizer, batches)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [True] * 3 * optimizer.steps_taken


def test_hooks_on_state_dicts_run_where_states_are_made_and_read():
    _, model, optimizer, batches = private(classifier())
    train(model, optimizer, batches)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda given: seen.append("before making"))
    optimizer.register_state_dict_post_hook(lambda given, state: seen.append("after making"))
    optimizer.register_load_state_dict_pre_hook(lambda given, state: seen.append("before reading"))
    optimizer.register_load_state_dict_post_hook(lambda given: seen.append("after reading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before making", "after making", "before reading", "after reading"]
    copy.deepcopy(optimizer).state_dict()
    assert len(seen) == 4


# ---------------------------------------------------------------- other refusals and numbers


def scripted():
    return nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 3))


def looked_up(kind):
    return lambda: nn.Sequential(kind(8, 4, sparse=True), nn.Linear(4, 3))


REFUSED = {
    "scripted": (scripted, r"0 was scripted or traced with torch.jit.*pass the Python module"),
    "traced": (
        lambda: nn.Sequential(torch.jit.trace(nn.Linear(4, 4), torch.zeros(2, 4)), nn.Linear(4, 3)),
        "torch.jit",
    ),
    "sparse embedding": (looked_up(nn.Embedding), r"0 \(Embedding\) has sparse=True.*set sparse=False"),
    "sparse bag": (looked_up(nn.EmbeddingBag), r"0 \(EmbeddingBag\) has sparse=True.*set sparse=False"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_cannot_be_private_say_so_at_make_private_unless_frozen(name, mode):
    build, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        private(build(), mode)
    model = build()
    for parameter in model[0].parameters():
        parameter.requires_grad = False
    if name == "scripted":  # it takes no hooks at all
        with pytest.raises(ValueError, match=words):
            private(model, mode, optimizer=torch.optim.SGD(model[1].parameters(), lr=0.1))
        return
    private(model, mode, optimizer=torch.optim.SGD(model[1].parameters(), lr=0.1))


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_was_cast_after_make_private_is_refused_before_the_charge(mode):
    engine, model, optimizer, batches = private(classifier(torch.float32), mode)
    model.bfloat16()
    inputs, targets = next(iter(batches))
    nn.functional.cross_entropy(model(inputs.bfloat16()).float(), targets).backward()
    with pytest.raises(ValueError, match=r"cast from torch.float32 to torch.bfloat16 after make_private"):
        optimizer.step()
    assert not engine.accountant.history


@pytest.mark.parametrize("mode", MODES)
def test_a_part_of_another_optimizer_does_not_stop_the_private_one(mode):
    model = classifier()
    _, model, optimizer, batches = private(model, mode, optimizer=torch.optim.SGD(model[2].parameters(), lr=0.1))
    train(model, optimizer, batches)
    assert optimizer.steps_taken == 4


@pytest.mark.parametrize(("most", "want"), [(4, 16), (5, 13), (16, 4)])
def test_the_length_of_a_memory_manager_counts_physical_batches_as_in_opacus(most, want):
    _, _, optimizer, batches = private(classifier())
    with BatchMemoryManager(data_loader=batches, max_physical_batch_size=most, optimizer=optimizer) as managed:
        assert len(managed) == want
    assert len(batches) == 4
