"""Chats as records, the study on them and the secrets hidden in them, on a hand-made file with the real structure."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import chats_study as chats
import secrets_study as chats_secrets
import torch
from chats import canaries
from chats import data as chats_data
from chats import model as chats_model
from chats.data import IGNORE, TURN, Turn, is_held_out, make_records
from chats.model import Settings
from chats_study import Cell

PUBLIC = [
    f"the {noun} was {word} and my code is 0123456789" for noun in ("film", "book") for word in ("good", "bad")
] * 8
TINY = Settings(
    hidden=16, layers=1, vocab=300, length=24, most=2, public_steps=3, public_batch=4, batch=8, steps=2, heldout=8, physical=4,
)  # fmt: skip
SECRETS = chats_secrets.Settings(model=Settings(**{**vars(TINY), "most": 1}), records=20, heldout=4)
PEOPLE = [f"person-{i}" for i in range(40)]
HELD = [p for p in PEOPLE if is_held_out(p)]
KNOWN = [p for p in PEOPLE if not is_held_out(p)]


def message(sender: str, text: str) -> dict:
    return {"text": text, "timestamp": "2018-05-02T19:38:15Z", "sender": sender}


def raw() -> dict:
    """Conversations of two, one whom nobody answered, and one person with many; prompts and ratings as in the package."""
    pairs = [(KNOWN[0], KNOWN[i]) for i in range(1, 12)] + [(HELD[0], KNOWN[1]), (HELD[1], HELD[0])]
    found = {
        f"id-{i}": {
            "messages": [
                [message(a, f"hello {i}"), message(a, " how are you?")],
                [message(b, "fine and you")],
                [message(a, f"the film number {i} was good")],
            ],
            "prompt": "What did you learn?",
            "start": "2018-05-02T01:57:41",
            "ratings": {"witty": "1", "int": 5, "upbeat": 5},
        }
        for i, (a, b) in enumerate(pairs)
    }
    found["alone"] = {"messages": [[message(KNOWN[2], "anybody there?")]], "start": "2018-05-02T01:57:41"}
    return found


@pytest.fixture
def conversations(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(raw()))
    return chats_data.read_conversations(path)


@pytest.fixture
def encode(tmp_path):
    return chats_data.public_tokenizer(TINY.vocab, tmp_path, lambda: PUBLIC)


@pytest.fixture
def offline(tmp_path, conversations, encode, monkeypatch):
    """The study reads the hand-made file and the invented public text; nothing is fetched."""
    monkeypatch.setattr(chats, "dataset_file", lambda: tmp_path / "dataset.json")
    monkeypatch.setattr(chats_secrets, "dataset_file", lambda: tmp_path / "dataset.json")
    monkeypatch.setattr(chats_model, "public_sentences", lambda: PUBLIC)
    return tmp_path


# ---------------------------------------------------------------- data


def test_messages_of_a_turn_are_joined(conversations):
    assert len(conversations) == 14
    assert conversations[0][:2] == (Turn(KNOWN[0], "hello 0 how are you?"), Turn(KNOWN[1], "fine and you"))
    assert conversations[-1] == (Turn(KNOWN[2], "anybody there?"),)


@pytest.mark.parametrize("turn", [[], [message("a", "x"), message("b", "y")]])
def test_a_turn_without_one_sender_is_refused(tmp_path, turn):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"id-7": {"messages": [[message("a", "x")], turn], "start": ""}}))
    with pytest.raises(ValueError, match="conversation id-7, turn 1"):
        chats_data.read_conversations(path)


def test_a_sender_has_their_own_words_and_no_others(conversations):
    written = chats_data.by_sender(conversations)
    assert written[KNOWN[0]][0] == ["hello 0 how are you?", "the film number 0 was good"]
    assert written[KNOWN[2]] == [["fine and you"], ["anybody there?"]]
    assert len(written[KNOWN[0]]) == 11


def test_a_share_of_all_names_is_held_out():
    """Binomial(8000, 1/8): 1000 with standard deviation 29.6; the names are fixed, so is the outcome."""
    assert abs(sum(is_held_out(f"name {i}") for i in range(8000)) - 1000) < 120


@pytest.mark.parametrize("unit", chats_data.UNITS)
def test_words_of_held_out_senders_are_in_no_training_record(conversations, encode, unit, monkeypatch):
    """Every token is traced to who wrote it: a sender's number stands for the words."""
    numbers = {name: 10 + i for i, name in enumerate(PEOPLE)}
    traced = [tuple(Turn(t.sender, t.sender) for t in c) for c in conversations]
    train, held = make_records(unit, traced, lambda text: [numbers[text]], 24, 2)
    ids = {int(i) for rows in train.records for row in rows for i in row["input_ids"]} - set(range(3))
    assert ids.isdisjoint(numbers[p] for p in HELD)
    assert numbers[KNOWN[0]] in ids
    targets = {int(i) for rows in held.records for row in rows for i in row["labels"]} - {IGNORE, 0, 1, 2}
    assert targets == {numbers[HELD[0]], numbers[HELD[1]]}
    expected = {"sender": (12, 2), "conversation": (12, 2)}[unit]
    assert (len(train), len(held)) == expected


