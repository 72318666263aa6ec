"""Evaluation data that are said to be public: refused where they are, or share rows with, the private data."""

import csv
import json
import os

import datasets
import lightning
import numpy as np
import pytest
import torch
from common.tone_dialogues import dialogues, write_jsonl
from tiny_chat import save_chat_model
from tiny_finetune import command
from tiny_lightning import Classifier, made
from tiny_trainer import rows, trainer
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split

from opacus_ac import cli
from opacus_ac.integrations import public_rows
from opacus_ac.integrations.lightning import PrivacyCallback
from opacus_ac.integrations.public_rows import PrivateRows

pytestmark = pytest.mark.filterwarnings("ignore")


class Items(Dataset):
    """Rows that are made when they are asked for."""

    def __init__(self, items, change=lambda row: row):
        self.items, self.change = items, change

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.change(self.items[index])


class Users(Items):
    max_rows_per_user = 4


class Stream(IterableDataset):
    def __iter__(self):
        yield from rows(4)


def lists(items):
    return [{name: value.tolist() for name, value in row.items()} for row in items]


def arrow(items, **columns):
    return datasets.Dataset.from_list([{**row, **columns} for row in lists(items)])


PRIVATE = rows(40)
OTHERS = rows(8, seed=8)
MIXED = [*OTHERS, PRIVATE[17]]
HALVES = random_split(PRIVATE, [30, 10], torch.Generator().manual_seed(0))
TABLE = arrow(PRIVATE)
SPLIT = TABLE.train_test_split(10, seed=0)

SHARED = {  # private, public
    "the dataset": (PRIVATE, PRIVATE),
    "a copy of the list": (PRIVATE, list(PRIVATE)),
    "equal tensors": (PRIVATE, rows(40)),
    "one row": (PRIVATE, MIXED),
    "one row, as lists": (PRIVATE, lists(MIXED)),
    "one row, as arrays": (PRIVATE, [{k: v.numpy() for k, v in row.items()} for row in MIXED]),
    "other types of numbers": (PRIVATE, [{k: v.to(torch.int32) for k, v in row.items()} for row in MIXED]),
    "columns in another order": (PRIVATE, [dict(reversed(row.items())) for row in MIXED]),
    "with a column more": (PRIVATE, [{**row, "idx": i} for i, row in enumerate(MIXED)]),
    "with a column less": ([{**row, "user": "a"} for row in PRIVATE], MIXED),
    "a column that is None": (PRIVATE, [{**row, "idx": None} for row in MIXED]),
    "a Subset": (PRIVATE, Subset(PRIVATE, [3, 4])),
    "of a Subset": (Subset(PRIVATE, range(20)), Subset(PRIVATE, [19, 30])),
    "Subsets of Subsets": (Subset(Subset(PRIVATE, range(10, 40)), [5]), Subset(Subset(PRIVATE, range(20)), [15])),
    "a Subset of a copy": (PRIVATE, Subset(rows(40), [39])),
    "ConcatDataset": (PRIVATE, ConcatDataset([OTHERS, rows(40)])),
    "made when asked for": (Items(PRIVATE), Items(MIXED)),
    "one by name": (PRIVATE, {"good": OTHERS, "bad": MIXED}),
    "a table": (TABLE, arrow(PRIVATE)),
    "a selection of the table": (TABLE, TABLE.select([7])),
    "a shuffled table": (TABLE, TABLE.shuffle(seed=1)),
    "a table with a format": (TABLE, TABLE.with_format("torch").select([1, 2])),
    "a table with a column more": (TABLE, arrow(MIXED, idx=3)),
    "a table and a list": (TABLE, MIXED),
    "TensorDataset": (TensorDataset(torch.randn(9, 2), torch.arange(9)), None),
    "texts": ([{"text": f"number {i}", "label": i % 2} for i in range(9)], [{"text": "number 3", "label": 1}]),
    "texts without labels": ([{"text": f"number {i}", "label": i % 2} for i in range(9)], [{"text": "number 3"}]),
    "nested": ([[{"role": "user", "content": "a"}], []], [[{"content": "a", "role": "user"}]]),
    "half precision": ([{"x": torch.tensor([0.5, 0.25])}], [{"x": torch.tensor([0.5, 0.25], dtype=torch.bfloat16)}]),
    "floats": ([{"x": torch.tensor([0.1, 0.3])}], [{"x": [0.1, 0.3]}]),
    "rows of a user": (Users([PRIVATE[:3], PRIVATE[3:5]]), [*MIXED[:8], PRIVATE[4]]),
}  # fmt: skip
SHARED["TensorDataset"] = (SHARED["TensorDataset"][0], Subset(TensorDataset(*SHARED["TensorDataset"][0].tensors), [2]))

