"""Losses are those of TRL's own trainers, record by record, and gradients those of a loop over records in float64."""

import copy

import pytest

pytest.importorskip("trl")
import tiny_trl
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny_chat import byte_tokenizer, chat_model
from tiny_trainer import generator
from trl import DPOConfig, DPOTrainer, SFTTrainer

from opacus_ac.optimizer.records import RecordSums
from opacus_ac.optimizer.sum_release import SumRelease

pytestmark = pytest.mark.filterwarnings(
    "ignore:noise_generator is seeded", "ignore::FutureWarning", "ignore::UserWarning"
)
C = 0.05


class Noted:
    """What reaches the clipping and the noise in one step."""

    def __init__(self, monkeypatch):
        self.norms, self.losses, self.sums = [], [], []
        add_records, add_noise = RecordSums._add_records, SumRelease.add_noise

        def records(optimizer, draw, norms, losses):
            self.norms += norms.tolist()
            self.losses += losses.tolist()
            add_records(optimizer, draw, norms, losses)

        def noise(optimizer):
            self.sums = [s.clone() for s in optimizer.source.sums()]
            add_noise(optimizer)

        monkeypatch.setattr(RecordSums, "_add_records", records)
        monkeypatch.setattr(SumRelease, "add_noise", noise)


def one_step(trainer, monkeypatch):
    """Take one step. Returns what was noted, and the rows of its records."""
    rows, collate, check = [], trainer.data_collator, trainer._check_independence

    def note(batch):
        rows.extend(batch)
        return collate(batch)

    def checked(*args):
        before = list(rows)
        check(*args)
        rows[:] = before  # the check collates records of its own

    trainer.data_collator, trainer._check_independence = note, checked
    noted = Noted(monkeypatch)
    batches = trainer.get_train_dataloader()
    rows.clear()
    assert len(batches) == 4
    trainer.train()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    trained = [p for group in trainer.private_optimizer.param_groups for p in group["params"]]
    noted.sums = {names[id(p)]: s for p, s in zip(trained, noted.sums, strict=True)}
    return noted, list(rows)


def expect_the_loop(noted, model, loss_of, loss_of_trl, rows, rounding=1e-12):
    """Compare with the loop over records alone: its losses also with TRL's, which computes in float32."""
    names, trained = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    total = [torch.zeros_like(p) for p in trained]
    norms, losses = [], []
    for row in rows:
        loss = loss_of(row)
        gradient = torch.autograd.grad(loss, trained, allow_unused=True)
        gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradient, strict=True)]
        norm = float(torch.cat([g.reshape(-1) for g in gradient]).norm())
        for into, g in zip(total, gradient, strict=True):
            into += min(1.0, C / norm) * g
        norms.append(norm)
        losses.append(float(loss))
    assert len(noted.norms) == len(rows) > 8
    assert len({round(norm, 6) for norm in norms}) > 4
    assert noted.losses == pytest.approx(losses, rel=rounding)
    assert noted.losses == pytest.approx([float(loss_of_trl(row)) for row in rows], rel=1e-5)
    assert noted.norms == pytest.approx(norms, rel=max(rounding, 5e-7))
    assert set(names) == set(noted.sums)
    for name, wanted in zip(names, total, strict=True):
        assert torch.allclose(noted.sums[name], wanted, rtol=1e-6, atol=1e-7 * C)


def next_token_loss(model, row):
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    return F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[0, 1:])


def said(model, prompt, reply):
    """Log-probability of a reply."""
    logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).sum()


def pair_loss(kind, model, reference, row, beta=0.1):
    prompt, replies = row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])
    with torch.no_grad():
        before = [said(reference, prompt, reply) for reply in replies]
    better, worse = (said(model, prompt, reply) - known for reply, known in zip(replies, before, strict=True))
    if kind == "ipo":
        return (better / len(replies[0]) - worse / len(replies[1]) - 1 / (2 * beta)) ** 2
    margin = beta * (better - worse)
    return {"sigmoid": -F.logsigmoid(margin), "hinge": torch.relu(1 - margin)}[kind]


