"""AutoAdam: its equations in a plain loop, what it does without noise and in noise alone, starts that are far off, and private runs."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import classifier, loader, loss_of, train
from torch import nn

from opacus_ac import AutoAdam, PrivacyEngine
from opacus_ac.allocation import NoiseAllocation
from opacus_ac.clipping.table import POLICIES
from opacus_ac.optimizer import path_start
from opacus_ac.optimizer.momentum import planned_beta1, run_worth
from opacus_ac.optimizer.path_length import PathLength

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning", "ignore::UserWarning")
SHAPES = ((30, 20), (40,), (7, 3))


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def parameters(shapes=SHAPES, seed=0):
    normal = draws(seed)
    return [nn.Parameter(normal(*shape)) for shape in shapes]


# ---------------------------------------------------------------- the equations


class PlainLoop:
    """The equations of the docstring with the start of the path kept, and every number computed from nothing."""

    def __init__(self, weights, *, lr, beta1, share, short=False):
        self.start, self.lr, self.beta1, self.share = [w.clone() for w in weights], lr, beta1, share
        self.short, self.most = short, 7.5 if short else 5
        self.coefficients = []  # of every release in the path, one per tensor
        self.anchor = []  # numbers of the releases that stand for the start
        every = torch.cat([w.reshape(-1) for w in weights])
        new = float((every == 0).double().mean()) >= 0.25
        if share is None:
            self.share = (0.0 if short else 0.5) if new else 0.75
        least = min(1e4, (0.15 if new else 0.015) * float(every.square().mean().sqrt()) / lr)  # where a low hint begins
        self.length, self.variance, self.averaged, self.searching = 0.2 if short else 0.1, 0.36, 1, True
        self.length, self.measured = max(self.length, least), False
        self.steepness, self.of_steepness, self.seen, self.went = 1.0, 4.0, 0.0, 0.0
        self.releases = []

    def path(self):
        """The path as the sum that it is."""
        return [
            sum(c[i] * release[i] for c, (release, _) in zip(self.coefficients, self.releases, strict=False))
            for i in range(len(self.start))
        ]

    def slope_at_the_start(self, sizes, stds):
        """Every release of the anchor times what the others made of the path; and the std of the noise in that."""
        slope, variance = 0.0, 0.0
        for i, size in enumerate(sizes):
            every = sum(c[i] for c in self.coefficients)
            products, others = [], []
            for a in self.anchor:
                rest = [(c[i], self.releases[j][0][i]) for j, c in enumerate(self.coefficients) if j != a]
                products.append(sum(c * float((self.releases[a][0][i] * g).sum()) for c, g in rest))
                others.append(sum(c for c, _ in rest))
            whole, squares = 1.0, float((self.path()[i] ** 2).sum())
            if len(self.coefficients) > 1:
                whole = every / np.mean(others)
                slope += whole * np.mean(products)
            else:
                noise = size * self.releases[0][1][i] ** 2
                slope += every * (float((self.releases[0][0][i] ** 2).sum()) - noise)
            variance += (
                whole**2 * np.mean([self.releases[a][1][i] ** 2 for a in self.anchor]) * squares / len(self.anchor)
            )
        return slope, math.sqrt(variance)

    def follow(self, d0, sd0, d1, sd1):
        """The rule for the length in its printed form."""
        alone, told = len(self.coefficients) == 1, d0 > (2 if self.searching else 1) * sd0
        both = math.hypot(sd0, sd1)
        if not alone and not told and (d1 < -2 * sd1 or (d1 > 2 * sd1 and not self.searching)):
            self.filter(abs(d1), sd1, d1, sd1)
        elif d1 < -max(d0, 0) - 2 * both and (self.searching or self.variance >= 0.1):
            self.length /= 2
            self.variance, self.searching, self.measured = 0.36, False, True
            self.seen = self.went = 0.0
        elif told and self.searching and d1 >= (0.4 if alone else 0.6) * d0:
            least, left = (2.5, d0 - d1) if alone else (1, d0 - d1 + both / 2)
            factor = max(least, d0 / max(left, d0 / self.most))
            self.length, self.measured = min(self.length * factor, 1e4), True
            if factor >= 2.5:
                self.averaged += 1
                return (self.averaged - 1) / self.averaged, 1 / self.averaged if self.short else 1.0
        elif alone or not told:
            if self.searching and self.length > 1 and not self.measured:
                self.length = max(self.length / 10**0.1, 1.0)
            elif self.searching:
                self.length = min(self.length * 10 ** (0.1 * min(1, max(-1, 1 + d1 / sd1))), max(self.length, 1.0))
        else:
            self.filter(d0, sd0, d1, sd1)
        return 1.0, 1.0

    def filter(self, d0, sd0, d1, sd1):
        self.searching, self.measured = False, True
        x, r2 = d1 / d0, (sd1 / d0) ** 2 + (sd0 * d1 / d0**2) ** 2
        # The steepness: x = steepness (-went) + what is left of ln(length), noise and batches.
        self.of_steepness += 0.3**2
        everything = self.of_steepness * self.went**2 + r2 + 0.1**2 + self.steepness**2 * self.variance
        steeper = -self.went * self.of_steepness / everything * x
        self.of_steepness -= (self.went * self.of_steepness) ** 2 / everything
        self.steepness = min(10.0, max(0.3, self.steepness + steeper))
        held = min(0.75, 0.2 * self.steepness * math.sqrt(r2))
        steepness = self.steepness if x < held else max(1.0, self.steepness)
        change = min(0.75, max(-3.0, x - held)) / steepness
        self.variance += 0.07**2
        if self.seen * x > 0:
            more = max(0.0, min(abs(x), abs(self.seen)) - math.sqrt(r2))
            self.variance = max(self.variance, (more / steepness) ** 2)
        gain = self.variance / (self.variance + r2 / steepness**2 + 0.05**2 + (0.3 * change) ** 2)
        old, self.length = self.length, min(self.length * math.exp(min(0.5, max(-1, gain * change))), 1e4)
        self.seen, self.went = x, math.log(self.length / old)
        self.variance *= 1 - gain

    def step(self, gradients, stds):
        t, sizes, taken, searched = len(self.releases) + 1, [g.numel() for g in gradients], 1.0, self.searching
        if t > 1:
            path, (d0, sd0) = self.path(), self.slope_at_the_start(sizes, stds)
            d1 = sum(float((a * b).sum()) for a, b in zip(gradients, path, strict=True))
            sd1 = math.sqrt(sum(s**2 * float((p * p).sum()) for s, p in zip(stds, path, strict=True)))
            kept, taken = self.follow(d0, sd0, d1, sd1)
            if searched and not self.searching and self.averaged > 1:
                longer = 0.8 if self.short else (self.averaged + 1) / 4
                self.length, kept = self.length * longer, kept / longer
            self.coefficients = [[kept * a for a in c] for c in self.coefficients]
        self.releases.append(([g.clone() for g in gradients], stds))
        if self.searching:
            self.anchor.append(t - 1)
        weights = [1.0] * len(sizes)
        if t > 1:
            for i, size in enumerate(sizes):
                total = sum(release[i] for release, _ in self.releases)
                variance = sum(noise[i] ** 2 for _, noise in self.releases)
                signal = max(float((total * total).sum()) / (size * variance) - 1, math.sqrt(2 / size))
                weights[i] = signal ** (self.share / 2)
            unit = math.sqrt(sum(sizes) / sum(d * w * w for d, w in zip(sizes, weights, strict=True)))
            weights = [unit * w for w in weights]
        decays = [(1 - self.beta1) * self.beta1 ** (t - 1 - i) / (1 - self.beta1**t) for i in range(t)]
        self.coefficients.append([0.0] * len(sizes))
        for i in range(len(sizes)):
            rms = math.sqrt(sum(float((release[i] ** 2).mean()) for release, _ in self.releases) / t)
            for mine, decay in zip(self.coefficients, decays, strict=True):
                mine[i] += taken * decay * self.lr * weights[i] / rms
        return [w - self.length * p for w, p in zip(self.start, self.path(), strict=True)]


FAR = 30.0  # where the loss of "search far" is lowest; elsewhere that is at zero
CASES = {  # lr, beta1, share, noise per coordinate, that of the batch; the gradient is about 1
    "search": (1e-4, 0.5, None, 0.05, 0.0),
    "search in batches": (1e-4, 0.5, 0.5, 0.05, 0.8),
    "near": (0.15, 0.8, 1.0, 0.2, 0.0),
    "high": (3.0, 0.0, 0.0, 0.02, 0.0),
    "cut": (300.0, 0.5, 0.5, 0.1, 0.0),
    "noise": (0.02, 0.5, 0.5, 10.0, 0.0),
    "noise above a low hint": (1e-4, 0.5, 0.5, 10.0, 0.0),
    "search from adapters": (1e-5, 0.5, None, 0.05, 0.0),
    "search far": (1e-3, 0.5, 0.5, 0.05, 0.0),
}


@pytest.mark.parametrize("planned", [None, 19, 20])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_plain_loop(case, planned):
    """The same releases, of a quadratic along the way, and the same weights to 1e-12; and the case is what its name says."""
    lr, beta1, share, noise, of_batch = CASES[case]
    weights, normal, aim = parameters(), draws(1), FAR if case.endswith("far") else 0.0
    if case.endswith("adapters"):
        weights[0].data[::2] = 0
    optimizer = AutoAdam(weights, lr=lr, beta1=beta1, share=share, steps=planned)
    oracle = PlainLoop([w.detach() for w in weights], lr=lr, beta1=beta1, share=share, short=planned == 19)
    for step in range(20):
        stds = [noise * (1 + step % 3), 2 * noise, 0.5 * noise]  # noise may change from step to step
        gradients = [
            w.detach() - aim + s * normal(*w.shape) + of_batch * normal(*w.shape)
            for w, s in zip(weights, stds, strict=True)
        ]
        for weight, gradient, std in zip(weights, gradients, stds, strict=True):
            weight.grad = gradient
            optimizer.noise_std(weight, std)
        optimizer.step()
        expected = oracle.step(gradients, stds)
        for weight, other in zip(weights, expected, strict=True):
            assert torch.allclose(weight.detach(), other, rtol=1e-12, atol=1e-12 * float(other.abs().max()))
    length = PathLength.of(optimizer.param_groups[0])
    assert length.scale == pytest.approx(oracle.length, rel=1e-11)
    assert length.averaged == oracle.averaged
    assert (length.averaged > 2) == case.startswith(("search", "near"))
    assert (length.averaged > 3) == case.startswith("search ")
    assert len(oracle.anchor) == optimizer.state[weights[0]]["anchored"]
    assert (len(oracle.anchor) > 2) == case.startswith(("search", "near", "noise"))
    assert (length.falls > 0) == (case == "cut")
    assert (length.blind > 1) == case.startswith("noise")  # a path that begins far too long may be blind once
    assert length.measured + length.blind == 19


# ---------------------------------------------------------------- the slope at the start


@pytest.mark.statistical
@pytest.mark.parametrize("beta1", [0.0, 0.6])
@pytest.mark.parametrize("anchored", [1, 3])
def test_batches_that_differ_do_not_pass_for_a_slope(beta1, anchored):
    """Six steps of a path that never left its start; noise and draws are eight times the gradient, which is ones.

    The slope at the start is without bias over 2,000 seeds, where the product of anchor and path is at least twice it.
    """
    size, steps, errors, plain = 64, 6, [], []
    for seed in range(2000):
        normal = draws(seed)
        path, average = torch.zeros(2, size, dtype=torch.float64)
        state = {"anchor": torch.zeros(size, dtype=torch.float64), "step": 0, **path_start.FRESH}
        for step in range(1, steps + 1):
            release = 1 + 8 * normal(size)
            state["step"] = step
            if step <= anchored:
                path_start.join(state, release, float(release @ release), 8.0)
            average.lerp_(release, 1 - beta1)
            kept, further = 1 - 1 / (step + 3), 0.1 * step
            path = kept * path + further * average / (1 - beta1**step)
            path_start.moved(state, kept=kept, further=further, beta1=beta1)
        row = [0.0, float(state["anchor"] @ path), float(path @ path)]
        found = path_start.slopes([row], [state], [8.0], [size])
        errors.append(found.start / (size * state["total_weight"]) - 1)
        plain.append(row[1] / anchored / (size * state["total_weight"]))
    spread = float(np.std(errors)) / math.sqrt(len(errors))
    assert abs(np.mean(errors)) < 4 * spread < 0.5
    assert np.mean(plain) > 2


def test_only_while_the_path_is_one_release_its_own_square_counts():
    """Less the known energy of the noise; then a second release makes the first one's own part leave."""
    (weight,), normal = [nn.Parameter(torch.zeros(200, dtype=torch.float64))], draws(4)
    optimizer = AutoAdam([weight], lr=1e-9, beta1=0.0)
    releases = [1 + 0.5 * normal(200) for _ in range(3)]
    found = []
    for release in releases:
        weight.grad = release.clone()
        optimizer.noise_std(weight, 0.5)
        optimizer.step()
        state = optimizer.state[weight]
        row = [0.0, float(state["anchor"] @ state["path"]), float(state["path"] @ state["path"])]
        found.append((path_start.slopes([row], [state], [0.5], [200]), state["total_weight"]))
    first, second, _ = releases
    (one, weight_of_one), (two, weight_of_two), _ = found
    assert one.single
    assert not two.single
    assert one.start / weight_of_one == pytest.approx(float(first @ first) - 200 * 0.25)
    assert two.start / weight_of_two == pytest.approx(float(first @ second))


