"""The store of frozen-vision features: a tower's states of every picture, computed once.

    FOLDER/features.json           what the states are of: tower, image processor, sizes
    FOLDER/part-00000.safetensors  `states` (n, P, D), and the names of their n pictures in the header

A frozen tower gives the same states of a picture at every step, as long as nothing in the image processor is
random. `blip.cache_features` writes them, `datasets.NAME.features` reads them in training. Parts are mapped
into memory, which the workers share, and are read where a sample needs them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip import atomic
from blip.data.samples import BadRecord
from blip.errors import ConfigError, DataError
from blip.registry import PROCESSORS
from blip.weights import save_safetensors

DESCRIPTION = "features.json"
FORMAT = "blip features 1"
PART_BYTES = 1 << 30
"""Size that parts are cut to."""
PART_PICTURES = 4096
"""And the most pictures of one."""


def part_name(number: int) -> str:
    """File of a part."""
    return f"part-{number:05d}.safetensors"


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A hash of weights: names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def view_of(processor: Any) -> dict[str, Any]:
    """An image processor as plain values: its registry name and options."""
    names = [name for name in PROCESSORS.names() if PROCESSORS.get(name) is type(processor)]
    return {"name": names[0] if names else type(processor).__name__, **asdict(processor)}


def write_part(file: Path, names: Sequence[str], states: Tensor, origin: Mapping[str, Any]) -> None:
    """One part, atomically.

    Args:
        file: of the part.
        names: of n pictures, as the records name them.
        states: (n, P, D).
        origin: what they are of, as `origin_of` says.
    """
    header = {"pictures": json.dumps(list(names)), "origin": json.dumps(dict(origin))}
    save_safetensors({"states": states}, file, header)


def read_part(file: Path) -> tuple[list[str], dict[str, Any]] | None:
    """Names of the pictures in a part, and its origin; None where there is no part that can be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata()
            return json.loads(header["pictures"]), json.loads(header["origin"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def origin_of(tower: str, processor: Any) -> dict[str, Any]:
    """What decides about states: the `fingerprint` of the tower, and the image processor."""
    return {"tower": tower, "view": view_of(processor)}


def complete(folder: Path, origin: Mapping[str, Any], parts: int) -> None:
    """Write what makes a store complete.

    Args:
        folder: of the store.
        origin: `origin_of` the states.
        parts: number of parts.
    """
    description = {"format": FORMAT, **origin, "parts": parts}
    atomic.write_text(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")


class FeatureStore:
    """The states of a dataset's pictures, by name; picklable.

    Args:
        folder: of the store.
        key: what messages call it, such as `datasets.coco_vqa.features`.

    Raises:
        DataError: there is no complete store.
    """

    def __init__(self, folder: str | Path, key: str = "features") -> None:
        self.folder, self.key = Path(folder), key
        try:
            found = json.loads((self.folder / DESCRIPTION).read_text())
            whole = found["format"] == FORMAT
            self._tower, self._view, parts = found["tower"], found["view"], found["parts"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(self._absent(f"{DESCRIPTION}: {error}")) from error
        if not whole:
            raise DataError(self._absent(f"its format is {found['format']!r}, not {FORMAT!r}"))
        self._places: dict[str, tuple[int, int]] = {}
        for number in range(parts):
            part = read_part(self.folder / part_name(number))
            if part is None:
                raise DataError(self._absent(f"{part_name(number)} is missing or damaged"))
            if part[1] != {"tower": self._tower, "view": self._view}:  # one that was being written again
                raise DataError(self._absent(f"{part_name(number)} is of another tower or image processor"))
            self._places.update({name: (number, row) for row, name in enumerate(part[0])})
        self._parts: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_parts": {}}  # a worker maps the files itself

    def states(self, picture: Any, name: str) -> Tensor:
        """(P, D), the tower's states of a picture; not to be changed.

        Args:
            picture: its path, whose end is its name in the store.
            name: of the record.

        Raises:
            BadRecord: the store lacks it.
        """
        place = self._find(picture)
        if place is None:
            shown = "a picture without a name" if isinstance(picture, bytes) else str(picture)
            raise BadRecord("no_features", name, f"{shown} is not in '{self.folder}'")
        number, row = place
        if number not in self._parts:
            with safe_open(self.folder / part_name(number), framework="pt") as opened:
                self._parts[number] = opened.get_tensor("states")
        return self._parts[number][row]

    def check(self, tower: str, view: Mapping[str, Any]) -> None:
        """Raise where the states are not those that this tower would give of what this processor makes.

        Args:
            tower: `fingerprint` of the tower.
            view: `view_of` the image processor.

        Raises:
            ConfigError: what differs.
        """
        again = "write them again with blip cache_features"
        if dict(view) != self._view:
            different = sorted(k for k in {*view, *self._view} if view.get(k) != self._view.get(k))
            shown = ", ".join(f"{k} {self._view.get(k)!r}, now {view.get(k)!r}" for k in different)
            raise ConfigError(f"{self.key}: they were made with another image processor ({shown}); {again}")
        if tower != self._tower:
            raise ConfigError(f"{self.key}: they were made by a tower with other weights; {again}")

    def _find(self, picture: Any) -> tuple[int, int] | None:
        """Longest end of the path that is a name: data roots move, names do not."""
        if isinstance(picture, bytes):
            return None
        end, more = PurePath(picture).as_posix(), "/"
        while more:
            place = self._places.get(end)
            if place is not None:
                return place
            _, more, end = end.partition("/")
        return None

    def _absent(self, why: str) -> str:
        return (
            f"{self.key}: no complete store of features in '{self.folder}' ({why}); write one with"
            " blip cache_features"
        )


def cut(names: Iterable[str], bytes_each: int) -> list[list[str]]:
    """Names in parts of bounded size."""
    names, most = list(names), max(1, min(PART_PICTURES, PART_BYTES // max(bytes_each, 1)))
    return [names[start : start + most] for start in range(0, len(names), most)]