APART = {
    "others": (PRIVATE, OTHERS),
    "halves": (HALVES[0], HALVES[1]),
    "halves, made when asked for": (Subset(Items(PRIVATE), range(20)), Subset(Items(PRIVATE), range(20, 40))),
    "parts of one table": (SPLIT["train"], SPLIT["test"]),
    "the same labels": ([{"x": torch.rand(3), "label": 1}], [{"y": torch.rand(3), "label": 1}]),
    "the same numbers in another shape": ([{"x": torch.zeros(2, 3)}], [{"x": torch.zeros(3, 2)}]),
    "nothing": (None, OTHERS),
    "a stream": (PRIVATE, Stream()),  # cannot be compared
    "objects": ([{"x": object()}] * 2, [{"x": object()}]),
    "large integers": ([{"x": [2**40, 1]}], [{"x": [2**40 + 1, 1]}]),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARED)
def test_shared_rows_are_found(case):
    private, public = SHARED[case]
    reason = PrivateRows(private).shared_by(public)
    assert reason is not None
    assert "private" in reason
    assert "evaluate on other public data" in reason


@pytest.mark.parametrize("case", APART)
def test_rows_apart_are_let_through(case):
    private, public = APART[case]
    assert PrivateRows(private).shared_by(public) is None


def test_the_number_of_a_row_is_named():
    assert "1 of its rows are rows of the private data (from 0: 8)" in PrivateRows(PRIVATE).shared_by(MIXED)


def test_reading_rows_moves_no_generator_and_happens_once():
    asked = []
    private = Items(PRIVATE, lambda row: asked.append((torch.rand(()), np.random.rand())) or row)
    torch.manual_seed(1)
    np.random.seed(1)
    wanted = (float(torch.rand(())), np.random.rand())
    torch.manual_seed(1)
    np.random.seed(1)
    known = PrivateRows(private)
    known.shared_by(OTHERS)
    count = len(asked)
    known.shared_by(OTHERS)
    known.shared_by(rows(4, seed=9))
    assert (float(torch.rand(())), np.random.rand()) == wanted
    assert len(asked) <= count + 2


def test_of_rows_that_are_made_some_are_looked_at(monkeypatch):
    monkeypatch.setattr(public_rows, "COMPUTED_ROWS", 10)
    asked = []
    private = Items(PRIVATE, lambda row: asked.append(1) or row)
    assert PrivateRows(private).shared_by(list(PRIVATE)) is not None
    assert len(asked) <= 11


# ---------------------------------------------------------------- the Trainer


@pytest.mark.parametrize("case", ["the dataset", "one row", "a Subset", "one by name", "made when asked for"])
def test_the_trainer_refuses_shared_rows(case, tmp_path):
    private, public = SHARED[case]
    public_settings = {"evaluation_is_public": True}
    with pytest.raises(ValueError, match=r"eval_dataset is (not public|train_dataset)"):
        trainer(tmp_path, data=private, settings=public_settings, options={"eval_dataset": public})
    later = trainer(tmp_path, data=private, settings=public_settings, options={"eval_dataset": {"a": OTHERS}})
    for use in (later.evaluate, later.predict):
        with pytest.raises(ValueError, match=r"eval_dataset is (not public|train_dataset)"):
            use(public)
    later.eval_dataset["a"] = MIXED
    with pytest.raises(ValueError, match="not public"):
        later.evaluate("a")
    assert later.state.log_history == []


