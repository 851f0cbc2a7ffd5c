"""Errors a user can cause, nearest-name hints, and the exit codes of the commands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_STOPPED = 3
_CHOICES = 60
"""Most that a message lists."""


class BlipError(Exception):
    """Something the user can mend; commands print its message and exit with 2."""


class ConfigError(BlipError):
    """A configuration key, type, value or combination that cannot be used."""


class DataError(BlipError):
    """A dataset, record, image or shard that is missing or unreadable."""


class CheckpointError(BlipError):
    """A checkpoint or weight file that is incomplete, foreign, or does not fit the model."""


class UsageError(BlipError):
    """A command line or call that cannot be carried out as given."""


class TrainingError(BlipError):
    """A run that cannot go on: too many non-finite steps, no trainable parameter."""


class Stopped(Exception):
    """Training was asked to stop and has saved; commands exit with 3."""


def nearest(name: str, choices: Iterable[str], count: int = 1, cutoff: float = 0.55) -> list[str]:
    """The `count` names most similar to `name`, best first; empty when nothing is (`cutoff`, of 1)."""
    return difflib.get_close_matches(name, list(choices), n=count, cutoff=cutoff)


def hint(name: str, choices: Iterable[str]) -> str:
    """The end of an error message: the nearest valid choice, else all of them, if they are not very many.

    Returns:
        `"; did you mean 'x'?"`, or `"; choose from a, b"`, or `""` when there is no choice at all.
    """
    names = sorted(set(choices))
    close = nearest(name, names)
    if close:
        return f"; did you mean {close[0]!r}?"
    more = f", ... and {len(names) - _CHOICES} more" if len(names) > _CHOICES else ""
    return f"; choose from {', '.join(names[:_CHOICES])}{more}" if names else ""


def brief(error: Exception, most: int = 200) -> str:
    """The message of somebody else's error on one line, without what is beyond `most` letters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + " ..."
