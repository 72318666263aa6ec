"""What the hooks of mode "bk" do to a model: nothing that lasts, nothing outside training, nothing by half."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import tiny_models
import torch
from helpers import classifier, loader, loss_of
from tiny_models import one_backward
from torch import Tensor, nn

from opacus_ac import PrivacyEngine
from opacus_ac.grad_sample import register_rules
from opacus_ac.grad_sample.one_backward import capture as capture_module
from opacus_ac.grad_sample.one_backward.capture import is_captured
from opacus_ac.grad_sample.one_backward.graph_nodes import watch_output
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.grad_sample.one_backward.use import Use
from opacus_ac.grad_sample.registry import STOCK, sampler_of
from opacus_ac.testing import check_norms, check_records_independent, opacus_table_restored, per_sample_gradients

X = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).double().train()


def attached(model: nn.Module, reduction: str = "mean") -> tuple[BookKeepingSource, Any]:
    register_rules(model)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    source = BookKeepingSource(model, list(named.values()), list(named), reduction)
    return source, source.attach()


def loss(model: nn.Module, x: Tensor = X) -> Tensor:
    return model(x).square().flatten(1).sum(1).mean()


def norms_of(model: nn.Module, x: Tensor = X) -> Tensor:
    grads = per_sample_gradients(model, x, loss)
    return torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()


def private(model: nn.Module, **kwargs: Any):
    arguments = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, **kwargs}
    return PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader(64, 16), **arguments
    )


# ---------------------------------------------------------------- flags


class Fails(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.inner, self.error, self.armed = nn.Linear(6, 6), error, True

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.armed:
            raise self.error
        return x


class Owner(nn.Module):
    """Has a parameter of its own and a registered rule, so that its forward runs with the parameter switched off."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(6)), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)


@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt("planted")])
def test_a_forward_that_fails_leaves_every_parameter_trainable(error: BaseException) -> None:
    model = nn.Sequential(nn.Linear(6, 6), Owner(Fails(error))).double().train()
    source, detach = attached(model)
    with pytest.raises(type(error), match="planted"):
        model(X)
    source.clear(sums=True)  # what zero_grad() does; needed after a KeyboardInterrupt only
    assert all(p.requires_grad for p in model.parameters())
    model[1].inner.armed = False
    loss(model).backward()
    got = source.finish_batch()
    detach()
    torch.testing.assert_close(got, norms_of(model), rtol=1e-10, atol=0)


def test_an_ordinary_error_needs_no_zero_grad() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Owner(Fails(RuntimeError("planted")))).double().train()
    _, detach = attached(model)
    with pytest.raises(RuntimeError, match="planted"):
        model(X)
    assert all(p.requires_grad for p in model.parameters())
    detach()


