"""Samplers in whose place no batches are drawn: the refusal says why, and what to pass instead."""

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from opacus_ac import PrivacyEngine

DATA = TensorDataset(torch.randn(40, 4))
REFUSED = {
    "a part of the dataset": (SubsetRandomSampler(range(30)), r"torch\.utils\.data\.Subset"),
    "a share of a process": (DistributedSampler(DATA, num_replicas=1, rank=0), "torchrun"),
    "by weights": (WeightedRandomSampler([1.0] * 40, 40), "weights"),
}


def private(loader):
    model = nn.Linear(4, 2)
    return PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader, noise_multiplier=1.0
    )


@pytest.mark.parametrize("kind", REFUSED)
def test_the_refusal_of_a_sampler_names_the_way_out(kind):
    sampler, remedy = REFUSED[kind]
    with pytest.raises(ValueError, match=remedy):
        private(DataLoader(DATA, batch_size=10, sampler=sampler))


def test_the_way_out_for_a_part_of_the_dataset_works():
    _, _, loader = private(DataLoader(Subset(DATA, range(30)), batch_size=10, shuffle=True))
    assert sum(len(x) for (x,) in loader) <= 30 * 3
