"""PrivateTrainer on users: what is drawn, clipped, checked, evaluated and reported is a user."""

import copy
import json

import pytest
import tiny_models
import torch
import users
from tiny_chat import byte_tokenizer, chat_model
from tiny_trainer import arguments, generator, privacy, trainer, weights
from users import MOST, oracle, own_token_loss, pad_tokens, token_users

from opacus_ac.errors import LedgerError
from opacus_ac.integrations import PrivateTrainer
from opacus_ac.integrations.finetune import ChatDataset, UserCollate, UserDataset
from opacus_ac.loss import per_record_causal_lm_loss, per_user_loss

pytestmark = pytest.mark.filterwarnings("ignore:noise_generator is seeded", "ignore::FutureWarning")
PLAIN = {"clip_policy": "fixed", "lr_control": False, "ema_decay": None, "noise_multiplier": 0.0}
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.5}


class Users(list):
    """Users in memory."""

    max_rows_per_user = MOST


def many(count=24):
    return Users(token_users([1 + i % MOST for i in range(count)]))


def of_users(folder, *, data=None, options=None, **changes):
    data = many() if data is None else data
    return trainer(folder, data=data, options={"data_collator": pad_tokens, **(options or {})}, **changes)


@pytest.mark.parametrize(("mode", "model"), [("bk", "qwen2-tied"), ("hooks", "llama"), ("bk", "lora")])
@pytest.mark.parametrize("physical", [5, 1])
def test_three_steps_equal_the_loop_over_users(mode, model, physical, tmp_path):
    data, bound = Users(token_users()), 0.4 if model == "lora" else 1.0
    private = users.lora() if model == "lora" else tiny_models.build(model)
    expected = copy.deepcopy(private)
    made = of_users(
        tmp_path, model=private, data=data, per_device_train_batch_size=physical, gradient_accumulation_steps=5 // physical,
        settings={**PLAIN, "grad_sample_mode": mode, "per_sample_max_grad_norm": bound}, **SGD,
    )  # fmt: skip
    made.train()
    before = weights(expected)
    for _ in range(3):
        norms, gradients = oracle(expected, data, own_token_loss)
        assert bool((norms > bound).any())
        factors = torch.where(norms > 0, (bound / norms).clamp(max=1), 0)
        with torch.no_grad():
            for name, gradient in gradients.items():
                expected.get_parameter(name).sub_(0.5 / 5 * torch.einsum("i,i...->...", factors, gradient))
    assert float((weights(expected) - before).abs().max()) > 1e-3
    torch.testing.assert_close(weights(private), weights(expected), rtol=1e-5, atol=1e-6)  # norms work in float32
    assert made.engine.accountant.history == [(0.0, 1.0, 3)]


def test_batches_and_report_count_users(tmp_path):
    made = of_users(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, save_strategy="steps", save_steps=3
    )
    made.train()
    report = made.privacy_report()
    assert report.unit == f"one user with at most {MOST} rows"
    assert (report.dataset_size, report.expected_batch_size, report.steps) == (24, (6.0, 6.0), 3)
    assert made.engine.accountant.history == [(1.0, 0.25, 3)]
    made.save_model(str(tmp_path / "final"))
    assert json.loads((tmp_path / "final" / "privacy_report.json").read_text())["unit"] == report.unit
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(logged) == 3


def test_a_run_of_users_is_resumed_as_one_of_users(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    of_users(tmp_path, **saved).train()
    again = of_users(tmp_path, **{**saved, "max_steps": 4})
    assert again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).global_step == 4
    assert again.engine.accountant.history == [(1.0, pytest.approx(16 / 24), 4)]
    other = Users(many())
    other.max_rows_per_user = MOST + 1
    with pytest.raises(ValueError, match="max_rows_per_user = 3, this run has 4"):
        of_users(tmp_path, data=other, **saved).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_ledger_is_about_rows_or_about_users(tmp_path):
    ledger = {"ledger": str(tmp_path / "l.jsonl")}
    of_users(tmp_path, settings=ledger).train()
    rows = [user[0] for user in many()]
    with pytest.raises(LedgerError, match="unit"):
        trainer(tmp_path, data=rows, settings=ledger, options={"data_collator": pad_tokens}).train()


