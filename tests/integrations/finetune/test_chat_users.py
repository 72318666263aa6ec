"""Dialogues of users: who is in a file, which rows are kept, and batches that fill up."""

import pytest
import torch
from chat_rows import write
from tiny_chat import byte_tokenizer, chat_model
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.integrations.finetune import ChatDataset, UserCollate, UserDataset, chat_files
from opacus_ac.integrations.finetune.chat_data import IGNORE
from opacus_ac.integrations.finetune.chat_users import choose_rows


def talk(text, reply="Yes."):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


def row(user, text):
    return {"user_id": user, "prompt": text, "response": "Yes."}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("names", [("ann", "bob"), (7, 0)])
def test_users_of_each_kind_of_file(suffix, names, tmp_path):
    ann, bob = names
    path = write(tmp_path / f"m{suffix}", [row(ann, "1"), row(bob, "2"), row(ann, "3")])
    found = chat_files.read_users(path)
    assert list(found.items()) == [(str(ann), [talk("1"), talk("3")]), (str(bob), [talk("2")])]


def test_a_number_and_its_digits_are_one_user(tmp_path):
    path = write(tmp_path / "m.jsonl", [{**row(7, "1"), "sender": "7"}, {**row("7", "2"), "sender": 7}])
    for column in ("user_id", "sender"):
        assert chat_files.read_users(path, column) == {"7": [talk("1"), talk("2")]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.jsonl", '{"prompt": "a", "response": "b"}', '{path}:1: "user_id" is missing'),
        ("m.jsonl", '\n{"user_id": null, "prompt": "a", "response": "b"}', '{path}:2: "user_id" is missing'),
        ("m.jsonl", '{"user_id": "", "prompt": "a", "response": "b"}', '{path}:1: "user_id" is missing'),
        ("m.jsonl", '{"user_id": true, "prompt": "a", "response": "b"}', '{path}:1: "user_id" must be a string or an integer'),
        ("m.jsonl", '{"user_id": 1.0, "prompt": "a", "response": "b"}', '{path}:1: "user_id" must be a string or an integer'),
        ("m.jsonl", '{"user_id": ["a"], "prompt": "a", "response": "b"}', '{path}:1: "user_id" must be'),
        ("m.jsonl", '{"user_id": "ann"}', '{path}:1: "messages" is missing'),
        ("m.csv", "user_id,prompt,response\nann,a,b\n,c,d\n", '{path}:3: "user_id" is missing'),
        ("m.txt", "a", '{path}:1: "user_id" is missing. The row has "text"'),
        ("m.csv", "userid,prompt,response\nann,a,b\n", '{path}:2: "user_id" is missing: did you mean "userid"?'),
        ("m.zip", "", "{path}: no known kind of file"),
    ],
)  # fmt: skip
def test_a_row_of_nobody_is_named_by_file_and_line(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"m\.") as caught:
        chat_files.read_users(path)
    assert str(caught.value).startswith(words.format(path=path))


@pytest.mark.parametrize("seed", [None, 0, 5])
def test_which_rows_are_kept(seed):
    assert choose_rows(0, 3, seed) == []
    assert choose_rows(2, 3, seed) == [0, 1]
    chosen = choose_rows(50, 3, seed)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 3
    assert (chosen == [0, 1, 2]) == (seed is None)
    assert choose_rows(50, 3, seed) == chosen


def dataset(users, **changes):
    return UserDataset(users, byte_tokenizer(), **{"max_length": 80, "max_rows_per_user": 2, **changes})


USERS = {"ann": [talk("1"), talk("2", "Or no."), talk("3")], "bob": [talk("4")], "eve": [], "joe": [talk("x" * 99)]}


@pytest.mark.parametrize("seed", [None, 3])
def test_an_item_is_the_rows_of_one_user(seed):
    data = dataset(USERS, seed=seed)
    assert len(data) == 4  # eve has no row and joe no label, and N must not depend on that
    assert [len(data[i]) for i in range(4)] == [2, 1, 0, 1]
    rows = ChatDataset([USERS["ann"][i] for i in choose_rows(3, 2, seed)], byte_tokenizer(), 80)
    for got, want in zip(data[0], rows, strict=True):
        assert torch.equal(got["input_ids"], want["input_ids"])
        assert torch.equal(got["labels"], want["labels"])
    assert bool((data[3][0]["labels"] == IGNORE).all())


