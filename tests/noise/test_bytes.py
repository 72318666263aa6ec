"""The bytes of tensors, whatever their strides."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac._bytes import raw_bytes

WIDE = torch.arange(60).reshape(5, 12)
SHAPES = {
    "plain": WIDE,
    "transposed": WIDE.t(),
    "a column": WIDE[:, 3:4],
    "one row, transposed": WIDE[:1].t(),
    "one entry with a stride": WIDE[:, 0][2:3],
    "every other column": WIDE[:, ::2],
    "expanded": WIDE[:1].expand(5, 12),
    "no entry": WIDE[:0],
    "a scalar": WIDE[2, 3],
}


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.float32, torch.bfloat16, torch.complex64, torch.bool])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_values_in_their_order(shape, kind):
    tensor = SHAPES[shape].to(kind)
    plain = torch.tensor(tensor.flatten().tolist(), dtype=kind)
    assert raw_bytes(tensor).tobytes() == bytes(plain.untyped_storage())[: plain.nbytes]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["bk", "hooks", "functorch"])
@pytest.mark.parametrize("by_hand", [False, True], ids=["of the loader", "by hand"])
def test_a_batch_of_one_column_that_was_a_row(mode, by_hand):
    """Its stride is that of the row, as of sequences that were put side by side and turned round."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(60, 4), nn.Flatten(), nn.Linear(4, 2))
    net, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, ema_decay=None,
        data_loader=DataLoader([{"i": i} for i in WIDE[:1].t().flatten()], batch_size=12, collate_fn=lambda rows: torch.stack([r["i"] for r in rows])[None].t()),
        grad_sample_mode=mode, loss_reduction="sum",
    )  # fmt: skip
    (batch,) = list(loader)[:1]
    optimizer.zero_grad()
    net(WIDE[:1].t() if by_hand else batch).square().sum().backward()
    optimizer.step()
    assert optimizer.steps_taken == 1