def test_weights_do_not_ask_for_gradients_while_their_layer_runs_and_do_otherwise() -> None:
    model, seen = layers(), []
    _, detach = attached(model)
    model[0].register_forward_pre_hook(lambda module, args: seen.append(module.weight.requires_grad))
    model[3].register_forward_pre_hook(lambda module, args: seen.append(model[0].weight.requires_grad))
    loss(model).backward()
    assert seen == [False, True]
    assert all(p.grad is None for p in model.parameters())
    detach()
    loss(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_parameter_frozen_later_is_left_alone() -> None:
    model = layers()
    source, detach = attached(model)
    model[0].requires_grad_(False)
    loss(model).backward()
    got = source.finish_batch()
    source.accumulate(torch.ones_like(got))
    sums = list(source.sums())
    detach()
    assert sums[0] is None
    assert sums[1] is None
    assert not model[0].weight.requires_grad
    torch.testing.assert_close(got, norms_of(model), rtol=1e-10, atol=0)


# ---------------------------------------------------------------- what is recorded, and when


def count_deliveries(source: BookKeepingSource) -> list[str]:
    seen: list[str] = []
    deliver = source._capture._deliver

    def counted(use: Use, gradient: Tensor) -> None:
        seen.append(use.path)
        deliver(use, gradient)

    source._capture._deliver = counted
    return seen


def test_evaluation_and_no_grad_forwards_record_nothing() -> None:
    model = layers()
    source, detach = attached(model)
    with torch.no_grad():
        model(X)
    with torch.inference_mode():
        model(X)
    model.eval()
    held = weakref.ref(model(X))
    gc.collect()
    assert held() is None
    model.train()
    with pytest.raises(ValueError, match="no gradient has reached"):
        source.finish_batch()
    loss(model).backward()
    model.eval()
    model(X)  # an evaluation between backward and step does not matter
    model.train()
    assert source.finish_batch().shape == (4,)
    detach()


def test_a_forward_without_backward_holds_nothing_and_changes_nothing() -> None:
    model = layers()
    source, detach = attached(model)
    output = model(X)
    held = weakref.ref(output)
    del output
    gc.collect()
    assert held() is None
    loss(model).backward()
    model(X)  # a metric, say
    got = source.finish_batch()
    detach()
    torch.testing.assert_close(got, norms_of(model), rtol=1e-10, atol=0)


def test_frozen_parts_are_not_watched() -> None:
    model = layers()
    model[0].requires_grad_(False)
    source, detach = attached(model)
    seen = count_deliveries(source)
    assert not model[0]._forward_hooks
    loss(model).backward()
    assert seen == ["3", "2"]
    detach()


def test_a_model_in_evaluation_mode_that_is_trained_all_the_same_is_refused() -> None:
    model = layers()
    source, detach = attached(model)
    model[0].eval()
    loss(model).backward()
    with pytest.raises(ValueError, match=r"0\.weight has an ordinary gradient.*evaluation mode"):
        source.finish_batch()
    detach()


# ---------------------------------------------------------------- several passes


def test_two_backward_passes_before_a_step_are_records_of_their_own() -> None:
    model = layers()
    source, detach = attached(model)
    loss(model, X[:1]).backward()
    loss(model, X[1:]).backward()
    assert source.backward_passes == 2
    assert not source.merged_passes
    got = source.finish_batch()
    weights = torch.rand(4, dtype=torch.float64)
    source.accumulate(weights)
    sums = list(source.sums())
    detach()
    torch.testing.assert_close(got, norms_of(model), rtol=1e-10, atol=0)
    want = per_sample_gradients(model, X, loss)
    for total, rows in zip(sums, want.values(), strict=True):
        torch.testing.assert_close(total, torch.einsum("i,i...->...", weights, rows))


def pairs(model: nn.Module, x: Tensor) -> Tensor:
    """Each record goes through the model twice, as a chosen and a rejected reply do."""
    return (model(x) - model(-x)).square().flatten(1).sum(1).mean()


def test_several_forwards_of_the_same_records_are_one_gradient_each() -> None:
    model = layers()
    want = per_sample_gradients(model, X, pairs)
    source, detach = attached(model)
    pairs(model, X).backward()
    assert source.merged_passes
    check_norms(source.finish_batch(), want, rtol=1e-10)
    detach()


def test_forwards_of_other_records_in_one_backward_are_refused_by_their_number() -> None:
    model, optimizer, batches = private(classifier())
    whole = next(iter(batches))
    half = len(whole[0]) // 2
    (loss_of(model, [t[:half] for t in whole]) + loss_of(model, [t[half : 2 * half] for t in whole])).backward()
    with pytest.raises(ValueError, match=r"fewer per-sample gradients"):
        optimizer.step()
    assert optimizer.steps_taken == 0


def test_forwards_of_unknown_records_in_one_backward_are_refused() -> None:
    model, optimizer, _ = private(classifier())
    optimizer.plan = None
    batch = next(iter(loader(64, 16)))
    (loss_of(model, batch) + loss_of(model, batch)).backward()
    with pytest.raises(ValueError, match="several forward passes"):
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()
    assert optimizer.steps_taken == 1


def test_batches_of_different_sizes_in_one_backward_are_refused() -> None:
    model = layers()
    source, detach = attached(model)
    with pytest.raises(ValueError, match="forward passes of 2 and of 4 rows went into one backward pass"):
        (loss(model, X) + loss(model, X[:2])).backward()
    with pytest.raises(ValueError, match=r"failed half-way.*zero_grad"):
        source.finish_batch()
    source.clear(sums=True)
    loss(model).backward()
    assert source.finish_batch().shape == (4,)
    detach()


def test_two_backward_passes_through_one_forward_are_refused() -> None:
    model = layers()
    _, detach = attached(model)
    value = loss(model)
    value.backward(retain_graph=True)
    with pytest.raises(ValueError, match=r"two backward passes ran through one use of 3"):
        value.backward()
    detach()


def test_an_input_changed_in_place_after_its_use_is_refused() -> None:
    """By autograd's own check, as in ordinary training."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)).double().train()
    _, detach = attached(model)
    hidden = model[0](X)
    out = model[1](hidden)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    detach()


class Tuple(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class Names(Tuple):
    def forward(self, x: Tensor) -> list[str]:  # type: ignore[override]
        return ["no tensor" for _ in super().forward(x)]


class Head(nn.Module):
    """Uses both outputs of a layer that returns two, the second one or none of which may carry a gradient."""

    def __init__(self, used: tuple[int, ...], several: nn.Module) -> None:
        super().__init__()
        self.first, self.several, self.used = nn.Linear(6, 6), several, used

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        outputs = self.several(hidden)
        return torch.cat([outputs[i].flatten(1) for i in self.used] + [hidden.flatten(1)], 1)


class Gated(nn.Module):
    """Two outputs of one weight, in a dictionary, and integers beside them; it takes a second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[int, Tensor]:
        return {0: x * self.weight, 1: (x * self.weight).sigmoid() * scale, 2: x.argmax(-1)}


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1), (1, 0)])
@pytest.mark.parametrize("make", [lambda: Tuple(6, 2), Gated], ids=["tuple", "dictionary"])
def test_a_module_may_return_several_tensors(make: Any, used: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Head(used, make()).double().train()
    source, detach = attached(model)
    loss(model).backward()
    torch.testing.assert_close(source.finish_batch(), norms_of_plain(model), rtol=1e-6, atol=0)
    detach()


def norms_of_plain(model: nn.Module) -> Tensor:
    """As :func:`norms_of`, of a model that carries hooks."""
    return norms_of(copy.deepcopy(model))


def test_a_watched_module_must_return_a_tensor() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Names(6, 2)).double().train()
    _, detach = attached(model)
    with pytest.raises(ValueError, match=r"1 \(Names\) returns list without a floating-point tensor"):
        model(X)
    assert all(p.requires_grad for p in model.parameters())
    detach()


