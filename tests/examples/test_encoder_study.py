"""The study on real mail and rated sentences: what is read of a message, what a record is, and whole runs on a tiny encoder."""

import hashlib
import io
import json
import tarfile
import urllib.error

import encoder_study as study
import pytest
import torch
from common.results import read
from encoder import mail, tasks
from encoder_study import Cell
from tiny_bert import tiny_bert

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
PEOPLE = [f"person{i}@example.org" for i in range(40)]
SENTENCES = [(f"a {word} film, number {i}", word == "fine") for i in range(60) for word in ("fine", "dull")]


def entry(sender, subject, body, group="easy-ham-1"):
    return {"id": "1", "group": group, "checksum": "0", "text": f"From: {sender}\nSubject: {subject}\n{body}"}


def messages():
    """One person wrote five, the others one each; every third message is spam."""
    for number, sender in enumerate([*PEOPLE, *PEOPLE[:1] * 4]):
        group, words = ("spam-1", "buy cheap pills") if number % 3 == 0 else ("hard-ham-1", "the meeting is at noon")
        yield f"{group}/{number:05}.json", entry(f"{sender} <{sender}>", f"number {number}", f"\n{words}\n", group)


def archived(path, entries):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in entries:
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The study reads a hand-made archive, invented sentences and a tiny encoder; nothing is fetched."""
    archived(tmp_path / "mail.tgz", [*messages(), ("file_list.json", {}), ("readme/easy-ham-1/1.json", {})])
    tiny_bert(tmp_path / "model", [text for text, _ in SENTENCES] + ["buy cheap pills the meeting is at noon"])
    for module in (study, tasks):
        monkeypatch.setattr(module, "encoder_folder", lambda: tmp_path / "model")
    monkeypatch.setattr(tasks, "archive_file", lambda: tmp_path / "mail.tgz")
    monkeypatch.setattr(tasks, "sentences", lambda name: [(text, int(good)) for text, good in SENTENCES])
    tasks.task_of.cache_clear()
    yield tmp_path
    tasks.task_of.cache_clear()


# ---------------------------------------------------------------- mail

PLAIN = "Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: quoted-printable\n\ncaf=C3=A9\n"
MARKED = "Content-Type: text/html\n\n<style>p {}</style><p>one &amp; <b>two</b><!-- three\n --></p>\n"
BOTH = f'Content-Type: multipart/mixed; boundary="x"\n\n--x\n{MARKED}\n--x\n{PLAIN}\n--x--\n'
PICTURE = "Content-Type: image/png\nContent-Transfer-Encoding: base64\n\nAAAA\n"
UNKNOWN = "Content-Type: text/plain; charset=nobody-knows\n\nwords\n"


@pytest.mark.parametrize(
    ("body", "words"),
    [(PLAIN, "café"), (MARKED, "one & two"), (BOTH, "café"), (PICTURE, ""), (UNKNOWN, "words")],
    ids=["plain", "marked", "both", "picture", "unknown charset"],
)
def test_the_words_of_a_message_are_read(tmp_path, body, words):
    path = archived(tmp_path / "a.tgz", [("spam-2/1.json", entry('"A B" <A.B@example.org>', "hello", body, "spam-2"))])
    (found,) = mail.read_messages(path)
    assert (found.sender, found.spam) == ("a.b@example.org", True)
    assert found.text.split() == ["hello", *words.split()]


@pytest.mark.parametrize(
    ("field", "address"),
    [
        ("A.B@example.org", "a.b@example.org"),
        ("a@b.org <c@d.org>", "c@d.org"),
        ('"Name, A" <a@b.org>', "a@b.org"),
        ("a@b.org (A Name)", "a@b.org"),
        ("nobody", ""),
        ("", ""),
    ],
)
def test_the_sender_is_the_address(field, address, tmp_path):
    path = archived(tmp_path / "a.tgz", [("spam-1/1.json", entry(field, "hello", "\nwords"))])
    assert [message.sender for message in mail.read_messages(path)] == [address]


def test_another_archive_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OPACUS_AC_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(b"something else"))
    with pytest.raises(
        OSError, match="not the expected file: SHA-256 " + hashlib.sha256(b"something else").hexdigest()
    ):
        mail.archive_file()
    assert not list(tmp_path.iterdir())

    def unreachable(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(OSError, match=r"could not be fetched from https://registry\.npmjs\.org/.*no route"):
        mail.archive_file()


def test_the_archive_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OPACUS_AC_CACHE", str(tmp_path))
    monkeypatch.setattr(mail, "SHA256", hashlib.sha256(b"mail").hexdigest())
    fetched = []
    monkeypatch.setattr("urllib.request.urlopen", lambda url, **_: fetched.append(url) or io.BytesIO(b"mail"))
    assert mail.archive_file() == mail.archive_file()
    assert mail.archive_file().read_bytes() == b"mail"
    assert fetched == [mail.ARCHIVE]


# ---------------------------------------------------------------- records


def test_records_are_messages_or_senders_and_none_has_public_text(tiny):
    held = sum(tasks.is_held_out(person) for person in PEOPLE)
    extra = 0 if tasks.is_held_out(PEOPLE[0]) else 4
    assert 0 < held < len(PEOPLE)
    by_message, by_sender = tasks.mail_by_message(), tasks.mail_by_sender()
    assert len(by_message.private) == len(PEOPLE) - held + extra
    assert len(by_sender.private) == len(PEOPLE) - held
    assert len(by_message.public) == len(by_sender.public) == held + 4 - extra
    rows = [len(record) for record in by_sender.private.records]
    assert sorted(rows) == [1] * (len(rows) - 1) + [tasks.MOST if extra else 1]
    assert all(len(record) == 1 for record in by_message.private.records)
    for task in (by_message, by_sender, tasks.rated_sentences()):
        private = {tuple(ids) for record in task.private.records for ids, _ in record}
        assert private.isdisjoint(tuple(ids) for ids, _ in task.public)


def test_rows_that_fill_up_change_no_loss(tiny):
    """A record of one row, beside one of three and alone."""
    model = study.new_model("lora", 0).eval()
    one, three = [([2, 7, 3], 1)], [([2, 9, 3], 0), ([2, 8, 8, 3], 1), ([2, 3], 0)]
    alone = study.record_losses(model, tasks.collate([one]), 1)
    together = study.record_losses(model, tasks.collate([one, three]), 2)
    torch.testing.assert_close(together[:1], alone)
    rows = study.record_losses(model, tasks.collate([[row] for row in three]), 3)
    torch.testing.assert_close(together[1], rows.mean())


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("weights", study.WEIGHTS)
def test_a_run_spends_its_epsilon_and_moves_what_it_trains(tiny, task, weights, monkeypatch):
    monkeypatch.setattr(study, "DELTA", 1e-3)
    cell = Cell(task, weights, 8.0, 0, steps=2, batch=8, physical=4)
    result = study.run(cell)
    assert json.loads(json.dumps(result)) == result
    assert result["loss"] != result["before"]["loss"]
    assert 0.9 * 8 < result["spent"] <= 8
    assert len(result["C"]) == 2
    assert {**study.run(cell), "cpu_seconds": 0} == {**result, "cpu_seconds": 0}


def test_the_reference_has_no_noise_and_learns(tiny, monkeypatch):
    monkeypatch.setitem(study.RATES, "all", 0.01)  # for an encoder of which nothing was trained
    found = study.run(Cell("sentences", "all", None, 0, steps=40, batch=32))
    assert found["spent"] is None
    assert found["noise_multiplier"] == 0
    assert found["auc"] > 0.9 > found["before"]["auc"]


def test_adapters_leave_the_encoder_as_it_is(tiny):
    named = dict(study.new_model("lora", 0).named_parameters())
    trained = {name for name, p in named.items() if p.requires_grad}
    assert trained == {name for name in named if "lora" in name or name.startswith("head")}
    assert all(p.requires_grad for p in study.new_model("all", 0).parameters())


def test_scores_are_those_of_the_rows(tiny, monkeypatch):
    class Fixed(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return torch.stack([torch.zeros(len(input_ids)), input_ids[:, 1].float() - 5], 1)

    rows = [([2, 4, 3], 0), ([2, 6, 3], 0), ([2, 7, 9, 3], 1), ([2, 9, 3], 1)]
    found = study.scores(Fixed(), rows)
    assert (found["accuracy"], found["balanced"], found["auc"]) == (0.75, 0.75, 1.0)
    logits = torch.tensor([[0.0, -1], [0, 1], [0, 2], [0, 4]])
    assert found["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 0, 1, 1])).item(), abs=1e-6
    )


def test_ties_count_half():
    assert study.area(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0])) == 0.875


def test_what_has_run_is_not_repeated(tiny, capsys, monkeypatch):
    monkeypatch.setattr(study, "DELTA", 1e-3)
    cells = [Cell("sentences", "lora", e, 0, steps=1, batch=8) for e in (8.0, None)]
    monkeypatch.setattr(study, "wanted", lambda arguments: cells)
    out = tiny / "results.jsonl"
    arguments = ["--jobs", "1", "--out", str(out)]
    with pytest.raises(SystemExit, match="no finished run"):
        study.main([*arguments, "--report"])
    assert study.main(arguments) == study.main(arguments) == 0
    assert [r["key"] for r in read(out)] == [cell.key() for cell in cells]
    printed = capsys.readouterr().out
    assert "| sentences | " in printed
    assert "| lora | 8 | 1 |" in printed
    assert "| lora | none | 1 |" in printed


def test_the_grid_has_every_epsilon_of_a_seed_before_the_next_seed():
    parsed = type(
        "A",
        (),
        {
            "quick": False,
            "seeds": [0, 1],
            "tasks": ["sentences"],
            "weights": ["lora"],
            "steps": 5,
            "epsilons": [2.0],
            "clip_rate": 0.5,
        },
    )
    assert {c.clip_rate for c in study.wanted(parsed)} == {0.5}
    assert [(c.seed, c.epsilon) for c in study.wanted(parsed)] == [(0, 2.0), (0, None), (1, 2.0), (1, None)]
    parsed.quick = True
    assert {c.steps for c in study.wanted(parsed)} == {4}