def test_without_noise_and_without_records_nothing_rests_on_rounding():
    """One release, an empty batch, and the first release again: what is left of the slope at the start is rounding."""
    (weight,), (release,) = [nn.Parameter(torch.zeros(300, dtype=torch.float64))], [draws(2)(300)]
    optimizer = AutoAdam([weight], lr=1e-3)
    for gradient in (release, torch.zeros_like(release)):
        weight.grad = gradient.clone()
        optimizer.noise_std(weight, 0.0)
        optimizer.step()
    state = optimizer.state[weight]
    row = [1.0, float(state["anchor"] @ state["path"]), float(state["path"] @ state["path"])]
    for error in (-1e-12, 1e-12):
        found = path_start.slopes([[row[0], row[1] * (1 + error), row[2]]], [state], [0.0], [300])
        assert abs(found.start) < 1e-10 * row[1] < found.start_noise
        assert not found.single


def test_a_first_gradient_of_zero_has_no_weight_in_the_path():
    """As the first one of adapters has, without noise: the path begins with the next one."""
    weight = nn.Parameter(torch.ones(40, dtype=torch.float64))
    optimizer = AutoAdam([weight], lr=1e-2, beta1=0.0)
    for gradient in (torch.zeros_like(weight), *[weight.detach().clone()] * 3):
        weight.grad = gradient
        optimizer.noise_std(weight, 0.0)
        optimizer.step()
    assert 0 < optimizer.state[weight]["total_weight"] < 10
    assert weight.isfinite().all()


