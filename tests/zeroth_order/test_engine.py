"""``make_private(zeroth_order=...)``: engine, account, ledger, budget, checkpoints, dashboards, transformers models."""

import copy
import math

import pytest
import torch
from helpers import classifier, dataset, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zeroth import flat, llama

import opacus_ac
from opacus_ac import AdaptiveClipDPOptimizer, PrivacyBudgetExceeded, PrivacyEngine
from opacus_ac.accounting import Event
from opacus_ac.allocation import NoiseAllocation
from opacus_ac.budget import PrivacyLedger
from opacus_ac.errors import SamplingWarning
from opacus_ac.zeroth_order import Pruning, Stages, ZerothOrderDPOptimizer, ZerothOrderSettings, preset, record_losses

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")
SETTINGS = ZerothOrderSettings(num_directions=4, direction_seed=5)


def make(engine=None, model=None, target=None, steps=8, **kwargs):
    engine = engine or PrivacyEngine()
    model = classifier().eval() if model is None else model
    arguments = {
        "module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.5), "data_loader": loader(64, 16),
        "max_grad_norm": 1.0, "zeroth_order": SETTINGS, **kwargs,
    }  # fmt: skip
    if target is not None:
        made = engine.make_private_with_epsilon(target_epsilon=target, target_delta=1e-3, steps=steps, **arguments)
    else:
        made = engine.make_private(**{"noise_multiplier": 1.0, **arguments})
    return (engine, *made)


def losses(model, batch):
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets, reduction="none")


def take(model, optimizer, batches):
    for batch in batches:
        optimizer.step(lambda: losses(model, batch))  # noqa: B023


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- account


def test_returns_the_model_itself_and_an_optimizer_of_opacus():
    bare = classifier().eval()
    engine, model, optimizer, batches = make(model=bare)
    assert model is bare
    assert isinstance(optimizer, ZerothOrderDPOptimizer)
    assert isinstance(optimizer, AdaptiveClipDPOptimizer)
    assert len(batches) == 4
    assert engine.detach(model) is bare
    assert make(zeroth_order="aggzo")[2].settings == preset("aggzo")
    assert make(zeroth_order="dpzero")[2].settings.num_directions == 1


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("accountant", ["vrdp", "rdp", "prv", "gdp"])
def test_a_step_costs_one_subsampled_gaussian_whatever_the_number_of_directions(accountant, count):
    settings = ZerothOrderSettings(num_directions=count)
    engine, model, optimizer, batches = make(PrivacyEngine(accountant=accountant), zeroth_order=settings)
    take(model, optimizer, batches)
    assert engine.accountant.history == [(1.0, 0.25, 4)]
    ordinary = PrivacyEngine(accountant=accountant)
    ordinary.accountant.history = [(1.0, 0.25, 4)]
    assert engine.get_epsilon(1e-3) == ordinary.get_epsilon(1e-3)


def test_charges_are_in_the_ledger_before_the_release(tmp_path):
    _engine, model, optimizer, batches = make(PrivacyEngine(ledger=tmp_path / "ledger"))
    seen = []
    real = optimizer.mechanism.release_gradients

    def release(*args, **kwargs):
        seen.append(len(PrivacyLedger(tmp_path / "ledger").charges))
        return real(*args, **kwargs)

    optimizer.mechanism.release_gradients = release
    take(model, optimizer, batches)
    assert seen == [1, 2, 3, 4]
    assert PrivacyLedger(tmp_path / "ledger").charges == [Event(1.0, 0.25)] * 4
    assert '"num_directions":4' in (tmp_path / "ledger").read_text()


