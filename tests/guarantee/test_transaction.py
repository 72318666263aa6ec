"""A step costs what it is: batches that are kept, announced ahead, joined, retried or changed on the way, through the public interface.

Record i has a gradient along its own axis, much longer than C: the released sum, without noise, shows who is in it and how often.
"""

import copy
import itertools
import warnings
from contextlib import suppress

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.errors import PrivacyBudgetExceeded, SamplingWarning

pytestmark = pytest.mark.filterwarnings(
    "ignore::opacus_ac.errors.NotPrivateWarning", "ignore::opacus_ac.errors.SamplingWarning"
)
N, C = 24, 0.5


class Marks(nn.Module):
    """Loss of record i: 100 w_i."""

    def __init__(self, wide=False):
        super().__init__()
        self.rows = nn.Linear(N, 1, bias=False).double() if wide else nn.Embedding(N, 1).double()
        nn.init.zeros_(self.rows.weight)
        self.wide = wide

    def forward(self, i):
        return 100 * self.rows(nn.functional.one_hot(i, N).double() if self.wide else i).squeeze(-1)


class Run:
    """A private run over N records, and what every release had in it."""

    def __init__(
        self,
        *,
        batch_size=8,
        workers=0,
        inner=torch.optim.SGD,
        wide=False,
        engine=None,
        data=None,
        collate=None,
        target=None,
        **options,
    ):
        torch.manual_seed(0)
        self.model = Marks(wide)
        self.engine = engine or PrivacyEngine()
        data = [{"i": torch.tensor(i)} for i in range(N)] if data is None else data
        arguments = {
            "noise_multiplier": 1.0, "max_grad_norm": C, "clipping": "flat", "ema_decay": None, "loss_reduction": "sum", "normalize": False,
            **options,
        }  # fmt: skip
        make = self.engine.make_private if target is None else self.engine.make_private_with_epsilon
        if target is not None:
            arguments.update(target_epsilon=target, target_delta=1e-3, steps=4)
            del arguments["noise_multiplier"]
        self.net, self.optimizer, self.loader = make(
            module=self.model, optimizer=inner(self.model.parameters(), lr=0.0),
            data_loader=DataLoader(data, batch_size=batch_size, num_workers=workers, collate_fn=collate), **arguments,
        )  # fmt: skip
        self.sums = []
        place = self.optimizer.mechanism.noise_in_place
        self.fail_in_noise = None

        def spy(totals, std, scale=1.0):
            self.sums.append(torch.cat([t.detach().reshape(-1).clone() for t in totals]) / C)
            if self.fail_in_noise is not None:
                error, self.fail_in_noise = self.fail_in_noise, None
                raise error
            place(totals, std, scale)

        self.optimizer.mechanism.noise_in_place = spy

    def backward(self, batch, change=lambda i: i):
        self.net(change(batch["i"])).sum().backward()

    def step(self, batch, change=lambda i: i):
        self.optimizer.zero_grad()
        self.backward(batch, change)
        self.optimizer.step()

    @property
    def charges(self):
        """Number of charges by sample rate."""
        found = {}
        for _, rate, steps in self.engine.privacy_report(1e-3, tight=False).history:
            found[rate] = found.get(rate, 0) + steps
        return found

    def check(self):
        """No record was in a release more than once."""
        for total in self.sums:
            assert float(total.max()) <= 1 + 1e-9
            assert float(total.min()) >= 0


def train(run, batches):
    for batch in batches:
        run.step(batch)


MODES = ("bk", "hooks", "functorch")
SAMPLINGS = (
    {},
    {"sampling": "fixed_size"},
    {"sampling": "truncated_poisson", "max_batch_size": 12},
    {"poisson_sampling": False},
)
ALWAYS = {"bk": {}, "hooks": {"grad_sample_mode": "hooks"}, "functorch": {"grad_sample_mode": "functorch"}}


def own(run):
    return run.loader


def memory_manager(run):
    return BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=100, optimizer=run.optimizer).__enter__()


def around(run):
    return DataLoader(
        run.loader.dataset,
        batch_sampler=run.loader.batch_sampler,
        collate_fn=run.loader.collate_fn,
        num_workers=run.loader.num_workers,
    )


def around_with_another_collate(run):
    return DataLoader(
        run.loader.dataset,
        batch_sampler=run.loader.batch_sampler,
        collate_fn=lambda rows: torch.utils.data.default_collate(rows or [{"i": torch.tensor(0)}]),
    )


