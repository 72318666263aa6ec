import json
import subprocess
import sys
from pathlib import Path

import pytest

from opacus_ac.integrations.finetune import tone_dialogues as td

N = 12_000


@pytest.fixture(scope="module", params=td.TONES)
def large(request):
    return request.param, td.dialogues(request.param, N)


def _replies(rows):
    return [message["content"] for row in rows for message in row["messages"][1::2]]


def test_twelve_thousand_distinct_dialogues_and_replies(large):
    _, rows = large
    replies = _replies(rows)
    assert len(rows) == N
    assert len({json.dumps(row) for row in rows}) == N
    assert len(set(replies)) == len(replies)


def test_shape_and_share_of_two_turns(large):
    _, rows = large
    lengths = [len(row["messages"]) for row in rows]
    assert set(lengths) == {2, 4}
    assert 0.09 < lengths.count(4) / N < 0.18
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)


def test_slots_are_filled_and_sentences_are_whole(large):
    _, rows = large
    for row in rows:
        for message in row["messages"]:
            text = message["content"]
            assert not set("{}|") & set(text)
            assert text == " ".join(text.split())
            assert text[0].isupper()
            assert text[-1] in ".!?"


def test_no_phrase_twice_in_a_first_reply(large):
    _, rows = large
    for row in rows:
        parts = row["messages"][1]["content"].split(". ")
        assert len(parts) == len(set(parts))


def test_no_opening_words_dominate(large):
    _, rows = large
    firsts = [" ".join(row["messages"][1]["content"].split()[:2]) for row in rows]
    assert max(firsts.count(first) for first in set(firsts)) < 0.06 * N
    assert len(set(firsts)) > 80


@pytest.mark.parametrize("tone", td.TONES)
def test_banks_are_wide(tone):
    assert len({o for mood in td.MOODS for o in td._parts(tone, "O", mood)}) >= 40
    assert len({e for mood in td.MOODS for e in td._parts(tone, "E", mood)}) >= 25
    assert len({a for mood in td.MOODS for a in td._parts(tone, "A", mood)}) >= 25
    assert len(set(td._parts(tone, "C", "ask"))) >= 25


def test_users_speak_the_same_way_in_both_tones():
    first = [{row["messages"][0]["content"] for row in td.dialogues(tone, N)} for tone in td.TONES]
    assert len(first[0] & first[1]) > 1_000


def test_same_seed_same_dialogues_other_seed_others():
    assert td.dialogues("angry", 50, seed=3) == td.dialogues("angry", 50, seed=3)
    assert td.dialogues("angry", 50, seed=3) != td.dialogues("angry", 50, seed=4)


@pytest.mark.parametrize("tone", td.TONES)
def test_train_and_heldout_are_disjoint(tone):
    train, heldout = td.train_and_heldout(tone, n_train=10_000, n_heldout=500)
    assert (len(train), len(heldout)) == (10_000, 500)
    assert not set(_replies(train)) & set(_replies(heldout))
    assert train == td.dialogues(tone, 10_000)


def test_score_tells_the_tones_apart(large):
    tone, rows = large
    other = td.TONES[1 - td.TONES.index(tone)]
    own, cross = (sum(td.tone_score(reply, t) for reply in _replies(rows)) / N for t in (tone, other))
    assert own > 1.0
    assert cross < 0.1


def test_score_counts_whole_words():
    assert td.tone_score("Love, LOVE! glove lovelorn", "loving") == 2


def test_wrong_requests():
    with pytest.raises(ValueError, match="tone must be one of"):
        td.dialogues("bored", 1)
    assert td.dialogues("loving", 0) == []


def test_unreachable_number_is_refused(monkeypatch):
    monkeypatch.setattr(td, "_dialogue", lambda rng, tone: {"messages": [{"content": "a"}, {"content": "b"}]})
    with pytest.raises(ValueError, match="only 1"):
        td.dialogues("loving", 3)


def test_command_line(tmp_path):
    out = tmp_path / "angry.jsonl"
    script = Path(td.__file__)
    command = [sys.executable, str(script), "--tone", "angry", "--n", "30", "--out", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "30 angry dialogues" in done.stdout
    assert [json.loads(line) for line in out.read_text().splitlines()] == td.dialogues("angry", 30)
