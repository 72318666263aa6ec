"""The per-record losses: against plain cross entropy, against each other, and what the fused one refuses."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from opacus_ac.loss import fused_causal_lm_loss, per_record_causal_lm_loss, per_record_token_loss

IGNORE = -100
LOSSES = [fused_causal_lm_loss, per_record_causal_lm_loss]


def sliced_loss(logits, labels):
    """The definition, written out: the last logits are cut, each record is computed alone."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = []
    for row, label in zip(wide[:, :-1], labels[:, 1:], strict=True):
        keep = label != IGNORE
        losses.append(F.cross_entropy(row[keep], label[keep]) if keep.any() else row.new_zeros(()))
    return torch.stack(losses)


def draw(b=5, t=9, v=13, seed=0, scale=3.0):
    """Logits and labels: right padding, left padding, an all-masked record, repeated tokens, a hole."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(b, t, v, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, v, (b, t), generator=generator)
    if b >= 5 and t >= 5:
        labels[0, -3:] = IGNORE
        labels[1, :4] = IGNORE
        labels[2] = IGNORE
        labels[3] = 1
        labels[4, 3] = IGNORE
    return logits, labels


def run(loss, logits, labels, reduce, prepare=lambda x: x * 1.0):
    """Return values and the gradient of a leaf behind the logits."""
    leaf = logits.clone().requires_grad_()
    losses = loss(prepare(leaf), labels)
    values = losses.detach().clone()
    reduce(losses).backward()
    return values, leaf.grad


UPSTREAM = {
    "mean": lambda losses: losses.mean(),
    "sum": lambda losses: losses.sum(),
    "weights": lambda losses: (losses * torch.linspace(-2, 3, len(losses)).to(losses)).sum(),
    "zero": lambda losses: (losses * 0).sum(),
    "almost the mean": lambda losses: losses.mean() * (1 + 1e-9),
    "one record": lambda losses: losses[0],
}


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_equal_the_definition(loss, chunk, reduce, monkeypatch):
    logits, labels = draw()
    if chunk:  # rows: chunks then hold predicted rows, others, and both
        monkeypatch.setattr("opacus_ac.loss._CPU_CHUNK_BYTES", chunk * logits.shape[-1] * 8)
    values, gradient = run(loss, logits, labels, reduce)
    wanted, wanted_gradient = run(sliced_loss, logits, labels, reduce)
    torch.testing.assert_close(values, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-12)
    assert values[2] == 0
    assert gradient[2].eq(0).all()
    assert gradient[:, -1].eq(0).all()


@pytest.mark.parametrize(("b", "t", "v"), [(1, 9, 13), (3, 1, 13), (1, 1, 1), (3, 2, 1), (2, 0, 4), (0, 3, 4)])
@pytest.mark.parametrize("loss", LOSSES)
def test_degenerate_shapes(loss, b, t, v):
    logits, labels = draw(b, t, v)
    values, gradient = run(loss, logits, labels, torch.sum)
    wanted = sliced_loss(logits, labels) if b and t else torch.zeros(b, dtype=torch.float64)
    torch.testing.assert_close(values, wanted, rtol=1e-12, atol=1e-12)
    assert gradient.shape == logits.shape
    if t < 2:
        assert gradient.eq(0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_through_a_head(loss):
    """Weight and hidden gradients through a tied head, as a model computes them."""
    _, labels = draw()
    weight = torch.randn(13, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = []
    for function in (loss, sliced_loss):
        table = weight.clone().requires_grad_()
        hidden = F.embedding(labels.clamp(min=0), table).tanh()
        function(F.linear(hidden, table), labels).mean().backward()
        grads.append(table.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_fused_gradient_is_the_derivative(loss):
    logits, labels = draw(5, 6, 4, scale=1.0)
    gradient = run(loss, logits, labels, UPSTREAM["weights"])[1]
    step = 1e-6
    for index in [(0, 0, 1), (1, 4, 0), (3, 2, 1), (4, 4, 3)]:
        moved = [logits.clone(), logits.clone()]
        moved[0][index] += step
        moved[1][index] -= step
        up, down = (UPSTREAM["weights"](sliced_loss(x, labels)) for x in moved)
        assert gradient[index].item() == pytest.approx(float(up - down) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_large_logits_and_targets_whose_probability_underflows(loss, dtype):
    logits = torch.zeros(1, 4, 6, dtype=dtype)
    logits[0, 0, 2] = 1e4  # predicts 2: loss 0
    logits[0, 1, 3] = 1e4  # predicts 4: loss 1e4
    logits[0, 2, 5] = 150.0  # predicts 0: loss 150, where float32 has exp(-150) = 0
    labels = torch.tensor([[IGNORE, 2, 4, 0]])
    logits[0, 1, 0] = -1e4
    values, gradient = run(loss, logits, labels, torch.sum)
    assert values.item() == pytest.approx((1e4 + 150) / 3, rel=1e-6)
    alone = run(loss, logits[:, 2:], labels[:, 2:], torch.sum)[0]
    assert alone.item() == pytest.approx(150, rel=1e-6)
    wanted = torch.zeros_like(gradient)
    wanted[0, 1, 3], wanted[0, 1, 4], wanted[0, 2, 5], wanted[0, 2, 0] = 1 / 3, -1 / 3, 1 / 3, -1 / 3
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_infinities_in_a_predicted_row(loss):
    """A vocabulary masked with -inf stays exact; what cross entropy makes NaN is NaN here."""
    logits, labels = draw()
    masked = next(i for i in range(13) if i not in labels[0].tolist())
    logits[0, :, masked] = -torch.inf
    got, wanted = (run(f, logits, labels, torch.mean) for f in (loss, sliced_loss))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    logits[1, 5, 0] = torch.inf
    got, wanted = (run(f, logits, labels, torch.mean) for f in (loss, sliced_loss))
    assert wanted[0][1].isnan()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("reduce", [torch.mean, torch.sum])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_that_are_not_predicted_do_not_count(loss, reduce, bad):
    logits, labels = draw()
    wanted = run(loss, logits, labels, reduce)
    logits[:, -1] = bad  # the last position predicts nothing
    logits[0, -4:] = bad
    logits[2] = bad
    got = run(loss, logits, labels, reduce)
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=0)
    if loss is fused_causal_lm_loss:  # F.cross_entropy multiplies by 0, which keeps a NaN
        torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=0)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize(
    ("dtype", "value", "gradient"),
    [(torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 2**-7), (torch.float16, 1e-6, 2**-10)],
)
def test_lower_precision(dtype, value, gradient, reduce):
    logits, labels = draw(v=500)
    logits = logits.to(dtype)
    got = run(fused_causal_lm_loss, logits, labels, reduce)
    wanted = run(sliced_loss, logits.double(), labels, reduce)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=value, atol=1e-7)
    floor = 1e-7 if dtype == torch.float16 else 1e-8  # float16 ends at 6e-8
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=gradient, atol=floor)


def test_bfloat16_gradient_of_the_mean_is_rounded_once():
    logits, labels = draw(v=500)
    logits = logits.bfloat16()
    got = run(fused_causal_lm_loss, logits, labels, torch.mean)[1]
    exact = run(sliced_loss, logits.double(), labels, torch.mean)[1]
    torch.testing.assert_close(got.double(), exact, rtol=2**-8 * 1.001, atol=1e-12)


def test_float16_keeps_small_gradients_for_a_loss_scale():
    """Gradients below the range of float16, which the scaled loss lifts into it, as in mixed-precision training."""
    logits = torch.zeros(2, 40, 8, dtype=torch.float16)
    logits[..., 0] = 12.0
    labels = torch.zeros(2, 40, dtype=torch.long)
    got = run(fused_causal_lm_loss, logits, labels, lambda x: x.mean() * 2.0**15)[1]
    wanted = run(sliced_loss, logits.double(), labels, lambda x: x.mean() * 2.0**15)[1]
    assert wanted[0, 0, 1].item() / 2**15 < 2**-24 * 1.5  # would be lost, or wrong by half, unscaled
    # Without token 0: near a probability of 1 its gradient is a difference that float32 itself does not resolve.
    torch.testing.assert_close(got[..., 1:].double(), wanted[..., 1:], rtol=2e-3, atol=0)


class BigBuffers(TorchDispatchMode):
    """Collects the storages of tensors with at least ``numel`` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and value.numel() >= self.numel:
                storage = value.untyped_storage()
                self.found[storage.data_ptr()] = storage  # held, so that no address comes twice
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_one_buffer_in_all(dtype, reduce, monkeypatch):
    logits, labels = draw(v=64)
    monkeypatch.setattr("opacus_ac.loss._CPU_CHUNK_BYTES", 4 * 64 * 4)
    hidden = torch.randn(*labels.shape, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(64, 8, dtype=dtype, requires_grad=True)
    with BigBuffers(logits.numel()) as buffers:
        logits = F.linear(hidden, weight)
        seen = []
        logits.register_hook(seen.append)
        getattr(fused_causal_lm_loss(logits, labels), reduce)().backward()
    assert list(buffers.found) == [logits.data_ptr()]
    assert seen[0].data_ptr() == logits.data_ptr()
    with BigBuffers(logits.numel()) as buffers:  # the count can fail
        per_record_causal_lm_loss(F.linear(hidden, weight), labels).sum().backward()
    assert len(buffers.found) > 1


def test_the_loss_that_keeps_the_logits_needs_one_buffer_more(monkeypatch):
    """Their gradient: no copy for the shift, no log-probabilities."""
    monkeypatch.setattr("opacus_ac.loss._CPU_CHUNK_BYTES", 4 * 64 * 8)
    logits, labels = draw(v=64)
    logits.requires_grad_()
    with BigBuffers(logits.numel() // 2) as buffers:
        loss = per_record_causal_lm_loss(logits, labels).sum()
        assert len(buffers.found) == 1  # the logits, of which views are made
        loss.backward()
    assert len(buffers.found) == 2


def test_the_loss_that_keeps_the_logits_has_a_second_derivative():
    logits, labels = draw()
    gradients = []
    for loss in (per_record_causal_lm_loss, sliced_loss):
        leaf = logits.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf, labels).sum(), leaf, create_graph=True)
        first.square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_the_loss_that_keeps_the_logits_works_under_torch_func():
    logits, labels = draw()
    got = torch.func.vmap(torch.func.grad(lambda x, y: per_record_causal_lm_loss(x[None], y[None])[0]))(logits, labels)
    wanted = run(sliced_loss, logits, labels, torch.sum)[1]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_hook_on_the_head_keeps_the_gradient():
    _, labels = draw()
    kept = []
    hidden = torch.randn(5, 9, 4, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(4, 13, bias=False).double().requires_grad_(False)
    head.register_forward_hook(lambda _module, _args, output: output.register_hook(kept.append) and None)
    fused_causal_lm_loss(head(hidden), labels).sum().backward()
    wanted = run(sliced_loss, F.linear(hidden.detach(), head.weight), labels, torch.sum)[1]
    torch.testing.assert_close(kept[0], wanted, rtol=1e-12, atol=1e-12)


def test_second_backward_is_refused():
    logits, labels = draw()
    losses = fused_causal_lm_loss(logits.requires_grad_() * 1.0, labels)
    losses.sum().backward(retain_graph=True)
    for retain in (True, False):
        with pytest.raises(RuntimeError, match=r"fused_causal_lm_loss.*per_record_causal_lm_loss"):
            losses.sum().backward(retain_graph=retain)


def test_second_derivative_is_refused():
    logits, labels = draw()
    leaf = logits.requires_grad_()
    losses = fused_causal_lm_loss(leaf * 1.0, labels)
    with pytest.raises(RuntimeError, match=r"second derivative.*per_record_causal_lm_loss"):
        torch.autograd.grad(losses.mean(), leaf, create_graph=True)


def test_an_operation_that_needs_its_output_is_refused():
    logits, labels = draw()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(fused_causal_lm_loss, logits, labels, torch.mean, prepare=torch.tanh)
    run(per_record_causal_lm_loss, logits, labels, torch.mean, prepare=torch.tanh)


def test_an_earlier_user_of_the_logits_is_refused():
    logits, labels = draw()
    logits = logits.requires_grad_() * 1.0
    other = logits.square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (fused_causal_lm_loss(logits, labels).mean() + other).backward()


def test_a_later_user_of_the_logits_is_refused():
    for together in (True, False):
        logits, labels = draw()
        logits = logits.requires_grad_() * 1.0
        losses = fused_causal_lm_loss(logits, labels)
        penalty = logits.logsumexp(-1).square().mean()
        with pytest.raises(RuntimeError, match="fused_causal_lm_loss overwrote"):
            (losses.mean() + penalty if together else penalty).backward()


def test_writing_to_the_buffer_before_backward_is_refused():
    logits, labels = draw()
    logits = logits.requires_grad_() * 1.0
    losses = fused_causal_lm_loss(logits, labels)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.mean().backward()


def transposed(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1) * 1.0


@pytest.mark.parametrize(
    "prepare",
    [lambda x: x, lambda x: (x * 1.0)[:], lambda x: (x * 1.0).view(x.shape), transposed],
    ids=["leaf", "slice", "view", "not contiguous"],
)
@pytest.mark.parametrize("reduce", [torch.mean, torch.sum])
def test_logits_that_others_may_hold_are_copied(prepare, reduce):
    logits, labels = draw()
    got, held = [], []
    for loss in (fused_causal_lm_loss, sliced_loss):
        leaf = logits.clone().requires_grad_()
        held.append(prepare(leaf))
        values = loss(held[-1], labels)
        reduce(values).backward()
        got.append((values.detach(), leaf.grad))
    torch.testing.assert_close(got[0], got[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(held[0], held[1])


def test_part_of_the_logits():
    """A slice with its labels, and the rest used elsewhere."""
    logits, labels = draw()

    def loss(function):
        return lambda x, y: function(x[:, 2:], y[:, 2:]) + x[:, :2].square().sum((1, 2))

    got = run(loss(fused_causal_lm_loss), logits, labels, torch.mean)
    wanted = run(loss(sliced_loss), logits, labels, torch.mean)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_retained_gradients_arrive():
    logits, labels = draw()
    held = logits.clone().requires_grad_() * 1.0
    held.retain_grad()
    fused_causal_lm_loss(held, labels).mean().backward()
    wanted = run(sliced_loss, logits, labels, torch.mean)[1]
    torch.testing.assert_close(held.grad, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(held, logits)


@pytest.mark.parametrize("case", ["no_grad", "no gradient asked", "inference"])
def test_without_gradient_the_logits_stay(case):
    logits, labels = draw()
    values, before = sliced_loss(logits, labels), logits.clone()
    context = {"no_grad": torch.no_grad, "no gradient asked": torch.enable_grad, "inference": torch.inference_mode}
    with context[case]():
        losses = fused_causal_lm_loss(logits.requires_grad_(case == "no_grad"), labels)
    torch.testing.assert_close(losses, values, rtol=1e-12, atol=1e-12)
    assert torch.equal(logits, before)
    assert not losses.requires_grad


@pytest.mark.parametrize("backward", [True, False])
def test_the_buffer_is_freed(backward):
    """After backward the losses hold it no longer; without one it goes with them."""
    logits, labels = draw()
    head = logits.requires_grad_() * 1.0
    storage = weakref.ref(head.untyped_storage())
    losses = fused_causal_lm_loss(head, labels)
    del head
    assert storage() is not None
    if backward:
        losses.mean().backward()
    else:
        del losses
    assert storage() is None


@pytest.mark.parametrize("label", [13, -1, 10**6])
@pytest.mark.parametrize("loss", LOSSES)
def test_labels_outside_the_vocabulary_are_refused(loss, label):
    logits, labels = draw()
    labels[1, 6] = label
    with pytest.raises(IndexError):
        run(loss, logits, labels, torch.mean)
    labels[1, 6] = 0
    labels[3, 0] = label  # never predicted
    run(loss, logits, labels, torch.mean)


@pytest.mark.parametrize("shape", [((2, 3, 4), (2, 4)), ((2, 3, 4), (6,)), ((2, 3), (2, 3)), ((2, 3, 4), (3, 2))])
@pytest.mark.parametrize("loss", [*LOSSES, per_record_token_loss])
def test_shapes_are_checked(loss, shape):
    with pytest.raises(ValueError, match=r"\[B, T, V\]"):
        loss(torch.zeros(shape[0], requires_grad=True) * 1.0, torch.zeros(shape[1], dtype=torch.long))


@pytest.mark.parametrize("loss", LOSSES)
def test_another_ignore_index(loss):
    logits, labels = draw()
    got = run(lambda x, y: loss(x, y, ignore_index=0), logits, labels.masked_fill(labels == IGNORE, 0), torch.mean)
    wanted = run(sliced_loss, logits, labels.masked_fill(labels == 0, IGNORE), torch.mean)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
