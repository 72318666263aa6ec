"""PrivacyEngine: what it refuses, what it reports, and that a run continues exactly from its checkpoint."""

import copy
import json
import math

import numpy as np
import opacus
import pytest
import torch
from helpers import classifier, dataset, loader, loss_of, train
from opacus.schedulers import ExponentialNoise
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from opacus_ac import PrivacyBudgetExceeded, PrivacyEngine
from opacus_ac.accounting import Event, attack_bounds, attack_sentences, pld_epsilon
from opacus_ac.checkpoint.file import digest
from opacus_ac.errors import NotPrivateWarning
from opacus_ac.optimizer import AdaptiveClipDPOptimizer

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")


def make(engine=None, model=None, **kwargs):
    engine = engine or PrivacyEngine()
    model = model if model is not None else classifier()
    arguments = {
        "module": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "data_loader": loader(64, 16),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        **kwargs,
    }
    return (engine, *engine.make_private(**arguments))


def test_returns_what_users_of_opacus_expect():
    bare = classifier()
    engine, model, optimizer, batches = make(model=bare)
    assert isinstance(engine, opacus.PrivacyEngine)
    assert model is bare
    assert isinstance(make(grad_sample_mode="hooks")[1], opacus.GradSampleModule)
    assert isinstance(optimizer, AdaptiveClipDPOptimizer)
    assert isinstance(optimizer, opacus.optimizers.DPOptimizer)
    assert isinstance(batches, DataLoader)


@pytest.mark.parametrize("accountant", ["vrdp", "rdp", "prv", "gdp"])
def test_accountants_of_opacus_work(accountant):
    engine, model, optimizer, batches = make(PrivacyEngine(accountant=accountant))
    train(model, optimizer, batches)
    epsilon = engine.get_epsilon(1e-3)
    assert epsilon == math.inf if accountant == "gdp" else 0 < epsilon < 10
    assert engine.accountant.history == [(1.0, 0.25, 4)]


def trained_twice(mode="bk"):
    _, model, _, _ = make(grad_sample_mode=mode)
    return model


def half(model):
    model[0].half()
    return model


def compiled(model):
    """What ``torch.compile`` returns, also where TORCHDYNAMO_DISABLE turns it off."""
    from torch._dynamo.eval_frame import DisableContext, OptimizedModule

    return OptimizedModule(model, DisableContext())


