"""Settings that cannot be made private are refused, all at once, each with its remedy."""

import pytest

pytest.importorskip("trl")
import copy

import tiny_trl
import torch
from peft import PrefixTuningConfig, PromptTuningConfig
from tiny_chat import byte_tokenizer, chat_model
from transformers import TrainingArguments
from trl import SFTTrainer

from opacus_ac.integrations import PrivateSFTTrainer
from opacus_ac.models.pairs import log_probabilities, run_pairs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


def images(count):
    return [{**row, "image": "a.png"} for row in tiny_trl.dialogues(count)]


class Users(list):
    max_rows_per_user = 3


SFT = [
    ({"packing": True}, {}, "packing='True': a packed row .* use False"),
    ({"eval_packing": True}, {}, "eval_packing=True: a record would no longer be alone in its row.* use False"),
    ({"padding_free": True}, {}, "padding_free='True': .* use False"),
    ({"loss_type": "dft"}, {}, "loss_type='dft': .* use 'nll'"),
    ({"truncation_mode": "middle"}, {}, "truncation_mode='middle': .* use 'keep_start'"),
    ({"activation_offloading": True}, {}, "activation_offloading=True: .* use False"),
    ({"router_aux_loss_coef": 0.1}, {}, "router_aux_loss_coef=0.1: .* leave it out"),
    ({"chat_template_path": "another/model"}, {}, "chat_template_path='another/model': .* name a .jinja file"),
    ({"dataset_kwargs": {"skip_prepare_dataset": True}}, {}, "dataset_kwargs=.*: .* leave it out"),
    ({"max_grad_norm": 0.5}, {}, "max_grad_norm='0.5': .*per_sample_max_grad_norm"),
    ({"include_num_input_tokens_seen": "all"}, {}, "include_num_input_tokens_seen='all': .* use 'no'"),
    ({}, {"data": images(20)}, "train_dataset has the column 'image': .* remove it"),
    ({}, {"data": Users([tiny_trl.dialogues(1)] * 20)}, "train_dataset has users as records: use PrivateTrainer"),
    ({"assistant_only_loss": True}, {"data": tiny_trl.completions(20)}, "assistant_only_loss: .* use False"),
    (
        {"completion_only_loss": True},
        {"options": {"formatting_func": str}},
        "completion_only_loss with formatting_func: .* leave one of them out",
    ),
    ({}, {"options": {"quantization_config": object()}}, "quantization_config with .*: pass the name of the model"),
    ({}, {"options": {"eval_dataset": tiny_trl.dialogues(4, 9)}}, "eval_dataset: .* evaluation_is_public=True"),
    ({}, {"options": {"compute_loss_func": max}}, "compute_loss_func: .* leave it out"),
]
DPO = [
    ({"loss_type": ["aot"]}, {}, "loss_type=.*: .* use one of sigmoid, hinge, ipo"),
    ({"loss_type": ["sigmoid", "sft"]}, {}, "loss_type=.*: .* use one of sigmoid, hinge, ipo"),
    ({"loss_weights": [0.5]}, {}, "loss_weights=.*: .* leave it out"),
    ({"label_smoothing": 0.1}, {}, "label_smoothing=0.1: .* leave it out"),
    ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1: .* leave it out"),
    ({"ld_alpha": 0.5}, {}, "ld_alpha=0.5: .* leave it out"),
    ({"f_divergence_type": "js_divergence"}, {}, "f_divergence_type=.*: .* use 'reverse_kl'"),
    ({"use_weighting": True}, {}, "use_weighting=True: .* use False"),
    ({"sync_ref_model": True}, {}, "sync_ref_model=True: .* use False"),
    ({"padding_free": True}, {}, "padding_free='True': .* use False"),
    ({}, {"options": {"peft_config": None}}, "no reference: all weights .* precompute_ref_log_probs=True"),
    ({}, {"options": {"ref_model": object()}}, "ref_model: .* peft_config=LoraConfig"),
    ({}, {"options": {"peft_config": PREFIX}}, "peft_config PrefixTuningConfig .*: use LoraConfig"),
    (
        {},
        {"options": {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}},
        "peft_config PromptTuningConfig .*: use LoraConfig",
    ),
]


@pytest.mark.parametrize(
    ("build", "changes", "others", "reason"),
    [(tiny_trl.sft, *case) for case in SFT] + [(tiny_trl.dpo, *case) for case in DPO],
)
def test_a_setting_is_refused_with_its_remedy(build, changes, others, reason, tmp_path):
    with pytest.raises(ValueError, match="this fine-tuning cannot be made private:\n.*" + reason):
        build(tmp_path, **others, **changes)


