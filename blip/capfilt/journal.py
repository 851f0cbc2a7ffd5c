"""What was found about the pictures of a unit, a line for each, that a killed process goes on with.

A process writes whole batches. What a killed one leaves of a batch is dropped, and the batch done again, with
the same texts and scores: both depend on the picture and its batch alone. The last line says that the unit is
done.
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
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 256))
                end = file.read()
        except OSError:
            return None
        last = end[:-1].rpartition(b"\n")[2]
        found = end.endswith(b"\n") and last.startswith(b'{"done"')
        return int(json.loads(last)["done"]) if found else None

    def begin(self, batch_size: int, pictures: int) -> int:
        """Drop what is left of an unfinished batch.

        Args:
            batch_size: lines that were written together.
            pictures: of the unit.

        Returns:
            Number of pictures that are done.
        """
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return 0
        size, kept, count, started = 0, 0, 0, 0
        with self.path.open("rb") as file:
            for line in file:
                if count == pictures or not line.endswith(b"\n"):
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
        """Append what is wrong with the unit as a whole, and that it is done."""
        self.add([*beside, {"done": pictures}])
        atomic.sync(self.path)

    def lines(self) -> Iterator[Line]:
        """Those of the pictures, in order, and then those of the unit as a whole.

        Raises:
            DataError: the unit is not done, or somebody has changed the file.
        """
        count, done = 0, None
        with self.path.open("rb") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError as error:
                    raise DataError(
                        f"{self.path}: line {count + 1} is no JSON; remove the file, to have it made anew"
                    ) from error
                if "done" in line:
                    done = line["done"]
                    break
                count += 1
                yield line
        if done is None:
            raise DataError(f"{self.path}: it ends before its unit does; go on with run.resume=auto")
