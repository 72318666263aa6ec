"""Bags of embeddings in every form, beside a loop of batch size one."""

import pytest
import torch
from torch import nn

from opacus_ac.grad_sample import check_model, register_rules
from opacus_ac.testing import (
    check_norms,
    hooks_gradients,
    one_backward,
    opacus_table_restored,
    per_sample_gradients,
    worst_error,
)

IDS = torch.tensor([[1, 1, 2, 3, 4], [5, 0, 5, 5, 2], [7, 8, 9, 6, 6], [0, 0, 0, 0, 1]])
WEIGHTS = torch.linspace(0.5, 2, 20, dtype=torch.float64).view(4, 5)
FORMS = {
    "rows": lambda bag, x, w: bag(x),
    "offsets": lambda bag, x, w: bag(x.flatten(), torch.arange(len(x)) * x.shape[1]),
    "the last offset too": lambda bag, x, w: bag(x.flatten(), torch.arange(len(x) + 1) * x.shape[1]),
    "weights": lambda bag, x, w: bag(x, per_sample_weights=w),
    "weights and offsets": lambda bag, x, w: bag(x.flatten(), torch.arange(len(x)) * x.shape[1], w.flatten()),
    "by name": lambda bag, x, w: bag(input=x),
}


class Net(nn.Module):
    def __init__(self, form, **options):
        super().__init__()
        torch.manual_seed(0)
        self.form = FORMS[form]
        self.bag = nn.EmbeddingBag(10, 4, include_last_offset=form == "the last offset too", **options)
        self.head = nn.Linear(4, 2)

    def forward(self, batch):
        return self.head(self.form(self.bag, batch["x"], batch["w"]))


def loss(model, batch):
    return model(batch).square().sum(1).mean()


CASES = [
    (form, mode, padding)
    for form in FORMS
    for mode in ("sum", "mean", "max")
    for padding in (None, 0)
    if mode == "sum" or "weights" not in form
]


@pytest.mark.parametrize(("form", "mode", "padding"), CASES)
def test_bags_in_one_backward_pass(form, mode, padding):
    model, batch = Net(form, mode=mode, padding_idx=padding).double().train(), {"x": IDS, "w": WEIGHTS}
    with opacus_table_restored():
        register_rules(model)
        check_model(model, mode="bk")
        want = per_sample_gradients(model, batch, loss)
        norms, sums = one_backward(model, batch, loss)
    check_norms(norms, want, rtol=1e-9)
    assert worst_error(sums, {name: g.sum(0) for name, g in want.items()}, floor=1e-9)[0] < 1e-9


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("form", ["rows", "offsets"])
def test_bags_in_opacus_hooks(form, mode):
    model, batch = Net(form, mode=mode).double().train(), {"x": IDS, "w": WEIGHTS}
    with opacus_table_restored():
        register_rules(model)
        got = hooks_gradients(model, batch, loss)
        want = per_sample_gradients(model, batch, loss)
    assert worst_error(got, want)[0] < 1e-9


def test_bags_of_several_lengths_and_empty_ones():
    model = nn.EmbeddingBag(10, 4, mode="mean").double()
    ids, offsets = torch.tensor([1, 2, 2, 7, 3, 3]), torch.tensor([0, 3, 3, 4])
    backprops = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with opacus_table_restored():
        register_rules(model)
        from opacus_ac.grad_sample.registry import sampler_of

        (got,) = sampler_of(model)(model, [ids, offsets], backprops).values()
    for bag in range(4):
        (want,) = torch.autograd.grad((model(ids, offsets)[bag] * backprops[bag]).sum(), model.weight)
        torch.testing.assert_close(got[bag], want)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_bags_that_couple_records_or_move_weights_are_refused(option):
    with pytest.raises(ValueError, match="max_norm|scale_grad_by_freq"):  # noqa: RUF043
        check_model(Net("rows", mode="sum", **option), mode="bk")
