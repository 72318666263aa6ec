"""The ledger: a charge is on disk before its release, whatever dies; and what is no longer the ledger is refused."""

import json
import os
import random
import signal
import time

import pytest
import torch
from helpers import classifier, loader
from ledgers import SETTINGS, edit, make, train, written

from opacus_ac import PrivacyBudgetExceeded, PrivacyEngine
from opacus_ac.accounting import Event
from opacus_ac.accounting.events import MECHANISMS
from opacus_ac.budget import PrivacyLedger
from opacus_ac.budget.ledger import SECTOR, repair
from opacus_ac.errors import LedgerError
from opacus_ac.release import GaussianMechanism

# ------------------------------------------------------------------ reading and adding up


def test_replay_gives_the_accountant(tmp_path):
    engine, model, optimizer, batches = make(tmp_path / "l.jsonl", batch_size_schedule=[8, 16, 32])
    train(model, optimizer, batches)
    again = PrivacyEngine(accountant=engine.accountant.mechanism(), ledger=tmp_path / "l.jsonl")
    assert again.accountant.history == engine.accountant.history == [(1.0, 0.125, 1), (1.0, 0.25, 1), (1.0, 0.5, 2)]
    assert again.get_epsilon(1e-3) == engine.get_epsilon(1e-3) > 0


def test_runs_on_the_same_data_add_up(tmp_path):
    for _ in range(3):
        engine, model, optimizer, batches = make(tmp_path / "l.jsonl")
        train(model, optimizer, batches)
    assert engine.accountant.history == [(1.0, 0.25, 12)]
    assert "12 charges of 3 runs" in engine.privacy_report(1e-3).ledger
    assert "12 charges of 3 runs" in str(engine.privacy_report(1e-3))


def test_steps_that_were_given_to_the_accountant_alone_are_refused(tmp_path):
    """Before ``make_private``, and in the report; through the ledger they are welcome."""
    engine, model, optimizer, batches = make(tmp_path / "ledger")
    train(model, optimizer, batches)
    engine.privacy_report(1e-5)
    engine.accountant.history = [*engine.accountant.history, (1.0, 0.5, 7)]
    with pytest.raises(ValueError, match="accountant holds 11 steps and the ledger 4"):
        engine.privacy_report(1e-5)
    other = PrivacyEngine(ledger=tmp_path / "ledger")
    other.accountant.step(noise_multiplier=1.0, sample_rate=0.5)
    with pytest.raises(ValueError, match="accountant holds 5 steps and the ledger 4"):
        other.make_private(
            module=(bare := classifier()),
            optimizer=torch.optim.SGD(bare.parameters(), lr=0.1),
            data_loader=loader(64, 16),
            noise_multiplier=1.0,
        )
    ledger = PrivacyLedger(tmp_path / "ledger")
    with ledger.locked():
        ledger.charge(Event(1.0, 0.5), dataset_size=64, settings=SETTINGS)
    again, model, optimizer, batches = make(tmp_path / "ledger")
    train(model, optimizer, batches)
    assert sum(steps for _, _, steps in again.accountant.history) == 9


def test_two_engines_at_a_time_see_each_other(tmp_path):
    """Each step counts the steps that the other took before it; a target stops both together."""
    path = tmp_path / "l.jsonl"
    engine, model, optimizer, batches = make(path, target_epsilon=2.0, target_delta=1e-3, steps=8)
    alone = engine.remaining_steps()
    _, other_model, other_optimizer, other_batches = make(path, target_epsilon=2.0, target_delta=1e-3, steps=8)

    def both():
        while True:
            for mine, theirs in zip(batches, other_batches, strict=True):
                train(model, optimizer, [mine])
                train(other_model, other_optimizer, [theirs])

    with pytest.raises(PrivacyBudgetExceeded):
        both()
    assert optimizer.steps_taken + other_optimizer.steps_taken == alone
    assert len(PrivacyLedger(path).charges) == alone
    assert PrivacyEngine(ledger=path).get_epsilon(1e-3) <= 2.0


def test_a_pass_of_a_shuffled_loader_is_one_charge(tmp_path):
    _, model, optimizer, batches = make(tmp_path / "l.jsonl", poisson_sampling=False)
    train(model, optimizer, batches)
    assert PrivacyLedger(tmp_path / "l.jsonl").charges == [Event(1.0, 1.0, "shuffled")]


def test_lines_are_json_and_fill_sectors(tmp_path):
    written(tmp_path / "l.jsonl")
    lines = (tmp_path / "l.jsonl").read_bytes().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines]
    assert [entry["kind"] for entry in entries] == ["ledger", "run", "charge", "charge", "charge"]
    assert all(len(line) % SECTOR == 0 for line in lines)
    assert [entry["previous"] for entry in entries[1:]] == [entry["hash"] for entry in entries[:-1]]
    assert entries[3]["sample_rate"] == 0.1 + 1 / 100