@pytest.mark.parametrize(("length", "most"), [(3, 1), (3, 2), (8, 3), (100, 2)])
def test_records_are_capped(conversations, encode, length, most):
    for unit in chats_data.UNITS:
        train, _ = make_records(unit, conversations, encode, length, most)
        assert max(len(rows) for rows in train.records) <= most
        assert max(len(row["input_ids"]) for rows in train.records for row in rows) <= length
        assert train.max_rows_per_user == most


def test_chunks_of_a_conversation_are_its_beginning(conversations, encode):
    whole = [i for t in conversations[0] for i in chats_data.turn_ids(t.text, encode)]
    rows = chats_data.conversation_rows(conversations[0], encode, 5, 3)
    assert [i for row in rows for i in row["input_ids"].tolist()] == whole[:15]
    assert chats_data.conversation_rows(conversations[0], encode, len(whole), 3)[0]["input_ids"].tolist() == whole
    assert len(chats_data.conversation_rows(conversations[0], encode, len(whole), 3)) == 1


def test_too_many_rows_and_unknown_units_are_refused(conversations, encode):
    row = chats_data.row([TURN])
    with pytest.raises(ValueError, match="record 1 has 3 rows"):
        chats_data.Records([[row], [row] * 3], 2)
    with pytest.raises(ValueError, match="unknown unit 'token'"):
        make_records("token", conversations, encode, 8, 2)


def test_rated_sentences_come_with_their_ratings(tmp_path, monkeypatch):
    from common import sentiment_data

    monkeypatch.setenv("OPACUS_AC_CACHE", str(tmp_path))
    (tmp_path / "hutto_icwsm_2014").mkdir()
    for name, file in sentiment_data.FILES.items():
        (tmp_path / "hutto_icwsm_2014" / file).write_text(f"1\t2.5\tgood {name}\n2\t0.1\tneither\n3\t-1\tbad\ttab\n")
    assert sentiment_data.rated("nyt") == [(2.5, "good nyt"), (0.1, "neither"), (-1.0, "bad\ttab")]
    assert sorted(sentiment_data.sentences("nyt")) == [("bad\ttab", 0), ("good nyt", 1)]
    assert chats_data.public_sentences()[::3] == [f"good {name}" for name in sentiment_data.FILES]


# ---------------------------------------------------------------- the study


def test_runs_of_a_seed_differ_by_their_rule(offline):
    flat = chats.run(Cell("sender", 8.0, "flat-0.5", 0), TINY, offline)
    default = chats.run(Cell("sender", 8.0, "default-100", 0), TINY, offline)
    free = chats.run(Cell("sender", None, "none", 0), TINY, offline)
    assert flat["spent"] == default["spent"] == pytest.approx(8.0, rel=0.01)
    assert flat["spent"] <= 8.0
    assert free["spent"] is None
    assert flat["loss_before"] == default["loss_before"] == free["loss_before"]
    assert len({flat["loss"], default["loss"], free["loss"], flat["loss_before"]}) == 4
    assert flat["C"] == [0.5, 0.5]
    assert flat["clip_rate"] == [None, None]
    assert default["C"][0] == 100 > default["C"][1]
    assert flat["records"] == 12
    again = chats.run(Cell("sender", 8.0, "flat-0.5", 0), TINY, offline)
    assert again["loss"] == flat["loss"]