def fetched_ahead(run):
    """A loop that has two batches in hand."""
    batches = iter(run.loader)
    ahead = next(batches)
    for batch in batches:
        yield ahead
        ahead = batch
    yield ahead


LOADERS = {
    "own": own,
    "BatchMemoryManager": memory_manager,
    "around": around,
    "fetched ahead": fetched_ahead,
    "all at once": lambda run: list(run.loader),
}


def rate_of(options):
    return 1.0 if options.get("poisson_sampling") is False else 8 / N


# ---------------------------------------------------------------- a draw is used once


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_each_batch_once_costs_what_was_drawn(kind, options, mode):
    run = Run(**options, **ALWAYS[mode])
    with warnings.catch_warnings():
        warnings.simplefilter("error", SamplingWarning)
        for _ in range(2):
            for batch in LOADERS[kind](run):
                run.step(batch)
    assert len(run.sums) == 6
    assert run.charges == ({1.0: 2} if rate_of(options) == 1 else {8 / N: 6})
    run.check()


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("change", ["as it is", "copied"])
def test_further_steps_on_a_batch_are_charged_without_amplification(kind, options, change):
    """The first use of each of three batches is a draw; the two that follow are not, however the batch is handed on."""
    run = Run(**options)
    copied, single = change == "copied", 0
    for batch in itertools.islice(iter(LOADERS[kind](run)), 3):
        single += copied and len(batch["i"]) < 2
        for _ in range(3):
            run.step(batch, (lambda i: i.clone()) if copied else (lambda i: i))
    if rate_of(options) == 1:
        assert run.charges == {1.0: 7}
    else:  # a copy of one number may be a copy of any, and may be charged as unknown
        assert 3 - single <= run.charges[8 / N] <= 3
        assert sum(run.charges.values()) == 9
        assert set(run.charges) == {8 / N, 1.0}
    run.check()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["own", "BatchMemoryManager", "around"])
def test_workers_that_announce_ahead_make_no_draw_of_a_repeated_batch(kind, workers):
    run = Run(workers=workers)
    for _ in range(2):
        for batch in LOADERS[kind](run):
            for _ in range(4):
                run.step(batch)
            break
    assert run.charges == {8 / N: 2, 1.0: 6}
    run.check()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_under_batch_memory_manager_keep_parts_and_draws_together(workers):
    """Three passes of parts of three, some passes broken off; each record once, each draw once."""
    run = Run(workers=workers, batch_size=12)
    for stop in (None, 3, None):
        with BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=3, optimizer=run.optimizer) as managed:
            for number, batch in enumerate(managed):
                if number == stop:
                    break
                run.step(batch)
    assert set(run.charges) == {0.5}
    assert run.charges[0.5] == len(run.sums) >= 4
    run.check()


def test_a_loader_with_another_collate_is_of_unknown_origin():
    run = Run()
    with pytest.warns(SamplingWarning, match="sample rate 1"):
        train(run, around_with_another_collate(run))
    assert run.charges == {1.0: 3}


@pytest.mark.parametrize("options", [{"sampling": "fixed_size"}, {}], ids=str)
@pytest.mark.parametrize("copies", [False, True])
def test_a_kept_batch_is_known_although_all_batches_have_one_size(options, copies):
    """The loop takes a new batch each time, and uses the first one."""
    run = Run(**options)
    kept = next(iter(run.loader))
    for _ in range(2):
        for _batch in run.loader:
            run.step(kept, (lambda i: i.clone()) if copies else (lambda i: i))
    assert run.charges == {8 / N: 1, 1.0: 5}


def test_a_buffer_that_batches_are_copied_into_is_no_kept_batch():
    run = Run(sampling="fixed_size")
    static = torch.zeros(8, dtype=torch.long)
    for _ in range(3):
        for batch in run.loader:
            run.step(batch, static.copy_)
    assert run.charges == {8 / N: 9}


def test_nested_iterations_are_draws_of_their_own():
    run = Run()
    for outer in run.loader:
        for inner in run.loader:
            run.step(inner)
        run.step(outer)
    assert run.charges == {8 / N: 12}
    run.check()