# ---------------------------------------------------------------- noisy quadratics


def quadratic(lr, *, noise, steps, planned=None, seed=0, shapes=SHAPES, make=None):
    """Train on ``sum h w^2 / 2`` with noise of a norm that is ``noise`` times that of the gradient at the start.

    Returns:
        Loss over that at the start, and the optimizer.
    """
    normal = draws(seed)
    weights = [nn.Parameter(normal(*shape)) for shape in shapes]
    curvature = [(1 + i) * normal(*shape).exp() for i, shape in enumerate(shapes)]
    start = math.sqrt(sum(float((h * w.detach()).square().sum()) for h, w in zip(curvature, weights, strict=True)))
    std = noise * start / math.sqrt(sum(w.numel() for w in weights))

    def loss():
        return sum(float((h * w.detach() ** 2).sum()) for h, w in zip(curvature, weights, strict=True)) / 2

    before = loss()
    optimizer = AutoAdam(weights, lr=lr, beta1=0.5, steps=planned) if make is None else make(weights, lr)
    for _ in range(steps):
        for weight, h in zip(weights, curvature, strict=True):
            weight.grad = h * weight.detach() + std * normal(*weight.shape)
            if isinstance(optimizer, AutoAdam):
                optimizer.noise_std(weight, std)
        optimizer.step()
    return loss() / before, optimizer