def custom(mean):
    """A trainer whose loss is ``mean`` of the losses ``[R]`` of rows, which of them count, and the number of users."""

    class Custom(PrivateTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            losses = per_record_causal_lm_loss(logits, inputs["labels"])
            count = self._private_loader.users.count(len(losses))
            has = (inputs["labels"][:, 1:] != -100).any(1)
            self.private_optimizer.record_losses(per_user_loss(losses, has, count))
            return mean(losses, has, count)

    return Custom


LOSSES = {
    "of users": (lambda losses, has, users: per_user_loss(losses, has, users).mean(), True),
    "of all labelled rows of the batch": (lambda losses, has, users: losses.sum() / has.sum().clamp(min=1), False),
    "of all rows of the batch": (lambda losses, has, users: losses.mean(), False),
    "of the rows of a user with those that fill up": (lambda losses, has, users: losses.view(users, -1).mean(1).mean(), False),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("counts", [(2, 2, 1), (3, 1, 2)])
def test_a_loss_that_couples_users_is_refused_before_the_first_step(name, counts, tmp_path):
    """Also where the two users that are compared have equally many rows."""
    mean, good = LOSSES[name]
    data = Users(token_users([*counts, 1, 1]))
    made = of_users(
        tmp_path, data=data, cls=custom(mean), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1
    )
    if good:
        assert made.train().global_step == 1
        return
    with pytest.raises(ValueError, match="couples records"):
        made.train()
    assert len(made.engine.accountant) == 0


def test_a_model_that_couples_users_is_refused(tmp_path):
    class Coupled(torch.nn.Module):
        def forward(self, hidden):
            return hidden - hidden.mean(0, keepdim=True)

    model = tiny_models.build("qwen2-tied").float()
    model.model.norm = torch.nn.Sequential(model.model.norm, Coupled())
    with pytest.raises(ValueError, match="couples records"):
        of_users(tmp_path, model=model).train()


def test_rows_are_evaluated_one_by_one(tmp_path):
    """The same collator, and a loss that is the mean over rows; users cannot be evaluated."""
    tokenizer = byte_tokenizer()
    talks = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "So." * (1 + i)}] for i in range(9)]
    data = UserDataset([talks[i : i + 2] for i in range(8)], tokenizer, max_length=90, max_rows_per_user=2)
    others = [
        [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "No." * (1 + i)}] for i in range(4)
    ]
    public = ChatDataset(others, tokenizer, max_length=90)
    made = PrivateTrainer(
        chat_model(tokenizer), arguments(tmp_path, per_device_eval_batch_size=4, gradient_accumulation_steps=1),
        train_dataset=data, eval_dataset=public,
        privacy=privacy(dataset_size=8, noise_multiplier=1.0, evaluation_is_public=True, clip_policy="fixed"),
        data_collator=UserCollate(tokenizer.pad_token_id, 90), noise_generator=generator(),
    )  # fmt: skip
    made.train()
    with made.ema_weights(), torch.no_grad():
        alone = [float(made.model.eval()(**made.data_collator([row])).loss) for row in public.rows]
    assert made.evaluate()["eval_loss"] == pytest.approx(sum(alone) / 4, rel=1e-5)
    with pytest.raises(ValueError, match="evaluation averages over rows"):
        made.evaluate(UserDataset([talks], tokenizer, max_length=90, max_rows_per_user=2))


def test_users_need_a_collator_of_their_own(tmp_path):
    with pytest.raises(ValueError, match=r"data_collator is missing.*UserCollate"):
        trainer(tmp_path, data=many())


def test_without_a_public_size_the_number_of_users_is_published(tmp_path):
    made = of_users(tmp_path, settings={"dataset_size": None})
    with pytest.warns(UserWarning, match="number of users, N = 24, is published"):
        made.train()
