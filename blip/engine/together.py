"""Doing something on one rank or on all, and failing on all alike: no rank waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from blip import dist
from blip.errors import BlipError

T = TypeVar("T")


def on_main(action: Callable[[], T]) -> T:
    """Rank 0's result of `action`, on every rank.

    Raises:
        BlipError: what rank 0 raised; an OSError as one.
    """
    result: Any = on_all(lambda: action() if dist.is_main() else None)
    return dist.broadcast_object(result)


def on_all(action: Callable[[], T]) -> T:
    """This rank's result of `action`, which every rank carries out.

    Raises:
        BlipError: what the first rank that failed raised; an OSError as one.
    """
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except (BlipError, OSError) as error:
        failure = error
    failures = [error for error in dist.gather_objects(_portable(failure)) if error is not None]
    if failures:
        raise failures[0] from failure
    return result


def _portable(error: Exception | None) -> BlipError | None:
    if isinstance(error, OSError):
        place = f"'{error.filename}': " if error.filename else ""
        return BlipError(f"{place}{error.strerror or error}")
    return error if isinstance(error, BlipError) else None