def adamw(weights, lr):
    return torch.optim.AdamW(weights, lr=lr, betas=(0.5, 0.999), weight_decay=0.0)


WIDE = ((60, 50), (40, 25), (300,), (20,))


@pytest.mark.statistical
@pytest.mark.parametrize(("steps", "planned"), [(15, 15), (15, None), (40, 40)])
def test_a_hint_over_three_decades_ends_where_the_best_rate_by_hand_does(steps, planned):
    """Means of 12 seeds, noise twice the gradient: at most 12 % above the best of AdamW's rates, chosen on these seeds."""
    seeds, rates = range(12), (0.05, 0.1, 0.2, 0.4, 0.8)
    by_hand = {
        lr: np.mean([quadratic(lr, noise=2.0, steps=steps, seed=s, shapes=WIDE, make=adamw)[0] for s in seeds])
        for lr in rates
    }
    best = min(by_hand, key=by_hand.get)
    assert best not in (rates[0], rates[-1])  # the sweep holds the best rate
    for factor in (0.01, 0.1, 1.0, 10.0):
        rate = best * factor
        found = np.mean(
            [quadratic(rate, noise=2.0, steps=steps, planned=planned, seed=s, shapes=WIDE)[0] for s in seeds]
        )
        assert found < by_hand[best] * 1.12, factor
    assert (
        quadratic(best * 10, noise=2.0, steps=steps, shapes=WIDE, make=adamw)[0] > 1.5
    )  # what the hint alone would do


@pytest.mark.statistical
@pytest.mark.parametrize("noise", [1.0, 10.0])
@pytest.mark.parametrize(("steps", "planned"), [(15, 15), (15, None), (200, 200)])
def test_it_does_not_diverge(noise, steps, planned):
    for rate in (0.0003, 0.1, 0.3):
        runs = [quadratic(rate, noise=noise, steps=steps, planned=planned, seed=s, shapes=WIDE)[0] for s in range(6)]
        assert max(runs) < 1.1


@pytest.mark.statistical
@pytest.mark.parametrize("planned", [15, None])
def test_a_search_in_much_noise_does_not_overshoot(planned):
    """60 seeds at one hint, noise ten times the gradient: one ended at 1.8 when a step might lengthen fourfold, then tenfold."""
    runs = [quadratic(0.01, noise=10.0, steps=15, planned=planned, seed=s, shapes=WIDE)[0] for s in range(60)]
    assert max(runs) < 1.1


