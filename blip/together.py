"""Doing something on one rank or on all, and failing on all alike: no rank waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from blip import dist
from blip.errors import BlipError, Stopped

T = TypeVar("T")


def on_main(action: Callable[[], T]) -> T:
    """Rank 0's result of `action`, on every rank.

    Raises:
        Exception: what rank 0 raised; an OSError as BlipError.
    """
    result: Any = on_all(lambda: action() if dist.is_main() else None)
    return dist.broadcast_object(result)


def on_all(action: Callable[[], T]) -> T:
    """This rank's result of `action`, which every rank carries out; it must not speak with the others.

    Raises:
        Exception: what the first rank that failed raised; an OSError as BlipError, and on several ranks what
            else there may be as RuntimeError.
    """
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        if dist.world_size() == 1 and not isinstance(error, OSError):
            raise
        failure = error
    failures = [error for error in dist.gather_objects(_portable(failure)) if error is not None]
    if failures:
        raise failures[0] from failure
    return result


def _portable(error: Exception | None) -> Exception | None:
    """An error that other ranks can read, whatever it needs to be built."""
    if isinstance(error, OSError):
        place = f"'{error.filename}': " if error.filename else ""
        return BlipError(f"{place}{error.strerror or error}")
    if error is None or isinstance(error, BlipError | Stopped):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