EXACT = {"clipping": "flat", "per_sample_max_grad_norm": C}


def double_model():
    tokenizer = byte_tokenizer(tiny_trl.MARKED)
    return tokenizer, chat_model(tokenizer).double()


def with_weights(model, weights):
    """The model of a trainer of TRL, in float64 and with these weights."""
    model.double().train().load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("made", [tiny_trl.dialogues, tiny_trl.completions])
def test_gradients_of_sft_are_those_of_records_alone(adapters, made, tmp_path, monkeypatch):
    tokenizer, model = double_model()
    options = {"noise_generator": generator(), **({"peft_config": tiny_trl.lora()} if adapters else {})}
    trainer = tiny_trl.sft(
        tmp_path, data=made(64), tokenizer=tokenizer, model=model, options=options, settings=EXACT, max_steps=1
    )
    plain = copy.deepcopy(tiny_trl.moved(trainer.model))
    noted, rows = one_step(trainer, monkeypatch)
    peer = SFTTrainer(
        copy.deepcopy(plain), tiny_trl.arguments(tmp_path / "peer"), train_dataset=Dataset.from_list(made(64)),
        processing_class=tokenizer,
    )  # fmt: skip
    peer.model.train()

    def by_trl(row):
        return peer.compute_loss(peer.model, peer.data_collator([row]))

    expect_the_loop(noted, plain, lambda row: next_token_loss(plain, row), by_trl, rows)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_gradients_of_dpo_with_adapters_are_those_of_pairs_alone(loss, mode, tmp_path, monkeypatch):
    tokenizer, model = double_model()
    base = copy.deepcopy(model)
    trainer = tiny_trl.dpo(
        tmp_path, tokenizer=tokenizer, model=model, options={"noise_generator": generator()}, max_steps=1,
        loss_type=[loss], settings={**EXACT, "grad_sample_mode": mode},
    )  # fmt: skip
    plain = copy.deepcopy(tiny_trl.moved(trainer.model))
    plain.get_base_model()._forward_pre_hooks.clear()
    noted, rows = one_step(trainer, monkeypatch)
    peer = DPOTrainer(
        copy.deepcopy(base), args=tiny_trl.arguments(tmp_path / "peer", DPOConfig, loss_type=[loss]),
        train_dataset=Dataset.from_list(tiny_trl.pairs(64)), processing_class=tokenizer, peft_config=tiny_trl.lora(),
    )  # fmt: skip
    with_weights(peer.model, plain.state_dict())

    def by_trl(row):
        return peer.compute_loss(peer.model, peer.data_collator([row]))

    expect_the_loop(noted, plain, lambda row: pair_loss(loss, plain, base, row), by_trl, rows)


@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_gradients_of_dpo_on_all_weights_are_those_of_pairs_alone(mode, tmp_path, monkeypatch):
    tokenizer, model = double_model()
    base = copy.deepcopy(model)
    trainer = tiny_trl.dpo(
        tmp_path, tokenizer=tokenizer, model=model, options={"noise_generator": generator()}, max_steps=1,
        settings={**EXACT, "grad_sample_mode": mode}, precompute_ref_log_probs=True,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.25)
    plain = copy.deepcopy(trainer.model)
    plain._forward_pre_hooks.clear()
    noted, rows = one_step(trainer, monkeypatch)
    peer = DPOTrainer(
        copy.deepcopy(plain), copy.deepcopy(base), args=tiny_trl.arguments(tmp_path / "peer", DPOConfig),
        train_dataset=Dataset.from_list(tiny_trl.pairs(64)), processing_class=tokenizer,
    )  # fmt: skip
    peer.model.train()

    def by_trl(row):
        return peer.compute_loss(peer.model, peer.data_collator([row]))

    # The reference was computed once, and is kept in float32.
    expect_the_loop(noted, plain, lambda row: pair_loss("sigmoid", plain, base, row), by_trl, rows, rounding=1e-6)
