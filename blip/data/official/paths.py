"""Where pictures that annotations name lie on this machine, and files that were downloaded."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from blip.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from blip.errors import UsageError

_TRIES = 20
_COCO = re.compile(r"(?:COCO_[a-z]+20\d\d_)?(\d{12})\.jpg")
_COCO_PLACES = (
    *("train2014/COCO_train2014_{}.jpg", "val2014/COCO_val2014_{}.jpg", "test2015/COCO_test2015_{}.jpg"),
    *("train2017/{}.jpg", "val2017/{}.jpg", "test2017/{}.jpg", "test2014/COCO_test2014_{}.jpg", "{}.jpg"),
)
"""Every release of COCO has the same pictures under other names; the number is the picture's."""


class Downloads:
    """Files below some folders, by their names.

    Args:
        folders: looked through with all their subfolders.
        prefer: of several files of one name, those with this folder above them are meant.
    """

    def __init__(self, folders: Sequence[Path], prefer: str) -> None:
        self._prefer = prefer.lower()
        self._found: dict[str, list[Path]] = {}
        for folder in folders:
            for top, below, names in os.walk(folder):
                below.sort()
                for name in sorted(names):
                    if not name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)):
                        self._found.setdefault(name, []).append(Path(top, name))

    def add(self, paths: Iterable[Path]) -> None:
        """Take some more files for downloaded ones."""
        for path in paths:
            if path not in (known := self._found.setdefault(path.name, [])):
                known.append(path)

    def every(self, names: str) -> Iterator[Path]:
        """All files of one of the names between which `|` stands."""
        for name in names.split("|"):
            yield from self._found.get(name, ())

    def one(self, *names: str) -> Path | None:
        """The file of the first of these names that there is.

        Raises:
            UsageError: there are several different ones, and not one in a folder of the set's name.
        """
        for name in (name for some in names for name in some.split("|")):
            found = self._found.get(name, [])
            own = [path for path in found if self._prefer in str(path.parent).lower()]
            same = all(filecmp.cmp(found[0], path, shallow=False) for path in found[1:])
            if len(found) > 1 and len(own) != 1 and not same:
                raise UsageError(
                    f"--from: {len(found)} files are called {name}, such as {found[0]} and {found[1]}; give"
                    " the folder that holds those of this set only, or put them into one called"
                    f" {self._prefer}"
                )
            if found:
                return (own or found)[0]
        return None


class PathMapper:
    """Image paths as an annotation has them -> paths below the folder of pictures.

    A path that exists below the folder stays. Of any other, leading folders are dropped until it exists
    (`/export/.../VG_100K/1.jpg` -> `VG_100K/1.jpg`); else a picture of COCO is looked for under the names of
    other releases; else one of that name in the whole folder; else it stays as it is. A name without an
    ending may have that of any kind of picture: some of OCR-VQA's covers are GIFs.

    Args:
        root: folder of the pictures.
        suffix: added to names that have none, where there is no picture with another one.
        column: of the annotations that holds the paths.
    """

    def __init__(self, root: Path, suffix: str = "", column: str = "image") -> None:
        self.root = root
        self.suffix = suffix
        self.column = column
        self._parents: dict[str, str] = {}
        self._failures: dict[str, int] = {}
        self._names: dict[str, str] | None = None

    def __call__(self, image: str) -> str:
        others: list[str] = []
        if self.suffix and not image.lower().endswith(IMAGE_SUFFIXES):
            others = [image + ending for ending in IMAGE_SUFFIXES if ending != self.suffix]
            image += self.suffix
            if not self.has(image) and (found := next(filter(self.has, others), None)):
                return found
        parent, _, name = image.rpartition("/")
        if parent in self._parents:
            return str(PurePosixPath(self._parents[parent], name))
        if self._failures.get(parent, 0) < _TRIES:
            parts = [part for part in parent.split("/") if part not in ("", ".", "..")]
            for start in range(len(parts) + 1):
                folder = "/".join(parts[start:])
                if self.has(os.path.join(folder, name)):
                    self._parents[parent] = folder
                    return str(PurePosixPath(folder, name))
            self._failures[parent] = self._failures.get(parent, 0) + 1
        if coco := _COCO.fullmatch(name):
            places = (place.format(coco[1]) for place in _COCO_PLACES)
            if found := next((place for place in places if self.has(place)), None):
                return found
        names = [name, *(other.rpartition("/")[2] for other in others)]
        return next((self._by_name()[name] for name in names if name in self._by_name()), image)

    def has(self, image: str) -> bool:
        """Whether a picture is there; a video file, or the folder of its frames."""
        place = self.root / image
        return place.is_file() or (place.suffix.lower() in VIDEO_SUFFIXES and place.with_suffix("").is_dir())

    def _by_name(self) -> dict[str, str]:
        """Name -> path of every picture or video file whose name occurs once."""
        if self._names is None:
            found: dict[str, str | None] = {}
            for folder, _, names in os.walk(self.root):
                for name in names:
                    if name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)):
                        path = (Path(folder) / name).relative_to(self.root).as_posix()
                        found[name] = None if name in found else path
            self._names = {name: path for name, path in found.items() if path is not None}
        return self._names