class Gate(nn.Module):
    """A layer with two inputs: no rule knows it, and functorch replays layers of one input only."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x, gate):
        return x * gate * self.scale


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.out = Gate(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.out(self.gate(x, x))


BAD = {
    "missing rule": (lambda: {"model": Gated(), "grad_sample_mode": "hooks"}, ValueError, r"gate.*register_rule"),
    "already wrapped": (lambda: {"model": trained_twice()}, ValueError, "private already"),
    "already wrapped by hooks": (lambda: {"model": trained_twice("hooks")}, ValueError, "private already"),
    "already private around": (lambda: {"model": nn.Sequential(trained_twice())}, ValueError, "private already"),
    "already private inside": (lambda: {"model": trained_twice("hooks")._module}, ValueError, "private already"),
    "compiled": (lambda: {"model": compiled(classifier())}, ValueError, "torch.compile"),
    "batch second": (lambda: {"batch_first": False}, ValueError, "batch_first"),
    "other parameters": (
        lambda: {"optimizer": torch.optim.SGD(classifier().parameters(), lr=1.0)},
        ValueError,
        "Module parameters are different",
    ),
    "weighted sampler": (
        lambda: {"data_loader": DataLoader(dataset(), sampler=WeightedRandomSampler([1.0] * 64, 64), batch_size=8)},
        ValueError,
        "WeightedRandomSampler",
    ),
    "rate above one": (lambda: {"data_loader": loader(8, 16)}, ValueError, "exceed"),
    "negative noise": (lambda: {"noise_multiplier": -1.0}, ValueError, "noise_multiplier"),
    "nan noise": (lambda: {"noise_multiplier": math.nan}, ValueError, "noise_multiplier"),
    "text noise": (lambda: {"noise_multiplier": "1"}, ValueError, "noise_multiplier"),
    "negative bound": (lambda: {"max_grad_norm": -1.0}, ValueError, "max_grad_norm"),
    "bound per layer": (lambda: {"max_grad_norm": [1.0, 1.0]}, ValueError, "max_grad_norm"),
    "eval mode": (lambda: {"model": classifier().eval()}, UnsupportedModuleError, "training mode"),
    "batch norm": (
        lambda: {"model": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))},
        UnsupportedModuleError,
        "BatchNorm",
    ),
    "half precision": (lambda: {"model": half(classifier())}, ValueError, "float32"),
    "nothing to train": (lambda: {"model": classifier().requires_grad_(False)}, ValueError, "no trainable"),
    "mode": (lambda: {"grad_sample_mode": "ghost"}, ValueError, "grad_sample_mode"),
    "clipping": (lambda: {"clipping": "per_layer"}, ValueError, "clipping"),
    "reduction": (lambda: {"loss_reduction": "max"}, ValueError, "loss_reduction"),
    "policy": (lambda: {"clip_policy": "median"}, ValueError, "clip_policy"),
    "policy with flat": (lambda: {"clipping": "flat", "clip_policy": "percentile"}, ValueError, "clip_policy"),
    "preset": (lambda: {"preset": "best"}, ValueError, "preset"),
    "physical batch": (lambda: {"max_physical_batch_size": 0}, ValueError, "max_physical_batch_size"),
    "schedule": (lambda: {"batch_size_schedule": [100]}, ValueError, "exceed 1"),
    "ema": (lambda: {"ema_decay": 1.0}, ValueError, "ema_decay"),
    "clip rate": (lambda: {"target_clip_rate": 1.2}, ValueError, "target_clip_rate"),
}


def test_weights_without_values_are_refused():
    model = classifier().to("meta")
    with pytest.raises(ValueError, match=r"0.weight is on the device meta.*move the model to the processor"):
        make(model=model)
    assert all(not m._forward_pre_hooks for m in model.modules())


class Elsewhere(torch.Tensor):
    """A weight that says it is on a device which this machine does not have."""

    @staticmethod
    def __new__(cls, device, trained):
        weight = torch.Tensor._make_wrapper_subclass(cls, (8, 4), dtype=torch.float64, device=device)
        weight._is_param = True
        return weight.requires_grad_(trained)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} touched a weight of a device that is refused")


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("device", "why"),
    [("mps", "no float64"), ("xpu", "public seed"), ("hpu", "public seed"), ("privateuseone", "public seed")],
)
def test_devices_that_are_not_handled_are_refused_by_name(device, why, trained):
    """ "cuda" and the processor are handled; what is frozen counts too, because masks may be drawn there."""
    model = classifier()
    model[0]._parameters["weight"] = Elsewhere(device, trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(
        ValueError, match=rf"0.weight is on the device {device}.*{why}.*move the model to the processor"
    ):
        make(model=model, optimizer=optimizer)
    assert all(not m._forward_pre_hooks for m in model.modules())


def count_hooks(model):
    """How many hooks of each kind every module has, and which attributes of its own."""
    return {
        name: {key: len(value) if "_hooks" in key else 0 for key, value in module.__dict__.items() if value is not None}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_what_it_promises_and_changes_nothing(name):
    build, error, message = BAD[name]
    arguments = build()
    model = arguments.pop("model", None) or classifier()
    bare = getattr(model, "_module", model)
    before = {k: v.clone() for k, v in bare.state_dict().items()}
    hooks = count_hooks(bare)
    engine = PrivacyEngine()
    with pytest.raises(error, match=message):
        make(engine, model, **arguments)
    assert count_hooks(bare) == hooks
    assert all(torch.equal(v, before[k]) for k, v in bare.state_dict().items())
    assert len(engine.accountant) == 0
    if not name.startswith("already") and "model" not in build():
        assert make(engine, model)  # the same model and engine still work


@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_a_failure_while_attaching_takes_everything_off(monkeypatch, mode):
    import opacus_ac.grad_sample.one_backward.capture as capture
    from opacus_ac.engine import attach

    def fail(*args, **kwargs):
        if mode == "hooks":
            whole(*args, **kwargs)
        elif len(attached) < 2:
            attached.append(1)
            return whole(*args, **kwargs)
        raise RuntimeError("planted")

    attached = []
    owner, name = (attach, "HookedModel") if mode == "hooks" else (nn.Module, "register_forward_hook")
    assert capture.Capture
    whole = getattr(owner, name)
    model = classifier()
    before = count_hooks(model)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RuntimeError, match="planted"):
        make(model=model, grad_sample_mode=mode)
    monkeypatch.undo()
    assert count_hooks(model) == before
    assert not any(hasattr(p, "grad_sample") or hasattr(p, "summed_grad") for p in model.parameters())
    make(model=model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"accountant": "moments"}, "moments")],
)
def test_what_this_version_does_not_have_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrivacyEngine(**arguments)


def test_secure_mode_hardens_gradient_histogram_and_loss():
    """All Gaussians of a step are sums of four; draws of batches come from the same kind of stream."""
    engine, model, optimizer, batches = make(PrivacyEngine(secure_mode=True), loss_bound=5.0)
    for batch in batches:
        optimizer.zero_grad()
        losses = loss_of(model, batch, "none")
        losses.mean().backward()
        optimizer.record_losses(losses)
        optimizer.step()
    streams = [optimizer.mechanism.stream, optimizer.mechanism._statistics_stream, batches.batch_sampler.stream]
    assert all("AES-256-CTR" in s.description and "sums of four" in s.description for s in streams)
    assert all(sampler._summed == 4 for stream in streams[:2] for sampler in stream._samplers)
    assert "sums of four" in str(engine.privacy_report(1e-3))
    assert "sums of four" not in make()[2].mechanism.stream.description


def test_secure_mode_with_a_seeded_generator_is_refused():
    with pytest.raises(ValueError, match="noise_generator"):
        make(PrivacyEngine(secure_mode=True), noise_generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="secure_mode"):
        AdaptiveClipDPOptimizer(
            torch.optim.SGD(classifier().parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
            expected_batch_size=4, secure_mode=True, generator=torch.Generator(),
        )  # fmt: skip


def test_raw_rule_reports_infinity_and_says_why():
    with pytest.warns(NotPrivateWarning, match="un-noised gradient norms"):
        engine, model, optimizer, batches = make(clip_policy="raw_percentile")
    train(model, optimizer, batches)
    report = engine.privacy_report(1e-3)
    assert engine.get_epsilon(1e-3) == math.inf == report.epsilon
    assert json.loads(report.to_json())["epsilon"] == "infinity"
    assert "no finite epsilon" in str(report)
    assert report.attack_sentences()[0].startswith("No bound on what an attacker can tell holds")


@pytest.mark.parametrize("accountant", ["vrdp", "rdp", "prv"])
def test_noise_zero_reports_infinity(accountant):
    engine, model, optimizer, batches = make(PrivacyEngine(accountant=accountant), noise_multiplier=0.0)
    train(model, optimizer, batches)
    assert engine.get_epsilon(1e-3) == math.inf


def test_report_states_the_claim():
    engine, model, optimizer, batches = make(PrivacyEngine(accountant="vrdp"), loss_bound=None)
    train(model, optimizer, batches)
    report = engine.privacy_report(1e-2)
    assert report.bounds["vrdp"] == engine.get_epsilon(1e-2) > report.epsilon > 0
    assert report.accountant == "privacy loss distribution"
    assert report.epsilon == pld_epsilon({Event(1.0, 0.25): 4}, 1e-2)
    assert (report.dataset_size, report.steps, report.history) == (64, 4, [(1.0, 0.25, 4)])
    assert report.gradient_noise_multiplier == pytest.approx(math.sqrt(1.0412))
    assert report.attacks == attack_bounds({Event(1.0, 0.25): 4})
    assert attack_sentences(json.loads(report.to_json())) == report.attack_sentences()
    assert engine.privacy_report(1e-2, tight=False).attacks is None
    text = str(report)
    assert f"attackers       {report.attack_sentences()[1]}" in text
    for phrase in ("add/remove one record", "poisson", "N = 64", "q = 0.25", "histogram of gradient norms", "AES-256"):
        assert phrase in text
    assert not report.warnings
    assert any("1/N" in warning for warning in engine.privacy_report(0.1).warnings)
    with pytest.raises(ValueError, match="delta"):
        engine.privacy_report()
    with pytest.raises(ValueError, match="make_private"):
        PrivacyEngine().privacy_report(1e-3)


BUDGETS = [(a, s) for a in ("vrdp", "vpld") for s in ("poisson", "shuffled", "fixed_size", "truncated_poisson")]


@pytest.mark.parametrize(("accountant", "sampling"), [*BUDGETS, ("rdp", "poisson"), ("rdp", "shuffled")])
def test_budget_is_spent_and_not_exceeded(accountant, sampling):
    model = classifier()
    engine = PrivacyEngine(accountant=accountant)
    model, optimizer, batches = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader(64, 16, shuffle=True),
        target_epsilon=3.0, target_delta=1e-3, epochs=2, max_grad_norm=1.0, sampling=sampling,
        max_batch_size=24 if sampling == "truncated_poisson" else None,
    )  # fmt: skip
    planned = engine.remaining_steps()
    assert planned >= 8

    def forever():
        while True:
            train(model, optimizer, batches)

    with pytest.raises(PrivacyBudgetExceeded, match="not taken"):
        forever()
    assert optimizer.steps_taken == planned
    assert 2.9 < engine.get_epsilon(1e-3) <= 3.0
    assert engine.remaining_steps() == 0
    assert engine.privacy_report().delta == 1e-3


def with_target(accountant="vrdp", **kwargs):
    engine, model = PrivacyEngine(accountant=accountant), classifier()
    arguments = {"target_epsilon": 3.0, "target_delta": 1e-3, "steps": 12, "max_grad_norm": 1.0, **kwargs}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return (
        engine,
        *engine.make_private_with_epsilon(module=model, optimizer=optimizer, data_loader=loader(), **arguments),
    )


def until_the_budget_is_spent(model, optimizer, batches):
    def for_long():
        for _ in range(1000):
            train(model, optimizer, batches)

    with pytest.raises(PrivacyBudgetExceeded):
        for_long()


def test_a_schedule_that_follows_releases_is_under_a_privacy_filter():
    """Batches grow when the released clip rate is high: the Renyi divergence at the preset order stays in its budget."""
    made = []

    def follow(step):
        released = made[0][2].released if made else None
        return 16 if released is None or released.clip_rate < 0.9 else 24

    made.append(with_target(batch_size_schedule=follow))
    engine, model, optimizer, batches = made[0]
    until_the_budget_is_spent(model, optimizer, batches)
    limit = engine._account.guard._filter
    assert {rate for _, rate, _ in engine.accountant.history} == {16 / 64, 24 / 64}
    assert 0.85 * limit.budget < engine.accountant.spent_rdp(limit.order) <= limit.budget * (1 + 1e-9)
    report = engine.privacy_report()
    assert report.epsilon == pytest.approx(3.0)
    assert "filter" in report.accountant
    assert not report.warnings
    # Only the filter's epsilons hold, whose whole budget counts.
    spent = attack_bounds({Event(noise, rate): steps for noise, rate, steps in engine.accountant.history})
    assert report.attacks.method.startswith("(epsilon, delta) pairs")
    assert 1 > report.attacks.true_positive_rates[0.01] > spent.true_positive_rates[0.01]


def test_noise_that_changes_is_under_the_filter_or_refused():
    engine, model, optimizer, batches = with_target()
    train(model, optimizer, batches)
    optimizer.noise_multiplier *= 1.5
    until_the_budget_is_spent(model, optimizer, batches)
    assert engine.privacy_report().epsilon == pytest.approx(3.0)
    engine, model, optimizer, batches = with_target("vpld")
    train(model, optimizer, batches)
    optimizer.noise_multiplier *= 1.5
    with pytest.raises(ValueError, match="no privacy filter"):
        train(model, optimizer, batches)


@pytest.mark.parametrize("accountant", ["vpld", "rdp"])
def test_a_schedule_that_may_follow_releases_needs_the_filter(accountant):
    with pytest.raises(ValueError, match="privacy filter"):
        with_target(accountant, batch_size_schedule=lambda step: 16)


def test_rules_without_a_target_are_reported_with_a_warning():
    engine, model, optimizer, batches = make(batch_size_schedule=lambda step: 16)
    train(model, optimizer, batches)
    assert any("rule" in warning for warning in engine.privacy_report(1e-3).warnings)
    engine, model, optimizer, batches = make()
    train(model, optimizer, batches)
    optimizer.noise_multiplier = 2.0
    train(model, optimizer, batches)
    assert any("rule" in warning for warning in engine.privacy_report(1e-3).warnings)


def test_a_tighter_accountant_needs_less_noise():
    noises = [with_target(accountant, epochs=None)[2].noise_multiplier for accountant in ("vrdp", "vpld")]
    assert 0.6 < noises[1] / noises[0] < 0.98


def test_a_second_run_under_a_spent_budget_stops_at_once():
    engine, model, optimizer, batches = with_target()
    until_the_budget_is_spent(model, optimizer, batches)
    again = classifier()
    with pytest.warns(UserWarning, match="spent already"):
        _, optimizer, batches = engine.make_private_with_epsilon(
            module=again, optimizer=torch.optim.SGD(again.parameters(), lr=0.1), data_loader=loader(),
            target_epsilon=1.0, target_delta=1e-3, steps=12,
        )  # fmt: skip
    assert engine.remaining_steps() == 0
    until_the_budget_is_spent(again, optimizer, batches)
    assert optimizer.steps_taken == 0


def test_refused_step_releases_nothing():
    model = classifier()
    engine = PrivacyEngine()
    model, optimizer, batches = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader(64, 16),
        target_epsilon=1.0, target_delta=1e-3, steps=1, max_grad_norm=1.0,
    )  # fmt: skip
    train(model, optimizer, [next(iter(batches))])
    before, released = [p.detach().clone() for p in model.parameters()], optimizer.released
    history = engine.accountant.history
    for batch in batches:
        with pytest.raises(PrivacyBudgetExceeded):
            train(model, optimizer, [batch])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.released is released
    assert engine.accountant.history == history


def test_schedule_is_calibrated_as_it_will_run():
    model = classifier()
    engine = PrivacyEngine()
    model, optimizer, batches = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader(64, 16),
        target_epsilon=2.0, target_delta=1e-3, epochs=2, max_grad_norm=1.0, batch_size_schedule=[4, 8, 16, 32],
    )  # fmt: skip
    for _ in range(2):
        train(model, optimizer, batches)
    assert 1.95 < engine.get_epsilon(1e-3) <= 2.0
    with pytest.raises(ValueError, match="vrdp"):
        PrivacyEngine(accountant="prv").make_private_with_epsilon(
            module=classifier(), optimizer=optimizer, data_loader=loader(64, 16), target_epsilon=2.0,
            target_delta=1e-3, epochs=2, batch_size_schedule=[4, 8],
        )  # fmt: skip


@pytest.mark.parametrize("arguments", [{}, {"epochs": 1, "steps": 4}])
def test_epochs_or_steps(arguments):
    model = classifier()
    with pytest.raises(ValueError, match="epochs or steps"):
        PrivacyEngine().make_private_with_epsilon(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader(),
            target_epsilon=1.0, target_delta=1e-3, **arguments,
        )  # fmt: skip


CONTINUED = {
    "default": {},
    "geometric": {"clip_policy": "geometric"},
    "raw": {"clip_policy": "raw_percentile"},
    "flat": {"clipping": "flat"},
    "no EMA": {"ema_decay": None, "lr_control": False},
    "schedule": {"batch_size_schedule": [8, 16, 32]},
    "split": {"max_physical_batch_size": 5},
}


@pytest.mark.parametrize("name", CONTINUED)
def test_resumed_run_equals_the_uninterrupted_one(name, tmp_path):
    """Three passes, or one pass, a checkpoint in a file, a new process's objects, and two passes: the same to the bit."""

    def start():
        generator = torch.Generator().manual_seed(11)
        return make(**CONTINUED[name], noise_generator=generator, target_clip_rate=0.5)

    engine, model, optimizer, batches = start()
    for _ in range(3):
        train(model, optimizer, batches)
    first_engine, first_model, first_optimizer, first_batches = start()
    train(first_model, first_optimizer, first_batches)
    path = tmp_path / "run.pt"
    first_engine.save_checkpoint(path=path, module=first_model, optimizer=first_optimizer, checkpoint_dict={"note": 5})
    again, again_model, again_optimizer, again_batches = start()
    rest = again.load_checkpoint(path=path, module=again_model, optimizer=again_optimizer)
    assert rest == {"note": 5}
    assert again_optimizer.max_grad_norm == first_optimizer.max_grad_norm
    for _ in range(2):
        train(again_model, again_optimizer, again_batches)
    assert again_optimizer.max_grad_norm == optimizer.max_grad_norm
    assert again_optimizer.released.lr_multiplier == optimizer.released.lr_multiplier
    assert again_optimizer.steps_taken == optimizer.steps_taken == 12
    assert again.get_epsilon(1e-3) == engine.get_epsilon(1e-3)
    assert again.accountant.history == engine.accountant.history
    with again_optimizer.ema_weights(), optimizer.ema_weights():
        for ours, theirs in zip(again_model.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(again_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_secret_streams_are_not_in_the_checkpoint(tmp_path):
    engine, model, optimizer, batches = make()
    train(model, optimizer, batches)
    engine.save_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert state["sampling_stream"] == {}
    mechanism = state["optimizer_state_dict"]["opacus_ac"]["mechanism"]
    assert mechanism == {"noise_multiplier": 1.0, "stream": {}, "statistics_stream": {}}
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def other_model(state):
    state["module_state_dict"]["0.weight"] = torch.zeros(3, 3)


MISFITS = {
    "no optimizer": (lambda state: state.pop("optimizer_state_dict"), "optimizer_state_dict"),
    "no digest": (lambda state: state.pop("digest"), "digest"),
    "of Opacus": (lambda state: state["optimizer_state_dict"].pop("opacus_ac"), "opacus_ac"),
    "other model": (other_model, "0.weight"),
    "other accountant": (lambda state: state["privacy_accountant_state_dict"].update(mechanism="prv"), "prv"),
    "other policy": (lambda s: s["optimizer_state_dict"]["opacus_ac"]["policy"].update(name="fixed"), "clip_policy"),
    "other version": (lambda s: s["optimizer_state_dict"]["opacus_ac"].update(version=99), "version"),
    "other EMA": (lambda s: s["optimizer_state_dict"]["opacus_ac"].update(ema=None), "ema_decay"),
    "other noise": (lambda s: s["privacy_settings"].update(noise_multiplier=0.1), "noise_multiplier = 0.1"),
    "other N": (lambda s: s["privacy_settings"].update(dataset_size=10), "dataset_size = 10"),
    "other sampling": (lambda s: s["privacy_settings"].update(sampling="shuffled"), "sampling = 'shuffled'"),
    "other optimizer": (lambda s: s["privacy_settings"].update(inner_optimizer="Adam"), "inner_optimizer = 'Adam'"),
    "of a ledger": (lambda s: s.update(ledger={"lines": 3, "hash": "x"}), "ledger"),
}
TAMPERED = {
    "a weight": lambda state: state["module_state_dict"]["0.bias"].add_(1e-6),
    "the account": lambda state: state["privacy_accountant_state_dict"].update(history=[]),
    "the step count": lambda state: state["optimizer_state_dict"]["opacus_ac"].update(steps_taken=0),
    "a name": lambda state: state.update(note=5),
}


def refused_without_a_trace(tmp_path, spoil, message, sign):
    """Write a checkpoint, spoil it, and load it into a fresh engine, whose state must stay as it was."""
    engine, model, optimizer, batches = make()
    train(model, optimizer, batches)
    engine.save_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    spoil(state)
    if sign and "digest" in state:
        state["digest"] = digest(state)
    torch.save(state, tmp_path / "spoilt.pt")
    fresh_engine, fresh_model, fresh_optimizer, _ = make()
    before = [p.detach().clone() for p in fresh_model.parameters()]
    inner = copy.deepcopy(fresh_optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        fresh_engine.load_checkpoint(path=tmp_path / "spoilt.pt", module=fresh_model, optimizer=fresh_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, fresh_model.parameters(), strict=True))
    assert digest(inner) == digest(fresh_optimizer.state_dict())
    assert len(fresh_engine.accountant) == 0
    assert fresh_optimizer.steps_taken == 0


@pytest.mark.parametrize("name", MISFITS)
def test_checkpoint_that_does_not_fit_is_refused_before_anything_changes(name, tmp_path):
    refused_without_a_trace(tmp_path, *MISFITS[name], sign=True)


@pytest.mark.parametrize("name", TAMPERED)
def test_checkpoint_that_was_changed_is_refused(name, tmp_path):
    refused_without_a_trace(tmp_path, TAMPERED[name], "changed after it was written", sign=False)


def test_a_checkpoint_without_what_a_scheduler_needs_loads_nothing(tmp_path):
    engine, model, optimizer, batches = make()
    train(model, optimizer, batches)
    engine.save_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    fresh_engine, fresh_model, fresh_optimizer, _ = make()
    scheduler = ExponentialNoise(fresh_optimizer, gamma=0.9)
    with pytest.raises(ValueError, match="noise_scheduler_state_dict"):
        fresh_engine.load_checkpoint(
            path=tmp_path / "run.pt", module=fresh_model, optimizer=fresh_optimizer, noise_scheduler=scheduler
        )
    assert len(fresh_engine.accountant) == fresh_optimizer.steps_taken == 0


def test_what_an_engine_spent_stays_spent_when_it_loads_a_checkpoint(tmp_path):
    """Going back to an old checkpoint does not take back what was released since; foreign steps are added."""
    engine, model, optimizer, batches = make()
    train(model, optimizer, batches)
    engine.save_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    train(model, optimizer, batches)
    engine.load_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    assert (optimizer.steps_taken, engine.accountant.history) == (4, [(1.0, 0.25, 8)])
    twin, twin_model, twin_optimizer, twin_batches = make()  # as many steps of the same kind, but other ones
    train(twin_model, twin_optimizer, twin_batches)
    with pytest.warns(UserWarning, match="sum of both"):
        twin.load_checkpoint(path=tmp_path / "run.pt", module=twin_model, optimizer=twin_optimizer)
    assert twin.accountant.history == [(1.0, 0.25, 8)]
    twin.load_checkpoint(path=tmp_path / "run.pt", module=twin_model, optimizer=twin_optimizer)
    assert twin.accountant.history == [(1.0, 0.25, 8)]
    other, model, optimizer, batches = make(data_loader=loader(64, 8))
    train(model, optimizer, batches)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    state["privacy_settings"]["expected_batch_size"] = 8.0
    torch.save({**state, "digest": digest(state)}, tmp_path / "other.pt")
    with pytest.warns(UserWarning, match="sum of both"):
        other.load_checkpoint(path=tmp_path / "other.pt", module=model, optimizer=optimizer)
    assert other.accountant.history == [(1.0, 0.125, 8), (1.0, 0.25, 4)]


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"module_state_dict": Evil()}, tmp_path / "evil.pt")
    engine, model, optimizer, _ = make()
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        engine.load_checkpoint(path=tmp_path / "evil.pt", module=model, optimizer=optimizer)