@pytest.mark.parametrize(("planned", "shorter"), [(19, 1.25), (20, 2 / 2.5)])
def test_the_steps_of_a_search_are_averaged(planned, shorter):
    """A path of equal releases: the end of the search changes the steps to come, not it. Then it is 1.25 or 2 of them long."""
    parameter = nn.Parameter(torch.zeros(400, dtype=torch.float64))
    optimizer = AutoAdam([parameter], lr=1e-3, beta1=0.0, steps=planned)

    def step(slope):
        parameter.grad = torch.full_like(parameter, -slope)
        optimizer.noise_std(parameter, 1e-3)
        optimizer.step()
        return optimizer.learning_rates[0], float(parameter.detach().mean())

    reached = [step(1.0) for _ in range(4)]
    assert reached[-1][0] > 1e-2  # it searched
    # Weights of a release: 1, 1/2 + 1, 1/3 + 2/3 + 1 and so on in a long run; in a short one always 1 in all.
    weights = [1.0, 1.5, 2.0, 2.5] if planned == 20 else [1.0] * 4
    for (found, at), total in zip(reached, weights, strict=True):
        assert at == pytest.approx(total * found, rel=1e-6)
    (before, there), (after, then) = reached[-1], step(0.1)
    length = PathLength.of(optimizer.param_groups[0])
    assert not length.searching
    moved = then - there  # the path was given its length, and a step of 0.1 / rms was added
    rms = math.sqrt((4 + 0.01) / 5)
    factor = after * shorter / before  # what the measurement made of the path
    assert moved == pytest.approx(there * (factor - 1) + after * 0.1 / rms, rel=1e-6)


def test_a_loss_that_never_turns_ends_the_growth_and_not_the_run():
    """A constant gradient: fivefold a step for 100 steps would leave the numbers of float32."""
    weight = nn.Parameter(torch.zeros(50))
    optimizer = AutoAdam([weight], lr=1e-3)
    for _ in range(100):
        weight.grad = torch.linspace(1, 2, 50)
        optimizer.noise_std(weight, 0.1)
        optimizer.step()
    assert weight.isfinite().all()
    assert optimizer.param_groups[0]["path_scale"] == 1e4


def test_without_noise_it_descends_and_says_that_all_was_measured():
    left, optimizer = quadratic(1e-3, noise=0.0, steps=60)
    assert left < 0.02
    assert "59 of 59 measurements" in optimizer.describe()
    assert PathLength.of(optimizer.param_groups[0]).blind == 0
    assert optimizer.warnings() == []


def test_in_noise_alone_the_hint_stays_and_is_named():
    """Gradients that are noise and nothing else, with the std that was stated."""
    normal, (weight,) = draws(3), parameters([(200, 50)])
    optimizer = AutoAdam([weight], lr=1e-3)
    for _ in range(20):
        weight.grad = normal(200, 50)
        optimizer.noise_std(weight, 1.0)
        optimizer.step()
    length = PathLength.of(optimizer.param_groups[0])
    assert length.blind > length.measured
    assert 0.2 < length.scale < 2
    assert "the learning rate is the hint" in optimizer.warnings()[0]
    assert "hint 0.001" in optimizer.describe()


def test_the_scale_of_the_gradients_does_not_matter():
    paths = []
    for unit in (1.0, 2.0**-20):
        weights, normal = parameters(), draws(1)
        optimizer = AutoAdam(weights, lr=0.01)
        for _ in range(10):
            for weight in weights:
                weight.grad = unit * (weight.detach() + 0.1 * normal(*weight.shape))
                optimizer.noise_std(weight, unit * 0.1)
            optimizer.step()
        paths.append([w.detach() for w in weights])
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*paths, strict=True))


# ---------------------------------------------------------------- groups, schedules, decay, missing gradients


def run(weights, optimizer, steps, normal, noise=0.1, before=lambda step: None):
    for step in range(steps):
        before(step)
        for weight in weights:
            if weight.requires_grad:
                weight.grad = weight.detach() + noise * normal(*weight.shape)
                optimizer.noise_std(weight, noise)
        optimizer.step()


def test_a_group_with_another_rate_takes_steps_of_that_length():
    (one, other), normal = parameters([(50, 10), (50, 10)]), draws(1)
    with torch.no_grad():
        one.mul_(0.01), other.mul_(0.01)  # so small that the first step is no shorter than the hint says
    before = [one.detach().clone(), other.detach().clone()]
    optimizer = AutoAdam([{"params": [one]}, {"params": [other], "lr": 3e-3}], lr=1e-3)
    assert optimizer.learning_rates == pytest.approx([1e-4, 3e-4])
    run([one, other], optimizer, 1, normal)
    moved = [float((w.detach() - b).square().mean().sqrt()) for w, b in zip((one, other), before, strict=True)]
    assert moved == pytest.approx([1e-4, 3e-4])
    run([one, other], optimizer, 5, normal)
    rates = optimizer.learning_rates
    assert rates[1] == pytest.approx(3 * rates[0])
    assert optimizer.param_groups[0]["path_scale"] == optimizer.param_groups[1]["path_scale"] != 0.1


def test_groups_of_one_rate_are_one_group():
    ends = []
    for split in (False, True):
        weights = parameters()
        groups = [{"params": [w]} for w in weights] if split else weights
        run(weights, AutoAdam(groups, lr=1e-3), 12, draws(1))
        ends.append(torch.cat([w.detach().reshape(-1) for w in weights]))
    assert torch.equal(*ends)


