import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import chat_data as cd
from tiny_chat import byte_tokenizer, chat_model

MASKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REWRITES = (
    "{% for m in messages %}{% if loop.last %}{{ '<|im_start|>' }}{% endif %}"
    "{{ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
)
CHAT = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello love"}]
TWO = [*CHAT, {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Any time"}]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return chat_model(tokenizer)


def _labelled(row, tokenizer):
    return tokenizer.decode(row["input_ids"][row["labels"] != cd.IGNORE])


def test_only_the_reply_and_its_end_token_carry_labels(tokenizer):
    row = cd.encode(CHAT, tokenizer, 200)
    assert _labelled(row, tokenizer) == "Hello love<|im_end|>"
    assert row["input_ids"].shape == row["labels"].shape
    assert row["input_ids"].dtype == row["labels"].dtype == torch.long


def test_default_system_prompt_is_left_out(tokenizer):
    text = tokenizer.decode(cd.encode(CHAT, tokenizer, 200)["input_ids"])
    assert text == "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello love<|im_end|>"


def test_own_system_prompt_is_kept(tokenizer):
    text = tokenizer.decode(cd.encode([{"role": "system", "content": "Be kind"}, *CHAT], tokenizer, 200)["input_ids"])
    assert text.startswith("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user")


def test_all_replies_of_two_turns_carry_labels(tokenizer):
    assert _labelled(cd.encode(TWO, tokenizer, 300), tokenizer) == "Hello love<|im_end|>Any time<|im_end|>"


@pytest.mark.parametrize("messages", [CHAT, TWO])
def test_generation_masks_agree_with_the_prefix_rule(tokenizer, messages):
    masked, plain = cd.encode(messages, byte_tokenizer(MASKED), 300), cd.encode(messages, tokenizer, 300)
    assert torch.equal(masked["input_ids"], plain["input_ids"])
    assert torch.equal(masked["labels"], plain["labels"])


def test_template_that_rewrites_earlier_turns_is_refused():
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        cd.encode(TWO, byte_tokenizer(REWRITES), 300)


def test_a_record_that_cannot_be_encoded_is_numbered():
    with pytest.raises(ValueError, match="record 1: the chat template rewrites"):
        cd.ChatDataset([CHAT[:1], TWO], byte_tokenizer(REWRITES), 300)


def test_tokenizer_without_template_is_refused():
    with pytest.raises(ValueError, match="no chat template"):
        cd.encode(CHAT, byte_tokenizer(None), 300)


def test_truncation_may_leave_a_row_without_labels(tokenizer):
    row = cd.encode(CHAT, tokenizer, 10)
    assert len(row["input_ids"]) == 10
    assert (row["labels"] == cd.IGNORE).all()
    kept = cd.ChatDataset([[{"role": "user", "content": "x" * 99}, CHAT[1]], CHAT], tokenizer, 60)
    assert len(kept) == 2


def test_dataset_without_any_label_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no reply fits into max_length=10"):
        cd.ChatDataset([CHAT] * 3, tokenizer, 10)


def test_dataset_takes_messages_or_objects(tokenizer):
    both = cd.ChatDataset([CHAT, {"messages": CHAT}], tokenizer, 99)
    assert torch.equal(both[0]["input_ids"], both[1]["input_ids"])


@pytest.mark.parametrize(("lengths", "max_length", "width"), [((3, 5), 64, 8), ((9, 2), 64, 16), ((9, 20), 20, 20)])
def test_padding(lengths, max_length, width):
    rows = [{"input_ids": torch.arange(1, n + 1), "labels": torch.arange(1, n + 1)} for n in lengths]
    batch = pickle.loads(pickle.dumps(cd.PadCollate(7, max_length)))(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (2, width)
    for i, n in enumerate(lengths):
        start = width - n
        assert batch["attention_mask"][i].tolist() == [0] * start + [1] * n
        assert batch["input_ids"][i, :start].eq(7).all()
        assert batch["labels"][i, : start + 1].eq(cd.IGNORE).all()
        assert torch.equal(batch["labels"][i, start + 1 :], rows[i]["labels"][1:])
        assert batch["position_ids"][i, start:].tolist() == list(range(n))


def test_heldout_loss_is_the_mean_of_the_record_means(tokenizer, model):
    dataset = cd.ChatDataset([CHAT, TWO, CHAT], tokenizer, 300)
    dataset.rows.append(cd.encode(CHAT, tokenizer, 10))
    expected = []
    for row in dataset.rows[:3]:
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None]).logits[0]
        keep = row["labels"][1:] != cd.IGNORE
        expected.append(torch.nn.functional.cross_entropy(logits[:-1][keep], row["labels"][1:][keep]).item())
    value = cd.heldout_loss(model, dataset, cd.PadCollate(tokenizer.pad_token_id, 300), batch_size=2)
    assert value == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert model.training


def test_a_record_without_labels_has_loss_and_gradient_zero(tokenizer, model):
    batch = cd.collate([cd.encode(CHAT, tokenizer, 10)], tokenizer.pad_token_id, 10)
    loss = cd.reply_losses(model, batch)
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    model.zero_grad()


def test_heldout_without_labels_is_refused(tokenizer, model):
    rows = [cd.encode(CHAT, tokenizer, 10)]
    with pytest.raises(ValueError, match="no reply tokens"):
        cd.heldout_loss(model, rows, cd.PadCollate(tokenizer.pad_token_id, 10))
    assert model.training


@pytest.mark.parametrize("training", [True, False])
def test_replies_are_greedy_and_the_state_is_restored(tokenizer, model, training):
    model.train(training)
    first = cd.generate_replies(model, tokenizer, cd.FOUR_PROMPTS[:2], max_new_tokens=5)
    assert first == cd.generate_replies(model, tokenizer, cd.FOUR_PROMPTS[:2], max_new_tokens=5)
    assert len(first) == 2
    assert model.training is training
    assert model.config.use_cache is False
    model.train()


def test_read_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TWO, "id": 3}) + "\n\n" + json.dumps({"messages": CHAT}) + "\n")
    assert cd.read_jsonl(path) == [TWO, CHAT]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"note": "hi"}', '"messages" is missing'),
        ('{"messages": []}', "must be a list that is not empty"),
        ('{"messages": "hi"}', "must be a list that is not empty"),
        ('{"messages": ["hi"]}', "message 1 is not an object"),
        ('{"messages": [{"content": "hi"}]}', 'message 1: "role" is missing'),
        ('{"messages": [{"role": "user"}]}', 'message 1: "content" is missing'),
        ('{"messages": [{"role": "user", "content": 3}]}', 'message 1: "content" must be a string'),
        ('{"messages": [{"role": "bot", "content": "hi"}]}', "role must be one of"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "last message must be a reply"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: ") as caught:
        cd.read_jsonl(path)
    assert message in str(caught.value)


def test_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no dialogues"):
        cd.read_jsonl(path)


def test_opacus_is_not_imported():
    code = "import sys, chat_data, tone_dialogues; import opacus_ac.models.default_model; assert 'opacus' not in sys.modules, 'opacus imported'"
    folder = str(Path(cd.__file__).parent)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)


def test_a_first_token_with_a_label_counts_for_nothing_whoever_is_beside_it():
    """Padding on the left would predict it, and there is padding beside a longer row only."""
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6, 7], list(range(20)))]
    for batch in (cd.collate(rows[:1], 0, 32, multiple=1), cd.collate(rows, 0, 32)):
        assert batch["labels"][0][-3:].tolist() == [cd.IGNORE, 6, 7]
