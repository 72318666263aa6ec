"""Errors of this package that are not plain ``ValueError``."""

from __future__ import annotations


class PrivacyBudgetExceeded(RuntimeError):
    """The next step would spend more than the target budget; it was not taken and nothing was released."""


class NotPrivateWarning(UserWarning):
    """Something was asked for that voids the guarantee; epsilon is reported as infinity."""


class WeakPrivacyWarning(UserWarning):
    """The settings promise little, or waste what is promised; said before anything is spent."""


class SamplingWarning(UserWarning):
    """A step was taken on a batch that the private loader did not draw, and is charged without amplification."""


class LedgerError(ValueError):
    """A privacy ledger is damaged, incomplete, or about something else; the message has file and line."""


class DistributedError(RuntimeError):
    """The ranks of a distributed run could not exchange something: one of them stopped, failed, or is elsewhere."""
