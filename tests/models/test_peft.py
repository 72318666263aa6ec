"""Adapters of peft: exact under mode "bk", or refused by name before anything is attached."""

import copy
import pathlib
import re

import peft
import pytest
import tiny_models
import torch
from helpers import Rows
from opacus.validators.errors import UnsupportedModuleError
from tiny_models import build, one_backward, record_losses, token_batch, worst_error
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.loss import per_record_causal_lm_loss
from opacus_ac.models.peft import _REFUSED, check_peft, freeze_a
from opacus_ac.testing import check_norms, per_sample_gradients

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
LAYERS = ["q_proj", "v_proj", "down_proj"]
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "lora.md"
TOKENS = sorted({*token_batch()["input_ids"][:2, :2].flatten().tolist()})


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **options})


def simple(cls, layers=tuple(LAYERS), **options):
    return cls(target_modules=list(layers), task_type="CAUSAL_LM", **options)


def adapted(config, base="qwen2-untied"):
    """The base with adapters in float64, every trained weight moved off its start."""
    torch.manual_seed(0)
    model = peft.get_peft_model(build(base), config).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.train()


def p_tuning(kind):
    return peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type=kind
    )


def trained_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def mean_loss(model, batch):
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if any("prefix_task_cols" in name for name, _ in model.named_parameters()):
        given["task_ids"] = batch["input_ids"][:, 0] % 2
    labels = batch["labels"]
    return per_record_causal_lm_loss(model(**given).logits[:, -labels.shape[1] :], labels).mean()


PLAIN = {
    "lora": lambda: lora(),
    "rank-stabilised": lambda: lora(use_rslora=True),
    "biases": lambda: lora(bias="all"),
    "bias of B": lambda: lora(lora_bias=True, bias="lora_only"),
    "head saved": lambda: lora(modules_to_save=["lm_head"]),
    "embedding and head saved": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "norm saved": lambda: lora(modules_to_save=["norm"]),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix projected": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
    "norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
}
"""Every trained tensor belongs to a layer that is called and has a rule."""
COMPUTING = {
    "DoRA": lambda: lora(use_dora=True),
    "DoRA, biases": lambda: lora(use_dora=True, bias="all"),
    "DoRA of an embedding": lambda: lora(use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    "embedding": lambda: lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "tokens beside LoRA": lambda: lora(trainable_token_indices=TOKENS),
    "IA3": lambda: simple(peft.IA3Config, feedforward_modules=["down_proj"]),
    "LoHa": lambda: simple(peft.LoHaConfig, r=2),
    "LoKr": lambda: simple(peft.LoKrConfig, r=2),
    "OFT": lambda: simple(peft.OFTConfig, oft_block_size=8),
    "BOFT": lambda: simple(peft.BOFTConfig, boft_block_size=4),
    "VeRA": lambda: simple(peft.VeraConfig, r=2, layers=["q_proj"]),
    "VB-LoRA": lambda: simple(peft.VBLoRAConfig, r=2, num_vectors=4, vector_length=8),
    "RandLoRA": lambda: simple(peft.RandLoraConfig, r=2, layers=["q_proj"]),
    "HRA": lambda: simple(peft.HRAConfig, r=2),
    "FourierFT": lambda: simple(peft.FourierFTConfig, n_frequency=8),
    "WaveFT": lambda: simple(peft.WaveFTConfig, n_frequency=8),
    "SHiRA": lambda: simple(peft.ShiraConfig, r=2),
    "RoAd": lambda: simple(peft.RoadConfig, group_size=8),
    "C3A": lambda: simple(peft.C3AConfig, block_size=8),
    "DeLoRA": lambda: simple(peft.DeloraConfig, r=2),
    "GraLoRA": lambda: simple(peft.GraloraConfig, r=2, gralora_k=2),
    "MiSS": lambda: simple(peft.MissConfig, r=2),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=TOKENS, task_type="CAUSAL_LM"),
}
"""A layer of peft computes with the parameters of its parts, so it is run again as a whole, in mode "bk" only."""
PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P-tuning": lambda: p_tuning("MLP"),
    "multitask prompt": lambda: peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2
    ),
}
"""One prompt is looked up for all records and repeated, which mode "bk" follows."""
EXACT = PLAIN | COMPUTING | PROMPTS


def has_first_factors(name):
    return EXACT[name]().peft_type == "LORA"


@pytest.mark.parametrize(
    ("name", "frozen_a"),
    [(name, frozen_a) for name in EXACT for frozen_a in (False, True) if not frozen_a or has_first_factors(name)],
)
def test_norms_and_sums_are_those_of_the_loop(name, frozen_a):
    model = adapted(EXACT[name]())
    if frozen_a:
        freeze_a(model)
    check_peft(model)
    batch = token_batch()
    want = per_sample_gradients(copy.deepcopy(model), batch, mean_loss)
    assert all(gradients.any() for gradients in want.values()), "a parameter that the batch does not use shows nothing"
    norms, sums = one_backward(model, batch, mean_loss)
    check_norms(norms, want, rtol=1e-7)
    assert worst_error(sums, {n: w.sum(0) for n, w in want.items()}, floor=1e-6)[0] < 1e-7