@pytest.mark.parametrize("seed", [None, 3])
def test_a_users_item_does_not_depend_on_the_others(seed):
    """Were rows chosen by the user's place in the dataset, one more user would change those behind."""
    many = {f"user {i}": [talk(str(10 * i + j)) for j in range(6)] for i in range(5)}
    whole = dataset(many, seed=seed)
    for gone in many:
        rest = {name: rows for name, rows in many.items() if name != gone}
        kept = [item for name, item in zip(many, whole.users, strict=True) if name != gone]
        for got, want in zip(dataset(rest, seed=seed).users, kept, strict=True):
            assert [r["input_ids"].tolist() for r in got] == [r["input_ids"].tolist() for r in want]


def test_users_may_come_without_names():
    named, bare = dataset(USERS), dataset([[{"messages": rows} for rows in own] for own in USERS.values()])
    assert [len(own) for own in named] == [len(own) for own in bare]
    assert torch.equal(named[0][1]["input_ids"], bare[0][1]["input_ids"])


@pytest.mark.parametrize(
    ("users", "changes", "words"),
    [
        (USERS, {"max_rows_per_user": 0}, "max_rows_per_user must be at least 1, got 0"),
        (USERS, {"max_length": 0}, "user 0, row 0: max_length must be positive"),
        ({"joe": USERS["joe"]}, {}, "no reply fits into max_length=80 tokens for any of the first 1 users"),
    ],
)
def test_bad_datasets(users, changes, words):
    with pytest.raises(ValueError, match=words):
        dataset(users, **changes)


def test_users_are_filled_up_to_the_most_rows_of_one():
    data, collate = dataset(USERS), UserCollate(0, 80)
    batch = collate([data[1], data[0], data[2]])
    rows, width = batch["input_ids"].shape
    assert rows == 6
    assert width % 8 == 0
    filling = [1, 4, 5]
    assert bool((batch["labels"][filling] == IGNORE).all())
    assert batch["attention_mask"][filling].sum(1).tolist() == [1, 1, 1]
    for index, row_of_user in ((0, data[1][0]), (2, data[0][0]), (3, data[0][1])):
        length = len(row_of_user["input_ids"])
        assert torch.equal(batch["input_ids"][index, -length:], row_of_user["input_ids"])
        assert torch.equal(batch["labels"][index, -length:], row_of_user["labels"])
    assert len(collate([data[2]])["input_ids"]) == 1  # a user without rows alone
    evaluated = collate(list(ChatDataset([talk("1"), talk("2")], byte_tokenizer(), 80)))
    assert len(evaluated["input_ids"]) == 2


def test_a_label_on_the_first_token_does_not_count():
    """Padding in front of it would predict it, which there is only beside a longer row."""
    short, long = ({"input_ids": torch.arange(3, 3 + n), "labels": torch.arange(3, 3 + n)} for n in (4, 9))
    collate, model = UserCollate(0, 16), chat_model(byte_tokenizer()).eval()
    losses = []
    for company in ([], [[long]]):
        batch = collate([[short], *company])
        one = {key: value[:1] for key, value in batch.items()}
        with torch.no_grad():
            losses.append(float(model(**one).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_from_a_file_to_a_private_step(tmp_path):
    users = [row(f"u{i % 8}", f"text {i}") for i in range(20)]
    data = UserDataset(
        chat_files.read_users(write(tmp_path / "m.csv", users)), byte_tokenizer(), max_length=80, max_rows_per_user=2
    )
    tokenizer, engine = byte_tokenizer(), PrivacyEngine()
    batches = DataLoader(data, batch_size=4, collate_fn=UserCollate(tokenizer.pad_token_id, 80))
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=(model := chat_model(tokenizer)), optimizer=torch.optim.AdamW(model.parameters()), data_loader=batches,
        target_epsilon=3.0, target_delta=1e-2, epochs=2, max_rows_per_user=2,
    )  # fmt: skip
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    assert 2.5 < engine.get_epsilon(1e-2) <= 3.0
    assert engine.privacy_report().dataset_size == 8
