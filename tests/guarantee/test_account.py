"""What the account says is never below what was spent: by any sequence of runs, engines, ledgers, checkpoints and rules."""

import contextlib
import functools
import json
import math

import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution
from helpers import classifier, loader, train
from torch.utils.data import DataLoader

import opacus_ac
from opacus_ac import PrivacyBudgetExceeded
from opacus_ac.accounting import VariableRateRDPAccountant, epsilon_from_rdp
from opacus_ac.accounting.opacus_accountants import checked
from opacus_ac.budget import PrivacyLedger
from opacus_ac.budget.ledger_lines import encode_line
from opacus_ac.checkpoint.file import DIGEST, digest
from opacus_ac.checkpoint.one_process import TERMS
from opacus_ac.cli import main
from opacus_ac.errors import NotPrivateWarning

DELTA = 1e-3
PrivacyEngine = functools.partial(opacus_ac.PrivacyEngine, accountant="vrdp")  # most tests are about its filter
pytestmark = [
    pytest.mark.filterwarnings("ignore:budget has been spent already"),
    pytest.mark.filterwarnings("ignore:this engine has accounted for"),
    pytest.mark.filterwarnings("ignore:GDP accounting is experimental"),
]


def run(engine, passes=1, rule=None, **options):
    """Make a new model private by the engine and train it; ``rule`` is called with the optimizer before every step."""
    model = options.pop("model", None) or classifier()
    arguments = {"max_grad_norm": 1.0, "clipping": "flat", **options}
    call = engine.make_private_with_epsilon if "target_epsilon" in arguments else engine.make_private
    if "target_epsilon" in arguments:
        arguments = {"target_delta": DELTA, "epochs": 2, **arguments}
    else:
        arguments = {"noise_multiplier": 1.0, **arguments}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments.setdefault("data_loader", loader())
    model, optimizer, batches = call(module=model, optimizer=optimizer, **arguments)
    for _ in range(passes):
        for batch in batches:
            if rule is not None:
                rule(optimizer)
            train(model, optimizer, [batch])
    return model, optimizer, batches


def for_ever(model, optimizer, batches):
    while True:
        train(model, optimizer, batches)


def lower(history, delta):
    """A lower bound of the epsilon of Poisson steps: the discretisation errs to the optimistic side."""
    total = None
    for noise, rate, steps in history:
        part = privacy_loss_distribution.from_gaussian_mechanism(
            noise,
            sampling_prob=rate,
            pessimistic_estimate=False,
            value_discretization_interval=1e-3,
            use_connect_dots=False,
        ).self_compose(steps)
        total = part if total is None else total.compose(part)
    return 0.0 if total is None else total.get_epsilon_for_delta(delta)


def up_and_down(optimizer):
    """A rule that looks at releases, in effect: the noise changes, and is set back in the end."""
    optimizer.noise_multiplier = (1.0, 0.7, 1.3, 1.0)[optimizer.steps_taken % 4]


def bounded(schedule=lambda step: (16, 8)[step % 2], **options):
    """Options of a run whose rates follow a function, under a privacy filter."""
    return {"batch_size_schedule": schedule, "target_epsilon": 4.0, **options}


# ------------------------------------------------------------------ A7: adaptive once, adaptive for ever


def another_run(engine, path):
    engine.detach(engine._undo[-1][0])
    with contextlib.suppress(PrivacyBudgetExceeded):
        run(engine, noise_multiplier=engine._optimizer.noise_multiplier)
    return engine


def another_engine(engine, path):
    other = PrivacyEngine(ledger=path / "ledger")
    run(other, noise_multiplier=engine._optimizer.noise_multiplier)
    return other


def another_engine_before_its_first_step(engine, path):
    other = PrivacyEngine(ledger=path / "ledger")
    run(other, passes=0, noise_multiplier=engine._optimizer.noise_multiplier)
    return other


def resumed(with_optimizer, first):
    def way(engine, path):
        model, optimizer = engine._undo[-1][0], engine._optimizer
        engine.save_checkpoint(path=path / "c.pt", module=model, optimizer=optimizer)
        other = PrivacyEngine(accountant=engine.accountant.mechanism())
        if first:
            other.load_checkpoint(path=path / "c.pt", module=(fresh := classifier()))
            run(other, model=fresh, noise_multiplier=optimizer.noise_multiplier)
            return other
        fresh, made, _ = run(other, passes=0)
        if with_optimizer and engine.target_budget is not None:
            pytest.skip("other noise: refused")
        other.load_checkpoint(path=path / "c.pt", module=fresh, optimizer=made if with_optimizer else None)
        return other

    return way