class Counting(nn.Module):
    """Keeps statistics of its inputs in a buffer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.ones(6))
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.seen += x.detach().flatten(0, -2).sum(0)
        elif self.how == "another tensor":
            self.seen = self.seen + x.detach().flatten(0, -2).sum(0)
        return x * self.weight + self.seen


@pytest.mark.parametrize("how", ["in place", "another tensor"])
def test_a_module_that_is_run_again_must_not_change_its_buffers(how: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), Counting(how)).double().train()
    _, detach = attached(model)
    with pytest.raises(ValueError, match="changes its buffers"):
        model(X)
    detach()


def test_buffers_that_stay_as_they_are_may_be_there() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Counting("not at all")).double().train()
    source, detach = attached(model)
    loss(model).backward()
    torch.testing.assert_close(source.finish_batch(), norms_of_plain(model), rtol=1e-6, atol=0)
    detach()


class Positions(nn.Embedding):
    """Looks positions up once for all records, as ``[1, T]`` or as ``[T]``."""

    def __init__(self, rows: int, width: int, batched: bool) -> None:
        super().__init__(rows, width)
        self.batched = batched

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1]) + 1
        return super().forward(ids.unsqueeze(0) if self.batched else ids)


class WithPositions(nn.Module):
    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.positions, self.layer = Positions(9, 6, batched), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x + self.positions(x)).tanh())


@pytest.mark.parametrize("batched", [True, False])
def test_positions_that_are_looked_up_once_for_all_records(batched: bool) -> None:
    torch.manual_seed(0)
    model, x = WithPositions(batched).double().train(), torch.randn(4, 5, 6, dtype=torch.float64)
    source, detach = attached(model)
    loss(model, x).backward()
    torch.testing.assert_close(source.finish_batch(), norms_of(copy.deepcopy(model), x), rtol=1e-6, atol=0)
    detach()


def test_as_many_positions_as_records_are_refused_until_another_batch_has_told() -> None:
    model = WithPositions(batched=False).double().train()
    source, detach = attached(model)
    with pytest.raises(ValueError, match="may be positions or records"):
        model(torch.randn(5, 5, 6).double())
    source.clear(sums=True)
    loss(model, torch.randn(4, 5, 6).double()).backward()
    source.clear(sums=True)
    x = torch.randn(5, 5, 6).double()
    loss(model, x).backward()
    torch.testing.assert_close(source.finish_batch(), norms_of(copy.deepcopy(model), x), rtol=1e-6, atol=0)
    detach()


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("name", ["qwen2-tied", "bitnet-tied", "gpt2", "opt", "mamba"])
def test_bfloat16_autocast(name: str, inside: bool) -> None:
    """Rounding of the pass itself is that of bfloat16; what a clipped record adds to the sum is C to 1e-4."""
    model = tiny_models.build(name, dtype=torch.float32)
    batch = tiny_models.token_batch()
    exact = per_sample_gradients(model, batch, tiny_models.mean_loss)

    def autocast_loss(model: nn.Module, rows: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return tiny_models.mean_loss(model, rows)

    want = per_sample_gradients(model, batch, autocast_loss)
    context = torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside)
    for record in range(4):
        with context:
            norms, _ = one_backward(model, batch, autocast_loss)
            weights = torch.zeros(4, dtype=torch.float64)
            weights[record] = 0.5 / norms[record]
            again, sums = one_backward(model, batch, autocast_loss, weights)
        assert torch.equal(norms, again)
        assert all(s.dtype == torch.float32 for s in sums.values())
        size = torch.stack([s.double().square().sum() for s in sums.values()]).sum().sqrt()
        assert float(size) == pytest.approx(0.5, rel=1e-4)
    check_norms(norms, want, rtol=1e-2)
    check_norms(norms, exact, rtol=5e-2)


def test_a_frozen_base_in_bfloat16_with_float32_adapters() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = tiny_models.build("qwen2-tied", dtype=torch.bfloat16)
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    batch = tiny_models.token_batch(padded=False)
    want = per_sample_gradients(model, batch, tiny_models.mean_loss)
    norms, _ = one_backward(model, batch, tiny_models.mean_loss)
    check_norms(norms, want, rtol=2e-2)
    for record in range(4):
        weights = torch.zeros(4, dtype=torch.float64)
        weights[record] = 0.5 / norms[record]
        _, sums = one_backward(model, batch, tiny_models.mean_loss, weights)
        size = torch.stack([s.double().square().sum() for s in sums.values()]).sum().sqrt()
        assert float(size) == pytest.approx(0.5, rel=1e-4)


# ---------------------------------------------------------------- the model stays what it was


def test_a_language_model_stays_itself(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

    model = tiny_models.build("qwen2-tied", dtype=torch.float32)
    prompt = torch.tensor([[3, 4, 5]])
    model.eval()
    before = model.generate(prompt, max_new_tokens=4, do_sample=False)
    model.train()
    wrapped, optimizer, _ = private(model)
    assert wrapped is model
    assert isinstance(wrapped, Qwen2ForCausalLM)
    assert wrapped.config.vocab_size == tiny_models.VOCAB
    optimizer.plan = None
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(**tiny_models.token_batch()).loss.backward()
        optimizer.step()
    wrapped.eval()
    after = wrapped.generate(prompt, max_new_tokens=4, do_sample=False)
    assert after.shape == before.shape
    wrapped.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=4, do_sample=False), after)
    assert not is_captured(loaded)


def test_copies_and_pickles_of_a_private_model_are_ordinary_models() -> None:
    model, optimizer, _ = private(classifier())
    batch = next(iter(loader(64, 16)))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert not is_captured(other)
        loss_of(other, batch).backward()
        assert all(p.grad is not None for p in other.parameters())
        gradients = per_sample_gradients(other, batch, loss_of)
        assert all(g.abs().max() > 0 for g in gradients.values())
    optimizer.plan = None
    loss_of(model, batch).backward()
    optimizer.step()
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize("check", [per_sample_gradients, check_records_independent])
def test_the_oracle_refuses_a_model_whose_uses_are_captured(check: Any) -> None:
    """Its weights need no gradient there: the oracle would find zeros."""
    model, _, _ = private(classifier())
    with pytest.raises(ValueError, match="per-sample gradient hooks"):
        check(model, next(iter(loader(64, 4))), loss_of)


# ---------------------------------------------------------------- memory


def outputs_alive(model: nn.Module, batch: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many outputs of watched modules are still held, by autograd or by the hooks, when the forward pass is over."""
    source, detach = attached(model)
    held: list[Any] = []

    def watched(token: Tensor, output: Tensor, arrive: Any) -> Any:
        held.append(weakref.ref(output))
        return watch_output(token, output, arrive)

    monkeypatch.setattr(capture_module, "watch_output", watched)
    value = tiny_models.mean_loss(model, batch)
    gc.collect()
    assert held
    alive = sum(1 for reference in held if reference() is not None)
    value.backward()
    assert source.finish_batch().shape == (4,)
    detach()
    return alive


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_saves_the_memory_that_it_is_for(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = tiny_models.token_batch()
    plain = outputs_alive(tiny_models.build("qwen2-tied"), batch, monkeypatch)
    model = tiny_models.build("qwen2-tied")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert outputs_alive(model, batch, monkeypatch) <= plain / 2


def test_records_are_gone_when_the_sums_are_formed() -> None:
    model = layers()
    source, detach = attached(model)
    references: list[Any] = []
    deliver = source._capture._deliver

    def noted(use: Use, gradient: Tensor) -> None:
        references.append(weakref.ref(gradient))
        deliver(use, gradient)

    source._capture._deliver = noted
    value = loss(model)
    value.backward()
    source.accumulate(torch.ones_like(source.finish_batch()))
    for _ in source.sums():
        pass
    gc.collect()
    assert all(reference() is None for reference in references)
    assert value is not None  # the loss, and with it the graph, is still there
    detach()


class ChangedInPlace(nn.Module):
    """What follows a layer without a rule changes its output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.head = nn.Linear(6, 6), Counting("not at all"), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.scale(self.body(x))
        hidden += 1
        return self.head(hidden)


def test_the_output_of_a_module_that_is_run_again_may_be_changed_in_place() -> None:
    torch.manual_seed(0)
    model = ChangedInPlace().double().train()
    source, detach = attached(model)
    loss(model).backward()
    torch.testing.assert_close(source.finish_batch(), norms_of_plain(model), rtol=1e-6, atol=0)
    detach()


class RowByRow(nn.Module):
    """Runs a layer on one record after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(row) for row in x.split(1)])