# ------------------------------------------------------------------ written before the release


def releases_are_charged_first(monkeypatch, tmp_path, spoil=lambda engine, optimizer: None, mechanism="gaussian"):
    """Whether every draw of noise finds its charge in the file."""
    path = tmp_path / "l.jsonl"
    engine, model, optimizer, batches = make(path, mechanism=mechanism)
    spoil(engine, optimizer)
    found = []
    release = GaussianMechanism.release_gradients

    def look(self, *args, **kwargs):
        charges = len(PrivacyLedger(path).charges) if path.exists() else 0
        found.append(charges == len(found) + 1)
        release(self, *args, **kwargs)

    monkeypatch.setattr(GaussianMechanism, "release_gradients", look)
    train(model, optimizer, batches)
    assert len(found) == 4
    return all(found)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_charge_is_in_the_file_before_noise_is_drawn(monkeypatch, tmp_path, mechanism):
    assert releases_are_charged_first(monkeypatch, tmp_path, mechanism=mechanism)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_ledger_that_is_written_after_the_release_is_caught(monkeypatch, tmp_path, mechanism):
    def late(engine, optimizer):
        charge, step, waiting = optimizer.charge, optimizer.step, []
        optimizer.charge = waiting.append

        def step_then_charge(*args):
            step(*args)
            charge(waiting.pop())

        optimizer.step = step_then_charge

    assert not releases_are_charged_first(monkeypatch, tmp_path, late, mechanism)


