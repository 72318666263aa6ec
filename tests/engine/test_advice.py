"""What is said before anything is spent: a promise that says little, noise that drowns the data, a target that is spent."""

import contextlib
import warnings

import pytest
import torch
from helpers import classifier, loader, train
from tiny_trainer import rows, trainer

from opacus_ac import PrivacyBudgetExceeded, PrivacyEngine
from opacus_ac.budget.advice import drowned, weak_promise
from opacus_ac.errors import WeakPrivacyWarning

TARGET = {"target_epsilon": 4.0, "target_delta": 1e-3, "steps": 20}
WEAK = {
    "delta of one record": (
        TARGET | {"target_delta": 1 / 64},
        "delta 0.015625 is not below 1/N = 0.0156.*Choose 0.001",
    ),
    "a large delta": (TARGET | {"target_delta": 0.1}, "Choose 0.001 or less"),
    "a large epsilon": (TARGET | {"target_epsilon": 25.0}, "epsilon 25 promises next to nothing.*factor of 7e.10"),
    "an absurd epsilon": (TARGET | {"target_epsilon": 1e9}, "Usual values lie between 1 and 10"),
    "small batches": ({"noise_multiplier": 4.0}, "noise of a step is 25 % of what its 16 records"),
    "small batches for a target": (TARGET | {"target_epsilon": 0.3}, "use larger batches, more than 64 records"),
}
FINE = {"a target": TARGET, "noise": {"noise_multiplier": 1.0}, "no noise": {"noise_multiplier": 0.0}}


def private(engine, **options):
    model = classifier()
    call = engine.make_private_with_epsilon if "target_epsilon" in options else engine.make_private
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return call(module=model, optimizer=optimizer, data_loader=loader(64, 16), max_grad_norm=1.0, **options)


@pytest.mark.parametrize("case", WEAK)
def test_the_engine_says_it_before_a_step(case):
    options, words = WEAK[case]
    engine = PrivacyEngine()
    with pytest.warns(WeakPrivacyWarning, match=words):
        private(engine, **options)
    assert engine.get_epsilon(1e-3) == 0


@pytest.mark.parametrize("case", FINE)
def test_usual_settings_are_passed_in_silence(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeakPrivacyWarning)
        private(PrivacyEngine(), **FINE[case])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_epsilon": 4.0, "target_delta": 0.1}, "delta 0.1 is not below 1/N"),
        ({"noise_multiplier": 1.0, "target_delta": 0.1}, "delta 0.1 is not below 1/N"),
        ({"target_epsilon": 50.0}, "epsilon 50 promises"),
        ({"noise_multiplier": 9.0}, "noise of a step"),
    ],
)
def test_the_trainer_says_it_before_a_step(tmp_path, settings, words):
    made = trainer(tmp_path, data=rows(64), settings=settings)
    with pytest.warns(WeakPrivacyWarning, match=words):
        made.create_optimizer()
    assert made.get_epsilon() == 0


def test_where_the_limits_are():
    assert weak_promise(None, 1e-3, 900) == []
    assert "1/N" in weak_promise(None, 1e-3, 1000)[0]
    assert "will hardly learn" in drowned(1.0, 0.0, 10)[0]


@pytest.mark.filterwarnings("ignore:budget has been spent already")
@pytest.mark.parametrize("accountant", ["vpld", "vrdp"])
def test_a_target_that_is_spent_already(tmp_path, accountant):
    ledger = tmp_path / "ledger"
    made = private(PrivacyEngine(accountant=accountant, ledger=ledger), **TARGET)
    with contextlib.suppress(PrivacyBudgetExceeded):
        for _ in range(20):
            train(*made)
    engine = PrivacyEngine(accountant=accountant, ledger=ledger)
    charged = engine.accountant.history
    with pytest.warns(WeakPrivacyWarning, match="the target is spent already"):
        private(engine, **TARGET)
    assert engine.accountant.history == charged