@pytest.mark.parametrize(("name", "mode"), [*((n, "bk") for n in COMPUTING | PROMPTS), *((n, "hooks") for n in PLAIN)])
def test_a_private_step_is_that_of_the_loop(name, mode):
    model, batch = adapted(EXACT[name]()), token_batch()
    gradients = per_sample_gradients(copy.deepcopy(model), batch, mean_loss)
    norms = torch.cat([g.flatten(1) for g in gradients.values()], 1).norm(dim=1)
    bound = 0.6 * float(norms.max())
    factors, trained = (bound / norms).clamp(max=1) / len(norms), trained_of(model)
    want = {n: p.detach() - torch.einsum("n,n...->...", factors, gradients[n]) for n, p in trained.items()}
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(trained.values(), lr=1.0), max_grad_norm=bound, grad_sample_mode=mode,
        data_loader=DataLoader(Rows([{k: v[i] for k, v in batch.items()} for i in range(len(norms))]), len(norms)),
        noise_multiplier=0.0, clipping="flat", ema_decay=None,
    )  # fmt: skip
    for drawn in loader:
        mean_loss(model, drawn).backward()
        optimizer.step()
    assert worst_error(trained, want, floor=1e-6)[0] < 1e-7


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


def private(model, mode="bk"):
    trained = [p for p in model.parameters() if p.requires_grad]
    return PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.AdamW(trained), grad_sample_mode=mode,
        data_loader=DataLoader(TensorDataset(torch.zeros(8)), batch_size=4), noise_multiplier=1.0,
    )  # fmt: skip


def check_refused(model, mode, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        private(model, mode)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


REFUSED = {
    "ADALORA": (lambda: simple(peft.AdaLoraConfig, total_step=100), r"\(ADALORA\).*raw gradients"),
    "LILY": (lambda: simple(peft.LilyConfig, r=2), r"\(LILY\).*over all records"),
    "OSF": (lambda: simple(peft.OSFConfig), r"\(OSF\).*hooks"),
    "PVERA": (lambda: simple(peft.PveraConfig, r=2, layers=["q_proj"]), r"\(PVERA\).*random"),
    "CPT": (
        lambda: peft.CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]
        ),
        "moves its weights",
    ),
    "coft": (lambda: simple(peft.OFTConfig, oft_block_size=8, coft=True), "coft moves its weights"),
    "parameters": (
        lambda: lora(target_modules=[], target_parameters=["mlp.down_proj.weight"]),
        "target_parameters writes",
    ),
    "alora": (lambda: lora(alora_invocation_tokens=[3]), "alora_invocation_tokens"),
}


@pytest.mark.parametrize("mode", ["bk", "hooks"])
@pytest.mark.parametrize("name", REFUSED)
def test_other_methods_are_refused_by_name_and_the_model_is_left_alone(name, mode):
    config, message = REFUSED[name]
    check_refused(adapted(config()), mode, rf"(?s){message}.*freeze_a")


@pytest.mark.parametrize("name", COMPUTING | PROMPTS)
def test_modes_of_opacus_refuse_what_computes_with_its_parts_or_repeats_a_prompt(name):
    reason = "repeats one prompt" if name in PROMPTS else "computes with the parameters of its parts"
    check_refused(adapted(EXACT[name]()), "hooks", rf'{reason}.*"bk"')


RANDOM = {
    "lora_dropout": lambda rate: lora(use_dora=True, lora_dropout=rate),
    "module_dropout": lambda rate: simple(peft.LoHaConfig, r=2, module_dropout=rate),
    "vera_dropout": lambda rate: simple(peft.VeraConfig, r=2, layers=["q_proj"], vera_dropout=rate),
}


@pytest.mark.parametrize("option", RANDOM)
def test_dropout_in_a_layer_that_is_run_again_is_refused(option):
    check_refused(adapted(RANDOM[option](0.1)), "bk", rf"{option}=0.1 draws random numbers.*Set {option}=0")
    private(adapted(RANDOM[option](0.0)))


@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": TOKENS}], ids=["plain", "tokens"])
def test_lora_may_have_dropout_where_nothing_with_it_is_run_again(options):
    private(adapted(lora(lora_dropout=0.1, **options)))


class Attending(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_factors_that_are_merged_into_attention_are_refused():
    def adapted_attention(*targets):
        return peft.get_peft_model(Attending(), peft.LoraConfig(r=2, target_modules=list(targets))).train()

    check_refused(
        adapted_attention("attention"), "bk", "merges its factors into the weights of base_model.model.attention"
    )
    private(adapted_attention("head"))


def test_p_tuning_by_lstm_is_refused_by_opacus():
    with pytest.raises(UnsupportedModuleError, match=r"nn\.LSTM"):
        private(adapted(p_tuning("LSTM")))


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_starts_computed_from_data_are_refused(start):
    model = adapted(lora())
    model.peft_config["default"].init_lora_weights = start
    with pytest.raises(ValueError, match=start):
        check_peft(model)
    model.peft_config["default"].init_lora_weights = True
    check_peft(model)


def test_a_frozen_adapter_is_nobodys_business():
    model = adapted(REFUSED["ADALORA"][0]())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    check_peft(model)


def test_every_refused_name_is_a_method_of_peft():
    assert set(_REFUSED) <= {method.value for method in peft.PeftType}


def test_the_page_says_what_the_tables_show():
    rows = [
        row.split("|") for row in PAGE.read_text().split("## Which methods of peft")[1].splitlines() if row[:2] == "| "
    ]
    said = {
        row[2].strip() + " " + row[3].strip(): squeezed(" ".join(r[1] for r in rows if r[2:4] == row[2:4]))
        for row in rows
    }
    for table, verdict in (
        (PLAIN, "exact exact"),
        (COMPUTING | PROMPTS, "exact refused"),
        (REFUSED, "refused refused"),
    ):
        for name, entry in table.items():
            config = (entry[0] if isinstance(entry, tuple) else entry)()
            assert squeezed(config.peft_type.value) in said[verdict], name


def squeezed(words):
    return re.sub(r"[-_ ]", "", words).lower()


def test_freeze_a_refuses_a_model_without_adapters():
    model = tiny_models.build("qwen2-untied")
    with pytest.raises(ValueError, match="0 first and 0 trainable"):
        freeze_a(model)
    assert all(p.requires_grad for p in model.parameters())
