"""``opacus-ac finetune --demo``: what it trains on, what overrides it, and what contradicts it."""

import pytest

from opacus_ac.cli import finetune
from opacus_ac.integrations.finetune import demo
from opacus_ac.integrations.finetune.chat_files import read_dialogues


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPACUS_AC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "TRAIN_ROWS", 40)
    return tmp_path / "cache"


def job(*options):
    from opacus_ac.integrations.finetune.job import parse

    parser = finetune.light_parser()
    given = list(options)
    words = finetune._with_demo(parser, parser.parse_known_args(given)[0], given)
    return parse([word for word in words if word != "--demo"], None, prog="", usage="")


def test_the_private_and_the_public_dialogues_share_nothing(cache):
    made = job("--demo")
    private, public = read_dialogues(made.data.train_file), read_dialogues(made.data.validation_file)
    assert (len(private), len(public)) == (40, 24)
    texts = [{str(dialogue) for dialogue in dialogues} for dialogues in (private, public)]
    assert texts[0].isdisjoint(texts[1])
    assert made.privacy.evaluation_is_public
    assert made.folder.name == "demo"
    assert (made.privacy.target_epsilon, made.privacy.target_delta, made.training.max_steps) == (8.0, 1e-5, 14)
    assert sorted(path.name for path in (cache / "demo").iterdir()) == ["loving-public.jsonl", "loving.jsonl"]


def test_what_is_given_overrides_the_demo(cache, tmp_path):
    made = job("--demo", "--max_steps", "2", "--output_dir", str(tmp_path / "mine"), "--target_epsilon", "4")
    assert (made.training.max_steps, made.folder, made.privacy.target_epsilon) == (2, tmp_path / "mine", 4.0)


@pytest.mark.parametrize("option", ["--train_file", "--validation_file", "--group_by", "--config"])
def test_own_data_are_no_demo(option, cache, capsys):
    with pytest.raises(SystemExit) as stopped:
        finetune.run(["--demo", option, "mine"])
    assert stopped.value.code == 2
    assert f"leave out {option}, or leave out --demo" in capsys.readouterr().err
    assert not cache.exists()