class FlatLookup(nn.Module):
    """Looks all tokens up at once, as ``[B T]``, by an embedding with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Shifted(9, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids.flatten()).view(*ids.shape, 6)


class Shifted(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 1)


@pytest.mark.parametrize(
    ("make", "x"), [(RowByRow, torch.randn(4, 6).double()), (FlatLookup, torch.arange(8).view(4, 2))]
)
def test_what_is_not_for_all_records_is_not_expanded(make: Any, x: Tensor) -> None:
    """The output stays what it is; that the rows are not the records shows in their number."""
    model = make().double().train()
    want = model(x)
    source, detach = attached(model)
    got = model(x)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    assert source.records != len(x)
    detach()


class RoundsLater(nn.Linear):
    """Computes what its base does, until it is told to round its weights."""

    rounds = False

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.round() if self.rounds else self.weight
        return nn.functional.linear(x, weight, self.bias)


def test_a_subclass_of_linear_that_changes_what_it_computes_is_followed() -> None:
    """Its gradient is zero from then on: what it does is looked at in every step, and not once."""
    torch.manual_seed(0)
    with opacus_table_restored():
        model = nn.Sequential(nn.Linear(6, 6), RoundsLater(6, 2)).double().train()
        source, detach = attached(model)
        for model[1].rounds in (False, True):
            loss(model).backward()
            torch.testing.assert_close(source.finish_batch(), norms_of_plain(model), rtol=1e-6, atol=0)
            source.clear(sums=True)
        detach()


def test_linear_layers_of_falcon_have_the_rule_of_their_base() -> None:
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    with opacus_table_restored():
        model = nn.Sequential(falcon.FalconLinear(6, 6), RoundsLater(6, 2))
        register_rules(model)
        assert sampler_of(model[0]) is STOCK[nn.Linear]
        assert sampler_of(model[1]) is None