@pytest.mark.parametrize("change", ["as it is", "copied"])
@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_a_stand_in_that_is_kept_stays_without_weight(mode, change):
    """It is made of the first row, whom nobody drew: whether that row is in the sum must not depend on another record."""
    run = Run(batch_size=1, **ALWAYS[mode])
    steps = 0
    while not steps:
        for batch in run.loader:
            empty = run.optimizer.plan.current().records == 0
            run.step(batch)
            if empty:
                before = len(run.sums)
                run.step(batch, (lambda i: i.clone()) if change == "copied" else (lambda i: i))
                steps += 1
                assert float(run.sums[before].abs().max()) == 0
    assert run.charges[1.0] == steps


# ---------------------------------------------------------------- one draw a step


def accumulate(run, batches, steps=2):
    for number, batch in enumerate(batches, 1):
        run.backward(batch)
        if number % steps == 0:
            run.optimizer.step()
            run.optimizer.zero_grad()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", LOADERS)
def test_gradients_of_two_draws_in_one_step_are_refused(kind, mode):
    run = Run(**ALWAYS[mode])
    with pytest.raises(ValueError, match=r"more than one batch|number of per-sample|Poisson sampling|several"):
        accumulate(run, LOADERS[kind](run))
    assert run.charges == {}
    assert run.sums == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["own", "BatchMemoryManager", "all at once"])
def test_two_draws_of_one_size_joined_in_one_backward_pass_are_refused(kind, mode):
    """Record i of one and record i of the other would be clipped as one person."""
    run = Run(sampling="fixed_size", **ALWAYS[mode])
    one, other = itertools.islice(iter(LOADERS[kind](run)), 2)
    (run.net(one["i"]).sum() + run.net(other["i"]).sum()).backward()
    with pytest.raises(ValueError, match="more than one batch"):
        run.optimizer.step()
    assert run.charges == {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("when", ["before the forward pass", "before the backward pass", "after the step"])
def test_gradients_may_be_cleared_where_people_clear_them(when, mode):
    run = Run(sampling="fixed_size", workers=2, **ALWAYS[mode])
    for batch in BatchMemoryManager(
        data_loader=run.loader, max_physical_batch_size=3, optimizer=run.optimizer
    ).__enter__():
        if when == "before the forward pass":
            run.optimizer.zero_grad()
        loss = run.net(batch["i"]).sum()
        if when == "before the backward pass":
            run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        if when == "after the step":
            run.optimizer.zero_grad()
    assert run.charges == {8 / N: 3}
    run.check()


def test_a_forward_pass_that_the_loop_leaves_out_is_none():
    run = Run()
    for number, batch in enumerate(run.loader):
        loss = run.net(batch["i"])
        if number == 0:
            continue
        loss.sum().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert run.charges == {8 / N: 2}


class InPlace(Marks):
    """The output is a view of something else, and the loop changes it in place."""

    def forward(self, i):
        return torch.stack([super().forward(i), super().forward(i) * 0], 1)[:, 0]


def test_outputs_that_are_changed_in_place_are_followed(monkeypatch):
    monkeypatch.setattr(f"{__name__}.Marks", lambda wide: InPlace())
    run = Run(sampling="fixed_size")
    one, other = itertools.islice(iter(run.loader), 2)
    losses = [run.net(batch["i"]) for batch in (one, other)]
    for loss in losses:
        loss[:1] *= 2
    sum(loss.sum() for loss in losses).backward()
    with pytest.raises(ValueError, match="more than one batch"):
        run.optimizer.step()


def test_a_batch_of_another_loader_is_no_draw_of_this_one():
    first = Run()
    kept = next(iter(first.loader))
    first.step(kept)
    run = Run(engine=first.engine)
    for _batch in run.loader:
        run.step(kept)
    assert run.charges == {8 / N: 1, 1.0: 3}


def test_a_prepared_loader_of_accelerate_is_ours():
    accelerate = pytest.importorskip("accelerate")
    run = Run()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net, optimizer, loader = accelerator.prepare(run.net, run.optimizer, run.loader)
    assert loader is run.loader

    def loop():
        for batch in loader:
            with accelerator.accumulate(net):
                accelerator.backward(net(batch["i"]).sum())
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(ValueError, match="more than one batch"):
        loop()
    assert run.charges == {}


def test_prepared_by_accelerate_before():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = Marks()
    plain = DataLoader([{"i": torch.tensor(i)} for i in range(N)], batch_size=8)
    _, wrapped, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), plain)
    settings = {"module": model, "data_loader": loader, "noise_multiplier": 1.0, "max_grad_norm": C}
    with pytest.raises(ValueError, match="AcceleratedOptimizer"):
        PrivacyEngine().make_private(optimizer=wrapped, **settings)
    engine = PrivacyEngine()
    _, optimizer, private = engine.make_private(optimizer=wrapped.optimizer, **settings)
    for batch in private:
        optimizer.zero_grad()
        model(batch["i"]).mean().backward()
        optimizer.step()
    assert engine.accountant.history == [(1.0, 8 / N, 3)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["own", "BatchMemoryManager", "around"])