def test_the_step_that_would_exceed_the_budget_changes_nothing_at_all():
    engine, model, optimizer, batches = make(target=4.0, steps=3)
    assert engine.remaining_steps() == 3
    with pytest.raises(PrivacyBudgetExceeded):
        take(model, optimizer, batches)
    assert optimizer.steps_taken == 3
    # A later attempt does not even call the closure.
    before = flat(model).clone()
    calls = []
    next(iter(batches))
    with pytest.raises(PrivacyBudgetExceeded):
        optimizer.step(lambda: calls.append(1))
    assert calls == []
    assert torch.equal(flat(model), before)
    assert 3.5 < engine.get_epsilon(1e-3) <= 4.0


def test_shuffled_passes_are_charged_as_passes():
    engine, model, optimizer, batches = make(poisson_sampling=False)
    take(model, optimizer, batches)
    take(model, optimizer, batches)
    assert engine.accountant.history == [(1.0, 1.0, 2)]


@pytest.mark.parametrize(
    "kwargs", [{"sampling": "fixed_size"}, {"sampling": "truncated_poisson", "max_batch_size": 20}], ids=str
)
def test_other_samplings_work(kwargs):
    engine, model, optimizer, batches = make(**kwargs)
    take(model, optimizer, batches)
    assert sum(engine.accountant.counts().values()) == 4
    assert 0 < engine.get_epsilon(1e-3) < math.inf


def test_a_batch_that_the_loader_did_not_draw_is_charged_at_rate_one():
    engine, model, optimizer, _batches = make()
    with pytest.warns(SamplingWarning):
        optimizer.step(lambda: losses(model, dataset(8).tensors))
    assert engine.accountant.history == [(1.0, 1.0, 1)]


def test_a_second_step_on_one_batch_loses_the_amplification():
    engine, model, optimizer, batches = make()
    for batch in batches:
        optimizer.step(lambda: losses(model, batch))  # noqa: B023
        with pytest.warns(SamplingWarning):
            optimizer.step(lambda: losses(model, batch))  # noqa: B023
        break
    assert engine.accountant.history == [(1.0, 0.25, 1), (1.0, 1.0, 1)]


# ---------------------------------------------------------------- batches


def test_physical_batches_change_nothing_but_memory():
    ends = []
    for limit in (None, 5):
        engine, model, optimizer, batches = make(noise_generator=seeded(), max_physical_batch_size=limit)
        take(model, optimizer, batches)
        ends.append((flat(model), engine.accountant.history, optimizer.max_grad_norm, optimizer.steps_taken))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-9, atol=1e-9)
    assert ends[0][2] == pytest.approx(ends[1][2], rel=1e-6)
    assert ends[0][1:2] == ends[1][1:2]
    assert ends[0][3] == ends[1][3] == 4


def test_an_empty_batch_is_a_step_of_noise():
    _engine, model, optimizer, batches = make(
        noise_multiplier=0.0, data_loader=loader(64, 1), lr_control=False, clip_policy="fixed"
    )
    empties = 0
    for batch in batches:
        before = flat(model).clone()
        empty = batches.plan.current().records == 0
        optimizer.step(lambda: losses(model, batch) * math.nan if empty else losses(model, batch))  # noqa: B023
        if empty:
            empties += 1
            torch.testing.assert_close(flat(model), before, rtol=0, atol=1e-12)
    assert optimizer.steps_taken == 64
    # Each of 64 batches is empty with probability (1 - 1/64)^64 = 0.365: none is with probability 2e-13.
    assert empties > 0
    assert optimizer.private_nonfinite_records == 0


def test_a_closure_that_leaves_records_out_is_refused():
    _, model, optimizer, batches = make(data_loader=loader(64, 32))
    batch = next(iter(batches))
    with pytest.raises(ValueError, match="another number of losses than the loader's batch has records"):
        optimizer.step(lambda: losses(model, batch)[1:])


