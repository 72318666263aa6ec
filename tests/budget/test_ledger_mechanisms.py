"""Ledgers of Laplace releases: they replay with the accountant "pure" alone, and mix with Gaussian ones nowhere."""

import json

import pytest
from ledgers import edit, make, train, written

from opacus_ac import PrivacyBudgetExceeded, PrivacyEngine
from opacus_ac.accounting import Event, PureDPAccountant, RenyiFilter, VariableRateRDPAccountant, pld_epsilon, rdp_event
from opacus_ac.accounting.rdp_table import DEFAULT_ORDERS, RDPTable
from opacus_ac.budget import PrivacyLedger
from opacus_ac.budget.accountants import adapt
from opacus_ac.budget.ledger_lines import SECTOR, encode_line
from opacus_ac.cli import main
from opacus_ac.errors import LedgerError

LAPLACE = Event(2.0, 0.25, mechanism="laplace")
GAUSSIAN = ["vrdp", "vpld", "rdp", "prv", "gdp"]


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def rewrite(path, entries):
    """Write ``entries`` with hashes that fit, as somebody would who wants to mislead the reader."""
    previous, data = "", b""
    for entry in entries:
        plain = {name: value for name, value in entry.items() if name not in ("hash", "previous")}
        line, previous = encode_line(plain, previous)
        data += line
    path.write_bytes(data)


# ------------------------------------------------------------------ replay


def test_replay_of_laplace_charges_gives_the_accountant(tmp_path):
    path = tmp_path / "l.jsonl"
    for _ in range(2):
        engine, model, optimizer, batches = make(path, mechanism="laplace")
        train(model, optimizer, batches)
    assert PrivacyLedger(path).charges == [Event(1.0, 0.25, mechanism="laplace")] * 8
    assert PrivacyLedger(path).mechanism == "laplace"
    again = PrivacyEngine(ledger=path, accountant="pure")
    assert again.accountant.history == engine.accountant.history == [(1.0, 0.25, 8)]
    assert again.get_epsilon(0.0) == engine.get_epsilon(0.0) > 0
    assert "8 charges of 2 runs" in engine.privacy_report(0.0).ledger


def test_a_shuffled_pass_with_laplace_noise_is_one_charge(tmp_path):
    _, model, optimizer, batches = make(tmp_path / "l.jsonl", mechanism="laplace", poisson_sampling=False)
    train(model, optimizer, batches)
    assert PrivacyLedger(tmp_path / "l.jsonl").charges == [Event(1.0, 1.0, "shuffled", mechanism="laplace")]


def test_a_target_counts_what_the_ledger_holds(tmp_path):
    path = tmp_path / "l.jsonl"
    arguments = {"mechanism": "laplace", "target_epsilon": 3.0, "target_delta": 0.0, "steps": 6}
    engine, model, optimizer, batches = make(path, **arguments)
    train(model, optimizer, batches)
    with pytest.warns(UserWarning, match="budget has been spent already"):
        second, model, optimizer, batches = make(path, **arguments)
    assert second.remaining_steps() == 2
    with pytest.raises(PrivacyBudgetExceeded):
        train(model, optimizer, batches)
    assert second.get_epsilon(0.0) <= 3.0 < engine.get_epsilon(0.0) * 2


def test_a_resumed_run_continues_its_ledger(tmp_path):
    path = tmp_path / "l.jsonl"
    engine, model, optimizer, batches = make(path, mechanism="laplace")
    train(model, optimizer, batches)
    engine.save_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    train(model, optimizer, batches)
    again, model, optimizer, batches = make(path, mechanism="laplace")
    again.load_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    assert again.accountant.history == [(1.0, 0.25, 8)]  # lost steps stay charged
    assert optimizer.steps_taken == 4


