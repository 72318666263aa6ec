"""Play random sequences: ``python tests/guarantee/explore.py --sequences 50000``; what does not hold is printed, by kind."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

import torch
from actions import draw_sequence, play, shrink
from neighbour import check_without
from reference import RECORDS, NoiseTally, Violation


def examine(seed: int, tally: NoiseTally | None = None, neighbours: int = 4) -> Counter:
    """Play sequence ``seed`` and, in one of ``neighbours``, replay it without a record; return what actions came to.

    Raises:
        Violation: something does not hold.
    """
    config, actions = draw_sequence(seed)
    world = play(config, actions, seed, tally)
    outcomes = Counter(world.outcomes)
    if neighbours and seed % neighbours == 0:
        try:
            moved = check_without(world, actions, seed, seed // neighbours % RECORDS)
        except Violation as violation:
            if violation.kind != "crash" and "what happens depends" not in str(violation):
                raise
            moved = None  # a loop that leaves parts out is stopped elsewhere when a batch has another number of parts
        outcomes["replay:" + ("other loop" if moved is None else "moved" if moved else "the same")] += 1
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first sequence")
    parser.add_argument("--show", type=int, default=3, help="how many faults of a kind are printed")
    parser.add_argument("--shrink", action="store_true", help="leave out actions that a fault does not need")
    parser.add_argument("--trace", action="store_true", help="where a fault comes from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tally, found, outcomes = NoiseTally(), Counter(), Counter()
    start = time.time()
    for seed in range(options.first, options.first + options.sequences):
        try:
            outcomes += examine(seed, tally)
        except Violation as violation:
            found[violation.kind] += 1
            if found[violation.kind] <= options.show:
                config, actions = draw_sequence(seed)
                short = shrink(config, actions, seed, violation.kind) if options.shrink else actions
                print(f"seed {seed}: {violation}\n   {config}\n   {short}", flush=True)
                if options.trace:
                    traceback.print_exception(violation)
    tally.check()
    print(
        f"{options.sequences} sequences in {time.time() - start:.0f} s; found {dict(found)}; noise values {tally.count}"
    )
    print("outcomes", dict(outcomes.most_common(80)))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
