"""Inner optimizers that take one step for one gradient, and those that do not."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine

DATA = TensorDataset(torch.randn(40, 4), torch.randint(0, 2, (40,)))


def private(optimizer, model, **options):
    engine = PrivacyEngine()
    made = engine.make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(DATA, batch_size=10), noise_multiplier=1.0, **options
    )
    return engine, *made


class Closed(torch.optim.SGD):
    """A person's own optimizer that needs its closure."""

    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (torch.optim.LBFGS, "several times in one step"),
        (torch.optim.SparseAdam, "sparse gradients"),
        (lambda p: Closed(p, lr=0.1), "several times in one step"),
    ],
)
def test_optimizers_that_cannot_apply_one_release_are_refused_before_anything_is_charged(build, reason):
    model = nn.Linear(4, 2)
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match=reason):
        private(build(model.parameters()), model)
    assert dict(model.__dict__) == before


@pytest.mark.parametrize("options", [{}, {"lr_control": False}, {"ema_decay": None}])
def test_an_optimizer_that_chooses_its_rate_itself(options):
    """Adafactor with lr=None: learning-rate control has nothing to multiply, and leaves it alone."""
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    model = nn.Linear(4, 2)
    inner = adafactor(model.parameters(), scale_parameter=True, relative_step=True, warmup_init=True)
    _, net, optimizer, loader = private(inner, model, **options)
    for _ in range(8):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert optimizer.steps_taken == 32
    assert inner.param_groups[0]["lr"] is None