def test_the_trainer_refuses_its_own_loader(tmp_path):
    made = trainer(tmp_path, data=PRIVATE, settings={"evaluation_is_public": True}, options={"eval_dataset": OTHERS})
    for loader in (made.get_train_dataloader(), DataLoader(PRIVATE, batch_size=4), DataLoader(Subset(PRIVATE, [1]))):
        with pytest.raises(ValueError, match="eval_dataset is train_dataset"):
            made.evaluation_loop(loader, "Evaluation")
    assert "eval_loss" in made.evaluate()


# ---------------------------------------------------------------- Lightning


class Validated(Classifier):
    def validation_step(self, batch, index):
        self.log("val_loss", self.layers(batch[0]).sum())

    test_step = validation_step


@pytest.mark.parametrize("how", ["fit", "validate", "test"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_lightning_refuses_shared_rows(how, several, shared, tmp_path):
    model, engine, optimizer, loader = made(model=Validated())
    others = TensorDataset(torch.zeros(4, 4), torch.zeros(4).long())
    data = Subset(TensorDataset(*loader.dataset.tensors), [3]) if shared else others
    public = [DataLoader(others), DataLoader(data)] if several else DataLoader(data)
    run = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path, callbacks=[PrivacyCallback(engine, optimizer, loader, delta=1e-3)],
    )  # fmt: skip
    if several:
        model.validation_step = model.test_step = lambda batch, index, dataloader_idx=0: model.log("val_loss", 1.0)

    def go():
        return run.fit(model, loader, public) if how == "fit" else getattr(run, how)(model, public)

    if shared:
        with pytest.raises(ValueError, match=r"data are not public.* 1 of its rows"):
            go()
        assert optimizer.steps_taken == 0
        assert not run.callback_metrics
    else:
        go()


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    save_chat_model(folder / "model")
    records = dialogues("loving", 60, 0)
    write_jsonl(folder / "chats.jsonl", records)
    (folder / "link.jsonl").symlink_to(folder / "chats.jsonl")
    os.link(folder / "chats.jsonl", folder / "hard.jsonl")
    (folder / "copy.jsonl").write_bytes((folder / "chats.jsonl").read_bytes())
    write_jsonl(folder / "part.jsonl", [*dialogues("loving", 6, 1), records[9]])
    with (folder / "part.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["messages"])
        writer.writerow([json.dumps(records[3]["messages"])])
    (folder / "spaces.jsonl").write_text(json.dumps(records[5], indent=None, separators=(" ,", " : ")) + "\n\n")
    with (folder / "users.jsonl").open("w") as stream:
        stream.writelines(json.dumps({**record, "user": i % 7}) + "\n" for i, record in enumerate(records))
    write_jsonl(folder / "public.jsonl", dialogues("loving", 6, 1))
    return folder


FILES = {
    "chats.jsonl": "is the private file",
    "./chats.jsonl": "is the private file",
    "link.jsonl": "under another name",
    "hard.jsonl": "under another name",
    "copy.jsonl": "has the content of the private file",
    "part.jsonl": "1 of its rows",
    "part.csv": "1 of its rows",
    "spaces.jsonl": "1 of its rows",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("users", [False, True])
def test_the_command_line_refuses_the_private_file_and_its_rows(name, users, place, tmp_path, capsys):
    settings = {"train_file": place / "users.jsonl", "group_by": "user"} if users else {}
    message = "of its rows are rows of the private data" if users else FILES[name]
    options = command(
        place,
        tmp_path / "out",
        validation_file=place / name,
        evaluation_is_public=True,
        gradient_accumulation_steps=1,
        **settings,
    )
    assert cli.main(options) == 3
    error = capsys.readouterr().err
    assert "is not public" in error
    assert message in error
    assert not (tmp_path / "out" / "privacy.ledger").exists()