def test_all_reasons_are_told_at_once_and_nothing_is_changed(tmp_path):
    tokenizer = byte_tokenizer(tiny_trl.MARKED)
    model = chat_model(tokenizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="packing") as caught:
        tiny_trl.sft(
            tmp_path, model=model, tokenizer=tokenizer, options={"peft_config": tiny_trl.lora()}, packing=True,
            loss_type="dft", fp16=False, max_grad_norm=0.5,
        )  # fmt: skip
    assert str(caught.value).count("\n  * ") == 3
    assert not hasattr(model, "peft_config")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_settings_of_another_class_are_refused(tmp_path):
    with pytest.raises(ValueError, match="args is TrainingArguments: pass a SFTConfig of TRL"):
        tiny_trl.PrivateSFTTrainer(
            chat_model(byte_tokenizer()), TrainingArguments(str(tmp_path), use_cpu=True), privacy=tiny_trl.privacy(),
            train_dataset=tiny_trl.dialogues(4),
        )  # fmt: skip
    with pytest.raises(ValueError, match="train_dataset is missing or empty"):
        PrivateSFTTrainer(chat_model(byte_tokenizer()), tiny_trl.arguments(tmp_path), privacy=tiny_trl.privacy())


def test_adapters_that_are_there_already_need_a_precomputed_reference(tmp_path):
    from peft import get_peft_model

    tokenizer = byte_tokenizer(tiny_trl.MARKED)
    model = tiny_trl.moved(get_peft_model(chat_model(tokenizer), tiny_trl.lora()))
    with pytest.raises(ValueError, match="no reference: an adapter that is there already would be trained"):
        tiny_trl.dpo(tmp_path, model=model, tokenizer=tokenizer, options={"peft_config": None})
    with pytest.raises(ValueError, match="peft_config with a model that has adapters"):
        tiny_trl.dpo(tmp_path, model=model, tokenizer=tokenizer)
    made = tiny_trl.dpo(tmp_path, model=model, tokenizer=tokenizer, data=tiny_trl.pairs(16), precompute_ref_log_probs=True)  # fmt: skip
    batch = made.data_collator([made.train_dataset[i] for i in range(4)])
    model.eval()
    with torch.no_grad():
        assert torch.allclose(made._policy(model, batch), made._reference(model, batch), rtol=1e-5)


def test_a_trainer_of_trl_is_no_base_and_the_error_names_ours():
    with pytest.raises(TypeError, match="PrivateSFTTrainer"):
        type("Both", (PrivateSFTTrainer, SFTTrainer), {})


def test_evaluation_is_of_public_records_only(tmp_path):
    data, public = tiny_trl.dialogues(20), tiny_trl.dialogues(6, 500)
    settings = {"evaluation_is_public": True}
    made = tiny_trl.sft(tmp_path, data=data, settings=settings)
    assert made.evaluate(public)["eval_loss"] > 1
    for bad in (data, data[:3] + public, [copy.deepcopy(data[4])]):
        with pytest.raises(ValueError, match="evaluation cannot be made private"):
            made.evaluate(bad)
    pairs = tiny_trl.pairs(20)
    dpo = tiny_trl.dpo(tmp_path, data=pairs, settings=settings)
    assert dpo.evaluate(tiny_trl.pairs(6, 500))["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    with pytest.raises(ValueError, match="evaluation cannot be made private"):
        dpo.evaluate(pairs)


def test_public_pairs_that_come_after_training_have_no_reference(tmp_path):
    made = tiny_trl.dpo(
        tmp_path, data=tiny_trl.pairs(20), precompute_ref_log_probs=True, max_steps=1,
        settings={"evaluation_is_public": True}, options={"eval_dataset": tiny_trl.pairs(4, 500)},
    )  # fmt: skip
    made.train()
    assert made.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="pass these data as eval_dataset when you make the trainer"):
        made.evaluate(tiny_trl.pairs(4, 700))


def test_the_adapters_that_are_trained_are_those_of_before(tmp_path):
    """peft switches on what was frozen when it switches adapters on again."""
    made = tiny_trl.dpo(tmp_path, data=tiny_trl.pairs(20), max_steps=2)
    frozen = [p for name, p in made.model.named_parameters() if "lora_A" in name]
    for parameter in frozen:
        parameter.requires_grad = False
    before = [p.detach().clone() for p in frozen]
    made.train()
    assert not any(p.requires_grad for p in frozen)
    assert all(torch.equal(p, was) for p, was in zip(frozen, before, strict=True))


def test_pairs_are_rows_only_while_it_is_asked_for():
    tokenizer = byte_tokenizer(tiny_trl.MARKED)
    model = chat_model(tokenizer).eval()
    ids = torch.randint(3, 90, (3, 2, 5))
    undo = run_pairs(model)
    together = model(input_ids=ids).logits
    assert torch.equal(together, model(input_ids=ids.flatten(0, 1)).logits)
    undo()
    with pytest.raises((ValueError, RuntimeError)):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="expected logits"):
        log_probabilities(together[:3], ids, torch.ones_like(ids))


def test_outputs_of_pairs_are_not_handed_out(tmp_path):
    made = tiny_trl.dpo(tmp_path, data=tiny_trl.pairs(20))
    batch = made.data_collator([made.train_dataset[0]])
    with pytest.raises(ValueError, match="ask for no outputs"):
        made.compute_loss(made.model, batch, return_outputs=True)
