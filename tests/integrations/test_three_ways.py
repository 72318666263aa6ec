"""One record's clipped gradient is the same whoever else is in the batch: plain loop, Trainer, command line."""

import pytest
import torch
from common.tone_dialogues import dialogues, write_jsonl
from tiny_chat import byte_tokenizer, chat_model, save_chat_model
from tiny_trainer import arguments, privacy
from torch.utils.data import DataLoader
from transformers import Trainer

from opacus_ac import PrivacyEngine
from opacus_ac.integrations import PrivateTrainer
from opacus_ac.integrations.finetune import ChatDataset, PadCollate
from opacus_ac.integrations.finetune.build import build_trainer
from opacus_ac.integrations.finetune.job import parse
from opacus_ac.optimizer import AdaptiveClipDPOptimizer

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH, RECORDS = 150, 40


def data():
    rows = dialogues("loving", RECORDS, 0)
    tokenizer = byte_tokenizer()
    return rows, ChatDataset(rows, tokenizer, LENGTH), PadCollate(tokenizer.pad_token_id, LENGTH)


def by_loop(folder):
    """(optimizer, function that runs forward and backward on records of these numbers)."""
    _, dataset, collate = data()
    model, engine = chat_model(byte_tokenizer()), PrivacyEngine()
    _, optimizer, _ = engine.make_private(
        module=model, optimizer=torch.optim.AdamW(model.parameters()), noise_multiplier=1.0,
        data_loader=DataLoader(dataset, batch_size=4, collate_fn=collate),
    )  # fmt: skip

    def backward(chosen):
        model(**collate([dataset[i] for i in chosen])).loss.backward()

    return optimizer, backward


def of_trainer(trainer):
    def backward(chosen):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in chosen])
        trainer.training_step(trainer.model, iter([(batch, True)]))

    trainer.create_optimizer()
    return trainer.private_optimizer, backward


def by_trainer(folder):
    _, dataset, collate = data()
    settings = {"train_dataset": dataset, "data_collator": collate, "privacy": privacy(dataset_size=RECORDS)}
    return of_trainer(PrivateTrainer(chat_model(byte_tokenizer()), arguments(folder), **settings))


def by_command_line(folder):
    write_jsonl(folder / "chats.jsonl", data()[0])
    save_chat_model(folder / "model")
    words = [
        "--train_file",
        folder / "chats.jsonl",
        "--output_dir",
        folder / "out",
        "--model_name_or_path",
        folder / "model",
    ]
    words += [
        "--target_epsilon",
        8,
        "--max_length",
        LENGTH,
        "--use_cpu",
        True,
        "--full",
        True,
        "--gradient_accumulation_steps",
        1,
        "--report_to",
        "none",
    ]
    job = parse([str(word) for word in words], None, prog="", usage="")
    return of_trainer(build_trainer(job))


def norms(way, folder, chosen):
    """Gradient norms of records, as the private step would clip them."""
    optimizer, backward = way(folder)
    optimizer.zero_grad()
    backward(chosen)
    found = optimizer.source.finish_batch()
    optimizer.source.clear(sums=True)
    return found


@pytest.mark.parametrize("way", [by_loop, by_trainer, by_command_line])
def test_one_records_gradient_does_not_change_when_others_join(way, tmp_path):
    alone = norms(way, tmp_path, [5])
    assert alone[0] > 0
    for others in ([5, 0], [5, 7, 11, 2, 30], [5, *range(6, 30)]):
        torch.testing.assert_close(norms(way, tmp_path, others)[:1], alone, rtol=1e-5, atol=0)


def test_the_ordinary_loss_would_change_it(tmp_path):
    """A control: with the Trainer's own loss the norm of the record follows who else is there."""
    _, dataset, collate = data()
    found = []
    for chosen in ([5], [5, *range(6, 30)]):
        model = chat_model(byte_tokenizer())
        trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset, data_collator=collate)
        rows = collate([dataset[i] for i in chosen])
        embeddings = model.get_input_embeddings()(rows["input_ids"]).detach().requires_grad_()
        rows = {**rows, "inputs_embeds": embeddings}
        rows.pop("input_ids")
        trainer.compute_loss(model, rows).backward()
        found.append(float(embeddings.grad[0].norm()) * len(chosen))
    assert abs(found[1] / found[0] - 1) > 0.05


def test_two_runs_with_the_same_seed_have_different_noise(tmp_path):
    drawn = []
    add_noise = AdaptiveClipDPOptimizer.add_noise
    for run in range(2):
        (tmp_path / str(run)).mkdir()
        optimizer, backward = by_command_line(tmp_path / str(run))
        optimizer.zero_grad()
        backward([5])
        optimizer.clip_and_accumulate()
        add_noise(optimizer)
        drawn.append(torch.cat([p.grad.reshape(-1) for p in optimizer.params]))
    assert drawn[0].shape == drawn[1].shape
    # A few of so many draws are close to each other by chance.
    assert torch.isclose(drawn[0], drawn[1]).double().mean() < 1e-3