def test_two_passes_over_one_batch_before_a_step_are_refused(kind, mode):
    run = Run(**ALWAYS[mode])
    batch = next(iter(LOADERS[kind](run)))
    run.backward(batch)
    with pytest.raises(
        ValueError, match=r"a record of the batch is in more than one of them|Poisson sampling is not compatible"
    ):
        accumulate(run, [batch], 1)
    assert run.charges == {}


@pytest.mark.parametrize(("rows", "refused"), [([1, 2, 1], True), ([1, 2, 3], False)])
def test_a_record_twice_in_a_batch_of_unknown_origin_is_refused(rows, refused):
    run = Run()
    run.step(next(iter(run.loader)))  # no draw is in hand after it
    if refused:
        with pytest.raises(ValueError, match="two rows of a batch of unknown origin"):
            run.step({"i": torch.tensor(rows)})
    else:
        run.step({"i": torch.tensor(rows)})
    assert run.charges == ({8 / N: 1} if refused else {8 / N: 1, 1.0: 1})
    run.check()


def test_signals_do_not_join_two_draws():
    run = Run()
    batches = iter(run.loader)
    run.optimizer.signal_skip_step(True)
    with pytest.raises(ValueError, match="signal_skip_step"):
        run.step(next(batches))
    assert run.charges == {}


# ---------------------------------------------------------------- failures and retries


class Fault(RuntimeError):
    """Planted."""


def failing_charge(run):
    charge, left = run.optimizer.charge, [1]

    def fail(event):
        if left:
            left.pop()
            raise Fault
        charge(event)

    run.optimizer.charge = fail
    return 0  # charges that the failure leaves


def failing_hook(run):
    left = [1]

    def fail(_optimizer):
        if left:
            left.pop()
            raise Fault

    run.optimizer.attach_step_hook(fail)
    return 1


def failing_sums(run):
    accumulate, left = run.optimizer.source.accumulate, [1]

    def fail(factors):
        accumulate(factors)
        if left:
            left.pop()
            raise Fault

    run.optimizer.source.accumulate = fail
    return 0


FAILURES = {"charge": failing_charge, "hook": failing_hook, "sums": failing_sums}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("split", [None, 3])
def test_a_retry_of_a_step_that_failed_before_its_release_counts_nobody_twice(failure, split, mode):
    run = Run(max_physical_batch_size=split, batch_size=N, **ALWAYS[mode])
    left = None
    for batch in run.loader:
        if left is None and (split is None or run.optimizer.plan.current().last or failure == "sums"):
            left = FAILURES[failure](run)
            with pytest.raises(Fault):
                run.step(batch)
        run.step(batch)
    (total,) = run.sums
    torch.testing.assert_close(total, torch.ones(N, dtype=torch.float64))
    assert sum(run.charges.values()) == 1 + left


@pytest.mark.parametrize("split", [None, 6])
def test_after_noise_was_drawn_a_retry_is_no_draw(split):
    """A whole batch is charged at rate 1; of a split one parts are gone, and it is refused."""
    run = Run(max_physical_batch_size=split, sampling="fixed_size", batch_size=12)
    batches = iter(run.loader)
    if split:
        run.step(next(batches))
    batch = next(batches)
    run.fail_in_noise = Fault()
    with pytest.raises(Fault):
        run.step(batch)
    if split:
        with pytest.raises(ValueError, match="physical batch is used again"):
            run.step(batch)
        assert run.charges == {0.5: 1}
    else:
        run.step(batch)
        assert run.charges == {0.5: 1, 1.0: 1}
    for batch in batches:
        run.step(batch)
    run.check()