@pytest.mark.parametrize("policy", ["fixed", "automatic", "geometric", "percentile"])
def test_policies_choose_c_from_the_joint_release(policy):
    engine, model, optimizer, batches = make(clip_policy=policy, max_grad_norm=30.0, noise_multiplier=0.3)
    for _ in range(4):
        take(model, optimizer, batches)
    assert (optimizer.max_grad_norm == 30.0) == (policy in ("fixed", "automatic"))
    assert (optimizer.released.histogram is not None) == (policy in ("geometric", "percentile"))
    assert engine.accountant.history == [(0.3, 0.25, 16)]


@pytest.mark.parametrize(
    ("clipping", "policy"), [("adaptive", "percentile"), ("flat", "fixed"), ("automatic", "automatic")]
)
def test_clipping_means_what_it_means_with_gradients(clipping, policy):
    _, model, optimizer, batches = make(clipping=clipping, max_grad_norm=30.0)
    take(model, optimizer, batches)
    assert optimizer.policy.name == policy
    assert (optimizer.released.histogram is None) == (clipping != "adaptive")
    assert optimizer.mechanism.gradient_multiplier(optimizer.statistics) == (
        1.0 if clipping != "adaptive" else optimizer.released.gradient_noise_multiplier
    )


def test_a_percentile_of_nothing_does_not_sink_into_rounding():
    _, model, optimizer, batches = make(noise_multiplier=0.01)
    for _ in range(10):
        for batch in batches:
            optimizer.step(lambda: 0.0 * losses(model, batch))  # noqa: B023
    assert optimizer.max_grad_norm == pytest.approx(2**-23 / 2e-3 * 2, rel=1e-6)


def test_the_noisy_loss_is_that_of_the_records():
    _engine, model, optimizer, batches = make(loss_bound=5.0, noise_multiplier=0.0, sampling="fixed_size")
    for batch in batches:
        expected = losses(model, batch).mean().item()
        optimizer.step(lambda: losses(model, batch))  # noqa: B023
        assert optimizer.released.loss == pytest.approx(expected, abs=1e-3)


# ---------------------------------------------------------------- checkpoints and surfaces

STAGED = ZerothOrderSettings(
    num_directions=3,
    stages=Stages(first=3, count=2, proximal=0.1),
    pruning=Pruning(ratio=0.5, score="magnitude"),
    ema_decay=0.9,
)


@pytest.mark.parametrize("settings", [SETTINGS, STAGED], ids=["plain", "staged and pruned"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(settings, tmp_path):
    def begin():
        return make(noise_generator=seeded(), zeroth_order=settings)

    engine, model, optimizer, batches = begin()
    take(model, optimizer, batches)
    engine.save_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer)
    take(model, optimizer, batches)

    fresh_engine, fresh, again, fresh_batches = begin()
    fresh_engine.load_checkpoint(path=tmp_path / "run", module=fresh, optimizer=again)
    assert again.direction_seeds == again.directions.seeds(4, settings.num_directions)
    take(fresh, again, fresh_batches)
    assert torch.equal(flat(fresh), flat(model))
    assert again.max_grad_norm == optimizer.max_grad_norm
    assert again.direction_seeds == optimizer.direction_seeds
    assert fresh_engine.accountant.history == engine.accountant.history == [(1.0, 0.25, 8)]


@pytest.mark.parametrize(
    "changed", [{"num_directions": 3}, {"smoothing": 1e-4}, {"stages": Stages()}, {"direction": "rademacher"}], ids=str
)
def test_a_checkpoint_of_other_settings_is_refused(changed, tmp_path):
    import dataclasses

    engine, model, optimizer, _ = make()
    engine.save_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer)
    state = optimizer.state_dict()
    other_engine, other, wrong, _ = make(zeroth_order=dataclasses.replace(SETTINGS, **changed))
    before = copy.deepcopy(wrong.state_dict()["opacus_ac"]["zeroth_order"])
    with pytest.raises(ValueError, match="zeroth_order"):
        other_engine.load_checkpoint(path=tmp_path / "run", module=other, optimizer=wrong)
    with pytest.raises(ValueError, match="other zeroth-order settings"):
        wrong.load_state_dict(state)
    assert wrong.state_dict()["opacus_ac"]["zeroth_order"] == before