def test_conversations_train_too_and_norms_say_what_they_are(offline):
    result = chats.run(Cell("conversation", 2.0, "default-1", 1), TINY, offline)
    assert result["spent"] <= 2.0
    assert math.isfinite(result["loss_ema"])
    found = chats.norms("conversation", TINY, offline)
    values = list(found["not_private_norms"].values())
    assert values == sorted(values)
    assert values[-1] > 0
    assert found["records"] == found["of"] == 12


def test_the_loss_of_a_record_is_the_mean_of_its_rows(offline, conversations, encode):
    model = chats_model.public_model(TINY, offline)
    train, _ = make_records("sender", conversations, encode, TINY.length, TINY.most)
    expected = []
    for rows in train.records:
        one = [model(input_ids=r["input_ids"][None], labels=r["labels"][None]).loss.item() for r in rows]
        expected.append(sum(one) / len(one))
    assert chats_model.heldout_loss(model, train.records, TINY) == pytest.approx(
        sum(expected) / len(expected), rel=1e-5
    )


def test_a_rule_may_name_a_rate_or_a_hint(offline):
    """The settings have the rate 0.004, and no record has a norm below 1: the rate and C of flat-1 are those of rate-0.004."""
    at = {
        rule: chats.run(Cell("sender", 8.0, rule, 0), TINY, offline)
        for rule in ("flat-1", "rate-0.004", "rate-0.02", "auto-0.004", "auto-0.02")
    }
    assert at["rate-0.004"]["loss"] == at["flat-1"]["loss"]
    assert len({result["loss"] for result in at.values()}) == 4
    assert {rule: result["auto_adam"] > 0 for rule, result in at.items()} == {rule: "auto" in rule for rule in at}
    assert all(result["C"] == [1.0, 1.0] for result in at.values())


def test_hints_are_compared_with_the_best_rate_of_the_seed():
    losses = {"rate-1": (4.0, 2.0), "rate-2": (3.0, 5.0), "auto-1": (3.3, 1.9), "flat-1": (1.0, 1.0)}
    results = [
        {"unit": "sender", "epsilon": 8.0, "rule": rule, "seed": seed, "loss": found[seed]}
        for rule, found in losses.items()
        for seed in (0, 1)
    ]
    expected = ["sender, epsilon 8, auto-1: +2.5 ± 7.5 % above the best rate of the seed, 2 seeds"]
    assert chats.above_the_best([*results, {**results[4], "seed": 2}]) == expected


@pytest.mark.parametrize(
    "cell",
    [Cell("sender", 2.0, "none", 0), Cell("sender", None, "flat-1", 0), Cell("sender", 2.0, "flat", 0), Cell("sender", 2.0, "x-1", 0)],
)  # fmt: skip
def test_unknown_rules_are_refused(cell):
    with pytest.raises(ValueError, match="unknown rule"):
        chats.clip_arguments(cell, 100, TINY)


def line(cell: Cell, loss: float) -> str:
    course = {"C": [1.0, 2.5], "clip_rate": [0.875, None]}
    shared = {"settings": Settings().key(), "records": 1163, "sample_rate": 0.11, "noise_multiplier": 0.7}
    own = {"unit": cell.unit, "epsilon": cell.epsilon, "rule": cell.rule, "seed": cell.seed, "spent": cell.epsilon}
    return json.dumps(own | shared | course | {"loss": loss, "loss_ema": loss + 1, "loss_before": 9.0}) + "\n"


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(chats, "public_model", lambda *_: None)
    monkeypatch.setattr(chats, "results_of", lambda function, tasks, jobs: asked.extend(t[0] for t in tasks) or [])
    out = tmp_path / "results.jsonl"
    done = [c for c in chats.all_cells([0, 1], ["flat-3"]) if c.seed == 0]
    out.write_text("".join(line(c, 3.0) for c in done) + '{"unit": "sender", "eps')
    assert chats.main(["--out", str(out), "--seeds", "0", "1", "--rules", "flat-3"]) == 0
    assert asked == chats.all_cells([1], ["flat-3"])
    assert len(asked) == 6
    asked.clear()
    chats.main(["--out", str(out), "--seeds", "0", "--rules", "flat-3", "--lr", "0.1"])
    assert len(asked) == 6  # other settings: nothing is finished


