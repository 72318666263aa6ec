"""How much one record changes the rounding of what the other records add, in the float32 sums of the default mode.

    python examples/benchmarks/sum_rounding.py

A record's own contribution has at most norm C, rounding included. Beside it the others' contributions are rounded otherwise than
without it. This prints, in units of C, the norm of what the sum of clipped gradients of a dense layer moves beyond the record's own
contribution; with ``PrivacyEngine(secure_mode=True)``, where sums are float64, it is nothing that float32 weights could show.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from opacus_ac.testing import one_backward


def moved(records: int, positions: int, width: int, height: int, dtype: torch.dtype = torch.float32) -> float:
    """Return what the sum moves beyond the contribution of a record that is left out, over C = 1."""
    torch.manual_seed(0)
    layer = nn.Linear(width, height, bias=False).to(dtype)
    batch = (torch.randn(records, positions, width).to(dtype), torch.randn(records, positions, height).to(dtype))

    def loss(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
        return (model(rows[0]) * rows[1]).sum() / records

    norms, _ = one_backward(layer, batch, loss)
    factors = 1 / norms
    alone = (batch[1][0].double().t() @ batch[0][0].double()) * factors[0]
    _, whole = one_backward(layer, batch, loss, factors)
    factors[0] = 0
    _, without = one_backward(layer, batch, loss, factors)
    return float((whole["weight"].double() - without["weight"].double() - alone).norm())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--height", type=int, default=1056)
    options = parser.parse_args()
    print("records  positions  float32 sums   float64 sums   (beyond the record's own contribution, in units of C)")
    for records, positions in ((8, 128), (64, 128), (16, 512)):
        found = [moved(records, positions, options.width, options.height, d) for d in (torch.float32, torch.float64)]
        print(f"{records:7}  {positions:9}  {found[0]:12.2e}  {found[1]:13.2e}")


if __name__ == "__main__":
    main()