def test_states_of_another_kind_or_shape_are_refused():
    _, _, optimizer, _ = make()
    state = optimizer.state_dict()
    del state["opacus_ac"]["zeroth_order"]
    with pytest.raises(ValueError, match=r"another zeroth_order \(False\) than this optimizer's \(True\)"):
        optimizer.load_state_dict(state)
    state = optimizer.state_dict()
    state["opacus_ac"]["zeroth_order"]["indices"] = [None]
    with pytest.raises(ValueError, match="mask or anchor is of other tensors"):
        optimizer.load_state_dict(state)


def test_secret_noise_is_never_saved():
    _, model, optimizer, batches = make()
    take(model, optimizer, batches)
    assert optimizer.state_dict()["opacus_ac"]["mechanism"]["stream"] == {}


def test_report_and_dashboard_show_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    from opacus_ac.tensorboard import PrivacyDashboard

    engine, model, optimizer, batches = make(loss_bound=5.0)
    with PrivacyDashboard(tmp_path, engine, optimizer, delta=1e-3) as dashboard:
        for batch in batches:
            optimizer.step(lambda: losses(model, batch))  # noqa: B023
            dashboard.log_step()
    assert list(tmp_path.glob("*tfevents*"))
    report = engine.privacy_report(1e-3)
    assert report.steps == 4
    assert 0 < report.epsilon <= engine.get_epsilon(1e-3)


# ---------------------------------------------------------------- refusals


class DropsInAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_dropout = 0.1
        self.layer = nn.Linear(4, 3).double()

    def forward(self, inputs):
        return self.layer(nn.functional.dropout(inputs, self.attention_dropout, self.training))


def with_layer(layer):
    return nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3)).double()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (with_layer(nn.Dropout(0.1)), "1 \\(Dropout\\) is in training mode with p > 0.*model.eval"),
        (with_layer(nn.AlphaDropout(0.1)), "AlphaDropout"),
        (with_layer(nn.RReLU()), "RReLU"),
        (DropsInAttention(), "attention_dropout > 0"),
        (with_layer(nn.BatchNorm1d(4)).eval(), "1 is a BatchNorm1d"),
        (with_layer(nn.Linear(4, 4)).bfloat16(), "bfloat16"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_whose_losses_are_not_functions_of_record_and_weights_are_refused(model, message):
    before = flat(model).clone()
    with pytest.raises(ValueError, match=message):
        make(model=model)
    assert torch.equal(flat(model), before)


def test_a_model_that_is_put_into_training_mode_later_is_refused_at_the_step():
    model = with_layer(nn.Dropout(0.5)).eval()
    _, _, optimizer, batches = make(model=model)
    take(model, optimizer, batches)
    model.train()
    with pytest.raises(ValueError, match=r"call model.eval\(\) before the step"):
        take(model, optimizer, batches)
    model[1].p = 0.0
    take(model, optimizer, batches)


def test_weights_that_share_memory_or_are_not_contiguous_are_refused():
    tied = classifier().eval()
    tied.again = nn.Linear(4, 8).double()
    tied.again.weight.data = tied[0].weight.data
    with pytest.raises(ValueError, match="share their memory"):
        make(model=tied)
    turned = classifier().eval()
    turned[0].weight.data = torch.randn(4, 8).double().T
    with pytest.raises(ValueError, match="not contiguous"):
        make(model=turned)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"preset": "paper"}, "preset='paper' does not work with zeroth_order"),
        ({"fused_step": True}, "fused_step=True does not work with zeroth_order"),
        ({"ema_decay": 0.5}, "Give ZerothOrderSettings"),
        ({"grad_sample_mode": "hooks"}, "grad_sample_mode='hooks' does not work with zeroth_order"),
        ({"noise_allocation": NoiseAllocation(source="dimension")}, "noise_allocation does not work with zeroth_order"),
        ({"zeroth_order": "mezo"}, "unknown zeroth_order preset 'mezo'"),
        ({"zeroth_order": 64}, "zeroth_order=64 is neither ZerothOrderSettings nor the name of a paper"),
        ({"clipping": "zo"}, "clipping='zo' is not available: choose one of 'adaptive', 'flat', 'automatic'"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"clip_policy": "median"}, "unknown clip_policy"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.parametrize("name", ["source", "fused_step", "ema_decay"])
