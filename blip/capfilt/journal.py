"""What was found about the pictures of a unit, a line for each, that a killed process goes on with.

A process writes whole batches. What a killed one leaves of a batch is dropped, and the batch done again, with
the same texts and scores: both depend on the picture and its batch alone. The last line says that the unit is
done, or that it is lost: as a whole, or since its file went away while its pictures were read. It is tried
again when the run goes on, as a server may be there again then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blip import atomic
from blip.errors import DataError

Line = dict[str, Any]
LOST = "unreadable_shard"
"""Cause of a picture, or a whole shard, whose file cannot be had."""
_WHOLE = b'"whole": true'
"""In lines about a unit as a whole; within a text its quotes would be escaped."""


class Journal:
    """The lines of a unit.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def done(self) -> bool:
        """Whether the unit is done: the last line says so."""
        return self.pictures is not None

    @property
    def pictures(self) -> int | None:
        """Of the unit, as its last line says; None: it is not done."""
        last = self._last()
        return None if last is None else int(last["done"])

    @property
    def lost(self) -> bool:
        """Whether it is done and has pictures that its file did not give, or none for that reason."""
        return bool((self._last() or {}).get("lost"))

    def begin(self, batch_size: int, pictures: int) -> int:
        """Drop what is left of an unfinished batch, or all that there is of a lost unit.

        Args:
            batch_size: lines that were written together.
            pictures: of the unit.

        Returns:
            Number of pictures that are done.
        """
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return 0
        size, kept, count, started, lost = 0, 0, 0, 0, self.lost
        with self.path.open("rb") as file:
            for line in file:
                if lost or count == pictures or not line.endswith(b"\n") or _WHOLE in line:
                    break
                count += 1
                size += len(line)
                if count % batch_size == 0 or count == pictures:
                    kept, started = size, count
        os.truncate(self.path, kept)
        return started

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append the lines of a batch."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with self.path.open("ab") as file:
            file.write(text.encode("ascii"))

    def end(self, beside: Iterable[Mapping[str, Any]], pictures: int) -> None:
        """Append what is wrong with the unit as a whole, and that it is done, or lost."""
        wrong = [{**line, "whole": True} for line in beside]
        lost = bool(wrong) if not pictures else any(line.get("cause") == LOST for line in self._all())
        self.add([*wrong, {"done": pictures} | ({"lost": True} if lost else {})])
        atomic.sync(self.path)

    def lines(self) -> Iterator[Line]:
        """Those of the pictures, in order, and then those of the unit as a whole.

        Raises:
            DataError: the unit is not done, or somebody has changed the file.
        """
        for line in self._all():
            if "done" in line:
                return
            yield line
        raise DataError(f"{self.path}: it ends before its unit does; go on with run.resume=auto")

    def _all(self) -> Iterator[Line]:
        with self.path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                try:
                    yield json.loads(text)
                except ValueError as error:
                    raise DataError(
                        f"{self.path}: line {number} is no JSON; remove the file, to have it made anew"
                    ) from error

    def _last(self) -> Line | None:
        """The last line, if it ends the unit."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 256))
                end = file.read()
        except OSError:
            return None
        last = end[:-1].rpartition(b"\n")[2]
        return json.loads(last) if end.endswith(b"\n") and last.startswith(b'{"done"') else None