def test_a_part_that_is_left_out_gives_up_the_logical_batch():
    run = Run(max_physical_batch_size=6, batch_size=N)
    batches = iter(run.loader)
    run.step(next(batches))
    second = next(batches)
    run.optimizer.zero_grad()
    run.backward(second)
    broken, run.optimizer.max_grad_norm = run.optimizer.max_grad_norm, 0.1
    with pytest.raises(ValueError, match="max_grad_norm changed"):
        run.optimizer.step()
    run.optimizer.max_grad_norm = broken
    with pytest.raises(ValueError, match="not in the sums of their logical batch any more"):
        run.step(second)
    assert run.charges == {}
    run.optimizer.zero_grad()
    for batch in run.loader:
        run.step(batch)
    assert run.charges == {1.0: 1}
    run.check()


def test_a_refused_first_step_does_not_pay_for_its_pass():
    run = Run(poisson_sampling=False, target=3.0)
    released = 0
    for _ in range(20):
        for batch in run.loader:
            try:
                run.step(batch)
                released += 1
            except PrivacyBudgetExceeded:
                run.optimizer.zero_grad()
    passes = sum(run.charges.values())
    assert 1 <= passes < 20
    assert released <= 3 * passes


# ---------------------------------------------------------------- what is read once


@pytest.mark.parametrize("name", ["noise_multiplier", "max_grad_norm"])
@pytest.mark.parametrize("when", ["between parts", "in the step hook"])
def test_what_changes_within_a_logical_batch_kills_it(name, when):
    run = Run(max_physical_batch_size=6, batch_size=N)

    def change(*_):
        setattr(run.optimizer, name, 0.7 * getattr(run.optimizer, name))

    batches = iter(run.loader)
    run.step(next(batches))
    if when == "between parts":
        change()
    else:
        run.optimizer.attach_step_hook(change)
        for _ in range(2):
            run.step(next(batches))
    with pytest.raises(ValueError, match=f"{name} changed"):
        run.step(next(batches))
    assert run.sums == []
    assert sum(run.charges.values()) == (when == "in the step hook")


def test_weights_of_an_allocation_that_change_in_place_are_seen():
    from opacus_ac.allocation import NoiseAllocation

    run = Run(
        max_physical_batch_size=6, batch_size=N, noise_allocation=NoiseAllocation(source="constant", weights={"*": 2.0})
    )
    batches = iter(run.loader)
    run.step(next(batches))
    run.optimizer.allocation.weights[0] = 0.1
    with pytest.raises(ValueError, match="noise allocation changed"):
        run.step(next(batches))
    assert run.charges == {}


# ---------------------------------------------------------------- copies


def test_a_copy_takes_no_step_and_harms_nothing():
    run = Run()
    batches = iter(run.loader)
    run.step(next(batches))
    other = copy.deepcopy(run.optimizer)
    assert other.param_groups[0]["params"][0] is not run.model.rows.weight
    with pytest.raises(ValueError, match="copy of a private optimizer"):
        other.step()
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    assert optimizer.param_groups[0]["params"][0] is model.rows.weight
    run.step(next(batches))
    assert run.charges == {8 / N: 2}


# ---------------------------------------------------------------- parts of another run, and backward passes that broke off


@pytest.mark.parametrize("mode", ["bk", "hooks"])
@pytest.mark.parametrize("change", [lambda i: i, lambda i: i.clone()], ids=["kept", "copied"])
@pytest.mark.parametrize("part", [0, 1], ids=["first part", "second part"])
@pytest.mark.parametrize("sampling", ["poisson", "fixed_size"])
def test_a_part_of_another_runs_batch_is_refused(mode, change, part, sampling):
    """Which records are in the first half of a draw depends on the others: one record more moves two."""
    # Draws of 16 of 24 records have more than two parts, of which none is a single number, but with probability 1e-7.
    settings = {
        "batch_size": 16,
        "max_physical_batch_size": 2,
        "grad_sample_mode": mode,
        "wide": True,
        "sampling": sampling,
    }
    first = Run(**settings)
    batches = iter(first.loader)
    for _ in range(part):
        first.step(next(batches))
    kept = next(batches)
    second = Run(**settings, engine=first.engine)
    with pytest.raises(ValueError, match="a physical batch is used by itself"):
        second.step(kept, change)
    assert second.sums == []
    assert second.charges == {}


def through_manager(run, workers):
    """A pass of Opacus's memory manager: every logical batch, of 8, comes in parts of 3, 3 and 2."""
    return iter(
        BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=3, optimizer=run.optimizer).__enter__()
    )