def test_a_charge_that_cannot_be_written_stops_the_step(monkeypatch, tmp_path):
    """A full disk: no release, no trace in file or accountant; the next step goes on."""
    path = tmp_path / "l.jsonl"
    engine, model, optimizer, batches = make(path)
    batches = iter(batches)
    train(model, optimizer, [next(batches)])
    before, weights = path.read_bytes(), [p.detach().clone() for p in model.parameters()]
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, line: write(handle, line[: len(line) // 2]))
        with pytest.raises(OSError, match="disk full"):
            train(model, optimizer, [next(batches)])
    assert path.read_bytes() == before
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert engine.accountant.history == [(1.0, 0.25, 1)]
    train(model, optimizer, [next(batches)])
    assert len(PrivacyLedger(path).charges) == 2


def private_run(path, released, mechanism):
    """Train for ever, and note every release in the file ``released``, one byte each, after it happened."""
    torch.set_num_threads(1)
    _, model, optimizer, batches = make(path, mechanism=mechanism)
    handle = os.open(released, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    step = optimizer.step

    def noted(*args):
        step(*args)
        os.write(handle, b"x")

    optimizer.step = noted
    while True:
        train(model, optimizer, batches)


@pytest.mark.slow
@pytest.mark.parametrize(("mechanism", "deaths"), [("gaussian", 60), ("laplace", 20)])
def test_killed_at_random_points_nothing_is_lost(tmp_path, mechanism, deaths):
    """60 processes (20 with Laplace noise) are killed (SIGKILL) at random times, each continuing the ledger of the one before.

    After every death: charges >= releases, and at most one more for each death so far.
    """
    ledger, released = tmp_path / "l.jsonl", tmp_path / "released"
    rng = random.Random(7)
    deaths_with_steps = 0
    for death in range(1, deaths + 1):
        before = released.stat().st_size if released.exists() else 0
        child = os.fork()
        if child == 0:
            try:
                private_run(ledger, released, mechanism)
            finally:
                os._exit(1)  # it never returns; an error must not run pytest twice
        started = time.monotonic()
        while time.monotonic() - started < 20 and (released.stat().st_size if released.exists() else 0) == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        releases = released.stat().st_size
        deaths_with_steps += releases > before
        charges = len(PrivacyLedger(ledger).charges)
        assert releases <= charges <= releases + death
    engine = PrivacyEngine(ledger=ledger, accountant="pure" if mechanism == "laplace" else "vrdp")
    assert sum(steps for _, _, steps in engine.accountant.history) == charges
    assert deaths_with_steps == deaths


# ------------------------------------------------------------------ what is refused


def flip(lines, number, position):
    line = bytearray(lines[number - 1])
    line[position] ^= 1
    lines[number - 1] = bytes(line)


DAMAGE = {
    "a cheaper charge": (lambda ls: edit(ls, 4, lambda e: e.update(noise_multiplier=9.0)), 4, "changed"),
    "a flipped bit": (lambda ls: flip(ls, 3, 20), 3, "changed|damaged"),
    "a flipped bit in the padding": (lambda ls: flip(ls, 3, -5), 3, "changed|damaged"),
    "a line taken out": (lambda ls: ls.pop(3), 4, "missing"),
    "a line twice": (lambda ls: ls.insert(3, ls[3]), 5, "missing"),
    "two lines swapped": (lambda ls: ls.__setitem__(slice(2, 4), ls[3:1:-1]), 3, "missing"),
    "cut in the last line": (lambda ls: ls.__setitem__(-1, ls[-1][:100]), 5, "incomplete.*repair"),
    "cut in the middle": (lambda ls: ls.__setitem__(2, ls[2][:100]), 3, "damaged"),
    "a number that is none": (lambda ls: edit(ls, 4, lambda e: e.update(noise_multiplier="much")), 4, "changed"),
    "no ledger": (lambda ls: ls.__setitem__(slice(None), [b'{"a": 1}\n']), 1, "not a line"),
    "text": (lambda ls: ls.__setitem__(slice(None), [b"hello\n"]), 1, "not a line"),
    "another first line": (lambda ls: ls.pop(0), 1, "missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_ledger_is_refused_with_the_line(name, tmp_path):
    spoil, number, message = DAMAGE[name]
    path = tmp_path / "l.jsonl"
    written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    spoil(lines)
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=rf"l\.jsonl:{number}: .*({message})"):
        PrivacyEngine(ledger=path)


def test_an_incomplete_last_line_can_be_dropped_and_nothing_else(tmp_path):
    path = tmp_path / "l.jsonl"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[-SECTOR:][:77])
    assert repair(path) == 77
    assert path.read_bytes() == whole
    assert repair(path) == 0
    path.write_bytes(whole[:700] + b"?" + whole[701:] + b"rest")
    with pytest.raises(LedgerError, match=r"l\.jsonl:2"):
        repair(path)
    assert path.read_bytes().endswith(b"rest")


def test_a_ledger_of_another_dataset_or_unit_is_refused(tmp_path):
    path = tmp_path / "l.jsonl"
    _, model, optimizer, batches = make(path)
    train(model, optimizer, batches)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"l\.jsonl:1: .*dataset_size 64.*48"):
        make(path, records=48)
    with pytest.raises(LedgerError, match="unit"):
        PrivacyLedger(path).check_dataset(64, unit="one sender")
    assert path.read_bytes() == before


def test_a_file_that_shrinks_under_a_running_engine_is_refused(tmp_path):
    path = tmp_path / "l.jsonl"
    _, model, optimizer, batches = make(path)
    train(model, optimizer, batches)
    os.truncate(path, 3 * SECTOR)
    with pytest.raises(LedgerError, match="vanished"):
        train(model, optimizer, batches)


def test_nothing_is_written_before_the_first_charge(tmp_path):
    make(tmp_path / "l.jsonl")
    assert not (tmp_path / "l.jsonl").exists()


# ------------------------------------------------------------------ with checkpoints


def saved(tmp_path):
    """Take four steps, save, and take four more."""
    engine, model, optimizer, batches = make(tmp_path / "l.jsonl")
    train(model, optimizer, batches)
    engine.save_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    train(model, optimizer, batches)


def resume(tmp_path, ledger="l.jsonl", **kwargs):
    engine, model, optimizer, batches = make(None if ledger is None else tmp_path / ledger, **kwargs)
    engine.load_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    return engine, model, optimizer, batches


def test_steps_lost_with_an_old_checkpoint_stay_charged(tmp_path):
    saved(tmp_path)
    engine, model, optimizer, batches = resume(tmp_path)
    assert optimizer.steps_taken == 4
    assert engine.accountant.history == [(1.0, 0.25, 8)]
    train(model, optimizer, batches)
    assert engine.accountant.history == [(1.0, 0.25, 12)]


def test_a_ledger_that_lost_its_last_lines_does_not_fit_the_checkpoint(tmp_path):
    saved(tmp_path)
    os.truncate(tmp_path / "l.jsonl", 4 * SECTOR)
    with pytest.raises(LedgerError, match=r"l\.jsonl:\d+: .*missing at the end"):
        resume(tmp_path)


def test_checkpoint_and_ledger_belong_together(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="under a privacy ledger"):
        resume(tmp_path, ledger=None)
    _, model, optimizer, batches = make(tmp_path / "other.jsonl")
    train(model, optimizer, batches)
    train(model, optimizer, batches)
    with pytest.raises(LedgerError, match="hashes differ"):
        resume(tmp_path, ledger="other.jsonl")
    engine, model, optimizer, _ = make(None)
    engine.save_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    with pytest.raises(ValueError, match="without a ledger"):
        resume(tmp_path)
