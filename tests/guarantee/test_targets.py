"""The epsilon that is reported never exceeds the target, whatever the account held before the run."""

import contextlib
import warnings

import pytest
import torch
from helpers import classifier, loader, train

from opacus_ac import PrivacyBudgetExceeded, PrivacyEngine

DELTA = 1e-3
TARGET = 4.0
pytestmark = [
    pytest.mark.filterwarnings("ignore:budget has been spent already"),
    pytest.mark.filterwarnings("ignore:this engine has accounted for"),
]


def began(engine, **options):
    """Make a new model private; a target goes through ``make_private_with_epsilon``."""
    model = classifier()
    call = engine.make_private_with_epsilon if "target_epsilon" in options else engine.make_private
    if "target_epsilon" in options:
        options = {"target_delta": DELTA, "epochs": 5, **options}
    else:
        options = {"noise_multiplier": 2.0, **options}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return call(module=model, optimizer=optimizer, data_loader=loader(), max_grad_norm=1.0, clipping="flat", **options)


def run(engine, passes, **options):
    made = began(engine, **options)
    for _ in range(passes):
        train(*made)
    return made


def change_noise(engine):
    model, optimizer, batches = began(engine)
    for noise, batch in zip((2.0, 2.5, 3.0, 2.0), batches, strict=True):
        optimizer.noise_multiplier = noise
        train(model, optimizer, [batch])


EARLIER = {
    "nothing": lambda engine: None,
    "the same noise": lambda engine: run(engine, 1),
    "other noise": lambda engine: (run(engine, 1), run(engine, 1, noise_multiplier=3.0)),
    "other batches": lambda engine: (run(engine, 1, batch_size_schedule=[16, 8]), run(engine, 1)),
    "noise by a rule": change_noise,
    "batches by a rule": lambda engine: run(engine, 1, batch_size_schedule=lambda step: 16),
    "a smaller filter": lambda engine: run(engine, 1, batch_size_schedule=lambda step: 16, target_epsilon=3.0),
    "a larger filter": lambda engine: run(engine, 1, batch_size_schedule=lambda step: 16, target_epsilon=6.0),
    "outside": lambda engine: [engine.accountant.step(noise_multiplier=2.0, sample_rate=0.25) for _ in range(4)],
}
NEEDS_A_FILTER = {"a smaller filter", "a larger filter"}


def to_the_end(engine):
    made = began(engine, target_epsilon=TARGET)
    with contextlib.suppress(PrivacyBudgetExceeded):
        for _ in range(50):
            train(*made)
    assert engine.remaining_steps() == 0


def check(engine, before, steps_before):
    """The target holds, or nothing was added to what had exceeded it."""
    within = TARGET * (1 + 1e-9)
    spent, report = engine.get_epsilon(DELTA), engine.privacy_report()
    assert report.epsilon <= spent * (1 + 1e-9)
    assert spent <= within or (spent <= before * (1 + 1e-9) and engine._account.accountant.steps == steps_before)


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("accountant", ["vpld", "vrdp", "rdp"])
def test_what_one_engine_spent_before(accountant, earlier):
    if earlier in NEEDS_A_FILTER and accountant != "vrdp":
        pytest.skip("refused: no filter")
    if accountant == "rdp" and earlier != "outside":
        pytest.skip("Opacus's accountants are slow: one row here, one below")
    engine = PrivacyEngine(accountant=accountant)
    EARLIER[earlier](engine)
    before, steps = engine.get_epsilon(DELTA), engine._account.accountant.steps
    to_the_end(engine)
    check(engine, before, steps)


@pytest.mark.parametrize("earlier", [name for name in EARLIER if name not in ("nothing", "outside")])
@pytest.mark.parametrize("accountant", ["vpld", "vrdp", "rdp"])
def test_what_other_runs_of_the_ledger_spent(tmp_path, accountant, earlier):
    """The accountant of the run before need not be this one's: the ledger holds events."""
    if accountant == "rdp" and earlier != "other noise":
        pytest.skip("Opacus's accountants are slow: one row here, one above")
    ledger = tmp_path / "ledger"
    EARLIER[earlier](PrivacyEngine(accountant="vrdp", ledger=ledger))
    engine = PrivacyEngine(accountant=accountant, ledger=ledger)
    before, steps = engine.get_epsilon(DELTA), engine._account.accountant.steps
    to_the_end(engine)
    check(engine, before, steps)
    check(reader(engine, ledger, accountant), before, steps)


def reader(engine, ledger, accountant):
    """A reader who comes later, with the same target and nothing but the ledger."""
    other = PrivacyEngine(accountant=accountant, ledger=ledger)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began(other, target_epsilon=TARGET)
    return other