def test_runs_of_an_older_autoadam_are_repeated(tmp_path):
    cells = [Cell("sender", 8.0, rule, 0) for rule in ("auto-0.1", "auto-0.2", "rate-0.1")]
    out = tmp_path / "results.jsonl"
    versions = (chats.version("auto-0.1"), chats.version("auto-0.1") - 1, 0)
    rows = [json.loads(line(cell, 3.0)) | {"auto_adam": number} for cell, number in zip(cells, versions, strict=True)]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert chats.wanted(cells, out, Settings()) == [cells[1]]
    assert [r["rule"] for r in chats.finished(out, Settings())] == ["auto-0.1", "rate-0.1"]


def test_the_grid_may_be_of_one_unit_and_one_epsilon():
    cells = chats.all_cells([0], ["auto-1"], ["sender"], [8.0])
    assert cells == [Cell("sender", None, "none", 0), Cell("sender", 8.0, "auto-1", 0)]


def test_the_report_has_mean_and_spread(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    cell = [Cell("sender", 8.0, "default-1", seed) for seed in (0, 1)]
    norms = {"unit": "sender", "records": 5, "of": 9, "settings": Settings().key(), "not_private_norms": {"50 %": 2.5}}
    out.write_text(line(cell[0], 3.0) + line(cell[1], 4.0) + json.dumps(norms) + "\n")
    assert chats.main(["--out", str(out), "--report"]) == 0
    text = capsys.readouterr().out
    assert "| sender | 8.00 | 0.110 | 0.70 | default-1 | 2 | 3.500 ± 0.707 | 4.500 ± 0.707 | 2.5 | 0.88 |" in text
    assert "N = 1163, delta 0.0001" in text
    assert "5 of 9 records, NOT PRIVATE: 50 %: 2.50" in text


# ---------------------------------------------------------------- secrets


def test_probabilities_and_exposure_are_those_of_brute_force(offline, encode, monkeypatch):
    """All 100 codes of two digits, one sequence at a time."""
    monkeypatch.setattr(canaries, "DIGITS", 2)
    model = chats_model.public_model(TINY, offline).double()
    prompt, digits = canaries.prompt_ids("door", encode), canaries.digit_ids(encode)
    found = canaries.code_log_probabilities(model, prompt, digits)
    expected = []
    for code in range(100):
        ids = torch.tensor([[*prompt, digits[code // 10], digits[code % 10]]])
        steps = model(input_ids=ids).logits[0].log_softmax(-1)
        expected.append(sum(steps[i - 1, ids[0, i]].item() for i in (len(prompt), len(prompt) + 1)))
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    ranks = {code: rank for rank, code in enumerate(sorted(range(100), key=lambda c: -expected[c]), start=1)}
    for code in (0, 7, 42, 99):
        assert canaries.exposure(found, code) == pytest.approx(math.log2(100) - math.log2(ranks[code]))


def test_a_code_that_was_never_seen_has_the_exposure_of_chance():
    scores = torch.arange(canaries.CODES).double()
    values = [canaries.exposure(scores, code) for code in range(canaries.CODES)]
    assert sum(values) / len(values) == pytest.approx(canaries.CHANCE, abs=1e-3)
    assert (min(values), max(values)) == (0.0, math.log2(canaries.CODES))


@pytest.mark.parametrize(
    ("epsilon", "copies", "delta", "bound"),
    [
        (1.0, 1, 0.0, math.e / 16),
        (0.5, 2, 0.0, math.e / 16),
        (0.5, 2, 0.01, math.e / 16 + 0.01 * (1 + math.exp(0.5))),
        (1.0, 2, 0.0, math.exp(2) / 16),
        (1.0, 3, 0.0, 1.0),  # e^3 > 16
        (1000.0, 64, 1e-5, 1.0),
        (0.0, 4, 0.3, 1.0),
    ],
)
def test_the_bound_of_a_group_is_that_of_its_steps(epsilon, copies, delta, bound):
    assert chats_secrets.group_bound(epsilon, copies, 4.0, delta) == pytest.approx(bound)


def test_canaries_are_as_many_for_each_multiplicity(encode):
    first, second = canaries.canaries(0), canaries.canaries(1)
    assert first == canaries.canaries(0)
    for found in (first, second):
        assert {c.thing for c in found} == set(canaries.OBJECTS)
        copies = [c.copies for c in found]
        assert {m: copies.count(m) for m in copies} == dict.fromkeys(canaries.MULTIPLICITIES, canaries.EACH)
    assert {c.thing: c.copies for c in first} != {c.thing: c.copies for c in second}


def test_a_canary_is_its_sentence(encode, tmp_path):
    ids = canaries.canary_row(canaries.Canary("door", 42, 1), encode)["input_ids"].tolist()
    prompt, digits = canaries.prompt_ids("door", encode), canaries.digit_ids(encode)
    assert ids == [*prompt, digits[0], digits[0], digits[4], digits[2], chats_data.END]
    assert len(set(digits)) == 10


def test_digits_of_several_tokens_are_refused():
    with pytest.raises(ValueError, match="each digit as one token"):
        canaries.digit_ids(lambda text: [1, 2])


def test_secrets_run_end_to_end(offline, monkeypatch):
    monkeypatch.setattr(canaries, "MULTIPLICITIES", (0, 1, 2))
    monkeypatch.setattr(canaries, "EACH", 7)
    monkeypatch.setattr(canaries, "DIGITS", 2)
    monkeypatch.setattr(canaries, "CODES", 100)
    private, free = (chats_secrets.run(arm, 0, SECRETS, offline) for arm in ("8", "none"))
    assert private["spent"] == pytest.approx(8.0, rel=0.01)
    assert free["spent"] is None
    assert private["records"] == 20 + 7 + 12  # of 20 objects, the last six twice
    assert [len(private["exposure"][m]) for m in "012"] == [7, 7, 6]
    assert all(0 <= v <= math.log2(100) for run in (private, free) for vs in run["exposure"].values() for v in vs)
    assert private["loss"] != free["loss"]


@pytest.mark.parametrize("arm", ["", "free", "8x"])
def test_unknown_arms_are_refused(arm):
    with pytest.raises(ValueError, match="unknown arm"):
        chats_secrets.clip_arguments(arm, 100, SECRETS)


def secret_line(arm: str, seed: int, level: float) -> str:
    exposure = {str(m): [level, math.log2(10_000)] for m in canaries.MULTIPLICITIES}
    noise = 0.5 if arm not in ("none", "clipped") else 0.0
    result = {
        "arm": arm,
        "seed": seed,
        "settings": chats_secrets.Settings().key(),
        "noise_multiplier": noise,
        "records": 3340,
    }
    return (
        json.dumps(result | {"spent": 8.0 if noise else None, "loss": 3.0, "loss_before": 4.0, "exposure": exposure})
        + "\n"
    )


def test_secrets_report_figure_and_resume(tmp_path, capsys, monkeypatch):
    out, figure = tmp_path / "secrets.jsonl", tmp_path / "figures" / "secrets.png"
    out.write_text("".join(secret_line(arm, seed, 1.0) for arm in ("none", "8", "clipped") for seed in (0, 1)))
    assert chats_secrets.main(["--out", str(out), "--report", "--figure", str(figure)]) == 0
    text = capsys.readouterr().out
    assert [row.split("|")[1].strip() for row in text.splitlines() if row.startswith("| ")][1:4] == [
        "8.00",
        "clipped",
        "none",
    ]
    assert "7.1 ± 7.1 (2/4)" in text
    assert "| records that hold the secret | epsilon = 8.00 |" in text
    assert "| 1 | 30 % |" in text
    assert "| 4 | nothing |" in text
    assert figure.read_bytes().startswith(b"\x89PNG")
    asked = []
    monkeypatch.setattr(chats_secrets, "public_model", lambda *_: None)
    monkeypatch.setattr(
        chats_secrets, "results_of", lambda function, tasks, jobs: asked.extend(t[:2] for t in tasks) or []
    )
    chats_secrets.main(["--out", str(out), "--seeds", "0", "2", "--arms", "8", "64"])
    assert asked == [("64", 0), ("8", 2), ("64", 2)]
