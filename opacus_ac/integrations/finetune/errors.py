"""Failures of ``opacus-ac finetune`` that a user can act on, with exit codes. Needs neither torch nor opacus."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from opacus_ac.errors import LedgerError, PrivacyBudgetExceeded
from opacus_ac.integrations.finetune.spelling import on_the_command_line

BAD_OPTION, BAD_DATA, NO_BUDGET, BAD_MODEL, OUTSIDE = 2, 3, 4, 5, 6
"""Exit codes, as :data:`opacus_ac.integrations.finetune.arguments.EXIT_CODES` describes them."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL_WORDS = (
    "no space left", "storagefull", "file too large", "filetoolarge", "quota exceeded",
    "failed writing file", "iostream error", "unexpected pos",
)  # fmt: skip
"""Words for a file that could not be written to its end; in those of the second line torch has lost the reason."""
_NETWORK = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")


class FinetuneError(Exception):
    """A failure with a message for the user.

    Attributes:
        exit_code: exit code of the process, one of :data:`EXIT_CODES`.
    """

    def __init__(self, message: object, exit_code: int) -> None:
        super().__init__(str(message))
        self.exit_code = exit_code


@contextmanager
def failing_with(exit_code: int, *kinds: type[BaseException]) -> Iterator[None]:
    """Return a context that turns some exceptions into a :class:`FinetuneError`, in words of a command line."""
    try:
        yield
    except PrivacyBudgetExceeded as error:
        raise FinetuneError(on_the_command_line(str(error)), NO_BUDGET) from error
    except LedgerError as error:
        raise FinetuneError(error, BAD_DATA) from error
    except kinds as error:
        raise FinetuneError(on_the_command_line(str(error)), exit_code) from error


def outside(error: BaseException) -> str | None:
    """Return what went wrong around the program, with the remedy: disk, permissions, network. None for other errors."""
    for cause in _chain(error):
        text = " ".join(str(cause).split())
        number = cause.errno if isinstance(cause, OSError) else None
        if number in _FULL or any(words in text.lower() for words in _FULL_WORDS):
            return (
                f"the disk is full, or a file may not grow ({_place(cause, text)}): make room, and go on with "
                "--resume_from_checkpoint last. Steps that were charged stay charged"
            )
        if number in _FORBIDDEN:
            return (
                f"{_place(cause, text)} cannot be written or read: {os.strerror(number or 0)}. Change its permissions"
            )
        if type(cause).__module__.partition(".")[0] in _NETWORK or isinstance(cause, ConnectionError):
            return (
                f"the hub did not answer ({text[:200]}): what was saved is in --output_dir. Leave out --push_to_hub, "
                "or push later with hf upload"
            )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _place(error: BaseException, text: str) -> str:
    name = getattr(error, "filename", None)
    return str(name) if name else text[:200]