def test_the_command_line_adds_laplace_charges_up(tmp_path, capsys):
    path = tmp_path / "l.jsonl"
    _, model, optimizer, batches = make(path, mechanism="laplace")
    train(model, optimizer, batches)
    assert main(["report", str(path), "--delta", "0", "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["epsilon"] == PrivacyEngine(ledger=path, accountant="pure").get_epsilon(0.0)
    assert "mechanism='laplace'" in shown["charges"][0][0]


# ------------------------------------------------------------------ no mix


@pytest.mark.parametrize("accountant", GAUSSIAN)
def test_laplace_charges_do_not_replay_with_gaussian_accountants(tmp_path, accountant):
    path = tmp_path / "l.jsonl"
    written(path, mechanism="laplace")
    with pytest.raises(LedgerError, match=r'l\.jsonl:1: .*holds Laplace releases.*use accountant="pure"'):
        PrivacyEngine(accountant=accountant, ledger=path)


def test_gaussian_charges_do_not_replay_as_pure(tmp_path):
    path = tmp_path / "l.jsonl"
    written(path)
    with pytest.raises(LedgerError, match=r'l\.jsonl:1: .*holds Gaussian releases.*"vrdp"'):
        PrivacyEngine(accountant="pure", ledger=path)


def test_old_ledgers_that_name_no_mechanism_are_gaussian(tmp_path):
    path = tmp_path / "l.jsonl"
    written(path)
    entries = lines(path)
    assert entries[2].pop("mechanism") == entries[3].pop("mechanism") == entries[4].pop("mechanism") == "gaussian"
    rewrite(path, entries)
    assert PrivacyLedger(path).charges == [Event(1.0, 0.1 + step / 100) for step in range(3)]
    assert len(PrivacyEngine(ledger=path).accountant.history) == 3
    with pytest.raises(LedgerError, match=r"l\.jsonl:1"):
        PrivacyEngine(accountant="pure", ledger=path)


@pytest.mark.parametrize(("mechanism", "other"), [("gaussian", "laplace"), ("laplace", "gaussian")])
@pytest.mark.parametrize("known", [True, False])
def test_a_foreign_line_is_refused_with_its_number(tmp_path, mechanism, other, known):
    path = tmp_path / "l.jsonl"
    written(path, mechanism=mechanism)
    entries = lines(path)
    entries[3]["mechanism"] = other
    rewrite(path, entries)
    words = rf"l\.jsonl:4: a {other.capitalize()} release in a ledger of {mechanism.capitalize()} ones"
    with pytest.raises(LedgerError, match=words):
        PrivacyLedger(path, mechanism if known else None)


def test_a_foreign_charge_is_refused_before_it_is_written(tmp_path):
    path = tmp_path / "l.jsonl"
    ledger = written(path)
    before = path.read_bytes()
    with ledger.locked(), pytest.raises(LedgerError, match=r"l\.jsonl:6: a Laplace release"):
        ledger.charge(LAPLACE, dataset_size=64, settings={})
    assert path.read_bytes() == before
    empty = PrivacyLedger(tmp_path / "other", "laplace")
    with empty.locked(), pytest.raises(LedgerError, match=r"other:1: a Gaussian release"):
        empty.charge(Event(1.0, 0.1), dataset_size=64, settings={})
    assert not (tmp_path / "other").exists()


def test_two_runs_that_begin_one_ledger_with_other_noise_are_told_apart(tmp_path):
    """Both were made before the file was there; the second one to charge is refused, and releases nothing."""
    path = tmp_path / "l.jsonl"
    first = make(path, mechanism="laplace")
    engine, model, optimizer, batches = make(path)
    train(*first[1:])
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"l\.jsonl:1: the ledger holds Laplace releases"):
        train(model, optimizer, batches)
    assert path.read_bytes() == before
    assert optimizer.steps_taken == len(engine.accountant) == 0


def test_a_changed_mechanism_is_found_like_any_other_change(tmp_path):
    path = tmp_path / "l.jsonl"
    written(path, mechanism="laplace")
    data = path.read_bytes().splitlines(keepends=True)
    edit(data, 4, lambda entry: entry.update(mechanism="gaussian"))
    path.write_bytes(b"".join(data))
    with pytest.raises(LedgerError, match=r"l\.jsonl:4: the line was changed"):
        PrivacyLedger(path)


def test_readers_of_the_first_version_do_not_take_laplace_for_gaussian(tmp_path):
    """They check the version of the first line and know 1 only."""
    for mechanism, version in (("gaussian", 1), ("laplace", 2)):
        written(tmp_path / mechanism, mechanism=mechanism)
        assert lines(tmp_path / mechanism)[0]["version"] == version
        assert len((tmp_path / mechanism).read_bytes()) % SECTOR == 0


@pytest.mark.parametrize("version", [0, 3, "2", None, [1]])
def test_unknown_versions_are_refused(tmp_path, version):
    path = tmp_path / "l.jsonl"
    written(path)
    entries = lines(path)
    entries[0]["version"] = version
    rewrite(path, entries)
    with pytest.raises(LedgerError, match=r"l\.jsonl:1: no privacy ledger of version 1 or 2"):
        PrivacyLedger(path)


# ------------------------------------------------------------------ events and accountants

BOUNDS = {
    "vrdp": lambda: VariableRateRDPAccountant().step_event(LAPLACE),
    "epsilon after": lambda: VariableRateRDPAccountant().epsilon_after(LAPLACE, 1e-5),
    "other events": lambda: setattr(VariableRateRDPAccountant(), "other_events", {LAPLACE: 1}),
    "divergences": lambda: rdp_event(LAPLACE),
    "loss distribution": lambda: pld_epsilon({LAPLACE: 1}, 1e-5),
    "table": lambda: RDPTable(DEFAULT_ORDERS).event_row(LAPLACE),
    "filter": lambda: RenyiFilter(64.0, 1.0, 1e-5).fits(0.0, LAPLACE),
    "account": lambda: adapt(VariableRateRDPAccountant()).charge(LAPLACE),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds_of_gaussian_noise_refuse_a_laplace_release(bound):
    with pytest.raises(ValueError, match=r"mechanism='laplace'\) is no Gaussian release.*the accountant 'pure'"):
        BOUNDS[bound]()


@pytest.mark.parametrize("name", ["rdp", "prv", "gdp"])
def test_accountants_of_opacus_refuse_a_laplace_release(name):
    from opacus.accountants import create_accountant

    accountant = create_accountant(name)
    with pytest.raises(ValueError, match="is no Gaussian release"):
        adapt(accountant).charge(LAPLACE)
    assert len(accountant) == 0


def test_the_pure_accountant_refuses_a_gaussian_release_and_counts_laplace_ones():
    accountant = PureDPAccountant()
    with pytest.raises(ValueError, match="is no Laplace release"):
        accountant.step_event(Event(1.0, 0.1))
    with pytest.raises(ValueError, match="steps=-1"):
        accountant.step_event(LAPLACE, -1)
    accountant.step_event(LAPLACE, 0)
    assert len(accountant) == 0
    accountant.step_event(LAPLACE, 2)
    adapt(accountant).charge(LAPLACE)
    assert accountant.history == [(2.0, 0.25, 3)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mechanism": "cauchy"}, "mechanism='cauchy' is unknown"),
        (
            {"mechanism": "laplace", "sampling": "fixed_size"},
            "sampling='fixed_size' with mechanism='laplace' has no bound",
        ),
    ],
)
def test_events_without_a_bound_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Event(1.0, 0.1, **fields)


def test_a_saved_state_of_gaussian_events_is_as_before():
    """The rows of other kinds of sampling have no place for a mechanism: they are Gaussian."""
    accountant, other = VariableRateRDPAccountant(), VariableRateRDPAccountant()
    event = Event(1.0, 0.1, "fixed_size")
    accountant.step_event(event, 3)
    assert accountant.state_dict()["other_events"] == [[1.0, 0.1, "fixed_size", None, None, 3]]
    other.load_state_dict(accountant.state_dict())
    assert other.other_events == {event: 3}