def test_a_run_beside_one_that_has_a_target(tmp_path):
    """Between two steps of a run with a target, another run with other settings charges the same ledger."""
    engine = PrivacyEngine(accountant="vpld", ledger=tmp_path / "l")
    made = began(engine, target_epsilon=TARGET)
    train(*made)
    run(PrivacyEngine(ledger=tmp_path / "l"), 1, noise_multiplier=1.5)
    before, steps = engine.get_epsilon(DELTA), engine._account.accountant.steps
    with contextlib.suppress(PrivacyBudgetExceeded):
        for _ in range(50):
            train(*made)
    check(engine, before, steps)


@pytest.mark.parametrize("earlier", [name for name in EARLIER if name not in NEEDS_A_FILTER])
@pytest.mark.parametrize("ledger", [False, True])
def test_an_accountant_that_was_left_alone_becomes_a_filter_where_one_is_needed(tmp_path, ledger, earlier):
    """A function may follow releases: the report then has the whole budget. What was charged before stays charged."""
    if ledger and earlier == "outside":
        pytest.skip("refused: the ledger does not hold it")
    engine = PrivacyEngine(ledger=tmp_path / "l" if ledger else None)
    EARLIER[earlier](engine)
    before, counts = engine.get_epsilon(DELTA), engine._account.accountant.counts()
    steps = sum(counts.values())
    model, optimizer, batches = began(engine, target_epsilon=TARGET, batch_size_schedule=lambda step: 16)
    assert engine.accountant.mechanism() == "vrdp"
    assert engine._account.accountant.counts() == counts
    assert engine.get_epsilon(DELTA) >= before * (1 - 1e-9)
    with contextlib.suppress(PrivacyBudgetExceeded):
        for _ in range(50):
            train(model, optimizer, batches)
    assert engine.accountant.get_epsilon(DELTA) > 0
    check(engine, engine.get_epsilon(DELTA) if engine._account.accountant.steps == steps else before, steps)


def test_a_run_that_began_before_charges_the_same_account():
    engine = PrivacyEngine()
    first = began(engine)
    began(engine, target_epsilon=TARGET, batch_size_schedule=lambda step: 16)
    train(*first)
    assert engine._account.accountant.steps == 4 == sum(steps for *_, steps in engine.accountant.history)


def test_an_accountant_that_was_replaced_refuses_to_be_asked():
    """Whoever kept it from before would be told what was spent until then."""
    engine = PrivacyEngine()
    kept = engine.accountant
    train(*began(engine, target_epsilon=TARGET, batch_size_schedule=lambda step: 16))
    for ask in (
        lambda: kept.get_epsilon(DELTA),
        lambda: kept.step(noise_multiplier=1.0, sample_rate=0.25),
        kept.state_dict,
    ):
        with pytest.raises(ValueError, match=r"ask engine\.accountant"):
            ask()
    assert engine.accountant.get_epsilon(DELTA) > 0


def test_the_accountant_stays_where_make_private_refuses():
    engine = PrivacyEngine()
    run(engine, 1)
    before = engine.accountant, engine.get_epsilon(DELTA)
    with pytest.raises(ValueError, match="grad_sample_mode='ew' is not available"):
        began(engine, target_epsilon=TARGET, batch_size_schedule=lambda step: 16, grad_sample_mode="ew")
    assert (engine.accountant, engine.get_epsilon(DELTA)) == before
    assert engine.accountant is engine._account.accountant.accountant


@pytest.mark.parametrize("engine", [{"accountant": "vpld"}, {}], ids=["chosen", "has a target"])
def test_no_accountant_is_replaced_that_was_chosen_or_holds_a_target(engine):
    engine = PrivacyEngine(**engine)
    if not engine._chosen:
        run(engine, 1, target_epsilon=TARGET)
    accountant = engine.accountant
    with pytest.raises(ValueError, match="accountant='vrdp' is a privacy filter"):
        began(engine, target_epsilon=TARGET, batch_size_schedule=lambda step: 16)
    assert engine.accountant is accountant is engine._account.accountant.accountant


@pytest.mark.parametrize("accountant", [None, "vpld"])
def test_a_whole_run_uses_its_target(accountant):
    """With the accountant left alone, no noise is wasted: the planned steps end within 1 % of the target."""
    engine = PrivacyEngine() if accountant is None else PrivacyEngine(accountant=accountant)
    run(engine, 5, target_epsilon=TARGET)
    assert 0.99 * TARGET <= engine.privacy_report().epsilon <= TARGET * (1 + 1e-9)
    assert engine.remaining_steps() == 0
