"""Where AutoAdam is compared with AdamW that was tuned by hand: models, lengths of runs, epsilons, and the rates tried by hand.

A place has three kinds of runs, which share data, draws and noise: AdamW at each of its rates; DP-AdamW as it is usually run
(momentum 0.9, Renyi accounting) at the middle one of them; and AutoAdam from each of its hints. Three or four rates are tried. Where
the best one is at an end, one beyond it may be better. Hints go from about 100 times below the best rate to about 10 times above it,
and further above in long runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from small_model.cell import Cell

HINTS = (1e-4, 1e-3, 1e-2, 1e-1)
ADAPTERS = 3  # factor of the hints for adapters, whose best rates are about so much higher
ENDS = (0, 3)  # the lowest and the highest hint, for the places that do not have all of them


@dataclass(frozen=True)
class Place:
    """A model, a length, an epsilon, and what is tried there.

    Args:
        rates: of AdamW, in rising order.
        hints: which of ``HINTS``, by number.
        seeds: how many of the seeds are run, the first ones.
    """

    rates: tuple[float, ...]
    model: str = "llama"
    lora: int = 0
    batch: int = 200
    tone: str = "loving"
    epsilon: float = 4.0
    steps: int = 30
    hints: tuple[int, ...] = ENDS
    seeds: int = 6

    def name(self) -> str:
        """Return what the table calls it."""
        model = f"{self.model}, adapters of rank {self.lora}" if self.lora else self.model
        batch = "" if self.batch == 200 else f", batches of {self.batch}"
        return f"{model}{batch}{', angry tone' if self.tone == 'angry' else ''}"

    def _cell(self, method: str, seed: int, rate: float) -> Cell:
        return Cell(
            method, self.model, self.tone, self.epsilon, seed, rate, steps=self.steps, batch=self.batch, lora=self.lora
        )

    def by_hand(self, seed: int) -> list[Cell]:
        """Return AdamW at every rate, with the momentum of the planned steps."""
        return [self._cell("adamw-flat", seed, rate) for rate in self.rates]

    def as_usual(self, seed: int) -> Cell:
        """Return DP-AdamW as it is usually run, at the middle rate."""
        return self._cell("adamw-usual", seed, self.rates[len(self.rates) // 2])

    def automatic(self, seed: int) -> dict[int, Cell]:
        """Return AutoAdam from every hint, by the number of the hint."""
        return {
            number: self._cell("auto-flat", seed, HINTS[number] * (ADAPTERS if self.lora else 1))
            for number in self.hints
        }

    def cells(self, seed: int) -> list[Cell]:
        """Return all runs of a seed."""
        return [*self.by_hand(seed), self.as_usual(seed), *self.automatic(seed).values()]


EVERY = (0, 1, 2, 3)
PLACES = (
    Place((0.009, 0.013, 0.018), steps=10, hints=EVERY),
    Place((0.008, 0.012, 0.017), steps=15),
    Place((0.006, 0.009, 0.013), hints=EVERY),
    Place((0.006, 0.009, 0.013), epsilon=1.0),
    Place((0.006, 0.009, 0.013), epsilon=2.0),
    Place((0.006, 0.009, 0.013, 0.02), epsilon=8.0),
    Place((0.006, 0.009, 0.013, 0.02), epsilon=16.0),
    Place((0.006, 0.009, 0.013), tone="angry"),
    Place((0.02, 0.03, 0.045), lora=4, steps=10),
    Place((0.014, 0.02, 0.03, 0.045), lora=4, steps=15),
    Place((0.01, 0.015, 0.022, 0.03), lora=4, hints=EVERY),
    Place((0.01, 0.015, 0.022, 0.03), lora=4, epsilon=1.0),
    Place((0.01, 0.015, 0.022, 0.03), lora=4, epsilon=2.0),
    Place((0.015, 0.022, 0.033), lora=4, epsilon=8.0),
    Place((0.015, 0.022, 0.033), lora=4, epsilon=16.0),
    Place((0.006, 0.009, 0.013, 0.018, 0.025), "bitnet", steps=10),
    Place((0.006, 0.009, 0.013, 0.018), "bitnet", steps=15),
    Place((0.006, 0.009, 0.013), "bitnet"),
    Place((0.006, 0.009, 0.013), "bitnet", epsilon=1.0),
    Place((0.006, 0.009, 0.013), "bitnet", epsilon=2.0),
    Place((0.006, 0.009, 0.013, 0.018), "bitnet", epsilon=16.0),
    Place((0.005, 0.007, 0.01, 0.014), lora=8, batch=24, epsilon=8.0, steps=60),
    Place((0.01, 0.015, 0.022), lora=4, steps=60),
    Place((0.005, 0.0075, 0.011), steps=60),
    Place((0.004, 0.006, 0.009, 0.013), "bitnet", steps=60),
    Place((0.0035, 0.005, 0.0075), steps=120),
    Place((0.0025, 0.0035, 0.005), steps=300, seeds=3),
)