def test_a_schedule_multiplies_the_steps_to_come():
    """Rate 0 from step 6 on: nothing is added to the path, and only its length still follows the slope."""
    weights = parameters()
    optimizer = AutoAdam(weights, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 6 else 0.0)
    paths = []

    def note(step):
        paths.append(torch.cat([optimizer.state[w]["path"].reshape(-1).clone() for w in weights]) if step else None)
        if step:
            scheduler.step()

    run(weights, optimizer, 10, draws(1), before=note)
    assert torch.equal(paths[7], paths[9])
    assert not torch.equal(paths[5], paths[6])


def test_a_warm_up_from_zero_starts_the_path_later():
    weights = parameters()
    before = [w.detach().clone() for w in weights]
    optimizer = AutoAdam(weights, lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    run(weights, optimizer, 3, draws(1))
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    length = PathLength.of(optimizer.param_groups[0])
    assert length == PathLength(scale=length.scale)
    assert length.scale == pytest.approx(0.015 * rms(weights) / 1e-2)


def rms(weights):
    return float(torch.cat([w.detach().reshape(-1) for w in weights]).square().mean().sqrt())


@pytest.mark.parametrize("hint", [2e-5, 1e-4, 1e-3])
@pytest.mark.parametrize(("zeros", "share"), [(False, 0.015), (True, 0.15)])
def test_a_hint_far_too_low_is_no_first_step_that_teaches_nothing(hint, zeros, share):
    """Down to where the factor ends, the first step changes the weights by a share of their size; a warm-up makes it shorter all the same."""
    for warm_up in (1.0, 0.1):
        weights = parameters()
        if zeros:
            weights[0].data[:10] = 0
        before, size = [w.detach().clone() for w in weights], rms(weights)
        optimizer = AutoAdam(weights, lr=hint)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, first=warm_up: 1.0 if step else first)
        run(weights, optimizer, 1, draws(1))
        moved = rms([w - b for w, b in zip(weights, before, strict=True)])
        assert moved == pytest.approx(warm_up * share * size)


def test_weights_that_are_all_zero_begin_at_the_hint():
    weights = [nn.Parameter(torch.zeros(20, dtype=torch.float64))]
    optimizer = AutoAdam(weights, lr=1e-3)
    weights[0].grad = torch.ones(20, dtype=torch.float64)
    optimizer.noise_std(weights[0], 0.0)
    optimizer.step()
    assert rms(weights) == pytest.approx(1e-4)