def test_the_constructor_refuses_what_is_not_its_own(name):
    model = classifier()
    with pytest.raises(ValueError, match=f"{name} is not an argument"):
        ZerothOrderDPOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), module=model, noise_multiplier=1.0, max_grad_norm=1.0,
            expected_batch_size=1, **{name: 0.5},
        )  # fmt: skip


# ---------------------------------------------------------------- transformers


def test_a_language_model_is_tuned_with_its_record_losses():
    model = llama()
    tokens = torch.randint(0, 8, (48, 6), generator=seeded(1))
    rows = TensorDataset(tokens)
    _engine, _, optimizer, batches = make(
        model=model,
        data_loader=DataLoader(rows, batch_size=16, collate_fn=lambda r: {"input_ids": torch.stack([x for (x,) in r])}),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        zeroth_order=preset(
            "dp-zopo", num_directions=8, stages=Stages(first=4), pruning=Pruning(ratio=0.5), direction_seed=7
        ),
        noise_multiplier=0.1,
        noise_generator=seeded(7),
    )
    everything = {"input_ids": tokens, "labels": tokens}
    before = record_losses(model, everything)
    assert before.shape == (48,)
    torch.testing.assert_close(before[:2], record_losses(model, {k: v[:2] for k, v in everything.items()}))
    for _ in range(5):
        for batch in batches:
            optimizer.step(lambda: record_losses(model, {**batch, "labels": batch["input_ids"]}))  # noqa: B023
    assert optimizer.steps_taken == 15
    assert optimizer.stage == 2
    assert float(record_losses(model, everything).mean()) < float(before.mean())


def test_adapters_are_tuned_over_a_frozen_half_precision_model():
    peft = pytest.importorskip("peft")
    model = llama().bfloat16()
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    )
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    tokens = torch.randint(0, 32, (32, 5), generator=seeded(1))
    _, _, optimizer, batches = make(
        model=model.eval(),
        optimizer=torch.optim.SGD(trained, lr=1.0),
        data_loader=DataLoader(TensorDataset(tokens), batch_size=8),
    )
    for (batch,) in batches:
        optimizer.step(lambda: record_losses(model, {"input_ids": batch, "labels": batch}))  # noqa: B023
    assert optimizer.coordinates.size == sum(p.numel() for p in trained)
    assert any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_class_losses_are_those_of_single_records():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.tensor([2, 0])}
    expected = nn.functional.cross_entropy(model(batch["input_ids"]).logits, batch["labels"], reduction="none")
    torch.testing.assert_close(record_losses(model, batch), expected.detach())
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="single-label classification only"):
        record_losses(model, batch)


def test_models_without_known_record_losses_are_refused():
    with pytest.raises(ValueError, match="needs batch\\['labels'\\]"):
        record_losses(llama(), {"input_ids": torch.ones(1, 2, dtype=torch.long)})
    with pytest.raises(ValueError, match="no loss of single records is known of Sequential"):
        record_losses(classifier(), {"labels": torch.ones(1)})


def test_names_are_exported_lazily():
    from opacus_ac import zeroth_order

    assert "record_losses" in dir(zeroth_order)
    assert all(getattr(zeroth_order, name) is not None for name in zeroth_order.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        zeroth_order.nonsense  # noqa: B018
    assert opacus_ac.PrivacyEngine is PrivacyEngine