def around_the_sampler(run, workers):
    return iter(DataLoader(run.loader.dataset, batch_sampler=run.loader.batch_sampler, num_workers=workers))


OTHER_PASS = {
    "the loader": lambda run, workers: iter(run.loader),
    "around its sampler": around_the_sampler,
    "another manager": through_manager,
}


@pytest.mark.parametrize(("workers", "sampling"), [(0, "fixed_size"), (1, "fixed_size"), (0, "shuffled")])
@pytest.mark.parametrize("taken", [1, 2])
@pytest.mark.parametrize("kind", OTHER_PASS)
def test_parts_of_a_pass_that_another_one_took_turns_with_are_refused(kind, taken, workers, sampling):
    """Nobody knows which of the two passes they are of, and part of a draw has other records than a draw of that size."""
    run = Run(sampling=sampling, workers=workers)
    parts = through_manager(run, workers)
    for _ in range(taken):
        run.step(next(parts))
    with suppress(ValueError):  # of another manager, which part of which draw this is cannot be known either
        run.step(next(OTHER_PASS[kind](run, workers)))
    before = len(run.sums), run.charges
    for _ in range(3 - taken):
        with suppress(ValueError):
            run.step(next(parts))
    assert (len(run.sums), run.charges) == before
    assert all(int((total > 1e-3).sum()) == 8 for total in run.sums)
    del parts
    parts = through_manager(run, workers)
    for _ in range(3):
        run.step(next(parts))
    assert int((run.sums[-1] > 1e-3).sum()) == 8
    rate = 1.0 if sampling == "shuffled" else 8 / N
    assert run.charges[rate] == before[1].get(rate, 0) + 1


def test_a_whole_batch_of_another_run_is_charged_without_amplification():
    first = Run()
    kept = next(iter(first.loader))
    second = Run(engine=first.engine)
    second.step(kept)
    assert second.charges == {1.0: 1}


@pytest.mark.parametrize("mode", ["bk", "hooks", "functorch"])
@pytest.mark.parametrize("where", ["at the output", "at the layer"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_backward_pass_that_broke_off_leaves_no_rows_behind(mode, where, adaptive):
    """Opacus's hooks keep the inputs of a pass that broke off, and would give the next one as many rows as that had."""
    run = Run(grad_sample_mode=mode, wide=True, clipping="adaptive" if adaptive else "flat")
    batches = iter(run.loader)
    run.optimizer.zero_grad()

    def fail(_):
        raise RuntimeError("planted")

    watched = run.model if where == "at the output" else run.model.rows
    handle = watched.register_forward_hook(lambda _module, _inputs, output: output.register_hook(fail) and None)
    losses = run.net(next(batches)["i"])
    with pytest.raises(RuntimeError, match="planted"):
        losses.sum().backward()
    handle.remove()
    counted = []
    observe = run.optimizer.statistics.observe
    run.optimizer.statistics.observe = lambda norms, *rest: (counted.append(len(norms)), observe(norms, *rest))[1]
    sizes = []
    for batch in itertools.islice(batches, 2):
        run.step(batch)
        sizes.append(len(batch["i"]))
    run.step({"i": torch.arange(3)})  # more than any part of a batch in other tests has
    assert counted == [*sizes, 3]
    assert [int((total > 1e-3).sum()) for total in run.sums] == [*sizes, 3]


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("fails", [None, "backward", "forward"])
def test_a_layer_may_run_before_the_model_also_after_a_pass_that_broke_off(mode, fails):
    """As embeddings do whose output goes into the model: what Opacus's hooks keep of them is not of the pass that broke off."""

    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(N, 3), nn.Linear(3, 1)

        def forward(self, embedded):
            return self.head(embedded).squeeze(-1)

    torch.manual_seed(0)
    model = Embeds()
    data = [{"i": torch.tensor(i)} for i in range(N)]
    engine = PrivacyEngine()
    net, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=1.0, max_grad_norm=C, grad_sample_mode=mode,
    )  # fmt: skip

    def fail(_):
        raise RuntimeError("planted")

    for place, batch in enumerate(loader):
        optimizer.zero_grad()
        output = net(model.table(batch["i"]))
        if place == 1 and fails is not None:
            if fails == "backward":
                output.register_hook(fail)
                with pytest.raises(RuntimeError, match="planted"):
                    output.mean().backward()
            continue
        output.mean().backward()
        optimizer.step()
    assert optimizer.steps_taken == len(loader) - (fails is not None)