def twice_resumed(engine, path):
    """Through two checkpoints, with steps of its own before the second is loaded."""
    other = resumed(False, False)(engine, path)
    other.save_checkpoint(path=path / "d.pt", module=classifier())
    last = PrivacyEngine()
    run(last)
    with pytest.warns(UserWarning, match="sum of both is kept"):
        last.load_checkpoint(path=path / "d.pt", module=classifier())
    return last


LEDGER = {"another engine": another_engine, "no step of its own": another_engine_before_its_first_step}
WAYS = {
    "nothing": lambda engine, path: engine,
    "another run": another_run,
    **LEDGER,
    "checkpoint": resumed(True, False),
    "weights only": resumed(False, False),
    "before make_private": resumed(False, True),
    "two checkpoints": twice_resumed,
}


def began(way, tmp_path, **options):
    return PrivacyEngine(ledger=tmp_path / "ledger" if way in LEDGER else None, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", ["noise set back", "function"])
def test_a_rule_without_a_filter_is_never_forgotten(tmp_path, way, rule):
    engine = began(way, tmp_path)
    options = {"rule": up_and_down} if rule == "noise set back" else {"batch_size_schedule": lambda step: 16}
    _, optimizer, _ = run(engine, **options)
    assert optimizer.noise_multiplier == 1.0
    last = WAYS[way](engine, tmp_path)
    report = last.privacy_report(DELTA)
    assert any("rule of yours" in warning for warning in report.warnings)
    assert "privacy loss distribution" not in report.bounds
    assert last.get_epsilon(DELTA) == report.epsilon >= engine.get_epsilon(DELTA)


@pytest.mark.parametrize("way", WAYS)
def test_the_whole_budget_of_a_filter_is_never_forgotten(tmp_path, way):
    engine = began(way, tmp_path)
    run(engine, **bounded())
    assert engine.privacy_report().epsilon == pytest.approx(4.0)
    last = WAYS[way](engine, tmp_path)
    report = last.privacy_report(DELTA)
    assert report.epsilon >= 4.0 - 1e-9
    assert "filter" in report.accountant
    assert last.get_epsilon(DELTA) == report.epsilon
    if (
        last is not engine and last._optimizer.steps_taken and last.target_budget is None
    ):  # what came after, outside of the filter, is added
        assert report.epsilon > 4.5


@pytest.mark.parametrize("way", WAYS)
def test_plans_that_were_fixed_keep_their_tight_bound(tmp_path, way):
    """The control: nothing above is reported for runs without a rule."""
    engine = began(way, tmp_path)
    run(engine, batch_size_schedule=[16, 8])
    last = WAYS[way](engine, tmp_path)
    report = last.privacy_report(DELTA)
    assert not report.warnings
    assert report.accountant == "privacy loss distribution"
    assert lower(report.history, DELTA) <= report.epsilon <= last.get_epsilon(DELTA)


def test_the_ledger_says_it_to_the_command_line(tmp_path, capsys):
    for name, options in {"fixed": {}, "rule": {"rule": up_and_down}, "filter": bounded()}.items():
        run(PrivacyEngine(ledger=tmp_path / name), **options)
        assert main(["report", str(tmp_path / name), "--delta", str(DELTA), "--format", "json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        engine = PrivacyEngine(ledger=tmp_path / name)
        assert ("rule of yours" in str(facts.get("warnings"))) == (name == "rule")
        assert facts["epsilon"] <= engine.get_epsilon(DELTA) * (1 + 1e-9)
        assert (facts["epsilon"] == pytest.approx(engine.get_epsilon(DELTA))) == (name != "fixed")


def test_settings_that_differ_from_run_to_run_are_a_rule(tmp_path):
    """A loop that makes a model private anew for every step, with noise that follows what it saw."""
    for engines in ([PrivacyEngine()] * 3, [PrivacyEngine(ledger=tmp_path / "l") for _ in range(3)]):
        for engine, noise in zip(engines, (1.0, 0.8, 1.2), strict=True):
            run(engine, noise_multiplier=noise)
        assert any("run to run" in warning for warning in engine.privacy_report(DELTA).warnings)


def test_a_list_that_changes_during_the_run_changes_nothing():
    sizes = [16, 16, 16, 16]

    def change(optimizer):
        sizes[:] = [64] * 4

    engine = PrivacyEngine()
    run(engine, passes=2, rule=change, batch_size_schedule=sizes)
    assert engine.accountant.history == [(1.0, 0.25, 8)]


def test_filters_of_runs_on_one_ledger_share_their_order(tmp_path):
    """The best order for a second target would be chosen after releases: the first filter's holds for both."""
    first, second = (PrivacyEngine(ledger=tmp_path / "l") for _ in range(2))
    made = [run(first, passes=0, **bounded()), run(second, passes=0, **bounded(target_epsilon=6.0))]
    assert first._account.guard.limit.order != second._account.guard.limit.order
    for model, optimizer, batches in made:
        train(model, optimizer, batches)
    order = first._account.guard.limit.order
    assert {charge.limit.order for charge in PrivacyLedger(tmp_path / "l").entries()} == {order}
    assert first.privacy_report().epsilon == pytest.approx(second.privacy_report().epsilon) == pytest.approx(6.0)
    with pytest.raises(PrivacyBudgetExceeded):
        for_ever(*made[0])
    assert PrivacyEngine(ledger=tmp_path / "l").get_epsilon(DELTA) == pytest.approx(6.0)


def test_a_target_that_leaves_no_room_at_the_order_is_refused_before_a_charge():
    engine = PrivacyEngine()
    run(engine, **bounded(target_epsilon=30.0))
    before = engine.accountant.history
    model, optimizer, batches = run(engine, passes=0, **bounded(target_epsilon=0.3))
    assert engine.remaining_steps() == 0
    with pytest.raises(PrivacyBudgetExceeded):
        train(model, optimizer, batches)
    assert engine.accountant.history == before


# ------------------------------------------------------------------ A2: what was spent, not what was allowed


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_what_was_spent_outside_of_a_filter_counts(tmp_path, where):
    path = tmp_path / "l"
    engine = PrivacyEngine(ledger=path)
    expensive = {"noise_multiplier": 0.5, "passes": 3}
    if where == "before":
        run(engine, **expensive)
    model, optimizer, batches = run(engine, passes=0, **bounded(target_epsilon=2.0))
    if where == "before":
        with pytest.raises(PrivacyBudgetExceeded):
            train(model, optimizer, batches)
    else:
        train(model, optimizer, batches)
        run(PrivacyEngine(ledger=path), **expensive)
        if where == "between":
            with pytest.raises(PrivacyBudgetExceeded):
                train(model, optimizer, batches)
    truth = lower([(0.5, 0.25, 12)], DELTA)
    for seen in (engine, PrivacyEngine(ledger=path)):
        assert seen.get_epsilon(DELTA) >= truth + (2.0 if where != "before" else 0.0) * 0.9
    report = engine.privacy_report()
    assert truth <= report.epsilon <= engine.get_epsilon(DELTA)


@pytest.mark.parametrize("passes", [1, 6])
def test_the_two_bounds_of_a_filter_and_what_came_beside_it(tmp_path, passes):
    """By hand: the whole budget at the filter's order, and the rest either there or, often better, by basic composition."""
    engine = PrivacyEngine(ledger=tmp_path / "l")
    run(engine, **bounded(target_epsilon=1.0))
    limit, noise = engine._account.guard.limit, engine._optimizer.noise_multiplier
    run(PrivacyEngine(ledger=tmp_path / "l"), passes=passes, noise_multiplier=noise)
    beside = VariableRateRDPAccountant()
    beside.history = [(noise, 0.25, 4 * passes)]
    by_parts = min(
        epsilon_from_rdp([limit.budget], [limit.order], share * DELTA)[0] + beside.get_epsilon((1 - share) * DELTA)
        for share in (0.01, 0.1, 0.5, 0.9, 0.99)
    )
    at_order = epsilon_from_rdp([limit.budget + beside.spent_rdp(limit.order)], [limit.order], DELTA)[0]
    assert engine.get_epsilon(DELTA) == pytest.approx(min(by_parts, at_order))
    assert engine.get_epsilon(DELTA) > 1.0


# ------------------------------------------------------------------ A9: the ledger is read again


@pytest.mark.parametrize("target", [None, 6.0])
def test_what_others_charge_later_is_in_the_report(tmp_path, target):
    engine = PrivacyEngine(ledger=tmp_path / "l")
    run(engine, **({} if target is None else {"target_epsilon": target}))
    before, left = engine.get_epsilon(DELTA), engine.remaining_steps() if target else 0
    run(PrivacyEngine(ledger=tmp_path / "l"))
    assert engine.get_epsilon(DELTA) > before
    assert "8 charges of 2 runs" in engine.privacy_report(DELTA).ledger
    assert sum(steps for _, _, steps in engine.privacy_report(DELTA).history) == 8
    assert target is None or engine.remaining_steps() < left


# ------------------------------------------------------------------ A8: units and neighbours


class Users(torch.utils.data.Dataset):
    """Users with two rows each."""

    max_rows_per_user = 2

    def __len__(self):
        return 64

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        inputs = torch.randn(2, 4, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(0, 3, (2,), generator=generator)


def collate(users):
    return torch.cat([inputs for inputs, _ in users]), torch.cat([targets for _, targets in users])


def of_users(engine):
    return run(
        engine, passes=0, max_rows_per_user=2, data_loader=DataLoader(Users(), batch_size=16, collate_fn=collate)
    )


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of rows, and one of shuffled rows."""
    for name, options in {"rows": {}, "shuffled": {"poisson_sampling": False}}.items():
        engine = PrivacyEngine()
        model, optimizer, _ = run(engine, **options)
        engine.save_checkpoint(path=tmp_path / name, module=model, optimizer=optimizer)
    return tmp_path


@pytest.mark.parametrize("charged", ["checkpoint", "checkpoint and steps of its own", "own steps"])
def test_rows_and_users_do_not_add_up(saved, charged):
    """Whichever comes first is kept, and the other refused, before anything changes."""
    engine = PrivacyEngine()
    if "own" in charged:
        run(engine)
    if "checkpoint" in charged:
        engine.load_checkpoint(path=saved / "rows", module=classifier())
    with pytest.raises(ValueError, match=r"protect one record.*this run protects one user"):
        of_users(engine)
    other = PrivacyEngine()
    model, _, _ = of_users(other)
    before = [p.detach().clone() for p in model.parameters()]
    for module, options in ((model, {}), (torch.nn.Identity(), {})):
        if module is model:
            with pytest.raises(ValueError, match="do not add up"):
                other.load_checkpoint(path=saved / "rows", module=module, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert other.get_epsilon(DELTA) == 0


@pytest.mark.parametrize("order", ["before make_private", "after", "beside own steps"])
def test_the_weaker_relation_of_a_checkpoint_is_kept(saved, tmp_path, order):
    engine = PrivacyEngine()
    if order == "before make_private":
        engine.load_checkpoint(path=saved / "shuffled", module=classifier())
    run(engine, passes=1 if order == "beside own steps" else 0)
    if order != "before make_private":
        engine.load_checkpoint(path=saved / "shuffled", module=classifier())
    assert engine.privacy_report(DELTA).adjacency.startswith("zero-out")
    engine.save_checkpoint(path=tmp_path / "again", module=classifier())
    last = PrivacyEngine()
    last.load_checkpoint(path=tmp_path / "again", module=classifier())
    run(last)
    assert last.privacy_report(DELTA).adjacency.startswith("zero-out")
    assert last.get_epsilon(DELTA) > engine.get_epsilon(DELTA)


# ------------------------------------------------------------------ old files, edited files, steps from outside


def old_checkpoint(path, **changes):
    """Take out of a checkpoint what older versions did not write, and give it the digest that they would have given."""
    state = torch.load(path, weights_only=True)
    del state[TERMS]
    state.update(changes)
    state[DIGEST] = digest(state)
    torch.save(state, path)


@pytest.mark.parametrize("kind", ["rows", "shuffled"])
def test_what_an_old_checkpoint_cannot_say_is_taken_as_the_worse(saved, kind):
    old_checkpoint(saved / kind)
    engine = PrivacyEngine()
    engine.load_checkpoint(path=saved / kind, module=classifier())
    with pytest.raises(ValueError, match="protect one record"):
        of_users(engine)
    run(engine, passes=0)
    report = engine.privacy_report(DELTA)
    assert any("does not say" in warning for warning in report.warnings)
    assert report.adjacency.startswith("zero-out" if kind == "shuffled" else "add/remove")
    assert report.accountant == "vrdp"
    assert report.epsilon == engine.get_epsilon(DELTA) > 0


def write_lines(path, *entries):
    previous, data = "", b""
    for entry in entries:
        line, previous = encode_line(entry, previous)
        data += line
    path.write_bytes(data)


HEAD = {"kind": "ledger", "version": 1, "dataset_size": 64, "unit": "one record (a row of the dataset)"}
STEP = {"kind": "charge", "run": "a", "noise_multiplier": 1.0, "sample_rate": 0.25, "sampling": "poisson"}


def test_what_an_old_ledger_cannot_say_is_taken_as_the_worse(tmp_path):
    write_lines(tmp_path / "l", HEAD, {"kind": "run", "run": "a", "started": "", "settings": {}}, *[STEP] * 4)
    engine = PrivacyEngine(ledger=tmp_path / "l")
    run(engine)  # the file goes on as it is
    report = engine.privacy_report(DELTA)
    assert any("does not say" in warning for warning in report.warnings)
    assert report.accountant == "vrdp"
    assert report.history == [(1.0, 0.25, 8)]


LIES = {"no truth value": {"adaptive": 1}, "no filter": {"limit": [0.5, 1.0]}, "no numbers": {"limit": "a"}}


@pytest.mark.parametrize("lie", LIES)
def test_lines_with_an_impossible_origin_are_refused(tmp_path, lie):
    write_lines(tmp_path / "l", HEAD, {**STEP, **LIES[lie]})
    with pytest.raises(ValueError, match=":2: not a line of a privacy ledger"):
        PrivacyEngine(ledger=tmp_path / "l")


@pytest.mark.parametrize("field", ["adaptive", "unknown", "unlimited", "units", "samplings", "limits", None])
def test_every_field_of_the_account_is_under_the_digest(tmp_path, field):
    engine = PrivacyEngine()
    model, optimizer, _ = run(engine, rule=up_and_down)
    engine.save_checkpoint(path=tmp_path / "c", module=model, optimizer=optimizer)
    state = torch.load(tmp_path / "c", weights_only=True)
    if field is None:
        del state[TERMS]
    else:
        value = state[TERMS][field]
        state[TERMS][field] = (not value) if isinstance(value, bool) else [*value, "x"]
    torch.save(state, tmp_path / "c")
    other = PrivacyEngine()
    with pytest.raises(ValueError, match="digest differs"):
        other.load_checkpoint(path=tmp_path / "c", module=classifier())
    assert len(other.accountant) == 0


def test_steps_that_were_put_into_the_accountant_are_taken_as_the_worse():
    engine = PrivacyEngine()
    run(engine)
    engine.accountant.history = [*engine.accountant.history, (1.0, 1.0, 1)]
    report = engine.privacy_report(DELTA)
    assert any("does not say" in warning for warning in report.warnings)
    assert report.adjacency.startswith("zero-out")
    assert report.bounds == {"vrdp": engine.get_epsilon(DELTA)}


# ------------------------------------------------------------------ A3: approximations, and the edges


def test_gdp_trains_and_claims_nothing():
    with pytest.warns(NotPrivateWarning, match="central limit"):
        engine = PrivacyEngine(accountant="gdp")
    run(engine, rule=up_and_down)  # Opacus's own would raise: its rates and noise must not change
    report = engine.privacy_report(DELTA)
    assert engine.get_epsilon(DELTA) == report.epsilon == engine.accountant.get_epsilon(DELTA) == math.inf
    assert json.loads(report.to_json())["epsilon"] == "infinity"
    assert any("no finite epsilon is claimed" in warning for warning in report.warnings)


@pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")
def test_gdp_states_its_figure_beside_a_bound():
    engine = PrivacyEngine(accountant="gdp")
    run(engine)
    note = next(w for w in engine.privacy_report(DELTA).warnings if "central limit" in w)
    vrdp = PrivacyEngine()
    run(vrdp)
    assert f"{vrdp.get_epsilon(DELTA):.4f}" in note
    with pytest.raises(ValueError, match="approximation"):
        run(PrivacyEngine(accountant="gdp"), target_epsilon=3.0)


ACCOUNTANTS = ("vrdp", "vpld", "rdp", "prv")
HISTORIES = {
    "ordinary": [(1.0, 0.1, 100)],
    "little noise": [(0.3, 0.05, 20)],
    "much noise": [(30.0, 0.25, 4)],
    "rates and noise that change": [(1.0, 0.1, 50), (2.0, 0.2, 50)],
    "every record": [(2.0, 1.0, 3)],
}


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_no_accountant_is_below_the_truth(name, history):
    engine = PrivacyEngine(accountant=name)
    engine.accountant.history = HISTORIES[history]
    for delta in (1e-9, 1e-5, 0.3):
        assert engine.get_epsilon(delta) >= max(0.0, lower(HISTORIES[history], delta) * (1 - 1e-9))
        assert engine.accountant.get_epsilon(delta) >= 0


@pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")
@pytest.mark.parametrize("name", [*ACCOUNTANTS, "gdp"])
def test_the_edges_of_delta_and_noise(name):
    engine = PrivacyEngine(accountant=name)
    assert [engine.get_epsilon(delta) for delta in (0.0, 1e-5, 1.0)] == [0.0] * 3
    for history, delta, expected in (
        ([(1.0, 0.1, 10)], 0.0, math.inf),
        ([(1.0, 0.1, 10)], 1.0, 0.0),
        ([(1.0, 0.1, 10)], 2.0, 0.0),
        ([(0.0, 0.1, 1)], 1e-5, math.inf),
        ([(0.0, 0.1, 1)], 1.0, 0.0),
        ([(1.0, 0.0, 5)], 1e-5, 0.0),
        ([(math.inf, 0.1, 5)], 0.0, 0.0),
    ):
        engine.accountant.history = history
        assert engine.get_epsilon(delta) == expected, (history, delta)
    engine.accountant.history = [(1e-6, 0.25, 4)]
    assert engine.get_epsilon(DELTA) > 1e10
    for delta in (-1e-9, math.nan):
        with pytest.raises(ValueError, match="delta"):
            engine.get_epsilon(delta)


@pytest.mark.parametrize("history", HISTORIES)
def test_prv_adds_its_own_error(history):
    """Its figure is an upper bound, close above the truth."""
    from opacus.accountants import PRVAccountant

    accountant = checked(PRVAccountant())
    accountant.history = HISTORIES[history]
    truth = lower(HISTORIES[history], 1e-5)
    assert truth <= accountant.get_epsilon(1e-5) <= truth + 0.1


@pytest.mark.parametrize("name", ["vrdp", "vpld", "rdp", "prv"])
@pytest.mark.parametrize(
    ("amount", "match"),
    [
        *[({"epochs": epochs}, "epochs must be a finite number > 0") for epochs in (0, -1, math.nan, math.inf, True)],
        ({"epochs": None, "steps": 0}, "number of steps"),
        ({"epochs": None, "steps": 2.5}, "number of steps"),
    ],
)
def test_a_target_needs_a_whole_number_of_steps(name, amount, match):
    with pytest.raises(ValueError, match=match):
        run(PrivacyEngine(accountant=name), target_epsilon=3.0, **amount)


@pytest.mark.parametrize("name", ["rdp", "prv"])
@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_targets_of_opacus_accountants_are_kept_and_used(name, epsilon):
    engine = PrivacyEngine(accountant=name)
    model, optimizer, batches = run(engine, passes=0, target_epsilon=epsilon)
    noise = optimizer.noise_multiplier
    engine.accountant.history = [(noise, 0.25, 7)]
    left = iter(batches)
    train(model, optimizer, [next(left)])
    with pytest.raises(PrivacyBudgetExceeded):
        train(model, optimizer, [next(left)])
    assert engine.accountant.history == [(noise, 0.25, 8)]
    assert 0.97 * epsilon < engine.accountant.get_epsilon(DELTA) <= epsilon
