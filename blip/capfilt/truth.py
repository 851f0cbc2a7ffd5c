"""How right the filter was, where that is known: the embedded web scenes say what was done to each text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip.capfilt.units import RecordPool, ShardPool, TruthFiles
from blip.data.readers import read_file
from blip.data.records import PackedRecords
from blip.data.scenes.make import image_path
from blip.data.scenes.world import Scene
from blip.data.truth import SceneJudge
from blip.metrics.retrieval import roc_auc

CLEAN = "clean"
TRUE, FALSE = "synthetic: right", "synthetic: wrong"


class Unknown:
    """Stands where nothing is known."""

    def add(self, line: Mapping[str, Any], kept: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def values(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class Truth(Unknown):
    """Texts of embedded web scenes by kind, kept and not.

    A web text is clean, or corrupted in one of four ways; a synthetic one is right where all it states is.

    Args:
        files: what is known.
        pool: whose texts they are.
    """

    def __init__(self, files: TruthFiles, pool: RecordPool | ShardPool) -> None:
        records = PackedRecords(read_file(files.scenes, "json"))
        self._judge = SceneJudge(records)
        self._images = {Path(path).stem: path for path in map(_image, records)}
        self._kinds = {
            Path(one["image"]).stem: str(one["kind"]) for one in json.loads(files.corrupted.read_text())
        }
        self._pool = pool
        self._counts: dict[str, list[int]] = {}
        self._scores: dict[str, tuple[list[float], list[bool]]] = {}

    def add(self, line: Mapping[str, Any], kept: Sequence[Mapping[str, Any]]) -> None:
        """Count the texts of a picture.

        Args:
            line: of the journal.
            kept: those of its texts that are kept.
        """
        for text in line.get("texts", ()):
            kind = self._kind(self._stem(line), text)
            counts = self._counts.setdefault(kind, [0, 0])
            counts[0] += 1
            counts[1] += any(text is one for one in kept)
            for name in ("itm", "itc") if text["origin"] == "web" else ():
                if name in text:
                    scores, clean = self._scores.setdefault(name, ([], []))
                    scores.append(text[name])
                    clean.append(kind == CLEAN)

    def values(self) -> dict[str, Any]:
        """`truth`: counts by kind; of web texts, how well the scores tell clean from corrupted ones."""
        kinds = {kind: {"texts": n, "kept": kept} for kind, (n, kept) in sorted(self._counts.items())}
        found: dict[str, Any] = {"kinds": kinds}
        web = {kind: row for kind, row in kinds.items() if kind not in (TRUE, FALSE)}
        dirty = [row for kind, row in web.items() if kind != CLEAN]
        if dirty and CLEAN in web:
            clean, lost = web[CLEAN], sum(row["texts"] for row in dirty)
            slipped = sum(row["kept"] for row in dirty)
            found["clean texts kept"] = clean["kept"] / clean["texts"]
            found["corrupted texts removed"] = 1 - slipped / lost
            found["kept texts that are clean"] = clean["kept"] / max(clean["kept"] + slipped, 1)
            found |= {f"AUROC by {name}": roc_auc(*pair) for name, pair in self._scores.items()}
        if TRUE in kinds or FALSE in kinds:
            right, wrong = (kinds.get(kind, {"texts": 0, "kept": 0}) for kind in (TRUE, FALSE))
            for key in ("texts", "kept"):
                name = "synthetic texts that are right" + (", kept ones" if key == "kept" else "")
                found[name] = right[key] / max(right[key] + wrong[key], 1)
        return {"truth": found}

    def _stem(self, line: Mapping[str, Any]) -> str:
        """The picture's file name, without the ending."""
        name = str(line["picture"]).rpartition("/")[2]
        if isinstance(self._pool, ShardPool):
            return name
        return Path(str(self._pool.records[int(name)]["image"])).stem

    def _kind(self, stem: str, text: Mapping[str, Any]) -> str:
        if text["origin"] == "web":
            return self._kinds.get(stem, "unknown")
        verdict = self._judge(self._images.get(stem, ""), text["caption"])
        return TRUE if verdict and verdict["stated"] and verdict["right"] == verdict["stated"] else FALSE


def truth_of(pool: RecordPool | ShardPool) -> Unknown:
    """What is known of a pool's texts."""
    files = pool.truth
    return Unknown() if files is None or not all(file.is_file() for file in files) else Truth(files, pool)


def _image(record: Mapping[str, Any]) -> str:
    return image_path(Scene.from_record(dict(record)))