@pytest.mark.parametrize("mode", ["bk", "hooks", "functorch"])
def test_detach_leaves_an_ordinary_model(mode):
    bare = classifier()
    hooks, attributes = count_hooks(bare), [set(p.__dict__) for p in bare.parameters()]
    engine, model, optimizer, batches = make(model=bare, grad_sample_mode=mode)
    train(model, optimizer, batches)
    assert engine.detach(model) is bare
    assert count_hooks(bare) == hooks
    assert [set(p.__dict__) for p in bare.parameters()] == attributes
    assert all(p.grad is None and p.requires_grad for p in bare.parameters())
    with pytest.raises(ValueError, match="no hooks"):
        engine.detach(bare)
    make(model=bare)


def test_without_wrapping_the_model_itself_is_trained():
    bare = classifier()
    engine, hooks, optimizer, batches = make(model=bare, wrap_model=False, grad_sample_mode="hooks")
    train(bare, optimizer, batches)
    assert optimizer.steps_taken == 4
    engine.detach(bare)
    assert not hasattr(hooks, "forward")


def test_automatic_and_flat_release_the_gradient_alone():
    for clipping in ("flat", "automatic"):
        engine, model, optimizer, batches = make(clipping=clipping)
        train(model, optimizer, batches)
        assert optimizer.released.clip_rate is None
        assert optimizer.released.gradient_noise_multiplier == 1.0
        assert engine.privacy_report(1e-3).released == ["the sum of clipped gradients"]


def test_paper_preset_is_published_rule_with_private_statistics():
    engine, model, optimizer, batches = make(preset="paper", max_grad_norm=None)
    assert optimizer.max_grad_norm == 3.0
    assert not optimizer.normalize
    train(model, optimizer, batches)
    assert math.isfinite(engine.get_epsilon(1e-3))
    assert (optimizer.control.target, optimizer.control.band) == (0.2, 0.1)


def test_wider_statistics_cost_noise():
    multipliers = [
        make(histogram_weight=weight, loss_bound=bound)[2].mechanism.gradient_multiplier(
            make(histogram_weight=weight, loss_bound=bound)[2].statistics
        )
        for weight, bound in [(0.0, None), (None, None), (None, 5.0), (1.0, 5.0)]
    ]
    np.testing.assert_allclose(multipliers, [1.0, math.sqrt(1.0412), math.sqrt(1.0824), math.sqrt(2.0412)])
