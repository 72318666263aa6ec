"""Time the accounting of sampling rates that change every step; run as a script for the figures (CPU seconds)."""

import time
import warnings

import numpy as np
from opacus.accountants import RDPAccountant

from opacus_ac.accounting import (
    Event,
    VariableRatePLDAccountant,
    VariableRateRDPAccountant,
    calibrate_noise_multiplier,
    pld_epsilon,
)

DELTA = 1e-5


def distinct_rates(n):
    """Distinct rates of a run whose batch size wanders between 32 and 256 out of 10,000 records."""
    return np.exp(np.random.default_rng(0).uniform(np.log(0.0032), np.log(0.0256), n)).tolist()


def stepped(accountant, rates):
    for rate in rates:
        accountant.step(noise_multiplier=1.0, sample_rate=rate)
    return accountant


def seconds(function):
    """Processor time: the same figure on a busy machine and an idle one, nearly."""
    start = time.process_time()
    function()
    return time.process_time() - start


def time_distinct_rates(rates):
    return seconds(lambda: stepped(VariableRateRDPAccountant(), rates).get_epsilon(DELTA))


def time_loading(rates):
    state = stepped(VariableRateRDPAccountant(), rates).state_dict()
    return seconds(lambda: VariableRateRDPAccountant().load_state_dict(state))


def time_step_and_epsilon(rates):
    """Mean seconds of a step followed by its epsilon, from a cold start."""
    accountant = VariableRateRDPAccountant()
    return seconds(lambda: [stepped(accountant, [rate]).get_epsilon(DELTA) for rate in rates]) / len(rates)


def benchmark_losses():
    """The privacy-loss accountant: batches of 32 to 256 of 10,000 records, uniform, and its single questions."""
    rates = (np.random.default_rng(0).integers(32, 257, 1000) / 1e4).tolist()
    accountants = [stepped(VariableRatePLDAccountant(), rates), stepped(VariableRateRDPAccountant(), rates)]
    first = seconds(lambda: accountants[0].get_epsilon(DELTA))
    epsilons = [accountant.get_epsilon(DELTA) for accountant in accountants]
    print(
        f"vpld, 1,000 steps, {len(set(rates))} rates: epsilon {epsilons[0]:.4f} in {first:.3f} s (vrdp {epsilons[1]:.4f})"
    )
    event = Event(1.0, 0.0123)
    again = seconds(lambda: [accountants[0].get_epsilon(DELTA) for _ in range(20)]) / 20
    after = seconds(lambda: [accountants[0].epsilon_after(event, DELTA) for _ in range(20)]) / 20
    both = seconds(lambda: [stepped(accountants[0], [rate]).get_epsilon(DELTA) for rate in rates[:200]]) / 200
    print(f"vpld: epsilon {1e3 * again:.1f} ms, epsilon_after {1e3 * after:.1f} ms, step + epsilon {1e3 * both:.1f} ms")
    for sampling, sizes in (("poisson", ()), ("fixed_size", ()), ("truncated_poisson", (10_000, 90))):
        counts = {Event(1.0, 0.0064, sampling, *sizes): 469}
        elapsed = seconds(lambda counts=counts: pld_epsilon(counts, DELTA))
        print(f"pld_epsilon, {sampling}, q 0.0064, 469 steps: {pld_epsilon(counts, DELTA):.4f} in {elapsed:.3f} s")
    budget = {"target_epsilon": 3.0, "target_delta": DELTA, "method": "pld"}
    constant = seconds(lambda: calibrate_noise_multiplier(**budget, sample_rate=0.01, steps=1000))
    schedule = seconds(lambda: calibrate_noise_multiplier(**budget, sample_rate=distinct_rates(1000)))
    print(f"calibration by losses: constant rate {constant:.3f} s, schedule of 1,000 distinct rates {schedule:.3f} s")


def benchmark():
    rates = distinct_rates(100_000)
    print(f"100,000 distinct rates, steps and one epsilon  {time_distinct_rates(rates):8.3f} s")
    print(f"100,000 distinct rates, loading a checkpoint   {time_loading(rates):8.3f} s")
    print(f"step + epsilon, mean of the first 1,000 steps  {1e3 * time_step_and_epsilon(rates[:1000]):8.3f} ms")
    print(f"step + epsilon, mean of 10,000 steps           {1e3 * time_step_and_epsilon(rates[:10000]):8.3f} ms")
    few = rates[:100]
    ours = seconds(lambda: stepped(VariableRateRDPAccountant(), few).get_epsilon(DELTA))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = seconds(lambda: stepped(RDPAccountant(), few).get_epsilon(DELTA))
    print(f"100 distinct rates, one epsilon                {ours:8.3f} s, Opacus's RDP accountant {theirs:.3f} s")
    budget = {"target_epsilon": 8.0, "target_delta": DELTA}
    constant = seconds(lambda: calibrate_noise_multiplier(**budget, sample_rate=0.01, steps=1000))
    schedule = seconds(lambda: calibrate_noise_multiplier(**budget, sample_rate=rates))
    print(f"calibration: constant rate {constant:.3f} s, schedule of 100,000 distinct rates {schedule:.3f} s")


if __name__ == "__main__":
    benchmark()
    benchmark_losses()
