"""Parts of a private optimizer: each describes and saves itself, a new one needs no edit elsewhere, a damaged state changes nothing."""

import copy

import pytest
import torch
from helpers import classifier, loader, train

from opacus_ac import PrivacyEngine
from opacus_ac.allocation import NoiseAllocation
from opacus_ac.budget import PrivacyLedger
from opacus_ac.checkpoint.file import digest
from opacus_ac.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.protocols.part import Part


def make(ledger=None, **options):
    model = classifier()
    engine = PrivacyEngine(ledger=ledger)
    arguments = {"noise_multiplier": 1.0, "data_loader": loader(), **options}
    return engine, *engine.make_private(module=model, optimizer=torch.optim.AdamW(model.parameters()), **arguments)


# ---------------------------------------------------------------- a part that nobody knows


class Planted(Part):
    """A part with a setting, plain values, tensors of parameters, and what is of one process alone."""

    by_parameter = ("marks",)
    of_one_process = ("own",)

    def __init__(self, parameters, setting=5):
        self.setting, self.own, self.count = setting, "mine", 0
        self.marks = [torch.zeros_like(p) if p.dim() > 1 else None for p in parameters]

    def public_settings(self):
        return {"planted": self.setting}

    def released(self):
        return ["a planted value"]

    def warnings(self):
        return ["a planted warning"]

    def state_dict(self):
        return {"count": self.count, "marks": list(self.marks), "own": self.own}

    def load_state_dict(self, state):
        self.count, self.marks, self.own = state["count"], list(state["marks"]), state["own"]


@pytest.fixture
def planted(monkeypatch):
    """Have every optimizer made from now on one more part; return the settings of those to come."""
    settings = {"setting": 5}
    parts = AdaptiveClipDPOptimizer.parts.fget

    def more(optimizer):
        if "planted" not in vars(optimizer):
            optimizer.planted = Planted(optimizer.measurement.moved, **settings)
        return {**parts(optimizer), "planted": optimizer.planted}

    monkeypatch.setattr(AdaptiveClipDPOptimizer, "parts", property(more))
    return settings


def test_a_new_part_is_in_ledger_and_report(planted, tmp_path):
    engine, model, optimizer, batches = make(tmp_path / "ledger")
    train(model, optimizer, batches)
    assert PrivacyLedger(tmp_path / "ledger").last_settings["planted"] == 5
    report = engine.privacy_report(1e-3)
    assert "a planted value" in report.released
    assert "a planted warning" in report.warnings


@pytest.mark.parametrize("folder", [False, True])
def test_a_new_part_is_in_a_checkpoint(planted, tmp_path, folder):
    engine, model, optimizer, batches = make()
    train(model, optimizer, batches)
    optimizer.planted.count, optimizer.planted.own = 7, "theirs"
    for mark in optimizer.planted.marks:
        if mark is not None:
            mark.uniform_()
    engine.save_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer, folder=folder)
    other, fresh, again, _ = make()
    other.load_checkpoint(path=tmp_path / "run", module=fresh, optimizer=again)
    assert again.planted.count == 7
    assert again.planted.own == ({} if folder else "theirs")
    assert [m is None for m in again.planted.marks] == [False, True, False, True]
    for mine, theirs in zip(again.planted.marks, optimizer.planted.marks, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("folder", [False, True])
def test_another_setting_of_a_new_part_is_refused(planted, tmp_path, folder):
    engine, model, optimizer, _ = make()
    engine.save_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer, folder=folder)
    planted["setting"] = 6
    other, fresh, again, _ = make()
    with pytest.raises(ValueError, match="planted = 5, this run has 6"):
        other.load_checkpoint(path=tmp_path / "run", module=fresh, optimizer=again)
    assert again.planted.marks[0].sum() == 0


def test_a_state_with_or_without_a_part_of_its_own_is_refused(planted, monkeypatch):
    _, _, optimizer, _ = make()
    state = optimizer.state_dict()
    monkeypatch.undo()
    _, _, plain, _ = make()
    with pytest.raises(ValueError, match=r"another planted \(True\) than this optimizer's \(False\)"):
        plain.load_state_dict(state)
    with pytest.raises(ValueError, match=r"another noise_allocation \(False\) than this optimizer's \(True\)"):
        make(noise_allocation=NoiseAllocation())[2].load_state_dict(plain.state_dict())


# ---------------------------------------------------------------- states that are damaged

#: (part, entry) that states of before do not have, and that :meth:`Part.load_state_dict` can therefore do without.
ADDED_LATER: set[tuple[str, str]] = set()

RUNS = {
    "gradients": {"noise_allocation": NoiseAllocation(), "loss_bound": 5.0},
    "paid allocation": {"noise_allocation": NoiseAllocation(source="paid")},
    "geometric": {"clip_policy": "geometric"},
    "forward only": {"zeroth_order": "dpzero"},
}


@pytest.mark.parametrize("run", RUNS)
def test_a_state_without_any_of_its_entries_changes_nothing(run):
    """Whatever entry of whatever part is missing is noticed before the first part has changed."""
    _, _, written, _ = make(**RUNS[run])
    whole = written.state_dict()
    _, _, optimizer, _ = make(**RUNS[run])
    optimizer.steps_taken, optimizer.max_grad_norm = 3, 0.25  # to tell what was loaded
    optimizer.noise_multiplier = 1.5
    before = digest(optimizer.state_dict())
    entries = [(name, key) for name, part in whole["opacus_ac"].items() if isinstance(part, dict) for key in part]
    assert len({name for name, _ in entries}) >= 4
    for name, key in entries:
        state = copy.deepcopy(whole)
        del state["opacus_ac"][name][key]
        if (name, key) in ADDED_LATER:
            make(**RUNS[run])[2].load_state_dict(state)
            continue
        with pytest.raises(ValueError, match=r"damaged|another|other"):
            optimizer.load_state_dict(state)
        assert digest(optimizer.state_dict()) == before, (name, key)
    optimizer.load_state_dict(whole)
    assert optimizer.steps_taken == 0


def test_a_state_of_before_there_were_allocations_is_read():
    _, _, written, _ = make()
    state = written.state_dict()
    state["opacus_ac"]["policy"]["bound"] = 0.5
    assert state["opacus_ac"].pop("allocation") is None
    _, _, optimizer, _ = make()
    optimizer.load_state_dict(state)
    assert optimizer.max_grad_norm == 0.5


def test_a_run_by_hand_and_one_with_a_plan_read_each_others_states():
    _, model, optimizer, _ = make()
    inner = torch.optim.AdamW(model.parameters())
    by_hand = AdaptiveClipDPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=16)
    by_hand.max_grad_norm = 0.5
    optimizer.load_state_dict(by_hand.state_dict())
    assert optimizer.max_grad_norm == 0.5
    optimizer.max_grad_norm = 0.75
    by_hand.load_state_dict(optimizer.state_dict())
    assert by_hand.max_grad_norm == 0.75