def test_weight_decay_is_decoupled():
    """Without a gradient's part, ``lr * s`` times the decay is all that happens, to start and path alike."""
    (weight,) = parameters([(3, 4)])
    before = weight.detach().clone()
    optimizer = AutoAdam([weight], lr=0.4, weight_decay=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.noise_std(weight, 0.0)
    optimizer.step()
    assert torch.allclose(weight.detach(), before * (1 - 0.1 * 0.4 * 0.5), rtol=1e-15)


def test_decay_keeps_weights_and_path_together():
    """``theta + s Delta`` is the decayed start: what is left of the start after all the steps' decay."""
    weights = parameters()
    before = [w.detach().clone() for w in weights]
    optimizer, kept = AutoAdam(weights, lr=0.02, weight_decay=0.3), 1.0
    for _ in range(8):
        run(weights, optimizer, 1, draws(1))
        kept *= 1 - optimizer.param_groups[0]["path_scale"] * 0.02 * 0.3
    for weight, start in zip(weights, before, strict=True):
        state = optimizer.state[weight]
        assert torch.allclose(weight.detach() + state["scale"] * state["path"], kept * start, rtol=1e-10, atol=1e-12)


def test_a_parameter_without_a_gradient_stays_and_comes_back():
    weights = parameters()
    optimizer, frozen = AutoAdam(weights, lr=1e-3), weights[1]
    run(weights, optimizer, 4, draws(1))
    frozen.requires_grad_(False)
    frozen.grad, place = None, frozen.detach().clone()
    run(weights, optimizer, 6, draws(2))
    assert torch.equal(frozen.detach(), place)
    assert optimizer.state[frozen]["step"] == 4
    scale = optimizer.state[frozen]["scale"]
    assert scale != optimizer.param_groups[0]["path_scale"]
    frozen.requires_grad_(True)
    start = frozen.detach() + scale * optimizer.state[frozen]["path"]
    run(weights, optimizer, 1, draws(3))
    state = optimizer.state[frozen]
    assert state["scale"] == optimizer.param_groups[0]["path_scale"]
    assert torch.allclose(frozen.detach() + state["scale"] * state["path"], start, rtol=1e-12)


def test_a_group_that_is_added_later_begins_at_the_scale_of_the_others():
    one, other = parameters([(20, 5), (20, 5)])
    optimizer = AutoAdam([one], lr=1e-3)
    run([one], optimizer, 5, draws(1))
    optimizer.add_param_group({"params": [other]})
    scale = optimizer.param_groups[0]["path_scale"]
    assert optimizer.param_groups[1]["path_scale"] == scale != 0.1
    run([one, other], optimizer, 3, draws(2))
    assert optimizer.state[other]["step"] == 3


@pytest.mark.parametrize(
    ("zeros", "planned", "chosen"),
    [(False, 19, 0.75), (False, 20, 0.75), (True, 19, 0.0), (True, 20, 0.5), (True, None, 0.5)],
)
def test_new_weights_follow_their_signal_less_unless_the_user_says_otherwise(zeros, planned, chosen):
    """Groups without a share get one at the first step, and a group that comes later gets that of the first one."""
    one, own, later = parameters([(20, 5), (20, 5), (20, 5)])
    if zeros:
        one.data.zero_()
    optimizer = AutoAdam([{"params": [one]}, {"params": [own], "share": 0.3}], steps=planned)
    assert [group["share"] for group in optimizer.param_groups] == [None, 0.3]
    run([one, own], optimizer, 3, draws(1))
    optimizer.add_param_group({"params": [later]})
    resumed = AutoAdam([{"params": [one]}, {"params": [own]}, {"params": [later]}], steps=planned)
    resumed.load_state_dict(optimizer.state_dict())
    run([one, own, later], resumed, 1, draws(2))
    assert [group["share"] for group in resumed.param_groups] == [chosen, 0.3, chosen]


def test_no_gradient_at_all_is_no_step():
    weights = parameters()
    optimizer = AutoAdam(weights)
    optimizer.step()
    assert not optimizer.state


# ---------------------------------------------------------------- momentum


def test_momentum_follows_the_planned_steps():
    chosen = [planned_beta1(steps) for steps in (2, 10, 30, 60, 120, 300, 3000)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (0.5, 0.9)
    for steps, beta1 in ((60, planned_beta1(60)), (120, planned_beta1(120))):
        assert run_worth(beta1, steps) >= 0.97 > run_worth(beta1 + 0.01, steps)
    weights = parameters()
    assert AutoAdam(weights, steps=120).param_groups[0]["beta1"] == planned_beta1(120)
    assert AutoAdam(weights, steps=120, beta1=0.3).param_groups[0]["beta1"] == 0.3
    assert AutoAdam(weights).param_groups[0]["beta1"] == 0.5


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_the_worth_of_a_run_is_that_of_its_weights(beta1):
    steps = 23
    weights = [
        sum((1 - beta1) * beta1 ** (s - t) / (1 - beta1**s) for s in range(t, steps + 1)) for t in range(1, steps + 1)
    ]
    assert run_worth(beta1, steps) == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / steps)


# ---------------------------------------------------------------- states and refusals


def test_a_loaded_state_goes_on_bit_for_bit(tmp_path):
    ends = []
    for interrupted in (False, True):
        weights, normal = parameters(), draws(1)
        optimizer = AutoAdam(weights, lr=1e-3, steps=20)
        run(weights, optimizer, 7, normal)
        if interrupted:
            torch.save(optimizer.state_dict(), tmp_path / "state")
            weights = [nn.Parameter(w.detach().clone()) for w in weights]
            optimizer = AutoAdam(weights, lr=1.0)
            optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        run(weights, optimizer, 7, normal)
        ends.append(torch.cat([w.detach().reshape(-1) for w in weights]))
    assert torch.equal(*ends)


def test_a_copy_goes_on_alike():
    weights, normal = parameters(), draws(1)
    optimizer = AutoAdam(weights, lr=1e-3)
    run(weights, optimizer, 3, normal)
    copied = copy.deepcopy(optimizer)
    theirs = [p for group in copied.param_groups for p in group["params"]]
    run(weights, optimizer, 3, draws(2))
    run(theirs, copied, 3, draws(2))
    assert all(torch.equal(a, b) for a, b in zip(weights, theirs, strict=True))


def test_a_state_of_another_optimizer_is_refused():
    weights = parameters()
    with pytest.raises(ValueError, match="not written by AutoAdam"):
        AutoAdam(weights).load_state_dict(torch.optim.AdamW(weights).state_dict())


PARTS = [("state", 1, name) for name in path_start.FRESH] + [
    ("param_groups", 0, name) for name in PathLength().entries()
]


@pytest.mark.parametrize(("where", "number", "name"), PARTS)
def test_a_state_that_lacks_a_part_is_refused_when_it_is_loaded(where, number, name):
    """As one that an older version wrote does. Not in the step, when the release has been charged already."""
    weights = parameters()
    optimizer = AutoAdam(weights, lr=1e-3)
    run(weights, optimizer, 2, draws(1))
    state = optimizer.state_dict()
    del state[where][number][name]
    other = AutoAdam(weights, lr=1e-3)
    with pytest.raises(ValueError, match=name):
        other.load_state_dict(state)
    run(weights, other, 1, draws(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"share": math.nan}, "share"),
        ({"steps": 0}, "steps"),
        ({"beta1": 1.0}, "beta1"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoAdam(parameters(), **arguments)


def test_a_gradient_whose_noise_nobody_stated_is_refused_before_anything_moves():
    first, second = parameters([(3,), (4,)])
    before = [first.detach().clone(), second.detach().clone()]
    optimizer = AutoAdam([first, second])
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer.noise_std(first, 1.0)
    with pytest.raises(ValueError, match="nobody stated the noise"):
        optimizer.step()
    assert torch.equal(first, before[0])
    assert not optimizer.state
    with pytest.raises(ValueError, match="std of the noise"):
        optimizer.noise_std(first, -1.0)


def test_ranks_go_by_the_measurements_of_the_first():
    """A rank whose sums differ in the last bits takes the numbers of rank 0."""
    weights, others = parameters(), parameters()
    mine, theirs = AutoAdam(weights, lr=1e-3), AutoAdam(others, lr=1e-3)
    said = []
    mine.agree = lambda values: (said.append(values), values)[1]
    heard = iter(said)
    theirs.agree = lambda values: next(heard)
    for step in range(6):
        run(weights, mine, 1, draws(step))
        run(others, theirs, 1, draws(step), noise=0.1 + 1e-9)
    assert mine.param_groups[0]["path_scale"] == pytest.approx(theirs.param_groups[0]["path_scale"], rel=1e-6)
    assert [values.shape for values in said] == [(3 * 5,), (3 * 2,), *[(3 * 5,)] * 5]


# ---------------------------------------------------------------- in a private run


def private(engine=None, **options):
    torch.manual_seed(5)
    model = classifier()
    arguments = {"noise_multiplier": 0.7, "max_grad_norm": 0.5, "ema_decay": None, **options}
    return (engine or PrivacyEngine()).make_private(
        module=model,
        optimizer=AutoAdam(model.parameters(), lr=1e-2, steps=8),
        data_loader=loader(64, 16),
        noise_generator=torch.Generator().manual_seed(3),
        **arguments,
    )


@pytest.mark.parametrize(
    "options",
    [
        *({"clip_policy": name} for name in POLICIES),
        {"clipping": "flat"},
        {"clipping": "automatic"},
        {"grad_sample_mode": "hooks"},
        {"loss_reduction": "sum"},
        {"noise_multiplier": 0.0},
        {"max_physical_batch_size": 5},
        {"noise_allocation": NoiseAllocation("dimension")},
    ],
    ids=str,
)
def test_it_trains_with_every_policy_and_is_in_the_report(options):
    engine = PrivacyEngine()
    model, optimizer, batches = private(engine, **options)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for _ in range(2):
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch, options.get("loss_reduction", "mean")).backward()
            optimizer.step()
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    report = engine.privacy_report(delta=1e-3)
    assert "found by AutoAdam" in report.learning_rate
    assert "  learning rate   " in str(report)


def test_another_optimizer_has_no_line_in_the_report():
    engine, model = PrivacyEngine(), classifier()
    engine.make_private(
        module=model, optimizer=torch.optim.AdamW(model.parameters()), data_loader=loader(64, 16), noise_multiplier=1.0
    )
    assert engine.privacy_report(delta=1e-3).learning_rate is None
    assert "learning rate" not in str(engine.privacy_report(delta=1e-3))


def test_noise_that_drowns_the_signal_is_a_warning_of_the_report():
    engine = PrivacyEngine()
    model, optimizer, batches = private(engine, noise_multiplier=200.0, clipping="flat")
    for _ in range(3):
        train(model, optimizer, batches)
    assert any("the learning rate is the hint" in warning for warning in engine.privacy_report(1e-3).warnings)


def test_a_private_run_goes_on_from_a_checkpoint(tmp_path):
    ends = []
    for interrupted in (False, True):
        engine = PrivacyEngine()
        model, optimizer, batches = private(engine)
        train(model, optimizer, batches)
        if interrupted:
            engine.save_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer)
            stream = copy.deepcopy(batches.batch_sampler.stream.state_dict())
            engine = PrivacyEngine()
            model, optimizer, batches = private(engine)
            engine.load_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer)
            batches.batch_sampler.stream.load_state_dict(stream)
        train(model, optimizer, batches)
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*ends)


def test_frozen_weights_have_no_path():
    engine, model = PrivacyEngine(), classifier()
    model[0].weight.requires_grad_(False)
    place = model[0].weight.detach().clone()
    inner = AutoAdam(model.parameters(), lr=1e-2)
    _, optimizer, batches = engine.make_private(
        module=model, optimizer=inner, data_loader=loader(64, 16), noise_multiplier=1.0, ema_decay=None
    )
    train(model, optimizer, batches)
    assert torch.equal(model[0].weight.detach(), place)
    assert len(inner.state) == 3


@pytest.mark.parametrize("options", [{"fused_step": True}, {"zeroth_order": "aggzo"}])
def test_what_it_cannot_do_is_refused_with_the_reason(options):
    with pytest.raises(ValueError, match="inner_optimizer"):
        private(**options)
