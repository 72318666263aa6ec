"""Adapters of peft: exact under mode "bk", or refused by name before anything is attached."""

import copy

import peft
import pytest
import tiny_models
import torch
from tiny_models import build, one_backward, record_losses, token_batch, worst_error
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.loss import per_record_causal_lm_loss
from opacus_ac.models.peft import _REFUSED, check_peft, freeze_a
from opacus_ac.testing import check_norms, per_sample_gradients

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
LAYERS = ["q_proj", "v_proj", "down_proj"]


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **options})


def simple(cls, **options):
    return cls(target_modules=LAYERS, task_type="CAUSAL_LM", **options)


def adapted(config, base="qwen2-untied"):
    """The base with adapters in float64, every trained weight moved off its start."""
    torch.manual_seed(0)
    model = peft.get_peft_model(build(base), config).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.train()


def mean_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return per_record_causal_lm_loss(logits, batch["labels"]).mean()


EXACT = {
    "lora": lambda: lora(),
    "rank-stabilised": lambda: lora(use_rslora=True),
    "biases": lambda: lora(bias="all"),
    "bias of B": lambda: lora(lora_bias=True, bias="lora_only"),
    "head saved": lambda: lora(modules_to_save=["lm_head"]),
    "embedding and head saved": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "norm saved": lambda: lora(modules_to_save=["norm"]),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("frozen_a", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_norms_and_sums_are_those_of_the_loop(name, frozen_a):
    config = EXACT[name]()
    model = adapted(config)
    if frozen_a and config.peft_type == "LORA":
        freeze_a(model)
    check_peft(model)
    batch = token_batch()
    want = per_sample_gradients(copy.deepcopy(model), batch, mean_loss)
    norms, sums = one_backward(model, batch, mean_loss)
    check_norms(norms, want, rtol=1e-7)
    assert worst_error(sums, {n: w.sum(0) for n, w in want.items()}, floor=1e-6)[0] < 1e-7


def test_a_private_run_trains_the_second_factor_and_what_was_saved():
    model = adapted(lora(modules_to_save=["lm_head"]))
    freeze_a(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.zeros(32)), batch_size=4), noise_multiplier=1.0, max_grad_norm=1.0,
        clipping="flat",
    )  # fmt: skip
    optimizer.plan = None
    record_losses(model, token_batch()).mean().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_B" in n or "modules_to_save" in n}


REFUSED = {
    "IA3": (lambda: simple(peft.IA3Config, feedforward_modules=["down_proj"]), r"\(IA3\).*container"),
    "ADALORA": (lambda: simple(peft.AdaLoraConfig, total_step=100), r"\(ADALORA\).*raw gradients"),
    "LOHA": (lambda: simple(peft.LoHaConfig, r=2), r"\(LOHA\)"),
    "LOKR": (lambda: simple(peft.LoKrConfig, r=2), r"\(LOKR\)"),
    "VERA": (lambda: peft.VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), r"\(VERA\)"),
    "PROMPT_TUNING": (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "one prompt"),
    "P_TUNING": (
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        "one prompt",
    ),
    "TRAINABLE_TOKENS": (
        lambda: peft.TrainableTokensConfig(token_indices=[1, 5], task_type="CAUSAL_LM"),
        r"\(TRAINABLE_TOKENS\)",
    ),
    "dora": (lambda: lora(use_dora=True), "use_dora"),
    "parameters": (lambda: lora(target_modules=[], target_parameters=["mlp.down_proj.weight"]), "target_parameters"),
    "tokens": (lambda: lora(trainable_token_indices=[1]), "trainable_token_indices"),
}


@pytest.mark.parametrize("mode", ["bk", "hooks"])
@pytest.mark.parametrize("name", REFUSED)
def test_other_methods_are_refused_by_name_and_the_model_is_left_alone(name, mode):
    config, message = REFUSED[name]
    model = adapted(config())
    before = copy.deepcopy(model.state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=rf"(?s){message}.*freeze_a"):
        PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.AdamW(trained), grad_sample_mode=mode,
            data_loader=DataLoader(TensorDataset(torch.zeros(8)), batch_size=4), noise_multiplier=1.0,
        )  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_starts_computed_from_data_are_refused(start):
    model = adapted(lora())
    model.peft_config["default"].init_lora_weights = start
    with pytest.raises(ValueError, match=start):
        check_peft(model)
    model.peft_config["default"].init_lora_weights = True
    check_peft(model)


def test_a_frozen_adapter_is_nobodys_business():
    model = adapted(REFUSED["IA3"][0]())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    check_peft(model)


def test_every_refused_name_is_a_method_of_peft():
    assert set(_REFUSED) <= {method.value for method in peft.PeftType}


def test_freeze_a_refuses_a_model_without_adapters():
    model = tiny_models.build("qwen2-untied")
    with pytest.raises(ValueError, match="0 first and 0 trainable"):
        freeze_a(model)
    assert all(p.requires_grad for p in model.parameters())
